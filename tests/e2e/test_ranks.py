"""The same training however its samples are split: over micro-batches, over two processes, and resumed on one."""

import os
import signal

import pytest

from app.training import checkpoints
from tests.runs import (
    STAGE1,
    assert_same_story,
    end_of,
    make_cohort,
    make_place,
    run_in,
    told_by,
    torchrun,
    torchrun_of_nodes,
    wait_until,
)

# Of the demo's 24 levels the last quantise what is hardly there, where rounding alone decides between two codes.
STEPS = {"warmup_steps": 4, "max_steps": 6, "i_save": 3, "val_interval": 3, "quantizer_levels": 4}
BOTH = f"['{STAGE1}','bundles/multi_gpu.json']"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("ranks") / "data", splits=("train",) * 5 + ("val",) * 3)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process with both samples of each step."""
    place = make_place(tmp_path_factory.mktemp("alone"))
    end = run_in(place, dataset_dir=data, output_dir="out", batch_size_per_gpu=2, **STEPS)
    assert end.status == 0, end.err
    return place / "out"


def test_two_processes_tell_the_story_of_one(data, alone, place, start_process):
    end = end_of(start_process(BOTH, launcher=torchrun(), dataset_dir=data, output_dir="out", **STEPS))
    assert end.status == 0, end.err
    out = place / "out"
    assert_same_story(told_by(out), told_by(alone))
    assert end.out.count("Step 6: loss=") == 1, "one voice on the console"
    assert checkpoints.complete_steps(out) == [0, 3, 6] and len(list(out.glob("tb_logs/*"))) == 1
    assert checkpoints.read_weights(out)[0].keys() == checkpoints.read_weights(alone)[0].keys()

    for name in ("vqvae", "vqvae_ema0.9999", "misc"):  # and goes on in one process
        checkpoints.step_file(out, name, 6).unlink()
    end = run_in(place, dataset_dir=data, output_dir="out", batch_size_per_gpu=2, resume="latest", **STEPS)
    assert end.status == 0 and "resumed at step 3" in end.out
    assert_same_story(told_by(out), told_by(alone))


@pytest.mark.slow
def test_two_nodes_tell_the_story_of_one_process(data, alone, place, start_process):
    settings = {"dataset_dir": data, "output_dir": "out", **STEPS}
    nodes = [start_process(BOTH, launcher=launcher, **settings) for launcher in torchrun_of_nodes(2)]
    ends = [end_of(node) for node in nodes]
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert_same_story(told_by(place / "out"), told_by(alone))
    assert sum(end.out.count("Step 6: loss=") for end in ends) == 1, "one voice over all nodes"
    assert checkpoints.complete_steps(place / "out") == [0, 3, 6]


@pytest.mark.slow
def test_two_processes_learn_a_codebook_by_gradient(data, place, start_process):
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 2, "codebook": "gradient"}
    end = end_of(start_process(BOTH, launcher=torchrun(), dataset_dir=data, output_dir="out", **settings))
    assert end.status == 0, end.err
    start, stop = (checkpoints.read_tensors(checkpoints.step_file(place / "out", "vqvae", step)) for step in (0, 2))
    assert (start["vq.levels.0.embeddings.weight"] != stop["vq.levels.0.embeddings.weight"]).any()


@pytest.mark.parametrize("stage", ["vae", "vq_stage1"])
def test_micro_batches_tell_the_story_of_the_batch(stage, data, place):
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 3}
    if stage == "vae":
        settings |= {"warmup_steps": None, "num_embeddings": None, "quantizer_levels": None}
    for split in (1, 2, 4):
        settings["batch_split"] = split
        end = run_in(
            place, f"bundles/{stage}.json", dataset_dir=data, output_dir=f"by{split}", batch_size_per_gpu=4, **settings
        )
        assert end.status == 0, end.err
    for split in (2, 4):
        assert_same_story(told_by(place / f"by{split}"), told_by(place / "by1"))


@pytest.mark.slow
def test_fewer_validation_cases_than_processes_is_one_line(place, start_process):
    data = make_cohort(place / "few", splits=("train",) * 4 + ("val",))
    end = end_of(start_process(BOTH, launcher=torchrun(), dataset_dir=data, output_dir="out", **STEPS))
    assert end.status != 0
    lines = [line for line in end.err.splitlines() if line.startswith("BAD_VALUE")]
    assert lines and "val split must give each of 2 processes a case" in lines[0]
    assert "Warm-up" not in end.out and not (place / "out").exists()


@pytest.mark.slow
def test_processes_with_different_data_are_one_line(data, place, start_process):
    make_cohort(place / "other", splits=("train",) * 5 + ("val",) * 3, change=lambda hu, index: hu + index)
    split = f"$'{data}' if __import__('os').environ['RANK'] == '0' else 'other'"
    end = end_of(start_process(BOTH, launcher=torchrun(), dataset_dir=split, output_dir="out", **STEPS))
    assert end.status != 0 and "Step 1" not in end.out
    assert any("the same cases for every process" in line for line in end.err.splitlines())


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_goes_on(data, place, start_process):
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 60, "i_save": 2}
    straight = run_in(place, dataset_dir=data, output_dir="alone", batch_size_per_gpu=2, **settings)
    assert straight.status == 0, straight.err
    process = start_process(BOTH, launcher=torchrun("--max_restarts=2"), dataset_dir=data, output_dir="out", **settings)
    wait_until(lambda: any(step >= 6 for step in checkpoints.complete_steps(place / "out")), process, 200)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    end = end_of(process)
    assert end.status == 0, end.err
    assert "resumed at step" in end.out
    assert_same_story(told_by(place / "out"), told_by(place / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", "one rank"])
@pytest.mark.parametrize("phase", ["warmup", "train"])
def test_when_one_process_is_told_to_end_all_end_after_the_same_step(told, phase, data, place, start_process):
    settings = {**STEPS, "warmup_steps": 30, "max_steps": 30, "i_save": 30, "val_interval": 30, "num_workers": 1}
    straight = run_in(place, dataset_dir=data, output_dir="alone", batch_size_per_gpu=2, **settings)
    assert straight.status == 0, straight.err
    process = start_process(BOTH, launcher=torchrun(), dataset_dir=data, output_dir="out", **settings)
    out, row = place / "out", f'"{phase}", "step": 3,'
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and row in metrics.read_text(), process, 200)
    os.kill(process.pid if told == "launcher" else ranks_of(process.pid)[-1], signal.SIGTERM)
    end = end_of(process)
    assert end.status != 0
    (line,) = [line for line in end.err.splitlines() if line.startswith("STOPPED")]
    assert ("at warm-up step" in line) == (phase == "warmup") and "saved whole in out" in line
    end = run_in(place, dataset_dir=data, output_dir="out", batch_size_per_gpu=2, resume="latest", **settings)
    assert end.status == 0 and "resumed at" in end.out, end.err
    assert_same_story(told_by(out), told_by(place / "alone"))


@pytest.mark.slow
def test_without_restarts_a_killed_rank_ends_the_job_in_one_line(data, place, start_process):
    settings = {**STEPS, "warmup_steps": 2, "max_steps": 4000, "i_save": 20}
    process = start_process(BOTH, launcher=torchrun(), dataset_dir=data, output_dir="out", **settings)
    wait_until(lambda: any(step >= 20 for step in checkpoints.complete_steps(place / "out")), process, 200)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    end = end_of(process)
    assert end.status == 1
    lines = [line for line in end.err.splitlines() if line.startswith("LOST_RANK")]
    assert all("--resume latest" in line for line in lines)
    assert len(lines) == 1 or "(SIGTERM)" in end.err  # torchrun may have ended the other before it noticed
    assert "[rank0]" not in end.err


def ranks_of(launcher):
    with open(f"/proc/{launcher}/task/{launcher}/children") as file:
        return [int(number) for number in file.read().split()]
