"""Residual quantiser: each level quantises what the levels before it left over (arXiv:2107.03312, section III.C).

A row becomes one code a level, and its value is their sum; the first few levels alone are a coarser value. Every level
has a codebook of its own. Also the one place that builds a quantiser of any kind from a tokenizer's sizes.
"""

from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from networks.fsq import FiniteScalarQuantizer
from networks.presets import Preset
from networks.quantizer import Quantized, VectorQuantizer, nearest_codes, rotated, straight_through, update_together

NO_CODE = -1  # of a level that a row does without


class ResidualQuantizer(nn.Module):
    """Several `VectorQuantizer`s one after another; same methods, codes (N, levels).

    With `kept`, a number of levels for each row, values are sums over that many; all levels learn all the same.
    """

    def __init__(self, levels: list[VectorQuantizer]):
        super().__init__()
        if len(levels) < 2:
            raise ValueError(f"residual quantisation needs at least 2 levels, got {len(levels)}")
        self.levels = nn.ModuleList(levels)
        self.num_embeddings, self.embedding_dim = levels[0].num_embeddings, levels[0].embedding_dim

    def forward(self, rows: Float[Tensor, "N D"], kept: Int[Tensor, " N"] | None = None) -> Quantized:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            total, parts = torch.zeros_like(wide), []
            given = total
            for number, level in enumerate(self.levels):
                parts.append(level(wide - total))
                total = total + parts[-1].values.detach()
                given = total if kept is None else torch.where((kept > number)[:, None], total, given)
            estimate = rotated if self.levels[0].rotation_trick else straight_through
            return Quantized(
                estimate(wide, given),
                torch.stack([part.codes for part in parts], 1),
                torch.stack([part.vq for part in parts]).mean(0),
                torch.stack([part.commitment for part in parts]).mean(0),
            )

    def lookup(self, codes: Int[Tensor, "N ..."]) -> Float[Tensor, "N D"]:
        """Sum of the codebook rows of the levels there are codes of: all, or the first few; (N,) is the first alone.

        A row may do without its last levels: `NO_CODE` adds nothing.
        """
        columns = codes[:, None] if codes.ndim == 1 else codes
        if columns.ndim != 2 or not 1 <= columns.shape[1] <= len(self.levels):
            raise ValueError(f"codes must be (N, 1 to {len(self.levels)}), one a level, got {tuple(codes.shape)}")
        given = zip(self.levels, columns.T, strict=False)
        return torch.stack([_values(level, part, first=level is self.levels[0]) for level, part in given]).sum(0)

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, "N D"], *, generator: torch.Generator) -> None:
        """Level by level over what is left."""
        rows = rows.float()
        for level in self.levels:
            level.start_from(rows, generator=generator)
            rows = rows - level.lookup(nearest_codes(rows, level.codebook))

    def requires_grad_(self, requires_grad: bool = True) -> "ResidualQuantizer":
        for level in self.levels:
            level.requires_grad_(requires_grad)
        return self

    def update(self, *, generator: torch.Generator) -> Int[Tensor, ""] | int:
        return update_together(list(self.levels), generator=generator)


def _values(level: VectorQuantizer, codes: Int[Tensor, " N"], *, first: bool) -> Float[Tensor, "N D"]:
    """Codebook rows, zero where a row has no code, which of the first level every row has."""
    if first:
        return level.lookup(codes)
    lacking = codes == NO_CODE
    return level.lookup(codes.masked_fill(lacking, 0)).masked_fill(lacking[:, None], 0)


def drawn_levels(num_levels: int, seeds: list[int], sample_sizes: list[int], *, dropout: float) -> Int[Tensor, " N"]:
    """Of how many levels each row of the samples is decoded in training, drawn from its sample's seed.

    A share `dropout` of the samples is decoded from fewer levels than there are: two thirds of it from the first n,
    with odds of 1/n, since the first has to serve alone; a third with a number of its own for each row, since a file
    may spend its bits where they pay.
    """
    rows = []
    for seed, size in zip(seeds, sample_sizes, strict=True):
        one = torch.Generator().manual_seed(seed)
        chance, mixed = torch.rand(2, generator=one).tolist()
        if num_levels == 1 or chance >= dropout:
            rows.append(torch.full((size,), num_levels))
        elif mixed < 1 / 3:
            rows.append(torch.randint(1, num_levels + 1, (size,), generator=one))
        else:
            odds = 1 / torch.arange(1, num_levels)
            rows.append(torch.multinomial(odds, 1, generator=one).add(1).expand(size))
    return torch.cat(rows)


def _vectors(sizes: Preset) -> VectorQuantizer | ResidualQuantizer:
    levels = [
        VectorQuantizer(
            sizes.num_embeddings,
            sizes.latent_channels,
            codebook=sizes.codebook,
            rotation_trick=sizes.rotation_trick,
            normalize_codes=sizes.normalize_codes,
        )
        for _ in range(sizes.quantizer_levels)
    ]
    return levels[0] if len(levels) == 1 else ResidualQuantizer(levels)


QUANTIZERS = MappingProxyType(  # by the names of CODEBOOKS
    {
        "ema": _vectors,
        "gradient": _vectors,
        "fsq": lambda sizes: FiniteScalarQuantizer(sizes.num_embeddings, sizes.latent_channels),
        "none": lambda sizes: None,
    }
)


def build_quantizer(sizes: Preset) -> nn.Module | None:
    """The quantiser that the sizes name; None for the continuous autoencoder."""
    return QUANTIZERS[sizes.codebook](sizes)
