"""One account of all bits that a decoder needs of a volume: which cells exist, codes, stored support, header.

*Packed* is the entropy-coded file that `--pack` writes, counted to its last byte; *plain* what the same parts take
before entropy coding: the octree and the support a byte a cell, codes at log2 of the codebook. The weights of the
tokenizer, which all volumes share, are not counted.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from app.tokens.occupancy import octree_bytes
from app.tokens.packing import Parts


class Bits(NamedTuple):
    """Of one volume, by what they say. `support` is 0 where none is stored."""

    cells: int
    codes: int
    support: int
    header: int

    @property
    def total(self) -> int:
        return sum(self)


class Rate(NamedTuple):
    plain: Bits
    packed: Bits

    def as_array(self) -> Int64[np.ndarray, "2 4"]:
        """As token files hold it under `bits`: plain, then packed."""
        return np.array(self, np.int64)

    def as_json(self, *, tokens: int, voxels: int | None) -> dict[str, Any]:
        """The packed bits, per token and per voxel that the encoder saw."""
        total = self.packed.total
        per_voxel = None if voxels is None else total / voxels
        parts = {**self.packed._asdict(), "total": total, "plain": self.plain.total}
        return {**parts, "per_token": total / tokens, "per_voxel": per_voxel}


def rate(parts: Parts, arrays: dict[str, np.ndarray], *, num_codes: int, file_bytes: int) -> Rate:
    """Of a token file's arrays and what they pack to; all of the file that is no part counts as header."""
    streams = [8 * len(part) for part in (parts.cells, parts.codes, parts.support)]
    header = 8 * file_bytes - sum(streams)
    shape = tuple(int(n) for n in arrays["latent_shape"])
    support = 8 * sum(len(part) for name, part in arrays.items() if name.startswith("support_"))
    number, bits_of_levels = arrays["codes"].size, 0.0
    if "levels" in arrays:
        levels = arrays["levels"]
        number, bits_of_levels = int(levels.sum()), len(levels) * math.log2(int(levels.max()))
    codes = math.ceil(number * math.log2(num_codes) + bits_of_levels)
    return Rate(Bits(8 * octree_bytes(arrays["coords"], shape), codes, support, header), Bits(*streams, header))
