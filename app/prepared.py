"""The prepared layout on disk: the one reader and the one writer of OUT/{dataset}/processed/{case}.

Knows files, not what is in them: no gate, no resampling, no features. A case appears whole or not at all (written
beside, then renamed). Older trees are read too: window files of 0/1 or of floats, any size, no sidecar; their volumes
are never taken for HU.
"""

import csv
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from transforms.array import AIR, WINDOWS, hu_from_windows, sparsify, window, window_bounds, window_file_name

METADATA_COLUMNS = (
    "case_id",
    "patient",
    "split",
    "source_hash",
    "shape",
    "spacing",
    "hu_range",
    "windows",
    "codes",
    "status",
)
FAILURE_COLUMNS = ("source", "status", "codes", "message", "remedy")
SPLITS = ("train", "val")
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

    @property
    def is_hu(self) -> bool:
        """Whether the volume is known to hold HU: only a sidecar can say so."""
        return "affine" in self.sidecar and self._volume_file() is not None

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
            raise ValueError(f"case {self.case_id} holds neither a volume nor windows")
        return tuple(_load(file).shape)

    @property
    def codes(self) -> list[str]:
        return list(self.sidecar.get("codes", []))

    @property
    def source_hash(self) -> str:
        """Identity of the case's content: the sidecar's hash, else that of the files' names, sizes and times."""
        if "source_hash" in self.sidecar:
            return self.sidecar["source_hash"]
        marks = sorted((str(f.relative_to(self.path)), *_size_and_time(f)) for f in self.path.rglob("*.np[yz]"))
        return hashlib.sha256(json.dumps(marks).encode()).hexdigest()

    def hu(self) -> Int[np.ndarray, "X Y Z"]:
        """The volume in HU, int16, memory-mapped where the file allows it."""
        file = self._volume_file()
        if file is None:
            raise ValueError(f"case {self.case_id} has no volume ct_normalized_*.npy; prepare it again")
        if "affine" not in self.sidecar:
            raise ValueError(
                f"case {self.case_id} has no case.json: its volume cannot be taken for HU; use its windows"
            )
        return _load(file)

    def hu_crop(self, start: Sequence[int], shape: Sequence[int]) -> Int[np.ndarray, "X Y Z"]:
        """A box of the volume; only the part of the file that holds it is read."""
        box = tuple(slice(low, low + length) for low, length in zip(start, shape, strict=True))
        file = self._volume_file()
        if file is not None and file.suffix == ".zarr" and "affine" in self.sidecar:
            return _open_zarr(file)[box]
        return np.array(self.hu()[box])

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
        raise ValueError(
            f"case {self.case_id} lacks window {name!r}, it has {has}; choose among those or prepare it again"
        )

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
        files = [
            f
            for pattern in ("ct_normalized_*.np[yz]", "ct_normalized_*.zarr", "ct_original_*.np[yz]")
            for f in sorted(self.path.glob(pattern))
        ]
        return files[-1] if files else None

    def _window_files(self) -> dict[str, Path]:
        found = {}
        for file in sorted((self.path / "windows").glob("*.np[yz]")):
            match = _WINDOW_FILE.fullmatch(file.name)
            name = match["name"] if match else file.stem
            if name in WINDOWS and (match is None or (int(match["width"]), int(match["level"])) == WINDOWS[name]):
                found[name] = file
        return {name: found[name] for name in WINDOWS if name in found}


def windows_as_hu(case: PreparedCase, names: Sequence[str]) -> Float[np.ndarray, "X Y Z"]:
    """HU told by graded window files of a case without HU; where every window is empty it is air."""
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
    return (
        array.astype(np.float32) / 255
        if array.dtype == np.uint8 and array.max(initial=0) > 1
        else array.astype(np.float32)
    )


def _load(file: Path) -> np.ndarray:
    try:
        if file.suffix == ".zarr":
            return _open_zarr(file)[:]
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as stored:
                return stored[stored.files[0]]
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"{file.parent.name}/{file.name} cannot be read ({error}); prepare the case again") from error


def _open_zarr(file: Path):
    import zarr

    return zarr.open(str(file), mode="r")


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# ---- finding cases


def find_datasets(dataset_dir: str | Path) -> list[Path]:
    """The datasets under a folder that is one dataset, or holds several."""
    root = Path(dataset_dir)
    if not root.is_dir():
        raise ValueError(f"dataset_dir {str(root)!r} is no folder; give the OUT of `python -m app prepare RAW OUT`")
    if (root / "processed").is_dir():
        return [root]
    for depth in ("*", "*/*", "*/*/*"):  # older trees nest deeper; a case's own folders are never searched
        found = [p.parent for p in root.glob(f"{depth}/processed") if p.is_dir()]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        if found:
            return sorted(found)
    return []


def find_cases(dataset_dir: str | Path, *, split: str | None = None) -> list[PreparedCase]:
    """Prepared cases below a folder, by name; `split` keeps one side. Raises where there is none at all."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be train or val, got {split!r}")
    cases = [case for dataset in find_datasets(dataset_dir) for case in _cases_of(dataset)]
    if not cases:
        raise ValueError(
            f"dataset_dir {str(dataset_dir)!r} holds no prepared case; run `python -m app prepare RAW OUT`"
        )
    return [case for case in cases if split is None or case.split == split]


def open_case(path: str | Path) -> PreparedCase:
    """The case in one folder processed/{case}."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is no prepared case; it must be a folder OUT/dataset/processed/case")
    row = read_rows(path.parent.parent / "metadata.csv").get(path.name, {})
    return _case(path, path.parent.parent.name, row)


def _cases_of(dataset: Path) -> list[PreparedCase]:
    rows = read_rows(dataset / "metadata.csv")
    folders = sorted(p for p in (dataset / "processed").iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_case(folder, dataset.name, rows.get(folder.name, {})) for folder in folders]


def _case(path: Path, dataset: str, row: Mapping[str, str]) -> PreparedCase:
    file = path / "case.json"
    try:
        sidecar = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name}/case.json cannot be read ({error}); prepare the case again") from error
    patient = row.get("patient") or path.name
    return PreparedCase(path, dataset, path.name, patient, row.get("split") or split_of(patient), sidecar)


def split_of(patient: str) -> str:
    """train or val by the patient's name alone: about one in ten is val."""
    return "val" if int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) % 10 == 0 else "train"


# ---- writing


def window_bytes(hu: Num[np.ndarray, "X Y Z"], name: str) -> np.ndarray:
    """A window as uint8, 0..255 across its width."""
    window_bounds(name)
    if hu.dtype == np.int16:  # by table: every int16 has one byte
        every = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
        table = np.rint(window(every, *WINDOWS[name]) * 255).astype(np.uint8)
        return table[hu.T.view(np.uint16)].T
    return np.rint(window(hu, *WINDOWS[name]) * 255).astype(np.uint8)


def write_case(
    dataset_dir: str | Path,
    case_id: str,
    hu: Int[np.ndarray, "X Y Z"],
    *,
    affine: Float[np.ndarray, "4 4"],
    windows: Sequence[str],
    sidecar: Mapping[str, Any] | None = None,
    organs: Mapping[str, np.ndarray] | None = None,
    file_format: Literal["npy", "zarr"] = "npy",
) -> PreparedCase:
    """Writes one case, whole or not at all; an existing one is replaced.

    `sidecar` adds what only the source knows: codes, source_hash, source_shape, source_spacing, source_affine, steps.
    `organs` are masks on the volume's grid, or the (N, 3) voxels that they cover. As zarr the volume is stored alone,
    in compressed chunks, and windows are made when read.
    """
    processed = Path(dataset_dir) / "processed"
    processed.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{case_id}.", dir=processed))
    try:
        _write_volume(beside, hu, windows=windows, file_format=file_format)
        _write_organs(beside, organs or {}, hu.shape)
        record = _sidecar(case_id, hu, affine, sidecar or {})
        (beside / "case.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        beside.chmod(0o755)
        target = processed / case_id
        if target.exists():
            old = beside.with_name(beside.name + ".old")
            target.rename(old)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return open_case(target)


def _write_volume(folder: Path, hu: np.ndarray, *, windows: Sequence[str], file_format: str) -> None:
    name = f"ct_normalized_{max(hu.shape)}"
    if file_format == "zarr":
        _write_zarr(folder / f"{name}.zarr", hu)
        return
    np.save(folder / f"{name}.npy", np.asarray(hu, np.int16))  # in the memory order it has
    (folder / "windows").mkdir()
    for window_name in windows:
        np.save(folder / "windows" / window_file_name(window_name), window_bytes(hu, window_name))


def _write_zarr(path: Path, hu: np.ndarray) -> None:
    import numcodecs
    import zarr

    array = zarr.open(
        str(path),
        mode="w",
        shape=hu.shape,
        chunks=tuple(min(64, n) for n in hu.shape),
        dtype="<i2",
        compressor=numcodecs.Blosc("zstd", 5, numcodecs.Blosc.SHUFFLE),
        fill_value=AIR,
        write_empty_chunks=False,
    )
    array[:] = hu


def _write_organs(folder: Path, organs: Mapping[str, np.ndarray], shape: Sequence[int]) -> None:
    if organs:
        (folder / "organs").mkdir()
    for name, mask in organs.items():
        coords = mask if mask.ndim == 2 else sparsify(mask, mask).coords
        np.savez_compressed(folder / "organs" / f"{name}.npz", coords=coords, shape=np.array(shape, np.int32))


def _sidecar(case_id: str, hu: np.ndarray, affine: np.ndarray, source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "codes": ["OK"],
        "source_hash": source.get("source_hash") or hashlib.sha256(np.ascontiguousarray(hu).tobytes()).hexdigest(),
        "source_shape": list(hu.shape),
        "source_spacing": _spacing(affine),
        "source_affine": np.asarray(affine).tolist(),
        "steps": [],
        **source,
        "case_id": case_id,
        "shape": list(hu.shape),
        "spacing": _spacing(affine),
        "affine": np.asarray(affine).tolist(),
        "hu_range": [int(hu.min()), int(hu.max())],
        "versions": versions(),
    }


def _spacing(affine: np.ndarray) -> list[float]:
    return [round(float(step), 6) for step in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)]


def versions() -> dict[str, str]:
    """Software that shaped the numbers."""
    names = ("numpy", "scipy", "nibabel", "pydicom")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def metadata_row(case: PreparedCase, *, windows: Sequence[str], status: str = "ok") -> dict[str, str]:
    """The row of metadata.csv of a written case; lists are joined by blanks."""
    side = case.sidecar
    return {
        "case_id": case.case_id,
        "patient": case.patient,
        "split": case.split,
        "source_hash": case.source_hash,
        "shape": " ".join(map(str, case.shape)),
        "spacing": " ".join(f"{step:g}" for step in side["spacing"]),
        "hu_range": " ".join(map(str, side["hu_range"])),
        "windows": " ".join(windows),
        "codes": " ".join(case.codes),
        "status": status,
    }


def read_rows(file: Path) -> dict[str, dict[str, str]]:
    """Rows of a metadata.csv by case; none where the file is missing. Older trees name the case in the first column."""
    if not file.is_file():
        return {}
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        first = (reader.fieldnames or [""])[0]
        column = "case_id" if "case_id" in (reader.fieldnames or []) else first
        return {row[column]: row for row in reader if row.get(column)}


def write_metadata(dataset_dir: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    _write_csv(Path(dataset_dir) / "metadata.csv", METADATA_COLUMNS, rows)


def write_failures(dataset_dir: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    _write_csv(Path(dataset_dir) / "failures.csv", FAILURE_COLUMNS, rows)


def write_dataset_config(dataset_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """dataset_config.json: the settings that made the dataset, with the software's versions."""
    text = json.dumps({**settings, "versions": versions()}, indent=1, sort_keys=True) + "\n"
    write_text(Path(dataset_dir) / "dataset_config.json", text)


def _write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, buffer.getvalue())


def write_text(file: Path, text: str) -> None:
    """A file that is old or new, never half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
