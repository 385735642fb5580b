"""Which convolutions run with producer warps, and what is said where these do not work."""

import logging

import pytest
import torch

pytest.importorskip("triton")
from networks.kernels import convolution
from networks.kernels.tiles import few_parts, gradient_is_shared, producer_plan

H200_ROOM, RTX_4090_ROOM = 232448, 101376  # bytes of shared memory
CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("channels", "columns", "dtype", "thin", "mirrored", "served"),
    [
        (128, 128, torch.bfloat16, False, False, True),
        (192, 384, torch.float16, False, False, True),
        (256, 256, torch.bfloat16, True, True, True),
        (128, 128, torch.bfloat16, True, False, False),  # no faster
        (128, 128, torch.bfloat16, False, True, False),
        (256, 256, torch.float32, False, False, False),
        (64, 256, torch.bfloat16, False, False, False),
        (256, 64, torch.bfloat16, False, False, False),
        (136, 256, torch.bfloat16, False, False, False),
        (256, 200, torch.bfloat16, False, False, False),
    ],
)
def test_shapes_that_gain_are_served(channels, columns, dtype, thin, mirrored, served):
    plan = producer_plan(channels, columns, dtype, H200_ROOM, thin=thin, mirrored=mirrored)
    assert (plan is not None) == served
    assert producer_plan(channels, columns, dtype, RTX_4090_ROOM, thin=thin, mirrored=mirrored) is None


@pytest.mark.parametrize(
    ("channels", "columns", "dtype", "thin", "served"),
    [
        (128, 128, torch.bfloat16, False, True),
        (256, 384, torch.float16, False, True),
        (128, 128, torch.bfloat16, True, False),  # lists of pairs spare more
        (128, 128, torch.float32, False, False),
        (192, 128, torch.bfloat16, False, False),
        (128, 64, torch.bfloat16, False, False),
        (0, 128, torch.bfloat16, False, False),
    ],
)
def test_weight_gradients_that_gain_are_served(channels, columns, dtype, thin, served):
    assert gradient_is_shared(channels, columns, dtype, H200_ROOM, thin=thin) == served
    assert not gradient_is_shared(channels, columns, dtype, RTX_4090_ROOM, thin=thin)


@pytest.mark.parametrize(("programs", "parts"), [(9, 14), (36, 7), (144, 5), (131, 1), (1000, 1)])
def test_parts_keep_a_card_busy_and_are_few(programs, parts):
    assert few_parts(programs, 132) == parts


KEPT = (convolution._with_producers, convolution._gradient_with_producers, convolution._defect_of_producers)


@pytest.fixture
def hopper(monkeypatch):
    for kept in KEPT:
        kept.cache_clear()
    monkeypatch.setattr(convolution, "KNOWN_LAUNCHER", True)
    monkeypatch.setattr(convolution, "shared_memory", lambda device: H200_ROOM)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield
    for kept in KEPT:
        kept.cache_clear()


def test_a_card_on_which_they_fail_runs_without_and_says_so_once(hopper, monkeypatch, caplog):
    def broken(device, plain):
        raise RuntimeError("no such operation\nmore of it")

    producers = pytest.importorskip("networks.kernels.producer_convolution")
    monkeypatch.setattr(producers, "largest_error", broken)
    for columns in (256, 512):
        assert convolution._with_producers(256, columns, torch.bfloat16, CARD, False, False) is None
        assert convolution._gradient_with_producers(256, columns, torch.bfloat16, CARD, False) is None
    assert [record.message for record in caplog.records] == [
        "convolutions of many channels run without producer warps: they do not work here "
        "(RuntimeError: no such operation)"
    ]


@pytest.mark.parametrize("errors", [(0.5, 0.0), (0.0, 0.5), (float("nan"), 0.0), (0.0, float("nan"))])
def test_wrong_values_are_a_defect(hopper, monkeypatch, caplog, errors):
    for part, error in zip(("convolution", "gradient"), errors, strict=True):
        producers = pytest.importorskip(f"networks.kernels.producer_{part}")
        monkeypatch.setattr(producers, "largest_error", lambda device, plain, error=error: error)
    assert convolution._with_producers(256, 256, torch.bfloat16, CARD, False, False) is None
    assert "relative error" in caplog.text


def test_right_values_on_hopper_alone_are_served(hopper, monkeypatch, caplog):
    producers = pytest.importorskip("networks.kernels.producer_convolution")
    gradient = pytest.importorskip("networks.kernels.producer_gradient")
    for part in (producers, gradient):
        monkeypatch.setattr(part, "largest_error", lambda device, plain: 1e-4)
    with caplog.at_level(logging.INFO):
        served = convolution._with_producers(256, 256, torch.bfloat16, CARD, False, True)
    assert served.func is producers.gather_product and "with producer warps" in caplog.text
    assert convolution._gradient_with_producers(256, 128, torch.bfloat16, CARD, False) is gradient.row_products
    for kept in KEPT:
        kept.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert convolution._with_producers(256, 256, torch.bfloat16, CARD, False, True) is None
    assert convolution._gradient_with_producers(256, 128, torch.bfloat16, CARD, False) is None
