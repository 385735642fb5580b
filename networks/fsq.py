"""Finite scalar quantiser: rows are projected to a few numbers and each is rounded (arXiv:2309.15505).

There is no codebook to collapse: the codes are all combinations of levels, and what learns are the projections in and
out. Same methods as `VectorQuantizer`. Levels are equally wide steps of a sigmoid, so that rows of a normal spread use
them about equally.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from networks.quantizer import Quantized, broadcast, check_codes, gather_rows

PROBIT = 1.702  # sigmoid(1.702 x) is within 0.01 of the normal distribution function


def levels_for(num_embeddings: int) -> tuple[int, ...]:
    """Levels whose combinations are exactly this many codes, about eight each: 8192 gives 8, 8, 8, 16."""
    bits = num_embeddings.bit_length() - 1
    if num_embeddings < 4 or num_embeddings != 1 << bits:
        raise ValueError(f"codebook fsq needs num_embeddings a power of two of at least 4, got {num_embeddings}")
    count = max(round(bits / 3), 1)
    return tuple(1 << ((bits + i) // count) for i in range(count))


class FiniteScalarQuantizer(nn.Module):
    """Rounds `len(levels)` projections of each row; the code is their mixed-radix number, the first level highest."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.levels = levels_for(num_embeddings)
        if embedding_dim < len(self.levels):
            raise ValueError(
                f"codebook fsq of {num_embeddings} codes has {len(self.levels)} levels and needs latent_channels of at "
                f"least as many, got {embedding_dim}"
            )
        self.project_in = nn.Linear(embedding_dim, len(self.levels))
        self.project_out = nn.Linear(len(self.levels), embedding_dim)

    def _row_of(self, values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, device=self.project_in.weight.device)

    @property
    def codebook(self) -> Float[Tensor, "K D"]:
        return self.lookup(torch.arange(self.num_embeddings, device=self.project_in.weight.device))

    def forward(self, rows: Float[Tensor, "N D"]) -> Quantized:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            steps = self._row_of(self.levels)
            place = self.project_in(wide).sigmoid() * steps - 0.5
            index = torch.minimum(place.detach().round().clamp(min=0), steps - 1)
            values = self.project_out(self._centres(place + (index - place).detach()))
            codes = (index.long() * self._strides()).sum(1)
            commitment = (wide - values.detach()).square().mean(1)
            vq = (values - wide.detach()).square().mean(1)
            return Quantized(values, codes, vq, commitment)

    def _centres(self, index: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        """Middle of each step, in -1..1."""
        return (2 * index + 1) / self._row_of(self.levels) - 1

    def _strides(self) -> Int64[Tensor, " L"]:
        return self._row_of(tuple(math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))))

    def lookup(self, codes: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """What each code stands for."""
        check_codes(codes, self.num_embeddings)
        index = codes.long()[:, None] // self._strides() % self._row_of(self.levels)
        return self.project_out(self._centres(index.float()))

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, "N D"], *, generator: torch.Generator) -> None:
        """In along the rows' principal axes, each spread over its levels; out by least squares. Nothing is drawn."""
        rows = gather_rows(rows.float()).double()
        mean = rows.mean(0)
        spread, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / rows.shape[0])
        # the widest axis gets the most levels, which come last
        axes, spread = axes[:, -len(self.levels) :], spread[-len(self.levels) :].clamp(min=1e-12).sqrt()
        weight = PROBIT * axes.T / spread[:, None]
        self.project_in.weight.copy_(weight)
        self.project_in.bias.copy_(-weight @ mean)
        index = self.forward(rows.float()).codes[:, None] // self._strides() % self._row_of(self.levels)
        known = F.pad(self._centres(index.double()), (0, 1), value=1.0)
        ridge = 1e-6 * rows.shape[0] * torch.eye(known.shape[1], dtype=known.dtype, device=known.device)
        solved = torch.linalg.solve(known.T @ known + ridge, known.T @ rows)
        self.project_out.weight.copy_(solved[:-1].T)
        self.project_out.bias.copy_(solved[-1])
        for parameter in self.parameters():
            broadcast(parameter.data)

    def update(self, *, generator: torch.Generator) -> int:
        """Nothing to average and nothing to revive."""
        return 0

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, levels={self.levels}"
