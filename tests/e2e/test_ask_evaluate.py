"""Asking an aligned model and evaluating it: in Python, on folders, as commands; what is cached and what is not."""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import run
from typer.testing import CliRunner

from app.__main__ import app
from app.dataset.writer import write_case
from app.evaluation import evaluate
from app.language import ask as asking
from app.language.align_setup import make_collate
from app.language.assistant import NOTICE, CTAssistant
from app.language.chat import encode_chat
from app.language.where_looked import where_looked
from app.measures import controls
from app.phantoms.phantoms import make_phantom, write_phantom_nifti
from app.shared.refusals import Refused, refusal_of
from app.text.rows import REPORT_QUESTION
from tests.alignments import NUM_CASES, make_volume
from tests.runs import ROOT


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
    assert assistant.ask(volume, []) == []


def test_a_prepared_case_is_one_scan_however_it_is_given(aligned, tmp_path):
    """As an object and as a folder, also one whose volume is an .npz, which is no token file."""
    volume, assistant = make_volume(9), CTAssistant.from_pretrained(aligned)
    case = write_case(tmp_path, "case", volume.hu, affine=volume.affine, windows=["lung"])
    given, found = assistant.open(case), assistant.open(case.path)
    assert given.origin == found.origin and given.origin["scan_sha256"] == case.source_hash
    file = case.path / "ct_normalized_32.npy"
    np.savez(file.with_suffix(".npz"), np.load(file))
    file.unlink()
    (again,) = assistant.open_all(case.path)
    assert again.origin == found.origin and again.name == "case"


def test_a_volume_in_memory_is_known_by_its_values_whatever_holds_it(aligned):
    """Before, only what had an attribute `hu` could be asked about."""
    volume, assistant = make_volume(9), CTAssistant.from_pretrained(aligned)
    held = [volume, (volume.hu, volume.affine), nibabel.Nifti1Image(volume.hu, volume.affine)]
    first, *others = (assistant.open(one).origin for one in held)
    assert len(first["scan_sha256"]) == 64 and all(other == first for other in others)


def test_a_folder_gives_jsonl_and_failures(home, aligned, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(home / "scans", folder)
    (folder / "case3.npz").write_bytes(b"broken")
    result = asking.ask(str(folder), ["On which side?"], align=str(aligned), out=str(tmp_path / "out/answers.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_CASES - 1 and result["status"] == 3
    assert "case3.npz" in (tmp_path / "out/failures.csv").read_text()


def test_a_folder_that_is_stopped_keeps_its_answers(home, aligned, tmp_path, monkeypatch):
    whole, count = CTAssistant.ask, iter(range(100))

    def stopped(self, *given, **options):
        if next(count) == 3:
            raise KeyboardInterrupt
        return whole(self, *given, **options)

    monkeypatch.setattr(CTAssistant, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        asking.ask(str(home / "scans"), ["On which side?"], align=str(aligned), out=str(tmp_path / "answers.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["case0.npz", "case1.npz", "case10.npz"]


def test_the_table_of_a_prepared_dataset_is_not_written_over(home, aligned, tmp_path):
    (tmp_path / "metadata.csv").write_text("case_id\n")
    with pytest.raises(Refused, match="is a prepared dataset") as end:
        asking.ask(str(home / "scans"), ["Side?"], align=str(aligned), out=str(tmp_path / "answers.jsonl"))
    assert end.value.status == 2


def test_a_folder_of_raw_scans_is_asked_scan_by_scan(aligned, tmp_path):
    """What is no scan is passed over; what is one and cannot be read is refused by name."""
    for number in (8, 9):
        write_phantom_nifti(tmp_path / f"scan{number}.nii.gz", make_phantom(number, size=32, spacing=12.0))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "broken.nii.gz").write_text("nothing")
    result = asking.ask(str(tmp_path), ["On which side?"], align=str(aligned), max_new_tokens=4)
    assert [answer["source"] for answer in result["answers"]] == ["scan8.nii.gz", "scan9.nii.gz"]
    assert len(result["failures"]) == 1 and result["failures"][0].startswith("broken.nii.gz: CORRUPT_FILE")
    streamed = say("ask", tmp_path, "On which side?", "--align", aligned, "--max-new-tokens", 4, "--stream", status=3)
    assert [f"{answer['source']}: {answer['answer']}" for answer in result["answers"]] == streamed.splitlines()[:2]
    alone = asking.ask(str(tmp_path / "scan9.nii.gz"), ["On which side?"], align=str(aligned), max_new_tokens=4)
    assert alone["answers"][0]["answer"] == result["answers"][1]["answer"] and alone["status"] == 0


def test_a_prepared_folder_tells_what_was_cut_off_and_which_case_is_damaged(aligned, tmp_path):
    made = make_phantom(8, size=24, spacing=16.0)
    wide = np.diag([2.0, 2.0, 2.0, 1.0]) @ made.affine
    for name in ("damaged", "wide"):
        case = write_case(tmp_path / "data", name, made.hu, affine=wide, windows=[])
    (case.path.parent / "damaged" / "case.json").write_text("[")
    result = asking.ask(str(tmp_path / "data"), ["On which side?"], align=str(aligned), max_new_tokens=4)
    assert [answer["provenance"]["codes"] for answer in result["answers"]] == [["FOV_CROPPED"]]
    assert result["status"] == 3 and result["failures"][0].startswith(
        "damaged: DAMAGED_CASE: damaged/case.json cannot be read"
    )


def say(*call, status=0) -> str:
    """Standard output of `python -m app …` inside this process."""
    done = CliRunner().invoke(app, [*map(str, call)])
    assert done.exit_code == status, done.output
    return done.stderr if status == 2 else done.stdout


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
    assert "a question is empty" in say("ask", scan, "", *where, status=2)
    assert "is a folder" in say("ask", scan, *where, "--out", tmp_path, status=2)
    (tmp_path / "empty").mkdir()
    assert "NO_CASES: " in CliRunner().invoke(app, ["ask", str(tmp_path / "empty"), *map(str, where)]).stderr
    say("ask", tmp_path / "empty", *where, status=3)
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    assert "1 scans refused" in CliRunner().invoke(app, ["ask", str(tmp_path), "--align", str(aligned)]).stdout


# ---- evaluation


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals from a handful of draws: what they are is tested elsewhere."""
    monkeypatch.setattr(controls, "RESAMPLES", 5)


def test_evaluation_writes_scores_beside_controls_and_goes_on_where_it_was(home, aligned, monkeypatch):
    options = {"options": {"max_new_tokens": 6}, "align": str(aligned)}
    result = evaluate.evaluate(str(home / "text.jsonl"), **options)
    out = aligned / "evaluation"
    assert result == json.loads((out / "language.json").read_text()) and (out / "language.png").stat().st_size > 1000
    assert result["rows"] == 8 and result["patients"] == 4
    assert set(result["questions"]["accuracy"]) == {"real", "shuffled", "blank", "question_only", "constant"}
    floors = result["reports"]["findings"]["scores"]
    assert result["reports"]["findings"]["truth"] == "label columns" and {"all_negative", "all_positive"} <= set(floors)
    table = (out / "language.md").read_text()
    assert (
        "no verdict from 4 patients, it takes 20" in table
        and "random labels" in table
        and "question only" in table
        and NOTICE in table
    )
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
    evaluate.evaluate(str(home / "text.jsonl"), **options)
    assert len(asked) == 3


def test_evaluation_writes_a_page_with_a_question_and_where_its_answer_looked(home, aligned, tmp_path, few_draws):
    options = {"max_new_tokens": 3}
    evaluate.evaluate(str(home / "text.jsonl"), align=str(aligned), output_dir=str(tmp_path), options=options)
    text = (tmp_path / "index.html").read_text()
    answer = evaluate.stored_answers(tmp_path / "answers_real.jsonl")["scans/case8.npz", "On which side?"]
    assert f"<h3>On which side?</h3><p><strong>Answer:</strong> {answer}</p>" in text
    assert "<strong>Known:</strong> right" in text and "gives this answer a probability of" in text
    assert "Does the model look?" in text and "question only" in text and NOTICE in text
    assert "case8" not in text, "names of scans may tell of patients"


def test_where_an_answer_looked_is_what_its_probability_falls_by(home, aligned):
    assistant = CTAssistant.from_pretrained(aligned)
    volume = assistant.reduce(assistant.open(home / "scans/case9.npz").tokens)
    looked = where_looked(assistant, "On which side?", "left", volume)
    assert torch.equal(looked.coords, volume.coords) and looked.loss.shape == (len(volume.feats),)

    def log_probability(feats):
        """The plain way: of the model's own loss, a mean over the answer's tokens."""
        encoded = encode_chat(assistant.text_tokenizer, "On which side?", answer="left")
        sample = {**encoded._asdict(), "volumes": [volume._replace(feats=feats)]}
        told = assistant.model(make_collate(assistant.model.language, assistant.text_tokenizer)([sample]))
        return -float(told.loss.detach()) * told.num_tokens

    whole = log_probability(volume.feats)
    assert looked.probability == pytest.approx(np.exp(whole), rel=1e-4)
    for row in (0, int(looked.loss.argmax())):
        feats = volume.feats.clone()
        feats[row] = volume.feats.mean(0)
        assert float(looked.loss[row]) == pytest.approx(whole - log_probability(feats), abs=1e-4)
    assert where_looked(assistant, "On which side?", "  ", volume) is None


def test_an_answer_is_asked_again_when_it_was_shown_another_volume_or_cut_shorter(
    home, aligned, monkeypatch, tmp_path, few_draws
):
    asked = []

    def answer(_self, batch, **_):
        asked.extend(batch)
        return ["left"] * len(batch)

    monkeypatch.setattr(CTAssistant, "answer_many", answer)
    counts = []
    for options in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 1, "max_new_tokens": 9}):
        asked.clear()
        evaluate.evaluate(str(home / "text.jsonl"), align=str(aligned), output_dir=str(tmp_path), options=options)
        counts.append(len(asked))
    everything = 4 * 8
    assert counts[0] == counts[3] == everything and counts[1] == 0
    assert 0 < counts[2] <= 8, "only the shuffled volumes depend on the seed"


def test_rows_that_cannot_be_asked_are_left_out_and_counted(home, aligned, tmp_path, few_draws):
    lines = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    lines = [{**line, "image": str(home / line["image"])} for line in lines]
    held = [line for line in lines if line["split"] == "val"]
    lines += [{**held[0], "question": "side " * 2000}, {**held[0], "answer": ""}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"max_new_tokens": 1}
    result = evaluate.evaluate(str(tmp_path / "text.jsonl"), align=str(aligned), options=options)
    assert result["rows"] == 8 and result["left_out"] == {"question too long": 1, "empty answer": 1}
    assert "8 rows of 4 patients, 1 left out (question too long)" in (aligned / "evaluation/language.md").read_text()


def test_a_question_beyond_the_context_does_not_end_an_evaluation(home, aligned, monkeypatch, few_draws):
    """One that fits alone, and not beside the longest volume."""
    lengths = set()

    def fits(self, question, *, num_tokens=0, stock=CTAssistant.fits):
        lengths.add(num_tokens)
        return stock(self, question, num_tokens=num_tokens)

    monkeypatch.setattr(CTAssistant, "fits", fits)
    assistant = CTAssistant.from_pretrained(aligned)
    assert assistant.fits("On which side?", num_tokens=4000) and not assistant.fits("On which side?", num_tokens=4096)
    lengths.clear()
    options = {"max_new_tokens": 1}
    assert evaluate.evaluate(str(home / "text.jsonl"), align=str(aligned), options=options)["rows"] == 8
    assert len(lengths) == 1 and 0 < lengths.pop() <= 40


def test_evaluate_as_a_command(home, aligned, tmp_path, few_draws):
    where = ["--align", aligned, "--out", tmp_path, "--max-new-tokens", 3]
    result = json.loads(say("evaluate", home / "text.jsonl", *where, "--json"))
    assert result == json.loads((tmp_path / "language.json").read_text()) and result["rows"] == 8
    for_people = say("evaluate", home / "text.jsonl", *where)
    page = f"Look at {tmp_path}/index.html in a browser.\n"
    assert for_people == (tmp_path / "language.md").read_text() + page and NOTICE in for_people
    lines = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    lines = [{**line, "image": str(home / line["image"])} for line in lines] + [{**lines[-1], "image": "gone.npz"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "1 left out (no volume)" in say("evaluate", tmp_path / "some.jsonl", *where, "--skip-bad", status=3)
    bundle = {"config_file": str(ROOT / "bundles" / "evaluate_language.json"), "data": str(tmp_path / "some.jsonl")}
    bundle |= {"align_dir": str(aligned), "output_dir": str(tmp_path), "skip_bad": True, "max_new_tokens": 3}
    bundle["num_shuffles"] = 2
    with pytest.raises(RuntimeError) as end:  # MONAI's chain
        run("run", **bundle)
    assert refusal_of(end.value).status == 3
    assert json.loads((tmp_path / "language.json").read_text())["shuffles"] == 2
    assert "the mean of 2 pairings" in (tmp_path / "language.md").read_text()
    asked = (tmp_path / "answers_shuffled_2.jsonl").read_text().splitlines()
    assert 0 < len(asked) < len((tmp_path / "answers_shuffled.jsonl").read_text().splitlines())  # no reports
    assert say("evaluate", home / "gone.csv", *where, status=2).startswith("NO_DATA: ")
    said = say("evaluate", home / "text.jsonl", *where, "--split", "autumn", status=2)
    assert said.splitlines()[-1].endswith("has no row with split autumn. It has ['train', 'val'].")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ask", "evaluate"])
def test_commands_as_processes(command, home, aligned, tmp_path):
    data = [home / "scans/case9.npz", "On which side?"] if command == "ask" else [home / "text.jsonl"]
    call = [sys.executable, "-m", "app", command, *data, "--align", aligned, "--max-new-tokens", 3, "--json"]
    call += ["--out", tmp_path / ("answers.jsonl" if command == "ask" else "evaluation")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told["notice"] == NOTICE and ("answers" in told or "questions" in told)
    assert len(list(tmp_path.rglob("*.json*"))) >= 1
