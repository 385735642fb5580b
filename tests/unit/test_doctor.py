"""The doctor's findings on this machine, and that a broken backend cannot pass its proof."""

import io

import torch

from app import doctor
from networks.sparse import torch_backend


def test_report_returns_what_it_prints():
    page = io.StringIO()
    found = doctor.report(file=page)
    text = page.getvalue()
    assert found["versions"]["torch"] in text and found["python"] in text
    assert set(found["backends"]) == {"triton", "spconv", "torch"} and found["backends"]["torch"] is None
    assert all(line in text for line in found["advice"])
    if not torch.cuda.is_available():
        assert found["gpus"] == [] and found["backends"]["triton"] == "needs a CUDA device"
        assert any("no CUDA device" in line for line in found["advice"])


def test_a_backend_that_computes_something_else_is_found_out(monkeypatch):
    right = torch_backend.input_grad
    monkeypatch.setattr(torch_backend, "input_grad", lambda grad, weight, level: right(grad, weight.flip(0), level))
    assert "wrong results" in doctor.backends()["torch"]


def test_each_missing_thing_has_its_line():
    found = doctor.examine() | {"memory_gib": 1.0, "disk_gib": 2.0, "system": "Darwin arm64"}
    found["decoders"] = dict.fromkeys(doctor.SYNTAXES, False)
    lines = "\n".join(doctor._advice(found))
    for word in ("Darwin", "JPEG-LS", "1.0 GiB of memory", "2.0 GiB of disk"):
        assert word in lines
