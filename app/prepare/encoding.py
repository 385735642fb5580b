"""DICOM files as bytes: how a data set is encoded, inflated within a limit; where its pixels lie, and what they tell.

What a file's meta states and what its bytes show must agree; without meta the bytes count. Fields are read by
`headers`, pixels by `pixels`.
"""

import io
import struct
import zlib
from typing import NamedTuple

from app.prepare.files import Ref, open_ref, read_bytes
from app.shared.refusals import Refused

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
NATIVE = {IMPLICIT: "<", EXPLICIT: "<", BIG: ">"}  # uncompressed syntaxes and their byte order
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
META_BYTES = 1 << 16  # far more than any file meta takes
HEADER_BYTES = 64 << 20  # what may be inflated to find the pixel element; thousands of frames' headers fit
UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM = b"\xfe\xff\x00\xe0"
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # starts of frames of JPEG and JPEG-LS
LONG = (b"OB", b"OW", b"UN", b"UT", b"SQ", b"OF", b"OD", b"OL", b"OV", b"UC", b"UR", b"SV", b"UV")


class PixelElement(NamedTuple):
    """Where the values of a pixel element begin, how many bytes they claim, and the encoding of its head."""

    offset: int = 0  # 0 where the file has none
    length: int = 0
    encoding: str = ""  # one of NATIVE

    @property
    def compressed(self) -> bool:
        return self.length == UNDEFINED_LENGTH


class StreamHead(NamedTuple):
    """The image of a compressed stream, as the stream itself tells it."""

    rows: int
    columns: int
    bits: int


def open_dicom(ref: Ref, limit: int = HEADER_BYTES) -> tuple[io.BufferedIOBase, str]:
    """A DICOM file and its transfer syntax; a deflated one comes inflated, to `limit` bytes, as what it then is.

    Raises Refused where the stated syntax contradicts the bytes; where none is stated the bytes show it.
    """
    stream = open_ref(ref)
    try:
        head = stream.read(META_BYTES)
        start, stated = _meta(head)
        if stated == DEFLATED:
            stream.close()
            data = _inflated(read_bytes(ref), start, limit)
            stream, head, stated = io.BytesIO(data), data[:META_BYTES], EXPLICIT
        shown = _encoding(head[start : start + 8])
        if stated and shown and shown != _wanted(stated):
            raise Refused("CORRUPT_FILE", "the file meta states another encoding than the file has")
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream, stated or shown


def pixel_element(stream: io.BufferedIOBase) -> PixelElement:
    """The pixel element whose head begins at the stream's place; none where another begins there."""
    start, head = stream.tell(), stream.read(12)
    big = head[:4] == b"\x7f\xe0\x00\x10"
    if len(head) < 8 or not (big or head[:4] == b"\xe0\x7f\x10\x00"):
        return PixelElement()
    # as a length these letters would be odd, which no element has
    explicit = head[4:8] in (b"OW\0\0", b"OB\0\0", b"UN\0\0")
    (length,) = struct.unpack_from(">I" if big else "<I", head.ljust(12, b"\0"), 8 if explicit else 4)
    encoding = (BIG if big else EXPLICIT) if explicit else "" if big else IMPLICIT
    return PixelElement(start + (12 if explicit else 8), length, encoding)


def contradiction(syntax: str, pixels: PixelElement) -> str | None:
    """Why a pixel element cannot be of this transfer syntax; None where it can."""
    if pixels.encoding != _wanted(syntax):
        return "the pixel element is encoded otherwise than the file"
    if pixels.compressed and syntax in NATIVE:
        return "compressed pixels, but nothing says how"
    if not pixels.compressed and syntax not in NATIVE:
        return "the file meta states compressed pixels, which these are not"
    return None


def items(encapsulated: bytes) -> list[bytes]:
    """The items of a compressed pixel element, the table of offsets first."""
    out, at = [], 0
    while encapsulated[at : at + 4] == ITEM and at + 8 <= len(encapsulated):
        (length,) = struct.unpack_from("<I", encapsulated, at + 4)
        out.append(encapsulated[at + 8 : at + 8 + length])
        at += 8 + length
    return out


def stream_heads(encapsulated: bytes) -> list[StreamHead]:
    """What each JPEG, JPEG-LS or JPEG 2000 stream of a pixel element tells of its image."""
    heads = [_stream_head(item[:META_BYTES]) for item in items(encapsulated)]
    return [head for head in heads if head is not None]


def rle_length(item: bytes) -> int:
    """Bytes that the first segment of a frame in RLE unpacks to: one for each pixel."""
    if len(item) < 64:
        return 0
    segments, at, end = struct.unpack_from("<III", item)
    end, count = min(end, len(item)) if segments > 1 else len(item), 0
    while at + 1 < end:
        run = item[at]
        count += 0 if run == 128 else run + 1 if run < 128 else 257 - run
        at += 1 if run == 128 else run + 2 if run < 128 else 2
    return count


def _stream_head(stream: bytes) -> StreamHead | None:
    """None where no image begins here, as in a table of offsets, in RLE, or where an image goes on."""
    if stream[:4] == b"\xff\x4f\xff\x51" and len(stream) > 42:  # JPEG 2000: reach and offset, across and down
        across, down, left, top = struct.unpack_from(">4I", stream, 8)
        return StreamHead(down - top, across - left, (stream[42] & 0x7F) + 1)
    at = 2 if stream[:2] == b"\xff\xd8" else len(stream)
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        if stream[at + 1] in FRAME_MARKERS:
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return StreamHead(rows, columns, stream[at + 4])
        at += 1 if stream[at + 1] == 0xFF else 2 + struct.unpack_from(">H", stream, at + 2)[0]
    return None


def _wanted(syntax: str) -> str:
    """How the data set of a transfer syntax is encoded: what is compressed is explicit, little endian."""
    return syntax if syntax in NATIVE else EXPLICIT


def _meta(head: bytes) -> tuple[int, str]:
    """Where the data set begins, behind the elements of group 2, and the transfer syntax that they state."""
    at, syntax = 132 if head[128:132] == b"DICM" else 0, ""
    while head[at : at + 2] == b"\x02\x00" and at + 12 <= len(head):
        wide = head[at + 4 : at + 6] in LONG
        (length,) = struct.unpack_from("<I" if wide else "<H", head, at + (8 if wide else 6))
        values = at + (12 if wide else 8)
        if head[at + 2 : at + 4] == b"\x10\x00":
            syntax = head[values : values + length].decode("latin-1").strip("\0 ")
        at = values + length
    return at, syntax


def _encoding(first: bytes) -> str:
    """How a data set is encoded, by the head of its first element; "" where there is none."""
    if len(first) < 8:
        return ""
    little, big = struct.unpack("<H", first[:2])[0], struct.unpack(">H", first[:2])[0]
    explicit = first[4:6].isalpha() and first[4:6].isupper()
    if little > big:  # the first group is a low number
        return BIG
    return EXPLICIT if explicit else IMPLICIT


def _inflated(data: bytes, start: int, limit: int) -> bytes:
    """A deflated file as an explicit one of at most `limit` bytes: a bomb ends there."""
    try:
        values = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], max(1, limit - start))
    except zlib.error as error:
        raise Refused("CORRUPT_FILE", "the deflated data set is damaged") from error
    meta = data[:start].replace(DEFLATED.encode(), EXPLICIT.encode().ljust(len(DEFLATED), b"\0"))
    return meta + values
