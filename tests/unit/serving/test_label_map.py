"""Where an answer rests, for viewers: the right cells on the scan's own grid, the answer as the segment's name."""

import dataclasses

import nibabel
import numpy as np
import pytest
import torch

from app.language.where_looked import Occlusion
from app.serving import label_map, options
from app.shared.refusals import Refused
from app.tokens.token_files import CTTokens
from app.tokens.volumes import write_image
from networks.presets import preset

CELL = 16.0  # mm a side


@pytest.fixture
def tokens():
    """Two cells of 16 mm, at (0, 0, 0) and (1, 0, 0), of a scan of 4 mm voxels whose x runs to the patient's left."""
    affine = np.diag([CELL, CELL, CELL, 1.0])
    affine[:3, 3] = CELL / 2
    source = np.diag([-4.0, 4.0, 8.0, 1.0])
    source[:3, 3] = (30.0, 2.0, 4.0)
    about = {"features": "window", "windows": ("lung",), "spacing": 2.0, "keep": "body", "tokenizer": "0" * 64}
    return CTTokens(
        codes=np.zeros(2, np.int32),
        coords=np.array([[0, 0, 0], [1, 0, 0]], np.int32),
        latent_shape=(2, 2, 2),
        affine=affine,
        source_shape=(8, 8, 4),
        source_affine=source,
        **about,
    )


def looked(*loss, coords=((0, 0, 0), (1, 0, 0))):
    return Occlusion(0.9, 0.1, torch.tensor(loss), torch.tensor(coords, dtype=torch.int32))


def test_what_the_answer_rests_on_lies_where_it_lies_in_the_patient(tokens):
    """Cell 1 is the patient's right half in RAS mm, 16 to 32; on a scan whose x falls that is its first half."""
    cells = label_map.cells_of(tokens, looked(0.1, 3.0))
    assert cells.tolist() == [False, True]
    labels = label_map.label_map(tokens, cells)
    assert labels.dtype == np.uint8 and labels.shape == (8, 8, 4)
    x, y, z = np.nonzero(labels)
    world = nibabel.affines.apply_affine(tokens.source_affine, np.stack([x, y, z], 1))
    assert len(x) == 4 * 4 * 2  # 16 mm in voxels of 4 x 4 x 8 mm
    assert (world[:, 0] > 16).all() and (world[:, 0] < 32).all() and (world[:, 1:] < 16).all()


def test_tokens_that_were_pooled_count_as_the_one_that_was_read(tokens):
    assert label_map.cells_of(tokens, looked(2.0, coords=((1, 0, 0),))).tolist() == [True, True]


@pytest.mark.parametrize("where", [None, looked(0.001, -0.2)])
def test_an_answer_that_rests_nowhere_covers_all_that_was_read_and_says_so(tokens, where):
    cells = label_map.cells_of(tokens, where)
    assert cells is None and np.count_nonzero(label_map.label_map(tokens, cells)) == 2 * 4 * 4 * 2
    assert "no single place matters to it" in label_map.segment_name("yes", somewhere=False)


def test_a_segment_is_named_after_the_answer_in_one_line_with_the_notice():
    name = label_map.segment_name("No effusion.\n\nHeart normal.", somewhere=True)
    assert name == "No effusion. Heart normal. (research use only, not for diagnosis)"
    assert len(label_map.segment_name("word " * 300, somewhere=True)) < 260
    assert label_map.segment_name("  ", somewhere=True).startswith("no answer (")


def test_a_written_map_is_a_mask_in_the_scans_own_geometry(tokens, tmp_path):
    labels = label_map.label_map(tokens, np.array([True, False]))
    write_image(tmp_path / "where.nii.gz", labels, tokens.source_affine)
    image = nibabel.load(tmp_path / "where.nii.gz")
    assert np.array_equal(image.affine, tokens.source_affine) and image.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(image.dataobj), labels) and image.header.get_xyzt_units()[0] == "mm"


def test_voxels_without_their_place_are_not_given_to_a_viewer():
    shown = options.shown("show_answer", preset("tiny"), budget=40)
    assert shown == {"question": "", "max_3d_tokens": [40, 20, 10], "max_new_tokens": 256}
    with pytest.raises(Refused, match=r"BAD_VALUE: .*wrong side.*/answers"):
        options.read("show_answer", {"result_extension": ".nrrd"}, shown)
    assert options.read("show_answer", {"result_extension": ".nii.gz"}, shown).question is None


def test_the_map_follows_any_axes_of_the_scan(tokens):
    """Axes exchanged and turned: the same millimetres are covered."""
    turned = np.array([[0.0, 4, 0, 2], [0, 0, -8, 28], [4, 0, 0, 2], [0, 0, 0, 1]])
    other = dataclasses.replace(tokens, source_shape=(8, 8, 4), source_affine=turned)
    found = np.argwhere(label_map.label_map(other, np.array([True, False])))
    world = nibabel.affines.apply_affine(turned, found)
    assert len(found) == 4 * 4 * 2 and (world > 0).all() and (world < 16).all()
