"""Meshes all the way: to signed distance, a tokenizer trained on it, tokens, and meshes in mm again."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from app.__main__ import app
from app.shapes.mesh_files import Mesh, read_mesh, write_mesh
from tests.runs import ROOT, run_in
from tests.solids import sphere

CONFIG = str(ROOT / "bundles/sdf_vqvae.json")

pytestmark = pytest.mark.slow  # half a minute: the fast set has the parts one by one


def command(*words):
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "meshes").mkdir()
    for number in range(3):
        vertices, faces = sphere(30 + number, n=10)
        stretched = vertices * [1 + 0.2 * number, 1, 1] + [100, -50, 20 * number]
        write_mesh(folder / f"meshes/s{number}.stl", Mesh(stretched, faces))
    status, done, _ = command("sdf", folder / "meshes", folder / "sdf", "--resolution", "32,16", "--workers", 1)
    assert (status, done["ok"]) == (0, 3)
    given = {"warmup_steps": 40, "max_steps": 10, "i_save": 10, "val_interval": 10, "i_sample": 10, "max_shift": 0}
    given |= {"dataset_dir": folder / "sdf", "output_dir": folder / "out", "resolution": 32, "factors": "[1,2]"}
    ended = run_in(folder, CONFIG, **given, spacing=None, learning_rate=0.01)
    assert ended.status == 0, ended.err
    return folder


def test_a_tokenizer_of_shapes_gives_meshes_in_the_mm_of_the_source(trained):
    status, done, said = command(
        "tokenize", trained / "meshes", trained / "tokens", "--tokenizer", trained / "out", "--support"
    )
    assert (status, done["ok"]) == (0, 3), said
    status, done, said = command("reconstruct", trained / "tokens", trained / "back", "--tokenizer", trained / "out")
    assert (status, done["ok"]) == (0, 3), said
    for number in range(3):
        mesh, source = (
            read_mesh(trained / f"{part}/s{number}.{end}") for part, end in (("back", "ply"), ("meshes", "stl"))
        )
        step = np.ptp(source.vertices, axis=0).max() / 0.95 / 32
        for end in (np.min, np.max):
            assert (
                np.abs(end(mesh.vertices, axis=0) - end(source.vertices, axis=0)).max() < 4 * step
            )  # 50 steps: somewhere in the band


def test_its_card_tells_distances_before_and_after_quantising(trained):
    given = {"dataset_dir": trained / "sdf", "tokenizer": trained / "out", "output_dir": trained / "card"}
    ended = run_in(
        trained,
        str(ROOT / "bundles/evaluate_tokenizer.json"),
        run_id="run",
        **given,
        **dict.fromkeys(
            ("scale", "resolution", "spacing", "num_embeddings", "model_channels", "num_blocks", "batch_size_per_gpu",
             "i_print", "i_log")
        ),
    )  # fmt: skip
    assert ended.status == 0, ended.err
    card = json.loads((trained / "card/tokenizer_card.json").read_text())
    before, after = (card["ways"][way] for way in ("before quantising", "after, stored support"))
    assert 0 < before["distance_voxels"] < 2 and before["dice"] > 0.7 and before["normals"] > 0.5
    assert 0 < after["distance_voxels"] < 3
    assert "| before quantising |" in (trained / "card/tokenizer_card.md").read_text()


def test_what_does_not_go_together_is_one_line(trained):
    status, done, _ = command(
        "reconstruct", trained / "tokens/s0.npz", trained / "a.nii.gz", "--tokenizer", trained / "out"
    )
    assert status == 2 and done["error"].startswith("NO_OUTPUT: this tokenizer's output ends in .stl, .obj, .ply")
    command("sdf", trained / "meshes/s0.stl", trained / "fine", "--resolution", "64")
    status, done, _ = command(
        "tokenize", trained / "fine/s0_r64.npz", trained / "b.npz", "--tokenizer", trained / "out"
    )
    assert status == 3 and done["cases"][0]["codes"] == ["OTHER_TOKENIZER"]
