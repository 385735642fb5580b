"""A scan to tokens and tokens back to HU: the class, its whole volumes and tiles, and what it refuses."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from app.dataset import prepared
from app.evaluation.evaluate import mirror_image
from app.prepare import cohort, volume
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.tokens import open_scan
from app.tokens.open_scan import Volume
from app.tokens.tokenizer import CTTokenizer, find_tokenizer
from app.tokens.volumes import onto_grid, write_nifti
from app.training import checkpoints, data, loaders, seals
from networks.vqvae import BatchTokens
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save


def declared(stage, sizes):
    """The chain as a stage file declares it, for a tokenizer's sizes."""
    config = json.loads((bundles_folder() / f"{stage}.json").read_text())
    flat = {
        "resolution": sizes.resolution,
        "spacing": sizes.spacing,
        "keep": sizes.keep,
        "windows": list(sizes.windows),
    }
    return ConfigParser({**config, **flat, "dataset_dir": None})


@pytest.mark.parametrize("stage", ["vae", "vq_stage1", "vq_stage2"])
def test_inference_and_training_see_a_scan_through_the_same_declared_chain(stage, tokenizer, dataset):
    chain = declared(stage, tokenizer.sizes)
    parts = {name: chain.get_parsed_content(name) for name in ("preprocessing", "windowing")}
    assert (
        chain.config["validate"]["dataset"] | {name: f"@{name}" for name in parts}
        == chain.config["validate"]["dataset"]
    )
    samples = data.CTDataset(prepared.find_cases(dataset), **parts)
    prepare_batch = chain.get_parsed_content("prepare_batch")
    for number, case in enumerate(prepared.find_cases(dataset)):
        x = prepare_batch(loaders.collate([samples[number]]), torch.device("cpu"))
        seen = tokenizer.on_device(tokenizer.rows_of(tokenizer.open(case).volume))
        assert torch.equal(seen.coords, x.coords) and torch.equal(seen.feats, x.feats) and len(x.feats) > 1000
        expected = tokenizer.network.encode(x)
        for scan in (case, case.path, str(case.path), SimpleNamespace(hu=case.hu(), affine=case.affine)):
            tokens = tokenizer.encode(scan)
            assert np.array_equal(tokens.codes, expected.codes.numpy())
            assert np.array_equal(tokens.coords, expected.coords[:, 1:].numpy())
    assert len(np.unique(tokens.codes)) > 4


def test_the_inference_bundle_is_that_tokenizer(tokenizer, output_dir, tmp_path):
    """A scan through the transforms, the network and the inferer of its file: what the class gives, decoded."""
    write_nifti(tmp_path / "scan.nii.gz", Volume(hu_volume(), AFFINE))
    given = {"tokenizer": str(output_dir), "scan": str(tmp_path / "scan.nii.gz"), "device": "cpu"}
    bundle = ConfigParser(json.loads((bundles_folder() / "inference.json").read_text()) | given)
    network, inferer, dataset = (bundle.get_parsed_content(name) for name in ("network", "inferer", "dataset"))
    with torch.no_grad():
        back = inferer(dataset[0]["image"][None], network)
    tokens = tokenizer.encode(tmp_path / "scan.nii.gz")
    expected = onto_grid(tokenizer.decode(tokens), hu_volume().shape, AFFINE)
    assert np.array_equal(back[0, 0].numpy(), np.rint(expected.hu)) and len(np.unique(expected.hu)) > 100


def test_a_volume_in_memory_is_the_same_scan_whatever_holds_it(tokenizer):
    hu = hu_volume()
    expected = tokenizer.encode(Volume(hu, AFFINE))
    metres = nibabel.Nifti1Image(hu, np.diag([0.001, 0.001, 0.001, 1.0]) @ AFFINE)
    metres.header.set_xyzt_units("meter")
    held = {
        "nibabel": nibabel.Nifti1Image(hu, AFFINE),
        "metres": metres,
        "MetaTensor": MetaTensor(torch.from_numpy(hu), affine=torch.from_numpy(AFFINE)),
        "MetaTensor with its channel": MetaTensor(torch.from_numpy(hu)[None], affine=torch.from_numpy(AFFINE)),
        "array and affine": (hu, AFFINE),
    }
    for name, scan in held.items():
        tokens = tokenizer.encode(scan)
        assert np.array_equal(tokens.codes, expected.codes) and np.array_equal(tokens.coords, expected.coords), name
        np.testing.assert_allclose(tokens.affine, expected.affine, atol=1e-4, err_msg=name)
    for wrong, code in ((hu, "BAD_VALUE"), ((hu[0], AFFINE), "BAD_VALUE"), ((np.stack([hu, hu]), AFFINE), "FOUR_D")):
        with pytest.raises(Refused, match=f"^{code}: "):
            tokenizer.encode(wrong)


def test_tokens_know_their_scan_and_their_tokenizer(tokenizer, dataset, output_dir):
    tokens = tokenizer.encode(dataset / "processed" / "case_a")
    assert tokens.source_shape == (60, 60, 60) and tokens.source_affine[0, 0] == -2
    assert (tokens.windows, tokens.keep, tokens.spacing) == (tokenizer.sizes.windows, "body", 8.0)
    state = checkpoints.read_tensors(checkpoints.averaged_file(output_dir))
    assert tokens.tokenizer == seals.weights_hash(state) and len(tokens.tokenizer) == 64
    changed = {name: tensor + 1 if name == "vq.embeddings.weight" else tensor for name, tensor in state.items()}
    assert seals.weights_hash(changed) != tokens.tokenizer


def test_latents_lie_where_the_body_is(tokenizer):
    tokens = tokenizer.encode(SimpleNamespace(hu=hu_volume(), affine=AFFINE))
    centre = (tokens.affine @ np.append(tokens.coords.mean(0), 1))[:3]
    assert np.abs(centre - (AFFINE @ [22, 20, 14, 1])[:3]).max() < 16  # a quarter of a latent


def test_decoding_covers_the_grid_in_hu(tokenizer):
    tokens = tokenizer.encode(SimpleNamespace(hu=hu_volume(), affine=AFFINE), support=True)
    volume = tokenizer.decode(tokens)
    taken = tokenizer.rows_of(Volume(hu_volume(), AFFINE))
    x, affine = tokenizer.on_device(taken), taken.affine
    assert taken.beyond == 0
    assert volume.hu.shape == (48, 48, 48) and np.allclose(volume.affine, affine)
    kept = np.zeros(volume.hu.shape, bool)
    kept[tuple(x.coords[:, 1:].numpy().T)] = True
    assert np.array_equal(volume.hu > -1024, kept)
    sparse = tokenizer.network.decode(BatchTokens(torch.from_numpy(tokens.codes), rows(tokens), tokens.latent_shape, 1))
    assert len(tokenizer.decode_sparse(tokens, use_support=False).values) == len(sparse)


def rows(tokens):
    return torch.nn.functional.pad(torch.from_numpy(tokens.coords), (1, 0))


def test_parts_and_tiles_do_not_change_the_result(output_dir):
    scan = SimpleNamespace(hu=hu_volume(), affine=AFFINE)
    whole = CTTokenizer.from_pretrained(output_dir, device="cpu")
    parts = CTTokenizer.from_pretrained(output_dir, device="cpu", max_points=1000)
    tokens = whole.encode(scan, support=True)
    assert np.mean(parts.encode(scan).codes == tokens.codes) > 0.99
    assert np.abs(parts.decode(tokens).hu - whole.decode(tokens).hu).max() < 0.01


def test_the_mirror_image_of_a_case_lies_where_the_case_does(dataset):
    """Whatever grid the training data lay on: raw arrays go there, what was prepared stays, and so does its mirror."""
    made = CTTokenizer(make_network(prepared=(64, 9.0)), digest="")
    case = prepared.open_case(dataset / "processed" / "case_a")
    true, turned_over = (made.rows_of(part.volume) for part in (made.open(case), mirror_image(case)))
    (x, affine), (y, mirrored_affine) = ((made.on_device(part), part.affine) for part in (true, turned_over))
    turned = {(x.spatial_shape[0] - 1 - i, j, k) for _, i, j, k in x.coords.tolist()}
    assert {(i, j, k) for _, i, j, k in y.coords.tolist()} == turned and np.array_equal(mirrored_affine, affine)
    assert np.array_equal(made.encode(mirror_image(case)).codes, made.network.encode(y).codes.numpy())


def test_arrays_on_other_axes_are_turned(tokenizer, monkeypatch):
    monkeypatch.setattr(cohort, "PrepareSettings", lambda: SimpleNamespace(size=64, spacing=6.0))
    upright = tokenizer.encode(SimpleNamespace(hu=hu_volume(), affine=AFFINE))
    turned = np.ascontiguousarray(hu_volume().transpose(2, 0, 1)[:, ::-1])  # S L A
    swap = np.array([[0.0, -1, 0, 49], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    tokens = tokenizer.encode(SimpleNamespace(hu=turned, affine=AFFINE @ swap))
    here, there = ((t.affine @ np.append(t.coords.mean(0), 1))[:3] for t in (upright, tokens))
    assert np.abs(here - there).max() < 16


def test_raw_scans_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "PrepareSettings", lambda: SimpleNamespace(size=64, spacing=6.0))
    for name in "abc":
        nibabel.save(nibabel.Nifti1Image(hu_volume() + ord(name) % 3, AFFINE), tmp_path / f"{name}.nii.gz")
    read, whole = [], volume.read_item
    monkeypatch.setattr(volume, "read_item", lambda *given: read.append(given) or whole(*given))
    found = list(open_scan.scan_sources(tmp_path))
    assert len(found) == 3 and not read
    opened = [one.open(open_scan.TokenizerNeeds()) for one in found]
    assert [one.source_hash for one in opened] == [one.source_hash for one in found] and len(read) == 3


def test_an_empty_scan(tokenizer):
    with pytest.raises(ValueError, match="only 0 voxels are left of the scan"):
        tokenizer.encode(SimpleNamespace(hu=np.full((20, 20, 20), -1000, np.int16), affine=np.diag([4.0, 4, 4, 1])))


def test_default_is_the_newest_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = make_network(num_blocks=0)
    for stage, step in (("vq_stage2", 5), ("vq_stage1", 9)):
        save(network, tmp_path / "outputs" / stage, step)
    assert "vq_stage1" in str(find_tokenizer(None))
    (tmp_path / "bundle" / "models").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "bundle" / "models" / "model.pt")
    bundled = CTTokenizer.from_pretrained(tmp_path / "bundle", device="cpu")
    assert bundled.digest == CTTokenizer.from_pretrained("outputs/vq_stage2", device="cpu").digest
