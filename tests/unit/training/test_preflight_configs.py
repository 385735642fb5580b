"""Pre-flight: a mistake in a config file, or around the run, ends it in one line that names the place."""

import inspect
import json
import sys

import pytest
from ignite.engine import Events

from app.shared.refusals import Refused
from app.training import key_rules, preflight, run_errors
from tests.preflight_calls import ROOT, STAGE1


def test_a_right_config_passes(check, config):
    assert check(config=config(x=["@max_steps", "$@part['a'] + @part#_target_"], y="mail@example.com")) is None


@pytest.mark.parametrize("name", ["initialize", "training", "run", "finalize"])
def test_a_step_of_plain_text_would_do_nothing(check, config, name):
    for step in ("start.run()", "@part.run()"):
        line = check(config=config(**{name: ["$@part", step]}))
        assert line.startswith("PLAIN_STEP") and f"{name}#1" in line and step in line
    assert check(config=config(**{name: ["@part", "$@part"]})) is None


@pytest.mark.parametrize(
    ("key", "value"), [("max_steps", "ten"), ("batch_split", None), ("windows", ["lungs"]), ("output_dir", "")]
)
def test_a_wrong_value_in_a_file_is_named_with_its_rule(check, config, key, value):
    line = check(config=config(**{key: value}))
    assert line.startswith(f"BAD_VALUE: {key} must be {key_rules.RULES[key].says}, got {value!r}")
    assert check(config=config(dataset_dir=None, lr_scheduler="$foo", part={"_target_": "SupervisedTrainer"})) is None


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("networks.losses.TokenzerLoss", "did you mean networks.losses.TokenizerLoss?"),
        ("networkz.losses.TokenizerLoss", "Give the dotted path"),
        ("SupervisedTrainr", "did you mean SupervisedTrainer?"),  # MONAI's own go by one word
    ],
)
def test_a_target_that_is_not_there(check, config, target, near):
    line = check(config=config(part={"_target_": target}))
    assert line.startswith("BAD_TARGET: ") and target in line and near.lower() in line.lower()


def test_an_argument_that_nobody_takes(check, config):
    line = check(config=config(part={"_target_": "networks.losses.TokenizerLoss", "lambda_vqq": 1}))
    assert line.startswith("UNKNOWN_ARGUMENT") and "part gives lambda_vqq" in line and "lambda_vq?" in line
    assert check(config=config(part={"_target_": "networks.losses.TokenizerLoss", "lambda_vq": 1})) is None


def test_an_event_takes_what_its_call_takes_on_python_3_12_too(check, monkeypatch):
    values = inspect.Signature([inspect.Parameter("values", inspect.Parameter.VAR_POSITIONAL)])
    monkeypatch.setattr(Events, "__signature__", values, raising=False)  # as every Enum has it there
    assert check() is None


def test_an_argument_that_is_missing(check, config):
    line = check(config=config(part={"_target_": "networks.vqvae.SparseVQVAE"}))
    assert line.startswith("MISSING_ARGUMENT: part makes networks.vqvae.SparseVQVAE without ")
    for waits in ({"_mode_": "callable"}, {"_mode_": "partial"}, {"_disabled_": True}):
        assert check(config=config(part={"_target_": "networks.vqvae.SparseVQVAE", **waits})) is None


def test_several_processes_need_the_overlay(check, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = check()
    assert line.startswith("NO_OVERLAY: torchrun started 2 processes") and "multi_gpu.json" in line
    assert check(config=f"['{STAGE1}','{ROOT / 'bundles/multi_gpu.json'}']") is None


def test_a_run_that_is_not_there(config):
    call = preflight.read_command_line(
        ["/x/monai/bundle/__main__.py", "run", "trainin", "--config_file", str(config())]
    )
    with pytest.raises(Refused) as end:
        preflight.check_run(call)
    assert str(end.value) == "UNKNOWN_RUN: this config has no trainin to run. Did you mean training?"


@pytest.mark.parametrize("key", ["_Target_", "_target", "target_", "__target__", "_TARGET_", "_taget_"])
def test_a_misspelt_target_is_seen(check, config, key):
    line = check(config=config(part={"a": [{key: "torch.nn.Linear"}]}))
    assert line.startswith("BAD_TARGET_KEY") and key in line and "_target_" in line


@pytest.mark.parametrize(
    ("value", "named", "near"),
    [
        ("@max_stepz", "max_stepz", "max_steps"),
        ("$@part#_targt_ + 1", "part#_targt_", "_target_"),
        ("$[@max_steps, @prat]", "prat", "part"),
        ("@training#4", "training#4", "Define it"),
    ],
)
def test_a_reference_to_nothing_is_seen(check, config, value, named, near):
    line = check(config=config(x=value))
    assert line.startswith("MISSING_REFERENCE") and named in line and near in line


def test_several_files_are_read_as_one(check, config, tmp_path):
    over = tmp_path / "over.json"
    over.write_text(json.dumps({"part#extra": "@max_steps", "+training": ["plain"]}))
    line = check(config=f"['{config()}','{over}']")
    assert line.startswith("PLAIN_STEP")
    over.write_text(json.dumps({"part#extra": "@max_steps", "+training": ["$@part"]}))
    assert check("--part#extra", "3", config=f"['{config()}','{over}']") is None


@pytest.mark.parametrize("stage", ["vae", "vq_stage1", "vq_stage2"])
@pytest.mark.parametrize("overlay", [None, "multi_gpu", "recipe_ct", "recipe_shapellm"])
def test_our_own_configs_pass(check, stage, overlay):
    files = [str(ROOT / f"bundles/{name}.json") for name in (stage, overlay) if name]
    assert check(config=str(files)) is None


# ---- around it


def test_no_bundle_run_no_check(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for argv in (["pytest"], ["/x/monai/bundle/__main__.py", "verify_metadata", "--max_stepz", "1"]):
        monkeypatch.setattr(sys, "argv", argv)
        preflight.check_run()


def test_ctrl_c_is_one_line_and_a_shell_s_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(run_errors.os, "_exit", sys.exit)
    # tensorboard's handler would close pytest's stream
    monkeypatch.setattr(run_errors.logging, "shutdown", lambda: None)
    run_errors.one_line_errors()
    with pytest.raises(SystemExit) as end:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert end.value.code == 130 and capsys.readouterr().err.startswith("STOPPED: ended by Ctrl-C. Run again")


def test_the_resolved_config_holds_overrides_and_what_open_keys_come_to():
    flags = ["--max_steps", "7", "--train#trainer#max_epochs", "1", "--dataset_dir", "cohort"]
    argv = ["/x/monai/bundle/__main__.py", "run", "training", "--config_file", STAGE1, *flags]
    config = preflight.resolved_config(preflight.read_command_line(argv))
    assert config["max_steps"] == 7 and config["dataset_dir"] == "cohort"
    assert config["train"]["trainer"]["max_epochs"] == 1
    assert config["resolution"] == 256 and config["learning_rate"] == 1e-4 and config["num_embeddings"] == 8192
    json.dumps(config)


def test_windows_and_a_window_both_given_is_refused(check):
    line = check("--windows", "['lung']", "--window_type", "bone")
    assert line.startswith("BAD_VALUE: windows and window_type are both given")
    assert check("--windows", "['lung']") is None and check("--window_type", "bone") is None


def test_what_was_left_open_is_said_in_the_first_lines(check, caplog):
    with caplog.at_level("INFO"):
        assert check("--scale", "demo", "--dataset_dir", "cohort", "--preset", "base") is None
    assert "scale demo: your data in cohort" in caplog.text and "preset base, stage 1" in caplog.text
