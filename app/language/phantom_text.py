"""The built-in text: phantoms as tokens, with their reports and questions. Each phantom is made once, then read."""

import json
import sys
from collections.abc import Sequence
from functools import lru_cache

from app.language.align_data import visit_in_shares
from app.language.volume_tokens import TokenSource
from app.phantoms.phantoms import ANATOMY_VERSION, make_phantom
from app.phantoms.sentences import balance, mirrored, phantom_rows
from app.shared.atomic_files import write_text
from app.shared.workers import free_memory, num_cores
from app.text.rows import TextRow
from app.tokens.open_scan import as_it_lies
from app.tokens.token_files import CTTokens

PHANTOMS_A_WORKER = 8
BYTES_A_WORKER, BYTES_A_VOXEL = 300 << 20, 120  # of memory, to paint and encode one phantom
FIRST_PHANTOMS = {
    "train": 0,
    "tune": 500_001,
    "val": 1,
}  # numbers of phantoms: from here on every second one; `evaluate` takes those of val


def phantom_volumes(
    source: TokenSource, *, count: int, seed: int, split: str, mirror: bool = False, about: Sequence[str] | None = None
) -> tuple[list[TextRow], dict[str, CTTokens]]:
    """The built-in text: `count` phantoms on the tokenizer's grid with report and questions, not yet balanced.

    Those of different splits never meet (see FIRST_PHANTOMS). With `mirror` each is
    seen in a mirror, with sides swapped in the text.
    """
    rows, volumes = {}, {}

    def visit(number: int) -> None:
        name, which = phantom_named(split, number, seed=seed)
        findings, tokens = phantom_case(source, name, number=which)
        if mirror:
            findings, name = mirrored(findings), f"{name}_mirrored"
        volumes[name] = tokens[mirror]
        rows[name] = phantom_rows(name, findings, split=split, about=about)

    visit_in_shares(range(count), visit, says="making phantoms", workers=workers_for(source, count))
    return [row for name in sorted(rows) for row in rows[name]], volumes


def phantom_named(split: str, at: int, *, seed: int) -> tuple[str, int]:
    """The name of one phantom of a split, and the number it is made from."""
    name = f"phantom_v{ANATOMY_VERSION}_s{seed}_{split}_{at:05d}"
    return name, seed * 1_000_000 + FIRST_PHANTOMS[split] + 2 * at


def workers_for(source: TokenSource, count: int) -> int:
    """Processes that make `count` phantoms: a core each, if memory allows and there are PHANTOMS_A_WORKER for each.

    One where a card encodes, which a forked process cannot use, and where a process had better not be forked.
    """
    if source.tokenizer.device.type != "cpu" or sys.platform != "linux":
        return 1
    bytes_each = BYTES_A_WORKER + BYTES_A_VOXEL * source.tokenizer.sizes.resolution**3
    return max(1, min(num_cores(), count // PHANTOMS_A_WORKER, int(0.8 * free_memory() / bytes_each)))


def phantom_case(
    source: TokenSource, name: str, *, number: int, crowded: bool = False
) -> tuple[list[dict], tuple[CTTokens, CTTokens]]:
    """Findings of one phantom, its tokens and those of its mirror image; made once, then read."""
    sizes = source.tokenizer.sizes
    phantom = lru_cache(1)(lambda: make_phantom(number, size=sizes.resolution, spacing=sizes.spacing, crowded=crowded))
    file = source.cache_dir / f"{name}.json"
    tokens = (
        source.cached(name, lambda: as_it_lies(phantom().hu, phantom().affine)),
        # the grid is centred, so that the affine of the mirror image is the same
        source.cached(f"{name}_mirrored", lambda: as_it_lies(phantom().hu[::-1].copy(), phantom().affine)),
    )
    try:
        findings = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there yet, or damaged
        findings = phantom().findings
        write_text(file, json.dumps(findings) + "\n")
    return findings, tokens


def builtin(
    source: TokenSource,
    *,
    count: int,
    seed: int,
    split: str,
    about: Sequence[str] | None = None,
    reports: float = 1.0,
) -> tuple[list[TextRow], dict[str, CTTokens]]:
    """Phantoms as they are and, for training, also mirrored; answers balanced, of the reports a share."""
    settings = {"count": count, "seed": seed, "split": split, "about": about}
    rows, volumes = phantom_volumes(source, **settings)
    if split == "train":
        mirrored_rows, mirrored_volumes = phantom_volumes(source, **settings, mirror=True)
        rows, volumes = rows + mirrored_rows, volumes | mirrored_volumes
    return some_reports(balance(rows, seed=seed), share=reports), volumes


def some_reports(rows: Sequence[TextRow], *, share: float) -> list[TextRow]:
    """All questions, and evenly spread a share of the reports, which are long: each slows its whole batch."""
    kept, seen = [], 0
    for row in rows:
        seen += row.kind == "report"
        if row.kind != "report" or int(seen * share) > int((seen - 1) * share):
            kept.append(row)
    return kept
