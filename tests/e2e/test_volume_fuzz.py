"""Mutated NIfTI, Analyze, NRRD and MetaImage files through `prepare`, beside nibabel, SimpleITK and pynrrd.

A mutant is a small scan in a drawn geometry, voxel type, byte order, packing and layout, then changed in its text, its
fields, its bytes or its voxels. Whatever `prepare` calls ok must have the geometry and HU that others read, before and
after resampling; a `same` mutant, changed where no voxel and no place is told, must be ok and be the scan it was.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from app.dataset import prepared
from app.prepare import cohort
from app.prepare.volume import read_scan
from tests.volume_mutants import (
    KINDS,
    READERS,
    READERS_OF,
    WRITERS,
    Drawn,
    Read,
    apart,
    cleaned,
    resampled_apart,
    write_mutant,
)

SETTINGS = cohort.PrepareSettings(size=28, spacing=4.0, keep_names=True, windows=("bone",))
BATCH = 50


# ---- the attack


def judged(path: Path, base: str, kind: str, scan: Drawn, case: prepared.PreparedCase) -> list[str]:
    """What is wrong with one that is ok: every reader that opens the file must agree, before and after resampling;
    where none does, it must be the scan that was changed.
    """
    (own,) = read_scan(path)
    told, own = own.codes, cleaned(own.affine, np.asarray(own.hu, np.float64))
    reads = {name: READERS[name](path) for name in READERS_OF[base]}
    axes = own.affine[:3, :3] / np.linalg.norm(own.affine[:3, :3], axis=0)
    sheared = np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3  # which SimpleITK cannot hold
    if sheared or "SFORM_QFORM_DIFFER" in told:  # said aloud; SimpleITK takes the spacing of one, the turn of the other
        del reads["SimpleITK"]
    if kind == "bytes" and not apart(own, Read(scan.affine, scan.hu.astype(np.float64))):  # MetaIO ends at a bad line
        reads.pop("SimpleITK", None)
    reads = {name: read for name, read in reads.items() if read is not None and np.isfinite(read.affine).all()}
    reads = reads or {"nobody else, and it is not the scan it was": Read(scan.affine, scan.hu.astype(np.float64))}
    half = 0.5 * np.linalg.norm(own.affine[:3, :3], axis=0).min()  # by less sform and qform may differ, in silence
    near = {"SimpleITK": half} if "nibabel" in reads else {}
    wrong = [f"{name}: {why}" for name, read in reads.items() if (why := apart(own, read, near.get(name, 0.02)))]
    wrong += [why for read in list(reads.values())[:1] if (why := resampled_apart(case, read))]
    return wrong


def one_path(folder: Path) -> Path:
    return next(p for p in sorted(folder.iterdir()) if re.search(r"\.(nii|hdr|nrrd|nhdr|mha|mhd)(\.gz)?$", p.name))


def attack(folder: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """How many of each kind were ok and refused, and every silent error."""
    rng, told, errors = np.random.default_rng(seed), Counter(), []
    key = folder / "key"
    key.write_text("k")
    for start in range(0, count, BATCH):
        raw, out = folder / "raw", folder / "out"
        shutil.rmtree(raw, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        made = {}
        for number in range(start, min(start + BATCH, count)):
            made[f"m{number}"] = write_mutant(rng, raw / f"m{number}")
        report = cohort.prepare(raw, out, SETTINGS, cohort.Request(key_file=str(key), workers=1))
        outcomes = {o.dataset: o for o in report.outcomes if o.status == "ok"}
        for name, (kind_of_file, kind, scan) in made.items():
            outcome = outcomes.get(name)
            told[kind, "ok" if outcome else "refused"] += 1
            told[kind_of_file, "ok" if outcome else "refused"] += 1
            path, wrong = one_path(raw / name), []
            if outcome is not None:
                case = prepared.open_case(out / name / "processed" / outcome.case, row={})
                wrong = judged(path, WRITERS[kind_of_file](scan, kind_of_file).base, kind, scan, case)
            if kind == "same" and kind_of_file != "analyze":
                wrong += why_not_same(path, scan) if outcome else ["refused"]
            if wrong:
                errors.append(f"{name} of seed {seed}, {kind} in {kind_of_file}: {'; '.join(wrong)}")
            for o in report.outcomes:
                assert o.status != "failed", o
    return told, errors


def why_not_same(path: Path, scan: Drawn) -> list[str]:
    (own,) = read_scan(path)
    why = apart(Read(own.affine, np.asarray(own.hu, np.float64)), Read(scan.affine, scan.hu.astype(np.float64)))
    return [f"not the scan it was: {why}"] if why else []


def test_no_mutated_volume_file_is_read_wrong(tmp_path):
    told, errors = attack(tmp_path, 60, seed=1)
    assert not errors
    assert sum(n for (kind, how), n in told.items() if how == "ok" and kind in KINDS) > 15


@pytest.mark.slow
def test_no_volume_file_out_of_three_thousand_is_read_wrong(tmp_path):
    told, errors = attack(tmp_path, 3000, seed=2)
    print(told)
    assert not errors, "\n".join(errors)
