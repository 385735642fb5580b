"""The one door for whatever a user calls a scan: token files, prepared cases, raw scans, arrays in memory.

`scan_sources` lists what lies at a path, `scan_source` is the one scan there, `open_scan` opens any of it: as an HU
volume on RAS axes, or as the tokens that a file holds. Raw scans come through the door of `app.prepare` and onto the
grid that a tokenizer's training data were prepared on, so that a scan gives the same tokens whether it was prepared
before or not. Knows no network.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import nibabel
import numpy as np
from jaxtyping import Float, Num

from app.dataset import prepared
from app.prepare import cohort, normalise
from app.prepare.findings import codes_of
from app.prepare.formats import nifti_units
from app.prepare.slice_rules import Rules
from app.prepare.volume import RawScan, RawSource, raw_sources
from app.shapes.shape_files import holds_shape
from app.shared.hashes import hash_path
from app.shared.refusals import Refused
from app.tokens.code_tables import CodeTables
from app.tokens.token_files import CTTokens, read_tokens

Cube = tuple[int, float]  # a grid: voxels a side, and mm a voxel
Place = tuple[tuple[int, int, int], Float[np.ndarray, "4 4"]]  # shape and affine


class Volume(NamedTuple):
    """HU and where they lie: `affine` takes an index to RAS mm, None where an older dataset does not say."""

    hu: Num[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"] | None


class Scan(NamedTuple):
    """A volume on RAS axes, with the grid of the scan it came from."""

    name: str
    volume: Volume | None  # None where its rows were taken and its values let go
    source_shape: tuple[int, int, int]
    source_affine: Float[np.ndarray, "4 4"]
    source_hash: str = ""  # of the scan's content; an array in memory has none
    codes: tuple[str, ...] = ()  # of findings in it, and of what was fixed or cut on its way here


class TokenizerNeeds(NamedTuple):
    """What a tokenizer asks of a scan that is opened for it."""

    windows: Sequence[str] = ()
    grid: Cube | None = None  # where a raw scan goes
    tables: CodeTables | None = None  # what a packed token file takes to be read


class ScanSource(NamedTuple):
    """A scan where it lies, not read yet; opening it may refuse it.

    The name of a raw scan comes from its content: those of files and folders may tell who was scanned. What cannot be
    read has no other name than its place, and no hash.
    """

    kind: Literal["tokens", "case", "raw"]
    name: str
    place: str  # below the path that was asked about
    source_hash: str  # of the scan; empty where it is not known before it is opened
    key: str  # changes with all that opening it reads, so that what is made of it can be kept under it
    open: Callable[[TokenizerNeeds], Scan | CTTokens]
    own_grid: Callable[[TokenizerNeeds], Place]  # of the scan itself


def is_case(path: Path) -> bool:
    """Whether a folder is a prepared case."""
    return path.is_dir() and (
        (path / "case.json").is_file() or (path / "windows").is_dir() or any(path.glob("ct_normalized_*.np[yz]"))
    )


def open_scan(
    scan: Any, windows: Sequence[str], *, grid: Cube | None = None, tables: CodeTables | None = None
) -> Scan | CTTokens:
    """A path, a ScanSource, a PreparedCase, what `app.prepare.read_scan` gives, or a volume in memory.

    In memory: anything with `hu` and `affine`, a nibabel image, a MetaTensor (X, Y, Z) or (1, X, Y, Z), or a pair of an
    array and its affine; HU, and an index to RAS mm.

    `windows` are those a case without HU must have: what they cannot tell is lost. `grid` is where a raw scan goes,
    `tables` are what a packed token file takes to be read.
    """
    if isinstance(scan, str | Path):
        scan = scan_source(scan)
    if isinstance(scan, Scan | CTTokens):
        return scan
    if isinstance(scan, ScanSource):
        return scan.open(TokenizerNeeds(windows, grid, tables))
    if isinstance(scan, prepared.PreparedCase):
        return _of_case(scan, windows)
    if isinstance(scan, RawScan):
        return of_raw(scan, grid)
    hu, affine = _in_memory(scan)
    placed, codes = _placed(Volume(hu, affine), grid)
    return Scan("scan", placed, _sizes(hu.shape), affine, codes=codes)


# ---- what lies at a path


def scan_sources(path: str | Path, *, series: str | None = None, token_files: bool = True) -> Iterator[ScanSource]:
    """Every scan at a path, those that will be refused too.

    A token file or a folder of them, a prepared case or datasets, else raw scans of any nesting. `series` chooses one
    among raw scans; without `token_files` such files are none.
    """
    path = Path(path)
    if not path.exists():
        raise Refused("NO_SOURCE", f"{path} does not exist", "give a scan, a prepared case or dataset, or token files")
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix == ".npz" else []
    case = is_case(path)
    if files and token_files and not case:
        yield from map(_token_source, files)
    elif not case and not (path.is_dir() and prepared.find_datasets(path)):
        try:
            yield from map(_raw_source, raw_sources(path, Rules(series=series)))
        except Refused as refused:
            if refused.code == "NO_CASES":
                _refuse_shape(path)
            raise
    elif series is not None:
        raise Refused("BAD_VALUE", f"{path} is prepared, so --series names nothing", "leave it out", status=2)
    elif case:
        yield _case_source(path.name, lambda: prepared.open_case(path))
    else:
        cases = prepared.list_cases(path)
        several = len({one.dataset for one in cases}) > 1
        for one in cases:
            name = f"{one.dataset}/{one.case_id}" if several else one.case_id
            yield _case_source(name, lambda one=one: _or_damaged(one))


def scan_source(path: str | Path) -> ScanSource:
    """The one scan at a path: of several, the one that opens."""
    sources = list(scan_sources(path))
    if len(sources) == 1:
        return sources[0]
    remedy = "give one of them, or tokenize the folder (--series names one)"
    refused = errors_of(sources, several=Refused("MANY_SCANS", f"{path} holds several scans", remedy))
    if None not in refused:
        raise refused[0]
    return sources[refused.index(None)]


def errors_of(sources: Sequence[ScanSource], *, several: Refused) -> list[ValueError | None]:
    """Why each does not open, which only its values may tell; raises `several` where more than one does."""
    refused: list[ValueError | None] = []
    for source in sources:
        try:
            source.own_grid(TokenizerNeeds())
            refused.append(None)
        except ValueError as error:
            refused.append(error)
        if refused.count(None) > 1:
            raise several
    return refused


def _token_source(file: Path) -> ScanSource:
    def tokens(wanted: TokenizerNeeds) -> CTTokens:
        return read_tokens(file, tables=wanted.tables)

    def own_grid(wanted: TokenizerNeeds) -> Place:
        return tokens(wanted).source_shape, tokens(wanted).source_affine

    try:
        key = hash_path(file)
    except OSError:  # opening it says why
        key = ""
    return ScanSource("tokens", file.stem, file.name, "", key, tokens, own_grid)


def _or_damaged(case: prepared.PreparedCase | prepared.DamagedCase) -> prepared.PreparedCase:
    if isinstance(case, prepared.DamagedCase):
        raise case.error
    return case


def _case_source(name: str, get: Callable[[], prepared.PreparedCase]) -> ScanSource:
    def own_grid(_: TokenizerNeeds) -> Place:
        case = get()
        if case.affine is None:
            raise Refused("DAMAGED_CASE", f"case {case.case_id} has no case.json and so no place in the world")
        return _sizes(case.shape), case.affine

    try:
        case = get()
        source_hash, key = case.source_hash, case_key(case)
    except ValueError:  # opening it says why
        source_hash = key = ""
    return ScanSource("case", name, name, source_hash, key, lambda wanted: _of_case(get(), wanted.windows), own_grid)


def case_key(case: prepared.PreparedCase) -> str:
    """Name of a prepared case that changes with its scan and when it is prepared in another way.

    A sidecar that names no scan, as older trees have it, says nothing of the files beside it.
    """
    mark = hash_path(case.path / "case.json") if case.sidecar.get("source_hash") else case.content_hash
    return f"{case.path.name}.{mark[:16]}"


def _refuse_shape(path: Path) -> None:
    """Where no file is a CT volume but one is a shape, says what that takes."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if (shape := next((file for file in files if holds_shape(file)), None)) is not None:
        what = f"{shape.name} is a shape, which a tokenizer of CT does not read"
        remedy = "name one of shapes with --tokenizer (bundles/sdf_vqvae.json trains one), or give a CT volume"
        raise Refused("OTHER_TOKENIZER", what, remedy, status=2)


def _raw_source(raw: RawSource) -> ScanSource:
    def own_grid(_: TokenizerNeeds) -> Place:
        scan = raw.read()
        return _sizes(scan.hu.shape), np.asarray(scan.affine, np.float64)

    try:
        digest = raw.source_hash
    except Refused as refused:
        refuse = partial(_refuse, refused)
        return ScanSource("raw", raw.place, raw.place, "", "", refuse, refuse)

    def scan(wanted: TokenizerNeeds) -> Scan:
        return of_raw(raw.read(), wanted.grid)

    return ScanSource("raw", digest[:16], raw.place, digest, f"scan.{digest[:24]}", scan, own_grid)


def _refuse(refused: Refused, *_: Any) -> NoReturn:
    raise refused


# ---- one volume, onto RAS axes


def _in_memory(scan: Any) -> tuple[np.ndarray, np.ndarray]:
    """HU and affine of a volume that others have read."""
    if isinstance(scan, nibabel.spatialimages.SpatialImage):
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


def _of_case(case: prepared.PreparedCase, windows: Sequence[str]) -> Scan:
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


def of_raw(raw: RawScan, grid: Cube | None) -> Scan:
    """A raw scan on the grid that `prepare` would put it on, named by its content."""
    on_grid = _on_prepared_grid(raw, grid)
    affine, codes = np.asarray(raw.affine, np.float64), codes_of((*raw.findings, *on_grid.findings))
    volume = Volume(on_grid.hu, on_grid.affine)
    return Scan(raw.source_hash[:16], volume, _sizes(raw.hu.shape), affine, raw.source_hash, tuple(codes))


def _on_prepared_grid(volume: Any, grid: Cube | None) -> Any:
    """On a grid as `prepare` would make it, with its findings; None is its default."""
    return normalise(volume, *(grid or (cohort.PrepareSettings().size, cohort.PrepareSettings().spacing)))


def as_it_lies(hu: Num[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"]) -> Scan:
    """What lies on the RAS grid that it should lie on: a phantom, the mirror image of a prepared case."""
    return Scan("scan", Volume(hu, affine), _sizes(hu.shape), affine)


def _placed(volume: Volume, grid: Cube | None) -> tuple[Volume, tuple[str, ...]]:
    """An array where a raw scan would go, with findings. On RAS axes it stays where no grid is known."""
    axes = volume.affine[:3, :3]
    steps = np.diag(axes)
    upright = np.allclose(axes, np.diag(steps), atol=1e-6 * np.abs(axes).max()) and (steps > 0).all()
    is_on_grid = grid is None or (volume.hu.shape == (grid[0],) * 3 and np.allclose(steps, grid[1], rtol=1e-4))
    if upright and is_on_grid:
        return volume, ()
    on_grid = _on_prepared_grid(volume, grid)
    return Volume(on_grid.hu, on_grid.affine), tuple(codes_of(on_grid.findings))


def grid_of(path: Path, *, tables: CodeTables | None = None) -> Place:
    """Shape and affine of a scan's own grid. Of a NIfTI file the header is enough, whatever the image shows."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return scan_source(path).own_grid(TokenizerNeeds(tables=tables))
    try:
        header = nibabel.load(path)
    except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise Refused("CORRUPT_FILE", f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
    shape = header.shape + (1,) * (3 - len(header.shape))
    if len(shape) > 3 and max(shape[3:]) > 1:
        raise Refused("FOUR_D", f"{path.name} has shape {shape}, a scan has three axes")
    return _sizes(shape[:3]), nifti_units(header.header) @ np.asarray(header.affine, np.float64)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    return tuple(int(n) for n in shape)
