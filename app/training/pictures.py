"""Pictures that a run makes: one row a case with all PICTURES (input, reconstruction, difference, codes).

The first case is shown in every window, the others in the first.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from app.shared.sides import write_sides
from networks.sparse import SparseTensor
from transforms.windows import WINDOWS


class Sample(NamedTuple):
    """The middle coronal plane of one validation case; outside the kept voxels NaN."""

    case_id: str
    windows: tuple[str, ...]  # a name a channel; none where channels are no windows
    image: Float[np.ndarray, "C X Z"]  # -1..1
    recon: Float[np.ndarray, "C X Z"]
    codes: Float[np.ndarray, "x z"]


def sample_of(output: dict) -> Sample:
    """The first case of a `ValidationStep` output."""

    def plane(x: SparseTensor, values) -> np.ndarray:
        dense = x.replace(values[:, None].float()).dense(fill=float("nan"))[0, 0]
        return dense[:, dense.shape[1] // 2].cpu().numpy()

    x, recon, latents = output["input"], output["recon"], output["latents"]
    codes = output["codes"] if output["codes"] is not None else latents.feats[:, 0]
    if codes.ndim == 2:  # of several levels the first, which says most
        codes = codes[:, 0]
    channels = range(x.feats.shape[1])  # one at a time: a dense volume is large
    return Sample(
        output["case_id"][0],
        tuple(output["windows"]) if len(output["windows"]) == len(channels) else (),
        np.stack([plane(x, x.feats[:, c]) for c in channels]),
        np.stack([plane(recon, recon.feats[:, c]) for c in channels]),
        plane(latents, codes),
    )


class Picture(NamedTuple):
    """A column: its values of a sample's channel, whose window is `half` HU to either side, and its colours."""

    values: Callable[[Sample, int, float], Float[np.ndarray, "A B"]]
    look: Callable[[float], dict[str, Any]]
    has_scale: bool = False


def _colours(name: str) -> Any:
    return matplotlib.colormaps[name].with_extremes(bad="black")


def _grey(_half: float) -> dict[str, Any]:
    return {"cmap": _colours("gray"), "vmin": -1, "vmax": 1}


PICTURES = MappingProxyType(
    {
        "input": Picture(lambda sample, channel, _: sample.image[channel], _grey),
        "reconstruction": Picture(lambda sample, channel, _: sample.recon[channel], _grey),
        "difference": Picture(
            lambda sample, channel, half: (sample.recon[channel] - sample.image[channel]) * half,
            lambda half: {"cmap": _colours("coolwarm"), "vmin": -half, "vmax": half},
            has_scale=True,
        ),
        "codes": Picture(lambda sample, *_: sample.codes, lambda _half: {"cmap": _colours("turbo")}),
    }
)


def montage(samples: list[Sample], path: Path, *, title: str) -> UInt8[np.ndarray, "H W 3"]:
    """Coronal slices, patient upright and seen from the front, as PNG; gives its pixels."""
    rows = [(sample, c) for at, sample in enumerate(samples) for c in range(len(sample.image) if at == 0 else 1)]
    figure = Figure(figsize=(2.5 * len(PICTURES), 2.4 * len(rows) + 0.5), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), len(PICTURES), squeeze=False)
    for line, (sample, channel) in zip(axes, rows, strict=True):
        _draw_row(figure, line, sample, channel)
    for axis, name in zip(axes[0], PICTURES, strict=True):
        axis.set_title(name, fontsize=8)
    canvas.print_png(str(path))
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_row(figure: Figure, axes: np.ndarray, sample: Sample, channel: int) -> None:
    name = sample.windows[channel] if sample.windows else f"channel {channel}"
    half, unit = (WINDOWS[name][0] / 2, "HU") if sample.windows else (1, "of the features")
    for axis, picture in zip(axes, PICTURES.values(), strict=True):
        image, look = picture.values(sample, channel, half), picture.look(half)
        shown = axis.imshow(image[::-1].T, origin="lower", interpolation="none", **look)
        axis.set_axis_off()
        write_sides(axis, "coronal")
        if picture.has_scale:
            scale = figure.colorbar(shown, ax=axis, shrink=0.8, ticks=[-half, 0, half])
            scale.ax.tick_params(labelsize=6)
            scale.set_label(f"{unit}, red: too high", fontsize=6)
    label = f"{sample.case_id}\n{name}"
    look = {"color": "white", "fontsize": 6, "va": "top", "bbox": {"facecolor": "black", "alpha": 0.55, "pad": 0.8}}
    axes[0].text(0.02, 0.98, label, transform=axes[0].transAxes, **look)
