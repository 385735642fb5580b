"""What a folder of an alignment may say in train_args.json: whoever wrote it, a wrong value is one line."""

import json

import pytest

from app.language.assistant import read_settings
from app.shared.refusals import Refused

GOOD = {
    "tokenizer": "ab" * 32, "tokenizer_path": "outputs/vq_stage1", "in_features": 8, "projector_layers": 1,
    "position_scale": 0.02, "base_model": {"name": None, "built": "qwen2_vl"}, "amp": "off", "max_text_tokens": 512,
    "max_3d_tokens": 2048, "token_reduction": "pool", "use_3d_pos": True, "position": "1d", "fusion": "placeholder",
    "use_lora": False, "levels": None, "detects": 2,
}  # fmt: skip


def test_settings_as_a_run_writes_them_are_taken(tmp_path):
    (tmp_path / "train_args.json").write_text(json.dumps(GOOD))
    assert read_settings(tmp_path) == GOOD


def test_where_levels_and_detectors_were_not_recorded_the_first_was_read_and_there_was_none(tmp_path):
    older = {name: value for name, value in GOOD.items() if name not in ("levels", "detects")}
    (tmp_path / "train_args.json").write_text(json.dumps(older))
    assert read_settings(tmp_path) == {**GOOD, "levels": 1, "detects": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_features", 10**9),
        ("in_features", True),
        ("projector_layers", 10**9),
        ("projector_layers", 0),
        ("position_scale", float("nan")),
        ("position_scale", [0.1]),
        ("base_model", "Qwen"),
        ("base_model", {"name": 3}),
        ("base_model", {}),
        ("max_text_tokens", -1),
        ("token_reduction", ["pool"]),
        ("position", "2d"),
        ("use_lora", "no"),
        ("tokenizer", None),
        ("tokenizer_path", 3),
        ("amp", {}),
        ("levels", 0),
        ("levels", "all"),
        ("detects", 0),
        ("detects", 10**6),
        ("detects", ["nodule"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(tmp_path, name, value):
    (tmp_path / "train_args.json").write_text(json.dumps({**GOOD, name: value}))
    with pytest.raises(Refused, match=rf"^NO_ALIGNMENT: .*as its {name}, it has") as end:
        read_settings(tmp_path)
    assert end.value.status == 2


@pytest.mark.parametrize("content", ["[", "[]", "null", '{"tokenizer": "x"}', "[" * 100_000])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "train_args.json").write_text(content)
    with pytest.raises(Refused, match=r"^NO_ALIGNMENT: "):
        read_settings(tmp_path)
