"""The one writer of the prepared layout on disk, OUT/{dataset}/processed/{case} and the files beside it.

A case appears whole or not at all: written beside, then renamed.
"""

import csv
import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from app.dataset.prepared import PreparedCase, open_case, versions, window_bytes
from app.shared.atomic_files import write_text
from app.shared.json_files import write_object
from transforms.sparse import sparsify
from transforms.windows import AIR, window_file_name

METADATA_COLUMNS = (
    *("case_id", "patient", "split", "source_hash"),
    *("shape", "spacing", "hu_range", "windows", "codes", "status"),
)
UNFINISHED = re.compile(r"\.[^.].*\.[a-z0-9_]{8}\.unfinished(\.old)?")  # a case's folder before its last rename
DATASET_FILES = ("metadata.csv", "failures.csv", "dataset_config.json", "text.jsonl")
FAILURE_COLUMNS = ("source", "status", "codes", "message", "remedy")


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
    beside = Path(tempfile.mkdtemp(prefix=f".{case_id}.", suffix=".unfinished", dir=processed))
    try:
        _write_volume(beside, hu, windows=windows, file_format=file_format)
        _write_organs(beside, organs or {}, hu.shape)
        record = _sidecar(case_id, hu, affine, sidecar or {}) | {"files": sizes_of(beside)}
        write_object(beside / "case.json", record, sort_keys=True)
        beside.chmod(0o755)
        target = processed / case_id
        if target.exists():
            old = beside.with_name(beside.name + ".old")
            target.rename(old)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is None:  # NumPy's own, which writes less than it should
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(processed)) from error
        raise
    return open_case(target)


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of each file of a case but its sidecar, which lists them: what is cut short or gone later is seen."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file.stat().st_size for name, file in files.items() if name != "case.json"}


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


def write_metadata(dataset_dir: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    write_csv(Path(dataset_dir) / "metadata.csv", METADATA_COLUMNS, rows)


def write_failures(dataset_dir: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    write_csv(Path(dataset_dir) / "failures.csv", FAILURE_COLUMNS, rows)


def write_dataset_config(dataset_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """dataset_config.json: the settings that made the dataset, with the software's versions."""
    write_object(Path(dataset_dir) / "dataset_config.json", {**settings, "versions": versions()}, sort_keys=True)


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Of each row what these columns name; a whole file or none."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, buffer.getvalue())
