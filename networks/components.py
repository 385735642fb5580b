"""Principal components of the HU of cells of 8x8x8 voxels: a fixed linear transform that a network learns around.

What is rare and small, a nodule, has a place in the latents from the first step; a network that begins at random drops
it, for it costs the loss little. The components are fitted once, before training (the Karhunen-Loeve transform), and
are buffers: no gradient changes them. Components are of HU, not of window values, as a few windows show the same HU
several times over. An absent voxel counts as the mean of its cell, or the outline of the body would take most of them;
a part of air is mixed in, without which latents would not tell the outline at all.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from networks.sparse import ops
from networks.sparse.tensor import SparseTensor

VOXELS_PER_LATENT = 512
SPARE, POWER_ITERATIONS = 16, 4  # of the search for the leading components
AIR, AIR_IN_ABSENT = -1000.0, 0.3  # HU, and its share in what an absent voxel counts as
LARGEST = 0.98  # of the output: tanh never reaches 1


class FixedLinear(nn.Module):
    """A linear map of rows that is laid, not learned; zero until then."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))

    def forward(self, rows: Float[Tensor, "N _"]) -> Float[Tensor, "N F"]:
        with ops.without_autocast(rows.device.type):
            return ops.linear(rows.float(), self.weight, self.bias)


class HounsfieldUnits(nn.Module):
    """Between the values of windows, -1 to 1, and the HU that they show; which windows is laid, not learned."""

    def __init__(self, num_windows: int):
        super().__init__()
        self.register_buffer("bounds", torch.tensor([[-1.0, 1.0]]).repeat(num_windows, 1))  # HU, lower and upper
        self.register_buffer("starts", torch.ones(num_windows))  # HU above which a window adds to those below it

    def lay(self, bounds: Sequence[tuple[float, float]]) -> None:
        """Lower and upper HU of each window. Together they must show a range without a gap."""
        top, starts = min(low for low, _ in bounds), {}
        for number, (low, high) in sorted(enumerate(bounds), key=lambda window: window[1]):
            if low > top:
                raise ValueError(f"principal components need windows without a gap, none shows {top:g} to {low:g} HU")
            starts[number] = min(top, high)
            top = max(top, high)
        self.bounds.copy_(torch.tensor(bounds))
        self.starts.copy_(torch.tensor([starts[number] for number in range(len(bounds))]))

    def forward(self, values: Float[Tensor, "N C"]) -> Float[Tensor, "N 1"]:
        """HU, cut at the range that the windows show together."""
        low, high = self.bounds.unbind(1)
        shown = low + (values.float() + 1) / 2 * (high - low)
        return low.min() + (shown - self.starts).relu().sum(1, keepdim=True)

    def windows(self, hu: Float[Tensor, "N 1"]) -> Float[Tensor, "N C"]:
        low, high = self.bounds.unbind(1)
        return ((hu - low) / (high - low)).clamp(0, 1) * 2 - 1


def cell_rows(x: SparseTensor) -> SparseTensor:
    """HU of voxels to all 512 of each latent side by side; absent ones are mixed of the mean of the others and air."""
    x = x.replace(torch.cat([x.feats, torch.ones_like(x.feats)], 1))
    for _ in range(3):
        x = ops.gather_children(x)[0]
    values, present = rearrange(x.feats, "m (v two) -> two m v", two=2)
    mean = values.sum(1, keepdim=True) / present.sum(1, keepdim=True)
    return x.replace(values + (1 - present) * torch.lerp(mean, torch.full_like(mean, AIR), AIR_IN_ABSENT))


def before_tanh(values: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """What tanh makes these values of."""
    return torch.atanh(values.clamp(-LARGEST, LARGEST))


@torch.no_grad()
def lay_components(encode: FixedLinear, decode: FixedLinear, cells: Float[Tensor, "M F"]) -> float:
    """Fits both maps to cells; gives the share of their variance that the components keep.

    Latents have a mean square of 1, and distances among them are those of the values.
    """
    middle = cells.mean(0)
    around = cells - middle
    vectors = _components(around, encode.weight.shape[0])
    size = (around @ vectors).square().mean().sqrt().clamp(min=1e-6)
    encode.weight.copy_(vectors.T / size)
    encode.bias.copy_(-(encode.weight @ middle))
    decode.weight.copy_(vectors * size)
    decode.bias.copy_(middle)
    return float((around @ vectors).square().sum() / around.square().sum())


def _components(rows: Float[Tensor, "M F"], width: int) -> Float[Tensor, "F D"]:
    """The first right singular vectors; zeros where there are fewer than `width`."""
    rank = min(width + SPARE, *rows.shape)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)  # of the random start
        vectors = torch.svd_lowrank(rows, q=rank, niter=POWER_ITERATIONS)[2][:, :width]
    return nn.functional.pad(vectors, (0, width - vectors.shape[1]))
