"""Controls that a model cannot pass without looking at the image."""

import math
import warnings
from collections import Counter

import numpy as np
import pytest

from app.measures.controls import (
    BETTER,
    NO_EVIDENCE,
    USED,
    WORSE,
    Gap,
    constant_answers,
    derange,
    holm,
    mean_gap,
    paired_gaps,
    sign_flip,
    swap_sides,
    verdicts,
)
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
    assert gap.low < 0 < gap.high and verdict(gap) == NO_EVIDENCE
    seeing = mean_gap((rng.random(200) < 0.9).astype(float), control.astype(float), patients)
    assert 0.25 < seeing.low < seeing.difference < seeing.high < 0.55 and verdict(seeing) == USED


def test_interval_is_over_patients_not_over_cases():
    """Copies of a patient's case add no certainty."""
    rng = np.random.default_rng(0)
    real, control = rng.random(30), rng.random(30)
    one = mean_gap(real, control, list(range(30)))
    copied = mean_gap(np.repeat(real, 10), np.repeat(control, 10), list(np.repeat(np.arange(30), 10)))
    assert copied == pytest.approx(one)
    both = np.concatenate([real, control])
    spread = paired_gaps(lambda w: {"mean": np.average(both, weights=w)}, list(range(30)), ["mean"])["mean"]
    assert spread.difference == pytest.approx(one.difference) and spread.p == pytest.approx(one.p, abs=0.05)
    normal = 1.96 * (real - control).std() / np.sqrt(30)
    assert (spread.high - spread.low) / 2 == pytest.approx(normal, rel=0.1)


def test_a_score_that_is_defined_nowhere_gives_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gap = paired_gaps(lambda _: {"crg": np.nan}, [1, 2, 3], ["crg"])["crg"]
    assert np.isnan(gap[:4]).all() and verdicts({"crg": gap}, control="shuffled") == {"crg": "not defined here"}


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


def verdict(gap: Gap, control: str = "shuffled") -> str:
    return verdicts({"accuracy": gap}, control=control)["accuracy"]


def test_the_verdict_is_that_of_the_printed_interval():
    def says(*interval):
        return verdict(Gap(*interval, p=0.001, patients=40), "blank")

    assert says(0.003, 0.0004, 0.005) == NO_EVIDENCE and says(0.003, 0.0006, 0.005) == BETTER
    assert says(-0.003, -0.005, -0.0004) == NO_EVIDENCE and says(-0.003, -0.005, -0.002) == WORSE


def test_below_twenty_patients_there_is_a_gap_and_no_verdict():
    for count in (2, 19):
        perfect = mean_gap(np.ones(count), np.zeros(count), list(range(count)))
        assert perfect[:3] == (1, 1, 1) and verdict(perfect) == f"no verdict from {count} patients, it takes 20"
    assert verdict(mean_gap(np.ones(20), np.zeros(20), list(range(20)))) == USED


def test_sign_flips_are_counted_exactly_where_there_are_few_sums():
    rng = np.random.default_rng(0)
    # 3 of 4 to one side: patterns of four signs with a sum of 2 or more are 1 + 4 of 16
    assert sign_flip(np.array([1.0, 1.0, 1.0, -1.0, 0.0]), rng) == 5 / 16
    assert sign_flip(-np.array([1.0, 1.0, 1.0, -1.0]), rng) == 5 / 16
    assert sign_flip(np.zeros(5), rng) == 1
    # 30 of 40 questions: the upper tail of a binomial
    tail = sum(math.comb(40, right) for right in range(30, 41)) / 2**40
    assert sign_flip(np.repeat([1.0, -1.0], [30, 10]), rng) == pytest.approx(tail)
    values = rng.normal(0.3, 1, 40)  # 2^40 different sums: by random patterns, beside the normal tail
    normal = 0.5 * math.erfc(abs(values.sum()) / np.sqrt((values**2).sum()) / math.sqrt(2))
    assert sign_flip(values, rng) == pytest.approx(normal, rel=0.2)


def test_several_scores_are_several_tests():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    gap = Gap(0.1, 0.02, 0.2, p=0.02, patients=40)
    assert verdict(gap) == USED
    others = {name: Gap(0.0, -0.1, 0.1, p=0.4, patients=40) for name in ("rougeL", "crg")}
    assert verdicts({"accuracy": gap, **others}, control="shuffled")["accuracy"] == NO_EVIDENCE


@pytest.mark.parametrize("patients", [2, 3, 10, 20, 40])
def test_of_pure_noise_at_most_one_in_forty_verdicts_is_that_the_image_is_used(patients):
    """200 trials: 5 at the most are expected, of which chance makes more than 10 once in a hundred runs."""
    rng = np.random.default_rng(patients)
    false = 0
    for _ in range(200):
        owner = np.repeat(np.arange(patients), rng.integers(1, 5)).tolist()
        real, control = rng.random((2, len(owner))) < 0.5
        text, other = rng.normal(size=(2, len(owner)))  # a second score, of the same family
        family = {"accuracy": mean_gap(real, control, owner), "text": mean_gap(text, other, owner)}
        false += USED in verdicts(family, control="shuffled").values()
    assert false <= (0 if patients < 20 else 10)
