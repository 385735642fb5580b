"""Tokenizers that ship: made from a run as float16, known by name everywhere, read only as they were made."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.__main__ import app
from app.evaluation.tokenizer_evaluation import TokenizerEvaluation
from app.export import pretrained
from app.export.export import write_bundle
from app.language.align_setup import FrozenTokenizer
from app.language.align_training import place_of
from app.language.assistant import tokenizer_of
from app.serving.served import Served
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.tokens.commands import reconstruct, tokenize
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens
from app.tokens.tokenizer import CTTokenizer, find_tokenizer
from app.training import checkpoints, seals, shipped
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save

CREDITS = "## Credits\n\nScans of a test, by nobody."
CONFIG = {"max_steps": 20, "dataset_dir": "/home/someone/scans", "windows": ["lung"], "loss": "$@x", "seed": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A pretrained folder with one tokenizer, ct_base, in place of the project's own; nothing else is near."""
    place = tmp_path / "pretrained"
    monkeypatch.setattr("app.training.shipped.pretrained_folder", lambda: place)
    monkeypatch.chdir(tmp_path)
    run = save(make_network(quantizer_levels=2), tmp_path / "runs" / "vq_stage2")
    (run / "config.json").write_text(json.dumps(CONFIG))
    how = {"credits_text": CREDITS, "command": "voxelingo train vae\nvoxelingo train vq_stage1", "runs": [run]}
    pretrained.write_pretrained(place / "ct_base", tokenizer=run, **how)
    return place


def test_it_is_half_as_large_and_says_what_it_is(folder):
    made = folder / "ct_base"
    record = json.loads((made / "pretrained.json").read_text())
    state = load_file(made / "model.safetensors")
    assert (made / "model.safetensors").stat().st_mode & 0o044 == (made / "README.md").stat().st_mode & 0o044
    halves = {name for name, value in state.items() if value.dtype == torch.float16}
    assert len(halves) > 30 and not [n for n in halves if n.endswith("mean_count")]
    assert not [name for name in state if name.endswith("mean_sum")]
    assert record["tokenizer_sha256"] == CTTokenizer.from_pretrained("ct_base").digest
    assert record["settings"] == {"vq_stage2": {"max_steps": 20, "windows": ["lung"], "seed": 0}}
    assert record["sizes"]["quantizer_levels"] == 2 and record["bytes"] == (made / "model.safetensors").stat().st_size
    text = (made / "README.md").read_text()
    for part in (CREDITS, "voxelingo train vq_stage1", record["file_sha256"], "--tokenizer ct_base", "Research use"):
        assert part in text
    assert "/home/someone" not in text + json.dumps(record)


def test_its_numbers_are_those_of_the_run_rounded_to_halves(folder, tmp_path):
    run = checkpoints.read_weights(tmp_path / "runs" / "vq_stage2")[0]
    read = CTTokenizer.from_pretrained("ct_base").network.state_dict()
    for name, value in read.items():
        if name != "_extra_state":
            assert value.dtype == run[name].dtype == torch.float32
            kept = run[name] if name.endswith("mean_count") else run[name].half().float()
            if name.endswith("mean_sum"):  # not in the file: it follows from codes and counts
                codebook = name.removesuffix("mean_sum")
                kept = read[f"{codebook}embeddings.weight"] * read[f"{codebook}mean_count"][:, None]
            assert torch.equal(value, kept), name


def test_it_is_known_by_its_name_in_every_command_and_in_python(folder, dataset, tmp_path):
    case = dataset / "processed" / "case_a"
    digest = CTTokenizer.from_pretrained("ct_base").digest
    assert tokenize(case, tmp_path / "a.npz", tokenizer="ct_base", pack=True)["tokenizer"]["sha256"] == digest
    assert reconstruct(tmp_path / "a.npz", tmp_path / "a.nii", tokenizer="ct_base")["ok"] == 1
    assert FrozenTokenizer("ct_base", demo=False, device=torch.device("cpu")).hash == digest
    assert Served(tokenizer="ct_base").tokenizer.digest == Served().tokenizer.digest == digest
    assert find_tokenizer("ct_base") == find_tokenizer(folder / "ct_base") == folder / "ct_base" / "model.safetensors"
    called = CliRunner().invoke(app, ["tokenize", str(case), "b.npz", "--tokenizer", "ct_base"])
    assert called.exit_code == 0, called.output
    own = CTTokenizer.from_pretrained("ct_base")
    assert np.array_equal(own.read("a.npz").codes, read_tokens("b.npz").codes)
    network = make_network(quantizer_levels=2)
    checkpoints.start_from(network, "ct_base", codebook=True)
    assert seals.weights_hash(network.state_dict()) == digest


def test_where_none_is_named_the_newest_run_goes_before_the_one_that_ships(folder, caplog):
    assert find_tokenizer(None) == folder / "ct_base" / "model.safetensors"
    assert FrozenTokenizer(None, demo=False, device=torch.device("cpu")).file == find_tokenizer("ct_base")
    assert Path(Served().tokenizer.source) == find_tokenizer("ct_base")
    save(make_network(), Path("outputs/vq_stage1"))
    assert find_tokenizer(None).parent == Path("outputs/vq_stage1/ckpts")
    assert Path(Served().tokenizer.source).parent == Path("outputs/vq_stage1/ckpts")


def test_a_stage_that_learned_from_phantoms_is_not_taken_for_ones_own_scans(folder, caplog):
    """Whoever tried the demo first has a tokenizer of phantoms in outputs/; it is passed over, and that is said."""
    caplog.set_level("INFO")
    phantoms, own = Path("outputs/vq_stage2"), Path("outputs/vq_stage1")
    (save(make_network(), phantoms) / "config.json").write_text(json.dumps({"dataset_dir": None}))
    assert find_tokenizer(None) == find_tokenizer("ct_base")
    assert "outputs/vq_stage2 learned from built-in phantoms: taking ct_base" in caplog.text
    assert FrozenTokenizer(None, demo=False, device=torch.device("cpu")).file == find_tokenizer("ct_base")
    assert find_tokenizer(None, for_phantoms=True).parent == phantoms / "ckpts"  # the demo goes on with its own
    assert FrozenTokenizer(None, demo=True, device=torch.device("cpu")).file.parent == phantoms / "ckpts"
    (save(make_network(), own) / "config.json").write_text(json.dumps({"dataset_dir": "/scans"}))
    newest = (phantoms / "ckpts/misc_step0000005.pt").stat().st_mtime + 100
    os.utime(phantoms / "ckpts/misc_step0000005.pt", (newest, newest))
    assert find_tokenizer(None).parent == own / "ckpts"


def test_what_learned_from_phantoms_is_taken_where_nothing_ships(folder, monkeypatch):
    (save(make_network(), Path("outputs/vq_stage2")) / "config.json").write_text('{"dataset_dir": null}')
    monkeypatch.setattr("app.training.shipped.pretrained_folder", lambda: Path("none"))
    assert find_tokenizer(None).parent == Path("outputs/vq_stage2/ckpts")


def test_an_alignment_names_what_ships_and_so_finds_it_on_another_machine(folder, tmp_path):
    frozen = FrozenTokenizer("ct_base", demo=False, device=torch.device("cpu"))
    record = {"tokenizer_path": place_of(frozen), "tokenizer": frozen.hash}
    assert record["tokenizer_path"] == "ct_base"
    assert tokenizer_of(tmp_path / "carried", record) == str(folder / "ct_base")
    elsewhere = {**record, "tokenizer_path": "/home/other/site-packages/bundles/pretrained/ct_base/model.safetensors"}
    assert tokenizer_of(tmp_path, elsewhere) == str(folder / "ct_base")  # as it was recorded before
    own = {"tokenizer_path": "/home/other/outputs/vq_stage2", "tokenizer": "0" * 64}
    assert tokenizer_of(tmp_path, own) == "/home/other/outputs/vq_stage2"


def test_credit_goes_along_with_weights_that_leave_and_with_those_of_a_bundle_of_them(folder, tmp_path):
    """Of scans under CC BY: whoever passes the weights on has to name whose they were."""
    first = tmp_path / "first"
    write_bundle(first, CTTokenizer.from_pretrained("ct_base"), name="first", align=None, settings=None)
    again = CTTokenizer.from_pretrained(first)
    write_bundle(tmp_path / "second", again, name="second", align=None, settings=None)
    for bundle in (first, tmp_path / "second"):
        assert CREDITS in (bundle / "docs" / "CREDIT.md").read_text()
        assert "[CREDIT.md](CREDIT.md) names the data" in (bundle / "docs" / "README.md").read_text()
    own = CTTokenizer.from_pretrained(tmp_path / "runs" / "vq_stage2")
    write_bundle(tmp_path / "own", own, name="own", align=None, settings=None)
    assert not (tmp_path / "own" / "docs" / "CREDIT.md").exists()
    assert "who exported this bundle knows" in (tmp_path / "own" / "docs" / "README.md").read_text()


def test_a_card_of_what_ships_is_written_here_and_not_into_the_installation(folder, dataset, tmp_path):
    before = sorted(folder.rglob("*"))
    TokenizerEvaluation(dataset_dir=str(dataset), split=None, max_cases=1).run()
    assert sorted(folder.rglob("*")) == before
    card = json.loads((tmp_path / "outputs" / "ct_base" / "tokenizer_card.json").read_text())
    assert card["tokenizer"]["sha256"] == CTTokenizer.from_pretrained("ct_base").digest


def test_what_lies_here_under_a_name_goes_before_one_that_ships(folder):
    save(make_network(), Path("ct_base"))
    assert find_tokenizer("ct_base").parent == Path("ct_base/ckpts")


def test_an_unknown_name_is_told_which_there_are(folder, monkeypatch):
    with pytest.raises(Refused, match=r"^NO_TOKENIZER: ct_bass does not exist.* a name: one that ships \(ct_base\)"):
        find_tokenizer("ct_bass")
    monkeypatch.setattr("app.training.shipped.pretrained_folder", lambda: Path("none"))
    with pytest.raises(Refused, match=r"^NO_TOKENIZER: ct_base does not exist.* none ships with this installation"):
        find_tokenizer("ct_base")
    with pytest.raises(
        Refused, match=r"^NO_TOKENIZER: there is no tokenizer in outputs/vq_stage2 or outputs/vq_stage1"
    ):
        find_tokenizer(None)


@pytest.mark.parametrize("damage", ["another file", "cut short", "no record", "other numbers"])
def test_weights_that_are_not_those_that_shipped_are_refused(folder, damage):
    weights, record = folder / "ct_base" / "model.safetensors", folder / "ct_base" / "pretrained.json"
    if damage == "another file":
        state = load_file(weights)
        save_file({**state, "extra": torch.zeros(1)}, weights)
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-7])
    if damage == "no record":
        record.write_text("{}")
    if damage == "other numbers":  # and the file's hash with them: the weights carry their own
        state = load_file(weights)
        name = next(name for name in state if state[name].dtype == torch.float16)
        save_file({**state, name: state[name] + 1}, weights)
        from app.shared.hashes import hash_path

        record.write_text(json.dumps({"file_sha256": hash_path(weights)}))
    with pytest.raises(Refused, match=r"^BAD_CHECKPOINT: .*(pretrained\.json|not those that were saved)") as end:
        CTTokenizer.from_pretrained("ct_base")
    assert "\n" not in str(end.value)


def test_safetensors_that_are_none_are_refused(tmp_path):
    (tmp_path / "any.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Refused, match=r"^BAD_CHECKPOINT: .*any\.safetensors cannot be read"):
        checkpoints.read_weights(tmp_path / "any.safetensors")


def test_a_folder_is_not_written_over_and_none_is_left_half_done(folder, tmp_path, monkeypatch):
    how = {"tokenizer": tmp_path / "runs" / "vq_stage2", "credits_text": "", "command": ""}
    with pytest.raises(Refused, match=r"^EXISTS: .*ct_base is there already"):
        pretrained.write_pretrained(folder / "ct_base", **how)
    monkeypatch.setattr(pretrained, "MAX_BYTES", 1000)
    with pytest.raises(Refused, match=r"^BAD_VALUE: the weights take [\d,]+ bytes, 1,000 may ship"):
        pretrained.write_pretrained(folder / "large", **how)
    assert [path.name for path in folder.iterdir()] == ["ct_base"] == shipped.names()


def test_values_beyond_halves_are_refused(folder, tmp_path):
    network = make_network()
    next(iter(network.decoder.parameters())).data.fill_(1e5)
    run = save(network, tmp_path / "wild")
    with pytest.raises(Refused, match=r"^BAD_CHECKPOINT: .* holds values beyond float16"):
        pretrained.write_pretrained(folder / "wild", tokenizer=run, credits_text="", command="")


def test_tokens_of_it_decode_as_those_of_the_run_nearly(folder, tmp_path):
    scan = Volume(hu_volume(), AFFINE)
    half, whole = CTTokenizer.from_pretrained("ct_base"), CTTokenizer.from_pretrained(tmp_path / "runs" / "vq_stage2")
    one, other = (made.encode(scan) for made in (half, whole))
    assert (one.codes == other.codes).mean() > 0.95
    assert np.abs(half.decode(one).hu - whole.decode(other).hu).mean() < 5
    with pytest.raises(Refused, match="OTHER_TOKENIZER"):
        half.decode(other)


@pytest.mark.parametrize("name", shipped.names())
def test_what_ships_is_what_its_record_tells(name):
    folder = bundles_folder() / "pretrained" / name
    record = json.loads((folder / "pretrained.json").read_text())
    assert (folder / "model.safetensors").stat().st_size == record["bytes"] <= 28_000_000
    made = CTTokenizer.from_pretrained(name, device="cpu")
    card = json.loads((folder / "tokenizer_card.json").read_text())
    assert made.digest == record["tokenizer_sha256"] == card["tokenizer"]["sha256"]
    assert (
        record["command"].splitlines()[0] in (folder / "README.md").read_text()
        and "CC BY" in (folder / "README.md").read_text()
    )


def test_where_prints_the_folder():
    called = CliRunner().invoke(app, ["where", "pretrained"])
    assert called.output.strip() == str(bundles_folder() / "pretrained")
    called = CliRunner().invoke(app, ["where", "else", "--json"])
    assert called.exit_code == 2 and re.search("there is bundles, app, pretrained, got 'else'", called.output)
