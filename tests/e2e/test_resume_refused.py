"""What a run of stage 1 does not go on from, and what it leaves where it is."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from app.tokens.tokenizer import find_tokenizer
from app.training import checkpoints
from app.training.run_folder import RunFolder
from networks.presets import Preset
from tests.runs import (
    NAMES,
    STEPS,
    assert_refused,
    rows_of,
    run_in,
    snapshot,
    timeless,
    told_to_end,
)

REFUSED_LATE = [
    {"max_points": 30},
    {"pretrained_vae_path": "bad.pt"},
    {"learning_rate": 1e30},
    {"lr_scheduler": "ExponentialLR", "lr_scheduler_options": "{'gama': 1}"},
]


@pytest.mark.parametrize("change", REFUSED_LATE, ids=lambda change: next(iter(change)))
def test_a_run_that_is_refused_before_its_first_step_leaves_the_earlier_one_where_it_is(
    earlier, place, cohort, change, monkeypatch
):
    before = snapshot(earlier)
    (place / "bad.pt").write_text("no checkpoint")
    if "learning_rate" in change:  # a loss that is no number at the first step
        monkeypatch.setattr(
            "app.training.step.TokenizerStep.optimize", lambda *_: (_ for _ in ()).throw(ValueError("no"))
        )
    end = run_in(place, dataset_dir=cohort, output_dir="out", **{**STEPS, **change})
    assert end.status != 0
    assert {name: now for name, now in snapshot(earlier).items() if not name.startswith(".")} == before
    assert not (place / "out.1").exists() and find_tokenizer(earlier).parent == earlier / "ckpts"
    monkeypatch.undo()
    end = run_in(place, dataset_dir=cohort, output_dir="out", **{**STEPS, "warmup_steps": 2, "max_steps": 2})
    assert end.status == 0, end.err
    assert snapshot(place / "out.1") == before and not list(place.glob("out*/.starting_run"))
    assert "to go on with it: --resume latest --output_dir out.1" in end.out
    assert (earlier / "log.txt").read_text().count("Warm-up step 1:") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_before_its_first_step_a_run_leaves_the_earlier_one_where_it_is(
    number, earlier, start_process, place, cohort
):
    before = snapshot(earlier)
    settings = {**STEPS, "pretrained_vae_path": "out", "max_steps": 3}
    slow = {"schedule#warmup_lr_steps": "$(__import__('time').sleep(60), 0)[1]"}
    starting = earlier / ".starting_run"
    end = told_to_end(
        place, start_process, number, (starting / "config.json").exists, dataset_dir=cohort, **settings, **slow
    )
    assert end.status in (143, -9)
    assert {name: now for name, now in snapshot(earlier).items() if not name.startswith(".")} == before
    end = run_in(
        place, dataset_dir=cohort, output_dir="out", **settings
    )  # its own weights are still there to start from
    assert end.status == 0, end.err
    assert snapshot(place / "out.1") == before and checkpoints.complete_steps(earlier) == [3]


def test_a_folder_that_another_process_writes_to_is_left_alone(earlier, place, cohort):
    before = snapshot(earlier)
    hold = "f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    call = [sys.executable, "-c", f"import fcntl, sys; {hold}", str(earlier / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        end = run_in(place, dataset_dir=cohort, output_dir="out", **STEPS)
        assert_refused(end, code="IN_USE", naming=["another run is writing to out"])
        assert snapshot(earlier) == before and not (place / "out.1").exists()
        other.communicate("\n")
    assert run_in(place, dataset_dir=cohort, output_dir="out", **{**STEPS, "max_steps": 1}).status == 0
    assert (place / "out.1/.lock").exists() and (place / "out/.lock").exists(), "the new folder is held too"


@pytest.mark.parametrize(
    ("change", "naming"),
    [
        ({"num_embeddings": 32}, ["num_embeddings 16", "--num_embeddings 16"]),
        ({"model_channels": 32}, ["model_channels 16"]),
        ({"spacing": 12.0}, ["spacing 16.0", "data"]),
        ({"windows": "['lung','bone']"}, ["windows", "lung,bone,soft_tissue,brain"]),
        ({"keep": "nonzero"}, ["keep body"]),
        ({"preset": "base", "num_blocks": 4}, ["out"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_run_of_other_sizes_or_data_is_not_resumed(earlier, place, cohort, change, naming):
    before = snapshot(earlier)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 30, **change})
    assert_refused(end, code="OTHER_TOKENIZER", naming=[*naming, "another --output_dir"])
    assert snapshot(earlier) == before
    assert "goes on" not in end.out and "earlier stage" not in end.error, "there is nothing to go on with"
    assert "terminating" not in end.out, "the one line is enough"


def test_a_resumed_run_says_what_it_did_not_begin_with(earlier, place, cohort):
    began = json.loads((earlier / "config.json").read_text())
    assert began.pop("max_shift") == 0.05
    assert began.pop("prepare_batch")
    for part in ("optimizer", "averaged", "schedule", "network", "loss_function"):
        began[part]["_target_"] = "a.B"
    (earlier / "config.json").write_text(json.dumps(began))  # as by software that knew no such choice
    settings = {**STEPS, "max_steps": 21, "learning_rate": 5e-4}
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert end.status == 0, end.err
    (line,) = [line for line in (earlier / "log.txt").read_text().splitlines() if "goes on with other settings" in line]
    assert "max_shift 0.05 (was not to be chosen)" in line and "learning_rate 0.0005 (was " in line
    assert line.endswith(", 6 parts of a bundle that other software wrote") and "_target_" not in line
    assert "max_steps 21 (was 20)" in line and "seed" not in line and "resume" not in line.split("goes on")[1]


def test_settings_inside_a_part_of_the_config_are_named_too(earlier, place, cohort):
    inner = {"optimizer#weight_decay": 0.1, "train#step#grad_clip": 0.3}
    schedule = {"lr_scheduler": "StepLR", "lr_scheduler_options": "{'step_size': 2}"}
    settings = {
        **STEPS,
        **inner,
        **schedule,
        "max_steps": 21,
        "i_print": 7,
        "learning_rate": "$" + "1e-4 + " * 20 + "0",
    }
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert end.status == 0, end.err
    (line,) = [line for line in end.out.splitlines() if "goes on with other settings" in line]
    for part in (
        "optimizer#weight_decay 0.1 (was 0.0)",
        "train#step#grad_clip 0.3 (was @grad_clip)",
        "lr_scheduler_options {'step_size': 2} (was None)",
        "learning_rate 0.00200",  # what the expression comes to
        " (was 0.003)",
    ):
        assert part in line, line
    assert not re.search("output_dir|i_print|resume", line)


@pytest.mark.parametrize("content", ["[]", "3", "{", None])
def test_a_config_that_cannot_be_read_is_said_and_does_not_end_the_run(earlier, place, cohort, content):
    (earlier / "config.json").unlink() if content is None else (earlier / "config.json").write_text(content)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 21})
    assert end.status == 0, end.err
    assert "out/config.json cannot be read: what changed since the run began is not known" in end.out
    assert json.loads((earlier / "config.json").read_text())["max_steps"] == 21


def test_data_prepared_again_on_another_grid_are_named(earlier, place, cohort):
    for name in NAMES[:2]:
        file = checkpoints.step_file(earlier, name, 20)
        state = checkpoints.read_tensors(file)
        sizes = Preset.from_tensor(state["_extra_state"])
        torch.save({**state, "_extra_state": sizes.changed(prepared=[48, 8.0]).to_tensor()}, file)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 21})
    assert end.status == 0, end.err
    (line,) = [line for line in (earlier / "log.txt").read_text().splitlines() if "another grid" in line]
    assert "WARNING" in line and "48 voxels of 8 mm" in line and "24 voxels of 16 mm" in line
    again = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 22})
    assert again.status == 0 and "another grid" not in again.out, "the checkpoint has the grid of now"


def test_weights_of_other_sizes_are_not_taken(earlier, place, cohort):
    settings = {**STEPS, "pretrained_vae_path": "out", "output_dir": "next"}
    end = run_in(place, dataset_dir=cohort, model_channels=32, **settings)
    assert_refused(end, code="OTHER_TOKENIZER", naming=["model_channels 16", "model_channels 32"])


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_checkpoint(earlier, place, cohort, name):
    file = checkpoints.step_file(earlier, name, 20)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = snapshot(earlier)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 30})
    assert_refused(end, code="BAD_CHECKPOINT", naming=[file.name, "older step"])
    assert snapshot(earlier) == before


def test_foreign_numbers_in_what_is_gone_on_with(earlier, place, cohort):
    file = checkpoints.step_file(earlier, "misc", 20)
    misc = checkpoints.read_tensors(file)
    state = misc["optimizer"]["state"]
    state[0]["exp_avg"] = torch.full_like(state[0]["exp_avg"], float("nan"))
    torch.save(misc, file)
    before = snapshot(earlier)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 30})
    assert_refused(end, code="BAD_CHECKPOINT", naming=[file.name, "exp_avg", "older step"])
    assert snapshot(earlier) == before


def test_a_step_that_is_not_there(earlier, place, cohort):
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume=15, **STEPS)
    assert_refused(end, code="NO_CHECKPOINT", naming=["15", "0, 10, 20"])


def test_a_full_disk_while_saving_keeps_the_last_set(earlier, place, cohort, monkeypatch):
    real = torch.save

    def full(content, file, *rest, **options):
        if "misc" in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device")
        return real(content, file, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    settings = {**STEPS, "max_steps": 30}
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert_refused(end, code="SAVE_FAILED", naming=["No space left", "20", "resume latest"])
    assert "terminating" not in end.out
    assert checkpoints.complete_steps(earlier) == [0, 10, 20]
    assert not list(earlier.glob("ckpts/*.part"))
    monkeypatch.undo()
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert end.status == 0 and "resumed at step 20" in end.out


def test_a_full_disk_between_saves_is_one_line(earlier, place, cohort, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(RunFolder, "_write", full)
    before = timeless(rows_of(earlier))
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 30})
    assert_refused(end, code="DISK_FULL", naming=["metrics.jsonl", "resume latest"])
    assert timeless(rows_of(earlier)) == before and checkpoints.complete_steps(earlier) == [0, 10, 20]


def test_a_loss_that_is_no_number_names_step_cases_and_last_set(earlier, place, cohort, monkeypatch):
    from networks.losses import TokenizerLoss

    real = TokenizerLoss.__call__

    def spoilt(self, output, target):
        terms = real(self, output, target)
        return {**terms, "loss": terms["loss"] * (float("nan") if output.recon.feats.requires_grad is False else 1)}

    monkeypatch.setattr(TokenizerLoss, "__call__", spoilt)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 30})
    assert end.status == 1
    assert re.match(r"NOT_FINITE: loss is nan at step 21 on cases case_\d; the last checkpoint is step 20\.", end.error)
    assert "lower learning_rate" in end.error and "an earlier step" in end.error
    assert "terminating" not in end.out
