"""A volume through its tokens, as MONAI's inference feeds it: HU on its own grid in, the same out."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from app.tokens.open_scan import Volume
from app.tokens.through_tokens import ReadScand, ThroughTokens
from app.tokens.tokenizer import CTTokenizer, chain_of
from app.tokens.volumes import onto_grid, write_nifti
from tests import tiny_tokenizer as tiny


@pytest.fixture(scope="module")
def network():
    return tiny.make_network()


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    write_nifti(path, Volume(tiny.hu_volume(), tiny.AFFINE))
    return path


def test_what_leaves_is_what_tokenize_and_reconstruct_make(network, scan):
    volume = ReadScand("image")({"image": str(scan)})["image"]
    assert volume.shape == (1, *tiny.SHAPE) and np.allclose(volume.affine, tiny.AFFINE)
    back = ThroughTokens(chain_of(network.sizes))(volume[None], network)
    ct = CTTokenizer(network, digest="")
    expected = np.rint(onto_grid(ct.decode(ct.encode(scan)), tiny.SHAPE, tiny.AFFINE).hu)
    assert isinstance(back, MetaTensor) and back.shape == (1, 1, *tiny.SHAPE)
    assert np.array_equal(back[0, 0].numpy(), expected) and np.allclose(back.affine, tiny.AFFINE)


def test_the_chain_that_is_given_is_the_one_that_runs(network, scan):
    """Half of the lung's values: another chain than the tokenizer's own gives another volume."""

    def halved(item):
        return {**item, "feats": item["feats"] * [0.5, *[1] * (item["feats"].shape[1] - 1)]}

    volume = ReadScand("image")({"image": str(scan)})["image"][None]
    own = chain_of(network.sizes)
    assert not np.array_equal(ThroughTokens([*own, halved])(volume, network), ThroughTokens(own)(volume, network))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda hu: hu / 4000, "HU"),
        (lambda hu: np.clip((hu + 1000) / 8, 0, 255).round(), "8-bit"),
        (lambda hu: hu[:, :, 0], "shape|X, Y, Z"),
    ],
)
def test_what_is_no_volume_in_hu_is_refused(network, made, reason):
    values = torch.from_numpy(np.asarray(made(tiny.hu_volume().astype(np.float32)), np.float32))
    with pytest.raises(ValueError, match=reason):
        ThroughTokens(chain_of(network.sizes))(
            MetaTensor(values[None, None], affine=torch.from_numpy(tiny.AFFINE)), network
        )


def test_a_volume_without_a_place_is_refused(network):
    with pytest.raises(ValueError, match="affine"):
        ThroughTokens(chain_of(network.sizes))(torch.zeros(1, 1, 8, 8, 8), network)


def test_no_scan_is_told(network):
    with pytest.raises(ValueError, match="--scan"):
        ReadScand("image")({"image": None})
