"""Shapes and CT each have tokenizers of their own: what is given to the other is told in one line what it takes."""

import nibabel
import numpy as np
import pytest

from app.evaluation.tokenizer_evaluation import TokenizerEvaluation
from app.serving.served import Served
from app.shapes.mesh_files import Mesh, write_mesh
from app.shapes.sdf import Settings, make_shapes
from app.shared.refusals import Refused
from app.tokens.commands import reconstruct, tokenize
from app.tokens.open_scan import scan_source
from app.tokens.tokenizer import CTTokenizer
from tests.solids import box, sphere
from tests.tiny_tokenizer import AFFINE, hu_volume, make_shape_network, save


@pytest.fixture(scope="module")
def of_shapes(tmp_path_factory):
    return save(make_shape_network(), tmp_path_factory.mktemp("shapes") / "run")


@pytest.fixture
def meshes(tmp_path):
    write_mesh(tmp_path / "meshes/ball.stl", Mesh(*sphere(30)))
    write_mesh(tmp_path / "meshes/ball.obj", Mesh(*box((10, 20, 30))))
    return tmp_path / "meshes"


def one_line(code, call, *args, **options):
    with pytest.raises(Refused) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert line.startswith(f"{code}: ") and "\n" not in line and caught.value.status == 2, line
    return line


def test_a_shape_for_a_tokenizer_of_ct_names_what_reads_it(output_dir, meshes, tmp_path):
    make_shapes(meshes / "ball.stl", tmp_path / "sdf", Settings(resolutions=(32,)))
    for source, name in ((meshes / "ball.stl", "ball.stl"), (meshes, "ball.obj"), (tmp_path / "sdf", "ball_r32.npz")):
        line = one_line("OTHER_TOKENIZER", tokenize, source, tmp_path / "out", tokenizer=output_dir)
        assert f"{name} is a shape" in line and "bundles/sdf_vqvae.json" in line
    one_line("OTHER_TOKENIZER", scan_source, meshes / "ball.stl")  # as ask and the server open it
    assert not (tmp_path / "out").exists()


def test_codes_of_shapes_are_not_refined(of_shapes, meshes, tmp_path):
    line = one_line("BAD_VALUE", tokenize, meshes / "ball.stl", tmp_path / "out", tokenizer=of_shapes, refine=3)
    assert "codes of shapes are not refined" in line and not (tmp_path / "out").exists()
    one_line("BAD_VALUE", TokenizerEvaluation(tokenizer=str(of_shapes), refine=3).run)


def test_a_volume_for_a_tokenizer_of_shapes_names_sdf(of_shapes, tmp_path):
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "scan.nii.gz")
    for source in (tmp_path / "scan.nii.gz", tmp_path):
        line = one_line("NO_CASES", tokenize, source, tmp_path / "out", tokenizer=of_shapes)
        assert f"python -m app sdf {source} OUT --resolution 32" in line


def test_meshes_of_one_name_keep_tokens_of_their_own(of_shapes, meshes, tmp_path):
    done = tokenize(meshes, tmp_path / "out", tokenizer=of_shapes)
    assert [case["case"] for case in done["cases"]] == ["ball_obj", "ball_stl"] and done["ok"] == 2
    first, second = (CTTokenizer.from_pretrained(of_shapes).read(case["tokens"]) for case in done["cases"])
    assert first.source_hash != second.source_hash and not np.array_equal(first.codes, second.codes)


def test_tokens_of_a_shape_for_a_tokenizer_of_ct(of_shapes, output_dir, meshes, tmp_path):
    tokenize(meshes / "ball.stl", tmp_path / "ball.npz", tokenizer=of_shapes)
    done = reconstruct(tmp_path / "ball.npz", tmp_path / "back", tokenizer=output_dir)
    assert done["cases"][0]["codes"] == ["OTHER_TOKENIZER"] and done["ok"] == 0


def test_a_viewer_is_served_no_tokenizer_of_shapes(of_shapes):
    line = one_line("BAD_TOKENIZER", Served, tokenizer=str(of_shapes))
    assert "reads shapes" in line and "exported bundle" in line
