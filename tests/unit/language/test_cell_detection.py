"""A detector of findings in cells: it learns where they lie, says it in a mirror too, and is read before the rest."""

import copy

import numpy as np
import pytest
import torch

from app.language import cell_detection
from app.language.cell_detection import FIRST_CROWDED, cells_of_findings, fit, phantom_detector
from app.language.phantom_text import phantom_named
from app.language.volume_tokens import Reducer, TokenSource
from app.phantoms.phantoms import make_phantom
from app.phantoms.sentences import mirrored
from app.tokens.open_scan import as_it_lies
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from networks.cell_detector import SHOWN, SOFTNESS, CellDetector
from networks.projector import Projector
from networks.tokens import TokenSequence


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
        kinds = ("nodule", "kidney stone")
        held = cells_of_findings(tokens, phantom.findings, kinds)
        for kind, column in zip(kinds, held.T, strict=True):
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


@pytest.fixture
def volume(cells):
    """Vectors and places of 300 cells of one volume, in no order."""
    places = torch.stack(torch.meshgrid(*[torch.arange(7)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return cells[0][:300], places[torch.randperm(343, generator=torch.Generator().manual_seed(1))[:300]]


def reducer(detector, *, budget):
    return Reducer(lambda codes: codes, width=6, max_tokens=budget, detector=detector)


@pytest.mark.parametrize("budget", [400, 200, 40, 17, 3, 1])
def test_the_likeliest_cells_of_each_half_come_first_and_whole_within_the_budget(volume, detector, budget):
    feats, coords = volume
    told = reducer(detector, budget=budget).rows(feats, coords)
    assert len(told.feats) <= budget and told.feats.shape[1] == 6 + detector.num_numbers
    count, first = min(SHOWN, (budget - 1) // 4), int(told.weights.gt(1).int().argmax()) if budget < 300 else 12
    numbers, shown = (detector(feats, coords) / SOFTNESS).sigmoid() * detector.weight, told.feats[:first, 6:8]
    for half in (lambda coords: coords[:, 0] < detector.grid / 2, lambda coords: coords[:, 0] >= detector.grid / 2):
        of_all, of_shown = numbers[half(coords)], shown[half(told.coords[:first])]
        for kind in range(2):
            most = of_all[:, kind].topk(count).values
            assert torch.allclose(of_shown[:, kind].topk(count).values, most)
    assert {tuple(row) for row in told.feats[:first, :6].tolist()} <= {tuple(row) for row in feats.tolist()}
    assert int(told.weights.sum()) == 300  # each cell once


def test_numbers_of_the_whole_stand_beside_every_token_half_by_half(volume, detector):
    feats, coords = volume
    told = reducer(detector, budget=40).rows(feats, coords)
    numbers = (detector(feats, coords) / SOFTNESS).sigmoid() * detector.weight
    left = coords[:, 0] < detector.grid / 2
    most = [numbers[half].topk(SHOWN, 0).values for half in (left, ~left)]
    whole = torch.cat([part - detector.weight for m in most for part in (2 * m[0], m.sum(0))])
    assert torch.allclose(told.feats[:, 8:], whole.expand(len(told.feats), -1), atol=1e-5)
    assert most[1][0, 0] > most[0][0, 0]  # the first kind lies on one side alone


def test_a_half_without_cells_holds_nothing(volume, detector):
    feats, coords = volume
    told = reducer(detector, budget=40).rows(feats[:50], coords[:50] % torch.tensor([5, 7, 7]))
    assert torch.allclose(told.feats[:, 12:], -detector.weight)


def test_where_the_likeliest_cells_are_made_featureless_the_whole_holds_less(volume, detector):
    """Else an answer would rest on no place at all: the others' numbers would say it still."""
    reduce = reducer(detector, budget=40)
    told = reduce.rows(*volume)
    rows = torch.zeros(len(told.feats), dtype=torch.bool)
    rows[:SHOWN] = True  # of the first kind in the lower half
    without = reduce.without(told, rows)
    assert torch.equal(without.feats[~rows, :8], told.feats[~rows, :8]) and torch.equal(without.coords, told.coords)
    assert (without.feats[:, 8] < told.feats[:, 8]).all()
    plain = Reducer(lambda codes: codes, width=6, max_tokens=40)
    told = plain.rows(*volume)
    without = plain.without(told, torch.arange(len(told.feats)) < SHOWN)
    assert torch.allclose(without.feats[:SHOWN], told.feats.mean(0)) and without.feats.shape == told.feats.shape


def test_fluid_lies_in_many_cells_of_its_side(ct_tokenizer):
    """Where it is, is known by points in it."""
    cells_seen = 0
    for seed in range(6):
        phantom = make_phantom(seed, size=48, spacing=8.0)
        tokens = ct_tokenizer.encode(as_it_lies(phantom.hu, phantom.affine))
        for findings in (phantom.findings, mirrored(phantom.findings, places=True)):
            effusions = [finding for finding in findings if finding["finding"] == "pleural effusion"]
            for finding in effusions:
                held = cells_of_findings(tokens, [finding], ["pleural effusion"])[:, 0] > 0
                x = tokens.affine[0, 0] * tokens.coords[held, 0] + tokens.affine[0, 3]
                assert held.any() and (x * {"right": 1, "left": -1}[finding["side"]] > 0).all()
                cells_seen += int(held.sum())
    assert cells_seen > 20


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


def test_no_phantom_that_a_language_model_learns_from_teaches_it(ct_tokenizer, tmp_path):
    source = TokenSource(ct_tokenizer, cache_dir=tmp_path)
    phantom_detector(source, ct_tokenizer.network.vq.lookup, count=3, seed=0)
    numbers = {FIRST_CROWDED + at for at in range(3)}
    for split in ("train", "tune", "val"):
        assert not numbers & {phantom_named(split, at, seed=0)[1] for at in range(10_000)}
    assert not [*source.cache_dir.glob("phantom_*")] and len([*source.cache_dir.glob("crowded_*")]) == 9


def test_it_drops_hidden_numbers_while_it_learns_alone(detector, generator):
    feats, coords = torch.randn(50, detector.in_features, generator=generator), torch.zeros(50, 3, dtype=torch.long)
    assert not detector.training and torch.equal(detector(feats, coords), detector(feats, coords))
    learning = copy.deepcopy(detector).train()
    assert not torch.equal(learning(feats, coords), learning(feats, coords))


def test_a_model_learns_to_read_all_numbers_and_few_vectors_the_same_for_the_same_sample(detector, generator):
    made = TokenSequence(
        torch.randn(400, detector.in_features + detector.num_numbers, generator=generator),
        torch.zeros(400, 3, dtype=torch.int32),
        torch.ones(400, dtype=torch.long),
    )
    reduce = Reducer(lambda codes: codes, width=detector.in_features, detector=detector)
    once, again, other = (reduce.to_learn_from(made, seed=seed) for seed in (1, 1, 2))
    vectors, numbers = once.feats.tensor_split([detector.in_features], 1)
    hidden = (vectors == detector.mean).all(1)
    assert torch.equal(numbers, made.feats[:, detector.in_features :])
    assert torch.equal(vectors[~hidden], made.feats[~hidden, : detector.in_features])
    assert 0.65 < hidden.float().mean() < 0.85
    assert torch.equal(once.feats, again.feats) and not torch.equal(once.feats, other.feats)
    alone = Reducer(lambda codes: codes, width=detector.in_features)
    assert alone.to_learn_from(made, seed=1) is made


def test_a_projector_carries_it_and_old_ones_load_without(detector):
    projector = Projector(8, 16, detector=detector)
    state = projector.state_dict()
    assert {"proj.weight", "proj.bias", "detector.mean"} <= set(state)
    other = Projector(8, 16, detector=CellDetector(6, 2, grid=10))
    other.load_state_dict(state)
    assert torch.equal(other.detector.layers[4].bias, detector.layers[4].bias)
    assert set(Projector(6, 16).state_dict()) == {"proj.weight", "proj.bias"}
