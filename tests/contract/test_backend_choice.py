"""Which convolution backend runs: an explicit choice is kept or refused in a line, auto falls back and says so."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from networks.sparse import SparseTensor, maps, ops, spconv_backend, torch_backend, torch_maps


@pytest.mark.parametrize("name", ["triton", "spconv"])
def test_an_explicit_backend_is_refused_on_cpu_and_never_replaced(name):
    x = SparseTensor(torch.zeros(1, 2), torch.zeros(1, 4, dtype=torch.int32), (1, 1, 1), 1)
    with pytest.raises(ValueError, match=f"backend {name} needs CUDA, got features on cpu; choose another"):
        ops.submanifold_conv(x, torch.zeros(27, 2, 2), backend=name)


def test_auto_on_cpu_is_the_torch_backend():
    assert ops.choose_backend("auto", torch.zeros(3, 4), 4) is torch_backend


def test_auto_says_once_what_it_took_and_why_not_the_others(monkeypatch, caplog):
    ops._announce.cache_clear()
    monkeypatch.setattr(ops, "defect", lambda name, index: "cannot be imported (ImportError: gone)")
    with FakeTensorMode():  # features "on" a device that this machine may lack
        feats = torch.empty(3, 4, device="cuda:0")
        with caplog.at_level(logging.INFO, logger=ops.__name__):
            assert ops.choose_backend("auto", feats, 4) is torch_backend
            assert ops.choose_backend("auto", feats, 4) is torch_backend
        with pytest.raises(ValueError, match="backend triton cannot be imported"):
            ops.choose_backend("triton", feats, 4)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "torch.float32: torch (triton cannot be imported" in lines[0]


def test_maps_are_plain_on_cpu_and_where_no_kernel_works(monkeypatch, caplog):
    def absent(name):
        raise ImportError(f"no {name}")

    assert maps.maps_for(torch.device("cpu")) is torch_maps
    maps._proven_maps.cache_clear()
    monkeypatch.setattr(maps.importlib, "import_module", absent)
    try:
        with caplog.at_level(logging.WARNING, logger=maps.__name__):
            assert maps.maps_for(torch.device("cuda", 0)) is maps.maps_for(torch.device("cuda", 0)) is torch_maps
    finally:
        maps._proven_maps.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "maps are built in plain torch: the triton kernels do not work here (ImportError: no networks.kernels.maps)"
    ]


def test_spconv_names_its_limits():
    with FakeTensorMode():
        full, fits = (torch.empty(n, 512, device="cuda", dtype=torch.float16) for n in (2**21, 2**21 - 1))
        assert "less than 2^31 bytes" in spconv_backend.refusal(full, 512)
        assert spconv_backend.refusal(fits, 512) is None
        assert "less than 2^31 bytes" in spconv_backend.refusal(fits, 513)
        brain = torch.empty(3, 8, device="cuda", dtype=torch.bfloat16)
        assert "float16 or float32, got torch.bfloat16" in spconv_backend.refusal(brain, 8)
    assert "CUDA only" in spconv_backend.refusal(torch.zeros(1, 1), 1)


def test_weights_go_to_spconv_and_back(generator):
    weight = torch.randn(27, 3, 5, generator=generator)
    there = spconv_backend.to_spconv(weight)
    assert there.shape == (5, 3, 3, 3, 3) and torch.equal(there[4, 2, 0, 1, 2], weight[2 * 9 + 0 * 3 + 1, 2, 4])
    assert torch.equal(spconv_backend.from_spconv(there), weight)
