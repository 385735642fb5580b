"""A body in HU through codecs that nobody trained: what a video or image codec loses at so many bits.

x265 (Main 12, slices along z as frames, settings in `X265`) by PyAV where that is installed: it is no dependency, its
wheel holds GPL parts. JPEG 2000 (9-7, all slices side by side in one image, so that one header serves them all) by
OpenJPEG. Both see the box of the body, air around it, HU clipped to what the windows tell and scaled to 12 bits; bits
are those of the whole stream.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Num, UInt16
from scipy import ndimage

from transforms.sparse import DROPPED

HIGHEST = 4095  # of 12 bits
QPS = (0, 51)
X265 = "aq-mode=0:psy-rd=0:rdoq-level=2:keyint=-1:bframes=8:ref=5:log-level=none:info=0"
X265_PRESET = "slow"
TENTH, FAR = 1.1, 4.0  # of a ratio of compression: a step, and how far from what was asked it may end
MIN_IMAGE = 32  # pixels a side: OpenJPEG halves an image five times, and refuses a smaller one
MIN_SIDE = 32  # of a frame: x265 takes no smaller one


class RatePoint(NamedTuple):
    """Between two settings of a codec, or at the coarser end of what it can do."""

    settings: tuple[float, ...]
    bits: tuple[int, ...]
    errors: dict[str, float]


def has_x265() -> bool:
    return importlib.util.find_spec("av") is not None


class Codec:
    """One volume through one codec at any number of settings, each computed once. Larger settings take fewer bits."""

    def __init__(
        self,
        truth: Num[np.ndarray, "X Y Z"],
        body: Bool[np.ndarray, "X Y Z"],
        *,
        hu_range: tuple[float, float],
        judge: Callable[[np.ndarray], dict[str, float]],
    ):
        self.low, self.high = max(hu_range[0], DROPPED), hu_range[1]
        self.shape, self.judge = truth.shape, judge
        self.box = ndimage.find_objects(body.astype(np.uint8))[0]
        inside = np.where(body, truth, DROPPED)[self.box]
        scaled = (np.clip(inside, self.low, self.high) - self.low) / (self.high - self.low) * HIGHEST
        self.frames: UInt16[np.ndarray, "S H W"] = np.ascontiguousarray(np.rint(scaled).astype(np.uint16).T)
        self.points: dict[float, tuple[int, dict[str, float]]] = {}  # settings that are known

    def at(self, setting: float) -> tuple[int, dict[str, float]]:
        """Bits and errors at a setting."""
        if setting not in self.points:
            stream, frames = self._through(setting)
            hu = np.full(self.shape, DROPPED, np.float32)
            hu[self.box] = frames.T / HIGHEST * (self.high - self.low) + self.low
            self.points[setting] = 8 * stream, self.judge(hu)
        return self.points[setting]

    @property
    def digest(self) -> str:
        """Of all that its points follow from."""
        about = f"{type(self).__name__} {X265_PRESET} {X265} {self.low} {self.high} {self.box} {self.frames.shape}"
        return hashlib.sha256(about.encode() + self.frames.tobytes()).hexdigest()

    def _through(self, setting: float) -> tuple[int, np.ndarray]:
        raise NotImplementedError

    def settings_around(self, bits: float) -> tuple[float, ...]:
        """The setting just under so many bits and the one just over; one alone at an end of the range."""
        raise NotImplementedError

    def at_bits(self, bits: float) -> RatePoint:
        """Errors at so many bits: between two settings straight over the logarithm of bits."""
        settings = self.settings_around(bits)
        points = [self.at(setting) for setting in settings]
        sizes = tuple(size for size, _ in points)
        if len(points) == 1 or sizes[0] == sizes[1]:
            return RatePoint(settings, sizes, points[0][1])
        share = (math.log(bits) - math.log(sizes[0])) / (math.log(sizes[1]) - math.log(sizes[0]))
        under, over = (errors for _, errors in points)
        return RatePoint(settings, sizes, {name: under[name] + share * (over[name] - under[name]) for name in under})


class Hevc(Codec):
    """x265 at a constant quantiser."""

    def _through(self, setting: float) -> tuple[int, np.ndarray]:
        size, frames = _x265(self._padded(), int(setting))
        return size, frames[:, : self.frames.shape[1], : self.frames.shape[2]]

    def _padded(self) -> np.ndarray:
        short = [(0, 0), *((0, max(MIN_SIDE - n, 0)) for n in self.frames.shape[1:])]
        return np.pad(self.frames, short, mode="edge")

    def settings_around(self, bits: float) -> tuple[float, ...]:
        return self.search(lambda qp: self.at(qp)[0] <= bits)

    def search(self, is_enough: Callable[[int], bool]) -> tuple[float, ...]:
        """By bisection, from what is known: the smallest quantiser for which it holds and the one below it."""
        known = {qp: is_enough(qp) for qp in sorted(self.points)}
        low = max((qp for qp, enough in known.items() if not enough), default=QPS[0] - 1)
        high = min((qp for qp, enough in known.items() if enough and qp > low), default=QPS[1] + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return tuple(qp for qp in (high, low) if QPS[0] <= qp <= QPS[1])


class Jpeg2000(Codec):
    """OpenJPEG at a ratio of compression, all slices in one image."""

    def _through(self, setting: float) -> tuple[int, np.ndarray]:
        from openjpeg.utils import decode, encode_array

        image, across = _side_by_side(self.frames)
        short = [(0, max(MIN_IMAGE - n, 0)) for n in image.shape]
        whole = np.pad(image, short, mode="edge")
        stream = encode_array(whole, bits_stored=12, photometric_interpretation=2, compression_ratios=[setting])
        rows, columns = image.shape
        decoded = np.ascontiguousarray(decode(stream)[:rows, :columns])
        return len(stream), _apart(decoded, across, self.frames.shape)

    def settings_around(self, bits: float) -> tuple[float, ...]:
        """By tenths, from the ratio that so many bits are; ratios are powers of one, so that other bits share them."""
        ratio = max(12 * _side_by_side(self.frames)[0].size / bits, 1.0)
        power, far = math.ceil(math.log(ratio) / math.log(TENTH)), math.ceil(math.log(FAR) / math.log(TENTH))
        coarse = power
        while self.at(TENTH**coarse)[0] > bits and coarse < power + far:
            coarse += 1
        finer = coarse
        while self.at(TENTH**finer)[0] <= bits and finer > max(power - far, 0):
            finer -= 1
        around = (TENTH**coarse, TENTH**finer)
        return around if self.at(around[0])[0] <= bits < self.at(around[1])[0] else around[:1]


def _x265(frames: UInt16[np.ndarray, "S H W"], qp: int) -> tuple[int, UInt16[np.ndarray, "S H W"]]:
    """Bytes of the stream, and the frames decoded from it."""
    import av

    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frames.shape[2], frames.shape[1], "gray12le"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25, 1)
    encoder.options = {"preset": X265_PRESET, "tune": "psnr", "x265-params": f"qp={qp}:{X265}"}
    packets = []
    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="gray12le")
        picture.pts = number
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("hevc", "r")
    if encoder.extradata:
        decoder.extradata = encoder.extradata
    decoded = [frame for packet in packets for frame in decoder.decode(av.Packet(bytes(packet)))]
    decoded += decoder.decode(None)
    if len(decoded) != len(frames):
        raise RuntimeError(f"x265 gave {len(decoded)} of {len(frames)} frames back")
    return sum(len(bytes(packet)) for packet in packets), np.stack([frame.to_ndarray() for frame in decoded])


def _side_by_side(frames: UInt16[np.ndarray, "S H W"]) -> tuple[UInt16[np.ndarray, "A B"], int]:
    """One image of all frames, about square, and how many stand in a row."""
    number, height, width = frames.shape
    across = max(round(math.sqrt(number * height / width)), 1)
    down = -(-number // across)
    filled = np.concatenate([frames, np.repeat(frames[-1:], across * down - number, 0)])
    return filled.reshape(down, across, height, width).swapaxes(1, 2).reshape(down * height, across * width), across


def _apart(image: np.ndarray, across: int, shape: tuple[int, int, int]) -> np.ndarray:
    number, height, width = shape
    parts = image.reshape(-1, height, across, width).swapaxes(1, 2)
    return parts.reshape(-1, height, width)[:number]
