"""The door for raw scans: what lies at a path, and each planned scan as a volume in HU.

Reading is pixels, the check that they are HU, padding to air, even steps; a cohort reads its scans the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from app.prepare.files import hash_of
from app.prepare.findings import Finding, codes_of, finding
from app.prepare.gate import NO_RULES, Rules, Stack
from app.prepare.labels import LabelFile
from app.prepare.pixels import at_even_steps, read_frames
from app.prepare.survey import Item, survey
from app.prepare.values import map_padding, refuse_constant, why_not_hu
from app.prepare.volume_file import read_voxels
from app.shared.refusals import Refused


class RawScan(NamedTuple):
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
        return codes_of(self.findings)


@dataclass(frozen=True)
class RawSource:
    """A raw scan where it lies, or what was refused as one; its pixels are read by `read`."""

    item: Item
    rules: Rules

    @property
    def place(self) -> str:
        """Below the path that was asked about; it holds names, so it stays out of results that are kept."""
        return self.item.source

    @cached_property
    def source_hash(self) -> str:
        """Of all that reading it reads, data files that a header names included; whatever its name is."""
        try:
            return hash_of(self.item.refs)
        except OSError as error:
            raise self._unread(error) from error

    def read(self) -> RawScan:
        """Its volume; raises Refused for what its headers, pixels or values tell."""
        if self.item.plan is None:
            code, kind, message = self.item.finding
            raise Refused(code, message, skipped=kind == "skipped")
        try:
            return read_item(self.item, self.rules)
        except OSError as error:
            raise self._unread(error) from error

    def _unread(self, error: OSError) -> Refused:
        finding = self.item.finding or Finding("CORRUPT_FILE", "refused", "the file cannot be read")
        return Refused(finding.code, f"{finding.message} ({error.strerror or error})")


def raw_sources(path: str | Path, rules: Rules = NO_RULES) -> Iterator[RawSource]:
    """All that could be a scan in a file, zip or folder; raises where nothing there is one, nor was meant to be."""
    items = survey(path, rules)
    meant = [item for item in items if item.plan is not None or item.finding.kind != "skipped"]
    if not meant:
        raise _nothing(len(items), rules)
    yield from (RawSource(item, rules) for item in meant)


def read_scan(
    path: str | Path, *, series: str | None = None, allow_gaps: bool = False, assume_hu: bool = False
) -> list[RawScan]:
    """Every good scan at a path (file, zip or folder), each a volume; raises Refused where there is none.

    What was refused beside a good scan is not raised: `raw_sources` tells it.
    """
    rules = Rules(allow_gaps, assume_hu, series)
    volumes, refusals = [], []
    for source in raw_sources(path, rules):
        try:
            volumes.append(source.read())
        except Refused as refused:
            refusals.append(refused)
    if not volumes:
        raise next((refused for refused in refusals if not refused.skipped), _nothing(len(refusals), rules))
    return volumes


def _nothing(count: int, rules: Rules) -> Refused:
    wanted = "a CT volume" if rules.series is None else "of the series that --series asks for"
    return Refused("NO_CASES", f"{count} files, none of them {wanted}")


def read_item(item: Item, rules: Rules) -> RawScan:
    """The volume of a planned item; raises Refused for what its pixels or values tell."""
    findings: list[Finding] = list(item.plan.findings)
    if isinstance(item.plan, Stack):
        frames, more = read_frames(item.plan)
        findings += more
        values = frames.transpose(2, 1, 0)
    else:
        values = read_voxels(item.plan)
    refuse_constant(values)
    findings += _vet(values, rules, findings)
    values, more = map_padding(values)
    findings += [] if any(f.code == "PADDING_MAPPED" for f in findings) else more
    if isinstance(item.plan, Stack):
        values = at_even_steps(values.transpose(2, 1, 0), item.plan).transpose(2, 1, 0)
    source_hash = hash_of(item.refs)
    return RawScan(values, item.plan.affine, tuple(findings), source_hash, item.source, item.series, item.labels)


def _vet(values: np.ndarray, rules: Rules, findings: list[Finding]) -> list[Finding]:
    reason = why_not_hu(values)
    if reason is None:
        return []
    if not rules.assume_hu:
        raise Refused("NOT_HU", reason)
    return [] if any(f.code == "ASSUMED_HU" for f in findings) else [finding("ASSUMED_HU", reason)]
