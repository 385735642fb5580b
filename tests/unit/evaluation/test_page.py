"""The page of a chain: what it says, that it needs nothing beside it, that text stays text; in a browser, too."""

import json
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from app.evaluation import curves, page
from app.evaluation.answer_pictures import Asked
from app.language.assistant import NOTICE
from tests import browser as browsers
from tests.browser import Browser

HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=1">"\'&'


def png(width=900, height=300):
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    figure.add_subplot().plot(np.sin(np.arange(50)))
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(stream := BytesIO())
    return stream.getvalue()


def scores():
    names = ("real", "shuffled", "blank", "question_only", "constant")
    accuracy = dict(zip(names, (0.81, 0.42, 0.4, 0.41, 0.5), strict=True))
    gap = {"difference": 0.39, "low": 0.3, "high": 0.48, "p": 0.001, "verdict": "the image is used"}
    return {
        "rows": 60,
        "patients": 30,
        "left_out": {},
        "notice": NOTICE,
        "questions": {
            "rows": 60,
            "accuracy": accuracy,
            "token_f1": accuracy,
            "by_kind": {f"presence {HOSTILE}": {"rows": 40, **accuracy}},
            "gaps": {"shuffled": {"accuracy": gap}},
        },
        "reports": None,
        "mirror": {"asked": 9, "right": 8, "flipped": 0.75},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A page with every section, with text that would like to be more than text."""
    home = tmp_path_factory.mktemp("page")
    for name in ("vae", "vq_stage1"):
        run = home / name
        (run / "samples").mkdir(parents=True)
        (run / "samples/step0000010.png").write_bytes(png())
        rows = [{"phase": "train", "step": step, "loss": 9.0, "recon": 1 / step} for step in range(1, 40)]
        rows += [{"phase": "train", "step": 20, "val_recon": 0.4}, {"phase": "train", "step": 39, "val_recon": 0.25}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "metrics.jsonl").write_text(text + '{"phase": "train", "step": 40, "rec')
    (home / "tokenizer_card.png").write_bytes(png())
    (home / "tokenizer_card.md").write_text(
        "# Card\n\n## Error\n\n| | MAE |\n|---|---|\n| **body** | 31.5 |\n\n- `a`\n"
    )
    asked = [
        Asked("Is there a nodule?", "yes", "no", png(700, 350), "Probability 0.93."),
        Asked(HOSTILE, HOSTILE, HOSTILE, None, HOSTILE),
    ]
    shown = page.Page(
        f"A chain {HOSTILE}",
        HOSTILE,
        stages=[("vae", HOSTILE, 63.2), ("vq_stage1", "the codebook", 61.0)],
        tokenizer=home / "vae",
        card=home,
        runs={HOSTILE: home / "vae", "vq_stage1": home / "vq_stage1", "gone": home / "gone"},
        scores=scores(),
        asked=asked,
        commands=[("python -m app prepare RAW OUT", HOSTILE)],
    )
    page.write_page(home / page.NAME, shown)
    return home / page.NAME


def test_the_page_holds_what_it_is_given(made):
    text = made.read_text(encoding="utf-8")
    assert NOTICE in text
    for title in ("What was run", "What the tokens keep", "How it learned", "Does the model look?"):
        assert text.count(f">{title}</h2>") == 1
    assert "<td>0.810</td><td>0.420</td>" in text and "real minus shuffled: +0.390 [+0.300, +0.480]" in text
    assert '<th scope="row"><strong>body</strong></th><td>31.5</td>' in text and "<li><code>a</code></li>" in text
    assert "<td>1:03</td>" in text and "<td>2:04</td>" in text  # a stage, and all of them
    assert text.count("<polyline") == 4 and "training from 1 to 0.0256; validation from 0.4 to 0.25" in text
    assert "Where it looked. Probability 0.93." in text and "<strong>Known:</strong> no" in text


def test_the_page_needs_nothing_beside_it(made):
    text = made.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href|action|data|poster)="([^"]*)"', text)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert text.count("data:image/png;base64,") == 3


def test_text_of_others_stays_text(made):
    text = made.read_text(encoding="utf-8")
    assert "<script" not in text and "onerror=&quot;" in text and "<img src=x" not in text


def test_every_picture_says_what_it_shows(made):
    text = made.read_text(encoding="utf-8")
    assert all(len(alt) > 30 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text))
    assert text.count("<img ") == 3 == len(re.findall(r'<img [^>]*alt="', text))
    assert text.count("<svg ") == 2 == len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20}', text))


def test_what_is_not_there_is_left_out(tmp_path):
    page.write_page(tmp_path / page.NAME, page.Page("Nothing", "yet", runs={"gone": tmp_path}))
    text = (tmp_path / page.NAME).read_text(encoding="utf-8")
    assert "<h2" not in text and "<section" not in text and NOTICE in text


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_its_ground(scheme):
    colour = {name: pair[scheme] for name, pair in page.COLOURS.items()}
    for text in ("text", "quiet", "training", "validation"):
        for ground in ("ground", "panel"):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    assert contrast(colour["text"], colour["notice"]) >= 4.5


def test_curves_keep_to_the_training_phase_and_to_numbers(tmp_path):
    rows = [
        {"phase": "warmup", "step": 1, "recon": 5.0},
        {"phase": "train", "step": 1, "recon": 0.5},
        {"phase": "train", "step": 2, "recon": float("nan")},
        {"phase": "train", "step": 3, "recon": 0.25},
        [1],
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (line,) = curves.curves_of(tmp_path)
    assert (line.name, line.steps, line.values) == ("training", [1, 3], [0.5, 0.25])
    assert "from 0.5 to 0.25" in curves.svg([line], title="vae")
    assert curves.curves_of(tmp_path / "gone") == []


# ---- in a browser


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch):
    monkeypatch.setattr(browsers.shutil, "which", lambda name: None)
    monkeypatch.setenv("VOXELINGO_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="ci/run has to install it"):
        browsers.find_chromium()
    monkeypatch.delenv("VOXELINGO_CI")
    with pytest.raises(pytest.skip.Exception, match="no Chromium here"):
        browsers.find_chromium()


def test_ci_brings_the_browser_and_says_that_it_must_be_there():
    text = (Path(__file__).resolve().parents[3] / ".ci/run").read_text()
    assert "apt-get install" in text and "chromium" in text and text.index("VOXELINGO_CI=1") < text.index("test_line#")


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(browser, made, width, scheme, tmp_path):
    """No script runs, nothing is loaded or complained of, and no line is wider than the screen."""
    browser.loaded.clear()
    browser.open(made, width=width, scheme=scheme)
    ground = page.COLOURS["ground"][scheme == "dark"]
    red, green, blue = (int(ground[at : at + 2], 16) for at in (1, 3, 5))
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == f"rgb({red}, {green}, {blue})"
    assert browser.ask("document.title").startswith("A chain <script>")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 100)") is True
    assert browser.ask("document.querySelectorAll('section h2').length") == 6
    wide = "[...document.querySelectorAll('p,li,h1,h2,h3,code,figcaption')]"
    assert browser.ask(f"Math.max(...{wide}.map(part => part.getBoundingClientRect().right))") <= width
    assert browser.loaded == [made.resolve().as_uri()] and browser.complaints == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    if kept := os.environ.get("VOXELINGO_SCREENSHOTS"):
        Path(kept, f"page_{width}_{scheme}.png").write_bytes((tmp_path / "page.png").read_bytes())


def test_on_paper_the_page_is_white_and_nothing_is_cut(browser, made):
    browser.open(made, width=700, scheme="dark", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('.wide')).overflowX") == "visible"
    assert browser.ask("Math.max(...[...document.images].map(image => image.getBoundingClientRect().right))") <= 700
