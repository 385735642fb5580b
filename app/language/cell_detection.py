"""A detector of findings in single cells, learned from phantoms: there it is known which cell holds one.

Phantoms that are crowded with findings teach it, each also in a mirror. None of them is one that a language model
learns from: of those it would be surer than of others, and a model would learn to believe it too much. It is made once
for a tokenizer and kept with the tokens.
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

from app.language.align_data import visit_in_shares
from app.language.phantom_text import phantom_case, workers_for
from app.language.volume_tokens import TokenSource
from app.phantoms.phantoms import ANATOMY_VERSION
from app.phantoms.sentences import mirrored
from app.tokens.token_files import CTTokens
from app.training import checkpoints
from networks.cell_detector import CellDetector

log = logging.getLogger(__name__)

LOCATED = ("nodule", "kidney stone", "pleural effusion")  # kinds of finding whose cells are known
VERSION = 3  # raised when what it learns from, or how, changes
FIRST_CROWDED = 250_000  # of their numbers, far from those that questions are asked about
EPOCHS, EPOCHS_HARD = 2, 20  # over all cells, then over those that are hard
CLEAR = -6.0  # below this logit of all kinds a cell without findings is not hard after the first epochs
BATCH, RATE = 1024, 3e-3


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
        how = {"seed": seed, "kinds": kinds, "levels": levels}
        feats, coords, found = known_cells(source, lookup, count=count, **how)
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


def known_cells(
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

    def visit(at: int) -> None:
        name, number = f"crowded_v{ANATOMY_VERSION}_s{seed}_{at:05d}", seed * 1_000_000 + FIRST_CROWDED + at
        findings, tokens = phantom_case(source, name, number=number, crowded=True)
        cells[name] = [
            (lookup(torch.from_numpy(one.first_levels(levels))), torch.from_numpy(one.coords), held)
            for one, seen in zip(tokens, (findings, mirrored(findings, places=True)), strict=True)
            for held in [torch.from_numpy(cells_of_findings(one, seen, kinds))]
        ]

    says = "making phantoms that show where findings lie"
    visit_in_shares(range(count), visit, says=says, workers=workers_for(source, count))
    parts = [part for name in sorted(cells) for part in cells[name]]
    feats, coords, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return feats.detach().float(), coords, found


def cells_of_findings(tokens: CTTokens, findings: Sequence[dict], kinds: Sequence[str]) -> Float[np.ndarray, "M K"]:
    """1 for each cell that holds the centre of a finding, or a known point of it; one outside all cells is nowhere."""
    held = np.zeros((len(tokens.coords), len(kinds)), np.float32)
    row = {tuple(cell): number for number, cell in enumerate(tokens.coords.tolist())}
    to_cell = np.linalg.inv(tokens.affine)
    for finding in findings:
        if finding["finding"] in kinds:
            for point in finding.get("inside_mm", finding["center_mm"]):
                cell = np.rint(to_cell @ np.array([*point, 1.0]))[:3].astype(int)
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
    """Logistic regression through the hidden layers: of all cells, then of those that are not clear by then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in detector.layers:
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
        detector.mean.copy_(feats.mean(0))
        detector.spread.copy_(feats.std(0).clamp(min=1e-6))
        _cycle(detector, feats, coords, found, epochs=EPOCHS)
        with torch.no_grad():
            logits = torch.cat([detector(*part) for part in zip(feats.split(8192), coords.split(8192), strict=True)])
        hard = ((logits > CLEAR) | (found > 0)).any(1)
        if hard.any():
            _cycle(detector, feats[hard], coords[hard], found[hard], epochs=EPOCHS_HARD)
    log.info("cells with findings: a detector learned from %d of %d cells", int(found.any(1).sum()), len(found))


def _cycle(
    detector: CellDetector,
    feats: Float[Tensor, "M D"],
    coords: Int[Tensor, "M 3"],
    found: Float[Tensor, "M K"],
    *,
    epochs: int,
) -> None:
    """One cycle of rates."""
    detector.train()
    batch = min(BATCH, len(feats))
    an_epoch = len(feats) // batch
    optimizer = torch.optim.AdamW(detector.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=an_epoch * epochs + 1)
    for _ in range(epochs):
        for rows in torch.randperm(len(feats))[: an_epoch * batch].split(batch):
            loss = functional.binary_cross_entropy_with_logits(detector(feats[rows], coords[rows]), found[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    detector.eval()
