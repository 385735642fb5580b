"""Where an answer rests, as viewers of segmentations can show it: a label map on the scan's own grid.

A viewer lists segmentations alone and has no place for text. So the answer travels as the name of the one segment, and
the segment covers what the answer rests on: at least half of what the place counts that it needs most.
"""

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from scipy import ndimage
from torch import Tensor

from app.evaluation.answer_pictures import FAINT
from app.language.where_looked import Occlusion
from app.shared.notice import NOTICE
from app.tokens.token_files import CTTokens

MAX_LETTERS = 200  # of a segment's name
NOWHERE = "no single place matters to it"


def cells_of(tokens: CTTokens, occlusion: Occlusion | None) -> Bool[np.ndarray, " M"] | None:
    """Which tokens an answer rests on; None where it rests on no single place.

    Of tokens that were pooled each counts as the one nearest to it that was read.
    """
    if occlusion is None or float(occlusion.loss.max()) < FAINT:
        return None
    places, cells = occlusion.coords.float(), torch.from_numpy(tokens.coords).float()
    nearest: Tensor = torch.cat([torch.cdist(part, places).argmin(1) for part in cells.split(4096)])
    return (occlusion.loss >= occlusion.loss.max() / 2)[nearest].numpy()


def label_map(tokens: CTTokens, cells: Bool[np.ndarray, " M"] | None) -> UInt8[np.ndarray, "X Y Z"]:
    """1 on the scan's own grid where these cells lie, or where any lies, if there are none; else 0."""
    marked = np.zeros(tokens.latent_shape, np.uint8)
    marked[tuple((tokens.coords if cells is None else tokens.coords[cells]).T)] = 1
    to_cell = np.linalg.inv(tokens.affine) @ tokens.source_affine
    how = {"order": 0, "mode": "grid-constant"}  # `constant` would cut half a cell off at the border
    return ndimage.affine_transform(marked, to_cell[:3, :3], to_cell[:3, 3], tokens.source_shape, **how)


def segment_name(answer: str, *, somewhere: bool) -> str:
    """The answer in one line, with what it is not for."""
    line = " ".join(answer.split()) or "no answer"
    line = line if len(line) <= MAX_LETTERS else line[: MAX_LETTERS - 1] + "…"
    return f"{line} ({'' if somewhere else NOWHERE + '; '}{NOTICE.rstrip('.').lower()})"
