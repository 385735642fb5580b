"""A scan on the grid of a prepared dataset, and what is said of it."""

from typing import NamedTuple

import numpy as np

from app.prepare.geometry import normalise
from tests import scans


class Upright(NamedTuple):
    hu: np.ndarray
    affine: np.ndarray


def findings_of(hu: np.ndarray, spacing: tuple[float, float, float], size: int) -> list[tuple[str, str]]:
    found = normalise(Upright(hu, scans.centred(spacing, hu.shape)), size, 2.0).findings
    return [(one.code, one.message) for one in found]


def test_a_scan_larger_than_the_grid_is_cut_and_said():
    [(code, message)] = findings_of(np.zeros((60, 20, 20), np.int16), (2.0, 2.0, 2.0), 24)
    assert code == "FOV_CROPPED" and "60.0 %" in message and "36 mm" in message


def test_air_beyond_the_grid_is_no_cut():
    hu = np.full((60, 20, 20), -1000, np.int16)
    hu[20:40] = 0
    assert findings_of(hu, (2.0, 2.0, 2.0), 24) == []


def test_coarse_slices_are_said():
    [(code, message)] = findings_of(np.zeros((20, 20, 20), np.int16), (2.0, 2.0, 9.0), 128)
    assert code == "LOW_RESOLUTION" and "9 mm onto 2 mm" in message
