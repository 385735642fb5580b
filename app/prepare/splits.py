"""On which side of the split each case of a call lies, and what is said of it.

The split table decides, a patient's cases go together, and the rest goes by the patient's name alone.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from app.dataset.prepared import split_patients
from app.prepare.survey import Item


class Member(NamedTuple):
    """A case with its patient, and all that a split table may call it."""

    patient: str
    marks: tuple[str, ...]


def member_of(item: Item, case: str, patient: str) -> Member:
    marks = (item.source, os.path.basename(item.source), case, patient, item.patient)
    return Member(patient, tuple(mark for mark in marks if mark))


def sides_of(members: Sequence[Member], table: Mapping[str, str]) -> list[str]:
    """train or val of each. What the table does not name follows its patient's other cases where they are named."""
    named = [next((table[mark] for mark in member.marks if mark in table), None) for member in members]
    given = {member.patient: side for member, side in zip(members, named, strict=True) if side is not None}
    sides = split_patients([member.patient for member in members], given)
    return [side or sides[member.patient] for member, side in zip(members, named, strict=True)]


def about_table(members: Sequence[Member], table: Mapping[str, str]) -> list[str]:
    """What a split table leaves open; names stay untold, they may be a patient's."""
    marks = {mark for member in members for mark in member.marks}
    unnamed = sum(not any(mark in table for mark in member.marks) for member in members)
    unused = sum(mark not in marks for mark in table)
    lines = []
    if table and unnamed:
        lines.append(
            f"the split table names {len(members) - unnamed} of {len(members)} cases: "
            f"{unnamed} went with their patient's other cases, else by their patient's name"
        )
    if unused:
        lines.append(f"{unused} names in the split table fit no case")
    return lines


def counts(cases: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Of (side, patient) a case: cases and patients a side."""
    patients: dict[str, set[str]] = defaultdict(set)
    sides: Counter[str] = Counter()
    for side, patient in cases:
        sides[side] += 1
        patients[side].add(patient)
    return {side: {"cases": sides[side], "patients": len(patients[side])} for side in ("train", "val")}


def counts_line(counts_by_side: Mapping[str, Mapping[str, int]]) -> str:
    parts = (f"{side} {n['cases']} cases of {n['patients']} patients" for side, n in counts_by_side.items())
    return f"split: {', '.join(parts)}"
