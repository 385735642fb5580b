"""The one page that shows a chain to people: what `demo` writes and what `evaluate` writes for one's own data.

One file that needs no other and no network: pictures are inside, a policy in its head forbids everything else. All text
is escaped. What a run did not leave is left out. Computes nothing.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from app.evaluation.answer_pages import table_lines
from app.evaluation.answer_pictures import Asked
from app.evaluation.curves import curves_of, svg
from app.shared.atomic_files import write_text
from app.shared.notice import NOTICE
from app.shared.terminal import clock
from app.shared.version import VERSION

NAME = "index.html"
SIDES = "The patient's right is on the left of each picture."


class Page(NamedTuple):
    """What is shown, from top to bottom."""

    title: str
    lead: str
    stages: Sequence[tuple[str, str, float]] = ()  # name, what it did, seconds
    tokenizer: Path | None = None  # output folder of its run: its last montage
    card: Path | None = None  # folder with tokenizer_card.md and .png
    runs: Mapping[str, Path] = {}  # output folders by name, for their curves
    scores: Mapping[str, Any] | None = None  # what `evaluate` gives
    bars: Path | None = None
    asked: Sequence[Asked] = ()
    commands: Sequence[tuple[str, str]] = ()  # what to do next: command, what it does


def write_page(file: Path, page: Page) -> None:
    sections = [_stages(page), _pictures(page), _curves(page), _scores(page), _answers(page), _next(page)]
    write_text(file, _document(page, "".join(part for part in sections if part)))


# ---- sections


def _section(title: str, *parts: str) -> str:
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{"".join(parts)}</section>\n'


def _stages(page: Page) -> str:
    if not page.stages:
        return ""
    rows = [(name, clock(seconds), what) for name, what, seconds in page.stages]
    rows.append(("all", clock(sum(seconds for _, _, seconds in page.stages)), ""))
    table = html_table(("stage", "min:s", "what it did"), rows)
    return _section("What was run", f'<div class="described">{table}</div>')


def _pictures(page: Page) -> str:
    parts = []
    montages = sorted((page.tokenizer / "samples").glob("step*.png")) if page.tokenizer else []
    if montages:
        alt = "Rows of coronal slices of held-out cases: input, reconstruction from the tokens, difference, code map."
        parts += [figure(montages[-1], alt, f"Held-out cases at the end of training. {SIDES}")]
    if page.card and (page.card / "tokenizer_card.png").is_file():
        alt = (
            "One case in several windows: source, decoded from its codes, difference, shuffled codes; errors by tissue."
        )
        said = "The case of median error. With shuffled codes the picture must be much worse: the codes carry it. "
        parts += [figure(page.card / "tokenizer_card.png", alt, said + SIDES)]
    if page.card and (page.card / "tokenizer_card.md").is_file():
        text = (page.card / "tokenizer_card.md").read_text(encoding="utf-8").splitlines()
        parts += ["<details><summary>The whole card, with every error</summary>", from_markdown(text[1:]), "</details>"]
    return _section("What the tokens keep", *parts) if parts else ""


def _curves(page: Page) -> str:
    panels = []
    for name, folder in page.runs.items():
        if lines := curves_of(folder):
            panels.append(f"<figure>{svg(lines, title=name)}<figcaption>{escape(name)}</figcaption></figure>")
    if not panels:
        return ""
    key = '<p class="key"><span class="training">training</span> <span class="validation">validation</span></p>'
    said = "<p>Error of the reconstruction for a tokenizer, loss of the answers' words for an alignment.</p>"
    return _section("How it learned", said, key, f'<div class="panels">{"".join(panels)}</div>')


def _scores(page: Page) -> str:
    if page.scores is None:
        return ""
    lead = (
        "Every score stands beside the same score without the image: volumes exchanged between patients, one blank "
        "volume, the question alone, one constant answer. A model that does not look scores alike in all columns."
    )
    bars = ""
    if page.bars and page.bars.is_file():
        bars = figure(page.bars, "The scores of the table below as bars, with 95 % intervals.", "")
    return _section("Does the model look?", f"<p>{lead}</p>", bars, from_markdown(table_lines(page.scores)))


def _answers(page: Page) -> str:
    parts = []
    for asked in page.asked:
        parts.append(f"<h3>{escape(asked.question)}</h3><p><strong>Answer:</strong> {escape(asked.answer)}</p>")
        if asked.known:
            parts.append(f"<p><strong>Known:</strong> {escape(asked.known)}</p>")
        if asked.picture is not None:
            alt = "The scan's coronal and axial plane, with the places that the answer needs coloured."
            parts.append(figure(asked.picture, alt, f"Where it looked. {asked.words} {SIDES}"))
        elif asked.words:
            parts.append(f"<p>{escape(asked.words)}</p>")
    return _section("Asked of one scan", *parts) if parts else ""


def _next(page: Page) -> str:
    if not page.commands:
        return ""
    items = [f"<li><code>{escape(command)}</code> {escape(what)}</li>" for command, what in page.commands]
    return _section("Next, with your own data", f'<ol class="commands">{"".join(items)}</ol>')


# ---- pieces


def figure(picture: Path | bytes, alt: str, caption: str) -> str:
    """A PNG inside the page."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    data = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    return f'<figure class="picture"><div class="wide" tabindex="0">{image}</div>{below}</figure>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of Markdown text; the first column names the row. Scrolls by itself where it is wider than the page."""
    top = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{inline(row[0])}</th>{"".join(f"<td>{inline(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def from_markdown(lines: Sequence[str]) -> str:
    """What our own cards and tables are written in: headings, tables, lists, paragraphs."""
    out, at = [], 0
    while at < len(lines):
        line, kind = lines[at], _kind(lines[at])
        end = at + 1
        while kind in ("table", "list", "text") and end < len(lines) and _kind(lines[end]) == kind:
            end += 1
        if kind == "heading":
            out.append(f"<h3>{inline(line.lstrip('#').strip())}</h3>")
        elif kind == "table":
            head, _, *rows = ([cell.strip() for cell in row.strip()[1:-1].split("|")] for row in lines[at:end])
            out.append(html_table(head, rows))
        elif kind == "list":
            out.append(f"<ul>{''.join(f'<li>{inline(item[2:])}</li>' for item in lines[at:end])}</ul>")
        elif kind == "text":
            out.append(f"<p>{' '.join(inline(part) for part in lines[at:end])}</p>")
        at = end
    return "".join(out)


def _kind(line: str) -> str:
    starts = (("#", "heading"), ("|", "table"), ("- ", "list"))
    return next((kind for start, kind in starts if line.startswith(start)), "text" if line.strip() else "empty")


def inline(text: str) -> str:
    """Bold and code of Markdown; everything else as it is."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*|(?<!\*)\*([^*]+)\*(?!\*)", lambda m: f"<strong>{m[1] or m[2]}</strong>", text)


# ---- the document

COLOURS = {  # name: light, dark; text on its ground at least 4.5 to 1, held by a test
    "ground": ("#ffffff", "#14181d"),
    "panel": ("#f3f5f7", "#1e242b"),
    "text": ("#1b2126", "#e6eaee"),
    "quiet": ("#55606b", "#a3b0bc"),
    "edge": ("#cfd6dc", "#3a444e"),
    "training": ("#1b6680", "#6cc3dd"),
    "validation": ("#a84a12", "#f0a06b"),
    "notice": ("#fff1d6", "#3a2e14"),
}
STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:62rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--edge)}
h3{font-size:1.05rem;margin:1.5rem 0 .4rem}
p,li{max-width:46rem}
h1,h2,h3,p,li,figcaption,summary{overflow-wrap:anywhere}
.notice{background:var(--notice);padding:.6rem .9rem;border-radius:.4rem;font-weight:600;max-width:none}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.3rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--edge)}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:last-child,th:last-child{padding-right:.2rem}
thead th{color:var(--quiet);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
.described :is(th,td):last-child{text-align:left}
figure{margin:1rem 0}
figcaption{color:var(--quiet);font-size:.9rem;margin-top:.35rem;max-width:46rem}
.picture img{display:block;width:100%;min-width:34rem;height:auto;background:#fff;border-radius:.4rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.panels figure{margin:0;background:var(--panel);border-radius:.4rem;padding:.6rem}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--quiet)}
svg .grid{stroke:var(--edge)}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
polyline.training{stroke:var(--training)}
polyline.validation{stroke:var(--validation)}
circle.validation{fill:var(--validation)}
.key span::before{content:"";display:inline-block;width:1.4rem;height:.25rem;margin:0 .4rem .2rem 0}
.key span{margin-right:1.2rem}
.key .training::before{background:var(--training)}
.key .validation::before{background:var(--validation)}
code{font:.88em/1.5 ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace;background:var(--panel);padding:.1em .35em;
border-radius:.25rem;overflow-wrap:anywhere}
.commands code{display:block;padding:.5rem .7rem;margin:.2rem 0}
.commands li{margin-bottom:.8rem}
summary{cursor:pointer;color:var(--quiet);padding:.3rem 0}
footer{color:var(--quiet);font-size:.85rem;padding-top:1.5rem;padding-bottom:2.5rem}
@media (max-width:38rem){.picture figcaption::after{content:" The picture scrolls sideways."}}
@media print{
:root{LIGHT}
body{font-size:10pt}
.wide{overflow:visible}
.picture img{min-width:0}
figure,tr,h2,h3{break-inside:avoid}
h2,h3{break-after:avoid}
main,header,footer{max-width:none;padding:0}
}
"""


def style() -> str:
    light, dark = (";".join(f"--{name}:{pair[at]}" for name, pair in COLOURS.items()) for at in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE.replace('LIGHT', light)}"


def _document(page: Page, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f"<h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p>"
    end = f"Written by Voxelingo {escape(VERSION)}. This page needs no other file and no network."
    return html_document(page.title, policy, head=head, body=body, end=end)


def html_document(
    title: str, policy: str, *, head: str, body: str, end: str, more_style: str = "", script: str = ""
) -> str:
    """A page with the notice below its head. `policy` says what a browser may load for it."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style()}{more_style}</style>
</head>
<body>
<header>{head}<p class="notice">{escape(NOTICE)}</p></header>
<main>
{body}</main>
<footer>{end}</footer>
{script}</body>
</html>
"""
