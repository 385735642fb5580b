"""The letters of a picture's sides: a reader must not have to guess which one is the patient's right."""

from typing import Any

VIEWS = {  # letters at the left, right, top and bottom of a picture as radiologists look at it
    "axial": "RLAP",
    "coronal": "RLSI",
    "sagittal": "PASI",
}


def write_sides(axes: Any, view: str) -> None:
    """Letters at the edges of matplotlib axes, readable on black and on white."""
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    box = {"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 0.8}
    for letter, (x, y, across, along) in zip(VIEWS[view], places, strict=True):
        look = {"color": "white", "fontsize": 6, "ha": across, "va": along, "bbox": box}
        axes.text(x, y, letter, transform=axes.transAxes, **look)
