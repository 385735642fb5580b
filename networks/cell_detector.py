"""How likely each kind of finding lies in a cell, told by the cell's code vector and place alone.

A language model that learns from answers is told yes or no for a whole scan, too little to find out which of hundreds
of cells it is about. A detector that was told of cells says it, so that the likeliest ones are read as they are.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

DOUBT = 8.0  # below this logit, negative, a cell counts as empty of a kind
MOST = 10.0  # above that much more, one is as likely as another


class CellDetector(nn.Module):
    """Two hidden layers on a cell; `grid`: cells a side of the tokenizer's grid."""

    def __init__(self, in_features: int, num_kinds: int, *, grid: int, width: int = 128):
        super().__init__()
        self.in_features, self.num_kinds, self.grid = in_features, num_kinds, grid
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("spread", torch.ones(in_features))
        self.layers = nn.Sequential(
            nn.Linear(in_features + 3, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, num_kinds),
        )

    def forward(self, feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"]) -> Float[Tensor, "M K"]:
        """Logits."""
        places = (coords.float() + 0.5) / self.grid - 0.5
        return self.layers(torch.cat([(feats - self.mean) / self.spread, places], 1))

    @torch.no_grad()
    def beside(
        self, feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"]
    ) -> tuple[Float[Tensor, "M E"], Float[Tensor, "M K"]]:
        """Code vectors with a number for each kind behind them, 0 where it is out of the question; and the logits."""
        logits = self(feats, coords)
        return torch.cat([feats, (logits + DOUBT).clamp(0, MOST) * self.spread.mean()], 1), logits
