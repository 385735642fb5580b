"""Does the model look at the image? What to compare a score with, and whether the difference is more than chance.

A score means something only beside the same score with volumes shuffled (nobody keeps their own), one featureless
volume for all, no volume, and one constant answer. Gaps come with bootstrap intervals over patients.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

CONTROLS = ("shuffled", "blank", "question_only", "constant")
NO_EVIDENCE = "no evidence the image is used"
BETTER = "better than the control"
USED = "the image is used"  # said of shuffled volumes alone: the other controls also differ in what a model is used to


class Gap(NamedTuple):
    difference: float  # real minus control
    low: float
    high: float

    @property
    def verdict(self) -> str:
        low, high = round(self.low, 3), round(self.high, 3)  # as they are printed: +0.000 covers zero
        return BETTER if low > 0 else "worse than the control" if high < 0 else NO_EVIDENCE


def derange(patients: Sequence[Hashable], *, seed: int = 0) -> list[int]:
    """For each case the number of another patient's case, each used once.

    Sorted by patient, everyone takes the case one largest-patient further on, which is never their own.
    """
    counts = Counter(patients)
    largest = max(counts.values(), default=0)
    if 2 * largest > len(patients):
        raise ValueError(
            f"volumes can be shuffled between patients only if none has more than half of them, "
            f"got {largest} of {len(patients)} cases from one patient"
        )
    rng = np.random.default_rng(seed)
    names = list(counts)
    place = {names[at]: rank for rank, at in enumerate(rng.permutation(len(names)))}
    tie = rng.random(len(patients))
    order = sorted(range(len(patients)), key=lambda case: (place[patients[case]], tie[case]))
    given = [0] * len(patients)
    for at, case in enumerate(order):
        given[case] = order[(at + largest) % len(order)]
    return given


def constant_answers(
    references: Sequence[str], kinds: Sequence[Hashable], patients: Sequence[Hashable], closeness: Callable
) -> list[str]:
    """For each case one fixed answer of its kind, chosen on the other half of the patients: the closest to all others.

    `closeness(candidate, references)` is the score to win by; where the other half has no such kind, its own serves.
    """
    half = {patient: rank % 2 for rank, patient in enumerate(dict.fromkeys(patients))}
    best: dict[tuple, str] = {}
    for kind in dict.fromkeys(kinds):
        members = [at for at, other in enumerate(kinds) if other == kind]
        for side in (0, 1):
            pool = [references[at] for at in members if half[patients[at]] != side] or [
                references[at] for at in members
            ]
            # enough candidates to find a typical one; a report is long and the choice quadratic
            candidates = [text for text, _ in Counter(pool).most_common(25)]
            best[kind, side] = max(candidates, key=lambda text: closeness(text, pool[:100]))
    return [best[kind, half[patient]] for kind, patient in zip(kinds, patients, strict=True)]


def paired_gap(
    score: Callable[[np.ndarray], tuple[float, float]],
    patients: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Gap:
    """Real minus control with a percentile interval over resampled patients.

    `score(weights)` gives (real, control) with each case counted `weights` times, both on the same cases.
    """
    names = list(dict.fromkeys(patients))
    owner = np.array([names.index(patient) for patient in patients])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_samples)
    gaps = np.array([np.subtract(*score(draw[owner].astype(float))) for draw in draws])
    if np.isnan(gaps).all():  # a score that is not defined on these cases
        return Gap(np.nan, np.nan, np.nan)
    low, high = np.nanquantile(gaps, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Gap(float(np.subtract(*score(np.ones(len(owner))))), float(low), float(high))


def mean_gap(real: np.ndarray, control: np.ndarray, patients: Sequence[Hashable], **options) -> Gap:
    """Gap of a score that is a mean over cases."""

    def score(weights: np.ndarray) -> tuple[float, float]:
        return float(np.average(real, weights=weights)), float(np.average(control, weights=weights))

    return paired_gap(score, patients, **options)


def swap_sides(text: str) -> str:
    """The text as it would read of the mirrored patient."""
    sides = {"left": "right", "right": "left"}
    swapped = {case(side): case(other) for side, other in sides.items() for case in (str.lower, str.title, str.upper)}
    return re.sub(r"[^\W\d_]+", lambda word: swapped.get(word[0], word[0]), text)
