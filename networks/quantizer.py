"""Vector quantiser: nearest code per row, straight-through gradient (arXiv:1711.00937, eqs. 1-3).

Knows rows, not space. The codebook is learned by moving averages (`codebook="ema"`: a buffer, changed only by `update`,
once per optimizer step) or by gradient (`codebook="gradient"`: a parameter, pulled by the `vq` loss).
Search, losses and sums run in float32 whatever the autocast; N x K distances are never held at once.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

SEARCH_CELLS = 2**24  # distances held at a time: 64 MiB of float32
MIN_VECTORS_PER_CODE = 4


class Quantized(NamedTuple):
    values: Float[Tensor, "N D"]  # codebook rows, with the gradient of the input
    codes: Int64[Tensor, " N"]
    vq: Float[Tensor, " N"]  # per row, so that the caller can average within samples
    commitment: Float[Tensor, " N"]


def nearest_codes(rows: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int64[Tensor, " N"]:
    """Index of the closest codebook row; the lowest index wins a tie."""
    half_norms = codebook.square().sum(1) / 2
    chunk = max(SEARCH_CELLS // codebook.shape[0], 1)
    codes = [torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1) for part in rows.split(chunk)]
    return torch.cat(codes) if codes else rows.new_zeros(0, dtype=torch.int64)


def code_sums(
    rows: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], num_codes: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K D"]]:
    """How many rows chose each code, and their sum, added in a fixed order."""
    counts = torch.bincount(codes, minlength=num_codes)
    order = torch.argsort(codes, stable=True)
    sums = torch.segment_reduce(rows[order], "sum", lengths=counts, initial=0.0)
    return counts.to(rows.dtype), sums


def kmeans(
    rows: Float[Tensor, "N D"], num_codes: int, *, iterations: int = 20, generator: torch.Generator
) -> Float[Tensor, "K D"]:
    """Lloyd's algorithm from distinct random rows; a cluster left empty restarts at a random row."""
    if rows.shape[0] < MIN_VECTORS_PER_CODE * num_codes:
        raise ValueError(
            f"k-means for {num_codes} codes needs at least {MIN_VECTORS_PER_CODE * num_codes} encoder outputs, "
            f"got {rows.shape[0]}: give more cases or lower num_embeddings"
        )
    centres = rows[torch.randperm(rows.shape[0], generator=generator)[:num_codes].to(rows.device)].clone()
    for _ in range(iterations):
        counts, sums = code_sums(rows, nearest_codes(rows, centres), num_codes)
        spare = rows[torch.randint(rows.shape[0], (num_codes,), generator=generator).to(rows.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spare)
    return centres


class VectorQuantizer(nn.Module):
    """Replaces each row by its nearest codebook row.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: code width D.
        codebook: "ema" or "gradient".
        decay: weight of the old value in the moving averages.
        revive_below: a code whose average count falls below this restarts at a random current row.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        codebook: str = "ema",
        decay: float = 0.99,
        revive_below: float = 0.05,
    ):
        super().__init__()
        if codebook not in ("ema", "gradient"):
            raise ValueError(f"codebook must be ema or gradient, got {codebook!r}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.learning, self.decay, self.revive_below = codebook, decay, revive_below
        start = torch.randn(num_embeddings, embedding_dim)
        if codebook == "gradient":
            self.embeddings = nn.Embedding(num_embeddings, embedding_dim, _weight=start)
        else:
            self.embeddings = _Table(start)
            self.register_buffer("mean_count", torch.ones(num_embeddings))
            self.register_buffer("mean_sum", start.clone())
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def codebook(self) -> Float[Tensor, "K D"]:
        return self.embeddings.weight

    def forward(self, rows: Float[Tensor, "N D"]) -> Quantized:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            codes = nearest_codes(wide.detach(), self.codebook.detach())
            values = F.embedding(codes, self.codebook)
            commitment = (wide - values.detach()).square().mean(1)
            vq = (values - wide.detach()).square().mean(1)
            if self.learning == "ema" and self.training:
                self._pending.append((*code_sums(wide.detach(), codes, self.num_embeddings), wide.detach()))
            return Quantized(wide + (values - wide).detach(), codes, vq, commitment)

    def lookup(self, codes: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Codebook rows of codes."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_embeddings):
            raise ValueError(
                f"codes must lie in 0..{self.num_embeddings - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        return F.embedding(codes.long(), self.codebook)

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, "N D"], *, generator: torch.Generator) -> None:
        """k-means on encoder outputs of all ranks; every rank gets the same codebook."""
        rows = _gather_rows(rows.float())
        centres = kmeans(rows, self.num_embeddings, generator=generator)
        _broadcast(centres)
        self.codebook.copy_(centres)
        if self.learning == "ema":
            counts, _ = code_sums(rows, nearest_codes(rows, centres), self.num_embeddings)
            self.mean_count.copy_(counts / counts.mean())
            self.mean_sum.copy_(centres * self.mean_count[:, None])

    @torch.no_grad()
    def update(self, *, generator: torch.Generator) -> int:
        """One moving-average step from all rows seen since the last, over micro-batches and ranks.

        Gives the number of codes revived. Does nothing for a gradient codebook.
        """
        if self.learning != "ema":
            return 0
        counts = torch.zeros_like(self.mean_count)
        sums = torch.zeros_like(self.mean_sum)
        for part_counts, part_sums, _ in self._pending:
            counts += part_counts
            sums += part_sums
        rows = torch.cat([self.codebook[:0], *(part for *_, part in self._pending)])
        self._pending.clear()
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if not counts.sum() > 0:
            return 0
        # Counts are kept in units of an even share, so that `revive_below` does not depend on the batch.
        share = counts.sum() / self.num_embeddings
        self.mean_count.lerp_(counts / share, 1 - self.decay)
        self.mean_sum.lerp_(sums / share, 1 - self.decay)
        used = self.mean_count > self.revive_below
        revived = int((~used).sum())
        if revived:
            fresh = self._draw(rows, revived, generator)
            self.mean_count[~used] = 1.0  # a fair chance before the next revival
            self.mean_sum[~used] = fresh
        self.codebook.copy_(self.mean_sum / self.mean_count[:, None])
        return revived

    def _draw(self, rows: Float[Tensor, "N D"], count: int, generator: torch.Generator) -> Float[Tensor, "R D"]:
        """Random rows of this step, the same on every rank."""
        rows = _gather_rows(rows)
        picks = torch.randint(rows.shape[0], (count,), generator=generator).to(rows.device)
        drawn = rows[picks].clone()
        _broadcast(drawn)
        return drawn

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, codebook={self.learning}"


class _Table(nn.Module):
    """A codebook that no optimizer sees, under the name a parameter would have."""

    def __init__(self, start: Float[Tensor, "K D"]):
        super().__init__()
        self.register_buffer("weight", start)


def _gather_rows(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Rows of all ranks, one after another."""
    if not dist.is_initialized():
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([rows.shape[0]], device=rows.device))
    longest = max(int(size) for size in sizes)
    padded = F.pad(rows, (0, 0, 0, longest - rows.shape[0])).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _broadcast(values: Tensor) -> None:
    if dist.is_initialized():
        dist.broadcast(values, 0)
