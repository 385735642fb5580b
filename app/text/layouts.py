"""Published datasets of CT with text, read as they are shipped: one small reader each, chosen by the header.

CT-RATE, RadGenome-ChestCT, 3D-RAD, M3D-Cap, M3D-VQA and LLaVA conversations. Says nothing about images beyond their
names: whether a file holds Hounsfield units is the gate's affair, and nothing here ever rescales.
"""

import csv
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app.shared.refusals import Refused
from app.shared.tables import read_table
from app.text.rows import REPORT_QUESTION, TextRow, clean, join_report, label_columns, lettered

CT_RATE_NAME = re.compile(r"(?P<patient>(?P<split>train|valid)_\d+)_(?P<scan>[a-z]+)_(?P<recon>\d+)")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
M3D_CAP = ("image", "text", "split")  # where `text` is a file: only then it is this layout
IMAGE_TAG = re.compile(r"<(?:image|video|volume|im_patch)>\s*")


def read_layout(records: Sequence[Mapping], base: Path) -> list[TextRow] | None:
    """Rows of a published layout; None where the header is of none."""
    header = set(records[0])
    known = [(columns, reader) for columns, reader in LAYOUTS if set(columns) <= header]
    if set(M3D_CAP) <= header and str(records[0]["text"]).endswith(".txt"):
        known.append((M3D_CAP, read_m3d_cap))
    if not known:
        return None
    columns, reader = known[0]
    for number, record in enumerate(records, start=1):
        if lacking := [name for name in columns if record.get(name) is None]:
            what = f"row {number} has no {lacking[0]}, which the first one has"
            raise Refused("BAD_MANIFEST", what, "fill it in, or remove the row")
    return reader(records, base)


def read_ct_rate(records: Sequence[Mapping], base: Path) -> list[TextRow]:
    """Reports csv: VolumeName, Findings_EN, Impressions_EN; labels from the labels csv beside it, if any."""
    labels = ct_rate_labels(base)
    return [
        TextRow(
            question=REPORT_QUESTION,
            answer=join_report(record["Findings_EN"], record.get("Impressions_EN")),
            labels=labels.get(record["VolumeName"], {}),
            **ct_rate_place(record["VolumeName"]),
        )
        for record in records
    ]


def ct_rate_place(name: str) -> dict[str, str]:
    """Patient and split of a CT-RATE volume, and where its file lies: valid_53_a_1 in valid/valid_53/valid_53_a."""
    match = CT_RATE_NAME.match(name)
    if not match:
        return {"image": name}
    patient, split = match["patient"], match["split"]
    file = name if name.endswith(".nii.gz") else f"{name}.nii.gz"
    image = f"{split}/{patient}/{patient}_{match['scan']}/{file}"
    return {"image": image, "patient": patient, "split": split}


def ct_rate_labels(base: Path) -> dict[str, dict[str, bool]]:
    """Label columns by volume from every csv beside the reports that has VolumeName and no text."""
    labels: dict[str, dict[str, bool]] = {}
    for file in sorted(base.glob("*.csv")):
        with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:  # any csv may lie there
            first = stream.readline()
            if {"VolumeName", "Medical material"} <= set(next(csv.reader([first]), ())):
                rows = read_table(itertools.chain([first], stream), name=file.name)
                labels |= {row["VolumeName"]: label_columns(row) for row in rows}
    return labels


def read_radgenome(records: Sequence[Mapping], _base: Path) -> list[TextRow]:
    """Volumename, Anatomy, Sentence; an empty anatomy is the whole report."""
    rows = []
    for record in records:
        anatomy = clean(record["Anatomy"])
        question = f"Describe the {anatomy} on this CT scan." if anatomy else REPORT_QUESTION
        place = ct_rate_place(record["Volumename"])
        kind = "region" if anatomy else "report"
        rows.append(TextRow(question=question, answer=clean(record["Sentence"]), kind=kind, **place))
    return rows


def read_3d_rad(records: Sequence[Mapping], _base: Path) -> list[TextRow]:
    """Task, Subtask, VolumeName, Question, Answer, QuestionType, AnswerChoice, Choice A..D; "-" is none."""
    return [
        lettered_row(
            record,
            letter=record.get("AnswerChoice"),
            kind=clean(record.get("Task")) or str(record["QuestionType"]).lower(),
            place=ct_rate_place(record["VolumeName"]),
        )
        for record in records
    ]


def read_m3d_vqa(records: Sequence[Mapping], _base: Path) -> list[TextRow]:
    """Image Path, Question Type, Question, Choice A..D, Answer, Answer Choice."""
    return [
        lettered_row(
            record,
            letter=record.get("Answer Choice"),
            kind=clean(record.get("Question Type")) or "question",
            place={"image": record["Image Path"], "patient": m3d_patient(record["Image Path"])},
        )
        for record in records
    ]


def lettered_row(record: Mapping, *, letter: object, kind: str, place: dict[str, str]) -> TextRow:
    """A row with columns Choice A..D; an open question has none."""
    given = [clean(record.get(f"Choice {name}")) for name in "ABCD"]
    choices = tuple(choice for choice in given if choice.strip("-"))
    answer, letter = clean(record["Answer"]), clean(letter).strip("-").upper()
    if choices and letter in "ABCD"[: len(choices)] and letter:
        answer = lettered(choices)["ABCD".index(letter)]
    return TextRow(question=clean(record["Question"]), answer=answer, kind=kind, choices=choices, **place)


def m3d_patient(path: str) -> str:
    """The case folder: ct_quizze/000007/Axial_C__portal_venous_phase -> ct_quizze/000007."""
    parts = Path(path).parts
    at = next((i for i, part in enumerate(parts) if part in ("ct_case", "ct_quizze")), None)
    return "/".join(parts[at : at + 2]) if at is not None else path


def read_m3d_cap(records: Sequence[Mapping], base: Path) -> list[TextRow]:
    """Named lists of {image, text}; text is the path of a file with `study_findings:` and `discussion:`."""
    rows = []
    for record in records:
        file = base / record["text"]
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        split = "test" if str(record["split"]).startswith("test") else str(record["split"])
        image = record["image"]
        rows.append(TextRow(image, REPORT_QUESTION, m3d_report(text), patient=m3d_patient(image), split=split))
    return rows


def m3d_report(text: str) -> str:
    """The findings of an M3D text file, else its discussion, else all of it."""
    parts = re.split(r"\b(study_findings|discussion|presentation|patient_data)\s*:", text)
    named = {name: clean(body.strip().strip(";,")) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return named.get("study_findings") or named.get("discussion") or clean(parts[0])


def read_llava(records: Sequence[Mapping], _base: Path) -> list[TextRow]:
    """id, image, conversations of {from, value}: each question with its answer is a row of its own, without history."""
    rows = []
    for record in records:
        place = ct_rate_place(str(record["image"]))
        turns = [(ROLES.get(turn.get("from")), turn.get("value")) for turn in record["conversations"]]
        for (asker, question), (speaker, answer) in itertools.pairwise(turns):
            if (asker, speaker) == ("user", "assistant"):
                question = clean(IMAGE_TAG.sub("", clean(question)))
                kind = str(record.get("type", "question"))
                rows.append(TextRow(question=question, answer=clean(answer), kind=kind, **place))
    return rows


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Sequence[Mapping], Path], list[TextRow]]], ...] = (
    (("VolumeName", "Findings_EN"), read_ct_rate),
    (("Volumename", "Anatomy", "Sentence"), read_radgenome),
    (("VolumeName", "Question", "QuestionType"), read_3d_rad),
    (("Image Path", "Question", "Answer"), read_m3d_vqa),
    (("conversations", "image"), read_llava),
)
