"""How far a decoded CT is from its source, in HU on the dense grid: per tissue, per window, and what was kept at all.

Tissue and foreground come from the source alone; voxels that were dropped count with the HU they stand for. Errors are
against truth clipped to what the tokenizer's windows can tell together; the clipped share is given beside them.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import ndimage
from skimage.metrics import structural_similarity

from transforms.body import body_mask
from transforms.windows import WINDOWS, window_bounds, windows_range

# HU in the source, lowest inclusive, highest exclusive; air is what lies outside the body
TISSUES = {
    "lung": (-np.inf, -500),
    "air-tissue border": (-500, -150),
    "fat": (-150, -30),
    "soft tissue": (-30, 150),
    "bone": (150, np.inf),
}
SSIM_SIDE = 7  # voxels of its window
MARGIN = 4  # voxels around the body in which SSIM is computed


def tissue_masks(truth: Num[np.ndarray, "X Y Z"], *, spacing: float) -> dict[str, Bool[np.ndarray, "X Y Z"]]:
    """Disjoint masks that cover the grid, and `foreground`, the body they divide."""
    body = body_mask(truth, spacing=spacing)
    masks = {name: body & (truth >= low) & (truth < high) for name, (low, high) in TISSUES.items()}
    return {"foreground": body, "air": ~body, **masks}


def errors_in_hu(
    truth: Num[np.ndarray, "X Y Z"],
    recon: Num[np.ndarray, "X Y Z"],
    masks: Mapping[str, Bool[np.ndarray, "X Y Z"]],
    *,
    windows: Sequence[str],
) -> dict[str, dict[str, float]]:
    """MAE and RMSE of each mask; a mask without voxels is left out."""
    low, high = windows_range(windows)
    difference = np.clip(recon, low, high).astype(np.float64) - np.clip(truth, low, high)
    return {name: _mae_rmse(difference[mask]) for name, mask in masks.items() if mask.any()}


def errors_by_window(
    truth: Num[np.ndarray, "X Y Z"],
    recon: Num[np.ndarray, "X Y Z"],
    body: Bool[np.ndarray, "X Y Z"],
    *,
    windows: Sequence[str],
) -> dict[str, dict[str, float]]:
    """What a reader at each window sees of the body: both volumes clipped to it, its width the data range."""
    box = tuple(
        slice(max(cut.start - MARGIN, 0), cut.stop + MARGIN) for cut in ndimage.find_objects(body.astype(np.uint8))[0]
    )
    truth, recon, body = truth[box], recon[box], body[box]
    scores_of = {}
    for name in windows:
        low, high = window_bounds(name)
        seen, rebuilt = (np.clip(volume, low, high).astype(np.float32) for volume in (truth, recon))
        scores = _mae_rmse(rebuilt[body].astype(np.float64) - seen[body])
        width = WINDOWS[name][0]
        scores["psnr"] = 20 * math.log10(width / max(scores["rmse"], 1e-6))
        if min(body.shape) >= SSIM_SIDE:
            _, local = structural_similarity(seen, rebuilt, data_range=width, win_size=SSIM_SIDE, full=True)
            scores["ssim"] = float(local[body].mean())
        scores_of[name] = scores | {"data_range": float(width)}
    return scores_of


def clipped_share(truth: Num[np.ndarray, "X Y Z"], body: Bool[np.ndarray, "X Y Z"], *, windows: Sequence[str]) -> float:
    """Share of the body that lies outside all windows and so cannot be told."""
    low, high = windows_range(windows)
    return float(((truth[body] < low) | (truth[body] > high)).mean())


def kept_share(kept: Bool[np.ndarray, "X Y Z"], wanted: Bool[np.ndarray, "X Y Z"]) -> float:
    return float(kept[wanted].mean()) if wanted.any() else math.nan


def label_share(
    kept: Bool[np.ndarray, "X Y Z"],
    label: Bool[np.ndarray, "A B C"],
    *,
    label_affine: Float[np.ndarray, "4 4"],
    affine: Float[np.ndarray, "4 4"],
) -> float:
    """Share of a label's voxels, on its own grid, whose place on the other grid was kept."""
    places = np.argwhere(label)
    if not len(places):
        return math.nan
    to_grid = np.linalg.inv(affine) @ label_affine
    index: Int[np.ndarray, "N 3"] = np.rint(places @ to_grid[:3, :3].T + to_grid[:3, 3]).astype(np.int64)
    inside = ((index >= 0) & (index < kept.shape)).all(1)
    return float(kept[tuple(index[inside].T)].sum() / len(places))


def dice_of_masks(one: Bool[np.ndarray, "X Y Z"], other: Bool[np.ndarray, "X Y Z"]) -> float:
    return 2 * float((one & other).sum()) / max(float(one.sum() + other.sum()), 1.0)


def _mae_rmse(difference: Float[np.ndarray, " N"]) -> dict[str, float]:
    return {"mae": float(np.abs(difference).mean()), "rmse": float(np.sqrt(np.square(difference).mean()))}
