"""Entropy coding gives back every symbol, in bytes that never change; hostile bytes neither hang nor take memory."""

import numpy as np
import pytest

from app.tokens.entropy import TOTAL, AdaptiveBits, Reader, Writer, uniform_table

COUNTS = np.array([50, 0, 7, 1, 0, 900, 3])
SYMBOLS = np.array([5, 5, 0, 5, 2, 5, 6, 1, 5, 5, 3, 5, 0, 4])
CODED = "009bc40500b58c520db5b70000"
BITS = np.array([0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1], bool)
CODED_BITS = "001b4e3b000993"


def table_of(counts):
    """Cumulative frequencies in proportion to counts, none of them 0."""
    widths = 1 + counts * (TOTAL - len(counts)) // max(counts.sum(), 1)
    widths[np.argmax(counts)] += TOTAL - widths.sum()
    return np.concatenate([[0], np.cumsum(widths)])


def coded(symbols, table):
    writer = Writer()
    writer.put(symbols, table)
    return writer.finish()


def test_a_uniform_table_differs_by_one_at_most():
    assert np.diff(uniform_table(5)).tolist() == [13107] * 4 + [13108]
    assert set(np.diff(uniform_table(5000)).tolist()) == {13, 14}


def test_bytes_are_these_on_every_machine():
    content = coded(SYMBOLS, table_of(COUNTS))
    assert content.hex() == CODED
    reader = Reader(bytes.fromhex(CODED))
    assert reader.take(len(SYMBOLS), table_of(COUNTS)).tolist() == SYMBOLS.tolist()
    reader.finish()


def test_ranges_are_found_again_by_whoever_knows_how(rng):
    """Alphabets of its own for each symbol: so many halves, quarters and eighths."""
    powers = rng.integers(1, 4, 3000)
    symbols = rng.integers(0, 1 << powers)
    widths = TOTAL >> powers
    writer = Writer()
    writer.put_ranges(symbols * widths, (symbols + 1) * widths)
    content = writer.finish()
    assert abs(8 * len(content) - powers.sum()) < 100

    def find(slots, rows):
        found = slots // widths[rows]
        return found, found * widths[rows], (found + 1) * widths[rows]

    reader = Reader(content)
    assert np.array_equal(reader.take_with(3000, find), symbols)
    reader.finish()


def test_bytes_of_adaptive_bits_are_these_on_every_machine():
    writer, contexts, model = Writer(), np.arange(12) % 2, AdaptiveBits(2)
    model.put(writer, BITS, contexts)
    model.put(writer, BITS, contexts)  # by what the first taught
    assert writer.finish().hex() == CODED_BITS
    reader, model = Reader(bytes.fromhex(CODED_BITS)), AdaptiveBits(2)
    assert model.take(reader, contexts).tolist() == model.take(reader, contexts).tolist() == BITS.tolist()
    reader.finish()


@pytest.mark.parametrize("number", [1, 2, 4095, 9000, 40_001])
@pytest.mark.parametrize("kinds", [1, 2, 300, 8192])
def test_every_symbol_comes_back(rng, number, kinds):
    counts = (1000 * rng.gamma(0.2, size=kinds)).astype(int)
    symbols = rng.integers(0, kinds, number)
    content = coded(symbols, table_of(counts))
    reader = Reader(content)
    assert np.array_equal(reader.take(number, table_of(counts)), symbols)
    reader.finish()


def test_calls_of_different_alphabets_follow_each_other(rng):
    calls = [(rng.integers(0, kinds, number), uniform_table(kinds)) for kinds, number in ((7, 3), (2, 9001), (500, 40))]
    writer = Writer()
    for symbols, table in calls:
        writer.put(symbols, table)
    reader = Reader(writer.finish())
    assert all(np.array_equal(reader.take(len(symbols), table), symbols) for symbols, table in calls)
    reader.finish()


def test_it_takes_hardly_more_bits_than_the_entropy(rng):
    counts = (1000 * rng.gamma(0.3, size=8192)).astype(int)
    share = counts / counts.sum()
    symbols = rng.choice(8192, 50_000, p=share)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert entropy < 8 * len(coded(symbols, table_of(counts))) / 50_000 < 1.02 * entropy


def test_adaptive_bits_learn_each_context(rng):
    contexts = rng.integers(0, 3, 60_000)
    bits = rng.random(60_000) < np.array([0.01, 0.5, 0.99])[contexts]
    writer = Writer()
    AdaptiveBits(3).put(writer, bits, contexts)
    content = writer.finish()
    assert 8 * len(content) / 60_000 < 1.3 * (1 + 2 * 0.081) / 3
    assert np.array_equal(AdaptiveBits(3).take(Reader(content), contexts), bits)


def test_bytes_that_are_cut_short_are_refused(rng):
    symbols, table = rng.integers(0, 100, 5000), uniform_table(100)
    content = coded(symbols, table)
    for share in (0, 0.01, 0.5, 0.99):
        with pytest.raises(ValueError, match=r"cut short|does not end as it began"):
            reader = Reader(content[: int(share * len(content))])
            reader.take(5000, table)
            reader.finish()


def test_changed_bits_are_refused_or_another_message(rng):
    """Bytes without redundancy cannot tell: archives have checksums for that."""
    symbols, table, refused = rng.integers(0, 100, 5000), table_of(np.arange(100) ** 3), 0
    content = coded(symbols, table)
    for place in rng.integers(1, len(content), 50):
        other = bytearray(content)
        other[place] ^= 1 << int(rng.integers(8))
        try:
            reader = Reader(bytes(other))
            found = reader.take(5000, table)
            assert not np.array_equal(found, symbols) and 0 <= found.min() <= found.max() < 100
            reader.finish()
        except ValueError:
            refused += 1
    assert refused > 10


def test_a_few_bytes_cannot_ask_for_hours():
    """Symbols that are certain take no bits, so no end of bytes would stop them."""
    reader = Reader(bytes([0, 0, 0, 1, 0]))
    with pytest.raises(ValueError, match="claims more symbols than its length allows"):
        reader.take(10**9, uniform_table(1))
    with pytest.raises(ValueError, match="cut short"):
        Reader(bytes([200]) * 5)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="a symbol of frequency 0 cannot be coded"):
        Writer().put(np.array([1]), np.array([0, 5, 5, TOTAL]))
    with pytest.raises(ValueError, match=f"a table holds 1 to {TOTAL} symbols, got 70000"):
        uniform_table(70_000)
