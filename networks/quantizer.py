"""Vector quantiser: nearest code per row, straight-through gradient (arXiv:1711.00937, eqs. 1-3).

Knows rows, not space. The codebook is learned by moving averages (`codebook="ema"`: a buffer, changed only by `update`,
once per optimizer step) or by gradient (`codebook="gradient"`: a parameter, pulled by the `vq` loss).
Search, losses and sums run in float32 whatever the autocast; N x K distances are never held at once.
Other kinds with the same methods are in fsq.py (no codebook) and residual.py (several codes a row).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from networks.sparse import ops

SEARCH_CELLS = 2**24  # distances held at a time: 64 MiB of float32
MIN_VECTORS_PER_CODE = 4


class Quantized(NamedTuple):
    values: Float[Tensor, "N D"]  # codebook rows, with the gradient of the input
    codes: Int64[Tensor, "N ..."]  # (N,), or (N, levels) where a row has several
    vq: Float[Tensor, " N"]  # per row, so that the caller can average within samples
    commitment: Float[Tensor, " N"]


def nearest_codes(rows: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int64[Tensor, " N"]:
    """Index of the closest codebook row; the lowest index wins a tie."""
    if kernels := _fused(rows):
        return kernels.nearest_codes(rows, codebook)
    half_norms = codebook.square().sum(1) / 2
    chunk = max(SEARCH_CELLS // codebook.shape[0], 1)
    codes = [torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1) for part in rows.split(chunk)]
    return torch.cat(codes) if codes else rows.new_zeros(0, dtype=torch.int64)


def code_sums(
    rows: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], num_codes: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K D"]]:
    """How many rows chose each code, and their sum, added in a fixed order."""
    if kernels := _fused(rows):
        return kernels.code_sums(rows, codes, num_codes)
    counts = torch.bincount(codes, minlength=num_codes)
    order = torch.argsort(codes, stable=True)
    sums = torch.segment_reduce(rows[order], "sum", lengths=counts, initial=0.0)
    return counts.to(rows.dtype), sums


def _fused(rows: Float[Tensor, "N D"]) -> ModuleType | None:
    """The Triton search and sums where these rows can use them."""
    kernels = ops.fused("code_search", rows) if rows.dtype == torch.float32 else None
    return kernels if kernels and kernels.tile_for(rows.shape[1], rows.device, few=False).stages else None


class _FusedQuantize(torch.autograd.Function):
    """Codes, their values with the gradient of the rows, and the mean squared difference, in one pass."""

    @staticmethod
    def forward(ctx, rows, codebook, kernels):
        found = kernels.nearest(rows, codebook)
        ctx.mark_non_differentiable(found.codes)
        ctx.save_for_backward(rows, found.values)
        return tuple(found)

    @staticmethod
    def backward(ctx, _, grad_values, grad_errors):
        rows, values = ctx.saved_tensors
        return torch.addcmul(grad_values, rows - values, grad_errors[:, None], value=2 / rows.shape[1]), None, None


def check_codes(codes: Int[Tensor, "..."], num_codes: int) -> None:
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= num_codes):
        raise ValueError(f"codes must lie in 0..{num_codes - 1}, got {int(codes.min())}..{int(codes.max())}")


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


def straight_through(rows: Float[Tensor, "N D"], values: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The values, with the gradient of the rows."""
    return rows + (values - rows).detach()


def rotated(rows: Float[Tensor, "N D"], values: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The values as a rotation and stretch of the rows, both held constant (arXiv:2410.06424, eq. 4).

    The gradient reaches a row turned and stretched back with it, instead of copied; a row or value of zero copies.
    """
    rows_norm = rows.detach().norm(dim=1, keepdim=True)
    values_norm = values.detach().norm(dim=1, keepdim=True)
    start = rows.detach() / rows_norm.clamp(min=1e-12)
    end = values.detach() / values_norm.clamp(min=1e-12)
    middle = F.normalize(start + end, dim=1)
    turned = rows - 2 * (rows * middle).sum(1, keepdim=True) * middle + 2 * (rows * start).sum(1, keepdim=True) * end
    moved = turned * (values_norm / rows_norm.clamp(min=1e-12))
    plain = (rows_norm < 1e-6) | (values_norm < 1e-6) | ((start * end).sum(1, keepdim=True) < -0.9999)
    exact = moved + (values - moved).detach()  # rounding aside they are equal: what is decoded is the code itself
    return torch.where(plain, straight_through(rows, values), exact)


class VectorQuantizer(nn.Module):
    """Replaces each row by its nearest codebook row.

    Args:
        rotation_trick: `rotated` in place of `straight_through`.
        normalize_codes: codes lie on a sphere, so that a row's direction alone chooses; its radius is the rows' mean
            length when the codebook is laid.
        decay: weight of the old value in the moving averages.
        revive_below: a code whose average count falls below this restarts at a random current row.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        codebook: str = "ema",
        rotation_trick: bool = False,
        normalize_codes: bool = False,
        decay: float = 0.99,
        revive_below: float = 0.05,
    ):
        super().__init__()
        if codebook not in ("ema", "gradient"):
            raise ValueError(f"codebook must be ema or gradient, got {codebook!r}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.learning, self.decay, self.revive_below = codebook, decay, revive_below
        self.is_fixed = False
        self.rotation_trick, self.normalize_codes = rotation_trick, normalize_codes
        if normalize_codes:
            self.register_buffer("radius", torch.ones(()))
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
        return self._on_sphere(self.embeddings.weight)

    @property
    def follows_rows(self) -> bool:
        return self.learning == "ema" and not self.is_fixed

    def requires_grad_(self, requires_grad: bool = True) -> "VectorQuantizer":
        """Says of averages too whether they learn: no gradient shows it."""
        self.is_fixed = not requires_grad
        return super().requires_grad_(requires_grad)

    def _on_sphere(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.radius * F.normalize(rows, dim=1) if self.normalize_codes else rows

    def forward(self, rows: Float[Tensor, "N D"]) -> Quantized:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            found = self._by_gradient(wide) if self.learning == "gradient" else self._by_averages(wide)
            if self.follows_rows and self.training and torch.is_grad_enabled():  # without: an evaluation
                seen = self._on_sphere(wide.detach())
                self._pending.append((*code_sums(seen, found.codes, self.num_embeddings), seen))
            return found

    def _by_gradient(self, rows: Float[Tensor, "N D"]) -> Quantized:
        codebook = self.codebook
        codes = nearest_codes(rows.detach(), codebook.detach())  # codes of one length: the nearest direction
        values = F.embedding(codes, codebook)
        commitment = (rows - values.detach()).square().mean(1)
        vq = (values - rows.detach()).square().mean(1)
        return Quantized(self._estimate(rows, values), codes, vq, commitment)

    def _by_averages(self, rows: Float[Tensor, "N D"]) -> Quantized:
        codebook = self.codebook
        if (kernels := _fused(rows)) and not self.rotation_trick:
            codes, values, commitment = _FusedQuantize.apply(rows, codebook, kernels)
        else:
            codes = nearest_codes(rows.detach(), codebook)
            values = F.embedding(codes, codebook)
            commitment = (rows - values).square().mean(1)
            values = self._estimate(rows, values)
        return Quantized(values, codes, commitment.detach(), commitment)

    def _estimate(self, rows: Float[Tensor, "N D"], values: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return (rotated if self.rotation_trick else straight_through)(rows, values)

    def lookup(self, codes: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Codebook rows of codes."""
        check_codes(codes, self.num_embeddings)
        return F.embedding(codes.long(), self.codebook)

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, "N D"], *, generator: torch.Generator) -> None:
        """k-means on encoder outputs of all ranks; every rank gets the same codebook."""
        rows = gather_rows(rows.float())
        rows = rows[rows[:, 0].argsort()]  # an order that does not tell which rank saw a row
        if self.normalize_codes:
            self.radius.copy_(rows.norm(dim=1).mean())
            rows = self._on_sphere(rows)
        centres = self._on_sphere(kmeans(rows, self.num_embeddings, generator=generator))
        broadcast(centres)
        self.embeddings.weight.copy_(centres)
        if self.learning == "ema":
            counts, _ = code_sums(rows, nearest_codes(rows, centres), self.num_embeddings)
            self.mean_count.copy_(counts / counts.mean())
            self.mean_sum.copy_(centres * self.mean_count[:, None])

    def update(self, *, generator: torch.Generator) -> Int64[Tensor, ""] | int:
        """One moving-average step from all rows seen since the last, over micro-batches and ranks.

        Gives the number of codes revived. Does nothing for a codebook that learns by gradient, or not at all.
        """
        return update_together([self], generator=generator)

    def follow(self) -> tuple[Bool[Tensor, " K"], Float[Tensor, "N D"]] | None:
        """Moves averages and codes towards the rows seen; gives the codes to revive, and the rows to draw from."""
        pending, self._pending = self._pending, []
        total = sum(len(rows) for *_, rows in pending)
        counts = _added([counts for counts, *_ in pending], self.mean_count)
        sums = _added([sums for _, sums, _ in pending], self.mean_sum)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            total = int(counts.sum())
        if total == 0:
            return None
        # Counts are kept in units of an even share, so that `revive_below` does not depend on the batch.
        unused = self._advance(counts, sums, share=total / self.num_embeddings)
        rows = [rows for *_, rows in pending]
        return unused, rows[0] if len(rows) == 1 else torch.cat([sums[:0], *rows])

    def _advance(self, counts: Float[Tensor, " K"], sums: Float[Tensor, "K D"], *, share: float) -> Bool[Tensor, " K"]:
        """Moves averages and codes; gives the codes that too few rows chose."""
        if (kernels := _fused(sums)) and not self.normalize_codes:
            averages = self.mean_count, self.mean_sum, self.embeddings.weight
            return kernels.advance(averages, counts, sums, share=share, rate=1 - self.decay, least=self.revive_below)
        self.mean_count.lerp_(counts / share, 1 - self.decay)
        self.mean_sum.lerp_(sums / share, 1 - self.decay)
        self.embeddings.weight.copy_(self._on_sphere(self.mean_sum / self.mean_count[:, None]))
        return self.mean_count <= self.revive_below

    def revive(
        self, unused: Bool[Tensor, " K"], rows: Float[Tensor, "N D"], picks: Int64[Tensor, " P"], used: Tensor | int
    ) -> Int64[Tensor, ""]:
        """Unused codes restart, one after another, at the rows picked, behind the picks `used`; gives those used now.

        How many codes that are stays on the device: the host would have to wait for it.
        """
        places = unused.cumsum(0)
        if isinstance(used, Tensor):
            places += used
        if (kernels := _fused(rows)) and not self.normalize_codes:
            averages = self.mean_count, self.mean_sum, self.embeddings.weight
            kernels.revive(averages, unused, places, picks, rows.contiguous())
            return places[-1]
        fresh = rows.index_select(0, picks.index_select(0, (places - 1).clamp(min=0)))
        self.mean_count.masked_fill_(unused, 1.0)  # a fair chance before the next revival
        self.mean_sum.copy_(torch.where(unused[:, None], fresh, self.mean_sum))
        self.embeddings.weight.copy_(torch.where(unused[:, None], self._on_sphere(fresh), self.embeddings.weight))
        return places[-1]

    def extra_repr(self) -> str:
        options = [name for name in ("rotation_trick", "normalize_codes") if getattr(self, name)]
        return ", ".join([f"{self.num_embeddings}, {self.embedding_dim}, codebook={self.learning}", *options])


@torch.no_grad()
def update_together(parts: Sequence[VectorQuantizer], *, generator: torch.Generator) -> Int64[Tensor, ""] | int:
    """One step of several quantisers; gives the number of codes revived, the same on every rank."""
    learning = [part for part in parts if part.follows_rows]
    num_rows, picks, used = 0, None, 0
    for part in learning:
        if (seen := part.follow()) is None:
            continue
        unused, rows = seen
        if dist.is_initialized():  # here a wait costs less than bringing all rows together for nothing
            if not bool(unused.any()):
                continue
            rows = gather_rows(rows)
        if rows.shape[0] != num_rows:  # as a rule all saw as many
            num_rows, most = rows.shape[0], sum(one.num_embeddings for one in learning)
            picks = ops.send(torch.randint(num_rows, (most,), generator=generator), rows.device)
        used = part.revive(unused, rows, picks, used)
    return used


def _added(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum(0) if parts else torch.zeros_like(like)


class _Table(nn.Module):
    """A codebook that no optimizer sees, under the name a parameter would have."""

    def __init__(self, start: Float[Tensor, "K D"]):
        super().__init__()
        self.register_buffer("weight", start)


def gather_rows(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
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


def broadcast(values: Tensor) -> None:
    if dist.is_initialized():
        dist.broadcast(values, 0)
