"""The demo for real: its page of a tokenizer and an aligned model, and (slow) the whole chain in a tiny form."""

import json
import re
import shutil

import pytest

from app import demo
from app.evaluation import evaluate
from app.language.assistant import NOTICE
from app.measures import controls
from app.training import checkpoints
from tests.browser import Browser
from tests.runs import SIZE, SPACING

TINY = demo.Sizes(
    num_train=3,
    num_val=2,
    num_unseen=2,
    steps={"vae": 12, "vq_stage1": 8, "vq_stage2": 6},
    tokenizer={
        "resolution": SIZE,
        "spacing": SPACING,
        "model_channels": 16,
        "num_blocks": 1,
        "i_log": 1,
        "i_sample": 6,
        "i_save": 6,
        "val_interval": 6,
    },
    codebook={"num_embeddings": 8},
    align={"num_phantoms": 24, "epochs": 2, "i_log": 1},
    num_asked=8,
)


@pytest.fixture(scope="module")
def few_draws():
    """Intervals from a handful of draws: what they are is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "RESAMPLES", 5)
        yield


@pytest.fixture(scope="module")
def shown(straight, home, aligned, few_draws, tmp_path_factory):
    """The page of runs that other tests have trained, as if a demo had."""
    out = tmp_path_factory.mktemp("demo")
    shutil.copytree(straight[0], out / "vq_stage2")
    shutil.copytree(aligned, out / "align")
    shutil.copy(home / "scans/case9.npz", out / "scan.npz")
    options = {"align": str(out / "align"), "output_dir": str(out / "evaluation"), "options": {"max_new_tokens": 3}}
    evaluate.evaluate(str(home / "text.jsonl"), **options)
    told = {"question": "On which side?", "answer": "left", "known": "right"}
    stages = {name: {"seconds": 60.0, "result": {}} for name in demo.STAGES}
    stages["ask"]["result"] = {"scan": "scan.npz", "answers": [told], "notice": NOTICE}
    demo.show(demo.Demo(out, 0, demo.Sizes()), {"stages": stages})
    return out / "index.html"


def test_the_page_of_the_demo_shows_every_part_of_the_chain(shown):
    text = shown.read_text(encoding="utf-8")
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert titles == [
        "What was run", "What the tokens keep", "How it learned", "Does the model look?", "Asked of one scan",
        "Next, with your own data",
    ]  # fmt: skip
    assert all(f'<th scope="row">{name}</th><td>1:00</td>' in text for name in demo.STAGES) and "<td>7:00</td>" in text
    assert "<strong>Answer:</strong> left" in text and "<strong>Known:</strong> right" in text
    assert "gives this answer a probability of" in text
    assert text.count("<svg ") == 2 and 'aria-label="vq_stage2: training from' in text and NOTICE in text
    assert len(text) < 5_000_000


def test_a_browser_shows_the_page_of_the_demo(shown):
    browser = Browser()
    try:
        browser.open(shown, width=380)
        assert browser.ask("document.documentElement.scrollWidth") <= 380
        assert browser.ask("[...document.images].every(image => image.naturalWidth > 100)") is True
        assert browser.loaded == [shown.resolve().as_uri()] and browser.complaints == []
    finally:
        browser.close()


@pytest.mark.slow
def test_the_whole_chain_runs_from_nothing_to_its_page(tmp_path, few_draws, monkeypatch):
    # tensorboard's, where an earlier test has loaded it: it would close pytest's stream
    monkeypatch.setattr("absl.logging.PythonHandler.close", lambda _: None)
    done = demo.demo(str(tmp_path / "demo"), sizes=TINY)
    out = tmp_path / "demo"
    assert list(done["stages"]) == list(demo.STAGES)
    for name, steps in TINY.steps.items():
        assert checkpoints.complete_steps(out / name)[-1] == steps
    assert (out / "phantoms/raw/phantom_0004/IM0000.dcm").is_file() and (out / "evaluation/tokenizer_card.md").is_file()
    answers = done["stages"]["ask"]["result"]["answers"]
    assert answers and all(row["known"] and isinstance(row["answer"], str) for row in answers)
    scores = json.loads((out / "evaluation/language.json").read_text())
    assert scores["patients"] == TINY.num_asked
    text = (out / "index.html").read_text(encoding="utf-8")
    assert text.count("<svg ") == 4 and "The whole card" in text and answers[0]["question"] in text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix == ".pt"}
    again = demo.demo(str(out), sizes=TINY)
    assert again["stages"] == done["stages"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
