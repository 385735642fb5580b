"""A picture of a prepared case: three slices in each window, the body's outline, the voxels kept."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from app.shared.atomic_files import written_whole
from app.shared.sides import write_sides
from transforms.body import body_mask
from transforms.sparse import keep_mask
from transforms.windows import WINDOWS, window

MOST = 256  # pixels a side: a larger volume is thinned for the picture
UNFINISHED_PREVIEW = re.compile(r"\.\d+\.[^.].*\.png")  # as `written_whole` calls one before its rename
KEPT = "body"  # the sparsification that training uses by default


def path_of(folder: str | Path, case: str) -> Path:
    return Path(folder) / "previews" / f"{case}.png"


def write_preview(
    folder: str | Path, case: str, hu: Int[np.ndarray, "X Y Z"], windows: Sequence[str], spacing: float
) -> None:
    """previews/{case}.png, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    step = max(1, -(-max(hu.shape) // MOST))
    small = np.ascontiguousarray(hu[::step, ::step, ::step])
    body = body_mask(small, spacing=spacing * step)
    kept = keep_mask(small, KEPT, windows=tuple(windows), spacing=spacing * step)
    middle = np.round(np.argwhere(body).mean(0)).astype(int) if body.any() else np.array(small.shape) // 2
    figure = Figure(figsize=(2.2 * (len(windows) + 1), 6.6), layout="tight")
    figure.suptitle(case, fontsize=8)
    axes = figure.subplots(3, len(windows) + 1, squeeze=False)
    for row, (axis, view) in enumerate(((2, "axial"), (1, "coronal"), (0, "sagittal"))):
        cut = [np.take(volume, middle[axis], axis).T for volume in (small, body, kept)]
        for column, name in enumerate(windows):
            picture = axes[row, column]
            picture.imshow(window(cut[0], *WINDOWS[name]), cmap="gray", origin="lower", vmin=0, vmax=1)
            if cut[1].any() and not cut[1].all():
                picture.contour(cut[1], levels=[0.5], colors="tab:cyan", linewidths=0.6)
            picture.set_title(f"{name}, {view}", fontsize=7)
            write_sides(picture, view)
        shown = np.where(cut[2], np.clip((cut[0] + 1000) / 2000, 0, 1), np.nan)
        axes[row, -1].imshow(shown, cmap="viridis", origin="lower", vmin=0, vmax=1)
        axes[row, -1].set_title(f"kept ({KEPT}), {view}", fontsize=7)
        write_sides(axes[row, -1], view)
    for picture in axes.flat:
        picture.set_axis_off()
        if picture.get_title().endswith(("axial", "coronal")):
            picture.invert_xaxis()  # as radiologists look: the patient's right on the left
    with written_whole(path_of(folder, case)) as beside:
        FigureCanvasAgg(figure).print_png(str(beside), metadata={"Software": None})
