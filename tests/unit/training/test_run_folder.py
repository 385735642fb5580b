"""What two configs of one run are found to have otherwise."""

import pytest

from app.shared.refusals import Refused
from app.training.run_folder import RunFolder, differences, duration


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, []),
        ({"a": None, "b": 2}, {"a": 0, "b": 2.0}, [("a", None, 0)]),
        ({"a": {"b": {"c": 1, "d": 1}}}, {"a": {"b": {"c": 2, "d": 1}}}, [("a#b#c", 1, 2)]),
        ({"a": ["lung", "bone"]}, {"a": ["lung", "brain"]}, [("a", ["lung", "bone"], ["lung", "brain"])]),
        ({"a": [{"b": 1}, "@w"]}, {"a": [{"b": 2}, "@w"]}, [("a#0#b", 1, 2)]),
        ({"a": [{"b": 1}]}, {"a": []}, [("a", [{"b": 1}], [])]),
        ({"a": {"b": 1}}, {"a": {}}, [("a#b", 1, "left out")]),
        ({"a": {}}, {"a": {"b": 1}, "c": 2}, [("a#b", "not to be chosen", 1), ("c", "not to be chosen", 2)]),
        ({"a": {}}, {"a": {"norm": "@norm"}, "norm": "voxel"}, [("norm", "not to be chosen", "voxel")]),
        ({"a": {"b": "@b"}}, {"a": {"b": 0.3}}, [("a#b", "@b", 0.3)]),
        ({"resume": None, "output_dir": "a", "i_save": 1, "_desc_": "x"}, {"resume": 3, "output_dir": "b"}, []),
        ({"a": {"resume": 1}}, {"a": {"resume": 2}}, [("a#resume", 1, 2)]),
    ],
)
def test_what_changed_is_told_by_the_smallest_part_that_both_have(before, now, told):
    assert list(differences(before, now)) == told


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0314, "0.031 s"), (59, "59 s"), (150, "2.5 min"), (7200, "2 h"), (1_440_000, "16.7 days"), (0, "0 s")],
)
def test_a_duration_is_told_in_the_unit_that_reads_best(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "line",
    ["[1]}", '{"step": "3", "phase": "train"}', '{"phase": "train"}', '{"step": 1, "phase": 2}',
     '{"step": 4, "phase": "train", "val_recon": [1]}'],
)  # fmt: skip
def test_a_foreign_line_of_metrics_is_one_line(tmp_path, line):
    folder = RunFolder.__new__(RunFolder)
    folder.path, folder.start_step, folder.warm_up_step = tmp_path, None, 5
    kept = '{"phase": "warmup", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + '{"phase": "warmup", "step": 9}\n{"phase": "warm')
    folder._cut_after_start()
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    (tmp_path / "metrics.jsonl").write_text(kept + line + "\n")
    with pytest.raises(Refused, match=r"^BAD_RUN: ") as end:
        folder._cut_after_start()
    assert end.value.status == 2
    assert (tmp_path / "metrics.jsonl").read_text() == kept + line + "\n"
