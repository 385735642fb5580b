"""Errors against all bits that a decoder needs: a tokenizer's levels beside x265 and JPEG 2000 on the same voxels.

    python -m tests.benchmarks.bench_codecs --tokenizer ct_base --dataset DATA --levels 1 1.5 2 4 --out rows.json

x265 runs where PyAV is installed (`pip install av`); its wheel holds GPL parts, so no requirement of ours names it.
Our bits are those of the packed token file, header and all (app/tokens/rate.py), over the voxels of the body; codecs
get that body's box and are read off between the settings on either side of our bits (app/measures/codecs.py). What is
done stays in the file: a second call goes on where the first ended. `--known FOLDER` keeps what codecs gave, which does
not depend on the tokenizer. A fraction of levels is a mean over the cells.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from app.dataset import prepared
from app.evaluation.tokenizer_evaluation import Truth, truth_of
from app.measures import codecs
from app.measures import hu_errors as measure
from app.shared.atomic_files import write_text
from app.tokens.allocation import spread_levels
from app.tokens.open_scan import Scan
from app.tokens.token_files import CTTokens, rate_of
from app.tokens.tokenizer import CTTokenizer, dense_hu
from tests.benchmarks.timing import machine
from transforms.windows import windows_range

MEASURES = ("mae", "rmse")


def rows_of(made: CTTokenizer, case: prepared.PreparedCase, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of levels, with and without stored support."""
    scan = made.open(case)
    truth = truth_of(scan, made.sizes)
    windows = made.sizes.windows

    def body_errors(hu: np.ndarray) -> dict[str, float]:
        return measure.errors_in_hu(truth.hu, hu, {"body": truth.masks["foreground"]}, windows=windows)["body"]

    about = {"hu_range": windows_range(windows), "judge": body_errors}
    peers: dict[str, codecs.Codec] = {}
    if "jpeg2000" in given.peers:
        peers["jpeg2000"] = codecs.Jpeg2000(truth.hu, truth.masks["foreground"], **about)
    if "x265" in given.peers and codecs.has_x265():
        peers["x265"] = codecs.Hevc(truth.hu, truth.masks["foreground"], **about)
    for peer in peers.values():
        peer.points |= known_points(given.known, peer)
    rows = []
    try:
        for levels, way, tokens, hu in volumes_of(made, scan, given):
            row = {"case": case.case_id, "dataset": case.dataset, "levels": levels, "way": way}
            row |= _ours(made, tokens, truth, hu)
            rows.append(row | {name: _beside(peer, row) for name, peer in peers.items()})
    finally:
        for peer in peers.values():
            keep_points(given.known, peer)
    return rows


def volumes_of(
    made: CTTokenizer, scan: Scan, given: argparse.Namespace
) -> Iterator[tuple[float, str, CTTokens, np.ndarray]]:
    """Tokens of each number of levels, with and without stored support, and the volume that comes back."""
    if given.refine:
        yield from _refined_volumes(made, scan, given)
        return
    whole, most = made.encode(scan, support=True), made.sizes.quantizer_levels
    fractions = any(not levels.is_integer() for levels in given.levels)
    for way in ("codes alone", *(["stored support"] if given.support else [])):
        stored = whole if way == "stored support" else replace(whole, support=None)
        prefixes = {
            number: dense_hu(made.decode_sparse(stored, levels=number).values, made.sizes)
            for number in range(1, most + 1)
            if fractions or number in given.levels
        }
        if fractions:
            errors = made.errors_by_level(made.on_device(made.rows_of(scan.volume)), prefixes.values())
        for levels in given.levels:
            if levels in prefixes:
                tokens = replace(stored, codes=whole.first_levels(int(levels)))
                yield levels, way, tokens, prefixes[levels]
            elif levels < most:
                tokens = stored.with_levels(spread_levels(errors, levels))
                yield levels, way, tokens, dense_hu(made.decode_sparse(tokens).values, made.sizes)


def _refined_volumes(
    made: CTTokenizer, scan: Scan, given: argparse.Namespace
) -> Iterator[tuple[float, str, CTTokens, np.ndarray]]:
    """The same with codes refined for each number of levels."""
    for levels in given.levels:
        whole = made.encode(scan, support=True, levels=levels, refine=given.refine)
        for way in ("codes alone", *(["stored support"] if given.support else [])):
            tokens = whole if way == "stored support" else replace(whole, support=None)
            yield levels, way, tokens, dense_hu(made.decode_sparse(tokens).values, made.sizes)


def _known_file(folder: Path, peer: codecs.Codec) -> Path:
    return folder / f"{type(peer).__name__}_{peer.digest[:24]}.json"


def known_points(folder: Path | None, peer: codecs.Codec) -> dict[float, tuple[int, dict[str, float]]]:
    """What a codec gave for this volume in earlier calls, by setting."""
    if folder is None or not _known_file(folder, peer).is_file():
        return {}
    return {
        float(setting): tuple(point) for setting, point in json.loads(_known_file(folder, peer).read_text()).items()
    }


def keep_points(folder: Path | None, peer: codecs.Codec) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(_known_file(folder, peer), json.dumps(peer.points))


def _ours(made: CTTokenizer, tokens: CTTokens, truth: Truth, hu: np.ndarray) -> dict[str, Any]:
    errors = measure.errors_in_hu(truth.hu, hu, truth.masks, windows=made.sizes.windows)
    bits, body = rate_of(tokens, made.tables), int(truth.masks["foreground"].sum())
    return {
        "tokens": len(tokens.codes),
        "body_voxels": body,
        "bits": bits.packed._asdict() | {"total": bits.packed.total, "plain": bits.plain.total},
        "bits_per_body_voxel": bits.packed.total / body,
        "bits_per_token": bits.packed.total / len(tokens.codes),
        **errors["foreground"],
        "tissues": errors,
    }


def _beside(peer: codecs.Codec, row: dict[str, Any]) -> dict[str, Any]:
    """A codec at the bits of a row of ours, and what share of our bits it takes to be as good."""
    point = peer.at_bits(row["bits"]["total"])
    told: dict[str, Any] = {"settings": point.settings, "bits": point.bits, **point.errors}
    if isinstance(peer, codecs.Hevc):
        equal = {name: bits_at_error(peer, name, row[name]) for name in MEASURES}
        told["share_of_our_bits"] = {name: bits and bits / row["bits"]["total"] for name, bits in equal.items()}
    return told


def bits_at_error(peer: codecs.Hevc, name: str, error: float) -> float | None:
    """Bits at which an error is as large; None where it is larger even at the finest or smaller at the coarsest."""
    settings = peer.search(lambda qp: peer.at(qp)[1][name] >= error)
    if len(settings) == 1:
        return None
    (fewer, larger), (more, smaller) = ((peer.at(qp)[0], peer.at(qp)[1][name]) for qp in settings)
    share = (larger - error) / (larger - smaller) if larger != smaller else 0.0
    return math.exp(math.log(fewer) + share * (math.log(more) - math.log(fewer)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over the cases of each dataset, and over all."""
    groups = sorted({row["dataset"] for row in rows})
    head = ("cases", "levels", "way", "bits a body voxel", "bits a token", "MAE", "RMSE", "x265 MAE", "x265 RMSE",
            "MAE / x265's", "RMSE / x265's", "x265 as good at, of our bits", "JPEG 2000 MAE", "RMSE")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for group in [*groups, "all"] if len(groups) > 1 else groups:
        kinds = dict.fromkeys((row["levels"], row["way"]) for row in rows)
        for levels, way in kinds:
            mine = [
                row for row in rows if (row["levels"], row["way"]) == (levels, way) and group in (row["dataset"], "all")
            ]
            if mine:
                lines.append(f"| {' | '.join(_cells(f'{group} ({len(mine)})', levels, way, mine))} |")
    return lines


def _cells(name: str, levels: float, way: str, rows: list[dict[str, Any]]) -> list[str]:
    mean = {
        key: float(np.mean([row[key] for row in rows])) for key in ("bits_per_body_voxel", "bits_per_token", *MEASURES)
    }
    cells = [name, f"{levels:g}", way, f"{mean['bits_per_body_voxel']:.4f}", f"{mean['bits_per_token']:.2f}"]
    cells += [f"{mean[key]:.1f}" for key in MEASURES]
    theirs = {peer: [row[peer] for row in rows if peer in row] for peer in ("x265", "jpeg2000")}
    if theirs["x265"]:
        video = {key: float(np.mean([part[key] for part in theirs["x265"]])) for key in MEASURES}
        cells += [f"{video[key]:.1f}" for key in MEASURES] + [f"{mean[key] / video[key]:.2f}" for key in MEASURES]
        cells.append(", ".join(_share(theirs["x265"], key) for key in MEASURES))
    else:
        cells += ["-"] * 5
    jpeg = theirs["jpeg2000"]
    return cells + [f"{np.mean([part[key] for part in jpeg]):.1f}" if jpeg else "-" for key in MEASURES]


def _share(parts: list[dict[str, Any]], key: str) -> str:
    """Geometric mean over the cases where x265 reaches our error at all."""
    shares = [share for part in parts if (share := part["share_of_our_bits"][key])]
    told = f"{np.exp(np.mean(np.log(shares))):.2f}" if shares else "-"
    return told if len(shares) == len(parts) else f"{told} ({len(shares)} of {len(parts)} cases)"


def crossings(rows: list[dict[str, Any]]) -> list[str]:
    """Where a case's error becomes that of x265 at the same bits: straight between two numbers of levels, over bits."""
    lines = []
    for case, way in dict.fromkeys((row["case"], row["way"]) for row in rows if "x265" in row):
        mine = [row for row in rows if (row["case"], row["way"]) == (case, way)]
        mine.sort(key=lambda row: row["bits_per_body_voxel"])
        bits = [row["bits_per_body_voxel"] for row in mine]
        for key in MEASURES:
            ratios = [row[key] / row["x265"][key] for row in mine]
            lines.append(
                f"{case}, {way}, {key.upper()} as good as x265's at {_crossing(bits, ratios)} bits a body voxel"
            )
    return lines


def _crossing(bits: list[float], ratios: list[float]) -> str:
    for i, (under, over) in enumerate(pairwise(ratios)):
        if (under - 1) * (over - 1) <= 0 and under != over:
            share = (1 - under) / (over - under)
            return f"{bits[i] ** (1 - share) * bits[i + 1] ** share:.3f}"
    return f"{'more than' if ratios[-1] < 1 else 'less than'} {bits[-1] if ratios[-1] < 1 else bits[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="checkpoint, output folder, bundle or name")
    parser.add_argument("--dataset", required=True, help="a prepared dataset")
    parser.add_argument("--split", default="val", help="train, val or all")
    parser.add_argument("--levels", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--refine", type=int, default=0, help="steps to codes that decode better")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--known", type=Path, help="folder of what codecs gave, read and added to")
    parser.add_argument("--support", action="store_true", help="also with the support stored, its bits counted")
    parser.add_argument("--max-cases", type=int, help="of each dataset the first so many")
    parser.add_argument("--peers", nargs="+", default=["x265", "jpeg2000"], help="JPEG 2000 takes longest")
    parser.add_argument("--cases", nargs="+", help="these alone")
    given = parser.parse_args()
    made = CTTokenizer.from_pretrained(given.tokenizer)
    settings = {"tokenizer": made.digest, "split": given.split, "levels": given.levels, "support": given.support}
    settings |= {"refine": given.refine}
    rows = _done(given.out, settings)
    for case in _chosen(
        prepared.find_cases(given.dataset, split=None if given.split == "all" else given.split), given.max_cases
    ):
        if given.cases and case.case_id not in given.cases:
            continue
        if any((row["dataset"], row["case"]) == (case.dataset, case.case_id) for row in rows):
            continue
        started = time.perf_counter()
        rows += rows_of(made, case, given)
        told = {"benchmark": "codecs", "settings": settings, "x265": codecs.has_x265(), **machine(made.device.type)}
        write_text(given.out, json.dumps({**told, "rows": rows}, indent=1) + "\n")
        print(f"{case.dataset}/{case.case_id}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print("\n".join([*table(rows), "", *crossings(rows)]))


def _done(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call with the same settings."""
    if not out.is_file():
        return []
    found = json.loads(out.read_text())
    if found["settings"] != settings:
        sys.exit(f"{out} is of other settings: give another --out")
    return found["rows"]


def _chosen(cases: list[prepared.PreparedCase], most: int | None) -> list[prepared.PreparedCase]:
    seen: dict[str, int] = {}
    chosen = []
    for case in cases:
        seen[case.dataset] = seen.get(case.dataset, 0) + 1
        if most is None or seen[case.dataset] <= most:
            chosen.append(case)
    return chosen


if __name__ == "__main__":
    main()
