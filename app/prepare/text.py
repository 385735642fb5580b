"""Reports and questions joined to the cases of a prepared dataset: text.jsonl beside its metadata.

Which columns and layouts are understood is `app.text.manifests`' matter; here rows find their case. Of a row only
text, choices and labels are written; its patient, where it names one, is who the case is of.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.shared.atomic_files import write_text
from app.shared.refusals import Refused
from app.text.manifests import claims, may_be, stem
from app.text.rows import REPORT_QUESTION, TextRow

Home = tuple[str, str]  # dataset and case
SEVERAL: Home = ("", "")


def join_text(
    rows: Sequence[TextRow],
    out: Path,
    cases: Mapping[Home, str],
    lost: Mapping[Home, str],
    *,
    root: str,
) -> None:
    """Writes OUT/{dataset}/text.jsonl for rows whose scan became a case; says how many did not.

    `cases`, and `lost`, scans that became none: (dataset, case) to its source, which lies in RAW, the folder `root`.
    """
    homes = homes_of(rows, {**lost, **cases}, root=root)
    lines: dict[str, list[str]] = defaultdict(list)
    missing = several = 0
    for row in rows:
        home = homes[row.image]
        if home is SEVERAL:
            several += 1
        elif home not in cases:
            missing += 1
        else:
            text = {"case_id": home[1], **_text_fields(row)}
            lines[home[0]].append(json.dumps(text, ensure_ascii=False, sort_keys=True))
    for dataset in {dataset for dataset, _ in cases}:
        file = out / dataset / "text.jsonl"
        if lines[dataset]:
            write_text(file, "\n".join(lines[dataset]) + "\n")
        else:  # that of an earlier run with another text
            file.unlink(missing_ok=True)
    joined = sum(map(len, lines.values()))
    sys.stderr.write(f"text: {joined} rows joined, {missing} without a case, {several} that fit several cases\n")


def homes_of(rows: Sequence[TextRow], sources: Mapping[Home, str], *, root: str) -> dict[str, Home | None]:
    """The case of each image: None where there is none, SEVERAL where more than one has its name."""
    by_name: dict[str, set[Home]] = defaultdict(set)
    for home, source in sources.items():
        for name in {source, os.path.basename(source), stem(source), home[1]}:
            by_name[name].add(home)
    homes = {row.image: _homes(row.image, by_name, sources, root) for row in rows}
    single = [(image, next(iter(of))) for image, of in homes.items() if len(of) == 1]
    images = claims(single, place=lambda home: os.path.join(root, sources[home]))
    found: dict[str, Home | None] = {}
    for image, of in homes.items():
        home = next(iter(of), None)
        found[image] = SEVERAL if len(of) > 1 or (home is not None and image not in images[home]) else home
    return found


def patients_of(rows: Sequence[TextRow], sources: Mapping[Home, str], *, root: str) -> dict[Home, str]:
    """Who a case is of where its manifest says so. Two patients of one scan cannot be meant."""
    homes = homes_of(rows, sources, root=root)
    patients: dict[Home, str] = {}
    for row in rows:
        home = homes[row.image]
        if home not in sources or row.patient in ("", stem(row.image)):  # the name of the image stands for nobody
            continue
        if patients.setdefault(home, row.patient) != row.patient:
            raise Refused("BAD_MANIFEST", f"the text says two patients of case {home[1]}", "mend its column patient")
    return patients


def _homes(image: str, by_name: Mapping[str, set[Home]], sources: Mapping[Home, str], root: str) -> set[Home]:
    """What has the image's name, in the folders that it names; a case may also be called by its id."""
    names = (image, os.path.basename(image), stem(image))
    homes = next((by_name[name] for name in names if name in by_name), set())
    return {home for home in homes if image in (home[1], "/".join(home)) or may_be(image, root, sources[home])}


def _text_fields(row: TextRow) -> dict[str, object]:
    labels = {name: int(value) for name, value in row.labels.items()}
    if row.question == REPORT_QUESTION:
        return {"report": row.answer, **labels}
    choices = {"choices": list(row.choices)} if row.choices else {}
    return {"question": row.question, "answer": row.answer, "type": row.kind, **choices, **labels}
