"""The prepared layout on disk, OUT/{dataset}/processed/{case}: its one reader. writer.py writes it.

Knows files, not what is in them: no gate, no resampling, no features. Older trees are read too: window files of 0/1 or
of floats, any size, no sidecar; their volumes are never taken for HU.
"""

import csv
import hashlib
import json
import logging
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from app.shared.hashes import hash_files
from app.shared.refusals import Refused
from app.shared.tables import read_table
from transforms.windows import AIR, WINDOWS, hu_from_windows, window, window_bounds

log = logging.getLogger(__name__)
SPLITS = ("train", "val")
FIRST_RESAMPLER = "triangle 1"  # of cases that do not say what brought them onto the grid
_AGAIN = "prepare the case again with --overwrite"  # without, `prepare` takes a case for made once it has a case.json
_WINDOW_FILE = re.compile(r"(?P<name>.+)_w(?P<width>-?\d+)_l(?P<level>-?\d+)\.np[yz]")


@dataclass(frozen=True)
class PreparedCase:
    """One case of a prepared dataset; arrays are read when asked for."""

    path: Path
    dataset: str
    case_id: str
    patient: str
    split: str
    sidecar: Mapping[str, Any] = field(default_factory=dict, repr=False)
    status: str = "ok"  # stale: its source, as it is now, was refused when it was last prepared

    @property
    def is_hu(self) -> bool:
        """Whether the volume holds HU: only a sidecar can say so. Windows do not replace a lost volume."""
        return "affine" in self.sidecar

    @property
    def affine(self) -> np.ndarray | None:
        """Index of the volume to RAS mm; None in older trees."""
        return np.array(self.sidecar["affine"], np.float64) if "affine" in self.sidecar else None

    @property
    def spacing(self) -> tuple[float, ...] | None:
        return tuple(self.sidecar["spacing"]) if "spacing" in self.sidecar else None

    @property
    def shape(self) -> tuple[int, ...]:
        if "shape" in self.sidecar:
            return tuple(self.sidecar["shape"])
        file = self._volume_file() or next(iter(self._window_files().values()), None)
        if file is None:
            raise Refused("DAMAGED_CASE", f"case {self.case_id} holds neither a volume nor windows", _AGAIN)
        return tuple(_load(file).shape)

    @property
    def codes(self) -> list[str]:
        return list(self.sidecar.get("codes", []))

    @cached_property
    def source_hash(self) -> str:
        """Identity of the scan it was made from: the sidecar's hash, else that of the arrays that lie here.

        Names, sizes and times would not do: files out of an archive have them in common.
        """
        if self.sidecar.get("source_hash"):
            return self.sidecar["source_hash"]
        arrays = [file for pattern in ("*.np[yz]", "*/*.np[yz]", "*.zarr/**/*") for file in self.path.glob(pattern)]
        return hash_files([file for file in arrays if file.is_file()], below=self.path)

    @property
    def scan_marks(self) -> tuple[str, ...]:
        """What the same scan has in common under any name: its bytes, and in any format its voxels."""
        marks = (self.sidecar.get("source_hash"), self.sidecar.get("hu_hash"))
        return tuple(mark for mark in marks if mark)

    @property
    def content_hash(self) -> str:
        """Identity of what lies here: the same scan prepared onto another grid is another."""
        mark = [self.source_hash, self.sidecar.get("shape"), self.sidecar.get("affine")]
        return hashlib.sha256(json.dumps(mark).encode()).hexdigest()

    def hu(self) -> Int[np.ndarray, "X Y Z"]:
        """The volume in HU, int16, memory-mapped where the file allows it."""
        file = self._volume_file()
        if file is None:
            name = f"ct_normalized_{max(self.sidecar['shape']) if 'shape' in self.sidecar else '*'}.npy"
            raise Refused("DAMAGED_CASE", f"{self.path.name}/{name} is missing", _AGAIN)
        if "affine" not in self.sidecar:
            what = f"case {self.case_id} has no case.json: its volume cannot be taken for HU"
            raise Refused("NOT_HU", what, "use its windows")
        volume = _load(file)
        if volume.dtype.kind not in "iu":
            raise Refused("DAMAGED_CASE", f"{self.path.name}/{file.name} holds {volume.dtype}, HU are int16", _AGAIN)
        return volume

    def window_names(self) -> tuple[str, ...]:
        """Every window the case can give: all that are known where HU are, else those that lie there as files."""
        return tuple(WINDOWS) if self.is_hu else tuple(self._window_files())

    def window(self, name: str) -> Shaped[np.ndarray, "X Y Z"]:
        """A window as it is stored (uint8 0..255; older trees: 0/1 or floats in 0..1), else made from the HU."""
        window_bounds(name)
        file = self._window_files().get(name)
        if file is not None:
            return _load(file)
        if self.is_hu:
            return window_bytes(self.hu(), name)
        has = ", ".join(self._window_files()) or "none"
        what = f"case {self.case_id} lacks window {name!r}, it has {has}"
        raise Refused("OTHER_WINDOWS", what, "choose among those or prepare it again")

    def organ_names(self) -> tuple[str, ...]:
        return tuple(sorted(file.stem for file in (self.path / "organs").glob("*.npz")))

    def organ(self, name: str) -> Bool[np.ndarray, "X Y Z"]:
        """A label on the volume's grid."""
        file = self.path / "organs" / f"{name}.npz"
        if not file.is_file():
            raise ValueError(
                f"case {self.case_id} has no organ {name!r}, it has {', '.join(self.organ_names()) or 'none'}"
            )
        with np.load(file, allow_pickle=False) as stored:
            mask = np.zeros(tuple(stored["shape"]), bool)
            mask[tuple(stored["coords"].T.astype(np.int64))] = True
        return mask

    def _volume_file(self) -> Path | None:
        files: list[Path] = []
        for pattern in ("ct_normalized_*.np[yz]", "ct_normalized_*.zarr", "ct_original_*.np[yz]"):
            files += sorted(self.path.glob(pattern))
        return files[-1] if files else None

    def _window_files(self) -> dict[str, Path]:
        found = {}
        for file in sorted((self.path / "windows").glob("*.np[yz]")):
            match = _WINDOW_FILE.fullmatch(file.name)
            name = match["name"] if match else file.stem
            if name in WINDOWS and (match is None or (int(match["width"]), int(match["level"])) == WINDOWS[name]):
                found[name] = file
        return {name: found[name] for name in WINDOWS if name in found}


def window_bytes(hu: Num[np.ndarray, "X Y Z"], name: str) -> np.ndarray:
    """A window as uint8, 0..255 across its width."""
    window_bounds(name)
    if hu.dtype == np.int16:  # by table: every int16 has one byte
        every = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
        table = np.rint(window(every, *WINDOWS[name]) * 255).astype(np.uint8)
        return table[hu.T.view(np.uint16)].T
    return np.rint(window(hu, *WINDOWS[name]) * 255).astype(np.uint8)


def windows_as_hu(case: PreparedCase, names: Sequence[str]) -> Float[np.ndarray, "X Y Z"]:
    """HU from graded window files of a case without HU; where every window is empty it is air."""
    parts = np.stack([_unit(case.window(name)) for name in names], -1)
    hu = hu_from_windows(parts * 2 - 1, names)
    return np.where((parts <= 0).all(-1), np.minimum(hu, AIR), hu).astype(np.float32)


def windows_are_masks(case: PreparedCase, names: Sequence[str]) -> bool:
    """Whether the window files hold nothing but 0 and 1: surfaces, not grey values."""
    return not case.is_hu and all(_is_mask(case.window(name)) for name in names)


def _is_mask(array: np.ndarray) -> bool:
    if array.dtype == bool:
        return True
    top = array.max(initial=0)
    return bool(top in (1, 255) and np.isin(array, (0, top)).all())


def _unit(array: np.ndarray) -> np.ndarray:
    in_bytes = array.dtype == np.uint8 and array.max(initial=0) > 1
    return array.astype(np.float32) / (255 if in_bytes else 1)


def _load(file: Path) -> np.ndarray:
    try:
        if file.suffix == ".zarr":
            import zarr

            array = zarr.open(str(file), mode="r")[:]
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as stored:
                array = stored[stored.files[0]]
        else:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, IndexError, RuntimeError) as error:
        reason = "it is no array of numbers" if "pickle" in str(error) or "Python objects" in str(error) else error
        raise Refused("DAMAGED_CASE", f"{file.parent.name}/{file.name} cannot be read ({reason})", _AGAIN) from error
    if array.ndim != 3:
        what = f"{file.parent.name}/{file.name} has shape {array.shape}, three axes are needed"
        raise Refused("DAMAGED_CASE", what, _AGAIN)
    return array


# ---- finding cases


def common_grid(cases: Sequence[PreparedCase]) -> tuple[int, float] | None:
    """Side and mm of the grid that all cases were prepared on; None where they differ or do not say."""
    grids = {_cube_of(case) for case in cases}
    return grids.pop() if len(grids) == 1 else None


def _cube_of(case: PreparedCase) -> tuple[int, float] | None:
    """Side and mm of a case's grid. The affine has the spacing that resampling took; "spacing" is rounded."""
    if case.affine is None or len(set(sides := case.sidecar.get("shape", ()))) != 1:
        return None
    steps = case.affine[:3, :3]
    mm = float(steps[0, 0])
    return (int(sides[0]), mm) if mm > 0 and np.array_equal(steps, np.eye(3) * mm) else None


def find_datasets(dataset_dir: str | Path) -> list[Path]:
    """The datasets under a folder that is one dataset, or holds several."""
    root = Path(dataset_dir)
    if not root.is_dir():
        what = f"dataset_dir {str(root)!r} is no folder"
        raise Refused("NO_DATA", what, "give the OUT of `python -m app prepare RAW OUT`")
    if (root / "processed").is_dir():
        return [root]
    for depth in ("*", "*/*", "*/*/*"):  # older trees nest deeper; a case's own folders are never searched
        found = [p.parent for p in root.glob(f"{depth}/processed") if p.is_dir()]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        if found:
            return sorted(found)
    return []


def find_cases(dataset_dir: str | Path, *, split: str | None = None) -> list[PreparedCase]:
    """Prepared cases below a folder, by name; `split` keeps one side. Raises at a damaged one."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be train or val, got {split!r}")
    cases = []
    for case in list_cases(dataset_dir):
        if isinstance(case, DamagedCase):
            raise case.error
        cases.append(case)
    _check_one_resampler(cases)
    return [case for case in cases if split is None or case.split == split]


def _check_one_resampler(cases: Sequence[PreparedCase]) -> None:
    """A dataset half made again by another version would teach the difference between the two."""
    by = {case.sidecar.get("resampler", FIRST_RESAMPLER): case for case in cases if case.is_hu}
    if len(by) > 1:
        (one, first), (other, second) = list(by.items())[:2]
        what = f"{first.case_id} was resampled by {one}, {second.case_id} by {other}"
        raise Refused("OTHER_RESAMPLER", what, "prepare the dataset again with --overwrite")


class DamagedCase(NamedTuple):
    """A case whose sidecar cannot be used, and why."""

    dataset: str
    case_id: str
    error: Refused


def list_cases(dataset_dir: str | Path) -> list[PreparedCase | DamagedCase]:
    """Every case below a folder, by name, the damaged too, so that the rest is done. Raises where there is none."""
    cases = [case for dataset in find_datasets(dataset_dir) for case in _cases_of(dataset)]
    if not cases:
        what = f"dataset_dir {str(dataset_dir)!r} holds no prepared case"
        raise Refused("NO_DATA", what, "run `python -m app prepare RAW OUT`")
    return cases


def open_case(path: str | Path, *, row: Mapping[str, str] | None = None) -> PreparedCase:
    """The case in one folder processed/{case}; `row` is its row of metadata.csv, else it is looked up."""
    path = Path(path)
    if not path.is_dir():
        raise Refused("NO_DATA", f"{str(path)!r} is no prepared case", "give a folder OUT/dataset/processed/case")
    if row is None:
        row = read_metadata(path.parent.parent / "metadata.csv").get(path.name, {})
    return _case(path, path.parent.parent.name, row)


def _cases_of(dataset: Path) -> Iterator[PreparedCase | DamagedCase]:
    rows = read_metadata(dataset / "metadata.csv")
    folders = sorted(p for p in (dataset / "processed").iterdir() if p.is_dir() and not p.name.startswith("."))
    if rows and (others := [folder.name for folder in folders if folder.name not in rows]):
        which = f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
        says = "%s/metadata.csv does not name %d of %d cases (%s): they are taken too, split by their names"
        log.warning(f"{says}; to leave one out, move its folder away", dataset.name, len(others), len(folders), which)
    for folder in folders:
        try:
            yield _case(folder, dataset.name, rows.get(folder.name, {}))
        except Refused as refused:
            yield DamagedCase(dataset.name, folder.name, refused)


def _case(path: Path, dataset: str, row: Mapping[str, str]) -> PreparedCase:
    file = path / "case.json"
    try:
        sidecar = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused("DAMAGED_CASE", f"{path.name}/case.json cannot be read ({reason})", _AGAIN) from error
    if not isinstance(sidecar, dict):
        raise Refused("DAMAGED_CASE", f"{path.name}/case.json must hold an object, it holds {_short(sidecar)}", _AGAIN)
    for name, (says, holds) in _FIELDS.items():
        if name in sidecar and not holds(sidecar[name]):
            what = f"{path.name}/case.json must have {says} as its {name}, it has {_short(sidecar[name])}"
            raise Refused("DAMAGED_CASE", what, _AGAIN)
    patient = row.get("patient") or path.name
    split, status = row.get("split") or split_of(patient), row.get("status") or "ok"
    return PreparedCase(path, dataset, path.name, patient, split, sidecar, status)


def _is_affine(stored: Any) -> bool:
    try:
        matrix = np.array(stored, np.float64)
    except (TypeError, ValueError):
        return False
    return matrix.shape == (4, 4) and bool(np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) > 1e-12)


def _are(*kinds: type, count: int | None = None) -> Callable[[Any], bool]:
    """Whether what is stored is a list of these kinds, numbers above 0."""

    def holds(stored: Any) -> bool:
        right = isinstance(stored, list) and count in (None, len(stored))
        return right and all(type(part) in kinds and (kinds == (str,) or part > 0) for part in stored)

    return holds


_FIELDS = {  # what is read of a sidecar; older trees and other hands may leave any of them out
    **dict.fromkeys(("affine", "source_affine"), ("an invertible matrix", _is_affine)),
    **dict.fromkeys(("shape", "source_shape"), ("three whole numbers from 1 up", _are(int, count=3))),
    "spacing": ("three numbers above 0", _are(int, float, count=3)),
    "codes": ("a list of texts", _are(str)),
    **dict.fromkeys(("source_hash", "resampler", "hu_hash"), ("a text", lambda stored: isinstance(stored, str))),
}


def _short(stored: Any) -> str:
    text = json.dumps(stored)
    return text if len(text) < 80 else f"{text[:76]} …"


def split_of(patient: str) -> str:
    """train or val by the patient's name alone: about one in ten is val."""
    return "val" if int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) % 10 == 0 else "train"


def split_patients(patients: Iterable[str], given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """train, val or what is given of each patient. Of two or more at least one is held out, and one is trained on."""
    names = list(dict.fromkeys(patients))
    sides = {name: given.get(name) or split_of(name) for name in names}
    open_ = [name for name in names if not given.get(name)]
    held_out = {side != "train" for side in sides.values()}
    if len(names) > 1 and open_ and len(held_out) == 1:
        other = "train" if True in held_out else "val"
        sides[min(open_, key=lambda name: hashlib.sha256(name.encode()).hexdigest())] = other
    return sides


def read_metadata(file: Path) -> dict[str, dict[str, str]]:
    """Rows of a metadata.csv by case; none where the file is missing. Older trees name the case in the first column."""
    if not file.is_file():
        return {}
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            rows = list(read_table(stream, name=f"{file.parent.name}/{file.name}"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused("DAMAGED_CASE", f"{file.parent.name}/{file.name} is no UTF-8 csv ({error})", _AGAIN) from error
    column = "case_id" if rows and "case_id" in rows[0] else next(iter(rows[0]), "") if rows else ""
    return {row[column]: row for row in rows if row.get(column)}


def versions() -> dict[str, str]:
    """Software that shaped the numbers."""
    names = ("numpy", "scipy", "nibabel", "pydicom")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
