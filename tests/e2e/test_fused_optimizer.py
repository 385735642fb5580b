"""A run whose AdamW is fused, as on a card: with torch's own it is the same, and either goes on with the other's."""

import shutil

import pytest
import torch

from app.training import checkpoints
from app.training.kept_adamw import KeptAdamW
from app.training.seals import content_hash
from tests.runs import NAMES, assert_same_weights, end_of, run_in, torchrun, weights_of

STAGE2 = "bundles/vq_stage2.json"
FUSED = {"optimizer#fused": True, "init_from": "out", "decoder_steps": 3, "batch_size_per_gpu": 2}
STEPS = {"max_steps": 8, "i_save": 5, "val_interval": 5, "i_sample": 8, "keep_last": 9}
OF_TORCH = {"optimizer#_target_": "torch.optim.AdamW"}


@pytest.fixture
def short_steps(monkeypatch):
    """How many steps went over kept lists."""
    seen, kept_gradients = [], KeptAdamW.kept_gradients
    monkeypatch.setattr(KeptAdamW, "kept_gradients", lambda self: seen.append(grads := kept_gradients(self)) or grads)
    return seen


def same_set(one, other, step):
    for name in NAMES[:2]:
        assert_same_weights(weights_of(one, step, name), weights_of(other, step, name))
    first, second = (checkpoints.read_tensors(checkpoints.step_file(out, "misc", step)) for out in (one, other))
    for mine, theirs in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in (*mine, *theirs))
    assert content_hash(first["optimizer"]) == content_hash(second["optimizer"])


@pytest.mark.slow
def test_a_run_is_that_of_torchs_optimizer_and_either_goes_on_with_the_others(earlier, place, cohort, short_steps):
    settings = {"dataset_dir": cohort, **FUSED, **STEPS, "batch_split": 2}
    for out, how in (("kept", {}), ("plain", OF_TORCH)):
        end = run_in(place, STAGE2, output_dir=out, **settings, **how)
        assert end.status == 0, end.err
    assert len([grads for grads in short_steps if grads]) > 8, "the short way was taken"
    for step in (5, 8):
        same_set(place / "kept", place / "plain", step)
    for out, how in (("kept", OF_TORCH), ("plain", {})):
        shutil.copytree(place / out, place / "gone_on", dirs_exist_ok=True)
        end = run_in(place, STAGE2, output_dir="gone_on", resume=5, **settings, **how)
        assert end.status == 0 and "resumed at step 5" in end.out, end.err
        same_set(place / "gone_on", place / "plain", 8)


@pytest.mark.slow
def test_two_processes_are_those_of_torchs_optimizer(earlier, place, cohort, start_process):
    both = f"['{STAGE2}','bundles/multi_gpu.json']"
    for out, how in (("kept", {}), ("plain", OF_TORCH)):
        settings = {"dataset_dir": cohort, **FUSED, "batch_size_per_gpu": 1, **STEPS, **how}
        end = end_of(start_process(both, launcher=torchrun(), output_dir=out, **settings))
        assert end.status == 0, end.err
    same_set(place / "kept", place / "plain", 8)
