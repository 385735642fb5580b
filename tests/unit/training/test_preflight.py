"""Pre-flight: a mistaken flag or config ends the run in one line that names the key and the nearest match."""

import json
from pathlib import Path

import pytest

from app.training import key_rules
from tests.preflight_calls import ALIGN, EVALUATE, ROOT, SHAPES_STAGE2, STAGE1


def flat_keys(config):
    return [k for k, v in json.loads(Path(config).read_text()).items() if not isinstance(v, dict | list)]


FLAT = flat_keys(STAGE1)


# ---- flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--max_stepz", "5"], ["UNKNOWN_KEY", "max_stepz", "max_steps"]),
        (["--windwos", "['lung']"], ["windwos", "windows"]),
        (["--learning-rte=1"], ["learning_rte", "learning_rate"]),
        (["--train#trainer#max_epoch", "2"], ["train#trainer", "max_epoch", "max_epochs"]),
        (["--train::loader::batchsize", "2"], ["batchsize", "batch_size"]),
        (["--trian#loader", "2"], ["trian", "train"]),
        (["--preprocessing#0#spacng", "2"], ["spacng", "spacing"]),
        (["--zzzzqqqq", "1"], ["zzzzqqqq", "It has", "max_steps"]),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(check, flags, parts):
    line = check(*flags)
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("key", ["warmup_steps", "pretrained_vae_path"])
def test_a_key_of_a_part_that_an_overlay_replaced_is_refused(check, key):
    """Stage 2 of shapes has a start of its own, which knows neither."""
    assert check(f"--{key}", "$5", config=SHAPES_STAGE2).startswith(f"UNUSED_KEY: nothing in this run uses {key}.")
    assert check(f"--{key}", "$5", config=STAGE1) is None
    used = ["--init_from", "mine", "--max_steps", "5", "--training_stage", "2"]
    assert check(*used, config=SHAPES_STAGE2) is None


@pytest.mark.parametrize(
    ("old", "ours"),
    [
        ("data_dir", "dataset_dir"),
        ("lr", "learning_rate"),
        ("load_dir", "pretrained_vae_path"),
        ("ckpt", "resume"),
        ("num_gpus", "torchrun"),
        ("epochs", "max_steps"),
        ("embed_dim", "latent_channels"),
        ("auto_retry", "--max_restarts"),
        ("master_port", "torchrun"),
        ("tryrun", "max_steps"),
    ],
)
def test_names_of_the_original_scripts_lead_to_ours(check, old, ours):
    line = check(f"--{old}", "3")
    assert line.startswith("UNKNOWN_KEY") and old in line and ours in line


@pytest.mark.parametrize(
    ("old", "ours"),
    [
        ("data_path", "data"),
        ("dataset_dir", "data"),
        ("max_steps", "epochs"),
        ("max_epochs", "epochs"),
        ("batch_size_per_gpu", "batch_size"),
        ("tokenizer", "vae_ckpt"),
        ("load_dir", "resume"),
        ("model", "vl_model"),
    ],
)
def test_the_name_told_is_one_that_this_run_has(check, old, ours):
    assert check(f"--{old}", "3", config=ALIGN).endswith(f"this run has no key {old}. Here it is {ours}.")


def test_a_setting_does_not_take_the_place_of_a_part(check):
    assert "language is a part of this config" in check("--language", "Qwen/Qwen2-VL-2B-Instruct", config=ALIGN)
    assert check("--language", "{'_target_': 'mine.Language'}", config=ALIGN) is None


def test_every_name_we_lead_to_exists():
    known = {*FLAT, *flat_keys(ALIGN), *flat_keys(EVALUATE), "torchrun", "init_from"}
    for name, candidates in key_rules.OTHER_NAMES.items():
        for ours in candidates:
            assert ours.split()[0] in known and ours != name, ours


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max_steps", "5"],
        ["--max-steps=5"],
        ["--seed", "0", "--learning_rate", "0.5", "--grad_clip", "2"],
        ["--windows", "['lung','bone']", "--keep", "band"],
        ["--use_checkpoint", "True"],
        ["--use_checkpoint"],
        ["--resume", "latest"],
        ["--resume", "10"],
        ["--grad_clip", "$None"],
        ["--learning_rate", "$1e-3 * 2"],
        ["--max_points", "@resolution"],
        ["--train#trainer#max_epochs", "1"],
        ["--validate::loader::num_workers=2"],
        ["--preprocessing#0#spacing", "2.0"],
        ["--resume", "None"],
        ["--dataset_dir", "None"],
        ["--dataset_dir", "/data/2024"],
        ["--lr_scheduler", "ExponentialLR", "--lr_scheduler_options", "{'gamma': 0.9}"],
        ["--logging_file", "False", "--meta_file", "x.json"],
    ],
    ids=" ".join,
)
def test_what_is_right_passes_in_silence(check, flags):
    assert check(*flags) is None


@pytest.mark.parametrize("key", ["grad_clip", "pretrained_vae_path", "codebook_size", "lr_scheduler_options"])
def test_none_is_set_or_said(check, key):
    if key == "grad_clip" or key == "pretrained_vae_path":  # may be null, but MONAI would drop it
        line = check(f"--{key}", "None")
        assert line.startswith("NULL_IGNORED") and f"--{key}" in line and "$None" in line
        assert check(f"--{key}", "$None") is None
    elif key == "codebook_size":
        assert check(f"--{key}", "None").startswith("UNKNOWN_KEY")
    else:  # null already
        assert check(f"--{key}", "None") is None


@pytest.mark.parametrize("key", ["max_steps", "output_dir", "num_workers", "lambda_vq"])
@pytest.mark.parametrize("null", ["None", "$None"])
def test_null_where_it_cannot_be(check, key, null):
    line = check(f"--{key}", null)
    assert line.startswith(f"BAD_VALUE: {key} cannot be null") and f"--{key}" in line


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "7"])
def test_a_device_that_is_not_here(check, device):
    assert check("--device", "cpu") is None
    line = check("--device", device)
    assert line.startswith("BAD_VALUE: device must be cpu") and device in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", "many"),
        ("max_steps", "0"),
        ("max_steps", "2.5"),
        ("max_steps", "True"),
        ("seed", "-1"),
        ("learning_rate", "-0.1"),
        ("learning_rate", "fast"),
        ("grad_clip", "-1"),
        ("lambda_vq", "-2"),
        ("ema_rate", "1.5"),
        ("keep", "bodies"),
        ("codebook", "kmeans"),
        ("amp", "fp32"),
        ("loss_type", "huber"),
        ("scale", "big"),
        ("windows", "lung"),
        ("windows", "['lungs']"),
        ("window_type", "lungs"),
        ("preset", "giant"),
        ("lr_scheduler", "CosinAnnealingLR"),
        ("lr_scheduler", "Optimizer"),
        ("lr_scheduler", "ReduceLROnPlateau"),
        ("lr_scheduler", "LRScheduler"),
        ("grad_clip", "0"),
        ("use_checkpoint", "1"),
        ("use_checkpoint", "false"),
        ("min_points", "-5"),
        ("batch_split", "0"),
        ("max_shift", "-2"),
        ("max_shift", "4"),
        ("max_shift", "four"),
        ("max_rotation", "-1"),
        ("max_rotation", "90"),
        ("max_scale", "0.6"),
        ("resume", "newest"),
        ("dataset_dir", "7"),
        ("resolution", "20"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(check, key, value):
    line = check(f"--{key}", value)
    assert line is not None, f"--{key} {value} passed"
    assert line.startswith("BAD_VALUE") and key in line and value.strip("[']") in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", "7"),
        ("dataset", "Mine"),
        ("image_root", "['a']"),
        ("vl_model", "3"),
        ("vae_ckpt", "True"),
        ("dummy_data", "yes"),
        ("dummy_samples", "0"),
        ("skip_bad", "1"),
        ("max_3d_tokens", "0"),
        ("max_3d_tokens", "2048.0"),
        ("max_text_tokens", "-1"),
        ("token_reduction", "average"),
        ("use_3d_pos", "maybe"),
        ("position", "3d"),
        ("fusion", "suffix"),
        ("projector_layers", "0"),
        ("with_volumes", "no"),
        ("train_language", "1"),
        ("use_lora", "true"),
        ("lora_r", "0"),
        ("lora_alpha", "-4"),
        ("lora_dropout", "1"),
        ("compile_layers", "maybe"),
        ("num_phantoms", "1"),
        ("about", "nodule"),
        ("about", "['fracture']"),
        ("about", "[]"),
        ("tiny", "{'width': 40}"),
        ("tiny", "{'depth': 3}"),
        ("tiny", "3"),
        ("epochs", "0"),
        ("epochs", "1.5"),
        ("batch_size", "0"),
        ("weight_decay", "-1"),
        ("learning_rate", "quick"),
        ("seed", "x"),
    ],
)
def test_a_wrong_value_for_alignment_is_named_with_its_rule(check, key, value):
    line = check(f"--{key}", value, config=ALIGN)
    assert line is not None, f"--{key} {value} passed"
    assert line.startswith(f"BAD_VALUE: {key} must be") and value.strip("[']") in line


@pytest.mark.parametrize(
    ("key", "value"), [("num_phantoms", "one"), ("batch_size", "0"), ("max_new_tokens", "0"), ("split", "3")]
)
def test_a_wrong_value_for_an_evaluation_is_named_with_its_rule(check, key, value):
    line = check(f"--{key}", value, config=EVALUATE)
    assert line is not None, f"--{key} {value} passed"
    assert line.startswith(f"BAD_VALUE: {key} must be")


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "reports.csv", "--image_root", "scans", "--vl_model", "Qwen/Qwen3-VL-2B-Instruct"],
        ["--about", "['nodule','kidney stone']", "--use_lora", "True", "--lora_alpha", "16", "--lora_dropout", "0.05"],
        ["--vae_config", "config.json", "--dataset", "mine.sets.Reports", "--weight_decay", "0"],
        ["--data", "None", "--about", "$None"],
        ["--grad_clip", "$None", "--epochs", "$2+1", "--tiny", "{'num_layers': 3}"],
    ],
    ids=" ".join,
)
def test_right_flags_of_an_alignment_pass_in_silence(check, flags):
    assert check(*flags, config=ALIGN) is None


@pytest.mark.parametrize("key", ["epochs", "use_3d_pos", "max_3d_tokens", "position", "learning_rate", "output_dir"])
@pytest.mark.parametrize("null", ["None", "$None"])
def test_none_for_a_key_of_alignment_that_needs_a_value_is_refused(check, key, null):
    line = check(f"--{key}", null, config=ALIGN)
    assert line.startswith(f"BAD_VALUE: {key} cannot be null")


def test_a_default_of_alignment_is_set_to_null_by_a_dollar_alone(check):
    assert check("--about", "None", config=ALIGN).startswith("NULL_IGNORED: MONAI ignores --about None")
    assert check("--about", "$None", config=ALIGN) is None


def test_null_stays_null(check):
    assert check("--output_dir", "None", "--data", "None", "--split", "None", config=EVALUATE) is None


CONFIGS = sorted(file for file in (ROOT / "bundles").glob("*.json") if "schema" not in file.name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_every_flat_key_of_a_bundle_has_a_rule(config):
    if config.stem == "metadata":
        return
    free = {"_desc_", "lr_scheduler_options", "network", "sizes"}
    assert set(flat_keys(config)) - free <= set(key_rules.RULES), set(flat_keys(config)) - free - set(key_rules.RULES)
