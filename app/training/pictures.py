"""Pictures that a run makes: one row a case with input, reconstruction, difference and code map."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from networks.sparse import SparseTensor


class Sample(NamedTuple):
    """One validation case on its dense grids; outside the kept voxels NaN."""

    case_id: str
    image: Float[np.ndarray, "X Y Z"]  # the first window, -1..1
    recon: Float[np.ndarray, "X Y Z"]
    codes: Float[np.ndarray, "x y z"]


class Panel(NamedTuple):
    """A column of the picture."""

    title: str
    image: Callable[[Sample], np.ndarray]  # [x, y, z]
    colours: str  # a colour map of matplotlib
    low: float | None = None  # the value of its first colour; None: the image's lowest
    high: float | None = None


PANELS = (
    Panel("input ({window})", lambda sample: sample.image, "gray", -1, 1),
    Panel("reconstruction", lambda sample: sample.recon, "gray", -1, 1),
    Panel("difference", lambda sample: sample.recon - sample.image, "coolwarm", -1, 1),
    Panel("codes", lambda sample: sample.codes, "turbo"),
)


def sample_of(output: dict) -> Sample:
    """The first case of a `ValidationStep` output, in its first window."""

    def dense(x: SparseTensor, values) -> np.ndarray:
        return x.replace(values[:, None].float()).dense(fill=float("nan"))[0, 0].cpu().numpy()

    x, recon, latents = output["input"], output["recon"], output["latents"]
    codes = output["codes"] if output["codes"] is not None else latents.feats[:, 0]
    if codes.ndim == 2:  # of several levels the first, which says most
        codes = codes[:, 0]
    return Sample(
        output["case_id"][0],
        dense(x, x.feats[:, 0]),
        dense(recon, recon.feats[:, 0]),
        dense(latents, codes),
    )


def montage(samples: list[Sample], path: Path, *, window: str, title: str) -> None:
    """Coronal slices, patient upright and seen from the front, as PNG."""
    figure = Figure(figsize=(2.4 * len(PANELS), 2.4 * len(samples) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(samples), len(PANELS), squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        for axis, panel in zip(row, PANELS, strict=True):
            image, colours = panel.image(sample), matplotlib.colormaps[panel.colours].with_extremes(bad="black")
            look = {"cmap": colours, "vmin": panel.low, "vmax": panel.high, "interpolation": "none"}
            axis.imshow(image[::-1, image.shape[1] // 2].T, origin="lower", **look)
            axis.set_axis_off()
        row[0].text(0.02, 0.02, sample.case_id, color="white", fontsize=6, transform=row[0].transAxes)
    for axis, panel in zip(axes[0], PANELS, strict=True):
        axis.set_title(panel.title.format(window=window), fontsize=8)
    figure.savefig(path, dpi=110)
