"""Pixels of a DICOM stack to HU: decoding, stored bits, slope and intercept slice by slice, equal doubles, even steps.

Where the slices belong was decided by the gate. Uncompressed pixels are read straight from their place in the file.
"""

from collections.abc import Iterator

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from app.prepare.encoding import NATIVE, RLE, items, open_dicom, rle_length, stream_heads
from app.prepare.files import Ref
from app.prepare.findings import Finding, finding
from app.prepare.gate import Stack
from app.prepare.headers import SliceHeader, quiet
from app.shared.refusals import Refused
from transforms.windows import AIR


def read_frames(stack: Stack) -> tuple[np.ndarray, list[Finding]]:
    """HU of every slice, [z, y, x] in the stack's order, with the header's padding as air."""
    first = stack.slices[0]
    plain = all(_is_plain(header) for header in stack.slices)
    frames = np.empty((len(stack.slices), first.rows, first.columns), np.int16 if plain else np.float32)
    reader = _Frames()
    padded = sum(_into(frames[index], header, reader) for index, header in enumerate(stack.slices))
    for index, header in stack.duplicates:
        other = np.empty_like(frames[index])
        _into(other, header, reader)
        if not np.array_equal(other, frames[index]):
            raise Refused("DUPLICATE_SLICES", f"{len(stack.duplicates)} slices lie where another, different one lies")
    return frames, [finding("PADDING_MAPPED", f"{padded} voxels")] if padded else []


def _is_plain(header: SliceHeader) -> bool:
    """Whether HU are whole numbers that fit int16."""
    slope, intercept = header.rescale
    top = 2.0 ** (header.bits_stored - 1 if header.signed else header.bits_stored)
    low, high = (-top, top - 1) if header.signed else (0.0, top - 1)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return slope == int(slope) and intercept == int(intercept) and ends[0] >= -32768 and ends[1] <= 32767


def _into(out: np.ndarray, header: SliceHeader, reader: "_Frames") -> int:
    """HU of one slice, padding as air; the number of padded pixels."""
    stored = reader.read(header)
    slope, intercept = header.rescale
    if out.dtype == np.int16:
        out[...] = stored.astype(np.int32) * int(slope) + int(intercept)
    else:
        out[...] = stored.astype(np.float64) * slope + intercept
    if header.padding is None:
        return 0
    low, high = header.padding
    if max(low * slope, high * slope) + intercept > AIR / 2:
        return 0  # a padding value that is also the value of tissue cannot be told from tissue
    padding = (stored >= low) & (stored <= high)
    out[padding] = AIR
    return int(np.count_nonzero(padding))


class _Frames:
    """Stored pixels of slices; keeps the decoded frames of the last multi-frame file."""

    def __init__(self) -> None:
        self._ref: Ref | None = None
        self._decoded: np.ndarray | None = None

    def read(self, header: SliceHeader) -> np.ndarray:
        """Stored values of one slice (rows, columns), as integers, sign and unused bits put right."""
        if self._ref != header.ref:
            decoded = _native(header) if header.syntax in NATIVE else decode(header)
            if header.frames == 1 and decoded.ndim == 2:
                decoded = decoded[None]
            if decoded.shape != (header.frames, header.rows, header.columns):
                raise Refused("CORRUPT_FILE", "the pixels do not fill the matrix and frames of the header")
            self._ref, self._decoded = header.ref, decoded
        return _stored_bits(self._decoded[header.frame], header)


def _native(header: SliceHeader) -> np.ndarray:
    """Uncompressed pixels of every frame of a file."""
    shape = (header.frames, header.rows, header.columns)
    length = int(np.prod(shape)) * header.bits_allocated // 8
    offset = header.pixels.offset
    if not offset:
        raise Refused("EMPTY", "no pixels in the file")
    stream, _ = open_dicom(header.ref, offset + length)
    with stream:
        stream.seek(offset)
        data = stream.read(length)
    if len(data) != length:
        raise Refused("CORRUPT_FILE", "the pixels are cut short")
    kind = f"{NATIVE[header.syntax]}{'i' if header.signed else 'u'}{header.bits_allocated // 8}"
    return np.frombuffer(data, kind).reshape(shape)


def decode(header: SliceHeader) -> np.ndarray:
    """All frames of a file through pydicom and whichever decoder it finds."""
    syntax = header.syntax
    with quiet():
        try:
            stream, _ = open_dicom(header.ref)
            with stream:
                ds = pydicom.dcmread(stream, force=True)
        except Refused:
            raise
        except Exception as error:
            raise Refused("CORRUPT_FILE", "the DICOM file cannot be read") from error
        if "PixelData" not in ds:
            begun = header.pixels.offset
            code, why = ("CORRUPT_FILE", "the pixels are cut short") if begun else ("EMPTY", "no pixels in the file")
            raise Refused(code, why)
        _match_streams(ds, header)
        try:
            return np.asarray(ds.pixel_array)
        except Exception as error:  # decoders raise nearly anything; tell a missing one from a damaged stream
            if syntax not in NATIVE and not can_decode(syntax, int(ds.get("BitsStored", 16))):
                raise Refused("DECODER_MISSING", f"transfer syntax {syntax}") from error
            raise Refused("CORRUPT_FILE", "the pixels cannot be decoded") from error


def _match_streams(ds: Dataset, header: SliceHeader) -> None:
    """Refuses streams of another image than the header's, on which decoders abort the process or garble it.

    Decoders cut what they read to BitsStored: with all bits that a stream has, `_stored_bits` can tell what is lost.
    """
    heads = stream_heads(ds.PixelData)
    if any((head.rows, head.columns) != (header.rows, header.columns) for head in heads):
        raise Refused("CORRUPT_FILE", "the compressed image has another matrix than the header")
    pixels = header.rows * header.columns
    # some writers pad an image in RLE, by less than a row or a column that a header forgot
    slack = min(header.rows, header.columns)
    if header.syntax == RLE and any(not pixels <= rle_length(i) < pixels + slack for i in items(ds.PixelData)[1:]):
        raise Refused("CORRUPT_FILE", "the compressed image has another number of pixels than the header")
    bits = max((head.bits for head in heads), default=header.bits_allocated)
    if bits > header.bits_allocated or bits <= 16 < header.bits_allocated:
        raise Refused("CORRUPT_FILE", f"a compressed image of {bits} bits, {header.bits_allocated} in the header")
    if bits > header.bits_stored:
        ds.BitsStored, ds.HighBit = bits, bits - 1


def can_decode(syntax: str, bits_stored: int = 12) -> bool:
    """Whether something installed decodes a transfer syntax at this depth."""
    if syntax == "1.2.840.10008.1.2.4.51" and bits_stored > 8:
        return False  # what is installed reads 8 bits of it and would lose the rest
    try:
        from pydicom.pixels import get_decoder  # pydicom 3

        return bool(get_decoder(pydicom.uid.UID(syntax)).is_available)
    except NotImplementedError:
        return False
    except ImportError:
        handlers = pydicom.config.pixel_data_handlers
        return any(h.is_available() and h.supports_transfer_syntax(pydicom.uid.UID(syntax)) for h in handlers)


def _stored_bits(pixels: np.ndarray, header: SliceHeader) -> np.ndarray:
    """The stored bits alone: above them may lie an overlay that the header tells, or a sign, extended or not."""
    unused = header.bits_allocated - header.bits_stored
    if unused == 0 or pixels.dtype.itemsize * 8 != header.bits_allocated:
        return pixels
    mask = (1 << header.bits_stored) - 1
    plain = pixels.astype(f"u{pixels.dtype.itemsize}") & mask
    values = plain
    if header.signed:
        values = (plain.astype(f"i{pixels.dtype.itemsize}") << unused) >> unused
    if not header.overlay and not ((pixels == values) | (pixels == plain)).all():
        raise Refused("CORRUPT_FILE", f"values of more than the {header.bits_stored} bits that the header tells")
    return values


def at_even_steps(frames: np.ndarray, stack: Stack) -> np.ndarray:
    """Slices at every step of the affine, linear between neighbours; the frames themselves where they lie there."""
    places = np.array(stack.positions)
    if len(frames) == stack.count and np.abs(places - np.arange(stack.count)).max() < 1e-9:
        return frames
    out = np.empty((stack.count, *frames.shape[1:]), np.float32)
    for number, (below, share) in enumerate(_between(places, stack.count)):
        out[number] = frames[below] * np.float32(1 - share)
        if share:
            out[number] += frames[below + 1] * np.float32(share)
    return out


def _between(places: np.ndarray, count: int) -> Iterator[tuple[int, float]]:
    for target in range(count):
        below = int(np.clip(np.searchsorted(places, target + 1e-6, side="right") - 1, 0, len(places) - 2))
        share = (target - places[below]) / (places[below + 1] - places[below])
        share = 0.0 if share < 1e-6 else 1.0 if share > 1 - 1e-6 else float(share)
        yield (below + 1, 0.0) if share == 1.0 else (below, share)
