"""Principal components of cells of 8x8x8 voxels: a fixed linear transform that encoder and decoder learn around.

What is rare and small, a nodule, has a place in the latents from the first step; a network that begins at random drops
it, for it costs the loss little. The components are fitted once, before training (the Karhunen-Loeve transform), and
are buffers: no gradient changes them. Absent voxels count as the bottom of every window.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from networks.sparse import ops
from networks.sparse.tensor import SparseTensor

VOXELS_PER_LATENT = 512
SPARE, POWER_ITERATIONS = 16, 4  # of the search for the leading components
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


def cell_values(x: SparseTensor) -> SparseTensor:
    """All 512 children of each latent side by side, above the bottom of their windows; absent ones are zero."""
    x = x.replace(x.feats.float() + 1)
    for _ in range(3):
        x = ops.gather_children(x)[0]
    return x


def before_tanh(values: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """What tanh makes of it are these values, above the bottom of their windows."""
    return torch.atanh((values - 1).clamp(-LARGEST, LARGEST))


@torch.no_grad()
def lay_components(
    encode: FixedLinear,
    decode: FixedLinear,
    cells: Float[Tensor, "M F"],
    *,
    channel_weights: Float[Tensor, " C"] | None = None,
) -> float:
    """Fits both maps to cells; gives the share of their variance, weighted by channel, that the components keep.

    Latents have a mean square of 1, and distances among them are those of the weighted values.
    """
    width = encode.weight.shape[0]
    scale = torch.ones(cells.shape[1])
    if channel_weights is not None:
        scale = (channel_weights / channel_weights.mean()).sqrt().clamp(min=1e-3).repeat(VOXELS_PER_LATENT)
    scale = scale.to(cells)
    middle = cells.mean(0)
    wide = (cells - middle) * scale
    vectors = _components(wide, width)
    size = (wide @ vectors).square().mean().sqrt().clamp(min=1e-6)
    encode.weight.copy_(vectors.T * scale / size)
    encode.bias.copy_(-(encode.weight @ middle))
    decode.weight.copy_(vectors * size / scale[:, None])
    decode.bias.copy_(middle)
    return float((wide @ vectors).square().sum() / wide.square().sum())


def _components(rows: Float[Tensor, "M F"], width: int) -> Float[Tensor, "F D"]:
    """The first right singular vectors; zeros where there are fewer than `width`."""
    rank = min(width + SPARE, *rows.shape)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)  # of the random start
        vectors = torch.svd_lowrank(rows, q=rank, niter=POWER_ITERATIONS)[2][:, :width]
    return nn.functional.pad(vectors, (0, width - vectors.shape[1]))
