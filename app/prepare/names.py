"""Names that give nobody away: keyed hashes for datasets, cases and patients, and the table back to the sources.

The key and the table lie beside OUT, never in it, readable by their owner alone.
"""

import csv
import hashlib
import hmac
import itertools
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from app.prepare.labels import safe_name
from app.prepare.survey import Item
from app.shared.scan_formats import without_ending

COLLECTIONS = re.compile(r"^(images?(tr|ts|va)?|cts?|scans?|volumes?|nifti|dicom|data|train|valid|val|test|raw)$", re.I)


def read_key(out: Path, key_file: str | None) -> bytes:
    """The user's key, else the one beside OUT, made once."""
    if key_file is not None:
        return Path(key_file).read_bytes().strip()
    path = file_beside(out, "key")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        _write_private(unfinished, secrets.token_hex(32) + "\n")
        try:
            os.link(unfinished, path)  # fails where another run was first: its key counts
        except FileExistsError:
            pass
        finally:
            unfinished.unlink()
    return path.read_bytes().strip()


def file_beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)


def write_sources(out: Path, rows: Iterable[tuple[str, str, str]]) -> Path:
    """The table (dataset, case, source); what an earlier run wrote of other cases stays."""
    path = file_beside(out, "sources.csv")
    table = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            rows_before = itertools.islice(csv.reader(stream), 1, None)
            table = {tuple(row[:2]): row[2] for row in rows_before if len(row) == 3}
    table |= {(dataset, case): source for dataset, case, source in rows}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    _write_private(unfinished, "")
    with open(unfinished, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["dataset", "case", "source"])
        writer.writerows([*key, source] for key, source in sorted(table.items()))
    unfinished.replace(path)
    return path


def hashed(key: bytes, *parts: str) -> str:
    text = "\0".join(parts).encode("utf-8", "surrogateescape")
    return hmac.new(key, text, hashlib.sha256).hexdigest()[:16]


def dataset_of(item: Item, root: str, *, is_one_dataset: bool) -> str:
    """The first folder below the surveyed one that holds the item; the surveyed one itself where it holds scans."""
    folder = os.path.relpath(os.path.dirname(item.refs[0].path), root)
    return "." if is_one_dataset or folder in (".", "..") else folder.split(os.sep)[0]


def one_dataset(items: Iterable[Item], root: str) -> bool:
    """Whether scans lie directly in the surveyed path, which makes all of it one dataset."""
    homes = {os.path.dirname(item.refs[0].path) for item in items if item.plan is not None}
    return root in homes or os.path.isfile(root)


def path_in_dataset(item: Item, dataset: str) -> str:
    """An item's source below its dataset's folder; a series that is the folder keeps its name."""
    return item.source.removeprefix(dataset + os.sep)


def patient_of(item: Item, place: str, key: bytes, *, several_folders: bool) -> str:
    """Hash of who it is: DICOM's patient, CT-RATE's file names, one folder a patient, else the file itself.

    `place` is the item's path below its dataset; `several_folders`: the dataset holds more than one folder of scans.
    """
    if item.patient:
        return hashed(key, "patient", item.patient)
    parts = place.split(os.sep)
    rate = re.fullmatch(r"((?:train|valid)_\d+)_[a-z]+_\d+\.nii\.gz", parts[-1])
    if rate:
        return hashed(key, "patient", rate[1])
    if len(parts) > 1 and several_folders and not COLLECTIONS.match(parts[0]):
        return hashed(key, "patient folder", item.source.removesuffix(place), parts[0])
    return hashed(key, "patient of", item.source)


def case_name(item: Item, place: str, number: int, key: bytes, *, keep_names: bool) -> str:
    """A case's id: a hash of where it lies and which series it is; `number` tells stacks of one series apart."""
    if keep_names:
        return safe_name(without_ending(place)) + (f"_{number}" if number else "")
    return hashed(key, "case", item.source, item.series, str(number))
