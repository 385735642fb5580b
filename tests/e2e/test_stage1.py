"""Stage 1 through its bundle: every output file, resuming to the bit, `kill -9`, and what is refused in one line."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from app import checkpoints
from app.checkpoints import find_tokenizer, load_tokenizer
from app.folder import RunFolder
from app.prepared import find_cases
from networks.presets import Preset
from tests.runs import end_of, make_cohort, make_place, run_in

STEPS = {"warmup_steps": 10, "max_steps": 20, "i_save": 10, "val_interval": 10, "i_sample": 20, "keep_last": 3}
NAMES = ("vqvae", "vqvae_ema0.9999", "misc")


def rows_of(folder, phase="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gib")} for row in rows]


def weights_of(folder, step, name="vqvae"):
    return checkpoints.read_tensors(checkpoints.step_file(folder, name, step))


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, {different[0]} first"


def snapshot(folder):
    """Every file that tells of the run, with its content; a refused one may add to log.txt and tb_logs."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".jsonl", ".json", ".txt", ".png"))
    files = [path for path in files if path.name != "log.txt"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(end, *, code, naming=()):
    assert end.status in (2, 3), f"ended with {end.status}\n{end.out[-1000:]}\n{end.err[-3000:]}"
    assert len(end.error.splitlines()) == 1, end.err
    assert re.match(rf"{code}: .+[.;,] .+", end.error), end.error  # what, then what to do
    assert "Traceback" not in end.out + end.err
    for part in naming:
        assert part in end.error, f"{part!r} is not in {end.error!r}"


@pytest.fixture(scope="module")
def straight(cohort, tmp_path_factory):
    """Twenty steps in one go, answering to MONAI's default name."""
    place = make_place(tmp_path_factory.mktemp("straight"))
    end = run_in(place, run_id="run", dataset_dir=cohort, output_dir="out", **STEPS)
    assert end.status == 0, end.err
    return place / "out", end


@pytest.fixture
def earlier(straight, place):
    """A copy of that run, to go on with or to spoil."""
    shutil.copytree(straight[0], place / "out")
    return place / "out"


# ---- what a run leaves


def test_every_output_file_is_there(straight):
    out, _ = straight
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    events = {name for name in found if name.startswith("tb_logs/events.out.tfevents")}
    sets = {f"ckpts/{name}_step{step:07d}.pt" for name in NAMES for step in (0, 10, 20)}
    expected = {"ckpts/best.json", "samples/step0000020.png", "vqvae_model_summary.txt", "config.json"}
    assert len(events) == 1
    assert found - events == sets | expected | {"command.txt", "log.txt", "metrics.jsonl", ".lock"}
    assert (out / "samples/step0000020.png").read_bytes()[:4] == b"\x89PNG"


def test_the_tokenizer_knows_the_grid_of_its_data(straight, cohort):
    shapes = {tuple(case.sidecar["shape"]) + tuple(case.sidecar["spacing"]) for case in find_cases(cohort)}
    assert shapes == {(24, 24, 24, 16.0, 16.0, 16.0)}
    assert load_tokenizer(find_tokenizer(straight[0])).sizes.prepared == (24, 16.0)


def test_metrics_tell_every_step_once(straight):
    out, _ = straight
    warmup, train = rows_of(out, "warmup"), rows_of(out)
    assert [row["step"] for row in warmup] == list(range(1, 11))
    steps = [row for row in train if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    for row in warmup + steps:
        assert {"phase", "step", "loss", "recon", "vq", "commitment", "lr", "points", "seconds"} <= set(row)
        assert np.isfinite(row["loss"]) and row["points"] > 1000 and row["seconds"] > 0
    for row in steps:
        sum_of_terms = row["recon"] + 0.1 * row["subdivision"]  # with an EMA codebook the rest has no gradient
        assert row["loss"] == pytest.approx(sum_of_terms, rel=1e-5)
        assert row["vq"] > 0 and row["commitment"] == pytest.approx(row["vq"])
    validations = [row for row in train if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 10, 20]
    for row in validations:
        assert 1 <= row["val_codes_used"] <= 16 and 1 <= row["val_perplexity"] <= row["val_codes_used"] + 1e-6
        assert row["val_shuffled_ratio"] == pytest.approx(row["val_shuffled"] / row["val_recon"], rel=1e-4)
        assert {f"val_mae_hu_{name}" for name in ("lung", "bone", "soft_tissue", "brain")} <= set(row)


def test_warm_up_trains_and_the_codebook_phase_leaves_encoder_and_decoder_alone(straight):
    out, _ = straight
    losses = [row["loss"] for row in rows_of(out, "warmup")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    start, end = weights_of(out, 0), weights_of(out, 20)
    for name in start:
        frozen = name.startswith(("encoder.", "decoder.")) or name == "_extra_state"
        assert torch.equal(start[name], end[name]) == frozen, name


def test_the_warm_up_clips_gradients_as_it_is_told(place, cohort):
    end = run_in(place, dataset_dir=cohort, output_dir="out", grad_clip=1e-15, warmup_steps=2, max_steps=1)
    assert end.status == 0, end.err
    bias = weights_of(place / "out", 0)["decoder.upsample.0.act_layers.0.bias"]
    assert bias.abs().max() < 1e-6, "next to nothing is left of the gradients: it stays where it starts, at zero"


def test_the_warm_up_follows_the_same_schedule_with_its_options(place, cohort):
    steps = {**STEPS, "warmup_steps": 4, "max_steps": 2}
    options = {"lr_scheduler": "StepLR", "lr_scheduler_options": "{'step_size': 2}", "learning_rate": 1e-3}
    end = run_in(place, dataset_dir=cohort, output_dir="out", **{**steps, **options})
    assert end.status == 0, end.err
    rates = [row["lr"] for row in rows_of(place / "out", "warmup")]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5], rel=1e-3)


def test_summary_lists_ema_and_frozen(straight):
    out, _ = straight
    header, *lines = (out / "vqvae_model_summary.txt").read_text().splitlines()
    assert header.split() == ["Name", "Shape", "Type", "Grad"]
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table["vq.embeddings.weight"] == ["16x8", "float32", "EMA"]
    assert table["subdivision.0.weight"][-1] == "True"
    learns = {name: row[-1] for name, row in table.items()}
    assert {learns[n] for n in learns if n.startswith(("encoder.", "decoder."))} == {"False"}
    assert set(table) == set(weights_of(out, 20)) - {"_extra_state"}


def test_console_log_and_command_say_what_ran(straight, cohort):
    out, end = straight
    assert re.search(r"scale demo: your data in .*data", end.out) and "preset tiny" in end.out
    assert re.search(r"=== out: [\d,]+ parameters, [\d,]+ trainable ===", end.out)
    assert re.search(r"Step 20: loss=\d\S* recon=\d\S* vq=\d\S* commitment=\d\S*\n", end.out)
    log = (out / "log.txt").read_text()
    assert "Step 20: loss=" in log and "Validation at step 20" in log and "Warm-up step 10" in log
    command = (out / "command.txt").read_text()
    assert "--max_steps 20" in command and str(cohort) in command
    config = json.loads((out / "config.json").read_text())
    assert config["max_steps"] == 20 and config["resolution"] == 24 and config["learning_rate"] == 3e-3
    assert config["dataset_dir"] == str(cohort)
    open_keys = [k for k, v in config.items() if not isinstance(v, dict | list) and "$@plan" in str(v)]
    assert not open_keys, f"config.json leaves {open_keys} open"


def test_checkpoints_are_flat_and_load_without_code(straight):
    out, _ = straight
    for name in NAMES[:2]:
        state = torch.load(checkpoints.step_file(out, name, 20), weights_only=True)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert {key.split(".")[0] for key in state} == {"encoder", "decoder", "vq", "subdivision", "_extra_state"}
        assert Preset.from_tensor(state["_extra_state"]).spacing == 16.0
    codebooks = [weights_of(out, 20, name)["vq.embeddings.weight"] for name in NAMES[:2]]
    assert torch.equal(*codebooks), "live and averaged weights must give the same codes"


def test_best_is_the_lowest_validation_among_the_saved(straight):
    out, _ = straight
    best = json.loads((out / "ckpts/best.json").read_text())
    rows = {row["step"]: row["val_recon"] for row in rows_of(out) if "val_recon" in row and row["step"] > 0}
    assert best == {"step": min(rows, key=rows.get), "val_recon": pytest.approx(min(rows.values()))}
    assert checkpoints.averaged_file(out) == out / f"ckpts/vqvae_ema0.9999_step{best['step']:07d}.pt"


def test_the_saved_tokenizer_encodes_and_decodes(straight):
    network = checkpoints.load_tokenizer(straight[0])
    assert network.sizes.num_embeddings == 16 and not network.training


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


# ---- refused


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


def test_real_processes_end_with_one_line_and_status_2(start_process, place, cohort):
    started = [
        start_process(dataset_dir=cohort, output_dir="a", max_stepz=5),
        start_process(dataset_dir="nowhere", output_dir="b"),
    ]
    for process, naming in zip(started, (["max_stepz", "max_steps"], ["nowhere"]), strict=True):
        end = end_of(process)
        assert end.status == 2
        assert_refused(end, code="[A-Z_]+", naming=naming)
    assert not (place / "a").exists() and not (place / "b").exists()


def test_a_missing_folder_of_data(run_bundle):
    assert_refused(run_bundle(dataset_dir="nowhere", output_dir="out"), code="[A-Z_]+", naming=["nowhere", "prepare"])


def test_an_empty_folder_of_data(run_bundle, place):
    (place / "empty").mkdir()
    assert_refused(run_bundle(dataset_dir="empty", output_dir="out"), code="[A-Z_]+", naming=["empty", "prepare"])


def test_bad_data_leaves_an_earlier_run_in_its_place(earlier, place):
    before = snapshot(earlier)
    assert_refused(run_in(place, dataset_dir="nowhere", output_dir="out", **STEPS), code="[A-Z_]+")
    assert snapshot(earlier) == before
    assert not (place / "out.1").exists()


def test_a_case_without_the_asked_window(run_bundle, place):
    data = make_cohort(place / "old")
    for case in (data / "processed").iterdir():  # an older tree: windows only
        (case / "case.json").unlink()
        next((case / "windows").glob("brain*")).unlink()
    end = run_bundle(dataset_dir=data, output_dir="out", windows="['lung','brain']")
    assert_refused(end, code="[A-Z_]+", naming=["brain", "case_0", "lung"])


@pytest.mark.parametrize("workers", [0, 2])
def test_constant_features(run_bundle, place, workers):
    data = make_cohort(place / "flat", change=lambda hu, index: np.full_like(hu, 40))
    end = run_bundle(dataset_dir=data, output_dir="out", window_type="lung", num_workers=workers, **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["constant", "case_"])


def spoil(case, how):
    """One case of a dataset damaged; what the refusal has to name."""
    volume, side = next(case.glob("ct_normalized_*")), case / "case.json"
    if how == "volume cut short":
        volume.write_bytes(volume.read_bytes()[:5000])
    if how == "volume of text":
        volume.write_text("hello")
    if how == "volume of two axes":
        np.save(volume, np.zeros((24, 24), np.int16))
    if how == "volume of floats":
        np.save(volume, np.full((24, 24, 24), np.nan, np.float32))
    if how == "sidecar cut short":
        side.write_text(side.read_text()[:40])
    if how == "sidecar of a list":
        side.write_text("[]")
    if how == "affine of zeros":
        side.write_text(json.dumps({**json.loads(side.read_text()), "affine": [[0] * 4] * 4}))
    return [case.name, volume.name if how.startswith("volume") else side.name, "prepare"]


@pytest.mark.parametrize(
    "how",
    [
        *("volume cut short", "volume of text", "volume of two axes", "volume of floats"),
        *("sidecar cut short", "sidecar of a list", "affine of zeros"),
    ],
)
def test_a_damaged_case(run_bundle, place, cohort, how):
    data = place / "damaged"
    shutil.copytree(cohort, data)
    naming = spoil(data / "processed" / "case_0", how)
    end = run_bundle(dataset_dir=data, output_dir="out", num_workers=0, **STEPS)
    assert_refused(end, code="BAD_VALUE", naming=naming)


def test_a_table_of_cases_that_is_no_text(run_bundle, place, cohort):
    data = place / "damaged"
    shutil.copytree(cohort, data)
    (data / "metadata.csv").write_bytes(b"\xff\xfe\x00")
    end = run_bundle(dataset_dir=data, output_dir="out", **STEPS)
    assert_refused(end, code="BAD_VALUE", naming=["metadata.csv", "UTF-8"])


def test_a_cache_that_cannot_be_written_is_done_without(run_bundle, place, cohort):
    data = place / "full"
    shutil.copytree(cohort, data, ignore=shutil.ignore_patterns(".cache"))
    (data / ".cache").write_text("x")
    end = run_bundle(dataset_dir=data, output_dir="out", **{**STEPS, "warmup_steps": 2, "max_steps": 1})
    assert end.status == 0 and "cannot be written" in end.out, end.err


def test_fewer_points_than_min_points_everywhere(run_bundle, cohort):
    end = run_bundle(dataset_dir=cohort, output_dir="out", min_points=1_000_000, **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["min_points", "1000000"])


def shrunk(hu):
    """A body of 27 voxels."""
    small = np.full_like(hu, -1000)
    small[10:13, 10:13, 10:13] = hu[10:13, 10:13, 10:13].clip(0, 80)
    return small


def test_one_small_case_is_skipped_and_the_rest_trains(run_bundle, place):
    data = make_cohort(place / "mixed", change=lambda hu, index: shrunk(hu) if index == 1 else hu)
    end = run_bundle(dataset_dir=data, output_dir="out", **{**STEPS, "warmup_steps": 4, "max_steps": 4})
    assert end.status == 0, end.err
    assert re.search(r"Skipped case_1: \d+ points, min_points 100", end.out)


def test_all_validation_cases_too_small(run_bundle, place):
    data = make_cohort(place / "mixed", change=lambda hu, index: shrunk(hu) if index > 2 else hu)
    end = run_bundle(dataset_dir=data, output_dir="out", **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["val", "min_points"])
    assert "Warm-up" not in end.out


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
    assert_refused(end, code="OTHER_TOKENIZER", naming=naming)
    assert snapshot(earlier) == before


def test_a_resumed_run_says_what_it_did_not_begin_with(earlier, place, cohort):
    began = json.loads((earlier / "config.json").read_text())
    assert began.pop("max_shift") == 4
    (earlier / "config.json").write_text(json.dumps(began))  # as by software that knew no such choice
    settings = {**STEPS, "max_steps": 21, "learning_rate": 5e-4}
    end = run_in(place, dataset_dir=cohort, output_dir="out", resume="latest", **settings)
    assert end.status == 0, end.err
    (line,) = [line for line in (earlier / "log.txt").read_text().splitlines() if "goes on with other settings" in line]
    assert "max_shift 4 (was not to be chosen)" in line and "learning_rate 0.0005 (was " in line
    assert "max_steps 21 (was 20)" in line and "seed" not in line and "resume" not in line.split("goes on")[1]


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


def test_an_encoder_that_gives_the_same_everywhere(earlier, place, cohort):
    file = checkpoints.averaged_file(earlier)
    state = torch.load(file, weights_only=True)
    state["encoder.out_layer.weight"].zero_()
    torch.save(state, place / "flat.pt")
    end = run_in(place, dataset_dir=cohort, output_dir="next", pretrained_vae_path="flat.pt", **STEPS)
    assert_refused(end, code="CONSTANT_ENCODER", naming=["pretrained_vae_path"])


def test_too_many_codes_for_the_data(run_bundle, cohort):
    end = run_bundle(dataset_dir=cohort, output_dir="out", num_embeddings=100_000, warmup_steps=1, max_steps=1)
    assert_refused(end, code="TOO_LITTLE_DATA", naming=["100000", "num_embeddings"])
