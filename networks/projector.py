"""From code width to language width: one Linear, or Linear-GELU-…-Linear, with an optional fixed place of each token.

State-dict names are the plain `proj.weight` (one layer) and `proj.{0,2,…}.weight` that other projects use; the
position encoding has no parameters and adds no key.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LONGEST_WAVE = 256.0  # latent cells; longer than any preset's grid, so that the slowest wave tells the ends apart


def encode_positions(coords: Int[Tensor, "T 3"], width: int) -> Float[Tensor, "T E"]:
    """Fixed sinusoids of x, y, z side by side, wavelengths from 2 cells to LONGEST_WAVE; leftover columns are zero."""
    num_waves = width // 6
    if num_waves < 1:
        raise ValueError(f"a 3D position encoding needs a width of at least 6, got {width}")
    exponent = torch.linspace(0, 1, num_waves, device=coords.device)
    frequency = math.pi * (2.0 / LONGEST_WAVE) ** exponent
    phase = coords.float()[:, :, None] * frequency
    waves = torch.cat([phase.sin(), phase.cos()], 2).flatten(1)
    return nn.functional.pad(waves, (0, width - waves.shape[1]))


class Projector(nn.Module):
    """Maps token features (T, D) to language embeddings (T, E)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_layers: int = 1,
        use_3d_pos: bool = False,
        position_scale: float = 1.0,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"projector_layers must be at least 1, got {num_layers}")
        self.use_3d_pos, self.position_scale = use_3d_pos, position_scale
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(num_layers - 1):
            layers += [nn.GELU(), nn.Linear(out_features, out_features)]
        self.proj = layers[0] if num_layers == 1 else nn.Sequential(*layers)

    @property
    def in_features(self) -> int:
        return (self.proj if isinstance(self.proj, nn.Linear) else self.proj[0]).in_features

    @property
    def last(self) -> nn.Linear:
        return self.proj if isinstance(self.proj, nn.Linear) else self.proj[-1]

    def forward(self, feats: Float[Tensor, "T D"], coords: Int[Tensor, "T 3"] | None = None) -> Float[Tensor, "T E"]:
        if feats.shape[1] != self.in_features:
            raise ValueError(f"the projector reads features of width {self.in_features}, got {feats.shape[1]}")
        embeds = self.proj(feats)
        if self.use_3d_pos:
            if coords is None:
                raise ValueError("use_3d_pos needs the coordinates of the tokens, got none")
            embeds = embeds + self.position_scale * encode_positions(coords, embeds.shape[1]).to(embeds.dtype)
        return embeds

    @torch.no_grad()
    def match_scale(self, feats: Float[Tensor, "T D"], target: float) -> None:
        """Scales a fresh projector so that outputs have the spread of the language model's own embeddings."""
        embeds = self.proj(feats)
        self.last.bias -= embeds.mean(0)
        spread = (embeds - embeds.mean(0)).std()
        if not spread > 0:
            raise ValueError(f"features to project must vary, got {len(feats)} rows without spread")
        self.last.weight *= target / spread
        self.last.bias *= target / spread
