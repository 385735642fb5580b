"""Does the model look at the image? What to compare a score with, and whether the difference is more than chance.

A score means something only beside the same score with volumes shuffled (nobody keeps their own), one featureless
volume for all, no volume, and one constant answer. Gaps come with bootstrap intervals over patients and with a
sign-flip test: how often a gap as large comes of exchanging real and control at random, patient by patient. A verdict
needs twenty patients, an interval on one side of zero, and a p of at most 2.5 % after Holm's correction (Scand J Stat
1979, 6:65) for the number of scores compared with that control.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

CONTROLS = ("shuffled", "blank", "question_only", "constant")
MIN_PATIENTS = 20  # below, no verdict: the gap is shown alone
LEVEL = 0.025  # of false verdicts in one direction, over all scores compared with one control
CONFIDENCE = 0.95
RESAMPLES = 1000
FLIPS = 4999  # random sign patterns where there are too many for all
MAX_SUMS = 1 << 16  # different sums of sign patterns that are counted exactly
NO_EVIDENCE = "no evidence the image is used"
BETTER = "better than the control"
WORSE = "worse than the control"
USED = "the image is used"  # said of shuffled volumes alone: the other controls also differ in what a model is used to
UNDEFINED = "not defined here"


class Gap(NamedTuple):
    difference: float  # real minus control
    low: float
    high: float
    p: float  # of the sign-flip test, towards the side on which the difference lies
    patients: int


def verdicts(gaps: Mapping[Hashable, Gap], *, control: str) -> dict[Hashable, str]:
    """What may be said of each score compared with one control; together they are one family of tests."""
    corrected = holm({name: gap.p for name, gap in gaps.items() if np.isfinite(gap.p)})
    better = USED if control == "shuffled" else BETTER
    said: dict[Hashable, str] = {}
    for name, gap in gaps.items():
        low, high = round(gap.low, 3), round(gap.high, 3)  # as they are printed: +0.000 covers zero
        if not np.isfinite(gap.difference):
            said[name] = UNDEFINED
        elif gap.patients < MIN_PATIENTS:
            said[name] = f"no verdict from {gap.patients} patients, it takes {MIN_PATIENTS}"
        elif corrected.get(name, 1.0) > LEVEL or low <= 0 <= high:
            said[name] = NO_EVIDENCE
        else:
            said[name] = better if low > 0 else WORSE
    return said


def holm(values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """p values corrected for how many there are."""
    corrected, floor = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, p * (len(values) - rank)))
        corrected[name] = floor
    return corrected


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


def mean_gap(real: Shaped[np.ndarray, " N"], control: Shaped[np.ndarray, " N"], patients: Sequence[Hashable]) -> Gap:
    """Gap of a score that is a mean over cases."""
    owner, number = _owners(patients)
    rng = np.random.default_rng(0)
    counts = np.bincount(owner, minlength=number).astype(float)
    sums = np.bincount(owner, np.subtract(real, control, dtype=float), minlength=number)
    draws = _resample(number, rng)
    return Gap(
        float(sums.sum() / counts.sum()),
        *_interval((draws @ sums) / (draws @ counts)),
        sign_flip(sums, rng),
        number,
    )


def sign_flip(differences: Float[np.ndarray, " N"], rng: np.random.Generator) -> float:
    """Share of sign patterns whose sum lies as far out as the sum itself, on its side: of all, where that is cheap."""
    total, steps = abs(float(differences.sum())) - 1e-9, np.abs(differences[differences != 0])
    sums, share = np.zeros(1), np.ones(1)
    for step in steps:
        both = np.concatenate([sums - step, sums + step]).round(9)
        sums, place = np.unique(both, return_inverse=True)
        share = np.bincount(place.reshape(-1), np.tile(share / 2, 2))
        if len(sums) > MAX_SUMS:
            return _as_far([signs @ steps >= total for signs in _signs(len(steps), FLIPS, rng)])
    return float(share[sums >= total].sum())


def paired_gaps(
    score: Callable[[Float[np.ndarray, " M"]], Mapping[str, float]],
    patients: Sequence[Hashable],
    names: Sequence[str],
) -> dict[str, Gap]:
    """Gaps of scores that are no means. `score(weights)` is over the real cases followed by the control's, weighted."""
    owner, number = _owners(patients)
    rng = np.random.default_rng(0)
    none = np.zeros(len(owner))

    def gap(real: np.ndarray, control: np.ndarray) -> np.ndarray:
        one, other = score(np.concatenate([real, control])), score(np.concatenate([control, real]))
        return np.array([one[name] - other[name] for name in names])

    measured = gap(none + 1, none)
    drawn = np.array([gap(draw[owner].astype(float), none) for draw in _resample(number, rng)])
    outward = np.sign(measured)
    as_far = []
    for signs in _signs(number, RESAMPLES, rng):
        for row in signs:
            kept = (row[owner] > 0).astype(float)
            as_far.append(~(outward * gap(kept, 1 - kept) < np.abs(measured) - 1e-9))  # what is not defined counts too
    far = np.array(as_far)
    return {
        name: Gap(float(measured[at]), *_interval(drawn[:, at]), _as_far([far[:, at]]), number)
        if np.isfinite(measured[at])
        else Gap(np.nan, np.nan, np.nan, np.nan, number)
        for at, name in enumerate(names)
    }


def interval_over_patients(
    score: Callable[[Float[np.ndarray, " N"]], float], patients: Sequence[Hashable]
) -> tuple[float, float]:
    """95 % interval of one column's score over resampled patients; `score(weights)` is over its cases."""
    owner, number = _owners(patients)
    draws = _resample(number, np.random.default_rng(0))
    return _interval(np.array([score(draw[owner].astype(float)) for draw in draws]))


def _owners(patients: Sequence[Hashable]) -> tuple[Int[np.ndarray, " N"], int]:
    number = {patient: at for at, patient in enumerate(dict.fromkeys(patients))}
    return np.array([number[patient] for patient in patients]), len(number)


def _resample(number: int, rng: np.random.Generator) -> Int[np.ndarray, "S N"]:
    return rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)


def _interval(drawn: Float[np.ndarray, " S"]) -> tuple[float, float]:
    if np.isnan(drawn).all():
        return np.nan, np.nan
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _signs(width: int, count: int, rng: np.random.Generator) -> Iterator[Int[np.ndarray, "S N"]]:
    """Random sign patterns, a thousand at a time."""
    for start in range(0, count, 1000):
        yield rng.integers(0, 2, (min(1000, count - start), width)) * 2 - 1


def _as_far(blocks: Sequence[np.ndarray]) -> float:
    """p of a test on random patterns; the one that was seen is one of them, so that p is never too small."""
    hits, tried = sum(int(block.sum()) for block in blocks), sum(len(block) for block in blocks)
    return (1 + hits) / (1 + tried)


def swap_sides(text: str) -> str:
    """The text as it would read of the mirrored patient."""
    sides = {"left": "right", "right": "left"}
    swapped = {case(side): case(other) for side, other in sides.items() for case in (str.lower, str.title, str.upper)}
    return re.sub(r"[^\W\d_]+", lambda word: swapped.get(word[0], word[0]), text)
