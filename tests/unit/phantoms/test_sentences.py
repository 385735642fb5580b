"""Reports and questions follow from the findings; guessing does not pay."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from app.measures.findings import KEYWORDS, find_findings
from app.phantoms.sentences import LABELS, balance, mirrored, phantom_report, phantom_rows, questions
from app.text.rows import REPORT_QUESTION

NODULES = {"finding": "nodule", "organ": "lung", "side": "left", "count": 2, "size_mm": [15.0, 25.0]}
EFFUSION = {"finding": "pleural effusion", "side": "right", "count": 1, "size_mm": [], "size": "moderate"}
STONE = {"finding": "kidney stone", "organ": "kidney", "side": "right", "count": 1, "size_mm": [9.0]}


def random_findings(rng: np.random.Generator) -> list[dict]:
    found = []
    for finding in (NODULES, EFFUSION, STONE):
        for side in ("left", "right"):
            if rng.random() < 0.35:
                sizes = [float(rng.uniform(8, 30)) for _ in range(rng.integers(1, 4))]
                changed = {"side": side, "count": len(sizes), "size_mm": sizes}
                found.append({**finding, **changed})
    return found


def test_report_names_every_side_and_kind():
    assert phantom_report([NODULES, EFFUSION, STONE]) == (
        "No pleural effusion on the left side. Moderate pleural effusion on the right side. "
        "Two nodules in the left lung, the largest large. No nodule in the right lung. "
        "No kidney stone in the left kidney. One kidney stone in the right kidney, the largest small."
    )


def test_questions_follow_from_findings():
    asked = {(question, answer) for _, question, answer in questions([NODULES])}
    assert asked == {
        ("Is there a pleural effusion on the left side?", "no"),
        ("Is there a pleural effusion on the right side?", "no"),
        ("Is there a nodule in the left lung?", "yes"),
        ("How many nodules are in the left lung?", "two"),
        ("How large is the largest nodule in the left lung?", "large"),
        ("Is there a nodule in the right lung?", "no"),
        ("On which side is the nodule?", "left"),
        ("Is there a kidney stone in the left kidney?", "no"),
        ("Is there a kidney stone in the right kidney?", "no"),
        ("Which organ is affected?", "lung"),
    }


def test_mirrored_findings_swap_sides_and_nothing_else():
    swapped = {(question, answer) for _, question, answer in questions(mirrored([NODULES]))}
    assert ("On which side is the nodule?", "right") in swapped
    assert ("How many nodules are in the right lung?", "two") in swapped
    assert mirrored(mirrored([NODULES, STONE])) == [NODULES, STONE]


def test_balanced_answers_are_equally_frequent():
    rng = np.random.default_rng(0)
    rows = [row for i in range(300) for row in phantom_rows(f"p{i}", random_findings(rng), split="train")]
    kept = balance(rows)
    assert sum(row.question == REPORT_QUESTION for row in kept) == 300
    counts = defaultdict(Counter)
    for row in kept:
        if row.kind != "report":
            counts[row.question][row.answer] += 1
    assert {row.kind.split(": ")[-1] for row in kept} == {"report", "presence", "count", "size", "side", "organ"}
    for question, answers in counts.items():
        assert len(answers) > 1 and len(set(answers.values())) == 1, (question, answers)
    assert balance(rows) == kept != balance(rows, seed=1)


@pytest.mark.parametrize("seed", range(20))
def test_the_finding_matcher_reads_these_reports_without_error(seed):
    findings = random_findings(np.random.default_rng(seed))
    rows = phantom_rows("p", findings, split="val")
    found = find_findings(rows[0].answer)
    assert {label: found[label] for label in LABELS.values()} == rows[0].labels
    assert not any(found[label] for label in KEYWORDS if label not in LABELS.values())


def test_text_can_keep_to_some_findings():
    rows = phantom_rows("p", [NODULES, EFFUSION], split="train", about=["pleural effusion"])
    assert rows[0].answer == "No pleural effusion on the left side. Moderate pleural effusion on the right side."
    assert rows[0].labels == {"Pleural effusion": True}
    assert {row.question for row in rows[1:]} == {
        "Is there a pleural effusion on the left side?",
        "Is there a pleural effusion on the right side?",
        "How large is the largest pleural effusion on the right side?",
        "On which side is the pleural effusion?",
        "Which organ is affected?",
    }
    with pytest.raises(ValueError, match="about must be among pleural effusion, nodule, kidney stone, got fracture"):
        phantom_rows("p", [], split="train", about=["fracture"])
