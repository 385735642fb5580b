"""Mesh files in and out: every format says the same, and what is damaged is named."""

import base64
import struct
import zlib

import numpy as np
import pytest

from app.shapes.mesh_files import WRITERS, Mesh, read_mesh, write_mesh
from app.shared.refusals import Refused
from tests.solids import box, sphere

VERTICES, FACES = box((1, 2, 3), (10, -20, 30))
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


def stl_text():
    facets = (
        "facet normal 0 0 0\nouter loop\n"
        + "".join(f"vertex {x:g} {y:g} {z:g}\n" for x, y, z in VERTICES[face])
        + "endloop\nendfacet\n"
        for face in FACES
    )
    return f"solid box\n{''.join(facets)}endsolid\n".encode()


def obj_quads():
    lines = [f"v {x:g} {y:g} {z:g}" for x, y, z in VERTICES]
    lines += [f"f {' '.join(f'{c + 1}/1/1' for c in quad)}" for quad in QUADS[:3]]
    lines += [f"f {' '.join(str(c - 8) for c in quad)}" for quad in QUADS[3:]]  # counted from the end
    return "\n".join(["# a box", "vn 0 0 1", "o box", *lines]).encode()


def ply(encoding, faces):
    head = (
        f"ply\nformat {encoding} 1.0\ncomment x\nelement vertex 8\nproperty float x\nproperty float y\n"
        f"property double z\nproperty uchar red\nelement face {len(faces)}\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    if encoding == "ascii":
        rows = [f"{x:g} {y:g} {z:g} 7" for x, y, z in VERTICES]
        rows += [f"{len(face)} {' '.join(map(str, face))}" for face in faces]
        return (head + "\n".join(rows) + "\n").encode()
    order = "<" if "little" in encoding else ">"
    body = b"".join(struct.pack(f"{order}ffdB", x, y, z, 7) for x, y, z in VERTICES)
    return head.encode() + body + b"".join(struct.pack(f"{order}B{len(f)}i", len(f), *f) for f in faces)


def vtp(kind):
    arrays = {
        "points": VERTICES.astype("<f4"),
        "connectivity": np.array(QUADS, "<i8").reshape(-1),
        "offsets": np.arange(4, 25, 4).astype("<i8"),
    }
    appended, tags = b"", {}
    for name, array in arrays.items():
        raw = array.tobytes()
        if kind == "packed":
            half = len(raw) // 2 // 8 * 8
            blocks = [zlib.compress(raw[:half]), zlib.compress(raw[half:])]
            sizes = struct.pack("<5I", 2, half, len(raw) - half, *map(len, blocks))
            text = (base64.b64encode(sizes) + base64.b64encode(b"".join(blocks))).decode()
            tags[name] = 'format="binary">' + text
        elif kind == "binary":
            tags[name] = 'format="binary">' + base64.b64encode(struct.pack("<I", len(raw)) + raw).decode()
        elif kind == "appended":
            tags[name] = f'format="appended" offset="{len(appended)}">'
            appended += struct.pack("<I", len(raw)) + raw
        else:
            tags[name] = 'format="ascii">' + " ".join(f"{v:g}" for v in array.reshape(-1).tolist())
    compressor = ' compressor="vtkZLibDataCompressor"' if kind == "packed" else ""
    text = (
        f'<?xml version="1.0"?><VTKFile type="PolyData" byte_order="LittleEndian" header_type="UInt32"{compressor}>'
        f'<PolyData><Piece NumberOfPoints="8" NumberOfPolys="6"><PointData/><Points>'
        f'<DataArray type="Float32" NumberOfComponents="3" {tags["points"]}</DataArray></Points><Polys>'
        f'<DataArray type="Int64" Name="connectivity" {tags["connectivity"]}</DataArray>'
        f'<DataArray type="Int64" Name="offsets" {tags["offsets"]}</DataArray></Polys></Piece></PolyData>'
    ).encode()
    return (
        text + (b'<AppendedData encoding="raw">_' + appended + b"</AppendedData>" if appended else b"") + b"</VTKFile>"
    )


FILES = {
    "text.stl": stl_text,
    "quads.obj": obj_quads,
    "text.ply": lambda: ply("ascii", QUADS),
    "little.ply": lambda: ply("binary_little_endian", QUADS),
    "big.ply": lambda: ply("binary_big_endian", [*QUADS[:5], QUADS[5][:3], [*QUADS[5][2:], QUADS[5][0]]]),
    **{f"{kind}.vtp": lambda kind=kind: vtp(kind) for kind in ("ascii", "binary", "appended", "packed")},
}


def volume_of(mesh):
    corners = mesh.vertices[mesh.faces]
    return np.einsum("ti,ti->t", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name]())
    mesh = read_mesh(tmp_path / name)
    assert len(mesh.faces) == 12 and volume_of(mesh) == pytest.approx(48)
    used = mesh.vertices[mesh.faces].reshape(-1, 3)
    assert used.min(0).tolist() == [9, -22, 27] and used.max(0).tolist() == [11, -18, 33]


@pytest.mark.parametrize("ending", WRITERS)
def test_what_is_written_is_read_again(ending, tmp_path):
    mesh = Mesh(*sphere(30.5, (100, -200, 300)))
    write_mesh(tmp_path / f"a{ending}", mesh)
    again = read_mesh(tmp_path / f"a{ending}")
    assert np.allclose(again.vertices[again.faces], mesh.vertices[mesh.faces], atol=1e-3)
    assert volume_of(again) == pytest.approx(volume_of(mesh), rel=1e-4)


def written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused) as refused:
        read_mesh(tmp_path / name)
    assert refused.value.code == "BAD_MESH" and "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_wrong_is_named(tmp_path):
    assert "announces 1000 triangles, 0 would fit" in written(
        tmp_path, "a.stl", b"\0" * 80 + (1000).to_bytes(4, "little")
    )
    assert "a triangle names a vertex outside 0..7" in written(
        tmp_path, "a.vtp", vtp("ascii").replace(b"0 1 3 2", b"0 1 3 9")
    )
    assert "triangle 0 names a vertex outside 0..2" in written(
        tmp_path, "a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"
    )
    assert "not finite" in written(tmp_path, "b.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert "beyond 1e+07 mm" in written(tmp_path, "c.obj", b"v 1e30 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert "it has no triangle" in written(tmp_path, "d.obj", b"hello\n")
    assert "it has no PLY header" in written(tmp_path, "a.ply", b"")
    assert "it ends after" in written(tmp_path, "b.ply", ply("binary_little_endian", QUADS)[:-3])
    assert "declares entities" in written(tmp_path, "b.vtp", b'<!DOCTYPE a [<!ENTITY b "c">]><VTKFile/>')
    assert "it is no XML" in written(tmp_path, "d.vtp", b"<a>" * 200_000)
    assert "4300 digits" in written(tmp_path, "e.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 " + b"9" * 6000)
    bomb = vtp("packed").replace(b"<Piece", b"<Piece ")
    sizes = struct.pack("<4I", 1, 0, 1 << 31, 10)
    start = bomb.index(b'format="binary">') + 16
    bomb = bomb[:start] + base64.b64encode(sizes) + b"AAAAAAAAAAAAAA==" + bomb[bomb.index(b"</DataArray>") :]
    assert "10 bytes that claim to hold 2147483648" in written(tmp_path, "c.vtp", bomb)
