"""Entropy coding in whole numbers: interleaved rANS (Duda, arXiv:1311.2540), so the same bytes on every machine.

Symbols are coded by cumulative frequencies out of `TOTAL`; what predicts them is the caller's. Symbol i of a call goes
to lane i modulo the number of lanes, and all lanes share one stream of 16-bit words: a step of all lanes is a few array
operations. Content from outside is hostile: it is checked before memory is taken, and ends as it began or is refused.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

PRECISION = 16
TOTAL = 1 << PRECISION
LOWEST = 1 << 16  # of a lane's state between symbols; the highest is 2^32 - 1
SYMBOLS_A_LANE = 1 << 12
MAX_LANES = 1 << 12
MAX_STEPS = 1 << 15  # of all lanes, a thousand a second at worst: content that asks for more is refused
CHUNK_SIZES = (1 << 7, 1 << 14)  # of adaptive bits between two looks at what was coded: at first, and at most


# The symbol, and start and stop of its range, for each slot of some rows.
Find = Callable[[Int64[np.ndarray, " N"], slice], tuple[np.ndarray, np.ndarray, np.ndarray]]


class _Call(NamedTuple):
    starts: UInt64[np.ndarray, " N"]
    widths: UInt64[np.ndarray, " N"]


class Writer:
    """Symbols in, bytes out."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def put(self, symbols: np.ndarray, cumulative: np.ndarray) -> None:
        """Symbols of an alphabet whose cumulative frequencies, 0 to TOTAL, are given once (K + 1,) or a row each."""
        table, symbols = np.asarray(cumulative, np.uint64), np.asarray(symbols, np.int64)
        if table.ndim == 1:
            starts, stops = table[symbols], table[symbols + 1]
        else:
            rows = np.arange(len(symbols))
            starts, stops = table[rows, symbols], table[rows, symbols + 1]
        self.put_ranges(starts, stops)

    def put_ranges(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Symbols by the ranges of cumulative frequency that stand for them."""
        if (stops <= starts).any():
            raise ValueError("a symbol of frequency 0 cannot be coded")
        self._calls.append(_Call(starts.astype(np.uint64), (stops - starts).astype(np.uint64)))

    def finish(self) -> bytes:
        """A byte for the number of lanes, the lanes' states, the words."""
        total = sum(len(call.starts) for call in self._calls)
        power = min(max(total // SYMBOLS_A_LANE, 1).bit_length() - 1, MAX_LANES.bit_length() - 1)
        lanes = 1 << power
        states = np.full(lanes, LOWEST, np.uint64)
        words: list[np.ndarray] = []
        for call in reversed(self._calls):
            for first in reversed(range(0, len(call.starts), lanes)):
                starts, widths = call.starts[first : first + lanes], call.widths[first : first + lanes]
                state = states[: len(starts)]
                full = state >= widths << np.uint64(16)
                if full.any():
                    words.append((state[full] & np.uint64(0xFFFF))[::-1].astype("<u2"))
                    state[full] >>= np.uint64(16)
                quotient = state // widths
                state += quotient * (np.uint64(TOTAL) - widths) + starts
        stream = np.concatenate(words)[::-1] if words else np.zeros(0, "<u2")
        return bytes([power]) + states.astype("<u4").tobytes() + stream.tobytes()


class Reader:
    """Bytes in, symbols out, by the very calls that wrote them."""

    def __init__(self, content: bytes) -> None:
        power = content[0] if content else 255
        lanes = 1 << min(power, 13)
        if lanes > MAX_LANES or len(content) < 1 + 4 * lanes or (len(content) - 1) % 2:
            raise ValueError("an entropy-coded part is cut short")
        self._states = np.frombuffer(content, "<u4", lanes, 1).astype(np.uint64)
        self._words = np.frombuffer(content, "<u2", offset=1 + 4 * lanes).astype(np.uint64)
        self._at, self._steps = 0, 0

    def take(self, count: int, cumulative: np.ndarray) -> Int64[np.ndarray, " N"]:
        """The next symbols; frequencies as they were given to `Writer.put`."""
        table = np.asarray(cumulative, np.int64)
        if table.ndim == 1:
            symbol_at = np.repeat(np.arange(len(table) - 1), np.diff(table))

        def find(slots: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            if table.ndim == 1:
                symbol = symbol_at[slots]
                return symbol, table[symbol], table[symbol + 1]
            mine, each = table[rows], np.arange(len(slots))
            symbol = (mine[:, 1:-1] <= slots[:, None]).sum(1)
            return symbol, mine[each, symbol], mine[each, symbol + 1]

        return self.take_with(count, find)

    def take_with(self, count: int, find: Find) -> Int64[np.ndarray, " N"]:
        """The next symbols, where `find` gives the symbol and range of each slot, for some of the rows."""
        lanes = len(self._states)
        self._steps += -(-count // lanes)
        if self._steps > MAX_STEPS:
            raise ValueError("an entropy-coded part claims more symbols than its length allows")
        symbols = np.empty(count, np.int64)
        for first in range(0, count, lanes):
            state = self._states[: min(lanes, count - first)]
            slot = state & np.uint64(TOTAL - 1)
            symbol, starts, stops = find(slot.astype(np.int64), slice(first, first + lanes))
            starts, stops = starts.astype(np.uint64), stops.astype(np.uint64)
            symbols[first : first + lanes] = symbol
            state >>= np.uint64(PRECISION)
            state *= stops - starts
            state += slot - starts
            low = state < LOWEST
            if low.any():
                state[low] = (state[low] << np.uint64(16)) | self._next(int(low.sum()))
        return symbols

    def _next(self, count: int) -> UInt64[np.ndarray, " N"]:
        if self._at + count > len(self._words):
            raise ValueError("an entropy-coded part is cut short")
        self._at += count
        return self._words[self._at - count : self._at]

    def finish(self) -> None:
        """Raises unless everything was taken and every lane is back where its writer began."""
        if self._at != len(self._words) or (self._states != LOWEST).any():
            raise ValueError("an entropy-coded part does not end as it began")


class AdaptiveBits:
    """Bits by context: each context's share of ones is what it was so far.

    Begun at a half, or at `ones` of `whole`; a bit counts `step`. By default that is twice what was believed at first
    (Krichevsky and Trofimov).
    """

    def __init__(
        self, num_contexts: int, *, ones: Int64[np.ndarray, " N"] | None = None, whole: int = 2, step: int = 2
    ) -> None:
        self._ones = np.ones(num_contexts, np.int64) if ones is None else ones.copy()
        self._all, self._step = np.full(num_contexts, whole, np.int64), step
        self._seen = 0

    def put(self, writer: Writer, bits: Bool[np.ndarray, " N"], contexts: Int64[np.ndarray, " N"]) -> None:
        for rows in self._chunks(len(bits)):
            writer.put(bits[rows], self._cumulative(contexts[rows]))
            self._learn(bits[rows], contexts[rows])

    def take(self, reader: Reader, contexts: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        bits = np.empty(len(contexts), bool)
        for rows in self._chunks(len(bits)):
            bits[rows] = reader.take(len(contexts[rows]), self._cumulative(contexts[rows]))
            self._learn(bits[rows], contexts[rows])
        return bits

    def _cumulative(self, contexts: np.ndarray) -> Int64[np.ndarray, "N 3"]:
        ones, whole = self._ones[contexts], self._all[contexts]
        middle = np.clip(((whole - ones) << PRECISION) // whole, 1, TOTAL - 1)
        return np.stack([np.zeros_like(middle), middle, np.full_like(middle, TOTAL)], 1)

    def _learn(self, bits: np.ndarray, contexts: np.ndarray) -> None:
        np.add.at(self._all, contexts, self._step)
        np.add.at(self._ones, contexts[bits], self._step)
        self._seen += len(bits)

    def _chunks(self, count: int) -> Iterator[slice]:
        """They grow with what was coded: a few bits more then change the shares little."""
        first, (least, most) = 0, CHUNK_SIZES
        while first < count:
            yield (rows := slice(first, first + min(max(self._seen // 8, least), most)))
            first = rows.stop


def uniform_table(num_symbols: int) -> Int64[np.ndarray, " K1"]:
    """Cumulative frequencies that differ by one at most."""
    if not 1 <= num_symbols <= TOTAL:
        raise ValueError(f"a table holds 1 to {TOTAL} symbols, got {num_symbols}")
    return np.arange(num_symbols + 1, dtype=np.int64) * TOTAL // num_symbols
