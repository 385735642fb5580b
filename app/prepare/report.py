"""What a run of `prepare` leaves to read: the tables of each dataset, and the lines that are printed."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.dataset import prepared, writer
from app.prepare import splits
from app.prepare.case import Outcome, PrepareSettings, settings_json
from app.shared.codes import CODES
from transforms.windows import WINDOWS


class Report(NamedTuple):
    outcomes: tuple[Outcome, ...]
    seconds: float
    splits: Mapping[str, Mapping[str, int]] = {}
    notes: tuple[str, ...] = ()

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def exit_status(self) -> int:
        return 3 if self.count("refused") or self.count("failed") or not self.count("ok") else 0

    def as_json(self) -> dict[str, Any]:
        counts = {status: self.count(status) for status in ("ok", "skipped", "refused", "failed")}
        return {
            "cases": [o._asdict() for o in self.outcomes],
            **counts,
            "splits": self.splits,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def write_tables(
    out: Path, outcomes: Sequence[Outcome], settings: PrepareSettings, *, organs: Mapping[str, Mapping[str, str]]
) -> None:
    """metadata.csv, failures.csv and dataset_config.json of each dataset."""
    by_dataset: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.dataset and (outcome.status != "skipped"):
            by_dataset[outcome.dataset].append(outcome)
    for dataset, members in by_dataset.items():
        folder = out / dataset
        mapping = {name: dict(sorted(values.items())) for name, values in sorted(organs.items())}
        mapping = mapping if settings.keep_names else {"*": mapping.get("*", {})} if mapping else {}
        windows = {name: list(WINDOWS[name]) for name in settings.windows}
        config = {"size": settings.size, "spacing": settings.spacing, "windows": windows}
        config |= {"settings": settings_json(settings), "organ_mapping": mapping}
        writer.write_dataset_config(folder, config)
        failures = [o for o in members if o.status in ("refused", "failed")]
        writer.write_metadata(folder, _rows(folder, settings, {o.case for o in failures}))
        writer.write_failures(folder, [_failure(o, settings.keep_names) for o in failures])


def _rows(folder: Path, settings: PrepareSettings, stale: set[str]) -> Iterator[dict[str, str]]:
    """Of every case that lies there; `stale` are those whose source gives no case any more."""
    processed = folder / "processed"
    for path in sorted(processed.iterdir()) if processed.is_dir() else ():
        if path.name.startswith(".") or not (path / "case.json").is_file():
            continue
        try:
            case = prepared.open_case(path, row={})
            status = "stale" if case.case_id in stale else "ok"
            row = writer.metadata_row(case, windows=settings.windows, status=status)
        except (ValueError, KeyError):  # one that this run did not make
            yield {"case_id": path.name, "status": "damaged"}
            continue
        side = case.sidecar
        yield {**row, "patient": side.get("patient", case.patient), "split": side.get("split", case.split)}


def _failure(outcome: Outcome, keep_names: bool) -> dict[str, str]:
    remedies = [CODES[code].remedy for code in outcome.codes] or ["see the message; report it if it looks like a fault"]
    source = outcome.source.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text
    return {
        "source": source if keep_names else outcome.case,
        "status": outcome.status,
        "codes": " ".join(outcome.codes),
        "message": outcome.message,
        "remedy": "; ".join(remedies),
    }


def lines(report: Report, keep_names: bool) -> Iterator[str]:
    """The report for people: no source is named unless names are kept."""
    for o in report.outcomes:
        if o.status == "skipped":
            continue
        what = o.source if keep_names else f"{o.dataset}/{o.case}" if o.case else "RAW"
        tail = f"  {o.message}" if o.message else ""
        yield f"{o.status:8} {what}  {' '.join(o.codes)}{tail}"
    counts = ", ".join(f"{report.count(status)} {status}" for status in ("ok", "skipped", "refused", "failed"))
    yield from report.notes
    yield f"{counts} in {report.seconds:.1f} s"
    if report.count("ok"):
        yield splits.counts_line(report.splits)
