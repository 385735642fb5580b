"""One scan to one prepared case: read, brought onto the grid, written whole; or found made from the same bytes before.

Whether in this process, in worker processes or on a Dask cluster.
"""

import contextlib
import errno
import hashlib
import json
import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from app.dataset import writer
from app.prepare import preview
from app.prepare.files import hash_of
from app.prepare.findings import codes_of, finding_of
from app.prepare.gate import Rules
from app.prepare.geometry import hash_of_voxels, normalise
from app.prepare.labels import organ_coords
from app.prepare.survey import Item
from app.prepare.volume import read_item
from app.shared.refusals import Refused
from transforms.grid import RESAMPLER, Grid, spacing_of
from transforms.windows import DEFAULT_WINDOWS


class PrepareSettings(NamedTuple):
    """What makes the bytes of a dataset; in dataset_config.json."""

    size: int = 512
    spacing: float = 1.0
    windows: tuple[str, ...] = DEFAULT_WINDOWS
    file_format: str = "npy"
    allow_gaps: bool = False
    assume_hu: bool = False
    keep_names: bool = False


class CaseJob(NamedTuple):
    """One scan, and all that shapes its case."""

    item: Item
    folder: str  # OUT/{dataset}
    case: str
    patient: str
    split: str
    settings: PrepareSettings
    rules: Rules
    mapping: tuple[tuple[str, str], ...]
    preview: bool
    overwrite: bool


class Outcome(NamedTuple):
    """One line of the report."""

    case: str
    dataset: str
    source: str
    status: str
    codes: tuple[str, ...]
    message: str = ""
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    hu_range: tuple[int, int] | None = None


def prepare_case(job: CaseJob) -> Outcome:
    """Makes one case, or finds it made from the same bytes; never raises for what its input does."""
    outcome = Outcome(job.case, Path(job.folder).name, job.item.source, "ok", ())
    try:
        refs = (*job.item.refs, *(ref for label in job.item.labels for ref in label.refs))
        parts = [hash_of(refs), settings_json(job.settings), job.mapping, job.split, job.patient]
        recipe = hashlib.sha256(json.dumps(parts).encode()).hexdigest()  # of all that shapes the case's bytes
        done = _finished(job, recipe)
        sidecar = _make(job, recipe) if done is None else done
    except Refused as refused:
        return outcome._replace(status=finding_of(refused).kind, codes=(refused.code,), message=refused.what)
    except MemoryError:
        return outcome._replace(status="failed", message="not enough memory; use fewer workers or a smaller size")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no other case would fare better
            raise
        return outcome._replace(status="failed", message=_place_of(error))
    except Exception as error:  # a fault of ours must not end the cohort; its text may hold names, its place cannot
        return outcome._replace(status="failed", message=_place_of(error))
    return outcome._replace(
        codes=tuple(sidecar["codes"]),
        message="; ".join(sidecar["notes"]),
        shape=tuple(sidecar["shape"]),
        spacing=tuple(sidecar["spacing"]),
        hu_range=tuple(sidecar["hu_range"]),
    )


def failed(job: CaseJob) -> Outcome:
    """What is said of a case whose worker died with it."""
    source, dataset = job.item.source, Path(job.folder).name
    return Outcome(job.case, dataset, source, "failed", (), "the worker died, most likely for want of memory")


def settings_json(settings: PrepareSettings) -> dict[str, Any]:
    """With the resampler, which shapes the bytes as much as they do: other code makes a dataset again, whole."""
    return {**settings._asdict(), "windows": list(settings.windows), "resampler": RESAMPLER}


def _place_of(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {os.path.basename(last.filename)}:{last.lineno}"


def _finished(job: CaseJob, recipe: str) -> dict[str, Any] | None:
    file = Path(job.folder) / "processed" / job.case / "case.json"
    if job.overwrite or not file.is_file():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged, or made by older software
        sidecar = json.loads(file.read_text())
        intact = sidecar["files"].items() <= writer.sizes_of(file.parent).items()
        has_preview = not job.preview or preview.path_of(job.folder, job.case).is_file()
        if sidecar["recipe"] == recipe and intact and has_preview:
            return sidecar
    return None


def _make(job: CaseJob, recipe: str) -> dict[str, Any]:
    settings = job.settings
    volume = read_item(job.item, job.rules)
    on_grid = normalise(volume, settings.size, settings.spacing)
    findings = (*volume.findings, *on_grid.findings)
    grid = Grid(settings.size, settings.spacing, on_grid.affine)
    mapping = dict(job.mapping)
    organs = organ_coords(job.item.labels, grid, mapping=mapping, keep_names=settings.keep_names)
    sidecar = {
        "codes": codes_of(findings),
        "notes": [f"{f.code}: {f.message}" for f in findings if f.message],
        "patient": job.patient,
        "split": job.split,
        "recipe": recipe,
        "source_hash": volume.source_hash,
        "hu_hash": hash_of_voxels(volume.hu, volume.affine),
        "source_shape": list(volume.hu.shape),
        "source_spacing": [round(float(step), 6) for step in spacing_of(volume.affine)],
        "source_affine": volume.affine.tolist(),
        "steps": list(on_grid.steps),
        "resampler": RESAMPLER,
        "organs": {name: len(coords) for name, coords in organs.items()},
    }
    del volume
    if job.preview:
        preview.write_preview(job.folder, job.case, on_grid.hu, settings.windows, settings.spacing)
    case = writer.write_case(
        job.folder,
        job.case,
        on_grid.hu,
        affine=on_grid.affine,
        windows=settings.windows,
        sidecar=sidecar,
        organs=organs,
        file_format=settings.file_format,
    )
    return dict(case.sidecar)
