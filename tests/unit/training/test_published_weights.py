"""Files with published weights: what a stage takes from them, and the one line where it cannot."""

import pytest
import torch

from app.shared.refusals import Refused
from app.training import checkpoints
from networks import make_vqvae
from networks.pretrained import converted
from tests import published_autoencoder as published

SMALL = {"model_channels": 16, "num_blocks": 2, "num_embeddings": 32, "resolution": 24}


@pytest.fixture(scope="module")
def state():
    return published.as_published(published.made((32, 64, 128, 16), blocks=2))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make_vqvae("direct3d_s2", **SMALL)


def refusal(code, function, *args, **options):
    with pytest.raises(Refused) as end:
        function(*args, **options)
    line = str(end.value)
    assert line.startswith(f"{code}: ") and len(line.splitlines()) == 1 and end.value.status == 2, line
    return line


@pytest.mark.parametrize("wrap", [lambda w: {"vae": w, "dit": {}}, lambda w: {"state_dict": w}, lambda w: w])
def test_published_files_fill_encoder_and_decoder_alone(state, network, tmp_path, wrap):
    before = {name: part.clone() for name, part in network.state_dict().items()}
    torch.save(wrap(state), tmp_path / "model_sparse_512.ckpt")
    checkpoints.start_from(network, tmp_path / "model_sparse_512.ckpt", codebook=False)
    own, after = converted(state, network), network.state_dict()
    for name, part in before.items():
        assert torch.equal(after[name], own.get(name, part)), name
        assert name in own or not name.startswith(("encoder.", "decoder.")), name
    weight, kernel = "decoder.upsample.0.act_layers.0.weight", "decoder.upsample.0.act_layers.0.conv.kernel"
    assert torch.equal(after[weight][(0 * 3 + 1) * 3 + 2], state[kernel][(2 * 3 + 1) * 3 + 0].float()), "dx -1, dz +1"


def test_our_own_weights_saved_again_under_vae_are_ours(network, tmp_path):
    other = make_vqvae("direct3d_s2", **SMALL)
    torch.save({"vae": other.state_dict()}, tmp_path / "vae.pth")
    checkpoints.start_from(network, tmp_path / "vae.pth", codebook=False)
    assert torch.equal(network.encoder.out_layer.weight, other.encoder.out_layer.weight)
    assert torch.equal(checkpoints.load_tokenizer(tmp_path / "vae.pth").vq.codebook, other.vq.codebook)


def test_a_misfit_is_one_line_with_the_list_and_nothing_is_loaded(state, tmp_path):
    deeper = make_vqvae("direct3d_s2", **{**SMALL, "num_blocks": 3, "latent_channels": 32})
    before = deeper.encoder.input_layer.weight.clone()
    torch.save({"vae": state}, tmp_path / "v.ckpt")
    line = refusal("WEIGHTS_MISFIT", checkpoints.start_from, deeper, tmp_path / "v.ckpt", codebook=False)
    assert "missing: encoder.blocks.2.attn.to_qkv.weight" in line and "and 8 more" in line
    assert "encoder.out_layer.weight (32, 16) instead of (64, 16)" in line and "--preset direct3d_s2" in line
    assert torch.equal(deeper.encoder.input_layer.weight, before)


def test_several_features_a_voxel_do_not_fit(state, tmp_path):
    windows = make_vqvae("direct3d_s2", **SMALL, features="window")
    torch.save({"vae": state}, tmp_path / "v.ckpt")
    line = refusal("WEIGHTS_MISFIT", checkpoints.start_from, windows, tmp_path / "v.ckpt", codebook=False)
    assert "encoder.input_layer1.weight (32, 1) instead of (32, 4)" in line and "--window_type" in line


def test_another_kind_of_network_names_the_preset(state, tmp_path):
    torch.save({"vae": state}, tmp_path / "v.ckpt")
    tiny = make_vqvae("tiny")
    line = refusal("OTHER_TOKENIZER", checkpoints.start_from, tiny, tmp_path / "v.ckpt", codebook=False)
    assert "has pool children" in line and "Pass --preset direct3d_s2" in line


def test_published_weights_are_no_tokenizer_yet(state, network, tmp_path):
    torch.save({"vae": state}, tmp_path / "v.ckpt")
    for take in (checkpoints.load_tokenizer, lambda path: checkpoints.start_from(network, path, codebook=True)):
        assert "bundles/vq_stage1.json with --pretrained_vae_path" in refusal("NO_CODEBOOK", take, tmp_path / "v.ckpt")


def test_damaged_published_weights_are_refused(state, network, tmp_path):
    name = "encoder.downsample.0.out_layers.0.conv.kernel"
    for part, told in ((torch.full_like(state[name], torch.nan), "no numbers"), ("text", "no plain tensor")):
        torch.save({"vae": {**state, name: part}}, tmp_path / "v.ckpt")
        line = refusal("BAD_CHECKPOINT", checkpoints.start_from, network, tmp_path / "v.ckpt", codebook=False)
        assert told in line and name in line
