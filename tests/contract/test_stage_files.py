"""The bundles as files: short, without tricks, every target real, and stages that share what they must."""

import json
import pydoc
import re
from pathlib import Path

import pytest

from app.training.preflight import walk

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vae.json", "vq_stage1.json", "vq_stage2.json")

BUNDLES = sorted(path for path in (ROOT / "bundles").glob("*.json") if "schema" not in path.name)
MAX_CONFIG_LINES = 360  # one key a line


@pytest.mark.parametrize("path", BUNDLES, ids=[path.name for path in BUNDLES])
def test_configs_are_short_and_without_tricks(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_CONFIG_LINES
    assert max(map(len, text.splitlines())) <= 140
    for here, _, value in walk(json.loads(text)):
        if isinstance(value, str):
            assert not re.search(r"\blambda\b", value), f"{here} hides a function"
            assert not re.match(r"%.+\.json", value), f"{here} copies from another file"


@pytest.mark.parametrize("path", BUNDLES, ids=[path.name for path in BUNDLES])
def test_every_target_resolves(path):
    from monai.bundle.config_item import ComponentLocator

    words = ComponentLocator()
    for here, key, value in walk(json.loads(path.read_text(encoding="utf-8"))):
        if key != "_target_" or value.startswith("$"):
            continue
        found = callable(pydoc.locate(value)) if "." in value else words.get_component_module_name(value)
        assert found, f"{path.name}: {here} names {value}, which does not exist"


@pytest.mark.parametrize("name", STAGES)
def test_stages_answer_to_both_names_and_check_first(name):
    config = json.loads((ROOT / "bundles" / name).read_text(encoding="utf-8"))
    assert config["run"] in (config["training"], "%training", "@training")
    assert config["initialize"][0] == "$@preflight"


def at_full_scale(value):
    """A demo's stages take steps of their own, so they save and draw at steps of their own."""
    return value.partition(" if @demo else ")[2] or value if isinstance(value, str) else value


def test_stages_share_what_they_must():
    """A user who learned one stage knows the next: the same flat keys mean the same, the data are made the same way."""
    configs = {name: json.loads((ROOT / "bundles" / name).read_text()) for name in STAGES}
    first = configs["vq_stage1.json"]
    for name, config in configs.items():
        for key in ("preprocessing", "windowing", "augmentation", "device"):
            assert config[key] == first[key], f"{name}: {key} differs from vq_stage1.json"
        free = {
            "_desc_",
            "output_dir",
            "codebook",
            "pretrained_vae_path",
            "training_stage",
            "init_from",
            "warmup_steps",
            "decoder_steps",
            "level_dropout",
            "learning_rate",
            "max_steps",
            "loss_type",
        }
        flat = {k for k, v in first.items() if not isinstance(v, dict | list) and k in config} - free
        differ = sorted(key for key in flat if at_full_scale(config[key]) != at_full_scale(first[key]))
        assert not differ, f"{name}: {differ} differ from vq_stage1.json"


def test_inference_declares_the_chain_that_training_declares():
    """From a volume to features by the same transforms; what a run chose stands in the tokenizer's sizes by then."""
    configs = {name: json.loads((ROOT / "bundles" / name).read_text()) for name in (*STAGES, "inference.json")}
    inference = configs.pop("inference.json")
    for config in configs.values():
        chosen = json.dumps([*config["preprocessing"], config["windowing"]])
        for key, recorded in (("@keep", "$@sizes.keep"), ("@window_names", "$@sizes.windows")):
            chosen = chosen.replace(f'"{key}"', f'"{recorded}"')
        assert json.loads(chosen) == inference["windowing"]
    assert inference["sizes"] == "$@network_def.sizes" and inference["inferer"]["chain"] == "@windowing"
