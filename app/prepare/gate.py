"""The gate: which DICOM slices make which stacks, by their headers alone.

Pure functions from header records to verdicts; no pixel is read here. What only pixels can tell (equal duplicates,
values that are no HU) is left to `pixels` and `values`. Geometry is LPS, as in the headers, until a stack's affine,
which is RAS. Rules and limits are the constants below; their codes are in `codes`.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from app.prepare.findings import Finding, finding, finding_of
from app.prepare.headers import SliceHeader
from app.prepare.slice_rules import NO_RULES, SPACING_LIMITS, Rules, kinds_of, reason_against, reason_of_pixels
from app.shared.refusals import Refused

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MIN_SLICES = 5
MAX_VOXELS = 1 << 30
SAME_GEOMETRY = 1e-3  # by which direction cosines, and mm of pixel spacing, of one stack may differ
SAME_PLACE = 0.01  # share of a step within which two slices lie at one position
EVEN = 0.02  # share of a step (or of a mm) by which an even stack's slices may lie off
GAP = 0.05  # share by which a step may differ from a multiple of the usual one to be a gap
MAX_GAP = 64  # usual steps that may be missing in one place
DRIFT = 0.1  # mm by which slices may lie off the line of a stack, in the plane
REWRITTEN = {"DERIVED", "SECONDARY"}  # say who wrote the file, not what it shows
MIXED = {"patient": "patients", "study": "studies", "frame_of_reference": "frames of reference"}
LOSSY = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81, 91, 203)}  # transfer syntaxes


class Stack(NamedTuple):
    """Slices in order along their normal, and where index (column, row, slice) lies in RAS mm."""

    slices: tuple[SliceHeader, ...]
    positions: tuple[float, ...]  # along the stack, in steps of the affine, the first at 0
    count: int  # slices of the volume: more than there are files where positions are not 0, 1, 2, ...
    affine: Float[np.ndarray, "4 4"]
    findings: tuple[Finding, ...]
    duplicates: tuple[tuple[int, SliceHeader], ...] = ()  # (index of the slice kept, its double): pixels must be equal


class Verdict(NamedTuple):
    """What becomes of some slices: a stack to read, or a finding that says why not."""

    slices: tuple[SliceHeader, ...]
    stack: Stack | None = None
    finding: Finding | None = None


def verdicts_on(slices: Sequence[SliceHeader], rules: Rules = NO_RULES) -> list[Verdict]:
    """Verdicts over the slices of one folder; every slice is in exactly one of them."""
    verdicts: list[Verdict] = []
    by_series: dict[tuple, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        by_series[_series_key(header)].append(header)
    for group in by_series.values():
        verdicts += _verdicts_on_series(group, rules)
    return verdicts


def _series_key(header: SliceHeader) -> tuple:
    """The series UID; without one, identity and geometry; multi-frame files stand alone."""
    alone = header.ref if header.frames > 1 else None
    if header.series:
        return header.series, alone
    identity = header.patient, header.study, header.frame_of_reference
    return "", alone, *identity, header.modality, *_geometry(header)


def _verdicts_on_series(group: list[SliceHeader], rules: Rules) -> list[Verdict]:
    if rules.series is not None and group[0].series != rules.series:
        return [_refuse(group, Refused("NOT_CT", "not the series that --series asks for", skipped=True))]
    good, verdicts = [], []
    reasons: dict[tuple, list[SliceHeader]] = defaultdict(list)
    for header in group:
        reason = reason_against(header, rules)
        if reason is None:
            good.append(header)
        else:
            reasons[(reason.code, reason.what, reason.skipped)].append(header)
    for (code, message, skipped), members in reasons.items():
        verdicts.append(_refuse(members, Refused(code, message, skipped=skipped)))
    if not good:
        return verdicts
    if (apart := _why_not_one_series(good)) is not None:
        return [*verdicts, _refuse(good, apart)]
    split = _split(good)
    if isinstance(split, Refused):
        return [*verdicts, _refuse(good, split)]
    for members in split:
        try:
            stack = build_stack(members, rules)
        except Refused as refused:
            if len(split) > 1 and refused.code == "TOO_FEW_SLICES":
                refused = Refused("MIXED_GEOMETRY", f"{len(members)} of {len(good)} slices do not fit the others")
            verdicts.append(_refuse(members, refused))
            continue
        extra = [finding("SERIES_SPLIT", f"{len(split)} stacks")] if len(split) > 1 else []
        extra += [] if good[0].series else [finding("NO_SERIES_UID")]
        verdicts.append(Verdict(tuple(members), stack._replace(findings=(*stack.findings, *extra))))
    return verdicts


def _why_not_one_series(good: list[SliceHeader]) -> Refused | None:
    """What slices of one series may not differ in, whatever their geometry."""
    for name in ("patient", "study", "frame_of_reference"):
        count = len({getattr(header, name) for header in good})
        if count > 1:
            return Refused("MIXED_IDENTITY", f"one series UID, but {count} {MIXED[name]}")
    if not all(header.rescale_readable for header in good):
        return Refused("CORRUPT_FILE", "a rescale slope or intercept that is no number")
    pairs = {(header.slope is None, header.intercept is None) for header in good}
    if pairs not in ({(True, True)}, {(False, False)}):
        return Refused("CORRUPT_FILE", "rescale slope and intercept are missing in some slices, or one of them in all")
    if len({(h.bits_allocated, h.bits_stored, h.high_bit, h.signed) for h in good}) > 1:
        return Refused("CORRUPT_FILE", "slices of one series store their pixels in different bits, or signs")
    return None


def _refuse(members: Sequence[SliceHeader], refused: Refused) -> Verdict:
    return Verdict(tuple(members), finding=finding_of(refused))


def _geometry(header: SliceHeader) -> tuple:
    rounded = tuple(round(part, 3) + 0.0 for part in header.orientation or ())
    spacing = tuple(round(part, 4) for part in header.spacing or ())
    return rounded, header.rows, header.columns, spacing


def _split(good: list[SliceHeader]) -> list[list[SliceHeader]] | Refused:
    """One series by geometry, then by kernel where positions repeat; refuses stacks that interlock."""
    if len({header.stack for header in good}) > 1:
        return Refused("MIXED_GEOMETRY", "several stacks in one multi-frame file")
    groups: list[list[SliceHeader]] = []
    for header in good:
        home = next((group for group in groups if _same_geometry(group[0], header)), None)
        if home is None:
            groups.append([header])
        else:
            home.append(header)
    extents = [(float(along.min()), float(along.max())) for along in map(_along, groups)]
    for number, (low, high) in enumerate(extents):
        for other, (other_low, other_high) in enumerate(extents[:number]):
            same_way = _same(groups[number][0].orientation, groups[other][0].orientation)
            if same_way and low <= other_high and other_low <= high:
                return Refused("MIXED_GEOMETRY", "slices of different matrix or pixel spacing interlock")
    return [part for members in groups for part in _by_kernel(members)]


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME_GEOMETRY


def _same_geometry(one: SliceHeader, other: SliceHeader) -> bool:
    """Rounded headers of one scan differ a little; two geometries differ more."""
    matrix = (one.rows, one.columns) == (other.rows, other.columns)
    return matrix and _same(one.orientation, other.orientation) and _same(one.spacing, other.spacing)


def _by_kernel(members: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Two reconstructions under one UID part where every kernel covers every position."""
    kernels: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in members:
        kernels[header.kernel].append(header)
    places = {tuple(sorted(round(t, 2) for t in _along(part))) for part in kernels.values()}
    return list(kernels.values()) if len(kernels) > 1 and len(places) == 1 else [members]


def _along(members: Sequence[SliceHeader]) -> np.ndarray:
    return np.array([header.position for header in members]) @ _normal(members[0])


def _normal(header: SliceHeader) -> np.ndarray:
    row, column = np.reshape(header.orientation, (2, 3))
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


# ---- one stack


def build_stack(members: Sequence[SliceHeader], rules: Rules) -> Stack:
    """Slices of one geometry to a stack; raises Refused with the rule they break."""
    times = _time_points(members)
    if times > 1:
        raise Refused("FOUR_D", f"every position occurs {times} times, in different acquisitions")
    members, duplicates = _drop_duplicates(members)
    if len(members) < MIN_SLICES:
        raise Refused("TOO_FEW_SLICES", f"{len(members)} slices, at least {MIN_SLICES} are needed")
    findings = [finding("DUPLICATES_DROPPED", f"{len(duplicates)} slices")] if duplicates else []
    along = _along(members)
    step, places, spacing_findings = _spacing(along, rules)
    shear, tilt_findings = _shear(members, along)
    first = members[0]
    findings += [*spacing_findings, *tilt_findings, *_warnings(members, step, rules)]
    row, column = np.reshape(first.orientation, (2, 3))
    lps = np.eye(4)
    lps[:3, 0] = row * first.spacing[1]
    lps[:3, 1] = column * first.spacing[0]
    lps[:3, 2] = (_normal(first) + shear) * step
    lps[:3, 3] = first.position
    affine = LPS_TO_RAS @ lps
    count = round(places[-1]) + 1 if len(spacing_findings) else len(members)
    if count * first.rows * first.columns > MAX_VOXELS:
        raise Refused("CORRUPT_FILE", f"{count} slices of {first.rows} x {first.columns} pixels")
    return Stack(tuple(members), tuple(float(p) for p in places), count, affine + 0.0, tuple(findings), duplicates)


def _time_points(members: Sequence[SliceHeader]) -> int:
    """How often every position occurs, each time in another acquisition; 1 where that is not so."""
    places: dict[float, list] = defaultdict(list)
    for header, t in zip(members, _along(members), strict=True):
        places[round(float(t), 2)].append((header.acquisition, header.temporal))
    counts = {len(times) for times in places.values()}
    apart = all(len(set(times)) == len(times) for times in places.values())
    return counts.pop() if len(counts) == 1 and apart else 1


def _drop_duplicates(
    members: Sequence[SliceHeader],
) -> tuple[list[SliceHeader], tuple[tuple[int, SliceHeader], ...]]:
    """Slices in order of position, the doubles apart, each with the index of the slice that is kept."""
    along = _along(members)
    order = sorted(range(len(members)), key=lambda i: (along[i], members[i].ref, members[i].frame))
    steps = np.diff(along[order])
    usual = float(np.median(steps[steps > 1e-3])) if (steps > 1e-3).any() else 1.0
    kept, doubles = [members[order[0]]], []
    for before, now in pairwise(order):
        if along[now] - along[before] <= max(1e-3, SAME_PLACE * usual):
            doubles.append((len(kept) - 1, members[now]))
        else:
            kept.append(members[now])
    return kept, tuple(doubles)


def _spacing(along: np.ndarray, rules: Rules) -> tuple[float, np.ndarray, list[Finding]]:
    """Step of the volume, each slice's place in those steps, and what was found about the steps."""
    steps = np.diff(along)
    usual = usual_step(steps)
    low, high = SPACING_LIMITS
    if not low <= usual <= high:
        raise Refused("NO_SPACING", f"an impossible step of {usual:g} mm between slices")
    ratios = steps / usual
    multiples = np.rint(ratios)
    gaps = (multiples >= 2) & (np.abs(ratios - multiples) <= GAP * multiples)
    missing = int((multiples[gaps] - 1).sum())
    if gaps.any() and not rules.allow_gaps:
        raise Refused("MISSING_SLICES", f"{missing} slices missing in {int(gaps.sum())} places")
    if ratios.max() > MAX_GAP:
        raise Refused("MISSING_SLICES", f"a gap of {ratios.max():.0f} steps")
    findings = [finding("GAPS_INTERPOLATED", f"{missing} slices in {int(gaps.sum())} places")] if gaps.any() else []
    tolerance = EVEN * max(usual, 1.0)
    places = np.concatenate([[0.0], np.cumsum(np.where(gaps, multiples, 1.0))])
    fit = np.polyfit(places, along - along[0], 1)
    if np.abs(np.polyval(fit, places) - (along - along[0])).max() <= tolerance:
        return float((along[-1] - along[0]) / places[-1]), places, findings
    step = max(float(steps.min()), float(along[-1] - along[0]) / (4 * len(along)))
    step = float(along[-1] - along[0]) / round((along[-1] - along[0]) / step)
    findings.append(finding("UNEVEN_SPACING_RESAMPLED", f"steps from {steps.min():.3f} to {steps.max():.3f} mm"))
    return step, (along - along[0]) / step, findings


def usual_step(steps: np.ndarray) -> float:
    """The step that most others agree with (within 5 %), the smallest of equals; their mean."""
    near = np.abs(steps[None, :] - steps[:, None]) <= GAP * steps[:, None]
    votes = near.sum(1)
    best = min(np.flatnonzero(votes == votes.max()), key=lambda i: steps[i])
    return float(steps[near[best]].mean())


def _shear(members: Sequence[SliceHeader], along: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    """Sideways drift a mm of height (LPS), as a tilted gantry leaves it; raises where slices lie off any line."""
    positions = np.array([header.position for header in members])
    height = along - along[0]
    sideways = positions - positions[0] - height[:, None] * _normal(members[0])
    shear = (height @ sideways) / (height @ height)
    if np.abs(sideways - height[:, None] * shear).max() > DRIFT:
        raise Refused("MIXED_GEOMETRY", "slices do not lie on one line")
    if np.linalg.norm(shear) * height[-1] <= DRIFT:
        return np.zeros(3), []
    angle = np.degrees(np.arctan(np.linalg.norm(shear)))
    if angle > 60:
        raise Refused("MIXED_GEOMETRY", f"slices run {angle:.0f} degrees off their normal")
    return shear, [finding("TILT_CORRECTED", f"{angle:.2f} degrees")]


def _warnings(members: Sequence[SliceHeader], step: float, rules: Rules) -> list[Finding]:
    first, findings = members[0], []
    if first.thickness and first.thickness > step * 1.01:
        findings.append(finding("OVERLAPPING_SLICES", f"{first.thickness:g} mm thick, {step:g} mm apart"))
    if any(header.lossy or header.syntax in LOSSY for header in members):
        findings.append(finding("LOSSY_COMPRESSION"))
    rewritten = set().union(*map(kinds_of, members)) & REWRITTEN
    if rewritten:
        findings.append(finding("DERIVED_SERIES", f"the image type says {' and '.join(sorted(rewritten))}"))
    odd = [h for h in members if reason_of_pixels(h, rules._replace(assume_hu=False))]
    if rules.assume_hu and odd:
        findings.append(finding("ASSUMED_HU", "the header says otherwise"))
    return findings
