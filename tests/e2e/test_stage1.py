"""Stage 1 through its bundle: every file that a run leaves, and what the files hold."""

import json
import re

import numpy as np
import pytest
import torch

from app.dataset.prepared import find_cases
from app.tokens.tokenizer import find_tokenizer
from app.training import checkpoints
from app.training.checkpoints import load_tokenizer
from networks.presets import Preset
from tests.runs import NAMES, STEPS, assert_refused, end_of, rows_of, run_in, weights_of


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


def test_a_codebook_that_is_not_among_what_learns_stays_as_it_was_laid(place, cohort):
    end = run_in(place, dataset_dir=cohort, output_dir="out", learns="['subdivision']", warmup_steps=2, max_steps=3)
    assert end.status == 0, end.err
    start, last = (weights_of(place / "out", step) for step in (0, 3))
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], last[name])} - {"_extra_state"}
    assert moved == {"subdivision"}
    assert "EMA" not in (place / "out/vqvae_model_summary.txt").read_text()


def test_the_warm_up_clips_gradients_as_it_is_told(place, cohort):
    end = run_in(place, dataset_dir=cohort, output_dir="out", grad_clip=1e-15, warmup_steps=2, max_steps=1)
    assert end.status == 0, end.err
    bias = weights_of(place / "out", 0)["decoder.upsample.1.residual.0.layers.1.bias"]
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
    assert table["vq.levels.0.embeddings.weight"] == ["16x16", "float32", "EMA"]
    assert table["subdivision.0.weight"][-1] == "True"
    learns = {name: row[-1] for name, row in table.items()}
    assert {learns[n] for n in learns if n.startswith(("encoder.", "decoder."))} == {"False"}
    assert set(table) == set(weights_of(out, 20)) - {"_extra_state"}


def test_console_log_and_command_say_what_ran(straight, cohort):
    out, end = straight
    assert re.search(r"scale demo: your data in .*data", end.out) and "preset tiny" in end.out
    assert re.search(r"=== out: [\d,]+ parameters, [\d,]+ trainable ===", end.out)
    assert re.search(r"Step 20: loss=\d\S* recon=\d\S* vq=\d\S* commitment=\d\S* \(", end.out)
    log = (out / "log.txt").read_text()
    assert "Step 20: loss=" in log and "Validation at step 20" in log and "Warm-up step 10" in log
    command = (out / "command.txt").read_text()
    assert "--max_steps 20" in command and str(cohort) in command
    config = json.loads((out / "config.json").read_text())
    assert config["max_steps"] == 20 and config["resolution"] == 24 and config["learning_rate"] == 3e-3
    assert config["dataset_dir"] == str(cohort)
    open_keys = [k for k, v in config.items() if not isinstance(v, dict | list) and str(v)[:1] in ("$", "@")]
    assert not open_keys, f"config.json leaves {open_keys} open"


def test_checkpoints_are_flat_and_load_without_code(straight):
    out, _ = straight
    for name in NAMES[:2]:
        state = torch.load(checkpoints.step_file(out, name, 20), weights_only=True)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert {key.split(".")[0] for key in state} == {"encoder", "decoder", "vq", "subdivision", "_extra_state"}
        assert Preset.from_tensor(state["_extra_state"]).spacing == 16.0
    for level in (0, 1):
        codebooks = [weights_of(out, 20, name)[f"vq.levels.{level}.embeddings.weight"] for name in NAMES[:2]]
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


# ---- as processes of their own


@pytest.mark.parametrize(
    ("key", "value", "naming"),
    [
        ("augmentation#0#max_shift", -2, ["max_shift", "-2"]),
        ("max_shift", "$-3", ["max_shift", "-3"]),
        ("max_shift", "$4", ["max_shift", "4"]),
        ("network#grid", "[100000,1.0]", ["prepared", "100000"]),
    ],
)
def test_a_value_that_reaches_a_part_past_the_check_is_one_line(run_bundle, cohort, key, value, naming):
    assert_refused(run_bundle(dataset_dir=cohort, output_dir="out", **{key: value}), code="BAD_VALUE", naming=naming)


def test_real_processes_end_with_one_line_and_status_2(start_process, place, cohort):
    started = [  # before anything is built, while the network is, while the data are
        start_process(dataset_dir=cohort, output_dir="a", max_stepz=5),
        start_process(dataset_dir=cohort, output_dir="b", **{"network#grid": "foo"}),
        start_process(dataset_dir=cohort, output_dir="c", **{"augmentation#0#max_shift": "abc"}),
    ]
    namings = (["max_stepz", "max_steps"], ["prepared", "'foo'"], ["max_shift", "'abc'"])
    for process, naming in zip(started, namings, strict=True):
        end = end_of(process)
        assert end.status == 2
        assert_refused(end, code="[A-Z_]+", naming=naming)
    assert not (place / "a").exists()
