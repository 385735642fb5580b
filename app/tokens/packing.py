"""Tokens as few bytes: a short header, which cells exist, their codes, and the support where it is stored.

The three parts are entropy-coded apart from each other, so that each one's bits can be told. Content from outside is
hostile: every length is checked before memory is taken, and a claim of many cells needs as many bytes to carry it.
"""

import json
import math
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from app.shared.refusals import Refused
from app.tokens.code_tables import CodeTables, put_codes, take_codes
from app.tokens.entropy import Reader, Writer
from app.tokens.occupancy import put_cells, put_support, take_cells, take_support
from networks.residual import NO_CODE

MAGIC = b"VXT1"
MAGIC_OF_LEVELS = b"VXT2"  # cells of unlike numbers of codes
HEAD = struct.Struct("<4s4I")  # magic; bytes of header, cells, codes and support
MAX_HEADER = 1 << 16
MAX_TOKENS = 1 << 24
FIELDS = {  # of tokens beside codes, cells and support: what a plain file stores as arrays, and a packed one's header
    "latent_shape": np.int32,
    "affine": np.float64,
    "source_shape": np.int32,
    "source_affine": np.float64,
    "source_hash": np.str_,
    "features": np.str_,
    "windows": np.str_,
    "spacing": np.float64,
    "keep": np.str_,
    "tokenizer": np.str_,
    "findings": np.str_,
    "voxels": np.int64,
    "refined": np.int64,
}


class Parts(NamedTuple):
    """Packed tokens, part by part."""

    magic: bytes
    header: bytes
    cells: bytes
    codes: bytes
    support: bytes

    def joined(self) -> bytes:
        return HEAD.pack(self.magic, *map(len, self[1:])) + b"".join(self[1:])


def packed(arrays: dict[str, np.ndarray], tables: CodeTables) -> Parts:
    """The arrays of a token file, with the tables of the tokenizer that made it."""
    check_tables(str(arrays["tokenizer"]), tables)
    codes, coords = arrays["codes"], arrays["coords"]
    columns = codes.reshape(len(codes), -1)
    if "levels" in arrays:
        columns = np.where(np.arange(columns.shape[1]) < arrays["levels"][:, None], columns.astype(np.int32), NO_CODE)
    shape = tuple(int(n) for n in arrays["latent_shape"])
    header_fields = {name: arrays[name].tolist() for name in FIELDS if name in arrays}
    header_fields |= {"count": len(codes), "levels": None if codes.ndim == 1 else columns.shape[1]}
    cells, coded, below = Writer(), Writer(), Writer()
    model = put_cells(cells, coords, shape)
    put_codes(coded, columns, coords, shape, tables)
    support = tuple(arrays[name] for name in sorted(arrays) if name.startswith("support_"))
    if support:
        put_support(below, model, coords, shape, support)
    header = zlib.compress(json.dumps(header_fields, separators=(",", ":")).encode(), 9)
    magic = MAGIC_OF_LEVELS if "levels" in arrays else MAGIC
    return Parts(magic, header, cells.finish(), coded.finish(), below.finish() if support else b"")


def unpacked(content: bytes, tables: CodeTables | None, *, support_levels: int) -> dict[str, np.ndarray]:
    """The arrays again, as whole as they were; raises where they are not."""
    parts = _split(content)
    header = _header(parts.header)
    arrays = {name: np.array(header[name], kind) for name, kind in FIELDS.items() if name in header}
    check_tables(str(arrays["tokenizer"]), tables)
    count, levels = header["count"], header["levels"]
    shape = tuple(header["latent_shape"])
    sizes = [count, 1 if levels is None else levels, *shape]
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in sizes) or max(shape) > 1 << 17:
        raise ValueError(f"its sizes must be whole numbers above 0, got {str(sizes)[:80]}")
    if count > min(MAX_TOKENS, math.prod(shape)):
        raise ValueError(f"it claims {count} tokens on a grid of {math.prod(shape)} cells, {MAX_TOKENS} can be packed")
    if levels is not None and levels > len(tables.levels):
        raise ValueError(f"it claims {levels} codes a cell, its tokenizer has {len(tables.levels)}")
    reader = Reader(parts.cells)
    coords, model = take_cells(reader, count, shape)
    reader.finish()
    reader = Reader(parts.codes)
    codes = take_codes(reader, levels or 1, coords, shape, tables, unlike=parts.magic == MAGIC_OF_LEVELS)
    reader.finish()
    if parts.magic == MAGIC_OF_LEVELS:
        arrays["levels"] = (codes != NO_CODE).sum(1).astype(np.uint8)
        codes = np.maximum(codes, 0)
    arrays |= {"coords": coords.astype(np.int32), "codes": (codes[:, 0] if levels is None else codes).astype(np.int32)}
    if parts.support:
        reader = Reader(parts.support)
        for i, part in enumerate(take_support(reader, model, coords, shape, support_levels)):
            arrays[f"support_{i}"] = part
        reader.finish()
    return arrays


def check_tables(tokenizer: str, tables: CodeTables | None) -> None:
    """Raises unless the tables are those of the tokenizer that the tokens name."""
    if tables is None:
        what = f"the tokens are packed, only their tokenizer {tokenizer[:12]} can unpack them"
        raise Refused("OTHER_TOKENIZER", what, "give it with --tokenizer")
    if tables.tokenizer != tokenizer:
        what = f"the tokens were made by tokenizer {tokenizer[:12]}, this one is {tables.tokenizer[:12]}"
        raise Refused("OTHER_TOKENIZER", what, "give theirs with --tokenizer, or tokenize the scan again")


def _split(content: bytes) -> Parts:
    if len(content) < HEAD.size or content[:4] not in (MAGIC, MAGIC_OF_LEVELS):
        raise ValueError("its packed part does not begin as one")
    lengths = HEAD.unpack_from(content)[1:]
    if sum(lengths) != len(content) - HEAD.size:
        raise ValueError(f"its packed part should hold {sum(lengths)} bytes, it has {len(content) - HEAD.size}")
    stops = [HEAD.size + sum(lengths[: i + 1]) for i in range(4)]
    streams = [content[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
    return Parts(content[:4], *streams)


def _header(stored: bytes) -> dict[str, Any]:
    opened = zlib.decompressobj()
    text = opened.decompress(stored, MAX_HEADER)
    if not opened.eof or opened.unused_data:
        raise ValueError(f"its packed header is no text of at most {MAX_HEADER} bytes")
    header = json.loads(text)
    if not isinstance(header, dict) or not {"tokenizer", "latent_shape", "count", "levels"} <= set(header):
        raise ValueError("its packed header lacks what every one has")
    return header
