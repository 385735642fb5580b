"""Reports and questions joined to the cases of a prepared dataset: text.jsonl beside its metadata.

Which columns and layouts are understood is `app.language.manifests`' matter; here rows find their case. Of a row only
text, choices and labels are written: who the patient is and which split a case is in, the dataset says.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from app import prepared_writer
from app.language.manifests import stem
from app.language.rows import REPORT_QUESTION, TextRow


def join_text(rows: Sequence[TextRow], out: Path, cases: Mapping[tuple[str, str], str]) -> None:
    """Writes OUT/{dataset}/text.jsonl for rows whose scan became a case; says how many did not.

    `cases`: (dataset, case) to its source.
    """
    by_name: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for home, source in cases.items():
        for name in {source, os.path.basename(source), stem(source), home[1]}:
            by_name[name].add(home)
    lines: dict[str, list[str]] = defaultdict(list)
    missing = several = 0
    for row in rows:
        names = (row.image, os.path.basename(row.image), stem(row.image))
        homes = next((by_name[name] for name in names if name in by_name), set())
        if len(homes) == 1:
            ((dataset, case),) = homes
            lines[dataset].append(json.dumps({"case_id": case, **_kept(row)}, ensure_ascii=False, sort_keys=True))
        else:
            missing, several = missing + (not homes), several + bool(homes)
    for dataset in {dataset for dataset, _ in cases}:
        file = out / dataset / "text.jsonl"
        if lines[dataset]:
            prepared_writer.write_text(file, "\n".join(lines[dataset]) + "\n")
        else:  # that of an earlier run with another text
            file.unlink(missing_ok=True)
    joined = sum(map(len, lines.values()))
    sys.stderr.write(f"text: {joined} rows joined, {missing} without a case, {several} that fit several cases\n")


def _kept(row: TextRow) -> dict[str, object]:
    labels = {name: int(value) for name, value in row.labels.items()}
    if row.question == REPORT_QUESTION:
        return {"report": row.answer, **labels}
    choices = {"choices": list(row.choices)} if row.choices else {}
    return {"question": row.question, "answer": row.answer, "type": row.kind, **choices, **labels}
