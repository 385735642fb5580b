"""A planned scan to a volume in HU: pixels, the check that they are HU, padding to air, even steps.

`read_scan` is the door for one path: the same survey, gate and reading as a cohort's.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from app.prepare.files import hash_of
from app.prepare.findings import Finding, bare, found
from app.prepare.formats import read_voxels
from app.prepare.gate import Rules, Stack
from app.prepare.labels import LabelFile
from app.prepare.pixels import at_even_steps, read_frames
from app.prepare.survey import Item, survey
from app.prepare.values import map_padding, refuse_empty, why_not_hu
from app.shared.refusals import Refused


class Volume(NamedTuple):
    """HU indexed [x, y, z] of the source, and where they lie: `affine` takes an index to RAS mm."""

    hu: Num[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    findings: tuple[Finding, ...]
    source_hash: str
    source: str = ""
    series: str = ""
    labels: tuple[LabelFile, ...] = ()

    @property
    def codes(self) -> list[str]:
        return bare(self.findings)


def read_scan(
    path: str | Path, *, series: str | None = None, allow_gaps: bool = False, assume_hu: bool = False
) -> list[Volume]:
    """Every good scan at a path (file, zip or folder), each a volume; raises Refused where there is none.

    What was refused beside a good scan is not raised: `survey` and `read_item` tell it.
    """
    rules = Rules(allow_gaps, assume_hu, series)
    volumes: list[Volume] = []
    refusals: list[Refused] = []
    for item in survey(path, rules):
        try:
            if item.plan is None:
                code, kind, message = item.finding
                raise Refused(code, message, skipped=kind == "skipped")
            volumes.append(read_item(item, rules))
        except Refused as refused:
            refusals.append(refused)
    if not volumes:
        raise _worst(refusals, "a CT volume" if series is None else "of the series that --series asks for")
    return volumes


def _worst(refusals: list[Refused], wanted: str) -> Refused:
    """The one that tells most: the first refusal, else that nothing was found."""
    nothing = Refused("NO_CASES", f"{len(refusals)} files, none of them {wanted}")
    return next((refused for refused in refusals if not refused.skipped), nothing)


def read_item(item: Item, rules: Rules) -> Volume:
    """The volume of a planned item; raises Refused for what its pixels or values tell."""
    findings: list[Finding] = list(item.plan.findings)
    if isinstance(item.plan, Stack):
        frames, more = read_frames(item.plan)
        findings += more
        values = frames.transpose(2, 1, 0)
    else:
        values = read_voxels(item.plan)
    refuse_empty(values)
    findings += _vet(values, rules, findings)
    values, more = map_padding(values)
    findings += [] if any(f.code == "PADDING_MAPPED" for f in findings) else more
    if isinstance(item.plan, Stack):
        values = at_even_steps(values.transpose(2, 1, 0), item.plan).transpose(2, 1, 0)
    source_hash = hash_of(item.refs)
    return Volume(values, item.plan.affine, tuple(findings), source_hash, item.source, item.series, item.labels)


def _vet(values: np.ndarray, rules: Rules, findings: list[Finding]) -> list[Finding]:
    reason = why_not_hu(values)
    if reason is None:
        return []
    if not rules.assume_hu:
        raise Refused("NOT_HU", reason)
    return [] if any(f.code == "ASSUMED_HU" for f in findings) else [found("ASSUMED_HU", reason)]
