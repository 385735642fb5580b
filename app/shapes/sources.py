"""What `sdf` finds at a path, and the surfaces in it: meshes, label volumes, organs of prepared cases, levels in HU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from app.dataset import prepared
from app.prepare.files import Ref, files_below, hash_of, sniff
from app.prepare.formats import read_header
from app.prepare.labels import MAX_LABELS, looks_like_labels, safe_name
from app.prepare.volume import RawSource, raw_sources
from app.prepare.volume_file import read_voxels
from app.shapes.bands import Surface, check_surface, mesh_affine, volume_affine
from app.shapes.mesh_files import READERS, Mesh, read_mesh
from app.shared.refusals import Refused
from app.shared.scan_formats import volume_endings, without_ending
from transforms.isosurface import placed, surface_at

MOST_NAMED = 12  # labels or organs in a line


class Source(NamedTuple):
    """One input: a mesh, a label volume, a scan or a prepared case."""

    name: str  # of its files, without what tells labels apart
    place: str  # relative to SOURCE
    kind: str  # mesh, labels, scan, case; refused
    path: str
    patient: str = ""
    split: str = ""
    raw: RawSource | None = None
    error: Refused | None = None


class SurfaceChoice(NamedTuple):
    """Which surfaces of a volume: of one label or organ, at a level in HU, or of every label."""

    label: str | None = None
    hu: float | None = None
    unsigned: bool = False


class NamedSurface(NamedTuple):
    """A surface and the grids that it goes onto."""

    name: str
    surface: Surface
    volume: tuple[tuple[int, ...], Float[np.ndarray, "4 4"]] | None  # shape and affine of its volume; none of a mesh

    def affine(self, resolution: int) -> Float[np.ndarray, "4 4"]:
        if self.volume is None:
            return mesh_affine(self.surface.mesh, resolution)
        return volume_affine(*self.volume, resolution)


def find_sources(source: Path, wanted: SurfaceChoice) -> list[Source]:
    """Everything at a path that may hold a surface, by place; what is neither mesh nor volume is passed over."""
    if (source / "case.json").is_file():
        case = prepared.open_case(source)
        return [Source(case.case_id, case.case_id, "case", str(source), case.patient, case.split)]
    if source.is_dir() and prepared.find_datasets(source):
        return [_case_source(case) for case in prepared.list_cases(source)]
    return _scans(source) if wanted.hu is not None else _files(source)


def _case_source(case: prepared.PreparedCase | prepared.DamagedCase) -> Source:
    place = f"{case.dataset}/{case.case_id}"
    if isinstance(case, prepared.DamagedCase):
        return Source(case.case_id, place, "refused", "", error=case.error)
    return Source(case.case_id, place, "case", str(case.path), case.patient, case.split)


def _scans(source: Path) -> list[Source]:
    """Raw scans, which pass the gate; named by their content, as their own names may say who was scanned."""
    sources = []
    for raw in raw_sources(source):
        try:
            name = raw.source_hash[:16]
            sources.append(Source(name, raw.place, "scan", str(source), name, raw=raw))
        except Refused as refused:
            sources.append(Source(raw.place, raw.place, "refused", str(source), error=refused))
    return sources


def _files(source: Path) -> list[Source]:
    sources = []
    root = source.absolute() if source.is_dir() else source.absolute().parent
    for ref, refused in files_below(source):
        place = str(Path(ref.path).relative_to(root)) + (f"/{ref.member}" if ref.member else "")
        stem = _stem(place)
        if refused is not None:
            sources.append(Source(stem, place, "refused", ref.path, error=refused))
        elif not ref.member and Path(ref.path).suffix.lower() in READERS:
            sources.append(Source(stem, place, "mesh", ref.path))
        elif not ref.member and ref.name.lower().endswith(volume_endings()):
            sources.append(Source(stem, place, "labels", ref.path))
        elif source.is_file():
            what = f"{ref.name} is neither a mesh ({', '.join(READERS)}) nor a volume (NIfTI, NRRD, MHA)"
            raise Refused("NO_CASES", what, "give one of these, or a scan with --hu LEVEL", status=2)
    names = [one.name for one in sources]
    return [one._replace(name=_apart(one)) if names.count(one.name) > 1 else one for one in sources]


def _stem(place: str) -> str:
    path = Path(place)
    name = without_ending(path.name)
    name = path.stem if name == path.name else name  # a mesh
    return "/".join([*(safe_name(part) for part in path.parent.parts), safe_name(name)])


def _apart(source: Source) -> str:
    """Two files of one name and several endings."""
    return f"{source.name}_{Path(source.place).suffix.lstrip('.').lower()}"


def source_hash(source: Source) -> str:
    if source.kind == "case":
        return prepared.open_case(Path(source.path)).content_hash
    if source.raw is not None:
        return source.raw.source_hash
    refs = [Ref(source.path)]
    if source.kind == "labels":
        file = read_header(refs[0], sniff(refs[0]))
        refs = list(dict.fromkeys([file.ref, file.data]))
    return hash_of(refs)


def surfaces_of(source: Source, wanted: SurfaceChoice) -> Iterator[NamedSurface | tuple[str, Refused]]:
    """The surfaces of a source, one after the other; a label that has none comes with its refusal."""
    if source.kind == "mesh":
        mesh = read_mesh(source.path)
        surface = check_surface(mesh, unsigned=wanted.unsigned, name=Path(source.path).name)
        yield NamedSurface(source.name, surface, None)
        return
    if source.kind == "case" and wanted.hu is None:
        yield from _organs(source, wanted)
        return
    if source.kind == "labels":
        yield from _labels(source, wanted)
        return
    if source.kind == "case":
        case = prepared.open_case(Path(source.path))
        values, affine = case.hu(), case.affine
    else:
        volume = source.raw.read()
        values, affine = volume.hu, volume.affine
    name = f"{source.name}_hu{wanted.hu:g}"
    yield _at_level(name, values, wanted.hu, affine, wanted, what=f"{wanted.hu:g} HU")


def _organs(source: Source, wanted: SurfaceChoice) -> Iterator[NamedSurface | tuple[str, Refused]]:
    case = prepared.open_case(Path(source.path))
    names = case.organ_names()
    if case.affine is None or not names:
        lacks = "no organs" if case.affine is not None else "no case.json, so no place in the world"
        what = f"case {case.case_id} has {lacks}"
        raise Refused("NO_SURFACE", what, "prepare it with its labels, or give --hu LEVEL")
    if wanted.label is not None and wanted.label not in names:
        raise Refused("NO_SURFACE", f"case {case.case_id} has no organ {wanted.label!r}, it has {_few(names)}")
    for organ in names if wanted.label is None else (wanted.label,):
        full = f"{source.name}_{organ}"
        try:
            yield _at_level(full, case.organ(organ), 0.5, case.affine, wanted, what=f"organ {organ}")
        except Refused as refused:
            yield full, refused


def _labels(source: Source, wanted: SurfaceChoice) -> Iterator[NamedSurface | tuple[str, Refused]]:
    file = read_header(Ref(source.path), sniff(Ref(source.path)))
    values = read_voxels(file)
    if not values.any():
        raise Refused("NO_SURFACE", f"{Path(source.path).name} holds 0 alone")
    if wanted.label is None and not (values.dtype.kind in "iu" and looks_like_labels(file)):
        what = f"{Path(source.path).name} holds no labels but values of {values.min():g} to {values.max():g}"
        raise Refused("NO_SURFACE", what, "name a label with --label N, or a level in HU with --hu LEVEL")
    present = np.unique(values)
    present = present[present != 0]
    if len(present) > MAX_LABELS:
        raise Refused("NO_SURFACE", f"{Path(source.path).name} holds {len(present)} different labels")
    if wanted.label is not None:
        number = _number(wanted.label)
        if number not in present:
            what = f"{Path(source.path).name} has no label {wanted.label}, it has {_some(present)}"
            raise Refused("NO_SURFACE", what)
        present = np.array([number])
    for number in present.tolist():
        full = source.name if len(present) == 1 and wanted.label is None else f"{source.name}_label{number:g}"
        try:
            yield _at_level(full, values == number, 0.5, file.affine, wanted, what=f"label {number:g}")
        except Refused as refused:
            yield full, refused


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        raise Refused("BAD_VALUE", f"a label of a volume is a number, got {label!r}") from None


def _some(present: np.ndarray) -> str:
    return _few([f"{value:g}" for value in present.tolist()])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (" …" if len(names) > MOST_NAMED else "")


def _at_level(
    name: str,
    values: Shaped[np.ndarray, "X Y Z"],
    level: float | int,
    affine: Float[np.ndarray, "4 4"],
    wanted: SurfaceChoice,
    *,
    what: str,
) -> NamedSurface:
    """The surface of a volume at a level: closed by its making, so that parity tells its inside."""
    surface = surface_at(values, level)
    if not len(surface.faces):
        raise Refused("NO_SURFACE", f"{name} has no surface at {what}")
    findings = ("UNSIGNED",) if wanted.unsigned else ()
    sign = "none" if wanted.unsigned else "parity"
    closed = Surface(Mesh(*placed(surface, affine)), sign, findings, tuple("given unsigned" for _ in findings))
    return NamedSurface(name, closed, (tuple(values.shape), np.asarray(affine, np.float64)))
