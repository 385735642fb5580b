"""VTP, the XML files of VTK's PolyData: polygons and strips, as text, base64 or appended bytes, zlib or plain.

Only what is needed is decoded, and a block is unpacked to the size that its header gives and no further.
"""

import base64
import re
import zlib
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from app.shapes.polygons import fans, strips

TYPES = {
    **{f"Int{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"UInt{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    "Float32": "f4",
    "Float64": "f8",
}
MAX_BYTES = 4 << 30  # of one array, unpacked
MAX_RATIO = 1100  # bytes out of one packed byte: deflate gives at most 1032


class _Coding(NamedTuple):
    order: str  # < or >
    header: str  # type of the numbers before each array
    packed: bool
    appended: bytes
    is_base64: bool  # of what is appended


def read_vtp(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of all pieces."""
    head, appended, is_base64 = _without_appended(content)
    if b"<!DOCTYPE" in head or b"<!ENTITY" in head:
        raise ValueError("it declares entities, which no mesh needs")
    try:
        root = ElementTree.fromstring(head)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML ({error})") from error
    if root.tag != "VTKFile" or root.get("type") != "PolyData":
        raise ValueError(f"it is {root.tag} {root.get('type', '')}, not VTKFile PolyData")
    if root.get("compressor", "vtkZLibDataCompressor") != "vtkZLibDataCompressor":
        raise ValueError(f"it is packed by {root.get('compressor')}; zlib or none is read")
    coding = _Coding(
        ">" if root.get("byte_order") == "BigEndian" else "<",
        TYPES[root.get("header_type", "UInt32")],
        root.get("compressor") is not None,
        appended,
        is_base64,
    )
    vertices, faces, before = [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)], 0
    for piece in root.iter("Piece"):
        points = piece.find("Points/DataArray")
        if points is None:
            raise ValueError("a piece has no Points")
        values = _array(points, coding).astype(np.float64).reshape(-1, 3)
        for name, triangulate in (("Polys", fans), ("Strips", strips)):
            corners, ends = _cells(piece.find(name), coding)
            counts = np.diff(ends, prepend=0)
            triangles = triangulate(counts, corners)
            if triangles.size and (triangles.min() < 0 or triangles.max() >= len(values)):
                raise ValueError(f"a triangle names a vertex outside 0..{len(values) - 1}")
            faces.append(triangles + before)
        vertices.append(values)
        before += len(values)
    return np.concatenate(vertices), np.concatenate(faces)


def _without_appended(content: bytes) -> tuple[bytes, bytes, bool]:
    """The XML alone, the bytes appended to it, and whether they are base64."""
    match = re.search(rb"<AppendedData([^>]*)>\s*_", content)
    if match is None:
        return content, b"", False
    end = content.rfind(b"</AppendedData>")
    body = content[match.end() : end if end >= match.end() else len(content)]
    return content[: match.start()] + b"</VTKFile>", body, b"base64" in match[1]


def _cells(node: ElementTree.Element | None, coding: _Coding) -> tuple[np.ndarray, np.ndarray]:
    """Corners and ends of a kind of cells; none where a piece has none of it."""
    arrays = {} if node is None else {part.get("Name"): part for part in node.iter("DataArray")}
    if not arrays:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return tuple(_array(arrays[name], coding).astype(np.int64) for name in ("connectivity", "offsets"))


def _array(node: ElementTree.Element, coding: _Coding) -> np.ndarray:
    dtype = np.dtype(coding.order + TYPES[node.get("type", "")])
    kind, text = node.get("format", "ascii"), (node.text or "").strip()
    if kind == "ascii":
        values = np.array([float(word) for word in text.split()])
        if dtype.kind != "f" and not (np.abs(values) < 2**53).all():
            raise ValueError("a whole number is none, or too large")
        return values.astype(dtype)
    if kind == "appended":
        offset = int(node.get("offset", "0"))
        if not 0 <= offset <= len(coding.appended):
            raise ValueError(f"an array begins at byte {offset} of {len(coding.appended)}")
        data, is_base64 = coding.appended[offset:], coding.is_base64
    elif kind == "binary":
        data, is_base64 = text.encode("ascii", "replace"), True
    else:
        raise ValueError(f"an array has format {kind!r}")
    blocks = _unpacked(data, is_base64, coding) if coding.packed else _plain(data, is_base64, coding)
    return np.frombuffer(blocks[: len(blocks) // dtype.itemsize * dtype.itemsize], dtype)


def _plain(data: bytes, is_base64: bool, coding: _Coding) -> bytes:
    width = np.dtype(coding.header).itemsize
    (size,) = _numbers(_some(data, 0, width, is_base64), coding)
    return _some(data, 0, width + size, is_base64)[width:]


def _unpacked(data: bytes, is_base64: bool, coding: _Coding) -> bytes:
    """Blocks after a header of their number, size, the last one's size, and the packed size of each."""
    width = np.dtype(coding.header).itemsize
    count, size, last = _numbers(_some(data, 0, 3 * width, is_base64), coding)
    if count == 0:
        return b""
    header = _some(data, 0, (3 + count) * width, is_base64)
    packed = _numbers(header, coding)[3:]
    start = 4 * -(-len(header) // 3) if is_base64 else len(header)  # base64: header and blocks are coded apart
    body = _some(data, start, sum(packed), is_base64)
    sizes = [size] * (count - 1) + [last or size]
    if sum(sizes) > min(MAX_BYTES, MAX_RATIO * max(len(body), 1)):
        raise ValueError(f"{len(body)} bytes that claim to hold {sum(sizes)}")
    parts, at = [], 0
    for length, wanted in zip(packed, sizes, strict=True):
        try:
            part = zlib.decompressobj().decompress(body[at : at + length], wanted)
        except zlib.error as error:
            raise ValueError(f"a block cannot be unpacked ({error})") from error
        if len(part) != wanted:
            raise ValueError(f"a block holds {len(part)} bytes of {wanted}")
        parts.append(part)
        at += length
    return b"".join(parts)


def _some(data: bytes, start: int, size: int, is_base64: bool) -> bytes:
    """So many decoded bytes from a place on."""
    if size < 0 or size > len(data):
        raise ValueError(f"an array wants {size} bytes, {len(data)} are left")
    if not is_base64:
        part = data[start : start + size]
    else:
        part = base64.b64decode(data[start : start + 4 * -(-size // 3)], validate=True)[:size]
    if len(part) < size:
        raise ValueError(f"an array ends after {len(part)} bytes of {size}")
    return part


def _numbers(data: bytes, coding: _Coding) -> list[int]:
    return np.frombuffer(data, coding.order + coding.header).tolist()
