"""What lies below a path: every file looked at once, put into scans to read, labels to take along, and the rest.

Headers only. Each item ends as one line of the report; the pixels of a scan are read by `volume`, those of labels by
`labels`.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from app.prepare.files import Ref, files_below, sniff
from app.prepare.findings import Finding, finding_of
from app.prepare.formats import read_header
from app.prepare.gate import NO_RULES, Rules, Stack, Verdict, verdicts_on
from app.prepare.headers import SEGMENTATION, SliceHeader, read_headers
from app.prepare.labels import LabelFile, is_label_name, looks_like_labels, scan_stem
from app.prepare.volume_file import VolumeFile
from app.shared.refusals import Refused
from app.shared.scan_formats import volume_endings


class Item(NamedTuple):
    """One scan to read (with a plan), or one input that is skipped or refused (with a finding)."""

    source: str  # relative to the surveyed path; holds names, so it stays out of OUT and of logs
    refs: tuple[Ref, ...]
    plan: Stack | VolumeFile | None = None
    finding: Finding | None = None
    patient: str = ""
    series: str = ""
    labels: tuple[LabelFile, ...] = ()


def survey(root: str | Path, rules: Rules = NO_RULES) -> list[Item]:
    """Items below a folder, or of one file, in order of their sources."""
    root = os.path.abspath(root)
    items: list[Item] = []
    slices: dict[str, list[SliceHeader]] = defaultdict(list)
    volumes: list[tuple[Ref, VolumeFile]] = []
    segmentations: list[SliceHeader] = []
    for ref, refused in files_below(root):
        try:
            if refused is not None:
                raise refused
            kind = sniff(ref)
            if kind == "empty":
                raise Refused("EMPTY", "a file of no bytes", skipped=not _is_image_name(ref))
            if kind == "other":
                raise Refused("NOT_CT", "no image format that is known here", skipped=not _is_image_name(ref))
            if kind == "dicom":
                headers = read_headers(ref)
                if headers[0].sop_class == SEGMENTATION:
                    segmentations.append(headers[0])
                else:
                    slices[ref.folder] += headers
            elif rules.series is not None:
                raise Refused("NOT_CT", "not the series that --series asks for", skipped=True)
            else:
                volumes.append((ref, read_header(ref, kind)))
        except Refused as reason:
            if _is_label(ref, root) and reason.code == "TOO_FEW_SLICES":
                reason = Refused("LABELS", "a flat label image", skipped=True)
            items.append(Item(_relative(ref, root), (ref,), finding=finding_of(reason)))
        except OSError:
            refused = Refused("CORRUPT_FILE", "the file cannot be opened")
            items.append(Item(_relative(ref, root), (ref,), finding=finding_of(refused)))
    verdicts: list[tuple[str, Verdict]] = []
    for folder, members in _join_folders(slices).items():
        verdicts += [(folder, verdict) for verdict in verdicts_on(members, rules)]
    items += [_dicom_item(verdict, folder, root) for folder, verdict in _settle_localizers(verdicts)]
    scans, labels = _part_labels(volumes, items, root)
    items += [Item(_relative(ref, root), file.refs, plan=file) for ref, file in scans]
    items = _attach(items, labels, segmentations, root)
    return sorted(items, key=lambda item: (item.source, item.series, item.refs))


def _relative(ref: Ref, root: str) -> str:
    path = os.path.join(ref.path, ref.member) if ref.member else ref.path
    return os.path.relpath(path, root) if path != root else os.path.basename(root)


def _is_image_name(ref: Ref) -> bool:
    """A name that promises an image makes a bad content a failure, not something to pass over."""
    return ref.name.lower().endswith((".dcm", ".ima", *volume_endings()))


def _is_label(ref: Ref, root: str) -> bool:
    return is_label_name(_relative(ref, root))


def _join_folders(slices: dict[str, list[SliceHeader]]) -> dict[str, list[SliceHeader]]:
    """Slices by folder; a series of one patient that goes on in other folders, at other positions, is joined."""
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for folder, members in slices.items():
        for key in {(h.series, h.patient) for h in members if h.series and h.frames == 1}:
            homes[key].append(folder)
    joined = {folder: list(members) for folder, members in slices.items()}
    for key, folders in homes.items():
        parts = {f: [h for h in slices[f] if (h.series, h.patient) == key] for f in folders}
        places = [h.position for part in parts.values() for h in part]
        if len(folders) < 2 or len(set(places)) < len(places):
            continue
        for folder in folders[1:]:
            joined[folder] = [h for h in joined[folder] if (h.series, h.patient) != key]
            joined[folders[0]] += parts[folder]
    return {folder: members for folder, members in joined.items() if members}


def _settle_localizers(verdicts: list[tuple[str, Verdict]]) -> list[tuple[str, Verdict]]:
    """A localizer beside a scan (same folder, same study) is no fault of the input."""
    homes = {mark for folder, v in verdicts if v.stack for mark in (folder, v.slices[0].study) if mark}
    return [
        (folder, v._replace(finding=v.finding._replace(kind="skipped")))
        if v.finding and v.finding.code == "LOCALIZER" and homes & {folder, v.slices[0].study}
        else (folder, v)
        for folder, v in verdicts
    ]


def _dicom_item(verdict: Verdict, folder: str, root: str) -> Item:
    members = verdict.slices
    refs = tuple(dict.fromkeys(header.ref for header in members))
    source = _relative(refs[0], root) if len(refs) == 1 else os.path.relpath(folder, root)
    if source == ".":
        source = os.path.basename(root)
    return Item(source, refs, verdict.stack, verdict.finding, members[0].patient, members[0].series)


# ---- labels


def _part_labels(
    volumes: Sequence[tuple[Ref, VolumeFile]], items: Sequence[Item], root: str
) -> tuple[list[tuple[Ref, VolumeFile]], list[LabelFile]]:
    """Volume files into scans and labels: by name, else unsigned on the grid of a scan close by and flat inside."""
    named = [(ref, file) for ref, file in volumes if _is_label(ref, root)]
    rest = [(ref, file) for ref, file in volumes if not _is_label(ref, root)]
    grids = [(item.refs[0].folder, _grid(item.plan)) for item in items if item.plan is not None]
    grids += [(ref.folder, _grid(file)) for ref, file in rest if not file.dtype[1:].startswith("u")]
    scans = []
    for ref, file in rest:
        beside = [grid for folder, grid in grids if os.path.commonpath([folder, ref.folder]) in (folder, ref.folder)]
        plain = file.dtype[1:].startswith("u") and (file.slope, file.intercept) == (1.0, 0.0)
        if plain and any(same_grid(_grid(file), grid) for grid in beside) and looks_like_labels(file):
            named.append((ref, file))
        else:
            scans.append((ref, file))
    return scans, [LabelFile(ref, file, scan_stem(ref.name)) for ref, file in named]


def _grid(plan: Stack | VolumeFile) -> tuple[tuple[int, ...], np.ndarray]:
    if isinstance(plan, Stack):
        return (plan.slices[0].columns, plan.slices[0].rows, plan.count), plan.affine
    return plan.shape, plan.affine


def _corners(grid: tuple[tuple[int, ...], np.ndarray]) -> np.ndarray:
    shape, affine = grid
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T


def same_grid(one: tuple[tuple[int, ...], np.ndarray], other: tuple[tuple[int, ...], np.ndarray]) -> bool:
    """Whether two grids have the same voxels, in whatever order of axes."""
    if sorted(one[0]) != sorted(other[0]):
        return False
    apart = np.linalg.norm(_corners(one)[:, None] - _corners(other)[None], axis=-1).min(1).max()
    return bool(apart < 0.25 * np.linalg.norm(one[1][:3, :3], axis=0).min())


def _overlap(one: tuple, other: tuple) -> bool:
    a, b = _corners(one), _corners(other)
    return bool((a.min(0) < b.max(0)).all() and (b.min(0) < a.max(0)).all())


def _attach(
    items: list[Item], labels: Sequence[LabelFile], segmentations: Sequence[SliceHeader], root: str
) -> list[Item]:
    """Labels to the scans they belong to; each label file is a line of its own, skipped or refused."""
    wanted: dict[int, list[LabelFile]] = defaultdict(list)
    lines = []
    for label in labels:
        homes, finding = _homes(label, items)
        for number in homes:
            wanted[number].append(label)
        if not homes and finding.kind == "skipped" and not looks_like_labels(label.file):
            lines.append(Item(_relative(label.ref, root), label.refs, plan=label.file))
            continue  # only its name says labels
        lines.append(Item(_relative(label.ref, root), (label.ref,), finding=finding))
    for header in segmentations:
        near = [n for n, item in enumerate(items) if item.plan is not None and item.series]
        homes = [n for n in near if items[n].series == header.referenced_series]
        for number in homes:
            wanted[number].append(LabelFile(header.ref, None, ""))
        text = "a DICOM segmentation" + ("" if homes else ", its series is not here")
        finding = Finding("LABELS", "skipped", text)
        lines.append(Item(_relative(header.ref, root), (header.ref,), finding=finding, patient=header.patient))
    return [item._replace(labels=tuple(wanted.get(n, ()))) for n, item in enumerate(items)] + lines


def _homes(label: LabelFile, items: Sequence[Item]) -> tuple[list[int], Finding]:
    """Scans a label file belongs to: by name, else by grid, else the only scan beside it."""
    folder, above = label.ref.folder, os.path.dirname(label.ref.folder)
    close, wide = [], []
    for number, item in enumerate(items):
        if item.plan is None:
            continue
        home = item.refs[0].folder
        if home in (folder, above):
            close.append(number)
        if home in (folder, above) or os.path.dirname(home) in (folder, above):
            wide.append(number)
    grid = _grid(label.file)
    by_name = [n for n in wide if scan_stem(items[n].refs[0].name) == label.stem and len(items[n].refs) == 1]
    by_grid = [n for n in wide if same_grid(_grid(items[n].plan), grid)]
    homes = [n for n in by_name if n in by_grid] or by_name or by_grid or (close if len(close) == 1 else [])
    if not homes:
        return [], Finding("LABELS", "skipped", "no scan that these labels belong to")
    outside = [n for n in homes if not _overlap(_grid(items[n].plan), grid)]
    if outside:
        return [], Finding("LABEL_GRID_MISMATCH", "refused", "the labels lie beside the scan, nowhere on it")
    return homes, Finding("LABELS", "skipped", "taken along with a scan")
