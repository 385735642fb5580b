"""On how many threads the demo computes, and that nothing of it stays behind."""

import json

import pytest
import torch

from app.shared.devices import choose_device, threads_kept
from app.shared.places import bundles_folder


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_kept():
        torch.set_num_threads(2)
        yield


def test_the_demo_computes_on_one_thread_and_afterwards_there_are_as_many_as_before(two_threads):
    with threads_kept():
        assert choose_device(one_thread=True) == torch.device("cpu") and torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    choose_device()
    assert torch.get_num_threads() == 2


def test_who_names_the_threads_has_them(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    choose_device(one_thread=True)
    assert torch.get_num_threads() == 2


def test_every_stage_asks_for_one_thread_on_the_demo_alone():
    stages = [file for file in bundles_folder().glob("*.json") if '"demo": {' in file.read_text()]
    assert len(stages) >= 5
    for file in stages:
        assert json.loads(file.read_text())["device"]["one_thread"] == "@demo", file.name
