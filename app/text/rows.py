"""One thing to learn or to ask about a scan, and how cells of a table become it. Opens no file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.shared.refusals import Refused

REPORT_QUESTION = "Write a radiology report for this CT scan."
ALIASES = {
    "image": ("image", "image_path", "scan", "volume", "volumename", "path", "file", "case_id", "case", "tokens"),
    "report": ("report", "text", "caption"),
    "findings": ("findings", "findings_en"),
    "impression": ("impression", "impressions", "impressions_en", "conclusion"),
    "question": ("question", "prompt", "instruction"),
    "answer": ("answer", "response"),
    "choices": ("choices", "options"),
    "kind": ("type", "kind", "question_type", "questiontype", "task"),
    "split": ("split", "fold", "set"),
    "patient": ("patient", "patient_id", "patientid", "subject"),
}
EMPTY = ("", "not given.", "not given", "nan")


@dataclass(frozen=True)
class TextRow:
    """One thing to learn or to ask: an image, a question and the answer. A report is an answer to REPORT_QUESTION."""

    image: str  # as written; `path` is where it was found
    question: str
    answer: str
    kind: str = "report"
    choices: tuple[str, ...] = ()
    patient: str = ""
    split: str = ""
    labels: Mapping[str, bool] = field(default_factory=dict)
    path: Path | None = None
    missing: str = "no such file"  # why there is no path, where there is none

    @property
    def prompt(self) -> str:
        """The question as the model reads it, lettered choices below."""
        return "\n".join([self.question, *lettered(self.choices)])


def lettered(choices: Iterable[str]) -> list[str]:
    return [f"{chr(ord('A') + at)}. {choice}" for at, choice in enumerate(choices)]


def named(record: Mapping) -> dict[str, str]:
    """Values under our names; the first alias that has a value wins."""
    lower = {str(key).strip().lower().replace(" ", "_"): value for key, value in record.items() if key is not None}
    renamed = {}
    for name, aliases in ALIASES.items():
        values = [lower[alias] for alias in aliases if lower.get(alias) not in (None, "")]
        if values:
            renamed[name] = values[0]
    return renamed


def clean(text: object) -> str:
    """Text without surrounding blanks; the ways in which tables say "nothing" are nothing."""
    stripped = "" if text is None else str(text).strip()
    return "" if stripped.lower() in EMPTY else stripped


def join_report(findings: object, impression: object) -> str:
    findings, impression = clean(findings), clean(impression)
    if findings and impression:
        return f"Findings: {findings}\nImpression: {impression}"
    return findings or impression


def parse_choices(value: object) -> tuple[str, ...]:
    """A list, a dict by letter, either as JSON, or text separated by | or ;."""
    if not value:
        return ()
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip()[:1] in ("[", "{") else value.split("|" if "|" in value else ";")
        except json.JSONDecodeError:
            value = None
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        raise Refused("BAD_MANIFEST", f"choices must be a list, or text separated by | or ;, got {given!r}")
    return tuple(str(choice).strip() for choice in value)


def with_letter(answer: str, choices: tuple[str, ...]) -> str:
    """The answer as `B. right` where it is one of the choices, given by letter or in words."""
    for line, choice in zip(lettered(choices), choices, strict=True):
        if answer.lower() in (choice.lower(), line[0].lower(), line.lower()):
            return line
    return answer


def label_columns(record: Mapping) -> dict[str, bool]:
    """Columns that hold 0 or 1, or a dict `labels` of them."""
    known = {alias for aliases in ALIASES.values() for alias in aliases}
    columns = {**record, **(record.get("labels") if isinstance(record.get("labels"), dict) else {})}
    truth = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    return {
        str(name): truth[str(value).strip().lower()]
        for name, value in columns.items()
        if name is not None
        and str(name).strip().lower().replace(" ", "_") not in known
        and str(value).strip().lower() in truth
    }


def general_rows(record: Mapping, source: str) -> list[TextRow]:
    """The rows of one record of a manifest of the user's own: a report, a question, or both."""
    own = named(record)
    if "image" not in own:
        columns = ", ".join(ALIASES["image"])
        raise Refused("BAD_MANIFEST", f"a row of {source} names no image", f"a column must be one of {columns}")
    common = {
        "image": str(own["image"]),
        "patient": str(own.get("patient", "")),
        "split": str(own.get("split", "")),
        "labels": label_columns(record),
    }
    report = clean(own.get("report")) or join_report(own.get("findings"), own.get("impression"))
    rows = []
    if "question" in own:
        choices = parse_choices(own.get("choices"))
        answer = with_letter(clean(own.get("answer")), choices)
        kind = str(own.get("kind", "question"))
        rows.append(TextRow(question=clean(own["question"]), answer=answer, kind=kind, choices=choices, **common))
    if report or "question" not in own:
        rows.append(TextRow(question=REPORT_QUESTION, answer=report, **common))
    return rows
