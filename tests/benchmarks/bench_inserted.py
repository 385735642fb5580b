"""Recall of small structures put into real scans, after they went through tokens, by a stated detector.

    python -m tests.benchmarks.bench_inserted --tokenizer ct_base --dataset DATA --split val --levels 1 2 4

Put in, on the tokenizer's grid with partial volumes: nodules (balls, +500 HU, in lung), vessels (30 mm long, +150 HU,
in soft tissue), stones (balls, +400 HU, in soft tissue), of 3, 6 and 12 mm. Detector: mean HU in a ball of the
structure's size less the mean in the shell around it; a finding is a local maximum where such a structure could have
been put. Its threshold is where one finding a scan is false, set for each row by itself. "Source" is the same detector
on what was tokenized: more than that nobody can find.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage, signal

from app.dataset import prepared
from app.evaluation.tokenizer_evaluation import Truth, truth_of
from app.shared.atomic_files import write_text
from app.tokens.open_scan import Volume
from app.tokens.tokenizer import CTTokenizer, dense_hu
from tests.benchmarks.timing import machine

SIZES_MM = (3.0, 6.0, 12.0)
VESSEL_MM = 30.0
APART_MM = 20.0  # between the edges of two structures
MARGIN = 2.0  # voxels of the tissue around a structure, so that the detector looks at nothing else
FINER = 5  # points along each axis of a voxel, for partial volumes
FALSE_A_SCAN = 1


class Kind(NamedTuple):
    name: str
    added: float  # HU
    tissue: tuple[float, float]  # HU of what lies around, smoothed over a voxel


KINDS = (Kind("nodule", 500, (-1000, -650)), Kind("vessel", 150, (-30, 120)), Kind("stone", 400, (-30, 120)))


class Structure(NamedTuple):
    kind: str
    size_mm: float
    centre: Float[np.ndarray, "3"]  # in voxels
    axis: Float[np.ndarray, "3"]  # of a vessel


def allowed(truth: Truth, kind: Kind, size_mm: float, spacing: float) -> Bool[np.ndarray, "X Y Z"]:
    """Where such a structure lies in its tissue, with a margin."""
    smooth = ndimage.gaussian_filter(truth.hu.astype(np.float32), 1.0)
    inside = truth.masks["foreground"] & (smooth > kind.tissue[0]) & (smooth < kind.tissue[1])
    return ndimage.distance_transform_edt(inside) >= size_mm / 2 / spacing + MARGIN


def placed(
    places: dict[tuple[str, float], Bool[np.ndarray, "X Y Z"]], number: int, spacing: float, seed: int
) -> list[Structure]:
    """Up to so many of each, apart from each other, the same for the same seed. The large choose first."""
    rng, chosen = np.random.default_rng(seed), []
    for (kind, size), mask in sorted(places.items(), key=lambda item: -item[0][1]):
        open_places, found = np.argwhere(mask), 0
        for place in rng.permutation(len(open_places))[: 200 * number]:
            centre = open_places[place] + rng.uniform(-0.5, 0.5, 3)
            axis = rng.normal(size=3)
            made = Structure(kind, size, centre, axis / np.linalg.norm(axis))
            if found < number and all(_gap(made, other, spacing) >= APART_MM for other in chosen):
                chosen.append(made)
                found += 1
    return chosen


def _gap(one: Structure, other: Structure, spacing: float) -> float:
    reach = [VESSEL_MM / 2 if part.kind == "vessel" else part.size_mm / 2 for part in (one, other)]
    return float(np.linalg.norm(one.centre - other.centre)) * spacing - sum(reach)


def put_in(hu: Float[np.ndarray, "X Y Z"], structure: Structure, added: float, spacing: float) -> None:
    """Adds HU by the share of each voxel that the structure takes."""
    reach = (VESSEL_MM / 2 if structure.kind == "vessel" else structure.size_mm / 2) / spacing + 1
    low = np.maximum(np.floor(structure.centre - reach).astype(int), 0)
    high = np.minimum(np.ceil(structure.centre + reach).astype(int) + 1, hu.shape)
    offsets = (np.arange(FINER) + 0.5) / FINER - 0.5
    axes = [(np.arange(a, b)[:, None] + offsets).ravel() for a, b in zip(low, high, strict=True)]
    away = (np.stack(np.meshgrid(*axes, indexing="ij"), -1) - structure.centre) * spacing
    if structure.kind == "vessel":
        along = away @ structure.axis
        across = np.sqrt(np.maximum((away**2).sum(-1) - along**2, 0))
        inside = (across <= structure.size_mm / 2) & (np.abs(along) <= VESSEL_MM / 2)
    else:
        inside = np.linalg.norm(away, axis=-1) <= structure.size_mm / 2
    parts = [n for side in high - low for n in (side, FINER)]
    share = inside.reshape(parts).mean((1, 3, 5))
    hu[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += (added * share).astype(hu.dtype)


def response(hu: Float[np.ndarray, "X Y Z"], size_mm: float, spacing: float) -> Float[np.ndarray, "X Y Z"]:
    """Mean in a ball less the mean in the shell around it."""
    radius = max(size_mm / 2 / spacing, 0.87)  # a voxel and a little of its neighbours at least
    side = int(np.ceil(radius + 4))
    away = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(-side, side + 1)] * 3, indexing="ij"), -1), axis=-1)
    ball, shell = away <= radius, (away > radius + 1) & (away <= radius + 3)
    kernel = (ball / ball.sum() - shell / shell.sum()).astype(np.float32)
    return signal.fftconvolve(np.asarray(hu, np.float32), kernel, mode="same")


class Seen(NamedTuple):
    """What the detector says of one volume: responses at structures, and at all other local maxima."""

    true: list[float]
    false: list[float]


def detect(
    hu: np.ndarray, structures: list[Structure], mask: Bool[np.ndarray, "X Y Z"], kind: Kind, size_mm: float, mm: float
) -> Seen:
    found = response(hu, size_mm, mm)
    reach = max(round(size_mm / mm), 3) | 1
    peaks = (found == ndimage.maximum_filter(found, reach)) & mask
    free, true = mask.copy(), []
    for structure in structures:
        at = np.rint(structure.centre).astype(int)
        if (structure.kind, structure.size_mm) == (kind.name, size_mm):
            near = tuple(slice(max(i - 1, 0), i + 2) for i in at)
            true.append(float(found[near].max()))
        extent = VESSEL_MM / 2 if structure.kind == "vessel" else structure.size_mm / 2
        around = int(np.ceil((extent + size_mm / 2 + 6) / mm))
        free[tuple(slice(max(i - around, 0), i + around + 1) for i in at)] = False
    return Seen(true, found[peaks & free].tolist())


def recall(seen: list[Seen]) -> tuple[float, float, int]:
    """Share of structures over the threshold, the threshold, and how many structures there were."""
    true = np.array([value for part in seen for value in part.true])
    false = np.sort([value for part in seen for value in part.false])[::-1]
    allowed_false = FALSE_A_SCAN * len(seen)
    threshold = max(float(false[allowed_false]) if len(false) > allowed_false else 0.0, 0.0)
    return (float((true > threshold).mean()) if len(true) else float("nan")), threshold, len(true)


def volumes_of(
    made: CTTokenizer, hu: np.ndarray, affine: np.ndarray, levels: list[float], refine: int
) -> dict[str, np.ndarray]:
    """The source and what comes back, codes alone; a fraction of levels is a mean over the cells."""
    scan, volumes = Volume(hu, affine), {"source": hu}
    for number in levels:
        if number <= made.sizes.quantizer_levels:
            decoded = made.decode_sparse(made.encode(scan, levels=number, refine=refine))
            volumes[f"{number:g} level{'s' * (number > 1)}"] = dense_hu(decoded.values, made.sizes)
    return volumes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--levels", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--refine", type=int, default=0, help="steps to codes that decode better")
    parser.add_argument("--places", type=int, default=6, help="of each kind and size, in a scan, at most")
    parser.add_argument("--max-cases", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    made = CTTokenizer.from_pretrained(given.tokenizer)
    mm = float(made.sizes.spacing)
    seen: dict[tuple[str, float, str], list[Seen]] = defaultdict(list)
    for number, case in enumerate(prepared.find_cases(given.dataset, split=given.split)[: given.max_cases]):
        started = time.perf_counter()
        scan = made.open(case)
        truth = truth_of(scan, made.sizes)
        masks = {(kind.name, size): allowed(truth, kind, size, mm) for kind in KINDS for size in SIZES_MM}
        structures = placed(masks, given.places, mm, seed=number)
        hu = np.asarray(truth.hu, np.float32).copy()
        added = {kind.name: kind.added for kind in KINDS}
        for structure in structures:
            put_in(hu, structure, added[structure.kind], mm)
        affine = made.rows_of(scan.volume).affine
        for way, volume in volumes_of(made, hu, affine, given.levels, given.refine).items():
            for kind in KINDS:
                for size in SIZES_MM:
                    found = detect(volume, structures, masks[kind.name, size], kind, size, mm)
                    seen[kind.name, size, way].append(found)
        print(f"{case.case_id}: {len(structures)}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    report(seen, given, made)


def report(seen: dict[tuple[str, float, str], list[Seen]], given: argparse.Namespace, made: CTTokenizer) -> None:
    ways = list(dict.fromkeys(way for _, _, way in seen))
    print("| structure | mm | number | " + " | ".join(f"recall, {way}" for way in ways) + " |")
    print("|---|---|---|" + "---|" * len(ways))
    rows = []
    for kind, size in dict.fromkeys((kind, size) for kind, size, _ in seen):
        found = {way: recall(seen[kind, size, way]) for way in ways}
        count = found[ways[0]][2]
        if count:
            rows.append(
                {"structure": kind, "mm": size, "number": count, **{way: part[0] for way, part in found.items()}}
            )
            cells = [f"{share:.2f} (over {threshold:.0f} HU)" for share, threshold, _ in found.values()]
            print(f"| {kind} | {size:g} | {count} | {' | '.join(cells)} |")
    about = {"benchmark": "inserted", "tokenizer": made.digest, "split": given.split, **machine(made.device.type)}
    told = json.dumps({**about, "rows": rows})
    print(told)
    if given.out:
        write_text(given.out, told + "\n")


if __name__ == "__main__":
    main()
