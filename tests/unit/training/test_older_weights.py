"""Weights from before halving kept the place of children load, and give to the bit of a float what they gave."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from app.shared.refusals import Refused
from app.training import checkpoints
from app.training.step import to_train
from networks import make_vqvae
from networks.presets import Preset
from networks.sparse import SparseTensor
from transforms.grid import RESAMPLER

SIZES = {"resolution": 16, "model_channels": 16, "num_blocks": 2, "num_embeddings": 32, "window": 2}
SIZES |= {"num_heads": 4, "latent_channels": 8}
# Sums and sums of squares of latents and values, the codes and the subdivision loss, as the software before gave them.
GIVEN = {
    ("tiny", "mean", "sample"): (
        (-1.682318091392517, 14.029635533566495, -117.676158194663, 995.2308562920792),
        [30, 12, 18, 0, 18, 0, 0, 0],
        1.5544967651367188,
    ),
    ("tiny", "mean", "voxel"): (
        (-1.6495163142681122, 14.372478759513939, -117.67615737882443, 995.2308518613711),
        [30, 12, 12, 0, 18, 0, 0, 0],
        1.5547295808792114,
    ),
    ("direct3d_s2", "legacy", "sample"): (
        (-1.859292447566986, 19.38149301241829, -63.977302875660826, 22.053417599673438),
        [30, 0, 0, 0, 6, 0, 0, 31],
        1.5132023096084595,
    ),
}


def filled(network):
    """Weights by formula, so that no generator of random numbers has a say."""
    for number, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        if tensor.dtype.is_floating_point:
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + number)
            if tensor.ndim > 1:
                wave *= 1.4 / math.sqrt(tensor.numel() / tensor.shape[-1])
            else:
                wave = 0.5 * wave + float(name.endswith("weight"))
            tensor.copy_(wave.view(tensor.shape))
    return network.eval()


def body(channels):
    grid = torch.ones(16, 16, 16).nonzero()
    kept = F.pad(grid[(grid - torch.tensor((7, 8, 7))).square().sum(1) < 40], (1, 0))
    feats = torch.sin(torch.arange(len(kept) * channels, dtype=torch.float32)).view(-1, channels)
    return SparseTensor(feats, kept, (16,) * 3, 1)


@pytest.fixture(params=GIVEN, ids="-".join)
def older(request, tmp_path):
    """A checkpoint as it was written before, and what its network gave."""
    name, pool, norm = request.param
    extra = {"widths": (8, 8, 8)} if name == "direct3d_s2" else {}
    network = filled(make_vqvae(name, **SIZES, **extra, pool=pool, norm=norm))
    state = network.state_dict()
    told = json.loads(bytes(state["_extra_state"].tolist()))
    assert told["pool"] == pool
    torch.save(state, tmp_path / "older.pt")
    return tmp_path / "older.pt", GIVEN[request.param]


@torch.no_grad()
def test_older_weights_load_by_what_they_say_of_themselves_and_give_what_they_gave(older):
    file, (sums, codes, subdivision) = older
    network = checkpoints.load_tokenizer(file)
    x = body(network.sizes.in_channels)
    out = network(x)
    given = [part for rows in (out.latents.feats, out.recon.feats) for part in (rows.double(), rows.double().square())]
    for part, expected in zip(given, sums, strict=True):
        assert float(part.sum()) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert network.encode(x).codes.tolist() == codes
    assert float(out.subdivision) == pytest.approx(subdivision, rel=1e-5)


def test_weights_say_what_brought_their_data_onto_the_grid_and_older_ones_do_not():
    network = make_vqvae("tiny", **SIZES)
    older = network.state_dict()["_extra_state"]
    assert "resampler" not in json.loads(bytes(older.tolist()))  # their hash stays what it was
    newer = to_train(network, device="cpu", learns=["vq"]).state_dict()["_extra_state"]
    assert json.loads(bytes(newer.tolist()))["resampler"] == RESAMPLER
    network.set_extra_state(older)
    assert network.sizes.resampler == RESAMPLER


def test_a_run_goes_on_by_the_resampler_it_began_with(tmp_path):
    sizes = make_vqvae("tiny", **SIZES).sizes
    assert sizes.resampler == ""
    with pytest.raises(
        Refused, match=r"OTHER_RESAMPLER: .* the resampler before it was recorded, .*triangle 1. .*init_from"
    ):
        checkpoints.check_resampler(sizes, source=tmp_path)
    with pytest.raises(Refused, match="resampled by triangle 0, this software resamples by triangle 1"):
        checkpoints.check_resampler(sizes.changed(resampler="triangle 0"), source=tmp_path)
    checkpoints.check_resampler(sizes.changed(resampler=RESAMPLER), source=tmp_path)
    checkpoints.check_resampler(sizes.changed(prepared=(16, sizes.spacing)), source=tmp_path)  # nothing was resampled


def test_weights_of_older_data_are_taken_over_with_one_line(older, caplog):
    file, _ = older
    network = checkpoints.load_tokenizer(file)
    checkpoints.start_from(network, file, codebook=True)
    told = "older.pt learned from data resampled by an older rule, this run's are by triangle 1"
    of_scans = network.sizes.features == "window"  # distances come from no resampler
    assert [record.message for record in caplog.records] == [told] * of_scans


def test_a_halving_that_nobody_knows_is_refused():
    stored = {**json.loads(bytes(make_vqvae("tiny").sizes.to_tensor().tolist())), "pool": "median"}
    with pytest.raises(ValueError, match="pool must be one of children, mean, legacy, got 'median'"):
        Preset.from_tensor(torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8))
