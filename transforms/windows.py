"""CT windows: HU to values in -1..1 and back, and the one table of windows.

Pure functions; HU in, HU out unless a name says otherwise.
"""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Num

AIR = -1000  # HU around the patient: the value of padding
SATURATION = 0.02  # a window says little about HU this close to its ends
WINDOWS = MappingProxyType(  # name -> (width, level) in HU; the first four are prepared by default
    {
        "lung": (1500, -600),
        "bone": (1500, 300),
        "soft_tissue": (400, 50),
        "brain": (80, 35),
        "mediastinum": (350, 50),
        "abdomen": (400, 40),
        "liver": (150, 30),
        "angio": (600, 300),
        "subdural": (200, 75),
        "stroke": (40, 40),
    }
)
DEFAULT_WINDOWS = ("lung", "bone", "soft_tissue", "brain")
Number = int | float


def window_bounds(name: str) -> tuple[float, float]:
    """Lowest and highest HU that a named window shows."""
    if name not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {name!r}")
    width, level = WINDOWS[name]
    return level - width / 2, level + width / 2


def window_file_name(name: str, suffix: str = ".npy") -> str:
    """The file that holds this window in a prepared case: lung -> lung_w1500_l-600.npy."""
    window_bounds(name)
    width, level = WINDOWS[name]
    return f"{name}_w{width}_l{level}{suffix}"


def window(hu: Num[np.ndarray, "..."], width: Number, level: Number) -> Float[np.ndarray, "..."]:
    """(HU - (L - W/2)) / W, clipped to 0..1, float32."""
    return np.clip((np.asarray(hu, np.float32) - np.float32(level - width / 2)) / np.float32(width), 0, 1)


def window_values(hu: Num[np.ndarray, "..."], names: Sequence[str]) -> Float[np.ndarray, "... C"]:
    """One channel a window, -1 at its lower end and 1 at its upper end."""
    if not names:
        raise ValueError("windows must name at least one window, got none")
    hu = np.asarray(hu)
    values = np.empty((*hu.shape, len(names)), np.float32)
    for channel, name in enumerate(names):
        window_bounds(name)
        values[..., channel] = window(hu, *WINDOWS[name]) * 2 - 1
    return values


def hu_from_windows(values: Float[np.ndarray, "... C"], names: Sequence[str]) -> Float[np.ndarray, "..."]:
    """HU as shown by the narrowest window that is not near its ends, else by the widest.

    Where all windows are near their lower ends, or all near their upper ends, the end that lies farthest out is
    believed: it need not be the widest's.
    """
    if values.shape[-1] != len(names):
        raise ValueError(f"values must have a channel for each of {list(names)}, got {values.shape[-1]} channels")
    parts = (np.asarray(values, np.float32) + 1) / 2
    lower, upper = np.array([window_bounds(name) for name in names], np.float32).T
    levels = lower + parts * (upper - lower)  # the HU that each window shows
    widths = upper - lower
    low, high = (parts < 0.5).all(-1), (parts > 0.5).all(-1)
    hu = np.where(low, levels.min(-1), np.where(high, levels.max(-1), levels[..., widths.argmax()]))
    for channel in np.argsort(-widths, kind="stable"):  # the narrowest comes last and wins
        inside = (parts[..., channel] > SATURATION) & (parts[..., channel] < 1 - SATURATION)
        hu = np.where(inside, levels[..., channel], hu)
    return hu.astype(np.float32)


def windows_range(names: Sequence[str]) -> tuple[float, float]:
    """Lowest and highest HU that the windows together can show: errors in HU are against truth clipped to it."""
    bounds = [window_bounds(name) for name in names]
    return min(low for low, _ in bounds), max(high for _, high in bounds)
