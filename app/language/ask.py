"""The body of the command `ask`: what it prints and writes. A refused scan is listed, the rest is done."""

import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from app.language.assistant import CTAssistant, TokenizedScan
from app.shared.notice import NOTICE
from app.shared.refusals import Refused, check_path

log = logging.getLogger(__name__)


def ask(
    source: str,
    questions: Sequence[str],
    *,
    align: str = "outputs/align",
    tokenizer: str | None = None,
    language_model: str | None = None,
    out: str | None = None,
    stream: bool = False,
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """Answers for a scan, or for every scan of a folder (then into a jsonl file, refusals into failures.csv beside)."""
    check_path(source, name="SCAN")
    if out is not None:
        check_path(out)
    path = Path(source)
    if not path.exists():
        what = f"{source} does not exist"
        raise Refused("NO_SOURCE", what, "give a scan, a prepared case or dataset, or token files")
    if stream and (len(questions) > 1 or out is not None):
        raise Refused("BAD_CALL", "--stream shows one answer as it is written", "ask one question, without --out")
    if not all(question.strip() for question in questions):
        raise Refused("BAD_CALL", "a question is empty", "ask something, or leave the question out for a report")
    if out is not None and Path(out).is_dir():
        raise Refused("BAD_CALL", f"{out} is a folder", "give a file for --out, such as answers.jsonl")
    if out is not None and (Path(out).parent / "metadata.csv").exists():
        what = f"{Path(out).parent} is a prepared dataset with a failures.csv"
        raise Refused("BAD_CALL", what, "give --out another folder")
    assistant = CTAssistant.from_pretrained(align, tokenizer=tokenizer, language_model=language_model)
    if "built" in assistant.settings["base_model"]:
        log.warning("the language model of %s is tiny, built to try the chain: it says nothing of patients", align)
    scans = assistant.open_all(path)
    if (first := next(scans, None)) is None:
        what = f"{source} holds no scan"
        raise Refused("NO_CASES", what, "give a scan, a prepared case or dataset, or token files", status=3)
    answers, failures = [], []
    with written(None if out is None else Path(out)) as keep:
        for opened in chain([first], scans):
            if not isinstance(opened, TokenizedScan):
                failures.append(" ".join(str(opened).split()))
                log.warning("refused: %s", failures[-1])
                keep([], failures[-1:])
                continue
            write = (lambda text: (sys.stdout.write(text), sys.stdout.flush())) if stream else None
            if stream and opened.source != path.name:  # one of several below a folder
                sys.stdout.write(f"{opened.source or opened.name}: ")
            asked = list(questions) or [None]
            given = assistant.ask(opened, asked[0] if stream else asked, max_new_tokens=max_new_tokens, write=write)
            new = [answer.as_json() for answer in (given if isinstance(given, list) else [given])]
            keep(new, [])
            answers += new
            if stream:
                sys.stdout.write("\n")
    status = 3 if failures else 0
    return {"answers": answers, "failures": failures, "notice": NOTICE, "status": status}


@contextmanager
def written(out: Path | None) -> Iterator[Callable[[Sequence[dict[str, Any]], Sequence[str]], None]]:
    """Takes answers into OUT and refusals into failures.csv beside it, at once: a run that is stopped keeps its own."""
    if out is None:
        yield lambda answers, failures: None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    refused = out.parent / "failures.csv"
    with open(out, "w", encoding="utf-8") as lines, open(refused, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["message"])

        def keep(answers: Sequence[dict[str, Any]], failures: Sequence[str]) -> None:
            lines.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            table.writerows([message] for message in failures)
            lines.flush()
            stream.flush()

        yield keep


def lines(result: dict[str, Any], *, streamed: bool = False) -> list[str]:
    """For people: each question with its answer, unless it was streamed, and the notice once."""
    shown = []
    for answer in [] if streamed else result["answers"]:
        shown += [f"{answer['source'] or answer['scan']}: {answer['question']}", answer["answer"], ""]
    refused = [f"{len(result['failures'])} scans refused.", ""] if result["failures"] else []
    return [*shown, *refused, NOTICE]
