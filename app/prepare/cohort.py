"""A whole cohort: survey, one job a scan, workers, and the files of the prepared dataset around the cases.

The sidecars of finished cases are the truth: whatever instant a run was stopped at, the next one does the rest and
writes the same bytes.
"""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from app.dataset import writer
from app.prepare import names, preview, splits
from app.prepare.case import CaseJob, Outcome, PrepareSettings, failed, prepare_case, settings_json
from app.prepare.gate import Rules, Stack
from app.prepare.report import Report, write_tables
from app.prepare.survey import Item, survey
from app.prepare.text import join_text, patients_of
from app.shared.refusals import Refused, check_path
from app.shared.workers import busy, only_run, run_jobs, worker_count
from app.text.manifests import read_rows
from transforms.windows import window_bounds


class Named(NamedTuple):
    """An item with the public names of its dataset and of itself."""

    item: Item
    dataset: str
    case: str
    folder: str  # of its dataset in RAW; "." where RAW is one dataset

    @property
    def place(self) -> str:
        """Its path below its dataset's folder."""
        return names.path_in_dataset(self.item, self.folder)


class Request(NamedTuple):
    """The rest of a call: what is read beside the scans, and how the work is spread."""

    series: str | None = None
    organs: Mapping[str, Mapping[str, str]] = {}
    text: str | None = None
    split: Mapping[str, str] = {}
    key_file: str | None = None
    workers: int = 8
    cluster: str | None = None
    preview: bool = False
    overwrite: bool = False


DEFAULTS = PrepareSettings()
NOTHING_MORE = Request()


def prepare(
    raw: str | Path, out: str | Path, settings: PrepareSettings = DEFAULTS, request: Request = NOTHING_MORE
) -> Report:
    """Prepares everything below RAW into OUT; refuses a call that cannot be meant."""
    start = time.perf_counter()
    check_path(raw, name="RAW")
    check_path(out)
    root, out = os.path.abspath(raw), Path(os.path.abspath(out))
    _check_call(root, out, settings)
    with only_run(out):
        return _prepare(root, out, settings, request, start)


def _prepare(root: str, out: Path, settings: PrepareSettings, request: Request, start: float) -> Report:
    text = read_rows(request.text) if request.text is not None else []  # what is wrong with it is said before the work
    key = names.read_key(out, request.key_file)
    rules = Rules(settings.allow_gaps, settings.assume_hu, request.series)
    with busy("looking at what is there"):
        items = survey(root, rules)
    named = _name(items, root, key, settings.keep_names)
    planned = [one for one in named if one.item.plan is not None]
    _check_settings(out, named, settings, overwrite=request.overwrite)
    names.write_sources(out, [(one.dataset, one.case, one.item.source) for one in named])
    folders = {out / one.dataset for one in named}
    _clear_leftovers(folders)
    sources = {(one.dataset, one.case): one.item.source for one in planned}
    home = root if os.path.isdir(root) else os.path.dirname(root)
    patients = _patients(planned, key, patients_of(text, sources, root=home))
    members = [splits.member_of(one.item, one.case, who) for one, who in zip(planned, patients, strict=True)]
    sides = splits.sides_of(members, request.split)
    jobs = []
    for one, who, side in zip(planned, patients, sides, strict=True):
        raw_name = os.path.basename(root) if one.folder == "." else one.folder
        mapping = {**request.organs.get("*", {}), **request.organs.get(raw_name, {})}
        rest = (tuple(sorted(mapping.items())), request.preview, request.overwrite)
        jobs.append(CaseJob(one.item, str(out / one.dataset), one.case, who, side, settings, rules, *rest))
    outcomes = []
    for one in named:
        if (why := one.item.finding) is not None:
            outcomes.append(Outcome(one.case, one.dataset, one.item.source, why.kind, (why.code,), why.message))
    workers = 0 if request.cluster else worker_count(request.workers, _bytes_for(jobs, settings), len(jobs))
    if jobs:
        sys.stderr.write(_needs(jobs, settings, out, workers=workers) + "\n")
    outcomes += run_jobs(prepare_case, jobs, failed=failed, workers=workers, cluster=request.cluster)
    _clear_leftovers(folders)
    if not any(o.status in ("ok", "refused", "failed") for o in outcomes):
        outcomes.append(Outcome("", "", ".", "refused", ("NO_CASES",), "nothing below RAW is a CT volume"))
    outcomes.sort(key=lambda o: (o.dataset, o.source, o.case))
    write_tables(out, outcomes, settings, organs=request.organs)
    if request.text is not None:
        cases = {(o.dataset, o.case): o.source for o in outcomes if o.status == "ok"}
        lost = {(o.dataset, o.case): o.source for o in outcomes if o.status in ("refused", "failed")}
        join_text(text, out, cases, lost, root=home)
    done = {(o.dataset, o.case) for o in outcomes if o.status == "ok"}
    counts = splits.counts((j.split, j.patient) for j in jobs if (Path(j.folder).name, j.case) in done)
    notes = splits.about_table(members, request.split)
    return Report(tuple(outcomes), time.perf_counter() - start, counts, tuple(notes))


def _check_call(root: str, out: Path, settings: PrepareSettings) -> None:
    if not os.path.exists(root):
        raise Refused("NO_SOURCE", "RAW does not exist", "give a folder, a zip or a file of scans")
    inside = os.path.commonpath([os.path.realpath(root), os.path.realpath(out)])
    if inside in (os.path.realpath(root), os.path.realpath(out)):
        raise Refused("NO_OUTPUT", "RAW and OUT must not lie in one another", "choose another OUT")
    if not 8 <= settings.size <= 2048 or not 0.05 <= settings.spacing <= 50:
        raise ValueError(f"size must be 8 to 2048 and spacing 0.05 to 50 mm, got {settings.size}, {settings.spacing:g}")
    if settings.file_format not in ("npy", "zarr"):
        raise ValueError(f"format must be npy or zarr, got {settings.file_format!r}")
    for window in settings.windows:
        window_bounds(window)


def _check_settings(out: Path, named: Sequence[Named], settings: PrepareSettings, *, overwrite: bool) -> None:
    """A dataset holds cases of one kind: other settings want another OUT, or --overwrite of all that it holds."""
    for dataset in {one.dataset for one in named}:
        file = out / dataset / "dataset_config.json"
        if not file.is_file():
            continue
        old = json.loads(file.read_text()).get("settings", {})
        new = settings_json(settings)
        changed = sorted(name for name in new if old.get(name, new[name]) != new[name])
        if not changed:
            continue
        what = f"OUT was prepared with another {', '.join(changed)}"
        if not overwrite:
            raise Refused("NO_OUTPUT", what, "use another OUT or --overwrite")
        given_cases = {one.case for one in named if one.dataset == dataset and one.item.plan is not None}
        left = sorted(path.parent.name for path in file.parent.glob("processed/*/case.json"))
        if left := [case for case in left if case not in given_cases]:
            what = f"{what}, and RAW does not give {len(left)} of its cases ({left[0]}, ...)"
            raise Refused("NO_OUTPUT", what, "use another OUT")


def _name(items: Sequence[Item], root: str, key: bytes, keep_names: bool) -> list[Named]:
    """Each item with its dataset's and its own public name; equal names are numbered."""
    is_one_dataset = names.one_dataset(items, root)
    out, taken, stacks = [], Counter(), Counter()
    for item in items:
        folder = dataset = names.dataset_of(item, root, is_one_dataset=is_one_dataset)
        if keep_names:
            dataset = names.safe_name(os.path.basename(root) if dataset == "." else dataset)
        else:
            dataset = names.hashed(key, "dataset", dataset)
        place = (item.source, item.series)
        case = names.case_name(item, names.path_in_dataset(item, folder), stacks[place], key, keep_names=keep_names)
        stacks[place] += 1
        taken[dataset, case] += 1
        again = taken[dataset, case]
        out.append(Named(item, dataset, case if again == 1 else f"{case}_{again}", folder))
    return out


def _patients(planned: Sequence[Named], key: bytes, stated: Mapping[tuple[str, str], str]) -> list[str]:
    """Hash of who each case is of: whom the manifest names, else what the scan and its place say."""
    folders = defaultdict(set)
    for one in planned:
        folders[one.dataset].add(one.place.rpartition(os.sep)[0].split(os.sep)[0])
    patients = []
    for one in planned:
        who, several = stated.get((one.dataset, one.case)), len(folders[one.dataset]) > 1
        by_place = names.patient_of(one.item, one.place, key, several_folders=several)
        patients.append(by_place if who is None else names.hashed(key, "patient", who))
    return patients


def _bytes_for(jobs: Sequence[CaseJob], settings: PrepareSettings) -> int:
    """Memory the largest case takes: its own voxels a few times, the grid, one window, the imports."""
    largest = 0
    for job in jobs:
        plan = job.item.plan
        shape = (plan.slices[0].rows, plan.slices[0].columns, plan.count) if isinstance(plan, Stack) else plan.shape
        largest = max(largest, shape[0] * shape[1] * shape[2])
    return largest * 12 + settings.size**3 * 4 + (600 << 20)


def _needs(jobs: Sequence[CaseJob], settings: PrepareSettings, out: Path, *, workers: int) -> str:
    """What the work takes, in a line that is said before it begins."""
    windows = len(settings.windows) if settings.file_format == "npy" else 0  # zarr makes them when they are read
    each = settings.size**3 * (2 + windows)
    free = shutil.disk_usage(next(part for part in (out, *out.parents) if part.exists())).free
    disk = f"at most {each * len(jobs) / 1e9:.2g} GB of disk ({each / 1e9:.2g} GB a case), {free / 1e9:.2g} GB are free"
    memory = f"about {_bytes_for(jobs, settings) * max(workers, 1) / 1e9:.2g} GB of memory"
    return f"{len(jobs)} cases: {disk}; {memory}"


def _clear_leftovers(folders: Iterable[Path]) -> None:
    """What a killed run, or a killed worker of this one, half wrote into datasets; nothing that others put there."""
    tables = re.compile(rf"\.\d+\.({'|'.join(map(re.escape, writer.DATASET_FILES))})")
    for folder in folders:
        for place, pattern in (("", tables), ("previews", preview.UNFINISHED_PREVIEW)):
            for left in (folder / place).glob(".*"):
                if pattern.fullmatch(left.name) and left.is_file():
                    left.unlink()
        for left in (folder / "processed").glob(".*"):
            if writer.UNFINISHED.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
