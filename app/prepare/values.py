"""Are these values HU? Rules on the values alone, for every format; and what stands for no measurement.

Each rule needs evidence that holds for real CT and for plain synthetic volumes; `--assume-hu` overrules them all.
"""

import numpy as np
from jaxtyping import Num

from app.prepare.findings import Finding, finding
from app.shared.refusals import Refused
from transforms.windows import AIR

NO_MEASUREMENT = -1500  # below this nothing in a patient, nor air with its noise, is ever measured
SAMPLES = 2_000_000


def map_padding(values: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    """Values with NaN and what no measurement can give as air; works in place where it may."""
    count = 0
    if values.dtype.kind == "f":
        odd = ~np.isfinite(values)
        count = int(np.count_nonzero(odd))
        if count:
            values = np.where(odd, values.dtype.type(AIR), values)
    if values.size and values.min() < NO_MEASUREMENT:
        low = values < NO_MEASUREMENT
        count += int(np.count_nonzero(low))
        values = np.where(low, values.dtype.type(AIR), values)
    return values, [finding("PADDING_MAPPED", f"{count} voxels")] if count else []


def refuse_constant(values: np.ndarray) -> None:
    if values.size == 0 or values.min() == values.max():
        raise Refused("EMPTY", "no voxels, or all of them the same")


def why_not_hu(values: Num[np.ndarray, "X Y Z"]) -> str | None:
    """The reason why values, before padding is mapped, cannot be HU; None where they can."""
    sample = _sample(values)
    low, high = float(sample.min()), float(sample.max())
    integers = bool(sample.dtype.kind in "iu" or np.array_equal(sample, np.rint(sample)))
    if low >= -1 and high <= 1:
        return f"values lie in {low:g} to {high:g}: normalised"
    if low >= 0 and high <= 255 and integers:
        return "values lie in 0 to 255: 8-bit"
    if max(abs(low), abs(high)) > 32767:
        return f"values reach from {low:g} to {high:g}"
    return _why_no_air(sample, low) or _why_rescaled_twice(sample) or _why_clipped(sample)


def _sample(values: np.ndarray) -> np.ndarray:
    """Every n-th voxel of every n-th row and slice, finite ones alone."""
    step = max(1, int(np.ceil((values.size / SAMPLES) ** (1 / 3))))
    sample = values[::step, ::step, ::step].ravel()
    if sample.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]
    return sample if sample.size else np.zeros(1, np.float32)


def _why_no_air(sample: np.ndarray, low: float) -> str | None:
    """CT shows air nearly always; without any, values are raw, windowed, or of another modality."""
    if low > -500:
        return f"no air: the lowest value is {low:g}"
    if not (sample > -500).any():
        return "no tissue: every value lies below -500"
    return None


def _why_rescaled_twice(sample: np.ndarray) -> str | None:
    """An intercept near -1024 applied twice puts tissue where air belongs and air where nothing can be."""
    values, counts = np.unique(np.rint(sample), return_counts=True)
    counts = counts.astype(float)
    constant = np.argsort(-counts)[:2]  # padding is a value, not a distribution
    below = (values < -1100) & (values > -2300)
    below[constant[values[constant] < -1100]] = False
    share = counts[below].sum() / counts.sum()
    tissue = counts[(values > -300) & (values < 300)].sum() / counts.sum()
    like_air = counts[(values > -1124) & (values < -800)].sum() / counts.sum()
    if share > 0.02 and share + like_air > 0.5 and tissue < 0.1:
        return f"{share:.0%} of the voxels lie below air, {tissue:.1%} are tissue: rescaled twice"
    spike = values[constant[values[constant] < -1100]]
    if tissue < 0.001 and like_air > 0.05 and spike.size and (np.abs(spike + 2036) < 40).any():
        return "air lies near -2036 and tissue near -1000: rescaled twice"
    return None


def _why_clipped(sample: np.ndarray) -> str | None:
    """A window leaves a spike at its upper end, on top of a smooth slope of values."""
    high = sample.max()
    if high >= 2900:
        return None  # scanners themselves stop near 3071
    bins = [int(np.count_nonzero((sample >= high - 20 * (k + 1)) & (sample < high - 20 * k))) for k in range(5)]
    spike = int(np.count_nonzero(sample == high))
    body = int(np.count_nonzero(sample > -500))
    smooth = min(bins) > 0 and np.unique(sample[(sample >= high - 100) & (sample < high)]).size > 20
    if smooth and spike > 0.002 * body and spike > 2 * max(bins):
        return f"{spike / body:.1%} of the voxels are exactly {high:g}, the highest: windowed"
    return None
