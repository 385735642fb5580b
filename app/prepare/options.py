"""The small files a call of prepare may name: organ_mapping.json and the split table."""

import csv
import json
from pathlib import Path

from app.dataset.prepared import SPLITS
from app.shared.refusals import Refused
from app.shared.tables import read_table

MARKS = ("source", "image", "case_id", "case", "patient", "volumename")


def read_organs(path: str | None) -> dict[str, dict[str, str]]:
    """{dataset or *: {label value or file stem: organ}}; refused where the file is anything else."""
    if path is None:
        return {}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused("NO_ACCESS", "the organ mapping cannot be opened", "give a JSON file") from error
    except ValueError as error:
        raise Refused("BAD_VALUE", "the organ mapping is no JSON", "correct it") from error
    rule = 'the organ mapping must be {"dataset or *": {"label value or file stem": "organ name"}}'
    if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
        raise ValueError(rule)
    if not all(isinstance(name, str) for value in table.values() for name in value.values()):
        raise ValueError(rule)
    return table


def read_split(path: str | None) -> dict[str, str]:
    """Scan, case or patient to train or val, from a csv with a column `split`."""
    if path is None:
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            table = read_table(stream, name="the split file")
            rows = [{name.strip().lower(): cell for name, cell in row.items()} for row in table]
    except OSError as error:
        raise Refused("NO_ACCESS", "the split file cannot be opened", "give a csv") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused("BAD_TABLE", f"the split file is no UTF-8 csv ({error})", "save it as one") from error
    out = {}
    for number, row in enumerate(rows, 2):
        marks = [row[name] for name in MARKS if row.get(name)]
        if not marks or row.get("split") not in SPLITS:
            raise ValueError(f"line {number} of the split file needs split train or val and one of {', '.join(MARKS)}")
        for mark in marks:
            if out.setdefault(mark, row["split"]) != row["split"]:
                raise ValueError(f"line {number} of the split file puts {mark!r} on the other side than a line before")
    return out
