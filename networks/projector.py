"""From code width to language width: one Linear, or Linear-GELU-…-Linear, with an optional fixed place of each token.

State-dict names are the plain `proj.weight` (one layer) and `proj.{0,2,…}.weight` that other projects use; the
position encoding has no parameters and adds no key. A detector of cells, where there is one, adds its own.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from networks.cell_detector import CellDetector

MAX_LAYERS = 64


def encode_positions(coords: Int[Tensor, "T 3"], width: int, *, grid: int = 128) -> Float[Tensor, "T E"]:
    """Fixed sinusoids of x, y, z side by side; leftover columns are zero.

    Wavelengths go from 2 cells to twice the grid's `grid` cells a side: the slowest tells the ends apart, and none is
    so slow that it says nothing within the grid.
    """
    num_waves = width // 6
    if num_waves < 1:
        raise ValueError(f"a 3D position encoding needs a width of at least 6, got {width}")
    exponent = torch.linspace(0, 1, num_waves, device=coords.device)
    frequency = math.pi * (1 / grid) ** exponent
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
        position_grid: int = 128,
        detector: CellDetector | None = None,
    ):
        super().__init__()
        self.detector = detector  # applied by whoever makes the features; kept with this
        if not 1 <= num_layers <= MAX_LAYERS:
            raise ValueError(f"projector_layers must lie in 1..{MAX_LAYERS}, got {num_layers}")
        self.use_3d_pos, self.position_scale, self.position_grid = use_3d_pos, position_scale, position_grid
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
            places = encode_positions(coords, embeds.shape[1], grid=self.position_grid)
            embeds = embeds + self.position_scale * places.to(embeds.dtype)
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
