"""How likely each kind of finding lies in a cell, told by the cell's code vector and place alone.

A language model that learns from answers is told yes or no for a whole scan, too little to find out which of hundreds
of cells it is about. A detector that was told of cells says it: of each cell, and of the left and right half of the
volume, whose numbers stand beside every token, so that a model reads them wherever it looks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

SHOWN = 3  # likeliest cells of each kind of finding and half that are read as they are: as many as one can count
SOFTNESS = 2.0  # logits are divided by it: where seventy cells could hold a finding only a sure one says much
DROPOUT = 0.3  # of hidden numbers, while it learns: it meets some ten thousand cells with a finding
HIDDEN = 0.75  # share of tokens whose vector is hidden while a model learns to read them: few are learned by heart
WEIGHT = 10.0  # of a number beside those of a code vector, in their spreads: else vectors are learned by heart


class CellDetector(nn.Module):
    """Two hidden layers on a cell; `grid`: cells a side of the tokenizer's grid."""

    def __init__(self, in_features: int, num_kinds: int, *, grid: int, width: int = 256):
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

    @property
    def num_numbers(self) -> int:
        """Behind a code vector: the cell's own for each kind, and two for each kind and half."""
        return 5 * self.num_kinds

    def forward(self, feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"]) -> Float[Tensor, "M K"]:
        """Logits."""
        places = (coords.float() + 0.5) / self.grid - 0.5
        x = torch.cat([(feats - self.mean) / self.spread, places], 1)
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.GELU):
                x = functional.dropout(x, DROPOUT, self.training)
        return x

    def halves(self, coords: Int[Tensor, "M 3"]) -> tuple[Tensor, Tensor]:
        """Which rows lie in the lower and in the upper half of the grid along x: the left and the right of a scan."""
        upper = coords[:, 0] >= self.grid / 2
        return ~upper, upper

    @torch.no_grad()
    def beside(self, feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"]) -> Float[Tensor, "M E"]:
        """Code vectors with a number for each kind behind them, from 0 to the weight of numbers."""
        return torch.cat([feats, (self(feats, coords) / SOFTNESS).sigmoid() * self.weight], 1)

    @property
    def weight(self) -> Tensor:
        return WEIGHT * self.spread.mean()

    def likeliest(
        self, beside: Float[Tensor, "M E"], coords: Int[Tensor, "M 3"], *, count: int = SHOWN
    ) -> Int[Tensor, " F"]:
        """Rows of the likeliest cells of each kind in each half, likeliest first, each row once."""
        rows: list[int] = []
        for numbers in beside[:, self.in_features :].T:
            for half in self.halves(coords):
                own = half.nonzero()[:, 0]
                rows += own[numbers[own].topk(min(count, len(own))).indices].tolist()
        return torch.tensor(list(dict.fromkeys(rows)), dtype=torch.long)

    def survey(self, feats: Float[Tensor, "T E"], coords: Int[Tensor, "T 3"]) -> Float[Tensor, "T F"]:
        """Rows as `beside` makes them, each with the numbers of the whole volume behind its own.

        For each kind and half: the largest number of its rows, and the sum of its SHOWN largest, which counts. Rows
        that have such numbers get them anew.
        """
        feats = feats[:, : self.in_features + self.num_kinds]
        whole = []
        for half in self.halves(coords):
            numbers = feats[half, self.in_features :]
            most = functional.pad(numbers, (0, 0, 0, SHOWN)).topk(SHOWN, 0).values
            whole += [2 * most[0] - self.weight, most.sum(0) - self.weight]
        return torch.cat([feats, torch.cat(whole).expand(len(feats), -1)], 1)

    def with_few_vectors(self, feats: Float[Tensor, "T F"], *, seed: int) -> Float[Tensor, "T F"]:
        """Rows as `survey` makes them: the numbers of all, the vectors of some; the others' are the mean."""
        vectors, numbers = feats.tensor_split([self.in_features], 1)
        hidden = torch.rand(len(feats), 1, generator=torch.Generator().manual_seed(seed)) < HIDDEN
        return torch.cat([torch.where(hidden, self.mean.to(feats.dtype), vectors), numbers], 1)
