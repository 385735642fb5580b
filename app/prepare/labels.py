"""Labels that come along with a scan: which files they are, what their organs are called, where they lie.

Names reach the output only where a mapping, or the anatomical vocabulary below, vouches for them: a file name may hold
a patient's name. An empty mask is an organ of 0 voxels, not an error.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pydicom
from jaxtyping import Int

from app.prepare.files import Ref, open_ref
from app.prepare.gate import LPS_TO_RAS
from app.prepare.headers import quiet
from app.prepare.volume_file import VolumeFile, check_affine, read_voxels
from app.shared.refusals import Refused
from app.shared.scan_formats import without_ending
from transforms.grid import Grid, resample_labels

LABEL_WORDS = re.compile(
    r"(?:^|[_\-. ])(seg|segs|segmentations?|labels?|masks?|gt|contours?|annotations?)(?=[_\-. ]|\d|$)", re.I
)
LABEL_FOLDERS = re.compile(r"(^|[_\-. ])(labels?(tr|ts)?|seg|segmentations?|masks?|organs)$", re.I)
MAX_LABELS = 4096
ANATOMY_WORDS = """
    left right upper middle lower inner outer anterior posterior lobe of the and common internal external superior
    inferior small large body aorta arch ascending descending adrenal gland atrium appendage autochthon bladder
    urinary bone bones bowel brachiocephalic trunk vein brain bronchus bronchi cava vena carotid artery arteries
    cartilage costal clavicula clavicle colon cyst disc discs duodenum effusion esophagus eye face fat femur
    fibula gallbladder gluteus maximus medius minimus heart hip humerus iliac iliopsoas intestine jugular kidney
    kidneys lesion lesions liver lung lungs lymph node nodes mandible mediastinum muscle muscles myocardium
    nodule nodules nose optic nerve orbit pancreas parotid patella pelvis pericardium pleura pleural portal
    splenic prostate pulmonary rectum rib ribs sacrum scapula seminal vesicles skin skull spinal cord canal
    spine spleen sternum stomach stone stones subclavian subcutaneous thyroid tibia tissue torso trachea tumor
    tumour uterus ventricle vertebra vertebrae vessel vessels airway airways whole c1 c2 c3 c4 c5 c6 c7 t1 t2 t3
    t4 t5 t6 t7 t8 t9 t10 t11 t12 l1 l2 l3 l4 l5 l6 s1 1 2 3 4 5 6 7 8 9 10 11 12
"""
ANATOMY = frozenset(ANATOMY_WORDS.split())


class LabelFile(NamedTuple):
    """A label volume, or a DICOM segmentation where `file` is None."""

    ref: Ref
    file: VolumeFile | None
    stem: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.ref,) if self.file is None else self.file.refs

    def __repr__(self) -> str:
        return "LabelFile(...)"


def is_label_name(path: str) -> bool:
    """Whether a relative path says labels: `labels/`, `segmentations/`, `x_seg.nii.gz`, `mask.mha`."""
    *folders, name = path.replace("\\", "/").split("/")
    return bool(LABEL_WORDS.search(without_ending(name)) or any(LABEL_FOLDERS.search(folder) for folder in folders))


def scan_stem(name: str) -> str:
    """A scan's or label file's stem without the words that tell them apart."""
    return LABEL_WORDS.sub("", re.sub(r"_0000$", "", without_ending(name))).strip("_-. ").lower()


def looks_like_labels(file: VolumeFile) -> bool:
    """Few values, in flat regions: neighbours are equal nearly everywhere."""
    try:
        values = read_voxels(file)
    except Refused:
        return False
    inside = values[:-1] != 0
    flat = np.count_nonzero((values[:-1] == values[1:]) & inside) > 0.5 * np.count_nonzero(inside)
    return bool(flat and np.unique(values[::2, ::2, ::2]).size <= MAX_LABELS)


def organ_coords(
    labels: Sequence[LabelFile], grid: Grid, *, mapping: Mapping[str, str], keep_names: bool
) -> dict[str, Int[np.ndarray, "N 3"]]:
    """Organ name to the grid voxels it covers, sorted; organs of 0 voxels included."""
    parts: dict[str, list[np.ndarray]] = {}
    for label in labels:
        try:
            organs = _organs_of(label, grid, mapping=mapping, keep_names=keep_names)
        except Refused as refused:
            raise Refused(refused.code, f"labels beside it: {refused.what}") from refused
        for name, coords in organs.items():
            parts.setdefault(name, []).append(coords)
    return {name: np.unique(np.concatenate(found), axis=0) for name, found in sorted(parts.items())}


def _organs_of(label: LabelFile, grid: Grid, *, mapping: Mapping[str, str], keep_names: bool) -> dict[str, np.ndarray]:
    if label.file is None:
        return _segments(label.ref, grid, mapping=mapping)
    values = read_voxels(label.file)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or np.abs(values - np.rint(values)).max() > 1e-3:
            raise Refused("CORRUPT_FILE", "labels that are no whole numbers")
        values = np.rint(values).astype(np.int64)
    present = np.unique(values)
    present = present[present != 0]
    if present.size > MAX_LABELS:
        raise Refused("CORRUPT_FILE", f"{present.size} different labels")
    index = np.searchsorted(present, values) + 1
    index[values == 0] = 0
    placed = resample_labels(index.astype(np.uint16), label.file.affine, grid)
    coords = np.argwhere(placed)
    numbers = placed[tuple(coords.T)]
    stem = without_ending(label.ref.name)
    if present.size <= 1 and (stem in mapping or _vouched(stem) or (str(stem).isidentifier() and keep_names)):
        return {safe_name(mapping.get(stem, stem)): coords.astype(np.int32)}
    if present.size == 0:
        return {"empty": coords.astype(np.int32)}
    return {
        safe_name(mapping.get(str(value), f"label_{value}")): coords[numbers == number + 1].astype(np.int32)
        for number, value in enumerate(present.tolist())
    }


def _vouched(stem: str) -> bool:
    words = [word for word in re.split(r"[_\-. ]+", stem.lower()) if word]
    return bool(words) and all(word in ANATOMY for word in words) and any(word.isalpha() for word in words)


def safe_name(name: str) -> str:
    """A name that can be a file's name: letters, digits, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "unnamed"


def _segments(ref: Ref, grid: Grid, *, mapping: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Segments of a DICOM SEG object, binary or fractional (above half), each placed by its frames' geometry."""
    with quiet():
        try:
            with open_ref(ref) as stream:
                ds = pydicom.dcmread(stream)
            frames = np.asarray(ds.pixel_array).reshape(-1, int(ds.Rows), int(ds.Columns))
            by_segment = _segment_frames(ds)
            names = {int(item.SegmentNumber): _segment_name(item, mapping) for item in ds.SegmentSequence}
            half = int(ds.get("MaximumFractionalValue", 1)) / 2
            out = {name: np.zeros((0, 3), np.int32) for name in names.values()}
            for number, members in by_segment.items():
                mask, affine = _segment_volume(frames > half, members)
                check_affine(affine)
                placed = resample_labels(mask.astype(np.uint8), affine, grid)
                name = names.get(number, f"label_{number}")
                out[name] = np.concatenate([out[name], np.argwhere(placed).astype(np.int32)])
            return out
        except Refused:
            raise
        except Exception as error:  # whatever pydicom meets in a damaged object
            raise Refused("CORRUPT_FILE", "the DICOM segmentation cannot be read") from error


def _segment_name(item: pydicom.Dataset, mapping: Mapping[str, str]) -> str:
    number, label = str(item.SegmentNumber), str(item.get("SegmentLabel", ""))
    if number in mapping or label in mapping:
        return safe_name(mapping.get(number, mapping.get(label, "")))
    return safe_name(label.lower()) if _vouched(label) else f"label_{number}"


def _segment_frames(ds: pydicom.Dataset) -> dict[int, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]]:
    """Segment number to (frame, position, orientation (2, 3), pixel measures (rows, columns, slices)) in LPS mm."""
    shared = ds.SharedFunctionalGroupsSequence[0] if ds.get("SharedFunctionalGroupsSequence") else pydicom.Dataset()
    out: dict[int, list] = {}
    for number, own in enumerate(ds.PerFrameFunctionalGroupsSequence):

        def group(name: str, own: pydicom.Dataset = own) -> pydicom.Dataset:
            return (own.get(name) or shared.get(name))[0]

        measures = group("PixelMeasuresSequence")
        between = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1.0
        step = np.array([*map(float, measures.PixelSpacing), float(between)])
        position = np.array(group("PlanePositionSequence").ImagePositionPatient, np.float64)
        turn = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, np.float64).reshape(2, 3)
        segment = int(group("SegmentIdentificationSequence").ReferencedSegmentNumber)
        out.setdefault(segment, []).append((number, position, turn, step))
    return out


def _segment_volume(frames: np.ndarray, members: list) -> tuple[np.ndarray, np.ndarray]:
    """A segment's frames as one volume [x, y, z] with its RAS affine; slices without a frame are empty."""
    _, _, turn, step = members[0]
    normal = np.cross(*turn)
    heights = np.array([position @ normal for _, position, _, _ in members])
    order = np.argsort(heights)
    gaps = np.diff(heights[order])
    between = float(gaps[gaps > 1e-3].min()) if (gaps > 1e-3).any() else float(step[2])
    places = np.rint((heights - heights.min()) / between).astype(int)
    if places.max() > 10_000:
        raise Refused("CORRUPT_FILE", "segmentation frames too far apart")
    mask = np.zeros((places.max() + 1, *frames.shape[1:]), bool)
    for (number, *_), place in zip(members, places, strict=True):
        mask[place] |= frames[number]
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = turn[0] * step[1], turn[1] * step[0], normal * between
    lps[:3, 3] = members[order[0]][1]
    return mask.transpose(2, 1, 0), LPS_TO_RAS @ lps
