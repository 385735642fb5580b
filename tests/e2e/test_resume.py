"""How a run of stage 1 goes on: to the bit, after `kill -9`, and what it refuses to go on from."""

import random
import re
import signal
import time

import pytest
import torch

from app.training import checkpoints
from tests.runs import (
    NAMES,
    STEPS,
    assert_refused,
    assert_same_weights,
    make_place,
    rows_of,
    run_in,
    snapshot,
    timeless,
    told_to_end,
    wait_until,
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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("part", ["network", "optimizer", "step"])
def test_foreign_numbers_in_a_saved_warm_up(part, start_process, place, cohort):
    out, settings = place / "out", {**LONG, "dataset_dir": cohort, "warmup_steps": 2000, "num_workers": 0}
    told_to_end(place, start_process, signal.SIGTERM, has_row(out, "warmup", 2), **settings)
    (file,) = (out / "ckpts").glob("warmup_step*.pt")
    content = checkpoints.read_tensors(file)
    if part == "network":
        name = next(name for name in content[part] if name.endswith("weight"))
        content[part][name] = content[part][name] + 1
    else:
        content[part] = {"optimizer": [], "step": 3000}[part]
    torch.save(content, file)
    before = snapshot(out)
    end = run_in(place, output_dir="out", resume="latest", **settings)
    assert_refused(end, code="BAD_CHECKPOINT", naming=[file.name])
    assert snapshot(out) == before
