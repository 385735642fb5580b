"""Triangle meshes in files: the readers of STL, OBJ, PLY and VTP, and the writer of STL, OBJ and PLY.

Small readers of our own, as for volumes: a header is judged before what it announces is read, nothing is allocated that
the file cannot fill, nothing is executed. Faces of more corners become fans of triangles. Coordinates stay as the file
has them: mm, along the axes that its software wrote.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from app.shapes.polygons import fans
from app.shapes.vtp import read_vtp
from app.shared.array_files import damage
from app.shared.atomic_files import written_whole
from app.shared.refusals import Refused

LARGEST = 1e7  # mm: coordinates beyond are damage
PLY_TYPES = MappingProxyType(
    {
        **dict.fromkeys(("char", "int8"), "i1"),
        **dict.fromkeys(("uchar", "uint8"), "u1"),
        **dict.fromkeys(("short", "int16"), "i2"),
        **dict.fromkeys(("ushort", "uint16"), "u2"),
        **dict.fromkeys(("int", "int32"), "i4"),
        **dict.fromkeys(("uint", "uint32"), "u4"),
        **dict.fromkeys(("float", "float32"), "f4"),
        **dict.fromkeys(("double", "float64"), "f8"),
    }
)
UNREADABLE = (ValueError, LookupError, TypeError, ArithmeticError, RecursionError)  # what damaged bytes lead to


class Mesh(NamedTuple):
    vertices: Float64[np.ndarray, "V 3"]  # mm
    faces: Int64[np.ndarray, "T 3"]


def read_mesh(path: str | Path) -> Mesh:
    """The mesh of a file, checked; Refused with the rule that it breaks."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused("BAD_MESH", f"{path.name} cannot be read ({error.strerror})") from error
    try:
        vertices, faces = READERS[path.suffix.lower()](content)
        return _checked(np.asarray(vertices, np.float64).reshape(-1, 3), np.asarray(faces, np.int64).reshape(-1, 3))
    except UNREADABLE as error:
        raise Refused("BAD_MESH", f"{path.name} is damaged or no mesh: {damage(error)[:200]}") from error


def _checked(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    if len(faces) == 0:
        raise ValueError("it has no triangle")
    if faces.min() < 0 or faces.max() >= len(vertices):
        bad = int(np.flatnonzero(((faces < 0) | (faces >= len(vertices))).any(1))[0])
        raise ValueError(f"triangle {bad} names a vertex outside 0..{len(vertices) - 1}")
    used = vertices[faces]
    if not np.isfinite(used).all():
        raise ValueError("a coordinate is not finite")
    if np.abs(used).max() > LARGEST:
        raise ValueError(f"a coordinate is beyond {LARGEST:g} mm")
    return Mesh(vertices, faces)


# ---- STL


def _stl(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    count = int.from_bytes(content[80:84], "little")
    is_binary = len(content) >= 84 and 84 + 50 * count == len(content)
    if content[:512].lstrip()[:5].lower() == b"solid" and not is_binary and b"facet" in content:
        return _stl_text(content)
    if len(content) < 84 or count == 0 or 84 + 50 * count > len(content):
        raise ValueError(f"it announces {count} triangles, {max(len(content) - 84, 0) // 50} would fit")
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("mark", "<u2")])
    corners = np.frombuffer(content, record, count, 84)["corners"].astype(np.float64)
    return corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3)


def _stl_text(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    corners = re.findall(rb"vertex\s+(\S+)\s+(\S+)\s+(\S+)", content)
    if len(corners) % 3 or content.count(b"endfacet") * 3 != len(corners):
        raise ValueError("its facets do not have three vertices each")
    vertices = np.array([[float(word) for word in row] for row in corners], np.float64)
    return vertices, np.arange(len(corners)).reshape(-1, 3)


# ---- OBJ


def _obj(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    vertices: list[list[float]] = []
    corners: list[int] = []
    counts: list[int] = []
    for line in content.decode("latin-1").replace("\\\n", " ").splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            if len(words) < 4:
                raise ValueError(f"vertex {len(vertices) + 1} has {len(words) - 1} coordinates")
            vertices.append([float(word) for word in words[1:4]])
        elif words[0] == "f":
            for word in words[1:]:
                number = int(word.split("/", 1)[0])
                if number == 0 or abs(number) > 1 << 40:
                    raise ValueError(f"face {len(counts) + 1} names vertex {number}")
                corners.append(number - 1 if number > 0 else len(vertices) + number)
            counts.append(len(words) - 1)
    return np.array(vertices, np.float64), fans(np.array(counts, np.int64), np.array(corners, np.int64))


# ---- PLY


class _Element(NamedTuple):
    name: str
    count: int
    properties: tuple[tuple[str, str, str | None], ...]  # name, type, and of a list the type of its length


def _ply(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    match = re.match(rb"ply\r?\n.*?\nend_header[ ]*\r?\n", content[: 1 << 16], re.DOTALL)
    if match is None:
        raise ValueError("it has no PLY header")
    lines = [line.split() for line in match[0].decode("latin-1").splitlines()]
    encoding = next((words[1] for words in lines if words[:1] == ["format"]), "")
    elements = _ply_elements(lines)
    if encoding not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"its format is {encoding!r}")
    body = content[match.end() :]
    source = _Words(body) if encoding == "ascii" else _Bytes(body, "<" if "little" in encoding else ">")
    vertices, faces = np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    for element in elements:
        columns = source.take(element)
        if element.name == "vertex":
            vertices = np.stack([np.asarray(columns[axis], np.float64) for axis in "xyz"], 1)
        elif element.name == "face":
            name = next((n for n in ("vertex_indices", "vertex_index") if n in columns), "vertex_indices")
            faces = fans(*columns[name])
    return vertices, faces


def _ply_elements(lines: list[list[str]]) -> list[_Element]:
    elements: list[_Element] = []
    for words in lines:
        if words[:1] == ["element"]:
            elements.append(_Element(words[1], int(words[2]), ()))
            if elements[-1].count < 0:
                raise ValueError(f"element {words[1]} has {words[2]} rows")
        elif words[:1] == ["property"] and elements:
            if words[1] == "list":
                own = (words[4], PLY_TYPES[words[3]], PLY_TYPES[words[2]])
                if "f" in own[1] + own[2]:
                    raise ValueError(f"the list {words[4]} is not of whole numbers")
            else:
                own = (words[2], PLY_TYPES[words[1]], None)
            elements[-1] = elements[-1]._replace(properties=(*elements[-1].properties, own))
    return elements


class _Words:
    """The body of an ascii PLY, taken element by element."""

    def __init__(self, body: bytes):
        self.words, self.at = body.split(), 0

    def take(self, element: _Element) -> dict:
        if all(length is None for _, _, length in element.properties):
            size = element.count * len(element.properties)
            table = np.array([float(word) for word in self._next(size)]).reshape(element.count, -1)
            return {name: table[:, i] for i, (name, _, _) in enumerate(element.properties)}
        counts = {name: [] for name, _, length in element.properties if length}
        values = {name: [] for name in counts}
        for _ in range(element.count):
            for name, _, length in element.properties:
                if length is None:
                    self._next(1)
                    continue
                size = int(self._next(1)[0])
                counts[name].append(size)
                values[name] += [int(word) for word in self._next(size)]
        return {name: (np.array(counts[name], np.int64), np.array(values[name], np.int64)) for name in counts}

    def _next(self, size: int) -> list[bytes]:
        if size < 0 or self.at + size > len(self.words):
            raise ValueError(f"it ends after {len(self.words)} words")
        self.at += size
        return self.words[self.at - size : self.at]


class _Bytes:
    """The body of a binary PLY, taken element by element."""

    def __init__(self, body: bytes, order: str):
        self.body, self.at, self.order = body, 0, order

    def take(self, element: _Element) -> dict:
        lists = [name for name, _, length in element.properties if length]
        if not lists:
            record = np.dtype([(name, self.order + kind) for name, kind, _ in element.properties])
            rows = self._next(record, element.count)
            return {name: rows[name] for name in record.names}
        if element.count == 0:
            return {name: (np.zeros(0, np.int64), np.zeros(0, np.int64)) for name in lists}
        return self._lists(element, lists)

    def _lists(self, element: _Element, lists: list[str]) -> dict:
        """All rows at once where they are as long as the first, as in triangle meshes; else one after the other."""
        first, start = self._row(element), self.at
        fields = []
        for name, kind, length in element.properties:
            if length:
                fields.append((f"{name} length", self.order + length))
            fields.append((name, self.order + kind, (len(first[name]),)) if length else (name, self.order + kind))
        record = np.dtype(fields)
        self.at = start - record.itemsize
        if record.itemsize * element.count <= len(self.body) - self.at:
            rows = np.frombuffer(self.body, record, element.count, self.at)
            if all((rows[f"{name} length"] == len(first[name])).all() for name in lists):
                self.at += rows.nbytes
                return {
                    name: (rows[f"{name} length"].astype(np.int64), rows[name].astype(np.int64).reshape(-1))
                    for name in lists
                }
        rows = [self._row(element) for _ in range(element.count)]
        return {
            name: (
                np.array([len(row[name]) for row in rows], np.int64),
                np.concatenate([row[name] for row in rows]).astype(np.int64),
            )
            for name in lists
        }

    def _row(self, element: _Element) -> dict[str, np.ndarray]:
        row = {}
        for name, kind, length in element.properties:
            size = 1 if length is None else int(self._next(np.dtype(self.order + length), 1)[0])
            row[name] = self._next(np.dtype(self.order + kind), size)
        return row

    def _next(self, dtype: np.dtype, count: int) -> np.ndarray:
        if count < 0 or dtype.itemsize * count > len(self.body) - self.at:
            raise ValueError(f"it ends after {len(self.body)} bytes of {self.at + dtype.itemsize * max(count, 0)}")
        self.at += dtype.itemsize * count
        return np.frombuffer(self.body, dtype, count, self.at - dtype.itemsize * count)


READERS: MappingProxyType[str, Callable[[bytes], tuple[np.ndarray, np.ndarray]]] = MappingProxyType(
    {".stl": _stl, ".obj": _obj, ".ply": _ply, ".vtp": read_vtp}
)


# ---- writing


def write_mesh(path: Path, mesh: Mesh) -> None:
    """A whole file or none; the ending says which format."""
    content = WRITERS[path.suffix.lower()](mesh)
    with written_whole(path) as beside:
        beside.write_bytes(content)


def _as_stl(mesh: Mesh) -> bytes:
    corners = mesh.vertices[mesh.faces].astype("<f4")
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("mark", "<u2")])
    rows = np.zeros(len(corners), record)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    rows["normal"] = normals / np.maximum(np.linalg.norm(normals, axis=1), 1e-30)[:, None]
    rows["corners"] = corners
    return b"mm".ljust(80) + len(rows).to_bytes(4, "little") + rows.tobytes()


def _as_ply(mesh: Mesh) -> bytes:
    head = (
        "ply\nformat binary_little_endian 1.0\ncomment mm\n"
        f"element vertex {len(mesh.vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.zeros(len(mesh.faces), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    rows["count"], rows["corners"] = 3, mesh.faces
    return head.encode() + mesh.vertices.astype("<f4").tobytes() + rows.tobytes()


def _as_obj(mesh: Mesh) -> bytes:
    lines = ["# mm", *(f"v {x:.6g} {y:.6g} {z:.6g}" for x, y, z in mesh.vertices.tolist())]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()


WRITERS: MappingProxyType[str, Callable[[Mesh], bytes]] = MappingProxyType(
    {".stl": _as_stl, ".obj": _as_obj, ".ply": _as_ply}
)
