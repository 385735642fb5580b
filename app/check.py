"""Reads a prepared dataset, or a manifest of texts, and says what is wrong with it before any GPU time is spent.

Nothing is changed. A problem is one line: code, how often, what to do; cases are named by their ids.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.dataset import prepared
from app.shared.codes import CODES
from app.shared.refusals import Refused, check_path
from app.shared.tables import read_table
from app.text.manifests import check_rows, read_rows
from networks import presets
from transforms import Resampled, Sparsifyd
from transforms.sparse import KEEPS
from transforms.windows import DEFAULT_WINDOWS, WINDOWS, window, window_bounds


class Problem(NamedTuple):
    code: str
    message: str
    cases: tuple[str, ...] = ()


class Checked(NamedTuple):
    """What was read, case by case, and what is wrong."""

    kind: str  # prepared or manifest
    rows: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    problems: tuple[Problem, ...]

    @property
    def exit_status(self) -> int:
        return 3 if any(CODES[problem.code].status == 3 for problem in self.problems) else 0

    def as_json(self) -> dict[str, Any]:
        problems = [problem._asdict() for problem in self.problems]
        return {"kind": self.kind, **self.summary, "cases": list(self.rows), "problems": problems}


def check(
    data: str | Path,
    *,
    keep: str = "body",
    windows: Sequence[str] = DEFAULT_WINDOWS,
    preset: str = "base",
    spacing: float | None = None,
    min_points: int = 100,
    image_root: str | None = None,
) -> Checked:
    """A prepared dataset (or several under one folder), a text manifest, or a folder of scans with .txt beside them.

    Points are counted as training with that preset will see them; `spacing` in mm stands for the preset's.
    """
    check_path(data, name="DATA")
    path = Path(data)
    if not path.exists():
        what = f"{path.name!r} does not exist"
        raise Refused("NO_SOURCE", what, "give the OUT of `python -m app prepare RAW OUT` or a manifest")
    if path.is_file() or (not prepared.find_datasets(path) and any(path.rglob("*.txt"))):
        summary = check_rows(read_rows(path, image_root=image_root))
        problems = tuple(Problem(code, line) for code, line in summary.pop("problems").items())
        return Checked("manifest", (), summary, problems)
    onto = (presets.preset(preset).resolution, spacing or presets.preset(preset).spacing)
    return check_prepared(path, keep=keep, windows=windows, onto=onto, min_points=min_points)


# ---- prepared datasets


def check_prepared(
    path: Path, *, keep: str, windows: Sequence[str], onto: tuple[int, float], min_points: int
) -> Checked:
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
    for name in windows:
        window_bounds(name)
    rows, problems = [], defaultdict(list)
    cases = []
    for case in prepared.list_cases(path):
        if isinstance(case, prepared.DamagedCase):
            rows.append({"case": case.case_id, "dataset": case.dataset, "error": str(case.error)})
            problems["UNREADABLE"].append(case.case_id)
            continue
        cases.append(case)
        row: dict[str, Any] = {"case": case.case_id, "dataset": case.dataset, "split": case.split, "codes": case.codes}
        try:
            row |= _look(case, keep=keep, windows=windows, onto=onto)
        except (ValueError, OSError, KeyError) as error:
            row["error"] = str(error).splitlines()[0]
            problems["UNREADABLE"].append(case.case_id)
        rows.append(row)
        for code, wrong in _wrong(row, windows, min_points).items():
            if wrong:
                problems[code].append(case.case_id)
    messages = {
        "UNREADABLE": "files cannot be read: prepare these cases again",
        "WINDOW_MISSING": f"not all of {', '.join(windows)} are there: prepare again with --windows",
        "CONSTANT": "a window says the same everywhere: the scan shows nothing in it",
        "OUT_OF_RANGE": "values outside -32768..32767 or not HU: prepare again",
        "UNDER_MIN_POINTS": f"fewer than {min_points} points: training skips these cases",
    }
    listed = [Problem(code, f"{len(ids)} cases: {messages[code]}", tuple(ids)) for code, ids in problems.items()]
    listed += _leaks((case.patient, case.split, case.case_id) for case in cases)
    listed += _same_scans(cases, {row["case"]: row.pop("voxels", "") for row in rows})
    listed += _stale(cases)
    listed += _failures(path)
    listed += _one_side([case.split for case in cases])
    points = sorted(row["points"] for row in rows if "points" in row)
    summary = {
        "num_cases": len(rows),
        "datasets": sorted({case.dataset for case in cases}),
        "splits": dict(sorted(Counter(case.split for case in cases).items())),
        "shapes": dict(Counter(" x ".join(map(str, row["shape"])) for row in rows if "shape" in row)),
        "codes": dict(sorted(Counter(code for case in cases for code in case.codes).items())),
        "keep": keep,
        "points_spacing": onto[1],
        "points": [points[0], points[len(points) // 2], points[-1]] if points else None,
    }
    return Checked("prepared", tuple(rows), summary, tuple(listed))


def _look(case: prepared.PreparedCase, *, keep: str, windows: Sequence[str], onto: tuple[int, float]) -> dict[str, Any]:
    """Shape, range, share of foreground and points of one case."""
    has = case.window_names()
    row: dict[str, Any] = {"shape": list(case.shape), "windows": list(has), "hu": case.is_hu}
    if not case.is_hu:
        masks = [np.asarray(case.window(name)) > 0 for name in windows if name in has]
        union = np.logical_or.reduce(masks) if masks else np.zeros(case.shape, bool)
        row |= {"points": int(union.sum()), "foreground": float(union.mean())}
        return row | {"constant": [n for n in windows if n in has and _flat(case.window(n))]}
    hu = np.asarray(case.hu())
    if tuple(hu.shape) != tuple(case.shape):
        raise ValueError(f"the volume is {hu.shape}, case.json says {tuple(case.shape)}")
    for name in case._window_files():
        if case.window(name).shape != hu.shape:
            raise ValueError(f"window {name} is {case.window(name).shape}, the volume {hu.shape}")
    row["hu_range"] = [int(hu.min()), int(hu.max())]
    row["constant"] = []
    row["voxels"] = hashlib.sha256(np.ascontiguousarray(hu)).hexdigest()
    grid, spacing = onto
    on_grid = Resampled("image", spacing=spacing, grid=grid)({"image": hu, "affine": case.affine})
    kept = Sparsifyd("image", keep=keep, windows=windows)(on_grid)
    values = kept["values"]
    row |= {"points": len(values), "points_spacing": spacing, "foreground": float((on_grid["image"] > -500).mean())}
    if values.ndim == 1:  # else distances, of which no window shows anything
        row["constant"] = [name for name in windows if _flat(window(values, *WINDOWS[name]))]
    return row


def _flat(values: np.ndarray) -> bool:
    return values.size == 0 or bool(values.min() == values.max())


def _wrong(row: Mapping[str, Any], windows: Sequence[str], min_points: int) -> dict[str, bool]:
    if "error" in row:
        return {}
    low, high = row.get("hu_range", (0, 1))
    return {
        "WINDOW_MISSING": not set(windows) <= set(row["windows"]),
        "CONSTANT": bool(row["constant"]),
        "OUT_OF_RANGE": (low >= 0 and high > 1) or low < -2000,
        "UNDER_MIN_POINTS": row["points"] < min_points,
    }


def _leaks(rows: Iterable[tuple[str, str, str]]) -> list[Problem]:
    sides: dict[str, set[str]] = defaultdict(set)
    members: dict[str, list[str]] = defaultdict(list)
    for patient, split, case in rows:
        if patient:
            sides[patient].add(split)
            members[patient].append(case)
    both = [patient for patient, splits in sides.items() if len(splits) > 1]
    cases = tuple(case for patient in both for case in members[patient])
    return [Problem("SPLIT_LEAKAGE", f"{len(both)} patients are in more than one split", cases)] if both else []


def _same_scans(cases: Sequence[prepared.PreparedCase], voxels: Mapping[str, str]) -> list[Problem]:
    """One scan under two names, or in two formats, of which one side learns and the other is judged by."""
    holders: dict[str, list[prepared.PreparedCase]] = defaultdict(list)
    for case in cases:
        for mark in {*case.scan_marks, voxels.get(case.case_id, "")} - {""}:
            holders[mark].append(case)
    both = [members for members in holders.values() if len({case.split for case in members}) > 1]
    ids = tuple(sorted({case.case_id for members in both for case in members}))
    what = f"{len(ids)} cases hold scans that lie on both sides of the split under another name: remove the copies, or "
    what += "name one patient for them in the text manifest"
    return [Problem("SPLIT_LEAKAGE", what, ids)] if ids else []


def _stale(cases: Sequence[prepared.PreparedCase]) -> list[Problem]:
    stale = tuple(case.case_id for case in cases if case.status == "stale")
    remedy = "mend their sources and prepare again, or remove the cases"
    return [Problem("STALE", f"{len(stale)} cases whose source is refused by now: {remedy}", stale)] if stale else []


def _failures(path: Path) -> list[Problem]:
    files = [*path.glob("failures.csv"), *path.glob("*/failures.csv")]
    rows = []
    for file in files:
        with open(file, newline="", encoding="utf-8") as stream:
            rows += read_table(stream, name=f"{file.parent.name}/{file.name}")
    codes = Counter(row.get("codes") or row.get("status", "") for row in rows)
    counted = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    if not rows:
        return []
    return [Problem("INPUTS_REFUSED", f"{len(rows)} inputs never became cases ({counted}): see failures.csv")]


def _one_side(splits: Sequence[str]) -> list[Problem]:
    sides = set(splits)
    if not splits or {"train", "val"} <= sides:
        return []
    return [Problem("NO_VALIDATION" if "val" not in sides else "NO_TRAINING", f"every case is in {', '.join(sides)}")]


def lines(checked: Checked) -> Iterable[str]:
    for row in checked.rows:
        if "error" in row:
            yield f"{row['case']}  {row['error']}"
            continue
        shape, low_high = " x ".join(map(str, row["shape"])), row.get("hu_range")
        hu_range = f"HU {low_high[0]}..{low_high[1]}" if low_high else "no HU"
        share = f"foreground {row['foreground']:.0%}  {row['points']} points"
        yield f"{row['case']}  {row['split']}  {shape}  {hu_range}  {share}"
    for name, value in checked.summary.items():
        yield f"{name}: {value}"
    for problem in checked.problems:
        yield f"{problem.code}: {problem.message}"
    yield "no problems" if not checked.problems else f"{len(checked.problems)} problems"
