"""A small mixed cohort of raw scans, prepared in this process, and what lies in its output."""

from pathlib import Path

from app.prepare import cohort
from tests import scans

SMALL = cohort.PrepareSettings(size=24, spacing=6.0)
AFFINE = scans.centred((3.0, 3.0, 4.0), (36, 32, 28))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def raw_cohort(root: Path, count: int = 3) -> Path:
    for number in range(count):
        affine = AFFINE.copy()
        affine[:3, 3] += number
        scans.write_nifti(root / "hospital" / f"scan{number}.nii.gz", affine, scans.sample(affine, (36, 32, 28)))
    scans.write_series(root / "clinic" / "one", scans.series())
    return root


def report(raw, out, settings=SMALL, **request):
    return cohort.prepare(raw, out, settings, cohort.Request(workers=1, **request))


def by_source(result) -> dict[str, cohort.Outcome]:
    return {o.source: o for o in result.outcomes}
