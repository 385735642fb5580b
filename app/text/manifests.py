"""Scans with text, as rows: a manifest (csv, json, jsonl), a prepared dataset's text.jsonl, or scans with .txt beside.

Column names are matched loosely, published layouts by their header (`layouts.py`). Reads text and finds files; opens no
scan, knows no tokens and no model. `check_rows` says what is wrong before any time is spent on it.
"""

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from app.dataset import prepared
from app.shared.hashes import hash_path
from app.shared.refusals import Refused
from app.shared.scan_formats import volume_endings, without_ending
from app.shared.tables import read_table
from app.text.layouts import CT_RATE_NAME, read_layout
from app.text.rows import REPORT_QUESTION, TextRow, clean, general_rows

H = TypeVar("H", bound=Hashable)

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "test": "test",
}
SAMPLE = 1 << 16  # bytes


def read_rows(source: str | Path, *, image_root: str | Path | None = None) -> list[TextRow]:
    """Rows of a manifest file or folder, each with the path of its image where one was found."""
    source = Path(source)
    if not source.exists():
        what = f"{source} does not exist"
        raise Refused("NO_DATA", what, "give a csv, json or jsonl manifest, or a folder with text")
    if source.is_dir():
        rows, base = read_folder(source), source
    else:
        records = list(read_records(source))
        if not records:
            raise Refused("BAD_MANIFEST", f"{source} holds no rows")
        for number, record in enumerate(records, start=1):
            if not isinstance(record, Mapping):
                what = f"row {number} of {source.name} is no object with named values: {str(record)[:40]!r}"
                raise Refused("BAD_MANIFEST", what)
        base = source.parent
        rows = read_layout(records, base)
        if rows is None:
            rows = [row for record in records for row in general_rows(record, source.name)]
        if not rows:
            what = f"{source} holds no rows: no conversation in it has a question with an answer"
            raise Refused("BAD_MANIFEST", what)
    find = ImageFinder(base, Path(image_root) if image_root else None)
    rows = without_guesses([row if row.path else find.put_path(row) for row in rows])
    return with_split([complete(row, find) for row in rows])


def with_split(rows: list[TextRow]) -> list[TextRow]:
    """Rows that say no split go with their patient's others, else by the patient's name; somebody is held out."""
    given = {row.patient: row.split for row in rows if row.split}
    sides = prepared.split_patients([row.patient for row in rows], given)
    return [row if row.split else replace(row, split=sides[row.patient]) for row in rows]


def without_guesses(rows: list[TextRow]) -> list[TextRow]:
    """Images in different folders that are taken for one file, for its name alone: none of them is that file."""
    named = claims((row.image, row.path) for row in rows if row.path is not None)
    return [
        replace(row, path=None, missing="several images have the name of one scan")
        if row.image not in named.get(row.path, {row.image})
        else row
        for row in rows
    ]


def claims(pairs: Iterable[tuple[str, H]], *, place: Callable[[H], str] = str) -> dict[H, set[str]]:
    """Which images each file may be: those whose folders agree with its own, else the only one that has its name."""
    images: dict[H, set[str]] = defaultdict(set)
    for image, home in pairs:
        images[home].add(image)
    sure = {home: {image for image in of if names_file(image, place(home))} for home, of in images.items()}
    return {home: sure[home] or (of if len(of) == 1 else set()) for home, of in images.items()}


def names_file(image: str, place: str) -> bool:
    """Whether a path ends as the image says; the image may leave the ending of a scan away."""
    *folders, name = Path(image).parts or ("",)
    *theirs, file = Path(place).parts or ("",)
    return name in (file, stem(file)) and theirs[len(theirs) - len(folders) :] == folders


def may_be(image: str, root: str | Path, inside: str | Path) -> bool:
    """Whether the scan `root/inside` may be what a manifest calls its image: every folder that the image names agrees.

    A bare name, or one of CT-RATE, whose names tell the patient, may lie anywhere. An absolute path, of a disk that is
    elsewhere now, must end as the scan lies below root, in a folder at least.
    """
    ours, below = _folders_and_stem(image), _folders_and_stem(inside)
    if len(ours) == 1 or CT_RATE_NAME.fullmatch(ours[-1]):
        return ours[-1:] == below[-1:]
    full_path = (*_folders_and_stem(Path(root).absolute()), *below)
    moved = Path(image).is_absolute() and len(below) > 1 and ours[-len(below) :] == below
    return moved or full_path[-len(ours) :] == ours


def _folders_and_stem(path: str | Path) -> tuple[str, ...]:
    """Parts of a path without the ending of a scan, and without `processed`, which every case lies in."""
    *folders, name = Path(path).parts or ("",)
    return (*(folder for folder in folders if folder != "processed"), stem(name))


def complete(row: TextRow, find: "ImageFinder") -> TextRow:
    """With a patient, and the split where the row leaves it open and a prepared case's dataset tells it."""
    case = find.case_row(row.path)
    patient = row.patient or case.get("patient") or stem(row.image)
    split = SPLIT_NAMES.get(row.split.strip().lower(), row.split) or case.get("split") or ""
    return replace(row, patient=patient, split=split)


def read_records(file: Path) -> Iterator[dict]:
    """Rows of csv, jsonl or json as dicts; a json of named lists gives each row its list's name as `split`."""
    if file.suffix not in (".csv", ".json", ".jsonl"):
        raise Refused("BAD_MANIFEST", f"a manifest must be csv, json or jsonl, got {file.name}", "give one of these")
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            if file.suffix == ".csv":
                yield from read_table(stream, name=file.name)
                return
            if file.suffix == ".jsonl":
                yield from (whole_characters(json.loads(line)) for line in stream if line.strip())
                return
            content = whole_characters(json.load(stream))
    except json.JSONDecodeError as error:
        raise Refused("BAD_MANIFEST", f"{file.name} is not valid JSON: {error}", "correct it there") from None
    except UnicodeDecodeError as error:
        raise Refused("BAD_MANIFEST", f"{file.name} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    except csv.Error as error:
        raise Refused("BAD_MANIFEST", f"{file.name} is not valid csv ({error})", "is a quotation mark open?") from None
    named_lists = content if isinstance(content, dict) else {None: content}
    if not all(isinstance(records, list) for records in named_lists.values()):
        what = f"{file.name} must be a list of rows, or named lists of them"
        raise Refused("BAD_MANIFEST", what, "a row a line is jsonl")
    for name, records in named_lists.items():
        yield from ({"split": name, **r} if name and isinstance(r, dict) else r for r in records)


def whole_characters(content: Any) -> Any:
    """JSON content whose texts can be written: half of a character, left by a cut, becomes U+FFFD."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, list):
        return [whole_characters(part) for part in content]
    if isinstance(content, dict):
        return {whole_characters(name): whole_characters(part) for name, part in content.items()}
    return content


def read_folder(folder: Path) -> list[TextRow]:
    """A prepared dataset (or several) with text.jsonl, or scans with a .txt of the same name."""
    manifests = sorted({*folder.glob("text.jsonl"), *folder.glob("*/text.jsonl")})
    rows = []
    for manifest in manifests:
        processed = manifest.parent / "processed"
        for record in read_records(manifest):
            for row in general_rows(record, "text.jsonl"):
                case = processed / row.image
                image = f"{manifest.parent.name}/{row.image}" if len(manifests) > 1 else row.image  # ids may be equal
                rows.append(replace(row, image=image, path=case if case.is_dir() else None))
    if manifests:
        return rows
    for text in sorted(folder.rglob("*.txt")):
        scan = next((p for p in sorted(text.parent.iterdir()) if p != text and stem(p.name) == text.stem), None)
        if scan is not None:
            try:
                answer = clean(text.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                what = f"{text.name} is not UTF-8 (byte {error.start})"
                raise Refused("BAD_MANIFEST", what, "save it as UTF-8") from None
            rows.append(TextRow(str(scan.relative_to(folder)), REPORT_QUESTION, answer, path=scan))
    if not rows:
        what = f"{folder} holds no text"
        raise Refused("NO_DATA", what, "give text.jsonl of a prepared dataset, or a .txt beside a scan")
    return rows


def stem(name: str) -> str:
    """File name without folders and without the ending of a scan."""
    return without_ending(Path(name).name)


class ImageFinder:
    """Finds what a row calls its image: a path below the root, or a name anywhere there in the folders it names.

    The root is the image root, else the manifest's folder. What an image root lacks may still lie as the path says from
    the manifest's folder; without an image root a path may also begin in the current folder. Where several files answer
    to a name, none is taken.
    """

    def __init__(self, base: Path, image_root: Path | None):
        self.root, self.base = image_root or base, base
        self.here = None if image_root else Path()
        self._names: dict[str, list[Path]] | None = None
        self._cases: dict[Path, Mapping[str, Mapping[str, str]]] = {}  # rows of each metadata.csv that was needed

    def put_path(self, row: TextRow) -> TextRow:
        """The row with the path of its scan, or with why it has none."""
        places = self.places(row.image)
        if len(places) == 1:
            return replace(row, path=places[0])
        several = f"{len(places)} files answer to it, such as {' and '.join(map(str, places[:2]))}"
        return replace(row, missing=several if places else "no such file")

    def places(self, image: str) -> list[Path]:
        """The files that may be meant, each once."""
        places = [self.root / image] if (self.root / image).exists() else self.named(image)
        if self.here is not None and (self.here / image).exists():
            places.append(self.here / image)
        if not places and (self.base / image).exists():
            places.append(self.base / image)
        return list({path.resolve(): path for path in reversed(places)}.values())

    def named(self, image: str) -> list[Path]:
        """Files below the root that have its name, in the folders that it names."""
        return [
            path for path in self.names().get(stem(image), []) if may_be(image, self.root, path.relative_to(self.root))
        ]

    def case_row(self, path: Path | None) -> Mapping[str, str]:
        """What the dataset of a prepared case says of it; nothing for any other image."""
        if path is None or path.parent.name != "processed":
            return {}
        table = path.parent.parent / "metadata.csv"
        if table not in self._cases:
            self._cases[table] = prepared.read_metadata(table)
        return self._cases[table].get(path.name, {})

    def names(self) -> dict[str, list[Path]]:
        """Scans, token files and prepared cases below the root, by name; listed once, when first needed."""
        if self._names is None:
            self._names, endings = defaultdict(list), (*volume_endings(), ".zip", ".npz")
            for path in self.root.rglob("*"):
                is_case = path.is_dir() and path.parent.name == "processed"
                if is_case or (path.name.lower().endswith(endings) and "processed" not in path.parts[:-1]):
                    self._names[stem(path.name)].append(path)
        return self._names


def same_scans(rows: Sequence[TextRow]) -> list[str]:
    """Images whose scan also stands on another side of the split under another name.

    Prepared cases are known by their bytes and voxels. Of other files the whole is read only where size and a few
    samples agree; the same scan in another format is found once it is prepared.
    """
    sides: dict[Path, set[str]] = defaultdict(set)
    image = {}
    for row in rows:
        if row.path is not None:
            sides[row.path].add(row.split)
            image[row.path] = row.image
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for path in sides:
        for mark in marks_of(path):
            groups[mark].append(path)
    found = set()
    for mark, members in groups.items():
        parts = [members] if isinstance(mark, str) else equal_files(members, sides) if mark else []
        for part in parts:
            if len(part) > 1 and len(set.union(*(sides[path] for path in part))) > 1:
                found |= {image[path] for path in part}
    return sorted(found)


def marks_of(path: Path) -> tuple[Hashable, ...]:
    """By what a scan is known: of a prepared case hashes, of other files as yet their size."""
    if path.parent.name != "processed" or not (path / "case.json").is_file():
        return (size_of(path),)
    try:
        return prepared.open_case(path, row={}).scan_marks
    except ValueError:  # damaged: said by whoever opens it
        return ()


def equal_files(paths: Sequence[Path], sides: Mapping[Path, set[str]]) -> list[list[Path]]:
    """Files of one size grouped by content."""
    groups = [list(paths)]
    for mark in (hash_of_sample, hash_path):
        finer: dict[tuple[int, str], list[Path]] = defaultdict(list)
        for number, group in enumerate(groups):
            if len(group) > 1 and len(set.union(*(sides[path] for path in group))) > 1:
                for path in group:
                    finer[number, mark(path)].append(path)
        groups = list(finer.values())
    return groups


def size_of(path: Path) -> int:
    """Bytes of a scan's file, or of all files of its folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def hash_of_sample(path: Path) -> str:
    """A hash over parts of a file that tells most scans of one size apart."""
    if path.is_dir():
        return ""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as stream:
        for start in (0, size // 2, max(size - SAMPLE, 0)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def check_rows(rows: list[TextRow]) -> dict:
    """What a manifest holds and what is wrong with it; `problems` are lines for people by code."""
    missing = sorted({f"{row.image} ({row.missing})" for row in rows if row.path is None})
    empty = [row for row in rows if not row.answer]
    repeated = [key for key, count in Counter((r.image, r.question, r.answer) for r in rows).items() if count > 1]
    sides = defaultdict(set)
    for row in rows:
        sides[row.patient].add(row.split)
    leaking = sorted(patient for patient, splits in sides.items() if len(splits) > 1)
    copies = same_scans(rows)
    labels = Counter(name for row in {r.image: r for r in rows}.values() for name, value in row.labels.items() if value)
    problems = {
        code: f"{len(items)} {what}, first: {items[0]}. {remedy}."
        for code, items, what, remedy in (
            ("SCANS_MISSING", missing, "images not found", "Give the folder that their paths begin in as image_root"),
            ("EMPTY_TEXT", [row.image for row in empty], "rows without an answer", "They are skipped"),
            ("DUPLICATED", [key[0] for key in repeated], "rows that stand there more than once", "Remove the copies"),
            ("SPLIT_LEAKAGE", leaking, "patients on both sides of a split", "Split by patient"),
            ("SAME_SCAN", copies, "scans on both sides of a split under two names", "Give them one patient and split"),
        )
        if items
    }
    return {
        "rows": len(rows),
        "images": len({row.image for row in rows}),
        "matched": sum(row.path is not None for row in rows),
        "missing": len(missing),
        "empty": len(empty),
        "duplicated": len(repeated),
        "patients": len(sides),
        "patients_in_two_splits": len(leaking),
        "splits": dict(Counter(row.split for row in rows)),
        "kinds": dict(Counter(row.kind for row in rows)),
        "labels": dict(labels.most_common()),
        "problems": problems,
    }
