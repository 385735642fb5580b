"""Cases a minute of `prepare` on a synthetic cohort, with one worker and with two.

python tests/benchmarks/bench_cohort.py [--cases 200] [--size 96]

Each case is a noisy 96 x 96 x 48 scan (2 x 2 x 4 mm) in a .nii.gz of its own; both runs must write the same bytes.
Prints a row a run and a JSON line. Wall time: on a machine with other work the figures are lower bounds.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from app.prepare import cohort
from tests import scans


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--size", type=int, default=96)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root, rows, digests = Path(folder), [], set()
        affine = scans.centred((2.0, 2.0, 4.0), (96, 96, 48))
        clean = scans.sample(affine, (96, 96, 48))
        for number in range(options.cases):
            noisy = (clean + rng.normal(0, 10, clean.shape)).astype(np.int16)
            scans.write_nifti(root / "raw" / "ds" / f"c{number:04d}.nii.gz", affine, noisy)
        (root / "key").write_text("k")
        for workers in (1, 2):
            out = root / f"out{workers}"
            settings, request = cohort.PrepareSettings(options.size, 2.0), cohort.Request(key_file=str(root / "key"))
            report = cohort.prepare(root / "raw", out, settings, request._replace(workers=workers))
            assert report.count("ok") == options.cases, report.outcomes[0]
            digests.add(digest(out))
            rows.append(
                {"workers": workers, "seconds": report.seconds, "a_minute": 60 * options.cases / report.seconds}
            )
            print(f"{workers} workers: {rows[-1]['a_minute']:.0f} cases a minute", flush=True)
        assert len(digests) == 1, "the number of workers changed the bytes"
    ratio = rows[1]["a_minute"] / rows[0]["a_minute"]
    print(
        json.dumps(
            {"benchmark": "cohort", "cases": options.cases, "rows": rows, "ratio": ratio, "cores": os.cpu_count()}
        )
    )


if __name__ == "__main__":
    main()
