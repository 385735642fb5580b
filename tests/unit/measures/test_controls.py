"""Controls that a model cannot pass without looking at the image."""

import warnings
from collections import Counter

import numpy as np
import pytest

from app.measures.controls import BETTER, NO_EVIDENCE, Gap, constant_answers, derange, mean_gap, paired_gap, swap_sides
from app.measures.text_scores import token_f1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[1, 1], [1] * 9, [3, 3], [4, 2, 1, 1], [5, 1, 1, 1, 1, 1]])
def test_nobody_keeps_a_volume_of_their_own(sizes, seed):
    patients = [f"p{owner}" for owner, size in enumerate(sizes) for _ in range(size)]
    patients = [patients[at] for at in np.random.default_rng(seed).permutation(len(patients))]
    given = derange(patients, seed=seed)
    assert sorted(given) == list(range(len(patients)))
    assert all(patients[case] != patients[other] for case, other in enumerate(given))


def test_seeds_give_different_shuffles_and_one_patient_is_refused():
    patients = [f"p{number}" for number in range(20)]
    assert derange(patients, seed=0) == derange(patients, seed=0) != derange(patients, seed=1)
    with pytest.raises(ValueError, match="got 3 of 4 cases from one patient"):
        derange(["a", "a", "a", "b"])


def test_gap_of_a_blind_model_covers_zero_and_of_a_seeing_one_does_not():
    rng = np.random.default_rng(0)
    patients = [f"p{number // 2}" for number in range(200)]
    blind, control = rng.random(200) < 0.5, rng.random(200) < 0.5
    gap = mean_gap(blind.astype(float), control.astype(float), patients)
    assert gap.low < 0 < gap.high and gap.verdict == NO_EVIDENCE
    seeing = mean_gap((rng.random(200) < 0.9).astype(float), control.astype(float), patients)
    assert 0.25 < seeing.low < seeing.difference < seeing.high < 0.55 and seeing.verdict == "better than the control"


def test_interval_is_over_patients_not_over_cases():
    """Copies of a patient's case add no certainty."""
    rng = np.random.default_rng(0)
    real, control = rng.random(30), rng.random(30)
    one = mean_gap(real, control, list(range(30)))
    copied = mean_gap(np.repeat(real, 10), np.repeat(control, 10), list(np.repeat(np.arange(30), 10)))
    assert copied == pytest.approx(one)
    spread = paired_gap(lambda w: (np.average(real, weights=w), np.average(control, weights=w)), list(range(30)))
    normal = 1.96 * (real - control).std() / np.sqrt(30)
    assert (spread.high - spread.low) / 2 == pytest.approx(normal, rel=0.1)


def test_a_score_that_is_defined_nowhere_gives_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(paired_gap(lambda _: (np.nan, np.nan), [1, 2, 3])).all()


def test_constant_answers_come_from_the_other_half():
    patients = ["a", "b", "c", "d"]
    references = ["yes", "no", "yes", "no"]
    chosen = constant_answers(references, ["q"] * 4, patients, lambda c, pool: np.mean([token_f1(c, r) for r in pool]))
    assert chosen == ["no", "yes", "no", "yes"]
    mixed = constant_answers(
        ["left", "one", "left", "two", "right", "two"], ["side", "count"] * 3, list("abcdef"),
        lambda c, pool: Counter(pool)[c],
    )  # fmt: skip
    assert set(mixed[::2]) <= {"left", "right"} and set(mixed[1::2]) <= {"one", "two"}


def test_sides_are_swapped_as_words():
    assert swap_sides("Left lung: bright, right-sided. LEFT") == "Right lung: bright, left-sided. RIGHT"


def test_the_verdict_is_that_of_the_printed_interval():
    assert Gap(0.003, 0.0004, 0.005).verdict == NO_EVIDENCE and Gap(0.003, 0.0006, 0.005).verdict == BETTER
    assert Gap(-0.003, -0.005, -0.0004).verdict == NO_EVIDENCE
