"""What scores and gaps say of a model that looks, of one that does not, and of one that flips with the mirror."""

import warnings

import numpy as np
import pytest

from app.evaluation.answer_scores import COLUMNS, draw_bars, gap_line, mirror_scores, question_scores
from app.measures.controls import BETTER, NO_EVIDENCE, USED
from app.text.rows import TextRow

ROWS = [
    TextRow(f"case{n}", "Where is it?", "left" if n % 2 else "right", kind="side", patient=f"p{n}") for n in range(60)
]
TRUTH = [row.answer for row in ROWS]
SWAPPED = {"left": "right", "right": "left"}


def chance(seed: int) -> list[str]:
    return np.random.default_rng(seed).choice(["left", "right"], len(ROWS)).tolist()


def scores(real: list[str]) -> dict:
    columns = {"real": real, "shuffled": chance(1), "blank": ["left"] * 60, "question_only": [""] * 60}
    return question_scores(ROWS, {**columns, "constant": ["right"] * 60, "reference": TRUTH})


def test_a_model_that_looks_beats_shuffled_volumes():
    seen = scores(TRUTH[:54] + [SWAPPED[side] for side in TRUTH[54:]])
    assert seen["accuracy"]["real"] == 0.9 and seen["by_kind"]["side"]["rows"] == 60
    gap = seen["gaps"]["shuffled"]
    assert gap["low"] > 0.2 and gap["verdict"] == USED and gap_line("accuracy", "shuffled", gap).endswith(USED)


def test_a_model_that_guesses_is_called_blind_even_where_it_beats_no_volume_at_all():
    """Without a volume this one says nothing, which is worse than guessing and shows nothing."""
    blind = scores(chance(2))
    assert blind["gaps"]["shuffled"]["verdict"] == NO_EVIDENCE
    assert blind["gaps"]["question_only"]["low"] > 0.3 and blind["gaps"]["question_only"]["verdict"] == BETTER


def test_the_mirror_counts_right_answers_alone():
    real = TRUTH[:40] + [SWAPPED[side] for side in TRUTH[40:]]
    mirrored = [SWAPPED[side] for side in TRUTH[:30]] + TRUTH[30:]
    assert mirror_scores(ROWS, real, mirrored) == {"asked": 60, "right": 40, "flipped": pytest.approx(0.75)}
    assert mirror_scores(ROWS, ["none"] * 60, mirrored)["flipped"] is None


def test_the_picture_of_reports_alone_has_room_for_its_legend(tmp_path):
    """Matplotlib warns where the axes have no room left beside it."""
    scores = {column: {"f1_micro": 0.5} for column in COLUMNS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_bars({"questions": None, "reports": {"findings": {"scores": scores}}}, tmp_path / "bars.png")
