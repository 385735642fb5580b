"""Stage 1 on published weights through its bundle: the codebook is trained, what was published stays."""

import pytest
import torch

from app.shapes.mesh_files import Mesh, write_mesh
from app.shapes.sdf import Settings, make_shapes
from networks import make_vqvae
from networks.pretrained import converted
from tests import published_autoencoder as published
from tests.runs import ROOT, assert_refused, rows_of, run_in, weights_of
from tests.solids import sphere

STEPS = {"max_steps": 2, "i_save": 1, "val_interval": 2, "i_sample": 100, "num_embeddings": 4}
ONE_FEATURE = {"preset": "direct3d_s2", "window_type": "bone"}


def trained(place, cohort, sizes, **settings):
    """A run of stage 1 on a published file of these widths, and what the file holds."""
    state = published.as_published(published.made(*sizes, blocks=settings.get("num_blocks") or 4))
    torch.save({"vae": state, "dit": {}}, place / "model_sparse_512.ckpt")
    given = {**STEPS, **ONE_FEATURE, "pretrained_vae_path": "model_sparse_512.ckpt", **settings}
    return run_in(place, dataset_dir=cohort, output_dir="out", **given), state


def assert_encoder_and_decoder_stayed(out, state, network, *, used=4):
    first, last = weights_of(out, 1), weights_of(out, 2)
    for name, part in converted(state, network).items():
        assert torch.equal(part, first[name]) and torch.equal(part, last[name]), name
    for name in ("vq.embeddings.weight", "subdivision.0.weight"):
        assert not torch.equal(first[name], last[name]), name
    assert rows_of(out)[-1]["val_codes_used"] >= used
    assert not rows_of(out, "warmup"), "no autoencoder is trained where weights are given"


def test_stage_1_trains_a_codebook_on_published_weights(place, cohort):
    end, state = trained(place, cohort, ((32, 64, 128, 16),), num_blocks=1, quantizer_levels=1)
    assert end.status == 0, end.err
    assert "published weights: 68 tensors" in (place / "out/log.txt").read_text()
    network = make_vqvae("direct3d_s2", model_channels=16, num_blocks=1, num_embeddings=4)
    assert_encoder_and_decoder_stayed(place / "out", state, network)


def test_weights_that_do_not_fit_end_the_run_in_one_line(place, cohort):
    end, _ = trained(place, cohort, ((32, 64, 128, 16),), num_blocks=1, latent_channels=8)
    assert_refused(end, code="WEIGHTS_MISFIT", naming=["encoder.out_layer.weight (32, 16) instead of (16, 16)"])


def test_shapes_train_a_codebook_on_published_weights(place):
    """What these weights were made for: signed distance, one value a voxel."""
    for number in range(4):
        vertices, faces = sphere(30, n=10)
        write_mesh(place / f"meshes/s{number}.stl", Mesh(vertices * [1, 1, 1 + number], faces))
    make_shapes(place / "meshes", place / "shapes", Settings(resolutions=(32,)), workers=1)
    state = published.as_published(published.made((32, 64, 128, 16), blocks=1))
    torch.save({"vae": state}, place / "sparse.ckpt")
    given = {"preset": "direct3d_s2", "resolution": 32, "spacing": None, "norm": "sample", "num_blocks": 1}
    given |= {"pretrained_vae_path": "sparse.ckpt", "quantizer_levels": 1, "learning_rate": 0.01, **STEPS}
    end = run_in(place, str(ROOT / "bundles/sdf_vqvae.json"), dataset_dir="shapes", output_dir="out", **given)
    assert end.status == 0, end.err
    network = make_vqvae("direct3d_s2", model_channels=16, num_blocks=1, num_embeddings=4)
    assert_encoder_and_decoder_stayed(place / "out", state, network, used=2)  # of one shape


@pytest.mark.slow
def test_stage_1_trains_a_codebook_on_published_weights_of_their_full_width(place, cohort):
    end, state = trained(place, cohort, (), model_channels=None, num_blocks=None, quantizer_levels=1)
    assert end.status == 0, end.err
    assert_encoder_and_decoder_stayed(place / "out", state, make_vqvae("direct3d_s2", num_embeddings=4))
