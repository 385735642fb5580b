"""What can be said and asked about a phantom: a report and questions whose answers follow from its known findings.

Questions are balanced: for each wording every answer is kept equally often, so that whoever does not look at the scan
scores chance. Mirroring swaps the sides of findings as it swaps the scan's. Builds text only, no scans.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from app.measures.controls import swap_sides
from app.shared.refusals import Refused
from app.text.rows import REPORT_QUESTION, TextRow

SIDES = ("left", "right")
PLACES = {
    "pleural effusion": "on the {side} side",
    "nodule": "in the {side} lung",
    "kidney stone": "in the {side} kidney",
}
PLURALS = {"pleural effusion": "pleural effusions", "nodule": "nodules", "kidney stone": "kidney stones"}
ORGANS = {"pleural effusion": "pleura", "nodule": "lung", "kidney stone": "kidney"}
LARGE_MM = {"nodule": 22.0, "kidney stone": 11.5}  # the middle of what phantoms show
NUMBERS = ("no", "one", "two", "three")
LABELS = {"pleural effusion": "Pleural effusion", "nodule": "Lung nodule", "kidney stone": "Kidney stone"}


def phantom_rows(
    case_id: str, findings: Sequence[Mapping], *, split: str, about: Sequence[str] | None = None
) -> list[TextRow]:
    """The report and all questions of one phantom, unbalanced; `about` keeps to some kinds of finding."""
    names = list(PLACES) if about is None else list(about)
    if unknown := sorted(set(names) - set(PLACES)):
        what = f"about must be among {', '.join(PLACES)}, got {', '.join(unknown)}"
        raise Refused("BAD_VALUE", what, "name findings of the phantoms")
    findings = [finding for finding in findings if finding["finding"] in names]
    labels = {LABELS[name]: any(f["finding"] == name for f in findings) for name in names}
    common = {"image": case_id, "patient": case_id, "split": split, "labels": labels}
    report = TextRow(question=REPORT_QUESTION, answer=phantom_report(findings, names), kind="report", **common)
    asked = [TextRow(question=q, answer=a, kind=kind, **common) for kind, q, a in questions(findings, names)]
    return [report, *asked]


def phantom_report(findings: Sequence[Mapping], names: Sequence[str] = tuple(PLACES)) -> str:
    """A sentence for each kind of finding and side, normal or not, in a fixed order."""
    return " ".join(statement(name, side, at_side(findings, name, side)) for name in names for side in SIDES)


def at_side(findings: Sequence[Mapping], name: str, side: str) -> Mapping | None:
    return next((f for f in findings if f["finding"] == name and f["side"] == side), None)


def statement(name: str, side: str, finding: Mapping | None) -> str:
    place = PLACES[name].format(side=side)
    if finding is None:
        return f"No {name} {place}."
    if name == "pleural effusion":
        return f"{finding['size'].capitalize()} {name} {place}."
    count = finding["count"]
    noun = name if count == 1 else PLURALS[name]
    return f"{NUMBERS[count].capitalize()} {noun} {place}, the largest {size_class(finding)}."


def size_class(finding: Mapping) -> str:
    """small or large; effusions, whose size is a volume, are small, moderate or large."""
    if "size" in finding:
        return finding["size"]
    return "large" if max(finding["size_mm"]) >= LARGE_MM[finding["finding"]] else "small"


def questions(findings: Sequence[Mapping], about: Sequence[str] = tuple(PLACES)) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of everything that has one answer."""
    asked = []
    for name in about:
        shown = {side: at_side(findings, name, side) for side in SIDES}
        for side, finding in shown.items():
            place = PLACES[name].format(side=side)
            asked.append((f"{name}: presence", f"Is there a {name} {place}?", "no" if finding is None else "yes"))
            if finding is not None:
                if name != "pleural effusion":
                    asked.append(
                        (f"{name}: count", f"How many {PLURALS[name]} are {place}?", NUMBERS[finding["count"]])
                    )
                asked.append((f"{name}: size", f"How large is the largest {name} {place}?", size_class(finding)))
        sides = [side for side, finding in shown.items() if finding is not None]
        if len(sides) == 1:
            asked.append((f"{name}: side", f"On which side is the {name}?", sides[0]))
    names = {finding["finding"] for finding in findings}
    if len(names) == 1:
        asked.append(("organ", "Which organ is affected?", ORGANS[names.pop()]))
    return asked


def balance(rows: Sequence[TextRow], *, seed: int = 0) -> list[TextRow]:
    """For each question every answer equally often; rows that are reports stay. Order is kept.

    A wording with one answer only would give it away and is dropped.
    """
    groups: dict[Hashable, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, row in enumerate(rows):
        if row.kind != "report":
            groups[row.question][row.answer].append(at)
    rng = np.random.default_rng(seed)
    kept = {at for at, row in enumerate(rows) if row.kind == "report"}
    for answers in groups.values():
        if len(answers) > 1:
            fewest = min(map(len, answers.values()))
            for _, members in sorted(answers.items()):
                kept.update(rng.choice(members, fewest, replace=False).tolist())
    return [row for at, row in enumerate(rows) if at in kept]


def mirrored(findings: Sequence[Mapping], *, places: bool = False) -> list[dict]:
    """The findings of the same patient seen in a mirror; with `places` their centres too, left to right."""
    swapped = [{**finding, "side": swap_sides(finding["side"])} for finding in findings]
    if not places:
        return swapped
    return [{**finding, **_mirrored_places(finding)} for finding in swapped]


def _mirrored_places(finding: Mapping) -> dict:
    places = {name: finding[name] for name in ("center_mm", "inside_mm") if name in finding}
    return {name: [[-x, y, z] for x, y, z in points] for name, points in places.items()}
