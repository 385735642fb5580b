"""Whatever a user calls a scan, as one HU volume on RAS axes: a prepared case, a raw scan, or an array in memory.

Raw scans go through the gate of `app.prepare` and onto the grid that a tokenizer's training data were prepared on, so
that a scan gives the same tokens whether it was prepared before or not. Knows no network.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from jaxtyping import Float, Num

from app.dataset import prepared
from app.shared.refusals import Refused

Grid = tuple[int, float]  # side and mm


class Volume(NamedTuple):
    """HU and where they lie: `affine` takes an index to RAS mm, None where an older dataset does not say."""

    hu: Num[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"] | None


class Scan(NamedTuple):
    """A volume on RAS axes, with the grid of the scan it came from."""

    name: str
    volume: Volume
    source_shape: tuple[int, int, int]
    source_affine: Float[np.ndarray, "4 4"]
    source_hash: str = ""  # of the scan's content; an array in memory has none
    codes: tuple[str, ...] = ()  # what was found, fixed or cut on its way here


def is_case(path: Path) -> bool:
    """Whether a folder is a prepared case."""
    return path.is_dir() and (
        (path / "case.json").is_file() or (path / "windows").is_dir() or any(path.glob("ct_normalized_*.np[yz]"))
    )


def open_scan(scan: Any, windows: Sequence[str], *, grid: Grid | None = None) -> Scan:
    """One scan: a path, a PreparedCase, what `app.prepare.read_scan` gives, or a volume in memory.

    In memory: anything with `hu` and `affine`, a nibabel image, a MetaTensor (X, Y, Z) or (1, X, Y, Z), or a pair of an
    array and its affine; HU, and an index to RAS mm.

    `windows` are those a case without HU must have: what they cannot tell is lost. `grid` is where a raw scan goes.
    """
    if isinstance(scan, str | Path):
        path = Path(scan)
        if not is_case(path):
            return _open_raw(path, grid)
        scan = prepared.open_case(path)
    if isinstance(scan, prepared.PreparedCase):
        return _open_case(scan, windows)
    if hasattr(scan, "findings"):
        return scan_of(scan, grid)
    hu, affine = _in_memory(scan)
    placed, codes = _placed(Volume(hu, affine), grid)
    return Scan("scan", placed, _sizes(hu.shape), affine, codes=codes)


def _in_memory(scan: Any) -> tuple[np.ndarray, np.ndarray]:
    """HU and affine of a volume that others have read."""
    if isinstance(scan, nibabel.spatialimages.SpatialImage):
        from app.prepare.formats import nifti_units

        units = nifti_units(scan.header) if isinstance(scan, nibabel.Nifti1Image) else np.eye(4)
        hu, affine = np.asanyarray(scan.dataobj), units @ scan.affine
    elif isinstance(scan, tuple) and len(scan) == 2:
        hu, affine = scan
    elif hasattr(scan, "affine"):
        hu, affine = getattr(scan, "hu", scan), scan.affine
    else:
        raise Refused("BAD_VALUE", f"a {type(scan).__name__} is no scan", "give a path, or an array with its affine")
    hu, affine = (part.detach().cpu() if hasattr(part, "detach") else part for part in (hu, affine))
    hu, affine = np.asarray(hu), np.asarray(affine, np.float64)
    hu = hu[0] if hu.ndim == 4 and len(hu) == 1 else hu  # a MetaTensor's channel
    if hu.ndim != 3 or affine.shape != (4, 4):
        what = f"a scan has three axes and a 4 x 4 affine, got {hu.shape} and {affine.shape}"
        raise Refused("FOUR_D" if hu.ndim > 3 else "BAD_VALUE", what)
    return hu, affine


def _open_case(case: prepared.PreparedCase, windows: Sequence[str]) -> Scan:
    if case.is_hu:
        volume = Volume(case.hu(), case.affine)
    elif prepared.windows_are_masks(case, windows):
        what = f"case {case.case_id} holds 0/1 windows, surfaces and not HU"
        raise Refused("NOT_HU", what, "prepare it again from the scan")
    else:
        volume = Volume(prepared.windows_as_hu(case, windows), case.affine)
    side = case.sidecar
    affine = np.eye(4) if volume.affine is None else volume.affine
    return Scan(
        case.case_id,
        volume,
        _sizes(side.get("source_shape", volume.hu.shape)),
        np.array(side.get("source_affine", affine), np.float64),
        case.source_hash,
        tuple(case.codes),
    )


class Found(NamedTuple):
    """A scan that lies somewhere: its name, the hash of its content, and how to open it, or why it is refused."""

    name: str
    source_hash: str
    open: Callable[[], Scan] | ValueError


def raw_scans(path: Path, *, series: str | None = None, grid: Grid | None = None) -> Iterator[Found]:
    """Every scan of a file, zip or folder; each is read when it is opened, so that one at a time is in memory.

    Names come from the content: those of files and folders may tell who was scanned. What cannot be opened has no
    other name than its place.
    """
    from app.prepare import read_scan
    from app.prepare.files import hash_of
    from app.prepare.gate import Rules
    from app.prepare.survey import survey

    rules = Rules(series=series)
    items = survey(path, rules)
    if all(item.plan is None for item in items):
        read_scan(path, series=series)  # raises: it says why nothing here is a scan
    for item in items:
        if item.plan is None and item.finding.kind == "skipped":
            continue
        try:
            digest = hash_of(item.refs)
        except (OSError, Refused) as error:
            yield Found(item.source, "", _unread(error, item))
            continue
        if item.plan is None:
            yield Found(digest[:16], digest, Refused(item.finding.code, item.finding.message))
        else:
            yield Found(digest[:16], digest, partial(_open_item, item, rules, grid))


def _open_item(item: Any, rules: Any, grid: Grid | None) -> Scan:
    from app.prepare.volume import read_item

    try:
        return scan_of(read_item(item, rules), grid)
    except OSError as error:
        raise _unread(error, item) from error


def _unread(error: OSError | ValueError, item: Any) -> ValueError:
    """The refusal of an item whose files cannot be read."""
    if isinstance(error, ValueError):
        return error
    from app.prepare.findings import Finding

    finding = item.finding or Finding("CORRUPT_FILE", "refused", "the file cannot be read")
    return Refused(finding.code, f"{finding.message} ({error.strerror or error})")


def raw_hash(path: Path) -> str:
    """sha256 of all that opening a raw scan reads, data files that a header names included; whatever its name is."""
    from app.prepare.files import hash_of
    from app.prepare.survey import survey

    if not path.exists():
        raise Refused("NO_SOURCE", f"{path} does not exist")
    return hash_of([ref for item in survey(path) if item.plan is not None for ref in item.refs])


def _open_raw(path: Path, grid: Grid | None) -> Scan:
    from app.prepare import read_scan

    if not path.exists():
        raise Refused("NO_SOURCE", f"{path} does not exist")
    volumes = read_scan(path)
    if len(volumes) > 1:
        raise Refused(
            "MANY_SCANS", f"{path} holds {len(volumes)} scans", "tokenize the folder, or name one with --series"
        )
    return scan_of(volumes[0], grid)


def scan_of(raw: Any, grid: Grid | None) -> Scan:
    """A volume that `app.prepare` has read, named by its content."""
    from app.prepare.findings import bare

    made = _on_prepared_grid(raw, grid)
    affine, codes = np.asarray(raw.affine, np.float64), bare((*raw.findings, *made.findings))
    on_grid = Volume(made.hu, made.affine)
    return Scan(raw.source_hash[:16], on_grid, _sizes(raw.hu.shape), affine, raw.source_hash, tuple(codes))


def _on_prepared_grid(volume: Any, grid: Grid | None) -> Any:
    """On a grid as `prepare` would make it, with what it found; None is its default."""
    from app.prepare import normalise
    from app.prepare.cohort import Settings

    return normalise(volume, *(grid or (Settings().size, Settings().spacing)))


def as_it_lies(hu: Num[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"]) -> Scan:
    """What lies on the RAS grid that it should lie on: a phantom, the mirror image of a prepared case."""
    return Scan("scan", Volume(hu, affine), _sizes(hu.shape), affine)


def _placed(volume: Volume, grid: Grid | None) -> tuple[Volume, tuple[str, ...]]:
    """An array where a raw scan would go, with what was found. On RAS axes it stays where no grid is known."""
    from app.prepare.findings import bare

    axes = volume.affine[:3, :3]
    steps = np.diag(axes)
    upright = np.allclose(axes, np.diag(steps), atol=1e-6 * np.abs(axes).max()) and (steps > 0).all()
    there = grid is None or (volume.hu.shape == (grid[0],) * 3 and np.allclose(steps, grid[1], rtol=1e-4))
    if upright and there:
        return volume, ()
    made = _on_prepared_grid(volume, grid)
    return Volume(made.hu, made.affine), tuple(bare(made.findings))


def grid_of(path: Path) -> tuple[tuple[int, int, int], Float[np.ndarray, "4 4"]]:
    """Shape and affine of a scan's own grid."""
    if is_case(path):
        case = prepared.open_case(path)
        if case.affine is None:
            raise Refused("DAMAGED_CASE", f"case {case.case_id} has no case.json and so no place in the world")
        return _sizes(case.shape), case.affine
    if path.name.endswith((".nii", ".nii.gz")):
        try:
            header = nibabel.load(path)
        except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
            raise Refused("CORRUPT_FILE", f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
        shape = header.shape + (1,) * (3 - len(header.shape))
        if len(shape) > 3 and max(shape[3:]) > 1:
            raise Refused("FOUR_D", f"{path.name} has shape {shape}, a scan has three axes")
        from app.prepare.formats import nifti_units

        return _sizes(shape[:3]), nifti_units(header.header) @ np.asarray(header.affine, np.float64)
    from app.prepare import read_scan

    volumes = read_scan(path)
    if len(volumes) > 1:
        raise Refused("MANY_SCANS", f"{path} holds {len(volumes)} scans, --like needs one")
    return _sizes(volumes[0].hu.shape), np.asarray(volumes[0].affine, np.float64)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    return tuple(int(n) for n in shape)
