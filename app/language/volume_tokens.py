"""The tokens of whatever a row calls its image: a token file, a prepared case, a raw scan; kept on disk.

Encoding is the slow part of alignment and never changes while the tokenizer is frozen, so each volume is encoded once
and kept under the tokenizer's hash. Turns codes into codebook vectors; knows no text.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from app.tokens.open_scan import scan_source
from app.tokens.token_files import CTTokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.training.step import SparseBatch
from networks.cell_detector import SHOWN, CellDetector
from networks.sparse import SparseTensor
from networks.tokens import TokenSequence, reduce_tokens
from networks.vqvae import SparseVQVAE
from transforms import Windowsd
from transforms.grid import RESAMPLER

log = logging.getLogger(__name__)


def sparse_inputs(inputs: dict, vqvae: SparseVQVAE, device: torch.device | str | None = None) -> SparseTensor:
    """The original scripts' dict of sparse_sdf, sparse_index, batch_idx: values on voxels of the tokenizer's grid."""
    index, sample = torch.as_tensor(inputs["sparse_index"]), torch.as_tensor(inputs["batch_idx"])
    device = next(vqvae.parameters()).device if device is None else device
    coords = torch.cat([sample.view(-1, 1), index], 1).int().to(device)
    feats = torch.as_tensor(inputs["sparse_sdf"]).float().to(device)
    return SparseTensor(feats, coords, (vqvae.sizes.resolution,) * 3, int(sample.max()) + 1)


def extract_3d_latent_and_indices(
    batch: dict, vqvae: SparseVQVAE, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "M D"], Int32[Tensor, "M 4"], Int[Tensor, "M ..."]]:
    """Codebook vectors, coordinates and codes of a batch: what language models are given.

    A batch of a loader, or the original scripts' dict of sparse_sdf, sparse_index, batch_idx. `device`: where the
    network lies, unless it is moved there by this. Of several quantiser levels they read the first.
    """
    device = next(vqvae.parameters()).device if device is None else torch.device(device)
    if "sparse_index" in batch:
        x = sparse_inputs(batch, vqvae, device)
    else:
        x = SparseBatch(Windowsd("values", windows=vqvae.sizes.windows))(batch, device)
    tokens = vqvae.to(device).encode(x, levels=1)
    return vqvae.vq.lookup(tokens.codes), tokens.coords, tokens.codes


class Reducer:
    """From codes to the sequence that the language model reads: code vectors, ordered and within the budget.

    `lookup` gives the vector of each code; `width` is theirs. Of several quantiser levels the first `levels` are read:
    a cell stays one token, its vector the sum of theirs. With a `detector` vectors have its numbers behind them, and
    the likeliest cells of each kind and half come first, as they are; the rest keeps its order.
    """

    def __init__(
        self,
        lookup: Callable[[Tensor], Tensor],
        *,
        width: int,
        max_tokens: int = 2048,
        method: str = "pool",
        levels: int = 1,
        detector: CellDetector | None = None,
    ):
        self.lookup, self.width, self.max_tokens, self.method, self.levels = lookup, width, max_tokens, method, levels
        self.detector = detector

    def __call__(self, tokens: CTTokens) -> TokenSequence:
        codes = torch.from_numpy(tokens.first_levels(self.levels))
        return self.rows(self.lookup(codes), torch.from_numpy(tokens.coords))

    def rows(self, feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"]) -> TokenSequence:
        """The same of vectors."""
        feats, budget = feats.float(), {"max_tokens": self.max_tokens, "method": self.method}
        if self.detector is None:
            return reduce_tokens(feats, coords, **budget)
        feats = self.detector.beside(feats, coords)
        count = min(SHOWN, (self.max_tokens - 1) // (2 * self.detector.num_kinds))
        first = self.detector.likeliest(feats, coords, count=count)
        shown = TokenSequence(feats[first], coords[first].int(), torch.ones_like(first))
        others = torch.ones(len(feats), dtype=torch.bool).index_fill_(0, first, False)
        if others.any():
            budget["max_tokens"] -= len(first)
            rest = reduce_tokens(feats[others], coords[others], **budget)
            shown = TokenSequence(*(torch.cat(parts) for parts in zip(shown, rest, strict=True)))
        return shown._replace(feats=self.detector.survey(shown.feats, shown.coords))

    def without(self, volume: TokenSequence, rows: Bool[Tensor, " T"]) -> TokenSequence:
        """The same with some rows featureless: as the volume's mean; what a detector says of the whole follows."""
        feats = torch.where(rows[:, None], volume.feats.mean(0), volume.feats)
        return volume._replace(feats=feats if self.detector is None else self.detector.survey(feats, volume.coords))

    def to_learn_from(self, volume: TokenSequence, *, seed: int) -> TokenSequence:
        """The same while a model learns: beside a detector with few vectors, else as it is."""
        if self.detector is None:
            return volume
        return volume._replace(feats=self.detector.with_few_vectors(volume.feats, seed=seed))


class TokenSource:
    """Tokens by path, encoded once and kept in `cache_dir` under the tokenizer's hash and the resampler's name."""

    def __init__(self, tokenizer: CTTokenizer, *, cache_dir: str | Path):
        self.tokenizer = tokenizer
        self.cache_dir = Path(cache_dir) / f"{tokenizer.digest[:16]}.{RESAMPLER.replace(' ', '_')}.all_levels"

    def __call__(self, path: Path) -> CTTokens:
        """Tokens of whatever lies there, by the one door for scans; a token file is read where it is."""
        source = scan_source(path)
        if source.kind == "tokens" or not source.key:  # what has no key cannot be read: encoding it says why
            return self.tokenizer.encode(source)
        return self.cached(source.key, lambda: source)

    def cached(self, key: str, scan: Callable[[], Any]) -> CTTokens:
        """Tokens kept under this key; else those of `scan()`, encoded now and kept."""
        file = self.cache_dir / f"{key}.npz"
        if file.is_file():
            try:
                return self.tokenizer.read(file)
            except ValueError:
                log.warning("cached tokens %s are damaged and are made again", file.name)
        tokens = self.tokenizer.encode(scan())
        write_tokens(file, tokens)
        return tokens
