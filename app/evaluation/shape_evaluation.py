"""A tokenizer of shapes judged on shapes it did not learn from: what `evaluate_tokenizer` does for `features: sdf`.

The surface of each file is compared with three reconstructions: by latents that were never quantised, by codes on the
voxels there were, and by codes alone, where the network says which voxels there are. Distances are in mm.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.evaluation import card
from app.measures import report
from app.measures.report import table
from app.measures.surfaces import compare
from app.measures.tokenizer_metrics import count_codes, perplexity
from app.shapes.mesh_files import Mesh
from app.shapes.shape_files import read_shape
from app.shared.atomic_files import write_text
from app.shared.json_files import write_object
from app.shared.refusals import Refused
from app.tokens.shape_tokens import band_mesh, shape_tensor
from app.tokens.tokenizer import CTTokenizer
from app.training.shape_data import make_shape_dataset
from networks.sparse import SparseTensor
from networks.support import support_of
from networks.tiles import decode_whole

log = logging.getLogger(__name__)

WAYS = ("before quantising", "after, stored support", "after, codes alone")
MEASURES = ("distance", "distance_95", "distance_max", "normals", "dice", "distance_voxels")


def evaluate_shapes(
    tokenizer: CTTokenizer,
    dataset_dir: str | None,
    folder: Path,
    *,
    split: str | None,
    max_cases: int | None,
    levels: int | None,
    file: Path,
) -> dict[str, Any]:
    """Judges and writes the card, as JSON and Markdown, of the first `levels` codes a cell; None: of all."""
    begun = time.perf_counter()
    sides = ("train", "val") if split is None else (split,)
    cases = [
        case
        for side in sides
        for case in make_shape_dataset(dataset_dir, split=side, resolution=tokenizer.sizes.resolution).cases
    ]
    if max_cases is not None and max_cases < len(cases):
        cases = [cases[i] for i in np.linspace(0, len(cases) - 1, max_cases).round().astype(int)]
    rows, counts, refused = [], 0, {}
    for case in cases:
        try:
            row, codes = evaluate_shape(tokenizer, case.files[0], levels=levels)
        except ValueError as error:
            refused[case.case_id] = str(error)
            log.warning("%s is not judged: %s", case.case_id, error)
            continue
        rows.append({"case": case.case_id, **row})
        counts = counts + count_codes(codes, tokenizer.sizes.num_embeddings)
        log.info("%s: %.3g mm from codes alone", case.case_id, row["ways"][WAYS[2]].get("distance", float("nan")))
    if not rows:
        name, reason = next(iter(refused.items()))
        what = f"none of {len(cases)} shapes can be judged; {name}: {reason}"
        raise Refused("NO_CASES", what, "check the files", status=2)
    result = {
        "ways": {way: {name: _mean([row["ways"][way].get(name) for row in rows]) for name in MEASURES} for way in WAYS},
        "codes": {
            "levels": len(counts),
            "used": [int((level > 0).sum()) for level in counts],
            "perplexity": [perplexity(level) for level in counts],
            "per_case": _mean([row["tokens"] for row in rows]),
        },
        "per_case": rows,
        "tokenizer": {"file": file.name, "sha256": tokenizer.digest},
        "data": {"split": split or "all", "cases": len(rows), "not_judged": refused},
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write_object(folder / f"{card.NAME}.json", report.plain(result))
    write_text(folder / f"{card.NAME}.md", shapes_markdown(result))
    log.info("card in %s", folder / f"{card.NAME}.md")
    return result


@torch.no_grad()
def evaluate_shape(
    tokenizer: CTTokenizer, file: Path, *, levels: int | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Measurements of one file, and its codes."""
    shape = read_shape(file)
    x, network = shape_tensor(tokenizer, shape), tokenizer.network
    truth = _surface(x, shape.affine)
    if truth is None:
        raise Refused("NO_SURFACE", f"{file.name} has no surface")
    latents, _ = network.encoder(x)
    tokens = network.tokens_of(latents, levels=levels)
    decoded = {
        WAYS[0]: network.decode_on(latents, x.level)[0],
        WAYS[1]: decode_whole(network, tokens, support=support_of(x.level), max_points=tokenizer.max_points).values,
        WAYS[2]: decode_whole(network, tokens, max_points=tokenizer.max_points).values,
    }
    step = float(np.linalg.norm(shape.affine[:3, 0]))
    ways = {}
    for way, values in decoded.items():
        surface = _surface(values, shape.affine)
        ways[way] = {} if surface is None else compare(truth, surface)
        if surface is not None:
            ways[way]["distance_voxels"] = ways[way]["distance"] / step
    return {"ways": ways, "tokens": len(tokens.codes), "voxels": len(x), "voxel_mm": step}, tokens.codes.cpu()


def _surface(values: SparseTensor, affine: np.ndarray) -> Mesh | None:
    try:
        return band_mesh(values, affine)
    except Refused:
        return None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def shapes_markdown(result: dict[str, Any]) -> str:
    """The whole card as text."""
    data, codes = result["data"], result["codes"]
    rows = [
        (way, *("none" if value is None else f"{value:.4g}" for value in means.values()))
        for way, means in result["ways"].items()
    ]
    head = ("surface", "distance, mm", "95 %, mm", "largest, mm", "normals", "Dice", "distance, voxels")
    return "\n".join(
        [
            "# Tokenizer card: shapes",
            "",
            f"{data['cases']} shapes (split {data['split']}), means over shapes. The surface of each file beside its "
            "reconstructions; distances are means over both directions, the largest in either. Research use, not for "
            "diagnosis.",
            "",
            *table(head, rows),
            "",
            f"{codes['per_case']:.0f} tokens a shape; codes used {codes['used']}, perplexity "
            f"{[round(value, 1) for value in codes['perplexity']]}.",
            *(["", f"Not judged: {', '.join(data['not_judged'])}."] if data["not_judged"] else []),
            "",
        ]
    )
