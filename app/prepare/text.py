"""Reports and questions joined to the cases of a prepared dataset: text.jsonl beside its metadata.

Takes csv or json lines with a column that names the scan; only the columns in `KEPT` are written, under these names.
"""

import csv
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from app import prepared

IMAGE = ("image", "volumename", "image path", "case_id", "case", "source", "file")
KEPT = {
    "report": "report",
    "findings": "findings",
    "findings_en": "findings",
    "impression": "impression",
    "impressions_en": "impression",
    "question": "question",
    "answer": "answer",
    "choices": "choices",
    "answer_choice": "answer_choice",
    "answer choice": "answer_choice",
    "type": "type",
    "labels": "labels",
}


def read_manifest(path: str | Path) -> Iterator[dict[str, object]]:
    """Rows with lower-case column names; raises ValueError where the file is none of the known kinds."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no manifest {path.name!r}; give a csv or jsonl file")
    with open(path, newline="", encoding="utf-8-sig") as stream:
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(stream)
            yield from ({str(name).strip().lower(): value for name, value in row.items()} for row in rows)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield {str(name).strip().lower(): value for name, value in row.items()}
                except (ValueError, AttributeError) as error:
                    raise ValueError(f"line {number} of the manifest is no JSON object") from error


def image_of(row: Mapping[str, object]) -> str:
    return next((str(row[name]) for name in IMAGE if row.get(name)), "")


def stem(path: str) -> str:
    return re.sub(r"(\.nii)?(\.gz)?$|\.(nrrd|nhdr|mha|mhd|nii|zip|npz)$", "", os.path.basename(path.rstrip("/\\")))


def join_text(manifest: str, out: Path, cases: Mapping[tuple[str, str], str]) -> None:
    """Writes OUT/{dataset}/text.jsonl for rows whose scan became a case; says how many did not."""
    by_name: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for (dataset, case), source in cases.items():
        for name in {source, os.path.basename(source), stem(source), case}:
            by_name[name].add((dataset, case))
    lines: dict[str, list[str]] = defaultdict(list)
    missing = several = 0
    for row in read_manifest(manifest):
        image = image_of(row)
        homes = by_name.get(image) or by_name.get(os.path.basename(image)) or by_name.get(stem(image)) or set()
        if len(homes) != 1:
            missing, several = missing + (not homes), several + (len(homes) > 1)
            continue
        ((dataset, case),) = homes
        kept = {KEPT[name]: value for name, value in row.items() if name in KEPT and value not in (None, "")}
        lines[dataset].append(json.dumps({"case_id": case, **kept}, ensure_ascii=False, sort_keys=True))
    for dataset, rows in lines.items():
        prepared.write_text(out / dataset / "text.jsonl", "\n".join(rows) + "\n")
    joined = sum(map(len, lines.values()))
    sys.stderr.write(f"text: {joined} rows joined, {missing} without a case, {several} that fit several cases\n")
