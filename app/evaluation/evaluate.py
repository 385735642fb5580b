"""What `evaluate` runs on: an aligned model, rows of text with their tokens, and mirrored scans where there are HU.

Beside the scores it writes the page that shows them (see page.py).
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from app.dataset import prepared
from app.evaluation import page
from app.evaluation.answer_pages import table_lines
from app.evaluation.answer_pictures import Asked, picture_answer
from app.evaluation.answer_scores import evaluate_language, stored_answers
from app.language import align_data, phantom_text
from app.language.assistant import CTAssistant
from app.language.volume_tokens import TokenSource
from app.phantoms.sentences import balance
from app.shared.refusals import Refused, check_path
from app.text.manifests import read_rows
from app.text.rows import TextRow
from app.tokens.open_scan import Scan, as_it_lies, case_key, is_case
from app.tokens.token_files import CTTokens

log = logging.getLogger(__name__)


def evaluate(
    data: str | None = None,
    *,
    align: str = "outputs/align",
    tokenizer: str | None = None,
    output_dir: str | None = None,
    image_root: str | None = None,
    skip_bad: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores on the held-out rows of a manifest or prepared dataset; without data on phantoms never seen in training.

    `options`: seed, batch_size, max_new_tokens, num_shuffles, num_phantoms, and split (default: test, else val, else
    all rows).
    """
    if output_dir is not None:
        check_path(output_dir)
    usual = {"seed": 0, "batch_size": 16, "max_new_tokens": 160, "num_shuffles": 1, "num_phantoms": 60, "split": None}
    options = usual | (options or {})
    assistant = CTAssistant.from_pretrained(align, tokenizer=tokenizer)
    source = assistant.tokenizer.source(align_data.tokens_folder(align))
    mirrored: dict[str, CTTokens] = {}
    if data is None:
        fresh = {"count": options["num_phantoms"], "seed": options["seed"], "split": "val"}
        fresh["about"] = assistant.settings.get("about")
        rows, volumes = phantom_text.phantom_volumes(source, **fresh)
        rows = balance(rows, seed=options["seed"])
        mirrored = phantom_text.phantom_volumes(source, **fresh, mirror=True)[1]
        mirrored = {name.removesuffix("_mirrored"): tokens for name, tokens in mirrored.items()}
    else:
        rows = held_out(data, image_root=image_root, split=options["split"])
        volumes, _ = align_data.encode_rows(rows, source, skip_bad=skip_bad)
        mirrored = mirrored_cases(rows, volumes, source)
    out = results_folder(align, output_dir)
    result = evaluate_language(
        assistant,
        rows,
        volumes,
        out=out,
        mirrored=mirrored,
        batch_size=options["batch_size"],
        max_new_tokens=options["max_new_tokens"],
        num_shuffles=options["num_shuffles"],
        seed=options["seed"],
    )
    write_answers_page(assistant, Path(align), rows, result, out=out)
    return result


NEXT = (
    ('python -m app ask SCAN "QUESTION"', "asks the model about a scan; without a question it writes a report."),
    (
        "python -m app export BUNDLE --align ALIGN",
        "packs tokenizer and aligned model into a bundle for other machines.",
    ),
    ("python -m app evaluate DATA --split test", "judges rows that were not looked at while choosing settings."),
)


def write_answers_page(
    assistant: CTAssistant, align: Path, rows: list[TextRow], result: dict[str, Any], *, out: Path
) -> None:
    """The page of an evaluation. It names none of the scans asked: names of files may name patients.

    Pictures of the tokenizer carry case ids, which are hashes unless it was prepared with --keep-names.
    """
    file = assistant.tokenizer.file
    run = file.parent.parent if file.parent.name == "ckpts" else None
    shown = page.Page(
        "How well the model answers",
        "An aligned model on data that it was not trained on, beside what its scores are worth without the image.",
        tokenizer=run,
        card=run,
        runs={"tokenizer": run, "alignment": align} if run else {"alignment": align},
        scores=result,
        bars=out / "language.png",
        asked=asked_of_one(assistant, rows, stored_answers(out / "answers_real.jsonl")),
        commands=NEXT,
    )
    page.write_page(out / page.NAME, shown)


def asked_of_one(assistant: CTAssistant, rows: list[TextRow], answers: dict[tuple[str, str], str]) -> list[Asked]:
    """The first scan that was asked a question: that question and where its answer looked, and the scan's report."""
    answered = [row for row in rows if row.path is not None and (row.image, row.prompt) in answers]
    first = next((row for row in answered if row.kind != "report"), None)
    if first is None:
        return []
    said = answers[first.image, first.prompt]
    asked = [picture_answer(assistant, first.path, first.prompt, said, known=first.answer)]
    report = next((row for row in answered if row.image == first.image and row.kind == "report"), None)
    if report is not None:
        asked.append(Asked(report.prompt, answers[report.image, report.prompt], report.answer))
    return asked


def held_out(data: str, *, image_root: str | None, split: str | None) -> list[TextRow]:
    """Rows of the named split; else of test, of val (which chose the step), or all, whichever is there first."""
    rows = read_rows(data, image_root=image_root)
    for wanted in [split] if split else ["test", "val"]:
        chosen = [row for row in rows if row.split == wanted]
        if chosen:
            log.info("evaluating %d rows of split %s", len(chosen), wanted)
            return chosen
    if split:
        what = f"{data} has no row with split {split}"
        raise Refused("NO_CASES", what, f"it has {sorted({row.split for row in rows})}", status=2)
    log.warning("no split test or val in %s: evaluating all rows, also those of training", data)
    return rows


def mirrored_cases(rows: list[TextRow], volumes: dict[str, CTTokens], source: TokenSource) -> dict[str, CTTokens]:
    """Mirrored tokens of prepared cases, whose HU lie on a RAS grid; other images take no part in the mirror test."""
    mirrored: dict[str, CTTokens] = {}
    for row in rows:
        if row.image in volumes and row.image not in mirrored and row.path and is_case(row.path):
            case = prepared.open_case(row.path)
            if case.is_hu:
                mirrored[row.image] = source.cached(f"{case_key(case)}.mirrored", partial(mirror_image, case))
    return mirrored


def mirror_image(case: prepared.PreparedCase) -> Scan:
    """The patient seen in a mirror; the grid is centred and keeps its affine."""
    return as_it_lies(case.hu()[::-1].copy(), case.affine)


def results_folder(align: str, output_dir: str | None) -> Path:
    return Path(align, "evaluation") if output_dir is None else Path(output_dir)


def lines(result: dict[str, Any], *, align: str, output_dir: str | None) -> list[str]:
    """For people: the table, and where the page lies."""
    return [*table_lines(result), f"Look at {results_folder(align, output_dir) / page.NAME} in a browser."]


def status_of(result: dict[str, Any]) -> int:
    """3 where scans could not be read and were left out."""
    return 3 if result["left_out"].get("no volume") else 0


def print_table(result: dict[str, Any]) -> None:
    """The table for people, in the log of a bundle run; a refusal at its end where scans were left out."""
    for line in table_lines(result):
        log.info("%s", line)
    if status_of(result):
        what = f"{result['left_out']['no volume']} rows are left out, whose scans cannot be used"
        raise Refused("BAD_SCAN", what, "the lines above say why", status=3)
