"""Real scans (a development collection that is not part of the project): each item's outcome, and its voxels.

Looked for in $CT_COLLECTION, else beside the repository in ../shared/ct; skipped where there is none. Before resampling
every voxel must equal what nibabel or SimpleITK reads.
"""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.prepare import normalise
from app.prepare.files import Ref
from app.prepare.gate import NO_RULES, Stack
from app.prepare.headers import read_headers
from app.prepare.pixels import read_frames
from app.prepare.survey import survey
from app.prepare.volume import read_item
from app.shared.refusals import Refused

ROOT = Path(os.environ.get("CT_COLLECTION") or Path(__file__).resolve().parents[3] / "shared" / "ct")
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="no CT collection: set CT_COLLECTION to its folder")

READ = {  # source: codes, shape, HU range
    "abdomen_nifti/example_ct.nii.gz": (["OK"], (122, 101, 112), (-1207, 3382)),
    "abdomen_nifti/example_ct_sm.nii.gz": (["OK"], (122, 101, 30), (-1100, 1207)),
    "arm_dicom_nifti/dicom/image": (["OK"], (141, 137, 51), (-1000, 1479)),
    "arm_dicom_nifti/nifti/CT_image.nii.gz": (["ORIENTATION_FROM_QFORM"], (141, 137, 51), (-1000, 1479)),
    "chest_mha/3DCT_lung.mha": (["OK"], (115, 157, 129), (-1255, 1474)),
    "chest_mha/3DCT_lung_baseline_small.mha": (["OK"], (57, 78, 64), (-1130, 1379)),
    "chest_nrrd_dicom/ct-64-transformed.nrrd": (["OK"], (64, 64, 79), (-1007, 1095)),
    "chest_nrrd_dicom/ct-64.nrrd": (["OK"], (64, 64, 79), (-1007, 1095)),
    "chest_nrrd_dicom/ct-64Dicom": (["OK"], (64, 64, 79), (-1007, 1095)),
    "head_phantom_dicom/S2010": (["OK"], (512, 512, 8), (-1024, 782)),
}
REFUSED = {
    "compressed_single/CT1_J2KR": "TOO_FEW_SLICES",
    "compressed_single/CT2_J2KR": "TOO_FEW_SLICES",
    "compressed_single/CT_small.dcm": "TOO_FEW_SLICES",
    "compressed_single/J2K_pixelrep_mismatch.dcm": "TOO_FEW_SLICES",
    "head_phantom_nifti/CT_pitch.nii.gz": "NOT_HU",
    "not_ct/example_mr_sm.nii.gz": "NOT_HU",
    "tiny_4d": "TOO_FEW_SLICES",
}
SKIPPED = {
    "abdomen_nifti/example_seg_fast_force_split.nii.gz": "LABELS",
    "arm_dicom_nifti/dicom/mask/RS.dcm": "NOT_CT",
    "arm_dicom_nifti/nifti/CT_mask.nii.gz": "LABELS",
    "chest_mha/3DCT_lung_baseline_mask.mha": "LABELS",
    "chest_nrrd_dicom/lm-64.nrrd": "LABELS",
    "chest_nrrd_dicom/wholeLung-64.nrrd": "LABELS",
    "head_phantom_dicom/S1000/I10": "LOCALIZER",
    "head_phantom_dicom/S2010/DIRFILE": "NOT_CT",
    "mesh/Bunny.stl": "NOT_CT",
}


@pytest.fixture(scope="module")
def items():
    return survey(ROOT)


def test_every_item_ends_as_it_should(items):
    ends = {}
    for item in items:
        try:
            ends[item.source] = (
                (item.finding.kind, item.finding.code) if item.plan is None else read_item(item, NO_RULES)
            )
        except Refused as refused:
            ends[item.source] = ("refused", refused.code)
    for source, (codes, shape, hu_range) in READ.items():
        volume = ends[source]
        assert (volume.codes, volume.hu.shape) == (codes, shape), source
        assert (volume.hu.min(), volume.hu.max()) == hu_range, source
    assert {s: ends[s] for s in REFUSED} == {s: ("refused", code) for s, code in REFUSED.items()}
    assert {s: ends[s] for s in SKIPPED} == {s: ("skipped", code) for s, code in SKIPPED.items()}
    assert {source for source, end in ends.items() if hasattr(end, "hu")} == set(READ)


def independent(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [x, y, z] and RAS affine by a reader that is not ours."""
    if path.suffix == ".gz":
        image = nib.load(path)
        return np.asarray(image.dataobj, np.float64), image.affine
    sitk = pytest.importorskip("SimpleITK")
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float64), np.diag([-1.0, -1, 1, 1]) @ affine


@pytest.mark.parametrize("source", READ)
def test_voxels_and_geometry_equal_an_independent_reading(items, source):
    volume = read_item(next(item for item in items if item.source == source), NO_RULES)
    values, affine = independent(ROOT / source)
    assert np.abs(values - volume.hu).max() == 0
    np.testing.assert_allclose(volume.affine, affine, atol=2e-3)


@pytest.mark.parametrize("name", ["CT1_J2KR", "CT2_J2KR", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_single_compressed_slices_decode_as_simpleitk_has_them(name):
    sitk = pytest.importorskip("SimpleITK")
    (header,) = read_headers(Ref(str(ROOT / "compressed_single" / name)))
    frames, _ = read_frames(Stack((header._replace(padding=None),), (0.0,), 1, np.eye(4), ()))
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(ROOT / "compressed_single" / name)))
    np.testing.assert_array_equal(frames, truth)


def test_two_readings_of_one_scan_agree_on_the_grid(items):
    """The arm as DICOM and as NIfTI (slices and rows the other way round) is one volume in the world."""
    pair = ["arm_dicom_nifti/dicom/image", "arm_dicom_nifti/nifti/CT_image.nii.gz"]
    grids = [normalise(read_item(next(i for i in items if i.source == s), NO_RULES), 96, 2.0) for s in pair]
    np.testing.assert_allclose(grids[0].affine, grids[1].affine, atol=1e-3)
    assert np.abs(grids[0].hu.astype(int) - grids[1].hu).max() <= 1


def test_labels_find_their_scans(items):
    homes = {item.source: len(item.labels) for item in items if item.labels}
    assert homes == {
        "abdomen_nifti/example_ct.nii.gz": 1,
        "abdomen_nifti/example_ct_sm.nii.gz": 6,
        "arm_dicom_nifti/nifti/CT_image.nii.gz": 1,
        "chest_mha/3DCT_lung.mha": 1,
        "chest_nrrd_dicom/ct-64.nrrd": 2,
        "chest_nrrd_dicom/ct-64Dicom": 2,
    }
