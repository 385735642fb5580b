"""How a run of stage 1 goes on: to the bit, after `kill -9`, and what it refuses to go on from."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

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
    assert_same_weights,
    end_of,
    make_place,
    rows_of,
    run_in,
    snapshot,
    timeless,
    weights_of,
)


def test_a_run_says_from_its_first_step_how_long_it_takes_and_at_its_end_what_it_left(straight):
    said = straight[1].out
    assert said.index("drawing the samples of the first step") < said.index("Warm-up step 1:")
    for name, last in (("Warm-up step", 10), ("Step", 20)):
        (first,) = [line for line in said.splitlines() if f"{name} 1: loss=" in line]
        assert re.search(rf"\([\d.]+ s a step, about [\d.]+ \w+ left of {last} steps\)$", first), first
    best = checkpoints.read_best(straight[0])
    assert re.search(rf"done in [\d.]+ \w+: best step {best}, in out\. Next: bundles/evaluate_tokenizer\.json", said)


# ---- going on


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_cut_back_and_resumed_is_the_straight_run_to_the_bit(straight, earlier, place, cohort, workers):
    for name in NAMES:
        checkpoints.step_file(earlier, name, 20).unlink()
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", num_workers=workers, **STEPS)
    assert end.status == 0, end.err
    assert "resumed at step 10" in end.out and "Warm-up" not in end.out
    assert timeless(rows_of(earlier)) == timeless(rows_of(straight[0]))
    assert timeless(rows_of(earlier, "warmup")) == timeless(rows_of(straight[0], "warmup"))
    for name in NAMES[:2]:
        assert_same_weights(weights_of(earlier, 20, name), weights_of(straight[0], 20, name))


def test_resuming_an_earlier_step_sets_the_later_ones_aside(straight, earlier, place, cohort):
    (earlier / "ckpts/best.json").write_text('{"step": 20, "val_recon": 0.0}\n')
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume=10, **{**STEPS, "max_steps": 12, "i_save": 12})
    assert end.status == 0, end.err
    assert checkpoints.complete_steps(earlier) == [0, 10, 12]
    assert [row["step"] for row in rows_of(earlier) if "loss" in row] == list(range(1, 13))
    assert checkpoints.read_best(earlier) in (10, 12)
    assert (earlier / "ckpts/aside/vqvae_step0000020.pt").exists(), "nothing is thrown away"


def test_a_longer_run_goes_on_where_it_ended(earlier, place, cohort):
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**STEPS, "max_steps": 23})
    assert end.status == 0, end.err
    assert [row["step"] for row in rows_of(earlier) if "loss" in row] == list(range(1, 24))


def test_a_finished_run_resumed_trains_nothing_and_says_so(earlier, place, cohort):
    before = snapshot(earlier)
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **STEPS)
    assert end.status == 0, end.err
    assert snapshot(earlier) == before
    assert "nothing left to train" in end.out


def test_nothing_to_resume_starts_fresh_and_says_so(place, cohort):
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 2}
    end = run_in(place, dataset_dir=cohort, output_dir="new", resume="latest", **settings)
    assert end.status == 0, end.err
    assert "nothing to resume in new: starting fresh" in end.out
    assert checkpoints.complete_steps(place / "new")[-1] == 2


def test_a_run_without_resume_keeps_the_earlier_one(earlier, place, cohort):
    before = snapshot(earlier)
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 2}
    end = run_in(place, dataset_dir=cohort, output_dir="out", **settings)
    assert end.status == 0, end.err
    assert snapshot(place / "out.1") == before
    assert "out.1" in end.out and checkpoints.complete_steps(earlier) == [0, 2]


def test_weights_of_an_earlier_stage_are_found_and_used(earlier, place, cohort):
    settings = {**STEPS, "max_steps": 2}
    end = run_in(place, dataset_dir=cohort, output_dir="next", pretrained_vae_path="out", **settings)
    assert end.status == 0, end.err
    assert "autoencoder weights from" in end.out and "Warm-up" not in end.out
    source = checkpoints.read_tensors(checkpoints.averaged_file(earlier))
    got = weights_of(place / "next", 2)
    assert_same_weights(
        {k: v for k, v in source.items() if k.startswith("encoder.")},
        {k: v for k, v in got.items() if k.startswith("encoder.")},
    )


# ---- killed


def wait_until(there, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.01)


OFTEN = {"warmup_steps": 3, "max_steps": 40, "i_save": 1, "val_interval": 5, "i_sample": 40, "keep_last": 3}


@pytest.fixture(scope="module")
def uninterrupted(cohort, tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("uninterrupted"))
    end = run_in(place, dataset_dir=cohort, output_dir="out", **OFTEN)
    assert end.status == 0, end.err
    return place / "out"


def kill_and_resume(moments, start_process, place, cohort, uninterrupted):
    """Kills a run at each moment after its first set, twice at most at a time; each resumes from a whole set."""
    starts = []
    for number, moment in enumerate(moments):
        out = place / f"run{number}"
        process = start_process(dataset_dir=cohort, output_dir=out.name, **OFTEN)
        starts.append((out, moment, process))
    for out, _, process in starts:
        wait_until(lambda out=out: checkpoints.complete_steps(out), process)
    begun = time.monotonic()
    for _, moment, process in sorted(starts, key=lambda item: item[1]):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    for out, _, _ in starts:
        last = checkpoints.complete_steps(out)[-1]
        for step in checkpoints.complete_steps(out):
            for name in NAMES:
                checkpoints.read_tensors(checkpoints.step_file(out, name, step))
        end = run_in(place, dataset_dir=cohort, output_dir=out.name, resume="latest", **OFTEN)
        assert end.status == 0, end.err
        assert f"resumed at step {last}" in end.out or f"nothing left to train: step {last}" in end.out
        assert timeless(rows_of(out)) == timeless(rows_of(uninterrupted))
        assert_same_weights(weights_of(out, 40), weights_of(uninterrupted, 40))
        assert not list(out.glob("ckpts/*.part"))


def test_killed_at_two_moments_it_goes_on_from_the_last_whole_set(start_process, place, cohort, uninterrupted):
    draw = random.Random()
    kill_and_resume([draw.uniform(0, 3) for _ in range(2)], start_process, place, cohort, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("pair", range(5))
def test_killed_at_ten_moments_it_goes_on_from_the_last_whole_set(pair, start_process, place, cohort, uninterrupted):
    draw = random.Random()
    kill_and_resume([draw.uniform(0, 4) for _ in range(2)], start_process, place, cohort, uninterrupted)


@pytest.mark.slow
def test_killed_in_the_warm_up_it_starts_afresh(start_process, place, cohort):
    settings = {**OFTEN, "warmup_steps": 5000}
    process = start_process(dataset_dir=cohort, output_dir="out", **settings)
    wait_until((place / "out/metrics.jsonl").exists, process)
    process.kill()
    process.wait()
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **{**OFTEN, "max_steps": 1})
    assert end.status == 0, end.err
    assert "starting fresh" in end.out


# ---- told to end


def told_to_end(place, start_process, number, there, **settings):
    """Starts a run, sends all its processes the signal once `there` holds, and gives how it ended."""
    process = start_process(output_dir="out", **settings)
    wait_until(there, process)
    os.killpg(process.pid, number)
    return end_of(process)


LONG = {**STEPS, "warmup_steps": 6, "max_steps": 2000, "i_save": 1000, "val_interval": 1000, "i_sample": 1000}


def has_row(out, phase, step):
    def there():
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        return any(f'"phase": "{phase}", "step": {step},' in line for line in lines)

    return there


@pytest.mark.parametrize(
    ("number", "status", "name", "workers"),
    [(signal.SIGTERM, 143, "SIGTERM", 2), (signal.SIGINT, 130, "Ctrl-C", 2), (signal.SIGTERM, 143, "SIGTERM", 0)],
)
def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_as_if_it_had_not(
    number, status, name, workers, start_process, place, cohort
):
    out = place / "out"
    settings = {**LONG, "dataset_dir": cohort, "num_workers": workers}
    end = told_to_end(place, start_process, number, has_row(out, "train", 5), **settings)
    (_, step) = checkpoints.complete_steps(out)
    assert end.status == status and step >= 5, end.err
    said = f"STOPPED: ended by {name} at step {step}, saved whole in out. To go on, run the same command with --resume"
    assert end.error.startswith(said) and len(end.error.splitlines()) == 1, end.err
    again = run_in(place, output_dir="out", resume="latest", **{**settings, "max_steps": step + 3, "num_workers": 0})
    assert again.status == 0 and f"resumed at step {step}" in again.out, again.err
    assert [row["step"] for row in rows_of(out) if "loss" in row] == list(range(1, step + 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_either_phase_it_goes_on_to_the_losses_of_the_uninterrupted_run(
    number, start_process, place, cohort
):
    settings = {**STEPS, "dataset_dir": cohort, "warmup_steps": 40, "max_steps": 40, "i_save": 100, "val_interval": 8}
    straight = run_in(place, output_dir="straight", **settings)
    assert straight.status == 0, straight.err
    out = place / "out"
    end = told_to_end(place, start_process, number, has_row(out, "warmup", 3), num_workers=2, **settings)
    assert end.status == 128 + number and "at warm-up step" in end.error, end.err
    assert len(end.error.splitlines()) == 1 and not checkpoints.complete_steps(out)
    step = len(rows_of(out, "warmup"))
    (file,) = (out / "ckpts").iterdir()
    assert file.name == f"warmup_step{step:07d}.pt"
    end = told_to_end(place, start_process, number, has_row(out, "train", 3), resume="latest", **settings)
    assert end.status == 128 + number and "at step" in end.error, end.err
    assert f"resumed at warm-up step {step}" in end.out
    assert not list((out / "ckpts").glob("warmup*"))
    again = run_in(place, output_dir="out", resume="latest", **settings)
    assert again.status == 0, again.err
    assert timeless(rows_of(out, None)) == timeless(rows_of(place / "straight", None))
    assert_same_weights(weights_of(out, 40), weights_of(place / "straight", 40))


def test_before_its_first_step_a_run_ends_at_once_and_in_one_line(start_process, place, cohort):
    slow = "$(__import__('time').sleep(60), 1e-3)[1]"
    end = told_to_end(
        place, start_process, signal.SIGTERM, (place / "here").exists, dataset_dir=cohort, **STEPS,
        learning_rate=slow, seed="$(__import__('pathlib').Path('here').touch(), 0)[1]",
    )  # fmt: skip
    assert end.status == 143 and end.error.startswith("STOPPED: ended by SIGTERM."), end.err
    assert len(end.error.splitlines()) == 1


# ---- refused


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
    assert began.pop("max_shift") == 4
    assert began.pop("prepare_batch")
    for part in ("optimizer", "averaged", "schedule", "network", "loss_function"):
        began[part]["_target_"] = "a.B"
    (earlier / "config.json").write_text(json.dumps(began))  # as by software that knew no such choice
    settings = {**STEPS, "max_steps": 21, "learning_rate": 5e-4}
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert end.status == 0, end.err
    (line,) = [line for line in (earlier / "log.txt").read_text().splitlines() if "goes on with other settings" in line]
    assert "max_shift 4 (was not to be chosen)" in line and "learning_rate 0.0005 (was " in line
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
