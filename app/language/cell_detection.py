"""A detector of findings in single cells, learned from phantoms: there it is known which cell holds one.

Phantoms that are crowded with findings teach it, each also in a mirror. It is made once for a tokenizer and kept with
the tokens.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from app.language.align_data import phantom_case, visit_in_shares, workers_for
from app.language.volume_tokens import TokenSource
from app.phantoms.phantoms import ANATOMY_VERSION
from app.phantoms.sentences import mirrored
from app.tokens.token_files import CTTokens
from app.training import checkpoints
from networks.cell_detector import CellDetector

log = logging.getLogger(__name__)

LOCATED = ("nodule", "kidney stone")  # kinds of finding that lie in one place
VERSION = 1  # raised when what it learns from, or how, changes
FIRST_CROWDED = 250_000  # of their numbers, far from those that questions are asked about
EPOCHS, BATCH, RATE = 12, 1024, 2e-3


def phantom_detector(
    source: TokenSource,
    lookup: Callable[[Tensor], Tensor],
    *,
    count: int,
    seed: int = 0,
    kinds: Sequence[str] = LOCATED,
    levels: int | None = None,
) -> CellDetector:
    """Learned from `count` crowded phantoms, or read where it was before."""
    about = {"version": VERSION, "anatomy": ANATOMY_VERSION, "count": count, "seed": seed, "kinds": [*kinds]}
    digest = hashlib.sha256(json.dumps({**about, "levels": levels}, sort_keys=True).encode()).hexdigest()
    file = source.cache_dir / f"detector_{digest[:16]}.pt"
    detector = CellDetector(
        source.tokenizer.sizes.latent_channels, len(kinds), grid=source.tokenizer.sizes.resolution // 8
    )
    if not _read(detector, file):
        feats, coords, found = crowded_cells(source, lookup, count=count, seed=seed, kinds=kinds, levels=levels)
        fit(detector, feats, coords, found, seed=seed)
        if idist.get_rank() == 0:
            checkpoints.write_atomically(detector.state_dict(), file)
    return detector.requires_grad_(False).eval()


def _read(detector: CellDetector, file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        detector.load_state_dict(checkpoints.read_tensors(file))
    except (ValueError, RuntimeError):
        log.warning("%s is damaged and is made again", file.name)
        return False
    return True


def crowded_cells(
    source: TokenSource,
    lookup: Callable[[Tensor], Tensor],
    *,
    count: int,
    seed: int,
    kinds: Sequence[str],
    levels: int | None,
) -> tuple[Float[Tensor, "M D"], Int[Tensor, "M 3"], Float[Tensor, "M K"]]:
    """Cells of all phantoms and of their mirror images, and which kinds of finding they hold."""
    cells: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def visit(number: int) -> None:
        name = f"crowded_v{ANATOMY_VERSION}.{VERSION}_s{seed}_{number:05d}"
        which = seed * 1_000_000 + FIRST_CROWDED + number
        findings, tokens = phantom_case(source, name, number=which, crowded=True)
        cells[name] = [
            (lookup(torch.from_numpy(one.first_levels(levels))), torch.from_numpy(one.coords), held)
            for one, seen in zip(tokens, (findings, mirrored(findings, places=True)), strict=True)
            for held in [torch.from_numpy(cells_of_findings(one, seen, kinds))]
        ]

    visit_in_shares(
        range(count), visit, says="making phantoms that show where findings lie", workers=workers_for(source, count)
    )
    parts = [part for name in sorted(cells) for part in cells[name]]
    feats, coords, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return feats.detach().float(), coords, found


def cells_of_findings(tokens: CTTokens, findings: Sequence[dict], kinds: Sequence[str]) -> Float[np.ndarray, "M K"]:
    """1 for each cell that holds the centre of a finding; one outside all cells is nowhere."""
    held = np.zeros((len(tokens.coords), len(kinds)), np.float32)
    row = {tuple(cell): number for number, cell in enumerate(tokens.coords.tolist())}
    to_cell = np.linalg.inv(tokens.affine)
    for finding in findings:
        if finding["finding"] in kinds:
            for centre in finding["center_mm"]:
                cell = np.rint(to_cell @ np.array([*centre, 1.0]))[:3].astype(int)
                if (number := row.get(tuple(cell.tolist()))) is not None:
                    held[number, kinds.index(finding["finding"])] = 1
    return held


def fit(
    detector: CellDetector,
    feats: Float[Tensor, "M D"],
    coords: Int[Tensor, "M 3"],
    found: Float[Tensor, "M K"],
    *,
    seed: int,
) -> None:
    """Logistic regression through the hidden layers, one cycle of rates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in detector.layers:
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
        detector.mean.copy_(feats.mean(0))
        detector.spread.copy_(feats.std(0).clamp(min=1e-6))
        batch = min(BATCH, len(feats))
        steps = EPOCHS * (len(feats) // batch)
        optimizer = torch.optim.AdamW(detector.parameters(), lr=RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
        for step in range(steps):
            if step % (len(feats) // batch) == 0:
                order = torch.randperm(len(feats))
            rows = order[step * batch % (len(feats) // batch * batch) :][:batch]
            loss = functional.binary_cross_entropy_with_logits(detector(feats[rows], coords[rows]), found[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    log.info("cells with findings: a detector learned from %d of %d cells", int(found.any(1).sum()), len(found))
