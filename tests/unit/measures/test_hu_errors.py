"""Errors in HU against numbers worked out by hand, and the card's numbers against the arrays they came from."""

import json
import math

import numpy as np
import pytest

from app.evaluation.tokenizer_evaluation import _mean_of, rate_of_case, shuffled
from app.measures import hu_errors as measure
from app.tokens.code_tables import CodeTables
from app.tokens.token_files import CTTokens, latent_to_voxel, rate_of

SIDE = 24


@pytest.fixture
def truth():
    """A block of soft tissue in air, with a lung, fat and bone inside."""
    hu = np.full((SIDE,) * 3, -1000, np.int16)
    hu[4:20, 4:20, 4:20] = 40
    hu[6:10, 6:10, 6:10] = -800
    hu[12:14, 6:18, 6:18] = -100
    hu[16:18, 8:16, 8:16] = 400
    return hu


def test_tissues_divide_the_grid(truth):
    masks = measure.tissue_masks(truth, spacing=4.0)
    parts = np.stack([mask for name, mask in masks.items() if name != "foreground"])
    assert (parts.sum(0) == 1).all()
    assert np.array_equal(masks["foreground"], ~masks["air"])
    assert masks["lung"].sum() == 64 and masks["fat"].sum() == 2 * 12 * 12 and masks["bone"].sum() == 2 * 8 * 8
    assert masks["foreground"].sum() == 16**3


def test_errors_are_those_of_each_tissue(truth):
    masks = measure.tissue_masks(truth, spacing=4.0)
    recon = truth.astype(np.float32)
    recon[masks["lung"]] += 30
    recon[masks["bone"]] -= np.where(np.arange(128) % 2, 100, 50)
    errors = measure.errors_in_hu(truth, recon, masks, windows=("lung", "bone"))
    assert errors["lung"] == {"mae": 30.0, "rmse": 30.0}
    assert errors["bone"] == pytest.approx({"mae": 75.0, "rmse": math.sqrt((100**2 + 50**2) / 2)})
    assert errors["fat"] == errors["air"] == {"mae": 0.0, "rmse": 0.0}
    assert errors["foreground"]["mae"] == pytest.approx((64 * 30 + 128 * 75) / 16**3)
    assert "air-tissue border" not in errors  # no voxel, no number


def test_dropped_voxels_count(truth):
    masks = measure.tissue_masks(truth, spacing=4.0)
    recon = truth.astype(np.float32)
    recon[4:12, 4:20, 4:20] = -1024
    errors = measure.errors_in_hu(truth, recon, masks, windows=("lung", "bone"))
    assert errors["lung"]["mae"] == 224.0
    assert errors["soft tissue"]["mae"] > 400


def test_what_no_window_can_tell_is_clipped_on_both_sides(truth):
    truth[16:18, 8:16, 8:16] = 3000
    masks = measure.tissue_masks(truth, spacing=4.0)
    recon = np.where(truth == 3000, 1050, np.where(truth == -1000, -1024, truth)).astype(np.float32)
    errors = measure.errors_in_hu(truth, recon, masks, windows=("bone",))  # tells -450 to 1050
    assert errors["bone"]["mae"] == 0 and errors["air"]["mae"] == 0
    # bone and lung lie beyond it
    assert measure.clipped_share(truth, masks["foreground"], windows=("bone",)) == pytest.approx((128 + 64) / 16**3)
    assert measure.clipped_share(truth, masks["foreground"], windows=("lung", "bone")) == pytest.approx(128 / 16**3)


def test_window_scores(truth):
    body = measure.tissue_masks(truth, spacing=4.0)["foreground"]
    recon = truth.astype(np.float32) + 20
    scores = measure.errors_by_window(truth, recon, body, windows=("soft_tissue", "lung"))
    inside = body & (truth > -150) & (truth < 250)  # elsewhere both are clipped to the same
    assert scores["soft_tissue"]["mae"] == pytest.approx(20 * inside.sum() / body.sum())
    assert scores["soft_tissue"]["psnr"] == pytest.approx(20 * math.log10(400 / scores["soft_tissue"]["rmse"]))
    assert scores["soft_tissue"]["data_range"] == 400 and scores["lung"]["data_range"] == 1500
    same = measure.errors_by_window(truth, truth, body, windows=("lung",))["lung"]
    assert same["ssim"] == pytest.approx(1) and same["mae"] == 0
    noise = np.random.default_rng(0).normal(0, 200, truth.shape)
    assert measure.errors_by_window(truth, truth + noise, body, windows=("lung",))["lung"]["ssim"] < 0.8


def test_label_share_finds_the_place_on_another_grid():
    label = np.zeros((40, 40, 40), bool)
    label[10:20, 10:20, 10:20] = True
    kept = np.zeros((20, 20, 20), bool)
    kept[5:10, 5:10, 5:8] = True  # twice as coarse: of ten planes along z six
    coarse = np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] = 0.5  # centres of pairs
    assert measure.label_share(kept, label, label_affine=np.eye(4), affine=coarse) == pytest.approx(0.6)
    assert math.isnan(measure.label_share(kept, label & False, label_affine=np.eye(4), affine=coarse))
    moved = np.eye(4)
    moved[0, 3] = 1000  # outside the grid nothing is kept
    assert measure.label_share(kept, label, label_affine=moved, affine=coarse) == 0


def test_rate_counts_all_that_a_decoder_needs():
    tokens = CTTokens(
        codes=np.zeros((8, 2), np.int32),
        coords=np.argwhere(np.ones((2, 2, 2), bool)).astype(np.int32),
        latent_shape=(4, 4, 4),
        affine=latent_to_voxel(),
        source_shape=(1, 1, 1),
        source_affine=np.eye(4),
        features="window",
        windows=("lung",),
        spacing=1.0,
        keep="body",
        tokenizer="",
        support=(np.full(8, 1, np.uint8), np.full(8, 1, np.uint8), np.full(8, 1, np.uint8)),
    )
    tables = CodeTables("", 256, (None, None))
    counted = rate_of(tokens, tables)
    found = rate_of_case(tokens, tables, foreground=1000)
    bits = counted.packed.cells + counted.packed.codes + counted.packed.header
    assert counted.plain.cells == 2 * 8 and counted.plain.codes == 8 * 2 * 8 and counted.plain.support == 8 * 24
    assert found["bits"] == bits and 8 * 2 * 8 <= counted.packed.codes < 8 * 2 * 8 + 64
    assert found["bits_per_voxel"] == pytest.approx(bits / 32**3)
    assert found["bits_per_foreground_voxel"] == pytest.approx(bits / 1000)
    assert found["support_per_foreground_voxel"] == pytest.approx(counted.packed.support / 1000) != 0
    assert found["compression_of_16_bit"] == pytest.approx(16 * 32**3 / bits)


def test_means_and_intervals_are_over_the_cases_that_have_a_value():
    rows = [{"a": 1.0, "b": {"c": 2.0}}, {"a": 3.0, "b": {"c": float("nan")}}, {"a": 5.0, "b": {}}]
    found = _mean_of(rows, 0)
    assert found["a"]["mean"] == 3 and 1 <= found["a"]["low"] < 3 < found["a"]["high"] <= 5
    assert found["b"]["c"] == {"mean": 2.0, "low": None, "high": None, "cases": 1}
    assert _mean_of([{"a": float("nan")}], 0)["a"]["mean"] is None


def test_shuffling_keeps_the_codes_and_moves_them():
    codes = np.arange(100, dtype=np.int32)
    assert sorted(shuffled(codes)) == list(codes) and (shuffled(codes) != codes).mean() > 0.9
    assert np.array_equal(shuffled(codes), shuffled(codes))
    pairs = np.stack([codes, codes + 7], 1)
    assert (np.diff(shuffled(pairs), axis=1) == 7).all()  # levels of a latent stay together


def test_card_holds_no_nan():
    from app.measures.report import plain

    assert json.dumps(plain({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}), allow_nan=False)
