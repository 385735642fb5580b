"""Where an answer rests, drawn on its scan: the coronal and the axial plane through the place that it needs most."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from app.language.assistant import CTAssistant
from app.language.where_looked import Occlusion, where_looked
from app.shared.sides import write_sides
from app.tokens.token_files import CTTokens
from transforms import Resampled
from transforms.windows import WINDOWS, window

CELL = 8  # voxels of the tokenizer's grid a side of a latent cell
SHOWN_WINDOW = "soft_tissue"
FAINT = 0.02  # log-probability: an answer that changes less by any place hangs on none


class Asked(NamedTuple):
    """A question with its answer, what is known, and where the answer rests: PNG and words, none where not drawn."""

    question: str
    answer: str
    known: str
    picture: bytes | None = None
    words: str = ""


def picture_answer(assistant: CTAssistant, scan: str | Path, question: str, answer: str, *, known: str) -> Asked:
    """An answer that was given, with its picture."""
    opened = assistant.open(scan)
    occlusion = where_looked(assistant, question, answer, assistant.reduce(opened.tokens))
    if occlusion is None:
        return Asked(question, answer, known)
    words = (
        f"The model gives this answer a probability of {occlusion.probability:.2g}; "
        f"with the one place blanked that it needs most, {occlusion.lowest:.2g}. "
    )
    if float(occlusion.loss.max()) < FAINT:
        return Asked(question, answer, known, None, words + "No single place matters to it.")
    return Asked(question, answer, known, draw(on_grid(assistant, Path(scan)), occlusion), words)


def on_grid(assistant: CTAssistant, scan: Path) -> Float[np.ndarray, "X Y Z"]:
    """HU on the tokenizer's grid; of a token file, which has no scan, what its tokens decode to."""
    ct = assistant.tokenizer.ct
    opened = ct.open(scan)
    if isinstance(opened, CTTokens):
        return ct.decode(opened).hu.astype(np.float32)
    volume = opened.volume
    resample = Resampled("image", spacing=ct.sizes.spacing, grid=ct.sizes.resolution)
    return resample({"image": volume.hu, "affine": volume.affine})["image"].astype(np.float32)


def draw(hu: Float[np.ndarray, "X Y Z"], occlusion: Occlusion) -> bytes:
    """PNG; a cell is the redder, the more the answer needs it."""
    strongest = occlusion.coords[int(occlusion.loss.argmax())]
    _, y, z = (int(cell) * CELL + CELL // 2 for cell in strongest)
    need = np.zeros([side // CELL for side in hu.shape])
    need[tuple(occlusion.coords.long().T)] = torch.clamp(occlusion.loss, min=0).numpy()
    need = np.kron(need / need.max(), np.ones((CELL,) * 3))
    figure = Figure(figsize=(7.2, 3.5), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2)
    planes = (("coronal", (slice(None), y, slice(None))), ("axial", (slice(None), slice(None), z)))
    for axis, (view, plane) in zip(axes, planes, strict=True):
        image, cover = (part[plane][::-1].T for part in (window(hu, *WINDOWS[SHOWN_WINDOW]), need))
        look = {"origin": "lower", "interpolation": "none"}
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, **look)
        shown = axis.imshow(cover, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * cover, **look)
        axis.set_axis_off()
        axis.set_title(view, fontsize=9)
        write_sides(axis, view)
    scale = figure.colorbar(shown, ax=axes, shrink=0.8, ticks=[0, 1])
    scale.ax.set_yticklabels(["not needed", "needed most"], fontsize=7)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
