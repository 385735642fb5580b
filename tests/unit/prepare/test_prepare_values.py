"""Are these HU? Real shapes of values: soft tissue, padding, noise; and what only looks like a scan."""

import numpy as np
import pytest

from app.prepare import Refused, read_scan
from app.prepare.values import map_padding, why_not_hu
from tests import scans

AFFINE = scans.centred((4.0, 4.0, 4.0), (32, 28, 26))


@pytest.fixture
def hu(rng):
    """A noisy CT: air, fat, organs, a little bone."""
    clean = scans.sample(AFFINE, (32, 28, 26)).astype(float)
    clean[14:18, 12:16, :] += 500 * (clean[14:18, 12:16, :] > -200)
    return np.rint(clean + rng.normal(0, 12, clean.shape)).astype(np.int16)


def test_real_values_pass(hu):
    assert why_not_hu(hu) is None
    assert why_not_hu(hu.astype(np.float32) + 0.25) is None
    assert why_not_hu(np.maximum(hu, -1024)) is None


def test_padding_does_not_make_a_scan_rescaled_twice(hu):
    for padding in (-2000, -2048, -3024):
        padded = hu.copy()
        padded[:4] = padding
        padded[-4:] = padding
        assert why_not_hu(padded) is None


def test_plain_synthetic_volumes_pass():
    blocks = np.full((20, 20, 20), -1000, np.int16)
    blocks[5:15, 5:15, 5:15] = 40
    assert why_not_hu(blocks) is None
    blocks[8:12, 8:12, 8:12] = 1000
    assert why_not_hu(blocks) is None


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda hu: np.clip((hu + 1000.0) / 2000, 0, 1).astype(np.float32), "normalised"),
        (lambda hu: (np.clip((hu + 1000.0) / 2000, -1, 1) * 2 - 1).clip(-1, 1).astype(np.float32), "normalised"),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8), "8-bit"),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.int16), "8-bit"),
        (lambda hu: (hu + 1024).clip(0), "no air"),
        (lambda hu: np.clip(hu, -160, 240), "no air"),
        (lambda hu: np.clip(hu, -1000, 60), "windowed"),
        (lambda hu: hu - 1024, "rescaled twice"),
        (lambda hu: np.maximum(hu, -1024) - 1024, "rescaled twice"),
        (lambda hu: np.where(hu < -500, hu, -700).astype(np.int16), "no tissue"),
    ],
)
def test_what_is_no_hu_is_told(hu, made, says):
    assert says in (why_not_hu(made(hu)) or "taken for HU")


def test_mr_like_values_are_refused_and_can_be_overruled(tmp_path, rng):
    mr = np.abs(rng.normal(300, 200, (20, 20, 20))).astype(np.int16)
    scans.write_nifti(tmp_path / "mr.nii", AFFINE, mr)
    with pytest.raises(Refused, match="NOT_HU"):
        read_scan(tmp_path / "mr.nii")
    (volume,) = read_scan(tmp_path / "mr.nii", assume_hu=True)
    assert volume.codes == ["ASSUMED_HU"]
    np.testing.assert_array_equal(volume.hu, mr)


def test_padding_becomes_air_before_anything_else():
    values = np.array([[[-3024.0, np.nan, np.inf, -1400, 50]]], np.float32)
    mapped, findings = map_padding(values)
    np.testing.assert_array_equal(mapped, [[[-1000, -1000, -1000, -1400, 50]]])
    assert findings[0].code == "PADDING_MAPPED" and "3 voxels" in findings[0].message


def test_dicom_padding_value_is_air_and_tissue_values_are_not_padding(tmp_path):
    slices = scans.series(PixelPaddingValue=63)
    for ds in slices:
        stored = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns).copy()
        stored[:, :3] = 63
        ds.PixelData = stored.tobytes()
    (volume,) = read_scan(scans.write_series(tmp_path / "s", slices))
    assert volume.codes == ["PADDING_MAPPED"]
    assert (volume.hu[:3] == -1000).all()
    (volume,) = read_scan(scans.write_series(tmp_path / "t", scans.series(PixelPaddingValue=1074)))
    assert volume.codes == ["OK"]
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    slices = scans.series()
    for number, ds in enumerate(slices):
        slope, intercept = 1 + number % 3, -1024 - 8 * number
        hu = np.frombuffer(ds.PixelData, "<u2").astype(int) - 1024
        ds.PixelData = np.rint((hu - intercept) / slope).astype("<u2").tobytes()
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
    (volume,) = read_scan(scans.write_series(tmp_path / "s", slices))
    truth = scans.sample(volume.affine, volume.hu.shape)
    assert np.abs(volume.hu - truth).max() <= 1.5
    np.testing.assert_array_equal(volume.hu[:, :, ::3], truth[:, :, ::3])


def test_fractional_slopes_are_kept_until_the_grid(tmp_path):
    slices = scans.series(RescaleSlope="0.5", RescaleIntercept="-1024.25")
    (volume,) = read_scan(scans.write_series(tmp_path / "s", slices), assume_hu=True)
    first = np.frombuffer(slices[0].PixelData, "<u2").reshape(32, 36)
    np.testing.assert_allclose(volume.hu[:, :, 0], first.T * 0.5 - 1024.25)


def test_an_overlay_above_the_stored_bits_is_no_part_of_the_value(tmp_path):
    slices = scans.series(BitsStored=12, HighBit=11)
    for ds in slices:
        ds.add_new(0x60020100, "US", 16)  # OverlayBitsAllocated
        ds.add_new(0x60020102, "US", 14)  # OverlayBitPosition
        stored = np.frombuffer(ds.PixelData, "<u2") | 0x4000
        ds.PixelData = stored.astype("<u2").tobytes()
    (volume,) = read_scan(scans.write_series(tmp_path / "s", slices))
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


@pytest.mark.parametrize("signed", [False, True])
def test_values_of_more_bits_than_the_header_tells_are_refused(tmp_path, signed):
    """Ten bits of eleven: tissue would be read as air."""
    slices = scans.series(BitsStored=10, HighBit=9)
    for ds in slices if signed else []:
        hu = np.frombuffer(ds.PixelData, "<u2").astype(np.int16) - 1024
        ds.PixelData, ds.PixelRepresentation, ds.RescaleIntercept = hu.tobytes(), 1, 0
    with pytest.raises(Refused, match="CORRUPT_FILE: values of more than the 10 bits"):
        read_scan(scans.write_series(tmp_path / "s", slices))


def test_a_sign_that_was_not_extended_is_extended(tmp_path):
    slices = scans.series(BitsStored=12, HighBit=11, PixelRepresentation=1, RescaleIntercept=0)
    for ds in slices:
        hu = np.frombuffer(ds.PixelData, "<u2").astype(int) - 1024
        ds.PixelData = (hu & 0xFFF).astype("<u2").tobytes()
    (volume,) = read_scan(scans.write_series(tmp_path / "s", slices))
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


def test_a_series_rescaled_twice_or_never_is_refused(tmp_path):
    with pytest.raises(Refused, match="NOT_HU"):
        read_scan(scans.write_series(tmp_path / "never", scans.series(RescaleIntercept=0)))
    with pytest.raises(Refused, match="NOT_HU"):
        read_scan(scans.write_series(tmp_path / "twice", scans.series(RescaleIntercept=-2048)))
