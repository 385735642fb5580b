"""The one table of codes: what can be found in an input, how it ends, what it means, what to do.

The README's section "Codes" is this table, held equal by a test. No rule is decided here.
"""

from types import MappingProxyType
from typing import Literal, NamedTuple

Kind = Literal["fine", "fixed", "warned", "skipped", "refused"]


class Code(NamedTuple):
    kinds: tuple[Kind, ...]
    meaning: str
    remedy: str


def _fine(meaning: str) -> Code:
    return Code(("fine",), meaning, "nothing to do")


def _fixed(meaning: str, remedy: str = "nothing to do, it is recorded") -> Code:
    return Code(("fixed",), meaning, remedy)


def _warned(meaning: str, remedy: str) -> Code:
    return Code(("warned",), meaning, remedy)


def _skipped(meaning: str, remedy: str) -> Code:
    return Code(("skipped",), meaning, remedy)


def _refused(meaning: str, remedy: str) -> Code:
    return Code(("refused",), meaning, remedy)


CODES = MappingProxyType(
    {
        "OK": _fine("nothing to report"),
        "TILT_CORRECTED": _fixed("the gantry was tilted: the sheared stack is resampled onto a right-angled grid"),
        "UNEVEN_SPACING_RESAMPLED": _fixed("steps between slices differ: slices are interpolated at even steps"),
        "GAPS_INTERPOLATED": _fixed(
            "missing slices are interpolated from their neighbours, as --allow-gaps asked",
            "leave these slices out of conclusions",
        ),
        "DUPLICATES_DROPPED": _fixed("slices that occur twice with equal pixels are used once"),
        "PADDING_MAPPED": _fixed("values that stand for no measurement (padding, NaN, below -1500 HU) became air"),
        "OVERLAPPING_SLICES": _warned("slices are thicker than the step between them", "expect blur along the stack"),
        "NO_SERIES_UID": _warned(
            "slices without a series UID, grouped by folder and geometry",
            "check that they belong together, or export again with series UIDs",
        ),
        "SERIES_SPLIT": _warned(
            "one series UID holds several stacks, each becomes a case", "keep the cases that you want"
        ),
        "FOV_CROPPED": _warned(
            "the scan is larger than the grid and was cut",
            "raise --size or --spacing; where a tokenizer's own grid cuts, train it with a larger spacing",
        ),
        "LOW_RESOLUTION": _warned(
            "voxels are more than four times as large as the grid's", "expect blur; do not judge fine detail"
        ),
        "ORIENTATION_FROM_QFORM": _fixed("NIfTI without sform: the qform gives the orientation"),
        "SFORM_QFORM_DIFFER": _warned(
            "NIfTI sform and qform disagree: the sform is used", "check left and right on the preview"
        ),
        "LOSSY_COMPRESSION": _warned(
            "pixels went through lossy compression", "prefer the original; fine detail and HU are altered"
        ),
        "ASSUMED_HU": _warned(
            "values were taken for HU because --assume-hu says so", "check the HU range in case.json"
        ),
        "DERIVED_SERIES": _warned(
            "the image type says DERIVED or SECONDARY: rewritten by other software",
            "prefer the scanner's own series where there is one",
        ),
        "LABELS": _skipped(
            "labels, no scan: taken along with the scan they belong to", "nothing to do; name them with --organs"
        ),
        "NOT_CT": Code(
            ("skipped", "refused"),
            "no CT volume: text, RTSTRUCT, screen shot (skipped); MR, PET, reformatted or projected image (refused)",
            "give the axial CT series; one reformatted series can be asked for with --series UID",
        ),
        "NOT_HU": _refused(
            "values are not HU: 8-bit, 0..1, windowed, rescaled twice or never",
            "give the original scan, or overrule by `prepare --assume-hu`",
        ),
        "LOCALIZER": Code(
            ("skipped", "refused"),
            "a localizer (scout): skipped beside a scan, refused alone",
            "give the axial series of the study",
        ),
        "TOO_FEW_SLICES": _refused("fewer than 5 slices", "give the whole series"),
        "MISSING_SLICES": _refused(
            "a step between slices is a multiple of the others",
            "export the series again, or accept interpolation by `prepare --allow-gaps`",
        ),
        "DUPLICATE_SLICES": _refused(
            "slices at one position differ in their pixels", "separate the reconstructions or time points"
        ),
        "MIXED_GEOMETRY": _refused(
            "slices of one series do not make one stack (matrix, spacing, orientation, position)",
            "separate the stacks, each with a series UID of its own",
        ),
        "MIXED_IDENTITY": _refused(
            "slices of two patients, studies or frames of reference under one series UID",
            "separate them, each with a series UID of its own",
        ),
        "MULTI_FRAME_UNSUPPORTED": _refused(
            "a multi-frame file without the functional groups of Enhanced CT", "export as classic CT slices"
        ),
        "FOUR_D": _refused("several time points or channels", "export one time point as a volume of its own"),
        "RGB": _refused("colour pixels", "give the original grey series"),
        "DECODER_MISSING": _refused(
            "no installed decoder reads this compression",
            "see `python -m app doctor`; else decompress first, for example with gdcmconv --raw",
        ),
        "CORRUPT_FILE": _refused("the file is damaged, truncated or contradicts itself", "copy or export it again"),
        "EMPTY": _refused("no voxels, or all voxels the same", "give a scan with content"),
        "NO_SPACING": _refused(
            "voxel size, position or orientation is missing or impossible", "export again with geometry"
        ),
        "LABEL_GRID_MISMATCH": _refused("labels lie outside the scan they belong to", "give labels drawn on that scan"),
        "UNSAFE_ARCHIVE": _refused(
            "an archive with absolute or climbing paths, links, too many or too large members",
            "unpack it yourself after a look inside",
        ),
        "NO_CASES": _refused("nothing here could become a case", "check the path; see the other lines for the reasons"),
    }
)


class Finding(NamedTuple):
    """One code that applies to an input, how it ended and the detail; never holds header text or names."""

    code: str
    kind: Kind
    message: str = ""


def found(code: str, message: str = "") -> Finding:
    """A finding of a code that has one kind."""
    (kind,) = CODES[code].kinds
    return Finding(code, kind, message)


class Refused(ValueError):
    """An input that cannot become a case; `skipped` for what is no CT volume at all."""

    def __init__(self, code: str, message: str, *, skipped: bool = False) -> None:
        if code not in CODES:
            raise KeyError(code)
        super().__init__(code, message)
        self.code, self.message, self.skipped = code, message, skipped

    def __str__(self) -> str:
        return f"{self.code}: {self.message}. {CODES[self.code].remedy}"

    def __reduce__(self):
        return _refused_again, (self.code, self.message, self.skipped)

    @property
    def finding(self) -> Finding:
        return Finding(self.code, "skipped" if self.skipped else "refused", self.message)


def _refused_again(code: str, message: str, skipped: bool) -> Refused:
    return Refused(code, message, skipped=skipped)


def bare(findings: "tuple[Finding, ...] | list[Finding]") -> list[str]:
    """Codes in order of appearance, each once; OK where there is none."""
    return list(dict.fromkeys(finding.code for finding in findings)) or ["OK"]
