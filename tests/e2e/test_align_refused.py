"""Alignment: what does not belong together is refused in one line; a missing tokenizer is trained or asked for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from app.language import align_setup
from app.language.assistant import NOTICE, CTAssistant
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.tokens.token_files import write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.training import initial_weights
from networks import make_vqvae
from networks.projector import Projector
from tests.alignments import NUM_CASES, align, make_volume
from tests.runs import TINY, end_of


def test_a_run_does_not_go_on_with_another_tokenizer_or_vocabulary(home, aligned, tmp_path):
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
        with pytest.raises(Refused) as end:
            align(home, tmp_path / folder, resume="latest", **changes)
        said = str(end.value)
        assert end.value.status == 2 and said.startswith(f"{code}: the run in"), said
        assert (tmp_path / folder / "train_args.json").read_text() == before


def test_other_sizes_do_not_resume_and_other_settings_are_said(home, aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "run")
    for changes in ({"lora_r": 4}, {"use_lora": False}, {"projector_layers": 2}):
        with pytest.raises(Refused) as end:
            align(home, tmp_path / "run", resume="latest", **changes)
        said = str(end.value)
        (name, value), *_ = changes.items()
        assert end.value.status == 2 and said.startswith("OTHER_SETTINGS: ") and f"this one has {value}" in said
        assert f"began with {name} " in said
    before = (tmp_path / "run/train_args.json").read_text()
    align(home, tmp_path / "run", resume="latest", position="mrope3d")
    assert "nothing left to train" in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/train_args.json").read_text() == before, "what is asked is what was trained"
    (tmp_path / "run/log.txt").unlink()
    align(home, tmp_path / "run", resume="latest", epochs=3, lora_dropout=0.1, learning_rate=0.5)
    (said,) = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "this run goes on" in line]
    assert "lora_dropout 0.1 (was 0.0)" in said and "learning_rate 0.5 (was " in said and "lora_r" not in said


def test_what_does_not_belong_together_is_refused(home, aligned, tmp_path):
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
        "BAD_MODEL": lambda: align(home, tmp_path / "out", vl_model=str(tmp_path), vae_ckpt="looked at later"),
        "NO_DATA": lambda: align(home, tmp_path / "out", data=str(tmp_path / "gone.csv")),
    }
    for code, call in calls.items():
        with pytest.raises(Refused) as end:
            call()
        said = str(end.value)
        assert end.value.status == 2 and said.startswith(f"{code}: "), said


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_the_base_model_is_loaded_in_the_precision_that_is_asked_for(amp, dtype, home, monkeypatch):
    def load(_name, *, dtype):
        raise ValueError(f"asked for {dtype}")

    monkeypatch.setattr(align_setup.qwen, "load_language", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Refused, match=f"^BAD_MODEL: asked for {dtype}"):
        align_setup.Language(vl_model=str(home / "qwen"), amp=amp)


def test_the_network_is_built_from_the_file_alone(home, tmp_path, monkeypatch):
    """As monai.bundle.load does: the data are not there, and nothing is written. A tiny model takes its words from the
    text, a stock one reads none."""
    monkeypatch.chdir(tmp_path)
    given = {"data": "gone.csv", "vl_model": str(home / "qwen"), "vae_ckpt": str(home / "tokenizer.pt")}
    config = ConfigParser({**json.loads((bundles_folder() / "align.json").read_text()), **given})
    network = config.get_parsed_content("network_def")
    assert type(network).__name__ == "VolumeQwen" and (network.projector.in_features, network.position) == (16, "1d")
    assert [name for name, p in network.named_parameters() if p.requires_grad][:2] == [
        "projector.proj.weight", "projector.proj.bias"
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


# ---- what is kept and what is refused


@pytest.mark.parametrize("lora", [False, True])
def test_a_tiny_model_that_was_not_trained_whole_is_kept_too(lora, home, tmp_path):
    settings = {"vl_model": "tiny_qwen2_vl", "use_lora": lora, "epochs": 1}
    align(home, tmp_path / "out", **settings if lora else {**settings, "train_language": False})
    assert not json.loads((tmp_path / "out/train_args.json").read_text())["trained_language"]
    assistant = CTAssistant.from_pretrained(tmp_path / "out")
    assert any("lora_" in name for name, _ in assistant.model.named_parameters()) == lora
    assert assistant.ask(home / "scans/case9.npz", "On which side?", max_new_tokens=2).notice == NOTICE
    assert len(assistant.settings["base_model"]["sha256"]) == 64


def test_projectors_of_another_width_and_damaged_records_are_one_line(home, aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "moved")
    torch.save(Projector(24, 32).state_dict(), tmp_path / "moved/projector_final.pt")
    shutil.copytree(aligned, tmp_path / "damaged")
    (tmp_path / "damaged/train_args.json").write_text('{"tokenizer"')
    shutil.copytree(aligned, tmp_path / "cut")
    (tmp_path / "cut/lora_final/adapter_model.safetensors").write_bytes(b"cut short")
    shutil.copytree(aligned, tmp_path / "edited")
    (tmp_path / "edited/train_args.json").write_text('{"tokenizer": "abc"}')
    calls = {
        "BAD_ADAPTER": lambda: CTAssistant.from_pretrained(tmp_path / "cut"),
        "NO_ALIGNMENT: ": lambda: CTAssistant.from_pretrained(tmp_path / "edited"),
        "BAD_PROJECTOR": lambda: CTAssistant.from_pretrained(tmp_path / "moved"),
        "NO_ALIGNMENT": lambda: CTAssistant.from_pretrained(tmp_path / "damaged"),
        "BAD_VALUE": lambda: align(home, tmp_path / "out", train_language=True),
    }
    for code, call in calls.items():
        with pytest.raises(Refused) as end:
            call()
        said = str(end.value)
        assert end.value.status == 2 and said.startswith(f"{code.removesuffix(': ')}: "), said


def test_low_rank_layers_without_peft_are_one_line(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Refused) as end:
        align(home, tmp_path / "out", vae_ckpt=str(tmp_path / "looked at later"))
    assert str(end.value).startswith("NO_PEFT: use_lora needs the package peft")


# ---- without a tokenizer


def test_a_missing_tokenizer_is_trained_on_the_demo_and_asked_for_otherwise(home, place, monkeypatch):
    """What stage 1 would leave is put there in its stead; the run goes on with it."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("app.training.shipped.pretrained_folder", lambda: place / "none ships")
    with pytest.raises(Refused) as end:
        align(home, place / "out", vae_ckpt=None, data=str(home / "text.jsonl"))
    assert str(end.value).startswith("NO_TOKENIZER: there is no tokenizer yet. First run")
    demo = {"data": None, "vae_ckpt": None, "vl_model": None, "use_lora": False, "num_phantoms": 4, "epochs": 1}
    calls = []

    def stage1(call, env):
        calls.append(call)
        if len(calls) == 1:
            return subprocess.CompletedProcess(call, 3)
        checkpoints = place / "outputs/vq_stage1/ckpts"
        checkpoints.mkdir(parents=True)
        shutil.copy(home / "tokenizer.pt", checkpoints / "vqvae_ema0.9999_step0000001.pt")
        torch.save({"step": 1}, checkpoints / "misc_step0000001.pt")
        return subprocess.CompletedProcess(call, 0)

    monkeypatch.setattr(initial_weights.subprocess, "run", stage1)
    with pytest.raises(Refused) as end:
        align(home, place / "out", **demo)
    assert end.value.status == 1 and "stage 1 ended with status 3" in str(end.value)
    align(home, place / "out", **demo)
    assert [Path(call[-1]).name for call in calls] == ["vq_stage1.json"] * 2 and calls[0][1:4] == [
        "-m",
        "monai.bundle",
        "run",
    ]
    told = json.loads((place / "out/train_args.json").read_text())
    assert told["tokenizer_path"].endswith("outputs/vq_stage1/ckpts/vqvae_ema0.9999_step0000001.pt")


@pytest.mark.slow
def test_the_bare_command_trains_a_tokenizer_and_aligns_to_it(place, start_process):
    end = end_of(start_process("bundles/align.json", **dict.fromkeys(TINY), epochs=1, num_phantoms=20), seconds=600)
    assert end.status == 0, end.err
    assert "no tokenizer yet: training one on the demo first" in end.out
    assert (place / "outputs/align/language_final").is_dir() and (place / "outputs/vq_stage1/ckpts/best.json").is_file()
