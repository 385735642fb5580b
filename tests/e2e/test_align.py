"""bundles/align.json for real on a manifest of token files: what it leaves, resumes, refuses, and over processes."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from app.language import chat
from app.language.align_setup import make_collate
from app.language.assistant import CTAssistant
from app.language.where_looked import where_looked
from app.measures.tokenizer_metrics import MeanTerms
from app.shared.hashes import hash_path
from app.shared.refusals import Refused
from app.text.manifests import read_rows
from app.tokens.tokenizer import CTTokenizer
from app.training.step import make_scheduler
from tests.alignments import align, make_volume
from tests.runs import TINY, end_of, run_in, torchrun


def steps_of(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without those of validations."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora_final" / "adapter_model.safetensors") | torch.load(folder / "projector_final.pt")


def test_outputs_of_a_run(home, aligned):
    """16 rows in batches of 2, twice over: 16 steps; files of each epoch and of the end, and what they belong to."""
    names = {path.name for path in aligned.iterdir()}
    assert {f"projector_{end}.pt" for end in ("epoch0", "epoch1", "final")} <= names
    assert {f"lora_{end}" for end in ("epoch0", "epoch1", "final")} <= names
    assert not any(name.endswith(".part") for name in names) and "language_final" not in names
    told = json.loads((aligned / "train_args.json").read_text())
    assert told["tokenizer"] == CTTokenizer.from_pretrained(home / "tokenizer.pt").digest
    assert told["base_model"]["name"] == str((home / "qwen").resolve()), "found from any working directory"
    assert len(told["base_model"]["sha256"]) == 64 and told["use_lora"] and told["in_features"] == 16
    rows = steps_of(aligned)
    assert [row["step"] for row in rows] == list(range(1, 17)) and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    kept = torch.load(aligned / "ckpts" / "align_step0000016.pt")
    assert all(name.startswith("projector.") or "lora_" in name for name in kept)
    final, epoch = torch.load(aligned / "projector_final.pt"), torch.load(aligned / "projector_epoch0.pt")
    assert sorted(final) == ["proj.bias", "proj.weight"] and not torch.equal(final["proj.weight"], epoch["proj.weight"])


def test_the_same_seed_gives_the_same_run(home, tmp_path):
    for name in ("one", "other"):
        torch.rand(3)  # what was drawn before must not matter
        align(home, tmp_path / name, epochs=1)
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "other")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_each_epoch_is_validated_on_the_rows_held_out_and_shows_some_answers(home, aligned):
    """Means over samples, whatever the batches; the rows are those of split val, which nothing is learned from."""
    validations = [row for row in map(json.loads, (aligned / "metrics.jsonl").open()) if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 8, 16]
    assert validations[0]["val_loss"] > validations[1]["val_loss"] > validations[2]["val_loss"]
    assert sorted(path.name for path in (aligned / "samples").iterdir()) == ["step0000008.txt", "step0000016.txt"]
    told = (aligned / "samples/step0000016.txt").read_text()
    assert [line.split("/")[1] for line in told.splitlines() if line.startswith("scans/")] == [
        "case8.npz", "case9.npz", "case10.npz", "case11.npz"
    ]  # fmt: skip
    assert told.count("asked:  ") == told.count("truth:  ") == told.count("answer: ") == 4
    assert json.loads((aligned / "ckpts/best.json").read_text()) == {
        "step": 16, "val_loss": pytest.approx(validations[2]["val_loss"], abs=1e-6)
    }  # fmt: skip
    assistant = CTAssistant.from_pretrained(aligned)
    rows = [row for row in read_rows(home / "text.jsonl") if row.split == "val"]
    asked = [(row.prompt, assistant.reduce(assistant.open(row.path).tokens)) for row in rows]
    losses = []
    for (question, volume), row in zip(asked, rows, strict=True):
        encoded = chat.encode_chat(assistant.text_tokenizer, question, answer=row.answer)
        batch = make_collate(assistant.model.language, assistant.text_tokenizer)(
            [{**encoded._asdict(), "volumes": [volume]}]
        )
        with torch.no_grad():
            losses.append(float(assistant.model(batch).loss))
    assert validations[2]["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4) and len(losses) == 8


@pytest.mark.parametrize("settings", [{}, {"vl_model": "tiny_qwen2_vl", "use_lora": False, "train_language": True}])
def test_ask_takes_the_weights_of_the_best_validation(settings, home, tmp_path, monkeypatch):
    """Steps after the first epoch are made to count as worse: what it left is taken, and the end stays as it was."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    align(home, plain, **settings)
    compute = MeanTerms.compute
    scores = iter([9.0, 1.0, 5.0])
    monkeypatch.setattr(MeanTerms, "compute", lambda self: {**compute(self), "val_loss": next(scores)})
    align(home, out, **settings)
    assert json.loads((out / "ckpts/best.json").read_text()) == {"step": 8, "val_loss": 1.0}
    final, first, best = (torch.load(out / f"projector_{end}.pt") for end in ("final", "epoch0", "best"))
    assert torch.equal(best["proj.weight"], first["proj.weight"])
    assert torch.equal(final["proj.weight"], torch.load(plain / "projector_final.pt")["proj.weight"])
    assert not torch.equal(best["proj.weight"], final["proj.weight"])
    told = {CTAssistant.from_pretrained(folder).settings["projector_sha256"] for folder in (plain, out)}
    assert told == {hash_path(plain / "projector_final.pt"), hash_path(out / "projector_best.pt")}
    model = CTAssistant.from_pretrained(out).model
    kept = torch.load(out / "ckpts/align_step0000008.pt")
    ours = dict(model.named_parameters())
    names = [name for name in kept if name.replace(".base_layer", "") in ours]
    assert len(names) == len(kept) > 2 and all(torch.equal(ours[name], kept[name]) for name in names)
    scores = iter([5.0])
    align(home, out, resume="latest", epochs=3, **settings)
    assert json.loads((out / "ckpts/best.json").read_text())["step"] == 8 and (out / "projector_best.pt").is_file()
    scores = iter([0.5])
    align(home, out, resume="latest", epochs=4, **settings)
    assert not [path for path in out.iterdir() if "_best" in path.name], "the end is the best"


def test_without_rows_held_out_the_last_step_counts(home, tmp_path):
    """Neither rows of training nor those of another split take their place."""
    lines = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    (home / "train.jsonl").write_text("\n".join(json.dumps({**line, "split": "train"}) for line in lines))
    (home / "lost.jsonl").write_text(
        "\n".join(json.dumps(line | ({"image": "gone.npz"} if line["split"] == "val" else {})) for line in lines)
    )
    for name in ("train", "lost"):
        align(home, tmp_path / name, data=str(home / f"{name}.jsonl"), epochs=1)
        said = (tmp_path / name / "log.txt").read_text()
        assert len(steps_of(tmp_path / name)) == len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) > 7
        assert not (tmp_path / name / "ckpts/best.json").exists() and (tmp_path / name / "projector_final.pt").is_file()
        assert "done in" in said and "last step" in said


def test_resuming_gives_the_run_that_was_not_interrupted(home, aligned):
    again = home / "again"
    shutil.copytree(aligned, again)
    for path in [*again.glob("ckpts/*_step*"), *again.glob("*_final*")]:
        if path.name.endswith("final") or "final" in path.stem or int(path.stem[-7:]) > 8:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sorted(path.name for path in again.glob("ckpts/misc_*")) == [f"misc_step000000{n}.pt" for n in (4, 8)]
    align(home, again, resume="latest")
    one, other = weights_of(aligned), weights_of(again)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    rows = [[row for row in map(json.loads, (out / "metrics.jsonl").open())] for out in (aligned, again)]
    for row in [*rows[0], *rows[1]]:
        row.pop("seconds", None), row.pop("memory_gib", None)
    assert rows[0] == rows[1] and [row["step"] for row in rows[0] if "loss" in row] == list(range(1, 17))


@pytest.mark.parametrize("name", ["align", "misc"])
def test_foreign_numbers_in_what_an_alignment_goes_on_with_are_one_line(home, aligned, tmp_path, name):
    """A bias of one number would fit every place by broadcasting."""
    shutil.copytree(aligned, tmp_path / "run")
    file = tmp_path / f"run/ckpts/{name}_step0000016.pt"
    content = torch.load(file)
    if name == "align":
        content["projector.proj.bias"] = torch.ones(1)
    else:
        content["optimizer"]["state"][0]["exp_avg_sq"] -= 1
    torch.save(content, file)
    with pytest.raises(Refused, match=rf"BAD_CHECKPOINT: .*{file.name}"):
        align(home, tmp_path / "run", resume="latest", epochs=3)


def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_as_if_it_had_not(home, aligned, place, start_process):
    settings = {
        "data": home / "text.jsonl", "vl_model": home / "qwen", "vae_ckpt": home / "tokenizer.pt", "i_save": 100,
        "use_lora": True, "learning_rate": 1e-3, "max_3d_tokens": 40, "num_workers": 2, **dict.fromkeys(TINY),
        "i_log": 1,
    }  # fmt: skip
    process = start_process("bundles/align.json", output_dir="out", epochs=200, **settings)
    file = place / "out/metrics.jsonl"
    while not (file.exists() and '"step": 3,' in file.read_text()):
        assert process.poll() is None, process.complained.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    end = end_of(process)
    (step,) = (int(path.stem[-7:]) for path in (place / "out/ckpts").glob("misc_*"))
    said = f"STOPPED: ended by SIGTERM at step {step}, saved whole in out. To go on, run the same command with --resume"
    assert end.status == 143 and end.error.startswith(said), end.err
    settings |= {"resume": "latest", "train#steps": step + 2, "num_workers": 0}
    end = run_in(place, "bundles/align.json", output_dir="out", epochs=200, **settings)
    assert end.status == 0 and f"resumed at step {step}" in end.out, end.err
    assert [row["step"] for row in steps_of(place / "out")] == list(range(1, step + 3)), "no step is lost or twice"


def test_a_run_that_is_refused_late_leaves_the_earlier_one_where_it_is(home, aligned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(aligned, out)
    before = {path.name for path in out.iterdir()}
    weights = weights_of(out)
    with monkeypatch.context() as patch:
        patch.setattr("app.training.step.step_optimizer", lambda *_, **__: sys.exit(2))
        with pytest.raises(SystemExit):
            align(home, out)
    assert {path.name for path in out.iterdir()} == before | {".starting_run"} and not (tmp_path / "out.1").exists()
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(out).items())
    align(home, out, epochs=1)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(tmp_path / "out.1").items())
    names = {path.name for path in out.iterdir()}
    assert {"projector_final.pt", "train_args.json", "lora_epoch0"} <= names and "projector_epoch1.pt" not in names
    assert ".starting_run" not in names


def test_a_longer_run_goes_on_with_the_rates_of_its_own_length(home, tmp_path):
    """one_cycle ends at its last step: what a shorter run stored of it must not count."""
    settings = {"lr_scheduler": "one_cycle", "use_lora": False}
    align(home, tmp_path / "run", epochs=1, **settings)
    align(home, tmp_path / "run", epochs=2, learning_rate=2e-3, resume="latest", **settings)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=2e-3)
    schedule = make_scheduler(optimizer, name="one_cycle", max_steps=16)
    expected = []
    for _ in range(16):
        optimizer.step()
        schedule.step()
        expected.append(optimizer.param_groups[0]["lr"])
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["lr"] for row in rows[8:]] == pytest.approx(expected[8:], abs=1e-7)


# ---- the same in other ways


class OwnItems(Dataset):
    """What a user could write: samples in form A with the ids of the model's own tokenizer."""

    def __len__(self):
        return 6

    def __getitem__(self, number):
        ids = torch.arange(3, 13)
        generator = torch.Generator().manual_seed(number)
        cells = torch.randint(0, 4, (5, 3), generator=generator)
        return {
            "feats_3d": torch.randn(5, 16, generator=generator),
            "coords_3d": torch.nn.functional.pad(cells, (1, 0)),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(ids > 8, ids, -100),
        }


def test_a_dataset_of_the_users_own_by_its_dotted_path(home, tmp_path):
    align(home, tmp_path / "out", data=None, dataset="tests.e2e.test_align.OwnItems", use_lora=False, epochs=3)
    losses = [row["loss"] for row in steps_of(tmp_path / "out")]
    assert len(losses) == 9 and losses[-1] < losses[0]
    assert not (tmp_path / "tokens").exists(), "no phantom was made"


def test_micro_batches_give_the_step_of_the_batch(home, tmp_path):
    ended = []
    for split in (1, 2, 4):
        align(home, tmp_path / f"by{split}", batch_split=split, batch_size=4, use_lora=False, epochs=1)
        rows = steps_of(tmp_path / f"by{split}")
        ended.append(([row["loss"] for row in rows], torch.load(tmp_path / f"by{split}/projector_final.pt")))
    for losses, weights in ended[1:]:
        assert losses == pytest.approx(ended[0][0], rel=1e-5)
        torch.testing.assert_close(weights["proj.weight"], ended[0][1]["proj.weight"], rtol=1e-4, atol=1e-6)


# ---- several processes


@pytest.mark.slow
def test_two_processes_align_as_one_does(home, place, start_process):
    """Built-in phantoms, a tiny language model trained whole: the same losses and weights, one voice, one writer."""
    settings = {
        "vl_model": "tiny_qwen2_vl",
        "vae_ckpt": home / "tokenizer.pt",
        "num_phantoms": 6,
        "val_phantoms": 2,
        "about": "$None",
        "detector_phantoms": 2,
        "epochs": 1,
        "num_workers": 0,
        "learning_rate": 1e-3,
        **dict.fromkeys(TINY),
        **{"i_print": 1, "i_log": 1, "i_save": 3},
    }
    both = "['bundles/align.json','bundles/multi_gpu.json']"
    process = start_process(both, launcher=torchrun(), output_dir="both/align", batch_size=2, **settings)
    alone = start_process("bundles/align.json", output_dir="alone/align", batch_size=4, **settings)
    for end in map(end_of, (process, alone)):
        assert end.status == 0, end.err
        assert end.out.count("Step 2: loss=") == 1
    one, two = place / "alone/align", place / "both/align"
    assert sorted(p.relative_to(one) for p in one.rglob("*") if "tb_logs" not in str(p)) == sorted(
        p.relative_to(two) for p in two.rglob("*") if "tb_logs" not in str(p)
    )
    losses = [[row["loss"] for row in steps_of(out)] for out in (one, two)]
    assert len(losses[0]) > 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(out / "language_final/model.safetensors") for out in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    tokens = [sorted(p.name for p in (out.parent / "tokens").rglob("*.*") if p.is_file()) for out in (one, two)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == (6 + 2 + 2) * 3 + 1
    assert_detector_is_loaded(one)


def assert_detector_is_loaded(out):
    """What the detector shows comes first, for who asks as for who trained."""
    assistant = CTAssistant.from_pretrained(out)
    (detector,) = (out.parent / "tokens").rglob("detector_*.pt")
    kept = torch.load(detector, weights_only=True)
    assert all(
        torch.equal(value, kept[name]) for name, value in assistant.model.projector.detector.state_dict().items()
    )
    scan = assistant.open(make_volume(9))
    volume = assistant.reduce(scan.tokens)
    assert volume.feats.shape[1] == assistant.settings["in_features"] == assistant.reduce.width + 5 * 3
    assert assistant.ask(scan, "Is there a nodule in the left lung?", max_new_tokens=4).answer is not None
    looked = where_looked(assistant, "Is there a nodule in the left lung?", "no", volume)
    assert looked.loss.shape == (len(volume.feats),)
