"""A surface as a sparse signed distance: which grid, which voxels, which sign.

Voxel i of `resolution` has its centre at (i + 0.5) / resolution of a cube. A mesh lies in its cube with its longest
side at 0.95 of it; a volume's cube is its own field. Values are distances over the band, negative inside.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from app.shapes.mesh_files import Mesh
from app.shared.refusals import Refused
from transforms.crossings import crossings
from transforms.mesh_check import Kind, kind_of, sharp_edges, welded
from transforms.triangle_band import band_pieces

FILL = 0.95  # of the cube, by the longest side of a mesh
BAND = 4.0  # voxels
LEAST_MM = 1e-9  # of the longest side: an atom measures a hundred times that
WELD = 1e-6  # of the longest side: vertices nearer are one, where the file's own leave a surface open
SHARP_WITHIN = 2.0  # voxels from a sharp edge


class Surface(NamedTuple):
    """A checked mesh in mm, and how its inside is told."""

    mesh: Mesh
    sign: str  # parity, winding or none
    findings: tuple[str, ...]  # codes
    messages: tuple[str, ...]  # of each code


class Shape(NamedTuple):
    """A sparse signed distance, voxels in Morton order."""

    coords: Int[np.ndarray, "N 3"]
    values: Float32[np.ndarray, " N"]  # distance / band, -1..1; unsigned where `sign` is none
    resolution: int
    affine: Float64[np.ndarray, "4 4"]  # index to mm
    band: float  # voxels
    sign: str
    sharp: Int[np.ndarray, " N"] | None = None  # 1 near a sharp edge


def check_surface(mesh: Mesh, *, unsigned: bool = False, name: str = "the mesh") -> Surface:
    """What kind of surface it is and how its inside is told; Refused where it is open and not wanted unsigned."""
    side = float(np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max())
    if side < LEAST_MM:
        raise Refused("BAD_MESH", f"{name} is a point: its longest side is {side:g} mm")
    vertices, faces = welded(mesh.vertices, mesh.faces)
    kind = kind_of(vertices, faces)
    if kind.open_edges:
        closer, fewer = welded(vertices, faces, within=WELD * side)
        if len(fewer) and not (again := kind_of(closer, fewer)).open_edges:
            vertices, faces, kind = closer, fewer, again
    if not len(faces):
        raise Refused("BAD_MESH", f"{name} has no triangle with three corners")
    if unsigned:
        return Surface(Mesh(vertices, faces), "none", ("UNSIGNED",), (f"{name} is given unsigned",))
    if kind.open_edges:
        what = f"{name} is not closed: {kind.open_edges} edges belong to an odd number of triangles"
        raise Refused("OPEN_MESH", what)
    return Surface(Mesh(vertices, faces), *_sign_for(kind, name))


def _sign_for(kind: Kind, name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Parity; the winding number where a mesh that is one way round crosses itself."""
    messages: dict[str, str] = {}
    sign = "winding" if kind.crossing and kind.is_oriented else "parity"
    if kind.crossing:
        rule = {
            "winding": "inside is where its winding number is not 0",
            "parity": "its triangles run both ways, so inside is where a line has crossed it an odd number of times",
        }[sign]
        messages["SELF_CROSSING"] = f"{name} crosses itself in {kind.crossing} triangles; {rule}"
    if kind.branching_edges:
        messages["NON_MANIFOLD"] = f"edges of {name} with more than two triangles: {kind.branching_edges}"
    return sign, tuple(messages), tuple(messages.values())


def mesh_affine(mesh: Mesh, resolution: int) -> Float[np.ndarray, "4 4"]:
    """Index to mm of the cube about a mesh."""
    used = mesh.vertices[mesh.faces].reshape(-1, 3)
    low, high = used.min(0), used.max(0)
    side = float((high - low).max()) / FILL
    affine = np.diag([*[side / resolution] * 3, 1.0])
    affine[:3, 3] = (low + high) / 2 - side / 2 + side / resolution / 2
    return affine


def volume_affine(
    shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], resolution: int
) -> Float[np.ndarray, "4 4"]:
    """Index to mm of the cube about the middle of a volume's field, along its axes."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / steps)
    side = float((steps * shape[:3]).max())
    cube = np.eye(4)
    cube[:3, :3] = left @ right * (side / resolution)  # axes that are not at right angles: the nearest that are
    middle = affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2) + affine[:3, 3]
    cube[:3, 3] = middle - cube[:3, :3] @ np.full(3, (resolution - 1) / 2)
    return cube


def shape_of(
    surface: Surface,
    affine: Float[np.ndarray, "4 4"],
    *,
    resolution: int,
    band: float = BAND,
    sharp_degrees: float | None = None,
) -> Shape:
    """The signed distance of a surface on the grid that `affine` takes to mm."""
    there = np.linalg.inv(affine)
    vertices = surface.mesh.vertices @ there[:3, :3].T + there[:3, 3]
    faces = surface.mesh.faces
    lines = None if surface.sign == "none" else crossings(vertices, faces, side=resolution)
    coords, values = [np.zeros((0, 3), np.int16)], [np.zeros(0, np.float32)]
    for piece in band_pieces(vertices[faces], side=resolution, band=band):
        part = np.minimum(piece.distance / np.float32(band), 1)
        if lines is not None:
            by_parity = surface.sign == "parity"
            inside = lines.parity(piece.coords) if by_parity else lines.winding(piece.coords) != 0
            np.negative(part, out=part, where=inside)
        coords.append(piece.coords)
        values.append(part)
    shape = Shape(np.concatenate(coords), np.concatenate(values), resolution, affine, band, surface.sign)
    if sharp_degrees is None:
        return shape
    return shape._replace(sharp=_near_sharp(shape, vertices, faces, sharp_degrees))


def _near_sharp(shape: Shape, vertices: np.ndarray, faces: np.ndarray, degrees: float) -> np.ndarray:
    """1 where a voxel lies within two voxels of a sharp edge: an edge is a triangle without area."""
    ends = sharp_edges(vertices, faces, degrees=degrees)
    side = np.int64(shape.resolution)
    mark = np.zeros(len(shape.coords), np.uint8)
    if len(ends) == 0:
        return mark
    keys = shape.coords.astype(np.int64) @ [side * side, side, 1]
    within = min(SHARP_WITHIN, shape.band)
    for piece in band_pieces(np.concatenate([ends, ends[:, 1:]], 1), side=shape.resolution, band=within):
        mark |= np.isin(keys, piece.coords.astype(np.int64) @ [side * side, side, 1]).astype(np.uint8)
    return mark
