"""The command `sdf`: meshes and volumes to files of sparse signed distance, one input or a folder.

An input that cannot be used is listed and the rest is done. What is there already, of the same source by the same
settings, stays.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.dataset.prepared import read_metadata, split_patients
from app.dataset.writer import write_csv, write_failures
from app.shapes.bands import BAND, shape_of
from app.shapes.shape_files import MAX_SIDE, Provenance, read_provenance, write_shape
from app.shapes.sources import NamedSurface, Source, SurfaceChoice, find_sources, source_hash, surfaces_of
from app.shared.output_folder import check_folder
from app.shared.refusals import Refused, as_refused, check_path
from app.shared.workers import only_run, run_jobs, worker_count

RESOLUTIONS = (64, 512, 1024)
METADATA_COLUMNS = ("case_id", "patient", "split", "source_hash", "resolutions", "sign", "codes", "status")
BYTES_AT_1024 = 3 << 30  # of one job; it falls with the square of the resolution, as surfaces do
BYTES_AT_LEAST = 400 << 20


class Settings(NamedTuple):
    resolutions: tuple[int, ...] = RESOLUTIONS
    band: float = BAND
    sharp_degrees: float | None = None
    wanted: SurfaceChoice = SurfaceChoice()
    overwrite: bool = False

    def mark(self) -> str:
        """What of them shapes the numbers in a file; which label it is of, its name says."""
        return json.dumps([self.band, self.sharp_degrees, *self.wanted._replace(label=None)])


class Job(NamedTuple):
    source: Source
    out: str
    settings: Settings


def read_resolutions(text: str) -> tuple[int, ...]:
    """64,512 as it is typed."""
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        what = f"resolution must be whole numbers, comma separated, got {text!r}"
        raise Refused("BAD_VALUE", what, "such as 64,512") from None


def make_shapes(source: str | Path, out: str | Path, settings: Settings, *, workers: int = 8) -> dict[str, Any]:
    """Files of every surface at SOURCE, at each resolution, with metadata.csv and failures.csv."""
    check_path(source, name="SOURCE")
    check_path(out)
    source, out, begun = Path(source), Path(out), time.perf_counter()
    _check_call(source, out, settings)
    with only_run(out):
        sources = find_sources(source, settings.wanted)
        if not sources:
            what = f"{source} holds neither a mesh nor a volume"
            raise Refused("NO_CASES", what, "give STL, OBJ, PLY, VTP, NIfTI, NRRD or MHA", status=2)
        if settings.wanted.label is not None and all(one.kind == "mesh" for one in sources):
            raise Refused("BAD_CALL", f"--label is of volumes, {source} holds meshes alone", "leave --label out")
        jobs = [Job(one, str(out), settings) for one in sources]
        largest = max(settings.resolutions)
        each = max(BYTES_AT_LEAST, BYTES_AT_1024 * largest * largest >> 20)
        count = worker_count(workers, each, len(jobs)) if len(jobs) > 1 else 1
        entries = [entry for done in run_jobs(make_one, jobs, failed=_died, workers=count) for entry in done]
        entries.sort(key=lambda entry: (entry["source"], entry["case"]))
        _write_tables(out, entries)
    ok = sum(entry["status"] == "ok" for entry in entries)
    shown = [{name: value for name, value in entry.items() if name not in ("patient", "split")} for entry in entries]
    return {"cases": shown, "ok": ok, "refused": len(entries) - ok, "seconds": round(time.perf_counter() - begun, 1)}


def _check_call(source: Path, out: Path, settings: Settings) -> None:
    if not source.exists():
        what = f"{source} does not exist"
        raise Refused("NO_SOURCE", what, "give a mesh, a volume, a prepared dataset or a folder of them")
    for side in settings.resolutions:
        if side % 8 or not 8 <= side <= MAX_SIDE:
            what = f"resolution must be a multiple of 8 up to {MAX_SIDE}, got {side}"
            raise Refused("BAD_VALUE", what, "give another")
    if not 1 <= settings.band <= min(settings.resolutions) / 2:
        limit = min(settings.resolutions) // 2
        raise Refused("BAD_VALUE", f"band must be 1 to {limit} voxels, got {settings.band:g}", "pass another --band")
    if settings.sharp_degrees is not None and not 0 < settings.sharp_degrees < 180:
        what = f"sharp must be an angle between 0 and 180 degrees, got {settings.sharp_degrees:g}"
        raise Refused("BAD_VALUE", what, "pass another --sharp")
    if settings.wanted.hu is not None and not math.isfinite(settings.wanted.hu):
        raise Refused("BAD_VALUE", f"hu must be a number in HU, got {settings.wanted.hu:g}", "pass another --hu")
    if settings.wanted.label is not None and settings.wanted.hu is not None:
        raise Refused("BAD_CALL", "--label and --hu are both given", "give one of them")
    if out.suffix == ".npz" or out.is_file():
        raise Refused("NO_OUTPUT", f"{out} is a file, a file for each resolution is written", "give a folder as OUT")
    check_folder(out)


def make_one(job: Job) -> list[dict[str, Any]]:
    """The files of one source; an entry for each of its surfaces."""
    source, settings = job.source, job.settings
    entries: list[dict[str, Any]] = []
    try:
        if source.error is not None:
            raise source.error
        digest = source_hash(source)
        for named in surfaces_of(source, settings.wanted):
            entries.append(_entry(job, named, digest))
    except MemoryError:
        entries.append(
            _refused(source, source.name, Refused("OUT_OF_MEMORY", "the memory of this machine is not enough"))
        )
    except ValueError as error:
        entries.append(_refused(source, source.name, as_refused(error)))
    return entries


def _entry(job: Job, named: NamedSurface | tuple[str, Refused], digest: str) -> dict[str, Any]:
    """Of one surface: what is wrong with it says nothing of the others."""
    if not isinstance(named, NamedSurface):
        return _refused(job.source, *named)
    try:
        return _write(job, named, digest)
    except ValueError as error:
        return _refused(job.source, named.name, as_refused(error))


def _write(job: Job, named: NamedSurface, digest: str) -> dict[str, Any]:
    source, settings = job.source, job.settings
    surface = named.surface
    provenance = Provenance(digest, settings.mark(), surface.findings or ("OK",))
    files = []
    for resolution in settings.resolutions:
        path = Path(job.out) / f"{named.name}_r{resolution}.npz"
        is_reused = not settings.overwrite and _is_of_earlier_call(path, provenance)
        row = {"resolution": resolution, "file": path.name if path.parent == Path(job.out) else str(path)}
        if not is_reused:
            grid = named.affine(resolution)
            options = {"band": settings.band, "sharp_degrees": settings.sharp_degrees}
            shape = shape_of(surface, grid, resolution=resolution, **options)
            if not len(shape.coords):
                raise Refused("NO_SURFACE", f"{named.name} has no voxel at resolution {resolution}")
            write_shape(path, shape, provenance)
            row["points"] = len(shape.coords)
        files.append({**row, "made": not is_reused})
    return {
        "case": named.name,
        "source": source.place,
        "status": "ok",
        "codes": list(provenance.codes),
        "message": "; ".join(surface.messages),
        "files": files,
        "sign": surface.sign,
        "source_hash": digest,
        "patient": source.patient or source.name,
        "split": source.split,
    }


def _is_of_earlier_call(path: Path, provenance: Provenance) -> bool:
    """Whether an earlier call wrote this file; one of something else is neither taken nor overwritten."""
    if not path.exists():
        return False
    try:
        before = read_provenance(path)
    except Refused as refused:
        raise Refused(refused.code, refused.what, "it is in OUT already: --overwrite makes it again") from refused
    if before[:2] != provenance[:2]:
        raise Refused("EXISTS", f"{path.name} is there already, of another source or by other settings")
    return True


def _refused(source: Source, name: str, refused: Refused) -> dict[str, Any]:
    return {
        "case": name,
        "source": source.place,
        "status": "refused",
        "codes": [refused.code],
        "message": refused.what,
        "remedy": refused.remedy,
        "files": [],
    }


def _died(job: Job) -> list[dict[str, Any]]:
    return [_refused(job.source, job.source.name, Refused("OUT_OF_MEMORY", "its worker was ended from outside"))]


def _write_tables(out: Path, entries: Sequence[dict[str, Any]]) -> None:
    good = [entry for entry in entries if entry["status"] == "ok"]
    before = read_metadata(out / "metadata.csv")
    given = {row["patient"]: row["split"] for row in before.values() if row.get("patient") and row.get("split")}
    given |= {entry["patient"]: entry["split"] for entry in good if entry["split"]}
    sides = split_patients([entry["patient"] for entry in good], given)
    named = {entry["case"] for entry in entries}
    kept = [row for name, row in before.items() if name not in named]  # of earlier calls, of other sources
    rows = [
        {
            **entry,
            "case_id": entry["case"],
            "split": sides[entry["patient"]],
            "resolutions": " ".join(str(side) for side in _sides_of(out, entry)),
            "codes": " ".join(entry["codes"]),
        }
        for entry in good
    ]
    write_csv(out / "metadata.csv", METADATA_COLUMNS, [*kept, *rows])
    bad = [entry for entry in entries if entry["status"] != "ok"]
    write_failures(out, [{**entry, "codes": " ".join(entry["codes"])} for entry in bad])


def _sides_of(out: Path, entry: dict[str, Any]) -> list[int]:
    """Resolutions that a shape has files of, those of earlier calls too."""
    beside = (out / f"{entry['case']}_r0.npz").parent.glob(f"{Path(entry['case']).name}_r*.npz")
    numbers = (file.stem.rpartition("_r")[2] for file in beside)
    return sorted(int(number) for number in numbers if number.isdigit())


def lines(done: dict[str, Any]) -> Iterator[str]:
    """What the command prints of it."""
    for entry in done["cases"]:
        code = "" if entry["codes"] == ["OK"] else ", ".join(entry["codes"])
        why = ": ".join(part for part in (code, entry["message"]) if part)
        sizes = ", ".join(
            f"r{file['resolution']} {file['points']} voxels"
            if "points" in file
            else f"r{file['resolution']} there already"
            for file in entry["files"]
        )
        remedy = f". {entry['remedy'][:1].upper()}{entry['remedy'][1:]}." if "remedy" in entry else ""
        yield "  ".join(part for part in (entry["status"], entry["case"], sizes, why + remedy) if part)
    yield f"{done['ok']} ok, {done['refused']} refused, {done['seconds']:g} s"
