"""bundles/align.json for real on a manifest of token files, then resuming, asking and evaluating with what it left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import run
from safetensors.torch import load_file
from torch.utils.data import Dataset
from typer.testing import CliRunner

from app.__main__ import app
from app.inference import CTTokenizer
from app.language import ask as asking
from app.language import evaluate_language
from app.language.assistant import NOTICE, CTAssistant
from app.language.rows import REPORT_QUESTION
from app.phantoms import make_phantom, write_nifti
from app.scans import Volume
from app.token_files import write_tokens
from networks import make_vqvae
from networks.projector import Projector
from networks.qwen import save_language
from networks.tiny_qwen import build_tiny
from tests.runs import ROOT, TINY, end_of, torchrun

CONFIG = str(ROOT / "bundles" / "align.json")
NUM_CASES = 12


def make_volume(seed: int) -> Volume:
    """Bright on the left or on the right."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(-300, 40, (32, 32, 32)).astype(np.int16)
    half = slice(0, 16) if seed % 2 else slice(16, 32)
    hu[half] += 400
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -124
    return Volume(hu, affine)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer, a Qwen3-VL on disk, and a manifest of token files with questions and reports."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    network = make_vqvae("tiny", resolution=32, keep="nonzero", num_embeddings=16, num_blocks=1)
    torch.save(network.state_dict(), home / "tokenizer.pt")
    ct = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    lines = []
    for number in range(NUM_CASES):
        write_tokens(home / f"scans/case{number}.npz", ct.encode(make_volume(number)))
        side = "left" if number % 2 else "right"
        common = {
            "image": f"scans/case{number}.npz",
            "split": "val" if number > 7 else "train",
            "patient": f"p{number}",
        }
        lines.append({**common, "question": "On which side?", "answer": side, "type": "side"})
        lines.append(
            {
                **common,
                "report": "Pleural effusion on the left." if number % 2 else "A nodule on the right.",
                "Pleural effusion": number % 2,
                "Lung nodule": 1,
            }
        )
    (home / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    language, tokenizer = build_tiny([json.dumps(line) for line in lines], family="qwen3_vl", width=32)
    save_language(language, tokenizer, home / "qwen")
    return home


def align(home: Path, out: Path, **changes) -> None:
    settings = {
        "data": str(home / "text.jsonl"),
        "vl_model": str(home / "qwen"),
        "vae_ckpt": str(home / "tokenizer.pt"),
        "output_dir": str(out),
        "num_workers": 0,
        "i_save": 4,
        "i_log": 1,
        "use_lora": True,
        "epochs": 2,
        "learning_rate": 1e-3,
        "max_3d_tokens": 40,
    }
    run(run_id="training", config_file=CONFIG, **{**settings, **changes})


@pytest.fixture(scope="module")
def aligned(home):
    align(home, home / "aligned")
    return home / "aligned"


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
    assert len(told["base_model"]["sha256"]) == 64 and told["use_lora"] and told["in_features"] == 8
    rows = [json.loads(line) for line in (aligned / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 17)) and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    kept = torch.load(aligned / "ckpts" / "align_step0000016.pt")
    assert all(name.startswith("projector.") or "lora_" in name for name in kept)
    final, epoch = torch.load(aligned / "projector_final.pt"), torch.load(aligned / "projector_epoch0.pt")
    assert sorted(final) == ["proj.bias", "proj.weight"] and not torch.equal(final["proj.weight"], epoch["proj.weight"])


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
    steps = [json.loads(line)["step"] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))


def test_a_run_does_not_go_on_with_another_tokenizer_or_vocabulary(home, aligned, tmp_path, capsys):
    torch.manual_seed(1)
    other = make_vqvae("tiny", resolution=32, keep="nonzero", num_embeddings=16, num_blocks=1)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    (tmp_path / "scans").mkdir()
    ct = CTTokenizer.from_pretrained(tmp_path / "other.pt")
    lines = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    for number in range(NUM_CASES):
        write_tokens(tmp_path / f"scans/case{number}.npz", ct.encode(make_volume(number)))
    shutil.copy(home / "text.jsonl", tmp_path)
    shutil.copytree(aligned, tmp_path / "run")
    words = [{**line, "answer": "leftwards leftwards"} if "answer" in line else line for line in lines]
    (home / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    tiny = {"vl_model": "tiny_qwen2_vl", "train_language": True, "use_lora": False, "epochs": 1}
    align(home, tmp_path / "tiny", **tiny)
    calls = {
        "OTHER_TOKENIZER": ("run", {"vae_ckpt": str(tmp_path / "other.pt"), "data": str(tmp_path / "text.jsonl")}),
        "OTHER_MODEL": ("tiny", {**tiny, "data": str(home / "words.jsonl"), "epochs": 2}),
    }
    for code, (folder, changes) in calls.items():
        before = (tmp_path / folder / "train_args.json").read_text()
        with pytest.raises(SystemExit) as end:
            align(home, tmp_path / folder, resume="latest", **changes)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and said.startswith(f"{code}: the run in"), said
        assert (tmp_path / folder / "train_args.json").read_text() == before


def test_answers_carry_where_they_come_from(home, aligned, tmp_path):
    assistant = CTAssistant.from_pretrained(aligned)
    volume = make_volume(9)
    answers = assistant.ask(volume, ["On which side?", "On which side is it?"], max_new_tokens=4)
    assert [answer.question for answer in answers] == ["On which side?", "On which side is it?"]
    alone = assistant.ask(volume, "On which side?", max_new_tokens=4)
    assert (
        alone.answer
        == answers[0].answer
        == assistant.ask(home / "scans/case9.npz", "On which side?", max_new_tokens=4).answer
    )
    told = alone.as_json()
    assert told["notice"] == NOTICE and "not for diagnosis" in NOTICE
    record = told["provenance"]
    assert len(record["scan_sha256"]) == 64 and record["shape"] == [32, 32, 32] and record["spacing"] == [8.0] * 3
    assert record["tokenizer_sha256"] == assistant.tokenizer.hash and len(record["projector_sha256"]) == 64
    assert len(record["adapter_sha256"]) == 64 and record["settings"]["max_3d_tokens"] == 40
    pieces = []
    streamed = assistant.ask(volume, "On which side?", max_new_tokens=4, write=pieces.append)
    assert "".join(pieces).strip() == streamed.answer == alone.answer
    assert assistant.ask(volume, max_new_tokens=2).question == REPORT_QUESTION


def test_a_folder_gives_jsonl_and_failures(home, aligned, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(home / "scans", folder)
    (folder / "case3.npz").write_bytes(b"broken")
    result = asking.ask(str(folder), ["On which side?"], align=str(aligned), out=str(tmp_path / "out/answers.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_CASES - 1 and result["status"] == 3
    assert "case3.npz" in (tmp_path / "out/failures.csv").read_text()


def test_a_folder_of_raw_scans_is_asked_scan_by_scan(aligned, tmp_path):
    """What is no scan is passed over; what is one and cannot be read is refused by name."""
    for number in (8, 9):
        write_nifti(tmp_path / f"scan{number}.nii.gz", make_phantom(number, size=32, spacing=12.0))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "broken.nii.gz").write_text("nothing")
    result = asking.ask(str(tmp_path), ["On which side?"], align=str(aligned), max_new_tokens=4)
    assert [answer["source"] for answer in result["answers"]] == ["scan8.nii.gz", "scan9.nii.gz"]
    assert len(result["failures"]) == 1 and result["failures"][0].startswith("broken.nii.gz: CORRUPT_FILE")
    alone = asking.ask(str(tmp_path / "scan9.nii.gz"), ["On which side?"], align=str(aligned), max_new_tokens=4)
    assert alone["answers"][0]["answer"] == result["answers"][1]["answer"] and alone["status"] == 0


def test_what_does_not_belong_together_is_refused(home, aligned, tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(
        make_vqvae("tiny", resolution=32, keep="nonzero", num_embeddings=16, num_blocks=1).state_dict(),
        tmp_path / "other.pt",
    )
    moved = tmp_path / "moved"
    shutil.copytree(aligned, moved)
    told = json.loads((moved / "train_args.json").read_text())
    told["base_model"]["sha256"] = "0" * 64
    (moved / "train_args.json").write_text(json.dumps(told))
    calls = {
        "OTHER_TOKENIZER": lambda: CTAssistant.from_pretrained(aligned, tokenizer=str(tmp_path / "other.pt")),
        "OTHER_MODEL": lambda: CTAssistant.from_pretrained(moved),
        "NO_ALIGNMENT": lambda: CTAssistant.from_pretrained(tmp_path),
        "BAD_MODEL": lambda: align(home, tmp_path / "out", vl_model=str(tmp_path)),
        "NO_DATA": lambda: align(home, tmp_path / "out", data=str(tmp_path / "gone.csv")),
    }
    for code, call in calls.items():
        with pytest.raises(SystemExit) as end:
            call()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and said.startswith(f"{code}: "), said


def test_evaluation_writes_scores_beside_controls_and_goes_on_where_it_was(home, aligned, monkeypatch):
    options = {"options": {"max_new_tokens": 6}, "align": str(aligned)}
    result = evaluate_language.evaluate(str(home / "text.jsonl"), **options)
    out = aligned / "evaluation"
    assert result == json.loads((out / "language.json").read_text()) and (out / "language.png").stat().st_size > 1000
    assert result["rows"] == 8 and result["patients"] == 4
    assert set(result["questions"]["accuracy"]) == {"real", "shuffled", "blank", "question_only", "constant"}
    floors = result["reports"]["findings"]["scores"]
    assert result["reports"]["findings"]["truth"] == "label columns" and {"all_negative", "all_positive"} <= set(floors)
    table = (out / "language.md").read_text()
    assert "no evidence the image is used" in table and "question only" in table and NOTICE in table
    wanted = {
        line["row"]: line["answer"] for line in map(json.loads, (out / "answers_real.jsonl").read_text().splitlines())
    }
    assert len(wanted) == 8 and result["left_out"] == {}
    lines = (out / "answers_shuffled.jsonl").read_text().splitlines()
    (out / "answers_shuffled.jsonl").write_text("\n".join([*lines[:5], lines[5][:20]]))
    asked = []
    monkeypatch.setattr(
        CTAssistant, "answer_many", lambda _self, batch, **_: asked.extend(batch) or ["again"] * len(batch)
    )
    evaluate_language.evaluate(str(home / "text.jsonl"), **options)
    assert len(asked) == 3


def test_an_answer_is_asked_again_when_it_was_shown_another_volume_or_cut_shorter(home, aligned, monkeypatch, tmp_path):
    asked = []

    def answer(_self, batch, **_):
        asked.extend(batch)
        return ["left"] * len(batch)

    monkeypatch.setattr(CTAssistant, "answer_many", answer)
    counts = []
    for options in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 1, "max_new_tokens": 9}):
        asked.clear()
        evaluate_language.evaluate(
            str(home / "text.jsonl"), align=str(aligned), output_dir=str(tmp_path), options=options
        )
        counts.append(len(asked))
    everything = 4 * 8
    assert counts[0] == counts[3] == everything and counts[1] == 0
    assert 0 < counts[2] <= 8, "only the shuffled volumes depend on the seed"


def test_rows_that_cannot_be_asked_are_left_out_and_counted(home, aligned, tmp_path):
    lines = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    lines = [{**line, "image": str(home / line["image"])} for line in lines]
    held = [line for line in lines if line["split"] == "val"]
    lines += [{**held[0], "question": "side " * 2000}, {**held[0], "answer": ""}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"max_new_tokens": 1}
    result = evaluate_language.evaluate(str(tmp_path / "text.jsonl"), align=str(aligned), options=options)
    assert result["rows"] == 8 and result["left_out"] == {"question too long": 1, "empty answer": 1}
    assert "8 rows of 4 patients, 1 left out (question too long)" in (aligned / "evaluation/language.md").read_text()


# ---- as commands


def say(*call, status=0) -> str:
    """Standard output of `python -m app …` inside this process."""
    done = CliRunner().invoke(app, [*map(str, call)])
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


def test_ask_as_a_command(home, aligned, tmp_path):
    scan, where = home / "scans/case9.npz", ["--align", aligned, "--max-new-tokens", 4]
    answer = CTAssistant.from_pretrained(aligned).ask(scan, "On which side?", max_new_tokens=4)
    told = json.loads(say("ask", scan, "On which side?", *where, "--json"))
    assert told["answers"] == [answer.as_json()] and told["failures"] == [] and told["notice"] == NOTICE
    for_people = say("ask", scan, "On which side?", "Is there a nodule?", *where)
    assert f"case9.npz: On which side?\n{answer.answer}\n" in for_people and for_people.strip().endswith(NOTICE)
    report = CTAssistant.from_pretrained(aligned).ask(scan, max_new_tokens=4).answer
    assert say("ask", scan, *where, "--stream").splitlines() == [report, NOTICE]
    assert "question takes" in say("ask", scan, "side " * 3000, *where, status=2)
    assert say("ask", tmp_path / "gone.nii", *where, status=2).startswith("NO_SOURCE: ")
    assert say("ask", scan, "--align", tmp_path, status=2).startswith("NO_ALIGNMENT: ")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    assert "1 scans refused" in CliRunner().invoke(app, ["ask", str(tmp_path), "--align", str(aligned)]).stdout


def test_evaluate_as_a_command_that_is_a_process(home, aligned, tmp_path):
    call = [sys.executable, "-m", "app", "evaluate", home / "text.jsonl", "--align", aligned, "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, call), "--max-new-tokens", "3", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "language.json").read_text())
    assert "Traceback" not in done.stderr


# ---- what is kept and what is refused


def test_a_tiny_model_that_was_not_trained_is_kept_too(home, tmp_path):
    settings = {"vl_model": "tiny_qwen2_vl", "train_language": False, "use_lora": False, "epochs": 1}
    align(home, tmp_path / "out", **settings)
    assistant = CTAssistant.from_pretrained(tmp_path / "out")
    assert assistant.ask(home / "scans/case9.npz", "On which side?", max_new_tokens=2).notice == NOTICE
    assert len(assistant.settings["base_model"]["sha256"]) == 64


def test_projectors_of_another_width_and_damaged_records_are_one_line(home, aligned, tmp_path, capsys):
    shutil.copytree(aligned, tmp_path / "moved")
    torch.save(Projector(16, 32).state_dict(), tmp_path / "moved/projector_final.pt")
    shutil.copytree(aligned, tmp_path / "damaged")
    (tmp_path / "damaged/train_args.json").write_text('{"tokenizer"')
    calls = {
        "BAD_PROJECTOR": lambda: CTAssistant.from_pretrained(tmp_path / "moved"),
        "NO_ALIGNMENT": lambda: CTAssistant.from_pretrained(tmp_path / "damaged"),
        "BAD_VALUE": lambda: align(home, tmp_path / "out", train_language=True),
    }
    for code, call in calls.items():
        with pytest.raises(SystemExit) as end:
            call()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and said.startswith(f"{code}: "), said


def test_low_rank_layers_without_peft_are_one_line(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        align(home, tmp_path / "out")
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("NO_PEFT: use_lora needs the package peft")


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
            "feats_3d": torch.randn(5, 8, generator=generator),
            "coords_3d": torch.nn.functional.pad(cells, (1, 0)),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(ids > 8, ids, -100),
        }


def test_a_dataset_of_the_users_own_by_its_dotted_path(home, tmp_path):
    align(home, tmp_path / "out", data=None, dataset="tests.e2e.test_align.OwnItems", use_lora=False, epochs=3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert len(losses) == 9 and losses[-1] < losses[0]
    assert not (tmp_path / "tokens").exists(), "no phantom was made"


def test_micro_batches_give_the_step_of_the_batch(home, tmp_path):
    ended = []
    for split in (1, 2, 4):
        align(home, tmp_path / f"by{split}", batch_split=split, batch_size=4, use_lora=False, epochs=1)
        rows = [json.loads(line) for line in (tmp_path / f"by{split}/metrics.jsonl").open()]
        ended.append(([row["loss"] for row in rows], torch.load(tmp_path / f"by{split}/projector_final.pt")))
    for losses, weights in ended[1:]:
        assert losses == pytest.approx(ended[0][0], rel=1e-5)
        torch.testing.assert_close(weights["proj.weight"], ended[0][1]["proj.weight"], rtol=1e-4, atol=1e-6)


# ---- several processes


def test_two_processes_align_as_one_does(home, place, start_process):
    """Built-in phantoms, a tiny language model trained whole: the same losses and weights, one voice, one writer."""
    settings = {
        "vl_model": "tiny_qwen2_vl",
        "vae_ckpt": home / "tokenizer.pt",
        "num_phantoms": 6,
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
    losses = [[json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()] for out in (one, two)]
    assert len(losses[0]) > 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(out / "language_final/model.safetensors") for out in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    tokens = [sorted(p.name for p in (out.parent / "tokens").rglob("*.*")) for out in (one, two)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 6 * 3
