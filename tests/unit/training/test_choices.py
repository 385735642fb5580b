"""`scale: auto`: what the stage files come to when keys are left open, and what is refused."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from app.shared.refusals import Refused
from app.training import choices, preflight
from app.training.choices import backend_of_run, is_demo, window_names
from networks import make_vqvae
from networks.presets import PRESETS
from transforms.windows import DEFAULT_WINDOWS, WINDOWS

ROOT = Path(__file__).resolve().parents[3]
STAGES = ("vae", "vq_stage1", "vq_stage2")


def raw(name):
    return json.loads((ROOT / "bundles" / f"{name}.json").read_text())


def resolved(monkeypatch, stage, *flags, overlay=None):
    files = [str(ROOT / f"bundles/{name}.json") for name in (stage, overlay) if name]
    monkeypatch.setattr(
        sys, "argv", ["/x/monai/bundle/__main__.py", "run", "training", "--config_file", str(files), *flags]
    )
    return preflight.resolved_config(preflight.read_command_line(sys.argv))


@pytest.mark.parametrize(
    ("stage", "steps", "rate", "loss"),
    [("vae", 700, 3e-3, "l1_l2"), ("vq_stage1", 100, 3e-3, "l1_l2"), ("vq_stage2", 150, 5e-4, "l1_l2")],
)
def test_without_data_it_is_the_demo(monkeypatch, stage, steps, rate, loss):
    config = resolved(monkeypatch, stage)
    assert config["demo"] is True and config["preset"] == "tiny" and config["dataset_dir"] is None
    assert (config["max_steps"], config["learning_rate"], config["loss_type"]) == (steps, rate, loss)
    assert (config["max_shift"], config["pca"], config["num_workers"]) == (0.05, True, 0)
    assert (config["resolution"], config["spacing"], config["max_points"]) == (80, 5.0, 40_000)
    interval = {"vae": 350, "vq_stage1": 100, "vq_stage2": 150}[stage]
    assert (config["i_print"], config["i_save"], config["val_interval"]) == (25, interval, interval)
    assert config["window_weights"] == [1, 1, 0.25, 0.05]
    assert config["lr_scheduler"] == "one_cycle" and config["batch_size_per_gpu"] == 1
    if stage == "vq_stage1":
        assert config["warmup_steps"] == 700
    if stage != "vq_stage2":
        assert config["lambda_kl"] == 0.03
    if stage != "vae":
        assert config["quantizer_levels"] == 24


@pytest.mark.parametrize(
    ("stage", "steps", "loss"), [("vae", 100_000, "l1"), ("vq_stage1", 100_000, "l1"), ("vq_stage2", 200_000, "l1_l2")]
)
def test_with_data_it_is_the_real_thing(monkeypatch, stage, steps, loss):
    config = resolved(monkeypatch, stage, "--scale", "full", "--dataset_dir", "cohort")
    assert config["demo"] is False and (config["preset"], config["dataset_dir"]) == ("base", "cohort")
    assert (config["max_steps"], config["learning_rate"], config["lr_scheduler"]) == (steps, 1e-4, "cosine")
    assert (config["loss_type"], config["max_shift"], config["norm"]) == (loss, 0.25, PRESETS["base"].norm)
    assert (config["resolution"], config["spacing"], config["max_points"]) == (256, 1.5, 8_000_000)
    assert config["batch_size_per_gpu"] == 2 and (config["i_print"], config["i_save"]) == (100, 5000)
    assert config["amp"] == ("bf16" if torch.cuda.is_available() else "off")
    if stage == "vq_stage1":
        assert config["warmup_steps"] == 20_000
    if stage != "vae":
        assert config["num_embeddings"] == 8192 and config["quantizer_levels"] == 1


def test_a_preset_of_its_own_norm_keeps_it(monkeypatch):
    config = resolved(monkeypatch, "vq_stage1", "--dataset_dir", "cohort", "--preset", "direct3d_s2")
    assert config["norm"] == "sample", "as published"
    assert config["resolution"] == 512 and config["pool"] == "legacy"


def test_every_flat_key_of_every_stage_can_be_given_on_the_line(monkeypatch):
    """What stands in the file is only what a key is where nobody says otherwise."""
    given = {
        "max_steps": 10, "resolution": 64, "spacing": 2.0, "learning_rate": 0.5, "num_blocks": 1, "max_points": 77,
        "norm": "voxel", "pool": "mean", "amp": "off", "num_workers": 3, "i_save": 9, "max_shift": 0.5, "ema_rate": 0.5,
        "batch_size_per_gpu": 5, "lr_scheduler": "constant", "loss_type": "l2", "model_channels": 32, "preset": "base",
    }  # fmt: skip
    for stage in STAGES:
        config = resolved(monkeypatch, stage, *(word for k, v in given.items() for word in (f"--{k}", str(v))))
        assert {name: config[name] for name in given} == given
        sizes = ConfigParser(config).get_parsed_content("sizes")
        assert (sizes.resolution, sizes.spacing, sizes.num_blocks, sizes.model_channels) == (64, 2.0, 1, 32)
        assert (sizes.norm, sizes.pool, sizes.window) == ("voxel", "mean", PRESETS["base"].window)
        assert sizes.max_points == PRESETS["base"].max_points, "the record is of the preset, the crop of the run"


def chain_windows(config):
    parser = ConfigParser(config)
    names = [parser.get_parsed_content("windowing").windows, parser.get_parsed_content("sizes").windows]
    assert names[0] == names[1] == parser.get_parsed_content("preprocessing#1").windows
    return names[0]


def test_windows_are_all_four_or_those_asked_for(monkeypatch):
    for stage in STAGES:
        assert chain_windows(resolved(monkeypatch, stage)) == DEFAULT_WINDOWS
        assert chain_windows(resolved(monkeypatch, stage, "--window_type", "liver")) == ("liver",)
        assert chain_windows(resolved(monkeypatch, stage, "--windows", "['lung','brain']")) == ("lung", "brain")


def test_a_reader_of_a_stage_file_sees_the_numbers_of_its_windows():
    for stage in STAGES:
        windows = raw(stage)["windows"]
        assert tuple(windows) == DEFAULT_WINDOWS
        assert {name: tuple(numbers) for name, numbers in windows.items()} == {n: WINDOWS[n] for n in windows}


def test_a_window_of_other_numbers_under_its_name_is_refused(capsys):
    with pytest.raises(Refused) as end:
        window_names({"lung": [1400, -500]})
    assert end.value.status == 2
    assert "window lung must be 1500/-600 (width/level in HU), got 1400/-500" in str(end.value)


SAID = ["resolution", "spacing", "model_channels", "latent_channels", "num_embeddings", "num_blocks", "max_points"]


def test_a_reader_of_a_stage_file_sees_the_sizes_of_both_presets():
    lines = [
        f"{name}: " + ", ".join(f"{field} {getattr(PRESETS[name], field)}" for field in SAID)
        for name in ("tiny", "base")
    ]
    assert "resolution 256, spacing 1.5, " in lines[1] and "num_embeddings 8192" in lines[1]
    for stage in STAGES:
        assert raw(stage)["sizes"]["_desc_"] == lines


def numerals(node, inside=""):
    """Numbers wherever they stand: as values, in expressions and in descriptions; none in names or targets."""
    if isinstance(node, dict):
        return sum(numerals(v, k) for k, v in node.items() if k != "_target_")
    if isinstance(node, list):
        return sum(numerals(v, inside) for v in node)
    if isinstance(node, bool) or node is None:
        return 0
    if isinstance(node, str):
        return len(re.findall(r"(?<![\w.#])-?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?(?![\w])", re.sub(r"@\S+", "", node)))
    return 1


def expressions(node):
    """Values that are Python, but for those that choose between two literals by @demo."""
    if isinstance(node, dict | list):
        return sum(map(expressions, node.values() if isinstance(node, dict) else node))
    if not (isinstance(node, str) and node.startswith("$")):
        return 0
    choice = re.fullmatch(r"\$(.+) if @demo else (.+)", node)
    try:
        return 0 if choice and [ast.literal_eval(part) for part in choice.groups()] else 1
    except (ValueError, SyntaxError):
        return 1


@pytest.mark.parametrize("stage", [*STAGES, "align"])
def test_a_stage_file_shows_values_and_little_python(stage):
    """Beside two bundles of MONAI's model zoo: spleen 49 numbers and 20 expressions, vista3d 38 and 38."""
    config = raw(stage)
    without = {**config, "sizes": {k: v for k, v in config.get("sizes", {}).items() if k != "_desc_"}}
    assert numerals(config) >= 40 and numerals(without) >= 40, (numerals(config), numerals(without))
    assert expressions(config) <= 20, expressions(config)
    text = json.dumps(config)
    assert "@plan" not in text and "lambda " not in text and "%" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_the_network_is_built_from_the_file_alone(stage, monkeypatch, tmp_path):
    """As monai.bundle.load does: no data, no folder, no run."""
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser(raw(stage))
    network = parser.get_parsed_content("network_def")
    assert type(network).__name__ == "SparseVQVAE" and network.sizes.resolution == 80
    assert (network.vq is None) == (stage == "vae") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "learns"),
    [
        ("vae", {"encoder", "decoder", "subdivision"}),
        ("vq_stage1", {"vq", "subdivision"}),
        ("vq_stage2", {"encoder", "vq", "decoder", "subdivision"}),
    ],
)
@pytest.mark.parametrize("first", ["optimizer", "network", "averaged"])
def test_what_learns_does_not_depend_on_what_is_made_first(stage, learns, first):
    config = {**raw(stage), "codebook": "gradient"}
    config["network"]["grid"] = None  # else the data
    config["device"] = "cpu"
    parser = ConfigParser(config)
    parser.get_parsed_content(first)
    network = parser.get_parsed_content("network")
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == learns
    held = {id(p) for group in parser.get_parsed_content("optimizer").param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_of_shapellm_leaves_the_steps_of_other_stages(monkeypatch, stage):
    for flags in ((), ("--dataset_dir", "cohort")):
        steps = resolved(monkeypatch, stage, *flags, overlay="recipe_shapellm")["max_steps"]
        assert steps == (1000 if stage == "vq_stage1" else resolved(monkeypatch, stage, *flags)["max_steps"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_of_ct_has_the_schedule_of_the_file_but_in_stage_2(monkeypatch, stage):
    for flags in ((), ("--dataset_dir", "cohort")):
        name = resolved(monkeypatch, stage, *flags, overlay="recipe_ct")["lr_scheduler"]
        assert name == (
            "ExponentialLR" if stage == "vq_stage2" else resolved(monkeypatch, stage, *flags)["lr_scheduler"]
        )


def test_scale_can_be_forced():
    assert is_demo("demo", dataset_dir="cohort") and not is_demo("full", dataset_dir="cohort")
    assert is_demo("auto") and not is_demo("auto", dataset_dir="cohort")
    for own in ({"data": "reports.csv"}, {"dataset": "my.Items"}):
        assert is_demo("demo", **own) and not is_demo("full", **own) and not is_demo("auto", **own)
        with pytest.raises(Refused, match="and dummy_data are both given"):
            is_demo("auto", **own, dummy_data=True)
    with pytest.raises(Refused, match="BAD_VALUE: data and dataset are both given"):
        is_demo("demo", data="reports.csv", dataset="my.Items")
    assert is_demo("auto", dummy_data=True)


@pytest.mark.parametrize(
    ("scale", "says"),
    [("full", "NO_DATA: scale full needs data"), ("huge", "BAD_VALUE: scale must be auto, demo or full, got 'huge'")],
)
def test_a_scale_that_cannot_be_is_one_line(scale, says, capsys):
    with pytest.raises(Refused) as end:
        is_demo(scale)
    assert end.value.status == 2 and str(end.value).startswith(says)


@pytest.mark.parametrize(
    ("key", "environment", "chosen"),
    [(None, None, "auto"), (None, "spconv", "spconv"), ("torch", "spconv", "torch"), (None, "torchsparse", "auto")],
)
def test_the_key_wins_over_the_environment_and_foreign_backends_mean_auto(
    key, environment, chosen, monkeypatch, caplog
):
    if environment:
        monkeypatch.setenv("SPARSE_BACKEND", environment)
    with caplog.at_level("INFO", logger=choices.__name__):
        assert backend_of_run(key) == chosen
    assert ("SPARSE_BACKEND=torchsparse is not among" in caplog.text) == (environment == "torchsparse")


def test_an_alignment_speaks_of_what_the_demo_can_show_and_of_everything_in_data(monkeypatch):
    demo, full = resolved(monkeypatch, "align"), resolved(monkeypatch, "align", "--data", "reports.csv")
    shown = ("demo", "about", "vl_model", "train_language", "use_3d_pos", "epochs", "batch_size", "num_phantoms")
    assert [demo[k] for k in shown] == [True, ["pleural effusion"], "tiny_qwen2_vl", True, True, 5, 16, 800]
    assert [full[k] for k in shown] == [False, None, "Qwen/Qwen2-VL-2B-Instruct", False, False, 3, 2, 800]
    for key, numbers in {"learning_rate": (1e-3, 1e-4), "i_print": (25, 100), "i_save": (200, 1000)}.items():
        assert (demo[key], full[key]) == numbers
    assert demo["compile_layers"] is False and demo["num_workers"] == 0
    assert [(part["levels"], part["max_3d_tokens"]) for part in (demo, full)] == [(None, 160), (1, 2048)]
    assert not resolved(monkeypatch, "align", "--use_lora", "True")["train_language"]
    some = resolved(monkeypatch, "align", "--dummy_data", "True", "--dummy_samples", "9")
    assert some["num_phantoms"] == 9 and some["demo"] is True
    every = resolved(monkeypatch, "align", "--about", "$None")
    shown = ("num_phantoms", "epochs", "detector_phantoms", "report_share", "max_3d_tokens")
    assert [every[k] for k in shown] == [220, 10, 480, 0.125, 64]
    assert [demo[k] for k in shown[2:]] == [0, 1.0, 160]
    assert resolved(monkeypatch, "align", "--vl_model", "tiny_qwen3_vl", "--data", "reports.csv")["use_3d_pos"]


@pytest.mark.parametrize("stage", STAGES)
def test_parts_named_one_by_one_are_the_network_that_older_checkpoints_hold(stage):
    """The same record byte by byte, so the same hashes, and the same weights from the same seed."""
    parser = ConfigParser(raw(stage))
    torch.manual_seed(0)
    named = parser.get_parsed_content("network_def").state_dict()
    torch.manual_seed(0)
    changes = {"codebook": "none"} if stage == "vae" else {"quantizer_levels": 24}
    whole = make_vqvae("tiny", pca=True, **changes).state_dict()
    assert list(named) == list(whole)
    assert all(torch.equal(named[name], whole[name]) for name in whole)
