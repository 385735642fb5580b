"""Whether a tokenizer keeps the findings of phantoms it has never seen: contrast of nodules and stones.

    python -m tests.benchmarks.bench_findings outputs/vq_stage1 [--cases 24] [--levels N] [--probe 200]

Contrast is the mean HU inside a finding (a sphere of 0.7 of its radius, of 0.6 voxels at least) minus that of the organ
around it, of what is decoded over that of the truth on the tokenizer's grid; beside it with codes shuffled in the case.
`--probe`: a linear discriminant of token vectors, fitted on so many phantoms, judged on half as many: whether a cell
of the organ (of a quarter lung at least; touched by a kidney's ellipsoid) holds the centre of a finding, and by its
likeliest cell whether a side has any; areas under the curve, .5 is chance. Beside it the same of a small network with
one hidden layer: what a projector of two layers could read. To tell lung or kidney from the rest counts for nothing.
"""

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from app.evaluation.tokenizer_evaluation import shuffled
from app.phantoms.anatomy import SIGN_OF_X, Canvas, draw_build, kidney_center
from app.phantoms.phantoms import Phantom, make_phantom
from app.tokens.open_scan import Volume
from app.tokens.tokenizer import CTTokenizer
from tests.benchmarks.timing import machine
from transforms import Resampled

FIRST_SEED = 1_000_000  # far from any seed of the cohort
HIDDEN_STEPS = 1500
AROUND_MM = 14.0  # of the organ, beyond a margin that blur may reach
ORGANS = {"nodule": (-1100, -500), "kidney stone": (-100, 300)}  # HU of what lies around


class Contrast(NamedTuple):
    finding: str
    size_mm: float
    truth: float
    made: float


def contrasts(
    phantom: Phantom,
    truth: Float[np.ndarray, "X Y Z"],
    made: Float[np.ndarray, "X Y Z"],
    affine: Float[np.ndarray, "4 4"],
) -> list[Contrast]:
    """One for each nodule and stone; both volumes lie on the grid of `affine`, index to RAS mm."""
    spacing = float(affine[0, 0])
    index = np.stack(np.meshgrid(*[np.arange(n) for n in truth.shape], indexing="ij"), -1)
    rows = []
    for finding in phantom.findings:
        low, high = ORGANS.get(finding["finding"], (0, 0))
        if low == high:
            continue
        for size, centre in zip(finding["size_mm"], finding["center_mm"], strict=True):
            at = (np.linalg.inv(affine) @ [*centre, 1])[:3]
            away = np.linalg.norm(index - at, axis=-1) * spacing
            inside = away <= max(0.35 * size, 0.6 * spacing)
            edge = size / 2 + 1.5 * spacing
            around = (away > edge) & (away <= edge + AROUND_MM) & (truth > low) & (truth < high)
            if inside.any() and around.any():
                pair = [float(volume[inside].mean() - volume[around].mean()) for volume in (truth, made)]
                rows.append(Contrast(finding["finding"], size, *pair))
    return rows


def judge(tokenizer: CTTokenizer, cases: int, levels: int | None) -> dict[str, list[Contrast]]:
    """Contrasts of all findings of `cases` unseen phantoms, as decoded and with codes shuffled."""
    sizes = tokenizer.sizes
    resampled = Resampled("image", spacing=sizes.spacing, grid=sizes.resolution)
    found: dict[str, list[Contrast]] = {"decoded": [], "codes shuffled": []}
    for seed in range(FIRST_SEED, FIRST_SEED + cases):
        phantom = make_phantom(seed)
        on_grid = resampled({"image": phantom.hu, "affine": phantom.affine})
        tokens = tokenizer.encode(Volume(phantom.hu, phantom.affine), support=True, levels=levels)
        mixed = tokens.__class__(**{**vars(tokens), "codes": shuffled(tokens.codes)})
        truth = np.asarray(on_grid["image"], np.float32)
        for name, given in (("decoded", tokens), ("codes shuffled", mixed)):
            made = tokenizer.decode(given).hu
            found[name] += contrasts(phantom, truth, made, np.asarray(on_grid["affine"]))
    return found


class Cells(NamedTuple):
    """Token vectors of an organ of one phantom, the side of each, and which of them hold the centre of a finding."""

    vectors: Float[np.ndarray, "M D"]
    right: Bool[np.ndarray, " M"]
    holds: Bool[np.ndarray, " M"]
    near: Bool[np.ndarray, " M"]  # touched by a finding: those that hold no centre count neither way
    sides: tuple[bool, bool]  # whether right and left have the finding


def in_lung(phantom: Phantom, coords: Int[np.ndarray, "M 3"]) -> Bool[np.ndarray, " M"]:
    """Cells of which a quarter at least is lung."""
    side = phantom.hu.shape[0] // 8
    lung = (phantom.hu > -980) & (phantom.hu < -600)
    return lung.reshape(side, 8, side, 8, side, 8).mean((1, 3, 5))[tuple(coords.T)] >= 0.25


def in_kidney(phantom: Phantom, number: int, middles: Float[np.ndarray, "M 3"]) -> Bool[np.ndarray, " M"]:
    """Cells that may touch a kidney: its pose is that of the phantom of this number, drawn again."""
    rng = np.random.default_rng([number, 7])
    build = draw_build(rng)
    canvas = Canvas(phantom.hu.shape[0], phantom.spacing[0], rng)
    reach = np.array((28, 25, 54)) * build.organ + 4 * phantom.spacing[0]
    centres = [np.array(canvas.in_scan(kidney_center(build, side))) for side in SIGN_OF_X]
    return np.any([(np.abs(middles - centre) <= reach).all(1) for centre in centres], 0)


def cells_of(tokenizer: CTTokenizer, number: int, levels: int | None) -> dict[str, Cells]:
    """By finding."""
    sizes = tokenizer.sizes
    phantom = make_phantom(number, size=sizes.resolution, spacing=sizes.spacing)
    tokens = tokenizer.encode(Volume(phantom.hu, phantom.affine), levels=levels)
    vectors = tokenizer.network.vq.lookup(torch.from_numpy(tokens.codes).long()).numpy()
    middles = tokens.coords @ tokens.affine[:3, :3].T + tokens.affine[:3, 3]
    organs = {"nodule": in_lung(phantom, tokens.coords), "kidney stone": in_kidney(phantom, number, middles)}
    cells = {}
    for finding, organ in organs.items():
        holds, near = np.zeros((2, len(middles)), bool)
        told = [row for row in phantom.findings if row["finding"] == finding]
        for size, centre in ((s, c) for row in told for s, c in zip(row["size_mm"], row["center_mm"], strict=True)):
            away = np.abs(middles - np.array(centre)).max(1) - 4 * sizes.spacing
            holds |= away <= 0
            near |= away <= size / 2
        sides = tuple(any(row["side"] == side for row in told) for side in ("right", "left"))
        kept = (part[organ] for part in (vectors, middles[:, 0] > 0, holds, near))
        cells[finding] = Cells(*kept, sides)
    return cells


def area_under_curve(scores: Float[np.ndarray, " N"], truth: Bool[np.ndarray, " N"]) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1.0
    positive = int(truth.sum())
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


def balanced_accuracy(scores: Float[np.ndarray, " N"], truth: Bool[np.ndarray, " N"], threshold: float) -> float:
    said = scores > threshold
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


Score = Callable[[Float[np.ndarray, "M D"]], Float[np.ndarray, " M"]]


def linear(vectors: Float[np.ndarray, "M D"], holds: Bool[np.ndarray, " M"]) -> Score:
    """Fisher's discriminant."""
    vectors = vectors.astype(np.float64)
    spread = np.cov(vectors[~holds].T) + 1e-4 * vectors.var() * np.eye(vectors.shape[1])
    direction = np.linalg.solve(spread, vectors[holds].mean(0) - vectors[~holds].mean(0))
    return lambda rows: rows @ direction


def hidden(vectors: Float[np.ndarray, "M D"], holds: Bool[np.ndarray, " M"]) -> Score:
    """One hidden layer of 128, trained for 1500 steps on cells of both kinds, a quarter of them with a finding."""
    torch.manual_seed(0)
    middle, spread = vectors.mean(0), vectors.std(0) + 1e-6
    x, y = torch.from_numpy((vectors - middle) / spread).float(), torch.from_numpy(holds).float()
    network = nn.Sequential(nn.Linear(x.shape[1], 128), nn.GELU(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=HIDDEN_STEPS)
    positive = torch.where(y > 0)[0]
    for _ in range(HIDDEN_STEPS):
        rows = torch.cat([torch.randint(len(x), (192,)), positive[torch.randint(len(positive), (64,))]])
        loss = nn.functional.binary_cross_entropy_with_logits(network(x[rows])[:, 0], y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
    return lambda rows: network(torch.from_numpy((rows - middle) / spread).float())[:, 0].numpy()


def probe(fitted: list[Cells], unseen: list[Cells], fit: Callable[..., Score]) -> dict[str, float]:
    """What `fit` learns of cells that hold a finding and those that none touches."""
    vectors, holds, near = (
        np.concatenate([getattr(case, name) for case in fitted]) for name in ("vectors", "holds", "near")
    )
    score_of = fit(vectors[holds | ~near], holds[holds | ~near])

    def by_side(part: list[Cells]) -> tuple[np.ndarray, np.ndarray]:
        best = [score_of(case.vectors[mask]).max() for case in part for mask in (case.right, ~case.right)]
        return np.array(best), np.array([side for case in part for side in case.sides])

    scores, truth = by_side(fitted)
    threshold = max(scores, key=lambda at: balanced_accuracy(scores, truth, at))
    scores, truth = by_side(unseen)
    judged = [(score_of(case.vectors), case.holds, case.near) for case in unseen]
    kept = [(score[holds | ~near], holds[holds | ~near]) for score, holds, near in judged]
    cells = area_under_curve(*(np.concatenate(part) for part in zip(*kept, strict=True)))
    found = {"cell": cells, "side": area_under_curve(scores, truth)}
    return found | {"side_accuracy": balanced_accuracy(scores, truth, threshold), "sides": len(truth)}


def share_kept(rows: list[Contrast]) -> float:
    """Contrast that is left over contrast that was, of all together."""
    return float(sum(row.made for row in rows) / sum(row.truth for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="checkpoint or output folder")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--levels", type=int)
    parser.add_argument("--probe", type=int, default=0, help="phantoms that a linear probe is fitted on")
    given = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CTTokenizer.from_pretrained(given.tokenizer)
    found = judge(tokenizer, given.cases, given.levels)
    print("| finding | number | mm | contrast, HU | decoded | share kept | codes shuffled |")
    print("|---|---|---|---|---|---|---|")
    table = {}
    for finding, limit in (("nodule", 18.0), ("kidney stone", 11.0)):
        for name, small in ((finding, False), (f"small {finding}", True)):
            rows, mixed = (
                [row for row in part if row.finding == finding and (row.size_mm < limit or not small)]
                for part in found.values()
            )
            if not rows:
                continue
            mean = {key: np.mean([getattr(row, key) for row in rows]) for key in ("size_mm", "truth", "made")}
            kept, control = share_kept(rows), share_kept(mixed)
            table[name] = {"number": len(rows), "share_kept": round(kept, 3), "shuffled": round(control, 3)}
            print(
                f"| {name} | {len(rows)} | {mean['size_mm']:.0f} | {mean['truth']:.0f} | {mean['made']:.0f} "
                f"| {kept:.2f} | {control:.2f} |"
            )
    fitted = [cells_of(tokenizer, FIRST_SEED + 10_000 + n, given.levels) for n in range(given.probe)]
    unseen = [cells_of(tokenizer, FIRST_SEED + n, given.levels) for n in range(given.probe // 2)]
    probed = {}
    for finding in ORGANS if given.probe else ():
        for fit in (linear, hidden):
            told = probe([case[finding] for case in fitted], [case[finding] for case in unseen], fit)
            name = f"{finding}, {fit.__name__}"
            probed[name] = {key: round(value, 3) for key, value in told.items()}
            print(f"probe, {name}: {probed[name]}")
    result = {"cases": given.cases, "findings": table, "probe": probed}
    print(json.dumps({"benchmark": "findings", **machine("cpu"), **result}))


if __name__ == "__main__":
    main()
