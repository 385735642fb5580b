"""Meshes all the way: to signed distance, a tokenizer trained on it, tokens, and meshes in mm again."""

import json
import shutil
import sys

import numpy as np
import pytest
from monai.bundle import verify_metadata
from typer.testing import CliRunner

from app.__main__ import app
from app.export.export import export
from app.shapes.mesh_files import Mesh, read_mesh, write_mesh
from app.tokens.tokenizer import CTTokenizer
from tests.e2e.test_export import ALONE, COMMAND, alone, ended_well
from tests.runs import ROOT, TINY, assert_same_story, rows_of, run_in, told_by, torchrun
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
    config = str(ROOT / "bundles/evaluate_tokenizer.json")
    ended = run_in(trained, config, run_id="run", **dict.fromkeys(TINY), **given)
    assert ended.status == 0, ended.err
    card = json.loads((trained / "card/tokenizer_card.json").read_text())
    before, after = (card["ways"][way] for way in ("before quantising", "after, stored support"))
    assert 0 < before["distance_voxels"] < 2 and before["dice"] > 0.7 and before["normals"] > 0.5
    assert 0 < after["distance_voxels"] < 3
    assert "| before quantising |" in (trained / "card/tokenizer_card.md").read_text()


def test_a_card_of_one_level_is_of_its_codes_alone(trained):
    given = {"dataset_dir": trained / "sdf", "tokenizer": trained / "out"}
    config = str(ROOT / "bundles/evaluate_tokenizer.json")
    cards = {}
    for levels in (1, 2):
        options = {**dict.fromkeys(TINY), **given, "levels": levels, "output_dir": trained / f"card{levels}"}
        assert run_in(trained, config, run_id="run", **options).status == 0
        cards[levels] = json.loads((trained / f"card{levels}/tokenizer_card.json").read_text())
    assert [len(cards[levels]["codes"]["used"]) for levels in (1, 2)] == [1, 2]
    one, two = (cards[levels]["ways"] for levels in (1, 2))
    assert one["before quantising"] == two["before quantising"]
    assert one["after, stored support"] != two["after, stored support"]
    refused = run_in(trained, config, run_id="run", **{**options, "levels": 3})
    assert refused.status == 2 and refused.error.startswith("BAD_VALUE: levels must lie in 1..2"), refused.err


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


def test_all_of_it_learns_on_from_its_weights(trained):
    """Stage 2, which lies over the same file; without those weights it names the file that makes them."""
    both = f"['{CONFIG}','{ROOT / 'bundles/sdf_stage2.json'}']"
    given = {"dataset_dir": trained / "sdf", "resolution": 32, "max_steps": 4, "i_save": 4, "val_interval": 4}
    given |= {"spacing": None, "learning_rate": 0.001}
    missing = run_in(trained, both, **given, init_from=trained / "none", output_dir=trained / "no")
    assert missing.status == 2 and "bundles/sdf_vqvae.json" in missing.error, missing.err
    ended = run_in(trained, both, **given, init_from=trained / "out", output_dir=trained / "stage2")
    assert ended.status == 0 and [row["step"] for row in rows_of(trained / "stage2")][-1] == 4, ended.err
    before, after = (CTTokenizer.from_pretrained(trained / name).network.state_dict() for name in ("out", "stage2"))
    for part in ("encoder.", "decoder.", "vq.", "subdivision."):
        names = [name for name in before if name.startswith(part) and before[name].is_floating_point()]
        assert any((before[name] != after[name]).any() for name in names), part


@pytest.fixture(scope="module")
def exported(trained):
    out = trained / "bundle"
    return out, export(out, tokenizer=trained / "out")


def test_an_exported_tokenizer_of_shapes_is_proven_and_described(exported):
    out, told = exported
    assert told["proof"]["equal"] == {"read": 1.0, "loaded": 1.0} and told["proof"]["tokens"] > 3
    configs = out / "configs"
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(configs / "meta_schema_20240725.json"))
    described = json.loads((configs / "metadata.json").read_text())
    assert described["task"] == "shape tokenizer" and described["tokenizer"]["features"] == "sdf"
    assert "hounsfield" not in json.dumps(described)
    card = (out / "docs/README.md").read_text()
    assert "--shape MESH" in card and "HU" not in card and "--resolution 32" in card


def test_its_bundle_takes_a_mesh_to_tokens_and_back_wherever_it_lies(exported, trained, tmp_path):
    config = exported[0] / "configs" / "inference.json"
    words = ["--shape", trained / "meshes/s1.stl", "--output_dir", tmp_path / "out"]
    alone(COMMAND, tmp_path / "else", "run", "--config_file", config, *words)
    status, done, _ = command(
        "tokenize", trained / "meshes/s1.stl", tmp_path / "s1.npz", "--tokenizer", trained / "out"
    )
    assert status == 0
    status, done, _ = command("reconstruct", tmp_path / "s1.npz", tmp_path / "s1.ply", "--tokenizer", trained / "out")
    assert status == 0, done
    here, there = (read_mesh(file) for file in (tmp_path / "s1.ply", tmp_path / "out/s1.ply"))
    assert np.array_equal(here.faces, there.faces) and np.abs(here.vertices - there.vertices).max() < 1e-4
    ours = CTTokenizer.from_pretrained(exported[0])
    assert np.array_equal(ours.read(tmp_path / "out/s1.npz").codes, ours.read(tmp_path / "s1.npz").codes)


def test_its_bundle_trains_on_and_judges_the_owners_shapes(exported, trained, tmp_path):
    shapes = ["--dataset_dir", trained / "sdf"]
    words = ["--output_dir", tmp_path / "out", "--max_steps", "2", "--i_save", "2", "--val_interval", "2"]
    words += ["--i_log", "1", "--num_workers", "0"]
    config = exported[0] / "configs"
    alone(COMMAND, tmp_path / "else", "run", "training", "--config_file", config / "train.json", *shapes, *words)
    assert [row["step"] for row in rows_of(tmp_path / "out")][-1] == 2
    words = ["--output_dir", tmp_path / "card"]
    alone(COMMAND, tmp_path / "else", "run", "--config_file", config / "evaluate.json", *shapes, *words)
    card = json.loads((tmp_path / "card/tokenizer_card.json").read_text())
    assert card["tokenizer"]["sha256"] == exported[1]["tokenizer"]


def with_a_second_to_judge(shapes, out):
    """A process each has to have one: the first of those to learn from is also there under another name."""
    shutil.copytree(shapes, out)
    table = (out / "metadata.csv").read_text().splitlines()
    learned = next(line for line in table if ",train," in line)
    name = learned.split(",")[0]
    (out / "metadata.csv").write_text("\n".join([*table, learned.replace(name, "s9").replace("train", "val"), ""]))
    for file in out.glob(f"{name}_r*.npz"):
        shutil.copy(file, out / file.name.replace(name, "s9"))
    return out


def test_its_overlay_trains_in_two_processes_as_one_would(exported, trained, tmp_path):
    """Two ranks (gloo, on CPUs) of the bundle's own code, each with half of what one process takes a step."""
    configs, place = exported[0] / "configs", tmp_path / "else"
    shapes = with_a_second_to_judge(trained / "sdf", tmp_path / "sdf")
    words = ["--dataset_dir", shapes, "--max_steps", "2", "--i_save", "2", "--val_interval", "2"]
    words += ["--i_log", "1", "--num_workers", "0", "--max_shift", "0"]
    one = ["--batch_size_per_gpu", "2", "--output_dir", tmp_path / "one"]
    alone(COMMAND, place, "run", "training", "--config_file", configs / "train.json", *words, *one)
    (place / "bundle.py").write_text(ALONE + COMMAND)
    both = ["run", "training", "--config_file", f"['{configs / 'train.json'}','{configs / 'multi_gpu_train.json'}']"]
    call = [*torchrun(), place / "bundle.py", *both, *words, "--batch_size_per_gpu", "1"]
    ended_well([sys.executable, "-I", "-B", *map(str, call), "--output_dir", str(tmp_path / "two")], place)
    assert_same_story(told_by(tmp_path / "two"), told_by(tmp_path / "one"))
