"""How often each code of a tokenizer is expected: the tables by which packed token files code their codes.

They follow from the weights alone: a codebook learned by moving averages carries how often each code was chosen in
training, and whoever can decode the tokens has it. Any other codebook counts every code the same.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from app.tokens.entropy import TOTAL, Reader, Writer, table_of, uniform_table
from networks.residual import ResidualQuantizer
from networks.vqvae import SparseVQVAE

COUNT_UNIT = 1 << 16  # of a mean count: whole numbers are the same on every machine
MAX_COUNT = 1 << 40
DIGIT = 1 << 12  # of codes beyond what one table holds


class CodeTables(NamedTuple):
    """Cumulative frequencies of each level's codes; None where every code counts the same."""

    tokenizer: str  # sha256 of the weights
    num_codes: int
    levels: tuple[Int64[np.ndarray, " K1"] | None, ...]


def tables_of(network: SparseVQVAE, digest: str) -> CodeTables:
    """The tables of a tokenizer."""
    parts = network.vq.levels if isinstance(network.vq, ResidualQuantizer) else [network.vq]
    return CodeTables(digest, network.sizes.num_embeddings, tuple(map(_table, parts)))


def _table(quantizer: object) -> Int64[np.ndarray, " K1"] | None:
    counts = getattr(quantizer, "mean_count", None)
    if counts is None or len(counts) > TOTAL // 2:
        return None
    scaled = np.floor(counts.detach().cpu().numpy().astype(np.float64) * COUNT_UNIT)
    return table_of(np.clip(scaled, 0, MAX_COUNT).astype(np.int64) >> 8)


def put_codes(writer: Writer, codes: Integer[np.ndarray, "M L"], tables: CodeTables) -> None:
    """Level by level."""
    for column, table in zip(codes.T, tables.levels, strict=False):
        if table is not None:
            writer.put(column, table)
            continue
        rest, number = column.astype(np.int64), tables.num_codes
        while number > TOTAL:
            writer.put(rest % DIGIT, uniform_table(DIGIT))
            rest, number = rest // DIGIT, -(-number // DIGIT)
        writer.put(rest, uniform_table(number))


def take_codes(reader: Reader, count: int, levels: int, tables: CodeTables) -> Int64[np.ndarray, "M L"]:
    columns = []
    for table in tables.levels[:levels]:
        if table is not None:
            columns.append(reader.take(count, table))
            continue
        column, unit, number = np.zeros(count, np.int64), 1, tables.num_codes
        while number > TOTAL:
            column += unit * reader.take(count, uniform_table(DIGIT))
            unit, number = unit * DIGIT, -(-number // DIGIT)
        columns.append(column + unit * reader.take(count, uniform_table(number)))
    return np.stack(columns, 1)
