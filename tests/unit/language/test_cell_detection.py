"""A detector of findings in cells: it learns where they lie, says it in a mirror too, and is read before the rest."""

import numpy as np
import pytest
import torch

from app.language import cell_detection
from app.language.cell_detection import LOCATED, cells_of_findings, fit, phantom_detector
from app.language.volume_tokens import SHOWN, Reducer, TokenSource
from app.phantoms.phantoms import make_phantom
from app.phantoms.sentences import mirrored
from app.tokens.open_scan import as_it_lies
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from networks.cell_detector import MOST, CellDetector
from networks.projector import Projector


@pytest.fixture(scope="module")
def ct_tokenizer():
    torch.manual_seed(0)
    sizes = {"resolution": 48, "spacing": 8.0, "latent_channels": 16, "num_embeddings": 16, "num_blocks": 1}
    return CTTokenizer(make_vqvae("tiny", **sizes), digest="a" * 64)


@pytest.fixture(scope="module")
def cells():
    """Cells of which a tenth holds a finding that one number of their vector tells, on one side alone."""
    made = torch.Generator().manual_seed(0)
    feats, coords = torch.randn(30_000, 6, generator=made), torch.randint(10, (30_000, 3), generator=made)
    held = (feats[:, 2] > 1) & (coords[:, 0] >= 5)
    return feats, coords, torch.stack([held, feats[:, 4] < -1.5], 1).float()


@pytest.fixture(scope="module")
def detector(cells):
    made = CellDetector(6, 2, grid=10)
    fit(made, *cells, seed=0)
    return made


def test_it_finds_what_a_vector_and_its_place_tell(cells, detector):
    feats, coords, found = cells
    told = detector(feats, coords) > 0
    assert (told == found.bool()).float().mean() > 0.97
    other = coords.clone()
    other[:, 0] = 9 - other[:, 0]
    assert (detector(feats, other)[:, 0] > 0)[found[:, 0] == 1].float().mean() < 0.5  # the same on the other side


def test_learning_is_a_function_of_its_seed_and_leaves_the_runs_own_chance_alone(cells):
    torch.manual_seed(3)
    before, made = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        made.append(CellDetector(6, 2, grid=10))
        torch.set_rng_state(before)
        fit(made[-1], *(part[:600] for part in cells), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (one.layers[0].weight for one in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("crowded", [False, True])
def test_findings_lie_in_the_cells_that_hold_them(ct_tokenizer, crowded):
    found = 0
    for seed in range(3):
        phantom = make_phantom(
            seed, size=ct_tokenizer.sizes.resolution, spacing=ct_tokenizer.sizes.spacing, crowded=crowded
        )
        tokens = ct_tokenizer.encode(as_it_lies(phantom.hu, phantom.affine))
        held = cells_of_findings(tokens, phantom.findings, LOCATED)
        for kind, column in zip(LOCATED, held.T, strict=True):
            centres = [c for f in phantom.findings if f["finding"] == kind for c in f["center_mm"]]
            found += len(centres)
            cells = (tokens.affine[:3, :3] @ tokens.coords[column > 0].T).T + tokens.affine[:3, 3]
            assert len(cells) <= len(centres)
            half = 4 * tokens.spacing + 1e-6
            near = [(np.abs(cells - centre) <= half).all(1).any() for centre in centres if len(cells)]
            assert np.mean(near or [True]) > 0.8  # one on the rim may lie in a cell that was not kept
    assert found


def test_a_crowded_phantom_is_another_of_the_same_kind():
    plain, crowded = (make_phantom(4, size=32, spacing=12.0, crowded=crowded) for crowded in (False, True))
    counts = [
        sum(f["count"] for seed in range(12) for f in make_phantom(seed, size=32, spacing=12.0, crowded=more).findings)
        for more in (False, True)
    ]
    assert counts[1] > 3 * counts[0]
    assert plain.hu.shape == crowded.hu.shape


def test_a_mirror_moves_findings_to_the_other_side():
    finding = {"finding": "nodule", "side": "left", "center_mm": [[-40.0, 5.0, 60.0]]}
    assert mirrored([finding], places=True) == [{**finding, "side": "right", "center_mm": [[40.0, 5.0, 60.0]]}]
    assert mirrored([finding])[0]["center_mm"] == finding["center_mm"]


@pytest.mark.parametrize("budget", [200, 40, 17, 3, 1])
def test_the_likeliest_cells_come_first_and_whole_within_the_budget(cells, detector, budget):
    feats, places = cells[0][:300], torch.stack(torch.meshgrid(*[torch.arange(7)] * 3, indexing="ij"), -1)
    coords = places.reshape(-1, 3)[:300]
    reduce = Reducer(lambda codes: codes, width=6, max_tokens=budget, detector=detector)
    told = reduce.rows(feats, coords)
    assert len(told.feats) <= budget and told.feats.shape[1] == 8
    count = min(SHOWN, (budget - 1) // 2)
    logits = detector(feats, coords)
    for kind in range(2):
        best = logits[:, kind].topk(count).indices
        shown = slice(kind * count, (kind + 1) * count)
        assert torch.equal(told.feats[shown, :6], feats[best]) and torch.equal(told.coords[shown], coords[best].int())
    assert int(told.weights[2 * count :].sum()) == 300  # the rest stands for the whole volume
    assert told.feats[:, 6:].min() >= 0 and told.feats[:, 6:].max() <= MOST * float(detector.spread.mean()) + 1e-4


def test_it_is_made_once_and_kept_with_the_tokens(ct_tokenizer, tmp_path, monkeypatch, caplog):
    source = TokenSource(ct_tokenizer, cache_dir=tmp_path)
    lookup = ct_tokenizer.network.vq.lookup
    first = phantom_detector(source, lookup, count=2, seed=0)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(cell_detection, "fit", None)
        again = phantom_detector(source, lookup, count=2, seed=0)
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    (file,) = source.cache_dir.glob("detector_*.pt")
    file.write_bytes(b"damaged")
    whole = phantom_detector(source, lookup, count=2, seed=0)
    assert "damaged" in caplog.text and torch.equal(whole.layers[0].weight, first.layers[0].weight)


def test_a_projector_carries_it_and_old_ones_load_without(detector):
    projector = Projector(8, 16, detector=detector)
    state = projector.state_dict()
    assert {"proj.weight", "proj.bias", "detector.mean"} <= set(state)
    other = Projector(8, 16, detector=CellDetector(6, 2, grid=10))
    other.load_state_dict(state)
    assert torch.equal(other.detector.layers[4].bias, detector.layers[4].bias)
    assert set(Projector(6, 16).state_dict()) == {"proj.weight", "proj.bias"}
