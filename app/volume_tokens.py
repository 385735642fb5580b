"""The tokens of whatever a row calls its image: a token file, a prepared case, or HU in memory; kept on disk.

Encoding is the slow part of alignment and never changes while the tokenizer is frozen, so each volume is encoded once
and kept under the tokenizer's hash. Turns codes into codebook vectors; knows no text.
"""

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Num
from monai.transforms import Compose
from torch import Tensor

from app import data, prepared
from app.training import to_sparse
from networks.sparse import SparseTensor
from networks.tokens import TokenSequence, reduce_tokens
from networks.vqvae import SparseVQVAE

log = logging.getLogger(__name__)


class VolumeTokens(NamedTuple):
    codes: Int32[Tensor, " M"]
    coords: Int32[Tensor, "M 3"]
    latent_shape: tuple[int, int, int]


def encode_hu(
    network: SparseVQVAE, hu: Num[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"] | None
) -> VolumeTokens:
    """Tokens of a whole RAS volume in HU, resampled and windowed as the tokenizer was trained."""
    sizes = network.sizes
    steps = data.preprocessing(
        resolution=sizes.resolution, spacing=sizes.spacing, keep=sizes.keep, windows=sizes.windows
    )
    item = Compose([*steps, *data.sampling(windows=sizes.windows)])({"image": hu, "affine": affine})
    batch = {
        "feats": torch.from_numpy(np.ascontiguousarray(item["feats"], np.float32)),
        "coords": torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(item["coords"], np.int32)), (1, 0)),
        "spatial_shape": item["spatial_shape"],
        "batch_size": 1,
    }
    return encode_sparse(network, to_sparse(batch, next(network.parameters()).device))[0]


def encode_sparse(network: SparseVQVAE, x: SparseTensor) -> list[VolumeTokens]:
    """Tokens of each sample of a batch."""
    tokens = network.encode(x)
    parts = [tokens.coords[:, 0] == sample for sample in range(tokens.batch_size)]
    return [VolumeTokens(tokens.codes[p].cpu(), tokens.coords[p, 1:].cpu(), tokens.latent_shape) for p in parts]


def extract_3d_latent_and_indices(
    batch: dict, vqvae: SparseVQVAE
) -> tuple[Float[Tensor, "M D"], Int32[Tensor, "M 4"], Int[Tensor, " M"]]:
    """Codebook vectors, coordinates and codes of a batch of features: what language models are given."""
    tokens = vqvae.encode(to_sparse(batch, next(vqvae.parameters()).device))
    return vqvae.vq.lookup(tokens.codes), tokens.coords, tokens.codes


class Reducer:
    """From codes to the sequence that the language model reads: codebook vectors, ordered and within the budget."""

    def __init__(self, codebook: Float[Tensor, "K D"], *, max_tokens: int = 2048, method: str = "pool"):
        self.codebook, self.max_tokens, self.method = codebook.detach().float().cpu(), max_tokens, method

    def __call__(self, tokens: VolumeTokens) -> TokenSequence:
        if len(tokens.codes) and int(tokens.codes.max()) >= len(self.codebook):
            raise ValueError(
                f"codes go up to {int(tokens.codes.max())}, the tokenizer has {len(self.codebook)}: "
                "the tokens are of another tokenizer"
            )
        feats = self.codebook[tokens.codes.long()]
        return reduce_tokens(feats, tokens.coords, max_tokens=self.max_tokens, method=self.method)


class TokenSource:
    """Tokens by path, encoded once.

    Args:
        network: the tokenizer; None where only token files are read.
        tokenizer_hash: sha256 of its checkpoint; token files of another tokenizer are refused.
        cache_dir: where encoded tokens are kept; None keeps none.
        read_scan: gives (hu, affine) of a raw scan; None refuses raw scans.
    """

    def __init__(
        self,
        network: SparseVQVAE | None,
        *,
        tokenizer_hash: str,
        cache_dir: str | Path | None = None,
        read_scan: Callable[[Path], tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self.network, self.tokenizer_hash, self.read_scan = network, tokenizer_hash, read_scan
        self.cache_dir = None if cache_dir is None else Path(cache_dir) / tokenizer_hash[:16]

    def __call__(self, path: Path) -> VolumeTokens:
        if path.suffix == ".npz":
            return read_token_file(path, self.tokenizer_hash)
        if self.network is None:
            raise ValueError(f"{path.name} is no token file, and there is no tokenizer to encode it: give vae_ckpt")
        if is_prepared_case(path):
            case = prepared.open_case(path)
            return self.cached(f"{case.case_id}.{case.source_hash[:16]}", lambda: (case.hu(), case.affine))
        if self.read_scan is None:
            raise ValueError(f"{path.name} is no token file and no prepared case")
        return self.cached(f"scan.{hash_path(path)[:24]}", lambda: self.read_scan(path))

    def cached(self, key: str, read: Callable[[], tuple[np.ndarray, np.ndarray]]) -> VolumeTokens:
        """Tokens under this key, or encoded now and kept."""
        file = None if self.cache_dir is None else self.cache_dir / f"{key}.npz"
        if file is not None and file.is_file():
            try:
                return read_token_file(file, self.tokenizer_hash)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                log.warning("cached tokens %s are damaged and are made again", file.name)
        tokens = encode_hu(self.network, *read())
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.stem}.{os.getpid()}.npz")
            np.savez(
                beside,
                codes=tokens.codes.numpy(),
                coords=tokens.coords.numpy(),
                latent_shape=np.array(tokens.latent_shape, np.int32),
                tokenizer=np.array(self.tokenizer_hash),
            )
            beside.replace(file)
        return tokens


def is_prepared_case(path: Path) -> bool:
    return path.is_dir() and ((path / "case.json").is_file() or any(path.glob("ct_normalized_*.np[yz]")))


def read_token_file(path: Path, tokenizer_hash: str) -> VolumeTokens:
    """Codes and coordinates of a token file of this tokenizer."""
    with np.load(path, allow_pickle=False) as stored:
        made_by = str(stored["tokenizer"]) if "tokenizer" in stored else ""
        if made_by != tokenizer_hash:
            raise ValueError(
                f"{path.name} was made by tokenizer {made_by[:12] or 'unknown'}, this is {tokenizer_hash[:12]}: "
                "tokenize the scan again"
            )
        codes, coords = torch.from_numpy(stored["codes"]), torch.from_numpy(stored["coords"])
        if codes.ndim != 1:
            raise ValueError(f"{path.name} has codes of shape {tuple(codes.shape)}, language reads one level (M,)")
        return VolumeTokens(codes.int(), coords.int(), tuple(int(n) for n in stored["latent_shape"]))


def hash_path(path: str | Path) -> str:
    """sha256 of a file's bytes; of a folder the hash over its files' relative names and hashes."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)} {hash_path(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
