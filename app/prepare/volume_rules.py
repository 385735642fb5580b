"""What NRRD and MetaImage headers may not say: one thing twice otherwise, other units than mm, a second scale.

Other software ignores such fields, or heeds one of the two: what is read here would be another scan elsewhere. Pure
functions of header fields; where voxels lie and what they are is the readers'.
"""

import math
from collections.abc import Mapping

from app.shared.refusals import Refused

SPATIAL_KINDS = {"domain", "space", "???", "none"}  # of an NRRD axis that lies in space, as most writers say or do not
MM = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", "?", "???", "none", ""}
NRRD_FIELDS = frozenset(  # without their blanks
    [
        *("dimension", "type", "blocksize", "encoding", "endian", "content", "min", "max", "oldmin", "oldmax"),
        *("datafile", "lineskip", "byteskip", "number", "sizes", "spacings", "thicknesses", "axismins", "axismaxs"),
        *("centers", "centerings", "labels", "units", "kinds", "space", "spacedimension", "spaceunits", "spaceorigin"),
        *("spacedirections", "measurementframe", "sampleunits"),
    ]
)
NO_SCALE = {"slope": "1", "offset": "0"}
OTHER_MODALITIES = {"MET_MOD_MR", "MET_MOD_NM", "MET_MOD_US", "MET_MOD_PET"}


def check_nrrd(fields: Mapping[str, str]) -> None:
    """Names of fields come without their blanks."""
    if not set(fields) <= NRRD_FIELDS:
        raise Refused("CORRUPT_FILE", "a header line that the NRRD format does not know")
    kinds = fields.get("kinds", "").lower().split()
    if "time" in kinds:
        raise Refused("FOUR_D", "an axis of kind 'time'")
    if len(kinds) == 3 and set(kinds) - SPATIAL_KINDS:
        raise Refused("CORRUPT_FILE", "three axes, one of a kind that is none of space")
    if not {part.lower() for part in fields.get("spacings", "").split()} <= {"nan"}:
        raise Refused("CORRUPT_FILE", "spacings beside space directions, which say the same")
    for name in ("spaceunits", "units"):
        _check_units([part.strip() for part in fields.get(name, "").split('"')])
    if "oldmin" in fields or "oldmax" in fields:
        raise Refused("NOT_HU", "old min and old max say that the values were quantised")
    if int(fields.get("byteskip", "0")) and fields.get("encoding", "").lower() != "raw":
        raise Refused("CORRUPT_FILE", "skipped bytes in front of packed voxels are not read")


def check_mha(fields: Mapping[str, str]) -> None:
    _check_units([fields.get("distanceunits", "")])
    slope, offset = (float(fields.get(f"elementtointensityfunction{name}", value)) for name, value in NO_SCALE.items())
    if (slope, offset) != (1.0, 0.0):
        raise Refused("NOT_HU", f"an ElementToIntensityFunction of slope {slope:g} and offset {offset:g}")
    if fields.get("modality", "").upper() in OTHER_MODALITIES:
        raise Refused("NOT_CT", "the modality is not CT")


def _check_units(units: list[str]) -> None:
    if not {unit.lower() for unit in units} <= MM:
        raise Refused("NO_SPACING", "lengths in other units than mm")


def numbers_of(text: str, count: int) -> list[float]:
    """As many numbers as a field must have."""
    words = text.split()
    if len(words) != count:
        raise Refused("CORRUPT_FILE", f"{len(words)} numbers where there must be {count}")
    return [float(word) for word in words]


def value_of(fields: Mapping[str, str], *names: str) -> str | None:
    """The value of a field that has several names; None where none is there. They must not differ."""
    values = [fields[name] for name in names if name in fields]
    if any(not _alike(values[0], other) for other in values[1:]):
        raise Refused("CORRUPT_FILE", f"the header says {' and '.join(n for n in names if n in fields)}, otherwise")
    return values[0] if values else None


def _alike(one: str, other: str) -> bool:
    try:
        numbers = [[float(word) for word in text.split()] for text in (one, other)]
    except ValueError:
        return one.lower() == other.lower()
    same_count = len(numbers[0]) == len(numbers[1])
    return same_count and all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-4) for a, b in zip(*numbers, strict=True))
