"""How often `evaluate` says "the image is used" of pure noise: at most 2.5 % is promised, at any number of patients.

    python -m tests.benchmarks.bench_verdicts [trials]

Each trial draws answers that know nothing of the image, for one to four questions and one report a patient, and scores
them as `evaluate` does: accuracy, a text score and findings F1 and CRG, one family of tests against shuffled volumes.
"""

import json
import sys
import time
from functools import partial

import numpy as np

from app.measures.controls import USED, mean_gap, paired_gaps, verdicts
from app.measures.findings import finding_scores

LABELS = 18
SIZES = (2, 3, 10, 19, 20, 21, 30, 60, 200)


def says_used(rng: np.random.Generator, patients: int) -> bool:
    owner = np.repeat(np.arange(patients), rng.integers(1, 5, patients)).tolist()
    real, shuffled = rng.random((2, len(owner))) < rng.uniform(0.2, 0.8)
    text, other = rng.beta(2, 5, (2, patients))
    share = rng.uniform(0.05, 0.3, LABELS)
    truth, said, told = rng.random((3, patients, LABELS)) < share
    score = partial(finding_scores, np.concatenate([said, told]), np.concatenate([truth, truth]))
    each = list(range(patients))
    family = {"accuracy": mean_gap(real, shuffled, owner), "text": mean_gap(text, other, each)}
    family |= paired_gaps(score, each, ("f1_micro", "f1_macro", "crg"))
    return USED in verdicts(family, control="shuffled").values()


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    shares = {}
    for patients in SIZES:
        rng, start = np.random.default_rng(patients), time.perf_counter()
        false = sum(says_used(rng, patients) for _ in range(trials))
        shares[patients] = false / trials
        bound = 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5
        assert shares[patients] <= bound, f"{false} false verdicts of {trials} with {patients} patients"
        print(f"{patients:4d} patients: {shares[patients]:.2%} false ({time.perf_counter() - start:.0f} s)", flush=True)
    print(json.dumps({"benchmark": "verdicts on noise", "trials": trials, "false": shares, "promised": 0.025}))


if __name__ == "__main__":
    main()
