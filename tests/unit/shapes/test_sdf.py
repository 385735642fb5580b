"""The command `sdf`: files of signed distance of meshes, labels, organs and scans, in their world."""

import csv
import json
import os

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from app.__main__ import app
from app.dataset import writer
from app.shapes.mesh_files import Mesh, write_mesh
from app.shapes.shape_files import read_shape
from tests.solids import box, box_distance, joined, shuffled, sphere


def sdf(*words):
    done = CliRunner().invoke(app, ["sdf", *map(str, words), "--json", "--workers", "1"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else None, done.stderr


def in_mm(shape):
    return shape.coords @ shape.affine[:3, :3].T + shape.affine[:3, 3]


@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    write_mesh(folder / "ball.ply", Mesh(*sphere(30, (10, 20, 30), n=12)))
    write_mesh(folder / "box.stl", Mesh(*shuffled(box((20, 10, 15), (5, 6, 7)), np.random.default_rng(0))))
    vertices, faces = box((1, 1, 1))
    write_mesh(folder / "open.obj", Mesh(vertices, faces[1:]))
    write_mesh(folder / "crossing.obj", Mesh(*joined(box((2, 2, 2)), box((2, 2, 2), (1.1, 1.2, 1.3)))))
    (folder / "broken.stl").write_bytes(b"solid nothing")
    return folder


def test_a_folder_gives_files_tables_and_lines(meshes, tmp_path):
    status, done, _ = sdf(meshes, tmp_path / "out", "--resolution", "32,64")
    assert status == 3 and (done["ok"], done["refused"]) == (3, 2)
    by_name = {entry["case"]: entry for entry in done["cases"]}
    assert by_name["open"]["codes"] == ["OPEN_MESH"] and "3 edges" in by_name["open"]["message"]
    assert by_name["broken"]["codes"] == ["BAD_MESH"]
    assert by_name["crossing"]["codes"] == ["SELF_CROSSING"] and by_name["crossing"]["sign"] == "winding"
    with open(tmp_path / "out/failures.csv") as stream:
        assert [row["codes"] for row in csv.DictReader(stream)] == ["BAD_MESH", "OPEN_MESH"]
    with open(tmp_path / "out/metadata.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case_id"] for row in rows] == ["ball", "box", "crossing"]
    assert {row["split"] for row in rows} == {"train", "val"} and rows[0]["resolutions"] == "32 64"
    again = sdf(meshes, tmp_path / "out", "--resolution", "32,64")[1]
    assert not any(file["made"] for entry in again["cases"] for file in entry["files"])
    other = sdf(meshes, tmp_path / "out", "--resolution", "32", "--band", "3")[1]
    assert {entry["codes"][0] for entry in other["cases"]} == {"EXISTS", "OPEN_MESH", "BAD_MESH"}


def test_a_relative_path_is_a_path(meshes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, done, said = sdf("meshes/box.stl", "out", "--resolution", "32")
    assert status == 0 and done["cases"][0]["case"] == "box", said


def test_a_second_source_joins_the_first(meshes, tmp_path):
    sdf(meshes / "ball.ply", tmp_path / "out", "--resolution", "32")
    sdf(meshes / "box.stl", tmp_path / "out", "--resolution", "32")
    sdf(meshes / "box.stl", tmp_path / "out", "--resolution", "40")
    with open(tmp_path / "out/metadata.csv") as stream:
        rows = [(row["case_id"], row["resolutions"]) for row in csv.DictReader(stream)]
    assert rows == [("ball", "32"), ("box", "32 40")]


def test_values_are_distances_in_mm_of_the_world(meshes, tmp_path):
    sdf(meshes / "box.stl", tmp_path / "out", "--resolution", "64")
    shape = read_shape(tmp_path / "out/box_r64.npz")
    step = 40 / 0.95 / 64
    assert np.allclose(shape.affine[:3, :3], np.eye(3) * step)
    truth = box_distance(in_mm(shape), (20, 10, 15), (5, 6, 7))
    assert np.abs(shape.values * 4 * step - truth).max() < 1e-4
    assert np.abs(shape.values).max() < 1 and (shape.values < 0).any()
    with np.load(tmp_path / "out/box_r64.npz") as stored:
        assert stored["sparse_sdf"].dtype == np.float32 and stored["sparse_sdf"].shape == (len(truth), 1)
        assert stored["sparse_index"].dtype == np.int32 and int(stored["resolution"]) == 64


def test_an_open_mesh_can_be_had_unsigned(meshes, tmp_path):
    status, done, _ = sdf(meshes / "open.obj", tmp_path / "out", "--resolution", "32", "--unsigned")
    assert status == 0 and done["cases"][0]["codes"] == ["UNSIGNED"]
    shape = read_shape(tmp_path / "out/open_r32.npz")
    assert shape.sign == "none" and shape.values.min() >= 0


def test_overlapping_parts_are_inside_where_either_is(meshes, tmp_path):
    sdf(meshes / "crossing.obj", tmp_path / "out", "--resolution", "64")
    shape = read_shape(tmp_path / "out/crossing_r64.npz")
    points = in_mm(shape)
    either = np.minimum(box_distance(points, (2, 2, 2)), box_distance(points, (2, 2, 2), (1.1, 1.2, 1.3)))
    clear = np.abs(either) > 1e-5
    assert np.array_equal(shape.values[clear] < 0, either[clear] < 0)


def ball_volume(shape=(40, 36, 22), radius=24.0):
    """A ball in a turned, anisotropic volume: voxels of 2 x 2.5 x 4 mm."""
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2, 2.5, 4])
    affine[:3, 3] = [-30, 50, 7]
    center = affine[:3, :3] @ [20.3, 17.8, 11.2] + affine[:3, 3]
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return np.linalg.norm(grid - center, axis=-1) - radius, affine, center


def test_a_level_in_a_scan_is_met_below_a_voxel(tmp_path):
    distance, affine, center = ball_volume()
    hu = np.clip(-40 * distance - 200, -1000, 900).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "scan.nii.gz")
    status, _, said = sdf(tmp_path / "scan.nii.gz", tmp_path / "out", "--hu", "-200", "--resolution", "64")
    assert status == 0, said
    (file,) = (tmp_path / "out").glob("*_hu-200_r64.npz")
    shape = read_shape(file)
    step = np.linalg.norm(shape.affine[:3, 0])
    truth = np.linalg.norm(in_mm(shape) - center, axis=1) - 24
    error = np.abs(shape.values * 4 * step - truth)
    assert error.max() < 0.25  # mm, in voxels of 2 to 4 mm: triangles cut a little off a ball
    assert np.allclose(shape.affine[:3, :3].T @ shape.affine[:3, :3], np.eye(3) * step**2)


def test_each_label_becomes_a_shape_of_its_own(tmp_path):
    distance, affine, center = ball_volume()
    labels = (distance < 0).astype(np.uint8) * 3
    labels[1:4, 1:4, 1:4] = 7
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "organs.nii.gz")
    status, done, said = sdf(tmp_path / "organs.nii.gz", tmp_path / "out", "--resolution", "64")
    assert status == 0, said
    assert [entry["case"] for entry in done["cases"]] == ["organs_label3", "organs_label7"]
    shape = read_shape(tmp_path / "out/organs_label3_r64.npz")
    truth = np.linalg.norm(in_mm(shape) - center, axis=1) - 24
    step = np.linalg.norm(shape.affine[:3, 0])
    error = shape.values * 4 * step - truth
    assert abs(error.mean()) < 0.4 and np.abs(error).max() < 2.5  # mm: a mask knows its surface to half a voxel
    status, done, _ = sdf(tmp_path / "organs.nii.gz", tmp_path / "one", "--label", "5", "--resolution", "64")
    assert status == 3 and "has no label 5, it has 3, 7" in done["cases"][0]["message"]


def test_one_organ_made_before_is_that_of_all_organs(tmp_path):
    organs = {name: np.zeros((24, 24, 24), bool) for name in ("kidney", "liver", "spleen")}
    for start, organ in enumerate(organs.values()):
        organ[4 + 4 * start : 8 + 4 * start, 5:12, 6:14] = True
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    hu = np.full((24, 24, 24), 40, np.int16)
    writer.write_case(tmp_path / "data/set", "case_a", hu, affine=affine, windows=("lung",), organs=organs)
    assert sdf(tmp_path / "data", tmp_path / "out", "--resolution", "24", "--label", "liver")[0] == 0
    status, done, said = sdf(tmp_path / "data", tmp_path / "out", "--resolution", "24")
    assert status == 0 and done["ok"] == 3, said
    assert {e["case"]: e["files"][0]["made"] for e in done["cases"]} == {
        "case_a_kidney": True, "case_a_liver": False, "case_a_spleen": True,
    }  # fmt: skip


def test_what_is_refused_of_one_organ_costs_no_other(tmp_path):
    labels = np.zeros((20, 20, 20), np.uint8)
    for number in (1, 2, 3):
        labels[5 * number - 2 : 5 * number + 1, 5:12, 6:14] = number
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "organs.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/organs_label1_r24.npz").write_bytes(b"mine")
    status, done, _ = sdf(tmp_path / "organs.nii.gz", tmp_path / "out", "--resolution", "24")
    assert status == 3 and {e["case"]: e["codes"] for e in done["cases"]} == {
        "organs_label1": ["DAMAGED_SHAPE"], "organs_label2": ["OK"], "organs_label3": ["OK"],
    }  # fmt: skip
    assert (tmp_path / "out/organs_label1_r24.npz").read_bytes() == b"mine"


def test_organs_of_a_prepared_case_keep_its_world(tmp_path):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = [-60, -70, -80]
    grid = np.indices((40, 40, 40)).transpose(1, 2, 3, 0)
    liver = np.linalg.norm(grid - [18, 20, 22], axis=-1) < 9
    hu = np.where(liver, 60, -1000).astype(np.int16)
    organs = {"liver": liver, "empty": np.zeros_like(liver)}
    writer.write_case(tmp_path / "data/set", "case_a", hu, affine=affine, windows=("lung",), organs=organs)
    status, done, _ = sdf(tmp_path / "data", tmp_path / "out", "--resolution", "40")
    assert status == 3 and {e["case"]: e["codes"][0] for e in done["cases"]} == {
        "case_a_liver": "OK",
        "case_a_empty": "NO_SURFACE",
    }
    shape = read_shape(tmp_path / "out/case_a_liver_r40.npz")
    assert np.allclose(shape.affine, affine)  # the same number of voxels: the same grid
    inside = shape.coords[shape.values < 0]
    assert liver[tuple(inside.T)].all() and not liver[tuple(shape.coords[shape.values > 0].T)].any()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--resolution", "60"], "BAD_VALUE"),
        (["--resolution", "x"], "BAD_VALUE"),
        (["--band", "0"], "BAD_VALUE"),
        (["--label", "1", "--hu", "3"], "BAD_CALL"),
        (["--label", "1"], "BAD_CALL"),  # of meshes
        (["--hu", "nan"], "BAD_VALUE"),
        (["--sharp", "nan"], "BAD_VALUE"),
        (["--sharp", "-5"], "BAD_VALUE"),
    ],
)
def test_a_wrong_call_is_one_line(words, code, meshes, tmp_path):
    status, done, said = sdf(meshes, tmp_path / "out", *words)
    assert status == 2 and done["error"].startswith(f"{code}: ") and said.strip().count("\n") == 0


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "mesh.stl")
    status, done, _ = sdf(tmp_path / "mesh.stl", tmp_path / "out")
    assert status == 2 and done["error"].startswith("NO_SOURCE: ")


def test_a_mesh_smaller_than_numbers_is_a_point(tmp_path):
    vertices, faces = box((1, 1, 1))
    write_mesh(tmp_path / "point.obj", Mesh(vertices * 0, faces))
    text = (tmp_path / "point.obj").read_text()
    (tmp_path / "point.obj").write_text(text.replace("v 0", "v 5e-324", 1))
    status, done, _ = sdf(tmp_path / "point.obj", tmp_path / "out", "--resolution", "16")
    assert status == 3 and done["cases"][0]["codes"] == ["BAD_MESH"]
    assert "its longest side is 4.9" in done["cases"][0]["message"]


def test_edges_of_more_triangles_are_told(tmp_path):
    write_mesh(tmp_path / "beside.obj", Mesh(*joined(box((1, 1, 1)), box((1, 1, 1), (2, 2, 0)))))
    status, done, _ = sdf(tmp_path / "beside.obj", tmp_path / "out", "--resolution", "32")
    assert status == 0 and done["cases"][0]["codes"] == ["NON_MANIFOLD"]
    assert done["cases"][0]["message"].endswith("with more than two triangles: 1")
