"""A tokenizer judged on whole cases it did not learn from: the body of `bundles/evaluate_tokenizer.json`.

Three reconstructions of each case are compared with its source: from the codes alone (the network says where voxels
are), with the stored support, and with the codes exchanged at random within the case, which shows how much a decoder
reads off the coordinates. Writes a card as JSON, Markdown and PNG beside the checkpoint (see card.py).
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from app.dataset import prepared
from app.evaluation import card
from app.evaluation.shape_evaluation import evaluate_shapes
from app.measures import codecs
from app.measures import hu_errors as measure
from app.measures.tokenizer_metrics import count_codes, perplexity
from app.phantoms.phantoms import ensure_cohort
from app.shared.output_folder import check_folder
from app.shared.refusals import Refused
from app.tokens.code_tables import CodeTables
from app.tokens.open_scan import Scan
from app.tokens.token_files import CTTokens, rate_of
from app.tokens.tokenizer import CTTokenizer, dense_hu, find_tokenizer
from app.training import checkpoints, shipped
from app.training.initial_weights import train_demo_stage1
from networks.presets import Preset
from transforms import Resampled
from transforms.windows import windows_range

log = logging.getLogger(__name__)

WAYS = ("codes alone", "stored support", "shuffled codes")
RESAMPLES = 2000
CODEC_CASES = 20  # of which other codecs are asked: x265 takes minutes for a large one
UNSEEN = 20  # phantoms: what a verdict takes


class Truth(NamedTuple):
    """A scan on the tokenizer's grid: what every reconstruction of it is compared with."""

    hu: Float[np.ndarray, "X Y Z"]
    masks: dict[str, Bool[np.ndarray, "X Y Z"]]  # `foreground` is the body, the others its tissues and the air
    beyond: float  # share of all denser than air that lies beyond the grid


class EvaluatedCase(NamedTuple):
    """One case: numbers for the card, and a slice for its picture. Volumes are not kept: there may be thousands."""

    row: dict[str, Any]
    code_counts: Float[torch.Tensor, "L K"]
    slice: card.Slice


@dataclass(eq=False, kw_only=True)
class TokenizerEvaluation:
    """Evaluates and writes the card."""

    dataset_dir: str | None = None  # a prepared dataset; None: built-in phantoms, and a tokenizer trained on them
    tokenizer: str | None = None  # checkpoint, output folder, bundle or name; None: as find_tokenizer says
    output_dir: str | None = None  # of the card; None: beside the checkpoint, of one that ships outputs/NAME
    split: str | None = "val"  # train, val, or None for all cases
    max_cases: int | None = None  # at most this many, evenly spread over the split; None takes all
    max_points: int | None = None  # voxels in work at a time; None leaves it to the preset
    levels: float | None = None  # codes a cell, the first of the tokenizer's levels, a fraction as a mean; None: all
    refine: int = 0  # steps from the encoder's codes to others that decode to fewer errors
    seed: int = 0

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        if self.tokenizer is not None and checkpoints.read_weights(find_tokenizer(self.tokenizer))[1].features == "sdf":
            return self._run_on_shapes(find_tokenizer(self.tokenizer))
        data = self.dataset_dir or str(_phantoms(self.split))
        cases = prepared.find_cases(data, split=self.split)
        if not cases:
            what = f"{data} has no case with split {self.split}"
            raise Refused("NO_CASES", what, "pass --split train, or '$None' for all", status=2)
        if self.max_cases is not None and self.max_cases < len(cases):
            cases = [cases[i] for i in np.linspace(0, len(cases) - 1, self.max_cases).round().astype(int)]
        file = self._tokenizer_file()
        folder = Path(self.output_dir) if self.output_dir else _beside(file)
        check_folder(folder, name="output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self._open(file)
        evaluated, refused = [], {}
        for case in cases:
            try:
                how = {"levels": self.levels, "refine": self.refine, "with_codecs": len(evaluated) < CODEC_CASES}
                evaluated.append(evaluate_case(tokenizer, case, **how))
            except ValueError as error:
                refused[case.case_id] = str(error)
                log.warning("%s is not judged: %s", case.case_id, error)
                continue
            whole = evaluated[-1].row["errors"]["codes alone"]["tissues"]["foreground"]["mae"]
            log.info("%s: MAE %.1f HU from codes alone", case.case_id, whole)
        if not evaluated:
            name, reason = next(iter(refused.items()))
            what = f"none of {len(cases)} cases can be judged; {name}: {reason}"
            raise Refused("NO_CASES", what, "check the dataset", status=2)
        result = summarize(evaluated, tokenizer, seed=self.seed)
        result["tokenizer"] = {"file": file.name, "sha256": tokenizer.digest, "sizes": asdict(tokenizer.sizes)}
        result["data"] = {
            "dataset": "built-in phantoms" if self.dataset_dir is None else Path(data).name,
            "split": self.split or "all",
            "cases": len(evaluated),
            "patients": len({case.patient for case in cases if case.case_id not in refused}),
            "not_judged": refused,
            "refined": self.refine,
        }
        result["software"] = prepared.versions() | {"torch": torch.__version__}
        result["seconds"] = round(time.perf_counter() - started, 1)
        card.write(folder, result, evaluated)
        log.info("card in %s", folder / "tokenizer_card.md")
        return result

    def _run_on_shapes(self, file: Path) -> dict[str, Any]:
        folder = Path(self.output_dir) if self.output_dir else _beside(file)
        check_folder(folder, name="output_dir")
        options = {"split": self.split, "max_cases": self.max_cases, "levels": self.levels, "file": file}
        return evaluate_shapes(self._open(file), self.dataset_dir, folder, **options)

    def _open(self, file: Path) -> CTTokenizer:
        tokenizer = CTTokenizer.from_pretrained(file, max_points=self.max_points)
        tokenizer.check_levels(self.levels)
        tokenizer.check_refine(self.refine)
        return tokenizer

    def _tokenizer_file(self) -> Path:
        missing = self.tokenizer is None and not any(
            checkpoints.complete_steps(p) for p in checkpoints.NEWEST_TOKENIZERS
        )
        if missing and self.dataset_dir is None:
            train_demo_stage1("NO_TOKENIZER")
        return find_tokenizer(self.tokenizer, for_phantoms=self.dataset_dir is None)


def _phantoms(split: str | None) -> Path:
    """Twenty that no stage has seen, not in its validation either: it has only as many as a short run can afford."""
    if split == "val":
        return ensure_cohort("outputs/phantoms_unseen", num_train=0, num_val=UNSEEN, seed=1)
    return ensure_cohort("outputs/phantoms")


def _beside(file: Path) -> Path:
    """The run or the bundle that the weights are of. What ships is installed software: its card here goes elsewhere."""
    if shipped.is_shipped(file):
        return Path("outputs") / file.parent.name
    return file.parent.parent if file.parent.name in ("ckpts", "models") else file.parent


def truth_of(scan: Scan, sizes: Preset) -> Truth:
    """Raises where there is no body."""
    resampled = Resampled("image", spacing=sizes.spacing, grid=sizes.resolution)
    on_grid = resampled({"image": scan.volume.hu, "affine": scan.volume.affine})
    masks = measure.tissue_masks(on_grid["image"], spacing=sizes.spacing)
    if not masks["foreground"].any():
        raise ValueError("no body is found in it")
    return Truth(on_grid["image"], masks, on_grid["beyond"])


def evaluate_case(
    tokenizer: CTTokenizer,
    case: prepared.PreparedCase,
    *,
    levels: float | None = None,
    refine: int = 0,
    with_codecs: bool = True,
) -> EvaluatedCase:
    """All measurements of one case, of its first `levels` codes; `with_codecs` also of other codecs at its bits."""
    sizes = tokenizer.sizes
    scan = tokenizer.open(case)
    source = truth_of(scan, sizes)
    truth, masks = source.hu, source.masks
    started = time.perf_counter()
    tokens = tokenizer.encode(scan, support=True, levels=levels, refine=refine)
    encoded = time.perf_counter()
    decoded = {
        "codes alone": tokenizer.decode_sparse(tokens, use_support=False),
        "stored support": tokenizer.decode_sparse(tokens),
        "shuffled codes": tokenizer.decode_sparse(replace(tokens, codes=shuffled(tokens.codes))),
    }
    seconds = {"encode": encoded - started, "three decodings": time.perf_counter() - encoded}
    volumes = {way: dense_hu(part.values, sizes) for way, part in decoded.items()}
    errors = {
        way: {
            "tissues": measure.errors_in_hu(truth, hu, masks, windows=sizes.windows),
            "windows": measure.errors_by_window(truth, hu, masks["foreground"], windows=sizes.windows),
        }
        for way, hu in volumes.items()
    }
    kept, predicted = (_occupied(decoded[way].values) for way in ("stored support", "codes alone"))
    alone = decoded["codes alone"]
    row = {
        "case": case.case_id,
        "errors": errors,
        "share": {name: float(mask.mean()) for name, mask in masks.items()},
        "clipped_share": measure.clipped_share(truth, masks["foreground"], windows=sizes.windows),
        "beyond": source.beyond,
        "tokens": len(tokens.codes),
        "rate": rate_of_case(tokens, tokenizer.tables, foreground=int(masks["foreground"].sum())),
        "support": {
            "foreground_kept": measure.kept_share(kept, masks["foreground"]),
            "foreground_decoded": measure.kept_share(predicted, masks["foreground"]),
            "dice": measure.dice_of_masks(predicted, kept),
            "forced_children": alone.forced,
            "computed_of_full_expansion": alone.computed / (512 * len(tokens.codes)),
        },
        "labels": _labels_kept(case, tokens, {"kept": kept, "decoded": predicted}),
        "seconds": seconds,
    }
    row["codecs"] = codecs_at(row["rate"]["bits"], source, windows=sizes.windows) if with_codecs else {}
    counts = count_codes(torch.from_numpy(tokens.codes), sizes.num_embeddings)
    return EvaluatedCase(row, counts, card.slice_of(truth, volumes, _code_map(tokens)))


def _labels_kept(
    case: prepared.PreparedCase, tokens: CTTokens, ways: dict[str, Bool[np.ndarray, "X Y Z"]]
) -> dict[str, dict[str, float]]:
    """Share of each organ's voxels that lie where voxels were kept."""
    shares = {}
    for name in case.organ_names():
        label, grids = case.organ(name), {"label_affine": case.affine, "affine": tokens.grid_affine}
        shares[name] = {way: measure.label_share(voxels, label, **grids) for way, voxels in ways.items()}
    return shares


def rate_of_case(tokens: CTTokens, tables: CodeTables, *, foreground: int) -> dict[str, float]:
    """All bits that decoding from codes alone takes, entropy-coded, and what stored support would add."""
    counted = rate_of(tokens, tables)
    packed, plain = counted.packed, counted.plain
    bits, voxels = packed.total - packed.support, math.prod(tokens.grid_shape)
    of_body = {f"{name}_per_foreground_voxel": part / foreground for name, part in packed._asdict().items()}
    return {
        "bits": bits,
        "bits_per_voxel": bits / voxels,
        "bits_per_foreground_voxel": bits / foreground,
        "bits_per_token": bits / len(tokens.codes),
        **of_body,
        "code_bits_per_token": packed.codes / len(tokens.codes),
        "plain_bits_per_foreground_voxel": (plain.total - plain.support) / foreground,
        "compression_of_16_bit": 16 * voxels / bits,
    }


def codecs_at(bits: float, truth: Truth, *, windows: Sequence[str]) -> dict[str, dict[str, float]]:
    """Errors in the body of each codec that is installed, at so many bits."""

    def errors(hu: np.ndarray) -> dict[str, float]:
        return measure.errors_in_hu(truth.hu, hu, {"body": truth.masks["foreground"]}, windows=windows)["body"]

    kinds = {"x265": codecs.Hevc} if codecs.has_x265() else {}
    by_codec = {}
    for name, kind in {**kinds, "JPEG 2000": codecs.Jpeg2000}.items():
        codec = kind(truth.hu, truth.masks["foreground"], hu_range=windows_range(windows), judge=errors)
        point = codec.at_bits(bits)
        by_codec[name] = {**point.errors, "bits_of_ours": min(max(bits, min(point.bits)), max(point.bits)) / bits}
    return by_codec


def shuffled(codes: np.ndarray) -> np.ndarray:
    """The same codes at other places, the same way every time."""
    return codes[np.random.default_rng(0).permutation(len(codes))]


def _occupied(values) -> np.ndarray:
    kept = np.zeros(values.spatial_shape, bool)
    kept[tuple(values.coords[:, 1:].cpu().numpy().T)] = True
    return kept


def _code_map(tokens: CTTokens) -> np.ndarray:
    grid = np.full(tokens.latent_shape, np.nan)
    grid[tuple(tokens.coords.T)] = tokens.codes.reshape(len(tokens.codes), -1)[:, 0]
    return grid


# ---- over cases


def summarize(evaluated: Sequence[EvaluatedCase], tokenizer: CTTokenizer, *, seed: int) -> dict[str, Any]:
    """Means over cases, with 95 % bootstrap intervals where there are at least three."""
    rows = [one.row for one in evaluated]
    most = max(len(one.code_counts) for one in evaluated)  # fewer where a case spends few
    padded = [torch.nn.functional.pad(one.code_counts, (0, 0, 0, most - len(one.code_counts))) for one in evaluated]
    counts = torch.stack(padded).sum(0)
    ways = {way: _mean_of([row["errors"][way] for row in rows], seed) for way in WAYS}
    true, mixed = (ways[way]["tissues"]["foreground"]["mae"]["mean"] for way in ("stored support", "shuffled codes"))
    return {
        "errors": ways,
        "shuffled_ratio": mixed / max(true, 1e-9),
        "tissue_share": _mean_of([row["share"] for row in rows], seed),
        "clipped_share": _mean_of([row["clipped_share"] for row in rows], seed),
        "beyond": _mean_of([row["beyond"] for row in rows], seed),
        "codes": {
            "num_embeddings": tokenizer.sizes.num_embeddings,
            "levels": len(counts),
            "used": [int((level > 0).sum()) for level in counts],
            "perplexity": [perplexity(level) for level in counts],
            "per_case": _mean_of([row["tokens"] for row in rows], seed),
        },
        "code_counts": [level.long().tolist() for level in counts],
        "rate": _mean_of([row["rate"] for row in rows], seed),
        "codecs": _mean_of([row["codecs"] for row in rows if row["codecs"]], seed),
        "support": _mean_of([row["support"] for row in rows], seed),
        "labels": {
            name: _mean_of([row["labels"][name] for row in rows if name in row["labels"]], seed)
            for name in sorted({name for row in rows for name in row["labels"]})
        },
        "per_case": rows,
    }


def _mean_of(parts: list[Any], seed: int) -> Any:
    """The same nest with `mean`, `low`, `high` and `cases` at its leaves; what a case lacks does not count for it."""
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _mean_of([part[name] for part in parts if name in part], seed) for name in names}
    values = np.array([part for part in parts if math.isfinite(part)], np.float64)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "cases": 0}
    interval = {"mean": float(values.mean()), "low": None, "high": None, "cases": len(values)}
    if len(values) >= 3:
        picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
        interval["low"], interval["high"] = (float(v) for v in np.percentile(values[picks].mean(1), (2.5, 97.5)))
    return interval
