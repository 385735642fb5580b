"""HU windows: the formula, the table, and the way back to HU."""

import numpy as np
import pytest

from transforms.windows import (
    DEFAULT_WINDOWS,
    WINDOWS,
    hu_from_windows,
    window,
    window_file_name,
    window_values,
    windows_range,
)


def test_a_window_is_the_formula_of_the_contract():
    hu = np.array([-2000, -1350, -600, -225, 150, 900], np.int16)
    assert np.allclose(window(hu, 1500, -600), [0, 0, 0.5, 0.75, 1, 1])
    assert window(hu, 1500, -600).dtype == np.float32
    assert np.allclose(window_values(hu, ["lung"])[:, 0], [-1, -1, 0, 0.5, 1, 1])


def test_file_names_are_exactly_those_of_the_contract():
    assert [window_file_name(name) for name in DEFAULT_WINDOWS] == [
        "lung_w1500_l-600.npy",
        "bone_w1500_l300.npy",
        "soft_tissue_w400_l50.npy",
        "brain_w80_l35.npy",
    ]


def test_an_unknown_window_names_those_there_are():
    with pytest.raises(ValueError, match=r"window must be one of lung, bone, .*, got 'lungs'"):
        window_values(np.zeros(3), ["lungs"])
    with pytest.raises(ValueError, match="at least one window"):
        window_values(np.zeros(3), [])


@pytest.mark.parametrize("names", [DEFAULT_WINDOWS, ("lung", "bone"), ("bone", "brain", "lung"), ("soft_tissue",)])
def test_hu_survive_the_round_trip_inside_the_union_of_the_windows(names):
    low, high = windows_range(names)
    hu = np.arange(int(low), int(high) + 1)
    assert np.abs(hu_from_windows(window_values(hu, names), names) - hu).max() < 0.02


def test_hu_beyond_the_windows_come_back_as_the_nearest_end():
    hu = np.array([-3000, 3000])
    assert hu_from_windows(window_values(hu, DEFAULT_WINDOWS), DEFAULT_WINDOWS).tolist() == [-1350, 1050]


def test_the_narrowest_open_window_is_believed():
    lung, brain = (35 + 1350) / 1500 * 2 - 1, 0.25  # brain says 45 HU, lung says 35
    assert np.isclose(hu_from_windows(np.array([[lung, brain]], np.float32), ["lung", "brain"])[0], 45, atol=1e-3)
    nearly_shut = 2 * 0.985 - 1  # within 0.02 of the end: the wide window is asked
    assert np.isclose(hu_from_windows(np.array([[lung, nearly_shut]], np.float32), ["lung", "brain"])[0], 35, atol=1e-2)


def test_channels_must_match_names():
    with pytest.raises(ValueError, match="got 3 channels"):
        hu_from_windows(np.zeros((5, 3), np.float32), ["lung", "bone"])


def test_the_table_of_windows_cannot_be_changed():
    with pytest.raises(TypeError):
        WINDOWS["mine"] = (1, 1)
