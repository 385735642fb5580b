"""The one door: whatever a user calls a scan is listed, known by its content and opened the same way."""

import json

import nibabel
import numpy as np
import pytest

from app.language.volume_tokens import TokenSource
from app.shared.refusals import Refused
from app.tokens.commands import reconstruct, tokenize
from app.tokens.open_scan import Scan, TokenizerNeeds, grid_of, scan_source, scan_sources
from app.tokens.token_files import CTTokens, read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from tests.tiny_tokenizer import AFFINE, SHAPE, hu_volume, make_network, save

KNOWN = {"tokens": CTTokens, "case": Scan, "raw": Scan}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer whose data lay on a small grid, so that raw scans do too; its output folder."""
    folder = save(make_network(prepared=(48, 8.0)), tmp_path_factory.mktemp("run"))
    return CTTokenizer.from_pretrained(folder, device="cpu"), folder


@pytest.fixture
def places(made, dataset, tmp_path):
    """A scan of each kind, and what its kind is."""
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "scan.nii.gz")
    write_tokens(tmp_path / "tokens.npz", made[0].encode(dataset / "processed" / "case_a"))
    return {
        tmp_path / "scan.nii.gz": "raw",
        dataset / "processed" / "case_a": "case",
        tmp_path / "tokens.npz": "tokens",
    }


def test_every_kind_is_listed_with_its_name_and_place_and_opens(places, made, dataset):
    for path, kind in places.items():
        (source,) = scan_sources(path)
        assert (source.kind, source.place) == (kind, path.name)
        assert type(source.open(TokenizerNeeds(made[0].sizes.windows, made[0].sizes.prepared))) is KNOWN[kind]
        assert ("scan" in source.name) is False or kind != "raw"  # a file's name may tell who was scanned
    assert [source.name for source in scan_sources(dataset)] == ["case_a", "case_b"]


def test_alignment_and_python_get_the_tokens_that_tokenize_writes(places, made, tmp_path):
    tokenizer, folder = made
    kept = TokenSource(tokenizer, cache_dir=tmp_path / "cache")
    for path, kind in places.items():
        expected = tokenizer.encode(path)
        assert np.array_equal(kept(path).codes, expected.codes), kind
        assert np.array_equal(kept(path).coords, expected.coords), kind
        if kind != "tokens":
            assert tokenize(path, tmp_path / f"{kind}.npz", tokenizer=folder)["ok"] == 1
            assert np.array_equal(read_tokens(tmp_path / f"{kind}.npz").codes, expected.codes)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2  # a token file is read where it lies


def test_a_token_file_gives_its_own_tokens_to_its_own_tokenizer_alone(made, tmp_path, dataset):
    levels = CTTokenizer(make_network(quantizer_levels=2), digest="c" * 64)
    file = tmp_path / "two.npz"
    write_tokens(file, levels.encode(dataset / "processed" / "case_a"))
    stored = read_tokens(file)
    assert np.array_equal(levels.encode(file).codes, stored.codes) and stored.levels == 2
    assert np.array_equal(levels.encode(file, levels=1).codes, stored.codes[:, 0])
    with pytest.raises(Refused, match=r"^OTHER_TOKENIZER: "):
        made[0].encode(file)


def test_any_kind_says_its_own_grid_so_that_a_reconstruction_can_lie_on_it(places, made, tmp_path):
    grids = {kind: grid_of(path) for path, kind in places.items()}
    assert grids["raw"][0] == grids["case"][0] == SHAPE
    assert np.allclose(grids["raw"][1], AFFINE) and np.allclose(grids["case"][1], AFFINE)
    tokens = tmp_path / "tokens.npz"
    assert grids["tokens"][0] == read_tokens(tokens).source_shape == (60, 60, 60)
    reconstruct(tokens, tmp_path / "back.nii.gz", tokenizer=made[1], like=tokens)
    image = nibabel.load(tmp_path / "back.nii.gz")
    assert image.shape == (60, 60, 60) and np.allclose(image.affine, read_tokens(tokens).source_affine)
    packed = tmp_path / "packed.npz"
    write_tokens(packed, read_tokens(tokens), tables=made[0].tables, pack=True)
    reconstruct(packed, tmp_path / "again.nii.gz", tokenizer=made[1], like=packed)
    assert np.array_equal(nibabel.load(tmp_path / "again.nii.gz").dataobj, image.dataobj)


def test_of_several_scans_the_one_that_opens_is_meant(tmp_path, rng):
    raw = tmp_path / "raw"
    raw.mkdir()
    mr = np.abs(rng.normal(300, 200, (20, 20, 20))).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(mr, AFFINE), raw / "mr.nii.gz")
    with pytest.raises(Refused, match=r"^NOT_HU: "):
        scan_source(raw).open(TokenizerNeeds())
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), raw / "ct.nii.gz")
    assert scan_source(raw).place == "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu_volume() + 1, AFFINE), raw / "ct2.nii.gz")
    with pytest.raises(Refused, match=r"^MANY_SCANS: "):
        scan_source(raw)


def test_a_damaged_case_is_listed_and_says_why_when_it_is_opened(tmp_path):
    case = tmp_path / "set" / "processed" / "c1"
    case.mkdir(parents=True)
    (case / "case.json").write_text(json.dumps([1]))
    for where in (case, tmp_path / "set"):
        (source,) = scan_sources(where)
        assert (source.name, source.source_hash, source.key) == ("c1", "", "")
        with pytest.raises(Refused, match=r"^DAMAGED_CASE: c1/case.json must hold an object"):
            source.open(TokenizerNeeds())


def test_a_token_file_that_cannot_be_read_is_listed_and_the_rest_opens(made, dataset, tmp_path):
    write_tokens(tmp_path / "good.npz", made[0].encode(dataset / "processed" / "case_a"))
    (tmp_path / "bad.npz").symlink_to(tmp_path / "gone")
    bad, good = scan_sources(tmp_path)
    assert (bad.name, bad.key, good.name, len(good.key)) == ("bad", "", "good", 64)
    with pytest.raises(Refused, match=r"^NO_TOKENS: "):
        bad.open(TokenizerNeeds())
    assert isinstance(good.open(TokenizerNeeds()), CTTokens)
