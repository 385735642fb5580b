"""Nobody gets another patient's tokens: caches and hashes know a scan by all that is read of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from app.dataset import prepared
from app.language.volume_tokens import TokenSource
from app.prepare import cohort
from app.tokens.open_scan import open_scan, scan_source
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from tests import scans
from tests.cohorts import AFFINE, SMALL

SHAPE = (36, 32, 28)


@pytest.fixture(scope="module")
def ct():
    torch.manual_seed(0)
    sizes = {"resolution": 32, "spacing": 8.0, "latent_channels": 16, "num_embeddings": 16, "num_blocks": 1}
    network = make_vqvae("tiny", keep="nonzero", **sizes)
    return CTTokenizer(network, digest="a" * 64)


def write_mhd(header: Path, hu: np.ndarray) -> None:
    whole = header.with_suffix(".mha")
    scans.write_mha(whole, AFFINE, hu)
    head, mark, body = whole.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    whole.unlink()
    header.write_bytes(head + b"ElementDataFile = v.raw\n")
    (header.parent / "v.raw").write_bytes(body)
    assert mark


def write_nhdr(header: Path, hu: np.ndarray) -> None:
    whole = header.with_suffix(".nrrd")
    scans.write_nrrd(whole, AFFINE, hu, encoding="raw")
    head, _, body = whole.read_bytes().partition(b"\n\n")
    whole.unlink()
    header.write_bytes(head + b"\ndata file: v.raw\n\n")
    (header.parent / "v.raw").write_bytes(body)


def write_pair(header: Path, hu: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Pair(hu, AFFINE)
    image.set_sform(AFFINE, 2)
    nibabel.save(image, header)


@pytest.mark.parametrize(("name", "write"), [("v.mhd", write_mhd), ("v.nhdr", write_nhdr), ("v.hdr", write_pair)])
def test_two_patients_with_one_header_have_tokens_of_their_own(ct, tmp_path, name, write):
    hu = scans.sample(AFFINE, SHAPE)
    half = np.where(np.arange(SHAPE[0])[:, None, None] < 12, hu, -1000).astype(np.int16)
    for patient, volume in (("a", hu), ("b", half)):
        (tmp_path / patient).mkdir()
        write(tmp_path / patient / name, volume)
    one, other = tmp_path / "a" / name, tmp_path / "b" / name
    assert one.read_bytes() == other.read_bytes()
    source = TokenSource(ct, cache_dir=tmp_path / "cache")
    first, second = source(one), source(other)
    np.testing.assert_array_equal(second.codes, ct.encode(ct.open(other)).codes)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2
    assert len(second.codes) < len(first.codes)
    hashes = {ct.open(path).source_hash for path in (one, other)}
    assert len(hashes) == 2 and hashes == {scan_source(path).source_hash for path in (one, other)}


def test_a_folder_of_slices_behind_a_link_is_known_by_its_slices(tmp_path):
    """The survey follows links, so the key must."""
    scans.write_series(tmp_path / "far", scans.series())
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "ct").symlink_to(tmp_path / "far")
    before = scan_source(tmp_path / "near").source_hash
    assert before == open_scan(tmp_path / "near", ()).source_hash
    slices = scans.series()
    slices[3].PixelData = bytes(len(slices[3].PixelData))
    scans.write_series(tmp_path / "far", slices)
    assert scan_source(tmp_path / "near").source_hash != before


def older_case(folder: Path, fill: int, sidecar: dict | None = None) -> Path:
    (folder / "windows").mkdir(parents=True)
    np.save(folder / "windows" / "lung.npy", np.full((8, 8, 8), fill, np.uint8))
    if sidecar is not None:
        (folder / "case.json").write_text(json.dumps(sidecar))
    for file in folder.rglob("*"):
        os.utime(file, (0, 0))
    return folder


@pytest.mark.parametrize("sidecar", [None, {"codes": ["OK"]}, {"codes": ["OK"], "source_hash": ""}])
def test_older_cases_of_one_name_size_and_time_are_told_apart_by_their_arrays(tmp_path, sidecar):
    one, other = (older_case(tmp_path / ds / "processed" / "c", fill, sidecar) for ds, fill in (("a", 1), ("b", 2)))
    assert scan_source(one).key != scan_source(other).key
    cases = [prepared.open_case(path) for path in (one, other)]
    assert len({case.source_hash for case in cases}) == len({case.content_hash for case in cases}) == 2
    again = older_case(tmp_path / "c" / "processed" / "c", 2, sidecar)
    assert prepared.open_case(again).source_hash == cases[1].source_hash


def test_labels_whose_data_file_changes_are_made_again(tmp_path):
    scans.write_nifti(tmp_path / "raw" / "ds" / "v.nii.gz", AFFINE, scans.sample(AFFINE, SHAPE))
    labels = tmp_path / "raw" / "ds" / "labels"
    labels.mkdir()
    mask = np.zeros(SHAPE, np.uint8)
    sizes = []
    for width in (6, 12):
        mask[10:20, 10:20, 8 : 8 + width] = 1
        write_mhd(labels / "v.mhd", mask)
        out = cohort.prepare(tmp_path / "raw", tmp_path / "out", SMALL, cohort.Request(organs={"*": {"1": "liver"}}))
        assert out.count("ok") == 1
        (case,) = prepared.find_cases(tmp_path / "out")
        sizes.append(case.sidecar["organs"]["liver"])
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.3)


def test_a_token_file_whose_array_header_is_damaged_is_refused_in_one_line(ct, tmp_path):
    import zipfile

    from app.shared.refusals import Refused
    from app.tokens.open_scan import Volume
    from app.tokens.token_files import read_tokens, write_tokens

    hu = np.random.default_rng(0).integers(-400, 400, (16, 16, 16)).astype(np.int16)
    write_tokens(tmp_path / "good.npz", ct.encode(Volume(hu, np.diag([8.0, 8.0, 8.0, 1.0]))))
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(b"), }", b" , }"))  # an open bracket
    with pytest.raises(Refused, match=r"bad.npz is damaged or no token file"):
        read_tokens(tmp_path / "bad.npz")


def test_damaged_findings_of_a_phantom_are_made_again(ct, tmp_path):
    from app.language import phantom_text

    source = TokenSource(ct, cache_dir=tmp_path)
    rows, _ = phantom_text.phantom_volumes(source, count=1, seed=0, split="train")
    (file,) = tmp_path.rglob("phantom*.json")
    whole = file.read_bytes()
    for damage in (b"{", b"\xff", b""):
        file.write_bytes(damage)
        assert phantom_text.phantom_volumes(source, count=1, seed=0, split="train")[0] == rows
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x80\x02]q\x00.", [1, 2], {"coords": 1}])
def test_a_cached_item_that_is_damaged_or_holds_something_else_is_made_again(tmp_path, content, caplog):
    from app.training import data

    file = tmp_path / "c.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert data._read_cache(file) is None
    assert "Cached item c.pt is damaged and is made again" in caplog.text
