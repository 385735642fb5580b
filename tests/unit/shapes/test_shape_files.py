"""Files of signed distance: read as written, refused where damaged or not plausible."""

import numpy as np
import pytest

from app.shapes.bands import check_surface, mesh_affine, shape_of
from app.shapes.mesh_files import Mesh
from app.shapes.shape_files import Provenance, read_provenance, read_shape, write_shape
from app.shared.refusals import Refused
from tests.solids import box

MADE = Provenance("ab" * 32, "[4.0]", ("OK",))


@pytest.fixture
def shape():
    surface = check_surface(Mesh(*box((3, 2, 1))))
    return shape_of(surface, mesh_affine(surface.mesh, 32), resolution=32, sharp_degrees=30)


def test_a_file_says_what_was_written_in_the_same_bytes(shape, tmp_path):
    write_shape(tmp_path / "a.npz", shape, MADE)
    write_shape(tmp_path / "b.npz", shape, MADE)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = read_shape(tmp_path / "a.npz")
    for name in ("coords", "values", "affine", "sharp"):
        assert np.array_equal(getattr(again, name), getattr(shape, name))
    assert (again.resolution, again.band, again.sign) == (32, 4.0, "parity")
    assert read_provenance(tmp_path / "a.npz") == MADE


def test_sharp_voxels_lie_within_two_voxels_of_an_edge(shape):
    step = np.linalg.norm(shape.affine[:3, 0])
    points = np.abs(shape.coords @ shape.affine[:3, :3].T + shape.affine[:3, 3])
    half = np.array([3, 2, 1.0])
    to_edges = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        beyond = np.maximum(points[:, axis] - half[axis], 0)
        to_edges.append(np.sqrt(beyond**2 + ((points - half)[:, others] ** 2).sum(1)))
    near = np.min(to_edges, axis=0) / step
    clear = np.abs(near - 2) > 1e-4
    assert np.array_equal(shape.sharp[clear].astype(bool), near[clear] < 2) and shape.sharp.any()


def test_files_of_others_need_three_arrays_alone(tmp_path):
    index = np.argwhere(np.ones((8, 8, 8), bool))
    np.savez(tmp_path / "a.npz", sparse_sdf=np.linspace(-1, 1, 512), sparse_index=index, resolution=64)
    shape = read_shape(tmp_path / "a.npz")
    assert shape.resolution == 64 and shape.values.dtype == np.float32
    assert read_provenance(tmp_path / "a.npz") == Provenance()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sparse_index": np.full((4, 3), 64)}, "leaves 0..63"),
        ({"sparse_sdf": np.full((4, 1), 1.5)}, r"sparse_sdf leaves -1..1"),
        ({"sparse_sdf": np.full((4, 1), np.nan)}, r"sparse_sdf leaves -1..1"),
        ({"sparse_sdf": np.zeros((3, 1))}, r"floats \(4, 1\)"),
        ({"resolution": 10**9}, "resolution must be 8 to 4096"),
        ({"affine": np.zeros((4, 4))}, "invertible"),
        ({"sparse_index": None}, "it has no 'sparse_index'"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, says, tmp_path):
    arrays = {"sparse_sdf": np.zeros((4, 1)), "sparse_index": np.eye(4, 3, dtype=int), "resolution": 64, **changes}
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(Refused, match=says) as refused:
        read_shape(tmp_path / "a.npz")
    assert refused.value.code == "DAMAGED_SHAPE"


def test_damaged_bytes_are_a_refusal(shape, tmp_path, rng):
    write_shape(tmp_path / "a.npz", shape, MADE)
    whole = (tmp_path / "a.npz").read_bytes()
    for _ in range(60):
        changed = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.4 else whole)
        for place in rng.integers(0, len(changed), 5):
            changed[place] = rng.integers(256)
        (tmp_path / "b.npz").write_bytes(bytes(changed))
        try:
            read_shape(tmp_path / "b.npz")
        except Refused as refused:
            assert refused.code == "DAMAGED_SHAPE" and "\n" not in str(refused)
