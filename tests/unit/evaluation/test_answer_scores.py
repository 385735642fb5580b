"""What scores and gaps say of a model that looks, of one that does not, and of one that flips with the mirror."""

import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.__main__ import evaluate as evaluate_command
from app.evaluation.answer_pages import WITH_RANDOM, draw_bars, gap_line, table_lines
from app.evaluation.answer_scores import add_verdicts, mirror_scores, question_scores, report_scores
from app.evaluation.tokenizer_evaluation import UNSEEN
from app.measures.controls import BETTER, MIN_PATIENTS, NO_EVIDENCE, USED
from app.measures.report import plain
from app.text.rows import TextRow

ROWS = [
    TextRow(f"case{n}", "Where is it?", "left" if n % 2 else "right", kind="side", patient=f"p{n}") for n in range(60)
]
TRUTH = [row.answer for row in ROWS]
SWAPPED = {"left": "right", "right": "left"}


def chance(seed: int) -> list[str]:
    return np.random.default_rng(seed).choice(["left", "right"], len(ROWS)).tolist()


def scores(real: list[str], *more_shuffled: list[str]) -> dict:
    columns = {"real": real, "shuffled": chance(1), "blank": ["left"] * 60, "question_only": [""] * 60}
    made = question_scores(ROWS, {**columns, "constant": ["right"] * 60, "reference": TRUTH}, more_shuffled)
    add_verdicts(made)
    return made


def test_a_model_that_looks_beats_shuffled_volumes():
    seen = scores(TRUTH[:54] + [SWAPPED[side] for side in TRUTH[54:]])
    assert seen["accuracy"]["real"] == 0.9 and seen["by_kind"]["side"]["rows"] == 60
    gap = seen["gaps"]["shuffled"]["accuracy"]
    low, high = seen["intervals"]["all"]["real"]
    assert low < 0.9 < high and high - low == pytest.approx(2 * 1.96 * (0.9 * 0.1 / 60) ** 0.5, rel=0.2)
    assert gap["low"] > 0.2 and gap["verdict"] == USED and gap_line("accuracy", "shuffled", gap).endswith(USED)


def test_shuffled_is_the_mean_of_its_pairings():
    real = TRUTH[:54] + [SWAPPED[side] for side in TRUTH[54:]]
    one, two, all_ = scores(real), scores(real, TRUTH[:30] + chance(3)[30:]), scores(real, TRUTH, TRUTH, TRUTH)
    first, other = np.array(chance(1)) == TRUTH, np.array(TRUTH[:30] + chance(3)[30:]) == TRUTH
    assert two["accuracy"]["shuffled"] == pytest.approx((first.mean() + other.mean()) / 2)
    assert two["by_kind"]["side"]["shuffled"] == two["token_f1"]["shuffled"] == two["accuracy"]["shuffled"]
    assert two["gaps"]["shuffled"]["accuracy"]["difference"] == pytest.approx(0.9 - two["accuracy"]["shuffled"])
    assert all_["accuracy"]["shuffled"] == pytest.approx((first.mean() + 3) / 4)
    for column in ("real", "blank"):
        assert one["accuracy"][column] == two["accuracy"][column] == all_["accuracy"][column]


def test_each_kind_has_its_gap_to_shuffled_volumes():
    kinds = [replace(row, kind="side" if n < 40 else "presence") for n, row in enumerate(ROWS)]
    columns = {"real": TRUTH[:40] + chance(1)[40:], "shuffled": chance(1), "blank": TRUTH, "question_only": TRUTH}
    made = question_scores(kinds, {**columns, "constant": TRUTH, "reference": TRUTH})
    add_verdicts(made)
    gaps = made["gaps"]["shuffled"]
    assert set(gaps) == {"accuracy", "side", "presence"} and set(made["gaps"]["blank"]) == {"accuracy"}
    assert gaps["side"]["low"] > 0.2 and gaps["side"]["verdict"] == USED
    assert gaps["presence"]["difference"] == 0 and gaps["presence"]["verdict"] == NO_EVIDENCE


def test_a_model_that_guesses_is_called_blind_even_where_it_beats_no_volume_at_all():
    """Without a volume this one says nothing, which is worse than guessing and shows nothing."""
    blind = scores(chance(2))
    assert blind["gaps"]["shuffled"]["accuracy"]["verdict"] == NO_EVIDENCE
    empty = blind["gaps"]["question_only"]["accuracy"]
    assert empty["low"] > 0.3 and empty["verdict"] == BETTER


def test_the_mirror_counts_right_answers_alone():
    real = TRUTH[:40] + [SWAPPED[side] for side in TRUTH[40:]]
    mirrored = [SWAPPED[side] for side in TRUTH[:30]] + TRUTH[30:]
    assert mirror_scores(ROWS, real, mirrored) == {"asked": 60, "right": 40, "flipped": pytest.approx(0.75)}
    assert mirror_scores(ROWS, ["none"] * 60, mirrored)["flipped"] is None


def test_the_picture_of_reports_alone_has_room_for_its_legend(tmp_path):
    """Matplotlib warns where the axes have no room left beside it."""
    scores = {column: {"f1_micro": 0.5} for column in WITH_RANDOM}
    findings = {"scores": scores, "intervals": {column: (0.4, 0.6) for column in WITH_RANDOM}}
    reports = {"rows": 20, "findings": findings}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_bars({"questions": None, "reports": reports, "patients": 20}, tmp_path / "bars.png")


def reports_of(texts: list[str], said: list[str]) -> dict:
    rows = [TextRow(f"c{n}", "Report.", text, patient=f"p{n}") for n, text in enumerate(texts)]
    others = [*said[1:], said[0]]
    answers = {"reference": texts, "real": said, "shuffled": others, "blank": others, "question_only": others}
    made = report_scores(rows, {**answers, "constant": others})
    add_verdicts(made, made["findings"])
    return plain(made)


def test_findings_stand_beside_as_many_labels_at_random():
    texts = [f"A nodule of {n} mm." if n % 2 else "Emphysema and atelectasis." for n in range(24)]
    found = reports_of(texts, texts)["findings"]
    # one or two of 19 labels said, each as likely as any other: of 36 that are true 12 * 1/19 + 12 * 2 * 2/19 are hit
    assert found["scores"]["random_labels"]["f1_micro"] == pytest.approx((12 + 48) / 19 / 36)
    assert found["scores"]["real"]["f1_micro"] == 1
    gap = found["gaps"]["random_labels"]["f1_micro"]
    assert gap["difference"] == pytest.approx(1 - 60 / 19 / 36) and gap["verdict"] == BETTER


def test_chinese_is_scored_by_characters_and_its_findings_are_not_claimed():
    texts = [f"左肺上叶见结节，直径{n}毫米。" for n in range(3, 27)]
    made = reports_of(texts, ["左肺上叶见结节。"] * 24)
    assert made["findings"] is None and made["tokens"].startswith("characters")
    assert "tok:zh" in made["scores"]["real"]["bleu_signature"]
    # all seven characters said are right, twelve tokens are wanted: two characters, the number and two more
    assert made["scores"]["real"]["rougeL"] == pytest.approx(2 * 7 / (7 + 12))
    result = {"rows": 24, "patients": 24, "left_out": {}, "questions": None, "reports": made}
    table = "\n".join(table_lines(result))
    assert "Findings are not claimed" in table and "tokenizer zh" in table and "findings:" not in table


def test_the_built_in_phantoms_are_as_many_as_a_verdict_takes():
    """The tokenizer's card, `evaluate` and its bundle judge unseen phantoms, never the few held out of training."""
    bundle = json.loads((Path(__file__).resolve().parents[3] / "bundles/evaluate_language.json").read_text())
    by_command = inspect.signature(evaluate_command).parameters["num_phantoms"].default
    assert min(UNSEEN, bundle["num_phantoms"], by_command) >= MIN_PATIENTS
