"""Pictures that a run makes: one row a case with input, reconstruction, difference and code map."""

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
    columns = ("input", "reconstruction", "difference", "codes")
    figure = Figure(figsize=(2.4 * len(columns), 2.4 * len(samples) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(samples), len(columns), squeeze=False)
    grey = matplotlib.colormaps["gray"].with_extremes(bad="black")
    change = matplotlib.colormaps["coolwarm"].with_extremes(bad="black")
    kinds = matplotlib.colormaps["turbo"].with_extremes(bad="black")
    for row, sample in zip(axes, samples, strict=True):
        images = (sample.image, sample.recon, sample.recon - sample.image, sample.codes)
        looks = ((grey, -1, 1), (grey, -1, 1), (change, -1, 1), (kinds, None, None))
        for axis, image, (colours, low, high) in zip(row, images, looks, strict=True):
            middle = image.shape[1] // 2
            axis.imshow(image[::-1, middle].T, origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="none")
            axis.set_axis_off()
        row[0].text(0.02, 0.02, sample.case_id, color="white", fontsize=6, transform=row[0].transAxes)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(f"{name} ({window})" if name == "input" else name, fontsize=8)
    figure.savefig(path, dpi=110)
