"""Codecs at given bits: read off between the two settings on either side, on the very voxels that are judged."""

import numpy as np
import pytest
from scipy import ndimage

from app.measures import codecs
from tests.benchmarks.bench_codecs import bits_at_error


@pytest.fixture
def scan(rng):
    """A smooth body in air, and where it is."""
    hu = ndimage.gaussian_filter(rng.normal(size=(60, 50, 40)), 3) * 2000
    body = np.zeros(hu.shape, bool)
    body[10:50, 5:45, 4:36] = True
    return np.where(body, np.clip(hu, -1000, 1000), -1024).astype(np.float32), body


@pytest.fixture
def make(scan):
    truth, body = scan

    def errors(hu):
        difference = hu[body] - truth[body]
        return {"mae": float(np.abs(difference).mean()), "rmse": float(np.sqrt((difference**2).mean()))}

    return lambda kind: kind(truth, body, hu_range=(-1350, 1050), judge=errors)


@pytest.mark.parametrize("kind", ["Jpeg2000", "Hevc"])
def test_more_bits_lose_less_and_a_number_of_bits_lies_between_its_settings(make, kind):
    if kind == "Hevc":
        pytest.importorskip("av")
    codec = make(getattr(codecs, kind))
    points = [codec.at_bits(bits) for bits in (10_000, 20_000, 30_000)]
    assert points[0].errors["mae"] > points[1].errors["mae"] > points[2].errors["mae"] > 0
    for bits, point in zip((10_000, 20_000, 30_000), points, strict=True):
        assert len(point.settings) == 2 and point.bits[0] <= bits < point.bits[1]
        sides = [codec.at(setting)[1]["mae"] for setting in point.settings]
        assert min(sides) <= point.errors["mae"] <= max(sides)


def test_beyond_what_a_codec_can_do_its_coarsest_is_told(make):
    pytest.importorskip("av")
    codec = make(codecs.Hevc)
    point = codec.at_bits(10)
    assert point.settings == (51,) and point.bits[0] > 10
    assert bits_at_error(codec, "mae", 1e6) is None


def test_the_bits_of_an_error_are_those_at_which_it_is_made(make):
    pytest.importorskip("av")
    codec = make(codecs.Hevc)
    at = codec.at_bits(20_000)
    assert bits_at_error(codec, "mae", at.errors["mae"]) == pytest.approx(20_000, rel=1e-3)


def test_more_bits_than_a_codec_can_use_are_its_finest(make):
    point = make(codecs.Jpeg2000).at_bits(10_000_000)
    assert point.settings == (1.0,) and point.errors["rmse"] < 1.0


def test_all_bits_and_little_loss_at_a_low_ratio(make):
    bits, errors = make(codecs.Jpeg2000).at(1.0)
    assert errors["rmse"] < 1.0 and bits < 12 * 40 * 40 * 32


def test_frames_stand_side_by_side_and_come_apart_again(rng):
    for number in (1, 2, 7, 12):
        frames = rng.integers(0, 4095, (number, 9, 14)).astype(np.uint16)
        image, across = codecs._side_by_side(frames)
        assert image.shape[0] % 9 == image.shape[1] % 14 == 0 and image.size < 2 * frames.size + 9 * 14
        assert np.array_equal(codecs._apart(image, across, frames.shape), frames)


@pytest.mark.parametrize("sides", [(9, 7, 3), (20, 20, 4)])
def test_a_body_smaller_than_openjpeg_takes_is_coded_all_the_same(rng, sides):
    hu = rng.integers(-900, 400, sides).astype(np.int16)
    coded = codecs.Jpeg2000(
        hu, np.ones(sides, bool), hu_range=(-1000.0, 500.0), judge=lambda got: {"mae": abs(got - hu).mean()}
    )
    bits, errors = coded.at(1.0)
    assert bits > 0 and errors["mae"] < 0.5
