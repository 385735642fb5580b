"""Residual quantiser: each level quantises what the levels before it left over (arXiv:2107.03312, section III.C).

A row becomes one code a level, and its value is their sum. Every level has a codebook of its own. Also the one place
that builds a quantiser of any kind from a tokenizer's sizes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from networks.fsq import FiniteScalarQuantizer
from networks.presets import Preset
from networks.quantizer import Quantized, VectorQuantizer, nearest_codes, rotated, straight_through


class ResidualQuantizer(nn.Module):
    """Several `VectorQuantizer`s one after another; same methods, codes (N, levels)."""

    def __init__(self, levels: list[VectorQuantizer]):
        super().__init__()
        if len(levels) < 2:
            raise ValueError(f"residual quantisation needs at least 2 levels, got {len(levels)}")
        self.levels = nn.ModuleList(levels)
        self.num_embeddings, self.embedding_dim = levels[0].num_embeddings, levels[0].embedding_dim

    def forward(self, rows: Float[Tensor, "N D"]) -> Quantized:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            total, parts = torch.zeros_like(wide), []
            for level in self.levels:
                parts.append(level(wide - total))
                total = total + parts[-1].values.detach()
            estimate = rotated if self.levels[0].rotation_trick else straight_through
            return Quantized(
                estimate(wide, total),
                torch.stack([part.codes for part in parts], 1),
                torch.stack([part.vq for part in parts]).mean(0),
                torch.stack([part.commitment for part in parts]).mean(0),
            )

    def lookup(self, codes: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """Sum of each level's codebook rows."""
        if codes.ndim != 2 or codes.shape[1] != len(self.levels):
            raise ValueError(f"codes must be (N, {len(self.levels)}), one a level, got {tuple(codes.shape)}")
        return torch.stack([level.lookup(part) for level, part in zip(self.levels, codes.T, strict=True)]).sum(0)

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, "N D"], *, generator: torch.Generator) -> None:
        """Level by level over what is left."""
        rows = rows.float()
        for level in self.levels:
            level.start_from(rows, generator=generator)
            rows = rows - level.lookup(nearest_codes(rows, level.codebook))

    def update(self, *, generator: torch.Generator) -> int:
        return sum(level.update(generator=generator) for level in self.levels)


def build_quantizer(sizes: Preset) -> VectorQuantizer | FiniteScalarQuantizer | ResidualQuantizer | None:
    """The quantiser that the sizes name; None for the continuous autoencoder."""
    if sizes.codebook == "none":
        return None
    if sizes.codebook == "fsq":
        return FiniteScalarQuantizer(sizes.num_embeddings, sizes.latent_channels)
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
