"""Checkpoint files: whole or not there, the last few and the best kept, the right step found, others refused."""

import json
import re

import pytest
import torch

from app.shared.refusals import Refused
from app.training import checkpoints, seals
from app.training.checkpoints import step_file
from networks import make_vqvae

SIZES = {"resolution": 16, "model_channels": 16, "num_blocks": 1, "num_embeddings": 16}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out/ckpts").mkdir(parents=True)
    return tmp_path / "out"


def save(out, step, value=0.0):
    weights = {"vqvae": {"w": torch.tensor(value)}, "vqvae_ema0.9999": {"w": torch.tensor(value + 0.5)}}
    checkpoints.save_set(out, step, weights, {"step": step})


@pytest.fixture
def refused():
    """Calls, and gives the one line it was refused with."""

    def call(code, function, *args, **options):
        with pytest.raises(Refused) as end:
            function(*args, **options)
        line = str(end.value)
        assert end.value.status == 2 and len(line.splitlines()) == 1
        assert re.match(rf"{code}: .+\. .+\.$", line), line
        return line

    return call


def names(out):
    return sorted(path.name for path in (out / "ckpts").iterdir())


def test_a_set_is_three_files_and_its_mark_comes_last(out, monkeypatch):
    order = []
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: (order.append(str(file)), real(content, file)))
    save(out, 12)
    assert names(out) == ["misc_step0000012.pt", "vqvae_ema0.9999_step0000012.pt", "vqvae_step0000012.pt"]
    assert "misc" in order[-1] and all(name.endswith(".part") for name in order)
    assert checkpoints.complete_steps(out) == [12]


def test_a_set_without_its_mark_does_not_count(out):
    save(out, 3)
    save(out, 6)
    step_file(out, "misc", 6).unlink()
    assert checkpoints.complete_steps(out) == [3]
    assert checkpoints.step_to_resume(out, "latest") == 3
    assert checkpoints.complete_steps(out / "nowhere") == []


SHORT_WRITE = "[enforce fail at inline_container.cc:672] . unexpected pos 362240 vs 362128"  # torch on a full disk


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed"), RuntimeError(SHORT_WRITE)],
)
def test_a_full_disk_leaves_what_was_there(out, monkeypatch, refused, error):
    save(out, 3, value=1.0)

    def half(content, file):
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    line = refused("SAVE_FAILED", save, out, 3, value=2.0)
    assert "the last complete step is 3" in line and "resume latest" in line
    assert ("No space left on device" in line) == ("Pytorch" not in str(error))
    assert names(out) == ["misc_step0000003.pt", "vqvae_ema0.9999_step0000003.pt", "vqvae_step0000003.pt"]
    monkeypatch.undo()
    assert checkpoints.read_tensors(step_file(out, "vqvae", 3))["w"] == 1.0


def test_pruning_keeps_the_last_and_the_best(out):
    for step in (1, 2, 3, 4, 5, 6):
        save(out, step)
    checkpoints.write_best(out, {2: 0.25, 5: 0.5})
    checkpoints.prune(out, 2)
    assert checkpoints.complete_steps(out) == [2, 5, 6]
    assert len(names(out)) == 9 + 1
    checkpoints.prune(out, 2)
    assert checkpoints.complete_steps(out) == [2, 5, 6]


def test_pruning_takes_the_mark_away_first(out, monkeypatch):
    for step in (1, 2):
        save(out, step)
    gone = []
    real = type(out).unlink
    monkeypatch.setattr(
        type(out), "unlink", lambda path, missing_ok=False: (gone.append(path.name), real(path, missing_ok))
    )
    checkpoints.prune(out, 1)
    assert gone[0] == "misc_step0000001.pt" and len(gone) == 3


def test_the_best_is_the_lowest_and_of_equals_the_first(out):
    assert checkpoints.read_best(out) is None and checkpoints.best_score(out) == {}
    checkpoints.write_best(out, {10: 0.5, 20: 0.25, 30: 0.25})
    assert json.loads((out / "ckpts/best.json").read_text()) == {"step": 20, "val_recon": 0.25}
    checkpoints.write_best(out, {10: float("nan"), 20: 0.5})
    assert checkpoints.read_best(out) == 20
    checkpoints.write_best(out, {})
    assert checkpoints.read_best(out) is None


def test_downstream_takes_the_best_average_else_the_newest(out, refused):
    refused("NO_CHECKPOINT", checkpoints.averaged_file, out)
    for step in (10, 20, 30):
        save(out, step)
    assert checkpoints.averaged_file(out).name == "vqvae_ema0.9999_step0000030.pt"
    checkpoints.write_best(out, {20: 0.1})
    assert checkpoints.averaged_file(out).name == "vqvae_ema0.9999_step0000020.pt"
    step_file(out, "misc", 20).unlink()
    assert checkpoints.averaged_file(out).name == "vqvae_ema0.9999_step0000030.pt"
    file = step_file(out, "vqvae", 10)
    assert checkpoints.averaged_file(file) == file


def test_which_step_is_resumed(out, refused):
    assert checkpoints.step_to_resume(out, None) is None
    assert checkpoints.step_to_resume(out, "latest") is None
    assert "it has none. Train without --resume" in refused("NO_CHECKPOINT", checkpoints.step_to_resume, out, 15)
    for step in (10, 20):
        save(out, step)
    assert checkpoints.step_to_resume(out, "latest") == 20
    assert checkpoints.step_to_resume(out, 10) == 10
    assert "it has 10, 20" in refused("NO_CHECKPOINT", checkpoints.step_to_resume, out, 15)
    assert "'newest'" in refused("BAD_RESUME", checkpoints.step_to_resume, out, "newest")
    refused("BAD_RESUME", checkpoints.step_to_resume, out, True)


def test_later_sets_are_put_aside_and_halves_removed(out):
    for step in (10, 20, 30):
        save(out, step)
    step_file(out, "misc", 30).unlink()
    (out / "ckpts/vqvae_step0000040.pt.part").write_bytes(b"half")
    checkpoints.write_best(out, {10: 0.1})
    checkpoints.put_aside(out, after=10)
    assert checkpoints.complete_steps(out) == [10]
    assert len(names(out)) == 3 + 2  # best.json and the folder
    aside = sorted(path.name for path in (out / "ckpts/aside").iterdir())
    assert aside == ["misc_step0000020.pt", "vqvae_ema0.9999_step0000020.pt", "vqvae_step0000020.pt"]


def test_files_that_no_run_wrote_are_neither_removed_nor_moved_nor_taken_for_a_tokenizer(out):
    for step in (10, 20, 30):
        save(out, step)
    users = ("my_backup_of_best.pt", "vqvae_step0000040.pt.bak", "copy_of_vqvae_step0000010.pt", "vqvae_best.pt")
    users += ("a_ema0.9999_step0000030.pt", "misc_step5.pt", "vqvae_step0000020.pth", "notes.ptx", "vqvae_step40.pt")
    for name in users:
        (out / "ckpts" / name).write_text(name)
    assert checkpoints.averaged_file(out).name == "vqvae_ema0.9999_step0000030.pt"
    checkpoints.put_aside(out, after=20)
    checkpoints.prune(out, 1)
    assert checkpoints.complete_steps(out) == [20]
    assert {name: (out / "ckpts" / name).read_text() for name in users} == {name: name for name in users}
    assert len(names(out)) == 3 + 1 + len(users)


def test_a_folder_without_averaged_weights_is_no_tokenizer(out, refused):
    checkpoints.save_set(out, 4, {"align": {}}, {"step": 4})
    assert "it is no tokenizer" in refused("NO_CHECKPOINT", checkpoints.averaged_file, out)


def test_unreadable_files_are_one_line(out, refused):
    save(out, 10)
    file = step_file(out, "vqvae", 10)
    whole = file.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-30]):
        file.write_bytes(damaged)
        assert file.name in refused("BAD_CHECKPOINT", checkpoints.read_tensors, file)
    refused("NO_CHECKPOINT", checkpoints.read_tensors, out / "none.pt")


class Runs:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_runs_no_code(out, refused, capsys):
    torch.save({"w": Runs()}, out / "evil.pt")
    refused("BAD_CHECKPOINT", checkpoints.read_tensors, out / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_foreign_file_is_named(out, refused):
    torch.save({"w": torch.zeros(1)}, out / "foreign.pt")
    assert "does not say what it was made for" in refused(
        "FOREIGN_CHECKPOINT", checkpoints.read_weights, out / "foreign.pt"
    )


def test_a_tokenizer_comes_back_as_it_was(out):
    net = make_vqvae("tiny", **SIZES)
    torch.save(net.state_dict(), out / "net.pt")
    back = checkpoints.load_tokenizer(out / "net.pt")
    assert back.sizes == net.sizes and not back.training
    ours, theirs = net.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_starting_from_another_stage_leaves_the_codebook_or_takes_it(out):
    torch.manual_seed(1)
    source, target = make_vqvae("tiny", **SIZES), make_vqvae("tiny", **SIZES)
    torch.save(source.state_dict(), out / "net.pt")
    own = target.vq.codebook.clone()
    checkpoints.start_from(target, out / "net.pt", codebook=False)
    assert torch.equal(target.vq.codebook, own)
    assert torch.equal(target.encoder.input_layer.weight, source.encoder.input_layer.weight)
    checkpoints.start_from(target, out / "net.pt", codebook=True)
    assert torch.equal(target.vq.codebook, source.vq.codebook)
    assert torch.equal(target.vq.mean_sum, source.vq.mean_sum)


def test_a_continuous_autoencoder_starts_stage_1_but_not_stage_2(out, refused):
    source, target = make_vqvae("tiny", **SIZES, codebook="none"), make_vqvae("tiny", **SIZES)
    torch.save(source.state_dict(), out / "vae.pt")
    checkpoints.start_from(target, out / "vae.pt", codebook=False)
    assert torch.equal(target.decoder.input_layer.weight, source.decoder.input_layer.weight)
    assert "stage 1" in refused("NO_CODEBOOK", checkpoints.start_from, target, out / "vae.pt", codebook=True)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_embeddings": 32}, "a network with num_embeddings 32, this run has num_embeddings 16"),
        ({"latent_channels": 4}, "latent_channels 4"),
        ({"resolution": 24}, "data made with resolution 24"),
        ({"spacing": 4.0}, "data made with spacing 4.0"),
        ({"windows": ["lung", "bone"]}, "data made with windows lung,bone"),
        ({"keep": "band"}, "data made with keep band"),
        ({"codebook": "gradient"}, "codebook gradient"),
        ({"norm": "sample"}, "Pass --norm sample, or"),
        ({"pool": "mean"}, "Pass --pool mean, or"),
        ({"resolution": 24, "spacing": 4.0}, "--resolution 24 --spacing 4.0, or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_sizes_are_named_with_both_values(out, refused, change, line):
    torch.save(make_vqvae("tiny", **{**SIZES, **change}).state_dict(), out / "net.pt")
    target = make_vqvae("tiny", **SIZES)
    assert line in refused("OTHER_TOKENIZER", checkpoints.start_from, target, out / "net.pt", codebook=True)


def test_a_point_budget_is_no_other_tokenizer(out):
    torch.save(make_vqvae("tiny", **SIZES, max_points=5000).state_dict(), out / "net.pt")
    checkpoints.start_from(make_vqvae("tiny", **SIZES), out / "net.pt", codebook=True)


def weights_in(tmp_path, change=lambda state: state, sizes=None):
    """A checkpoint of a small network, with what a stranger's file may hold instead."""
    state = seals.sealed(make_vqvae("tiny", **SIZES).state_dict())
    if sizes is not None:
        told = json.loads(bytes(state["_extra_state"].tolist()))
        content = sizes(told) if callable(sizes) else {**told, **sizes}
        state["_extra_state"] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    torch.save(change(state), tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.parametrize(
    ("sizes", "naming"),
    [
        ({"num_blocks": 10**9}, "num_blocks must be within 0 and 256, got 1000000000"),
        ({"num_blocks": 200, "model_channels": 4096}, "its sizes say"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": "4"}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
        ({"spacing": float("nan")}, "spacing"),
        ({"spacing": -1.0}, "spacing"),
        ({"widths": [8, 0, 8]}, "widths"),
        ({"resolution": 10**30}, "resolution"),
        ({"quantizer_levels": 0}, "quantizer_levels"),
        ({"windows": 3}, "cannot be read"),
        (lambda told: [told], "named values"),
        (lambda told: None, "named values"),
    ],
)
def test_foreign_sizes_are_one_line_before_any_memory_is_taken(tmp_path, refused, sizes, naming):
    assert naming in refused("BAD_CHECKPOINT", checkpoints.load_tokenizer, weights_in(tmp_path, sizes=sizes))


def test_weights_with_components_of_window_values_say_that_they_have_to_be_trained_again(tmp_path, refused):
    line = refused("BAD_CHECKPOINT", checkpoints.load_tokenizer, weights_in(tmp_path, sizes={"pca": True}))
    assert "is of an earlier version: its principal components are of window values" in line
    assert "Train it again" in line and "damaged" not in line


@pytest.mark.parametrize("foreign", [[1.0, 2.0], "text", None, {"a": 1}, float("nan")])
def test_what_stands_where_a_tensor_belongs_is_one_line(tmp_path, refused, foreign):
    file = weights_in(tmp_path, lambda state: {**state, next(iter(state)): foreign})
    refused("BAD_CHECKPOINT", checkpoints.load_tokenizer, file)
    assert "holds no plain tensor" in refused("BAD_CHECKPOINT", checkpoints.read_weights, file)


def test_weights_that_changed_since_they_were_saved_are_refused_and_older_files_load(tmp_path, refused):
    network = make_vqvae("tiny", **SIZES)
    whole, state = seals.sealed(network.state_dict()), network.state_dict()
    torch.save(whole, tmp_path / "w.pt")
    loaded = checkpoints.load_tokenizer(tmp_path / "w.pt")
    assert loaded.sizes == network.sizes
    # neither sizes nor identity know of the checksum
    marks = {seals.weights_hash(part) for part in (whole, state, loaded.state_dict())}
    assert len(marks) == 1 and b"sha256" not in bytes(loaded.state_dict()["_extra_state"].tolist())
    name = next(name for name, tensor in state.items() if tensor.dtype.is_floating_point)
    other = whole[name].clone()
    other.view(-1)[0] += 1e-6
    torch.save({**whole, name: other}, tmp_path / "w.pt")
    assert "not those that were saved" in refused("BAD_CHECKPOINT", checkpoints.load_tokenizer, tmp_path / "w.pt")
    torch.save({**state, name: other}, tmp_path / "w.pt")  # of older software, which kept none
    checkpoints.load_tokenizer(tmp_path / "w.pt")


def test_a_set_is_saved_with_its_checksum(out):
    network = make_vqvae("tiny", **SIZES)
    checkpoints.save_set(out, 3, {"vqvae": network.state_dict()}, {"step": 3})
    stored = checkpoints.read_tensors(step_file(out, "vqvae", 3))["_extra_state"]
    assert json.loads(bytes(stored.tolist()))["sha256"] == seals.tensors_hash(network.state_dict())


@pytest.mark.parametrize("content", ["[", "[3]", '{"step": "3"}', '{"step": 3, "val_recon": NaN}', '{"step": -1}'])
def test_a_best_that_names_no_step_is_one_line(out, refused, content):
    (out / "ckpts" / "best.json").write_text(content)
    assert "best.json does not name a step" in refused("BAD_RUN", checkpoints.read_best, out)
