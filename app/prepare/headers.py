"""DICOM headers as plain records: the allowed fields of one slice or frame, checked for type, nothing else kept.

The allow-list is `TAGS`. A field that is missing, malformed or not finite reads as None, a malformed rescale value is
told apart from a missing one; the gate decides what follows.
Patient identity is kept only to be hashed (`patient`), and never shown.
"""

import logging
import math
import warnings
from contextlib import contextmanager
from typing import Any, NamedTuple

import pydicom
from pydicom.dataset import Dataset

from app.prepare.encoding import PixelElement, open_dicom, pixel_element
from app.prepare.files import Ref
from app.shared.refusals import Refused

TAGS = [
    *("SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "BitsAllocated", "BitsStored"),
    *("HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "SliceThickness", "AcquisitionNumber", "ConvolutionKernel"),
    *("TemporalPositionIdentifier", "LossyImageCompression", "BurnedInAnnotation", "NumberOfFrames"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ReferencedSeriesSequence"),
]
OVERLAY_BITS = [0x60000100 + (number << 17) for number in range(16)]  # OverlayBitsAllocated of each overlay group
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
MAX_FRAMES = 20_000


class SliceHeader(NamedTuple):
    """One slice or one frame, as its header says."""

    ref: Ref
    frame: int = 0
    frames: int = 1
    sop_class: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    study: str = ""
    series: str = ""
    patient: str = ""
    frame_of_reference: str = ""
    rows: int | None = None
    columns: int | None = None
    spacing: tuple[float, ...] | None = None  # between rows, between columns: y then x
    position: tuple[float, ...] | None = None  # LPS mm of the first pixel's centre
    orientation: tuple[float, ...] | None = None
    slope: float | None = None
    intercept: float | None = None
    rescale_readable: bool = True  # False where a slope or an intercept is there but is no number
    rescale_type: str = ""
    has_table: bool = False  # whether a table, not slope and intercept, takes stored values to others
    bits_allocated: int | None = None
    bits_stored: int | None = None
    high_bit: int | None = None
    signed: bool | None = False  # None where the header says neither
    overlay: bool = False  # whether bits above those stored may hold a drawing
    samples: int | None = None
    photometric: str = ""
    padding: tuple[float, float] | None = None  # lowest and highest stored value that means no measurement
    thickness: float | None = None
    acquisition: str = ""
    kernel: str = ""
    temporal: str = ""
    stack: str = ""
    referenced_series: str = ""
    lossy: bool = False
    burned_in: bool = False
    syntax: str = ""
    pixels: PixelElement = PixelElement()

    @property
    def rescale(self) -> tuple[float, float]:
        """Slope and intercept; what is missing changes nothing."""
        return 1.0 if self.slope is None else self.slope, 0.0 if self.intercept is None else self.intercept

    def __repr__(self) -> str:
        return f"SliceHeader(frame {self.frame} of {self.frames})"


@contextmanager
def quiet():
    """No warning of a library may print a header value."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read_headers(ref: Ref) -> list[SliceHeader]:
    """The slices or frames that a DICOM file holds, without their pixels."""
    with quiet():
        try:
            stream, syntax = open_dicom(ref)
            with stream:
                ds = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=[*TAGS, *OVERLAY_BITS])
                first = _header(ref, ds)._replace(syntax=syntax, pixels=pixel_element(stream))
            if first.sop_class in ENHANCED_CT and "PerFrameFunctionalGroupsSequence" in ds:
                return _frames(first, ds)
        except Refused:
            raise
        except Exception as error:  # pydicom raises nearly anything on damaged files
            raise Refused("CORRUPT_FILE", "the DICOM header cannot be read") from error
    return [first]


def _header(ref: Ref, ds: Dataset) -> SliceHeader:
    meta = getattr(ds, "file_meta", {})
    return SliceHeader(
        ref=ref,
        frames=_whole(ds, "NumberOfFrames") or 1,
        sop_class=_text(ds, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", "")),
        modality=_text(ds, "Modality"),
        image_type=tuple(_text(ds, "ImageType").split("\\")),
        study=_text(ds, "StudyInstanceUID"),
        series=_text(ds, "SeriesInstanceUID"),
        patient=_text(ds, "PatientID"),
        frame_of_reference=_text(ds, "FrameOfReferenceUID"),
        rows=_whole(ds, "Rows"),
        columns=_whole(ds, "Columns"),
        spacing=_numbers(ds, "PixelSpacing", 2),
        position=_numbers(ds, "ImagePositionPatient", 3),
        orientation=_numbers(ds, "ImageOrientationPatient", 6),
        **_rescale(ds),
        has_table="ModalityLUTSequence" in ds,
        bits_allocated=_whole(ds, "BitsAllocated"),
        bits_stored=_whole(ds, "BitsStored"),
        high_bit=_whole(ds, "HighBit"),
        signed={0: False, 1: True}.get(_whole(ds, "PixelRepresentation")),
        overlay=any(tag in ds and ds[tag].value != 1 for tag in OVERLAY_BITS),
        samples=_whole(ds, "SamplesPerPixel"),
        photometric=_text(ds, "PhotometricInterpretation"),
        padding=_padding(ds),
        thickness=_number(ds, "SliceThickness"),
        acquisition=_text(ds, "AcquisitionNumber"),
        kernel=_text(ds, "ConvolutionKernel"),
        temporal=_text(ds, "TemporalPositionIdentifier"),
        referenced_series=_text(_item(ds, "ReferencedSeriesSequence"), "SeriesInstanceUID"),
        lossy=_text(ds, "LossyImageCompression") == "01",
        burned_in=_text(ds, "BurnedInAnnotation").upper() == "YES",
    )


def _frames(first: SliceHeader, ds: Dataset) -> list[SliceHeader]:
    """Frames of an Enhanced CT file: what is per frame wins over what is shared."""
    shared = _item(ds, "SharedFunctionalGroupsSequence")
    per_frame = ds.PerFrameFunctionalGroupsSequence
    if len(per_frame) != first.frames or first.frames > MAX_FRAMES:
        raise Refused("CORRUPT_FILE", f"{first.frames} frames but {len(per_frame)} functional groups")
    out = []
    for number, own in enumerate(per_frame):

        def group(name: str, own: Dataset = own) -> Dataset:
            return _item(own, name) if name in own else _item(shared, name)

        measures, values = group("PixelMeasuresSequence"), group("PixelValueTransformationSequence")
        content, kind = group("FrameContentSequence"), _text(group("CTImageFrameTypeSequence"), "FrameType")
        out.append(
            first._replace(
                frame=number,
                image_type=tuple(kind.split("\\")) if kind else first.image_type,
                spacing=_numbers(measures, "PixelSpacing", 2),
                thickness=_number(measures, "SliceThickness"),
                position=_numbers(group("PlanePositionSequence"), "ImagePositionPatient", 3),
                orientation=_numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
                **_rescale(values),
                stack=_text(content, "StackID"),
                temporal=_text(content, "TemporalPositionIndex"),
            )
        )
    return out


def _item(ds: Dataset, name: str) -> Dataset:
    sequence = ds.get(name)
    return sequence[0] if sequence else Dataset()


def _value(ds: Dataset, name: str) -> Any:
    try:
        return ds.get(name)
    except Exception:  # a value that its VR forbids: as good as missing
        return None


def _text(ds: Dataset, name: str) -> str:
    value = _value(ds, name)
    if value is None:
        return ""
    if not isinstance(value, str | int | float) and hasattr(value, "__iter__"):
        return "\\".join(str(part) for part in value)
    return str(value).strip()


def _numbers(ds: Dataset, name: str, count: int) -> tuple[float, ...] | None:
    value = _value(ds, name)
    parts = [] if value is None else [value] if isinstance(value, str | int | float) else list(value)
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(math.isfinite(number) for number in numbers) else None


def _number(ds: Dataset, name: str) -> float | None:
    numbers = _numbers(ds, name, 1)
    return numbers[0] if numbers else None


def _whole(ds: Dataset, name: str) -> int | None:
    number = _number(ds, name)
    return int(number) if number is not None and number == int(number) else None


def _rescale(ds: Dataset) -> dict[str, Any]:
    """Slope, intercept and type; whether those that are there can be read."""
    slope, intercept = _number(ds, "RescaleSlope"), _number(ds, "RescaleIntercept")
    pair = (("RescaleSlope", slope), ("RescaleIntercept", intercept))
    readable = all(number is not None or _is_blank(ds, name) for name, number in pair)
    return {
        "slope": slope,
        "intercept": intercept,
        "rescale_readable": readable,
        "rescale_type": _text(ds, "RescaleType"),
    }


def _is_blank(ds: Dataset, name: str) -> bool:
    """Whether a field is missing, or there without a value; one that its VR forbids is neither."""
    if name not in ds:
        return True
    try:
        return ds.get(name) in (None, "")
    except Exception:  # pydicom raises nearly anything on damaged values
        return False


def _padding(ds: Dataset) -> tuple[float, float] | None:
    value, limit = _number(ds, "PixelPaddingValue"), _number(ds, "PixelPaddingRangeLimit")
    if value is None:
        return None
    return min(value, limit if limit is not None else value), max(value, limit if limit is not None else value)
