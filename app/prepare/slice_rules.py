"""Why one DICOM slice cannot be part of a CT volume, by its own header: kind of object, pixels, geometry.

What slices must have in common is the gate's.
"""

from typing import NamedTuple

import numpy as np

from app.prepare.encoding import contradiction
from app.prepare.headers import CT, ENHANCED_CT, SliceHeader
from app.shared.refusals import Refused

MAX_PIXELS_A_SIDE = 8192  # pixels a side
SPACING_LIMITS = (0.01, 50.0)  # mm, in the plane and between slices
NOT_AXIAL = {  # values of ImageType that say reformatted, projected, computed or a picture
    *("MPR", "CSA MPR", "CSAPARALLEL", "CSAPERPENDICULAR", "CSARADIAL", "CSA RESAMPLED", "CURVED_MPR", "REFORMATTED"),
    *("MIP", "MINIP", "MNIP", "PROJECTION IMAGE", "MAXIMUM", "MINIMUM", "STD_DEVIATION", "SUBTRACTION"),
    *("VRT", "VOLREN", "VOLUME RENDERING", "SCREEN SAVE"),
}
MAX_INTERCEPT = 1 << 16  # what takes any 16-bit value to any other
STORAGE = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = STORAGE + "7"
HU_TYPES = {"", "HU", "US"}
NO_DECODER = {"1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55"}


class Rules(NamedTuple):
    """What the user allowed or asked for."""

    allow_gaps: bool = False
    assume_hu: bool = False
    series: str | None = None


NO_RULES = Rules()


def reason_against(header: SliceHeader, rules: Rules) -> Refused | None:
    """Why one slice cannot be part of a CT volume, from its own header."""
    asked = rules.series is not None and header.series == rules.series
    kinds = kinds_of(header)
    if header.modality != "CT" and header.sop_class not in (CT, *ENHANCED_CT):
        image = header.rows is not None and header.columns is not None
        return Refused("NOT_CT", "no CT modality" if image else "a DICOM object without an image", skipped=not image)
    if header.modality not in ("", "CT"):
        return Refused("NOT_CT", "the modality is not CT")
    if header.rows is None and header.columns is None:
        return Refused("NOT_CT", "a DICOM object without an image", skipped=True)
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return Refused("LOCALIZER", "the image type says localizer")
    if (header.samples or 1) != 1 or header.photometric.startswith(("RGB", "YBR", "PALETTE")):
        return Refused("RGB", f"{header.samples} samples a pixel")
    if header.sop_class.startswith(SECONDARY_CAPTURE):
        return Refused("NOT_CT", "a secondary capture", skipped=True)
    if header.sop_class.startswith(STORAGE) and header.sop_class not in (CT, *ENHANCED_CT):
        return Refused("NOT_CT", "not stored as a CT image")
    if kinds & NOT_AXIAL and not asked:
        return Refused("NOT_CT", "the image type says reformatted or projected")
    if header.burned_in and not asked:
        return Refused("NOT_CT", "the header says that text is burned into the pixels")
    if header.frames > 1 and not header.position:
        return Refused("MULTI_FRAME_UNSUPPORTED", f"{header.frames} frames without a position each")
    if header.frames > 1 and header.sop_class == CT:
        return Refused("MULTI_FRAME_UNSUPPORTED", f"{header.frames} frames in a classic CT file")
    return reason_of_pixels(header, rules) or _reason_of_geometry(header)


def reason_of_pixels(header: SliceHeader, rules: Rules) -> Refused | None:
    sides = (header.rows or 0, header.columns or 0)
    if min(sides) < 2 or max(sides) > MAX_PIXELS_A_SIDE:
        return Refused("CORRUPT_FILE", f"a matrix of {sides[0]} x {sides[1]} pixels")
    allocated, stored = header.bits_allocated, header.bits_stored
    if allocated not in (8, 16, 32) or stored is None or not 1 <= stored <= allocated:
        return Refused("CORRUPT_FILE", f"{stored} of {allocated} bits a pixel")
    if header.samples == 0:
        return Refused("CORRUPT_FILE", "0 samples a pixel")
    if header.signed is None:
        return Refused("CORRUPT_FILE", "the header does not say whether pixels are signed")
    if header.high_bit not in (None, stored - 1):
        return Refused("CORRUPT_FILE", f"{stored} bits a pixel, the highest of them bit {header.high_bit}")
    if header.pixels.offset and (why := _why_not_its_pixels(header)):
        return Refused("CORRUPT_FILE", why)
    if header.syntax in NO_DECODER:
        return Refused("DECODER_MISSING", f"transfer syntax {header.syntax}")
    if rules.assume_hu:
        return None
    if stored <= 8:
        return Refused("NOT_HU", f"{stored} bits a pixel")
    if header.has_table:
        return Refused("NOT_HU", "a modality table stands for slope and intercept")
    if header.rescale_type.upper() not in HU_TYPES:
        return Refused("NOT_HU", "the rescale type is not HU")
    if header.slope is not None and not 1e-4 <= abs(header.slope) <= 1e3:
        return Refused("NOT_HU", f"a rescale slope of {header.slope:g}")
    if header.intercept is not None and abs(header.intercept) > MAX_INTERCEPT:
        return Refused("NOT_HU", f"a rescale intercept of {header.intercept:g}")
    return None


def _why_not_its_pixels(header: SliceHeader) -> str | None:
    """Why the pixel element cannot be what the rest of the header says; None where it can."""
    why = contradiction(header.syntax, header.pixels)
    if why or header.pixels.compressed:
        return why
    bits = header.rows * header.columns * header.frames * header.bits_allocated
    length = -(-bits // 16) * 2  # elements are of even length
    if header.pixels.length != length:
        return f"{header.pixels.length} bytes of pixels where the header wants {length}"
    return None


def _reason_of_geometry(header: SliceHeader) -> Refused | None:
    if header.spacing is None or header.position is None or header.orientation is None:
        lacking = [name for name in ("spacing", "position", "orientation") if getattr(header, name) is None]
        return Refused("NO_SPACING", f"no {' and no '.join(lacking)}")
    low, high = SPACING_LIMITS
    if not all(low <= step <= high for step in header.spacing):
        return Refused("NO_SPACING", "an impossible pixel spacing")
    row, column = np.reshape(header.orientation, (2, 3))
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(row @ column)) > 1e-3:
        return Refused("NO_SPACING", "an orientation that is not two perpendicular unit vectors")
    if max(abs(part) for part in header.position) > 1e5:
        return Refused("NO_SPACING", "a position farther than 100 m away")
    return None


def kinds_of(header: SliceHeader) -> set[str]:
    return {part.strip().upper() for part in header.image_type}
