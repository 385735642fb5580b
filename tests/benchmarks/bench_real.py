"""Minutes of training on real scans, judged on scans of other patients: this tokenizer and MONAI's dense VQVAE.

    python -m tests.benchmarks.bench_real DATA OUT --minutes 15 [--part ours|monai|table]

DATA is a prepared dataset with train and val. Parts may run at the same time, each on its own card; `table` is last.
Both get the same minutes of wall clock, samples, batch and number of codes, and are judged on the same voxels of whole
scans with the stored support: HU told by the windows, -1024 where a voxel was dropped. Ours runs its three bundles,
start-up included. MONAI's trains as it ships; with `--start kmeans` it begins as ours does: without codes, then a
codebook by k-means. Writes OUT/{name}/result.json and slices, OUT/real.md and OUT/real.png.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from app.dataset import prepared
from app.evaluation import card
from app.measures import hu_errors as measure
from app.measures.tokenizer_metrics import count_codes, perplexity
from app.tokens import open_scan
from app.tokens.tokenizer import CTTokenizer, dense_hu
from app.training import data, loaders
from app.training.voxel_runs import coords_of
from networks.presets import NORMS, PRESETS, Preset
from networks.sparse import SparseTensor
from tests.benchmarks import dense_peer
from tests.benchmarks.timed_stages import TimedStages, environment_of_runs
from tests.benchmarks.timing import machine
from transforms import RandCropToBudgetd, RandJitterd, RandTranslated, Resampled, Windowsd
from transforms.tensor import window_values

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DENSE_WIDTHS = {"base": (44, 88, 176), "tiny": (10, 20, 40)}  # as many parameters as the preset
UNQUANTISED = 0.4  # of the minutes, where the peer starts as ours does


# ---- this project: three bundles


def judge_ours(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    shared = {
        "dataset_dir": Path(given.data).resolve(),
        "preset": given.preset,
        "batch_size_per_gpu": given.batch,
        "max_points": given.max_points,
        "max_shift": given.max_shift,
        **({"norm": given.norm} if given.norm else {}),
        "num_workers": given.workers,
        "learning_rate": given.learning_rate,
        "loss_type": "l1",
        "seed": given.seed,
    }
    coded = {**shared, "num_embeddings": given.codes}
    last = {**coded, "learning_rate": given.learning_rate * given.stage2_rate}
    first = {**shared, "lr_scheduler": "constant"}  # another stage follows: its rate need not fall
    stages = TimedStages(place, settings={"vae": first, "vq_stage1": coded, "vq_stage2": last}, say=say)
    file, training = stages.train(60 * given.minutes, trial_steps=given.trial_steps)
    call = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "bundles/evaluate_tokenizer.json")]
    call += ["--tokenizer", str(file.resolve()), "--dataset_dir", str(Path(given.data).resolve())]
    call += ["--output_dir", str((place / "card").resolve())]
    subprocess.run(call, cwd=place, env=environment_of_runs(), check=True, timeout=900)
    found = json.loads((place / "card" / "tokenizer_card.json").read_text())
    made = CTTokenizer.from_pretrained(file)
    for case in val_cases(given):
        scan = open_scan.open_scan(case, made.sizes.windows)
        tokens = made.encode(scan, support=True)
        keep_slice(place, case.case_id, on_grid(scan, made.sizes), made.to_hu(made.decode_sparse(tokens), tokens).hu)
    cases = {row["case"]: row for row in found["per_case"]}
    return {
        "training": training,
        "parameters": dense_peer.trainable_parameters(made.network),
        "cases": {
            name: {
                "tissues": row["errors"]["stored support"]["tissues"],
                "shuffled": row["errors"]["shuffled codes"]["tissues"]["foreground"],
                "codes alone": row["errors"]["codes alone"]["tissues"]["foreground"],
                "windows": row["errors"]["stored support"]["windows"],
                "share": row["share"],
            }
            for name, row in cases.items()
        },
        "codes": {"used": found["codes"]["used"][0], "perplexity": found["codes"]["perplexity"][0]},
        "tokens": {name: row["tokens"] for name, row in cases.items()},
    }


# ---- the peer: one network, the same samples as boxes


def samples(given: argparse.Namespace, sizes: Preset) -> data.CTDataset:
    """What the bundles train on, by the same transforms."""
    return data.make_dataset(
        given.data,
        split="train",
        seed=given.seed,
        preprocessing=data.preprocessing(resolution=sizes.resolution, spacing=sizes.spacing, windows=sizes.windows),
        sampling=[
            RandTranslated(max_shift=given.max_shift),
            RandCropToBudgetd(max_points=given.max_points),
            RandJitterd(),
        ],
        windowing=Windowsd(windows=sizes.windows),
    )


def train_monai(given: argparse.Namespace, sizes: Preset) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(given.seed)
    network = dense_peer.dense_vqvae(
        DENSE_WIDTHS[given.preset],
        in_channels=sizes.in_channels,
        num_codes=given.codes,
        code_width=sizes.latent_channels,
    ).to(DEVICE)
    loader = loaders.make_train_loader(
        samples(given, sizes), batch_size=given.batch, max_steps=10**6, num_workers=given.workers
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=given.learning_rate, weight_decay=0.0, fused=DEVICE.type == "cuda"
    )
    total, started, step, line = 60 * given.minutes, time.perf_counter(), 0, ""
    rows: list[torch.Tensor] | None = [] if given.start == "kmeans" else None  # None: it quantises
    network.train()
    for batch in loader:
        done = (time.perf_counter() - started) / total
        if done >= 1:
            break
        factor = min(done / 0.02, 1.0) * (0.01 + 0.99 * (1 + np.cos(np.pi * done)) / 2)  # by the clock, as a cosine
        for group in optimizer.param_groups:
            group["lr"] = given.learning_rate * factor
        feats = window_values(batch["values"].to(DEVICE, non_blocking=True), sizes.windows)
        boxes = dense_peer.boxes_of(feats, coords_of(batch, DEVICE), batch["batch_size"])
        if rows is not None and done >= UNQUANTISED:
            rows.append(dense_peer.latents_of(network, boxes))
            if sum(map(len, rows)) >= 64 * given.codes:
                dense_peer.lay_codebook(network, torch.cat(rows), seed=given.seed)
                rows = None
                say(f"monai step {step}: codebook laid by k-means")
            continue
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            terms = dense_peer.loss_of(network, boxes, feats, quantize=rows is None)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 1:
            line = " ".join(f"{name}={float(term.detach()):.4g}" for name, term in terms.items())
            say(f"monai step {step}, {100 * done:.0f} %: {line}")
    loader.close()
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        say("monai: the weights are no numbers any more: lower --learning-rate")
    minutes = (time.perf_counter() - started) / 60
    return network, {"minutes": minutes, "stages": {"all": {"steps": step, "last": line}}}


def judge_monai(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    sizes = PRESETS[given.preset].changed(num_embeddings=given.codes)
    network, training = train_monai(given, sizes)
    place.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), place / "monai.pt")
    counts, cases, tokens = torch.zeros(given.codes, dtype=torch.float64), {}, {}
    for case in val_cases(given):
        truth, x = seen_by_both(case, sizes)
        boxes = dense_peer.boxes_of(x.feats, x.coords, 1)
        made = dense_peer.reconstruct(network, boxes)
        straight, mixed = (dense_hu(x.replace(rows), sizes) for rows in (made.rows, made.shuffled))
        masks = measure.tissue_masks(truth, spacing=sizes.spacing)
        cases[case.case_id] = {
            "tissues": measure.errors_in_hu(truth, straight, masks, windows=sizes.windows),
            "shuffled": measure.errors_in_hu(truth, mixed, masks, windows=sizes.windows)["foreground"],
            "windows": measure.errors_by_window(truth, straight, masks["foreground"], windows=sizes.windows),
            "share": {name: float(mask.mean()) for name, mask in masks.items()},
        }
        counts += count_codes(made.codes, given.codes)[0]
        tokens[case.case_id] = len(made.codes)
        keep_slice(place, case.case_id, truth, straight)
    return {
        "training": training,
        "parameters": dense_peer.trainable_parameters(network),
        "cases": cases,
        "codes": {"used": int((counts > 0).sum()), "perplexity": perplexity(counts)},
        "tokens": tokens,
    }


# ---- shared


def say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def val_cases(given: argparse.Namespace) -> list[prepared.PreparedCase]:
    return prepared.find_cases(given.data, split="val")


def on_grid(scan: open_scan.Scan, sizes: Preset) -> Float[np.ndarray, "X Y Z"]:
    resampled = Resampled("image", spacing=sizes.spacing, grid=sizes.resolution)
    return resampled({"image": scan.volume.hu, "affine": scan.volume.affine})["image"]


def seen_by_both(case: prepared.PreparedCase, sizes: Preset) -> tuple[Float[np.ndarray, "X Y Z"], SparseTensor]:
    """A whole scan in HU, and the window values of its kept voxels."""
    scan = open_scan.open_scan(case, sizes.windows)
    steps = data.preprocessing(resolution=sizes.resolution, spacing=sizes.spacing, windows=sizes.windows)
    item: dict[str, Any] = {"image": scan.volume.hu, "affine": scan.volume.affine}
    for step in [*steps, Windowsd(windows=sizes.windows)]:
        item = step(item)
    coords = torch.from_numpy(np.pad(item["coords"].astype(np.int32), ((0, 0), (1, 0))))
    x = SparseTensor(torch.from_numpy(item["feats"]), coords, tuple(item["spatial_shape"]), 1)
    return on_grid(scan, sizes), SparseTensor(x.feats.to(DEVICE), x.coords.to(DEVICE), x.spatial_shape, 1)


def keep_slice(place: Path, name: str, truth: np.ndarray, made: np.ndarray) -> None:
    cut = card.slice_of(truth, {"made": made}, np.zeros([n // 8 for n in truth.shape]))
    np.savez_compressed(place / f"slice_{name}.npz", truth=cut.truth, made=cut.decoded["made"])


def check(given: argparse.Namespace) -> None:
    """The ruler and the boxes, before any time is spent: a perfect copy has no error, boxes give back their rows."""
    sizes = PRESETS[given.preset]
    truth, x = seen_by_both(val_cases(given)[0], sizes)
    masks = measure.tissue_masks(truth, spacing=sizes.spacing)
    copied = measure.errors_in_hu(truth, dense_hu(x, sizes), masks, windows=sizes.windows)["foreground"]["mae"]
    boxes = dense_peer.boxes_of(x.feats, x.coords, 1)
    assert copied < 0.5, f"window values alone are {copied} HU off"
    assert torch.equal(dense_peer.rows_of(boxes.volume, boxes), x.feats), "boxes do not give back their rows"
    latents = x.level.prepare(*sizes.convolved)
    assert len(boxes.cells[0]) == len(latents), (len(boxes.cells[0]), len(latents))
    say(f"checked: a perfect copy is {copied:.3f} HU off, {len(latents)} cells of {len(x)} voxels for both")


# ---- the table


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(out.glob("*/result.json"))}


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One a network and case, and one a network for the mean over cases."""
    rows = []
    for name, result in found.items():
        for case, part in result["cases"].items():
            tissues = {tissue: errors["mae"] for tissue, errors in part["tissues"].items() if tissue != "air"}
            rows.append(
                {
                    "network": name,
                    "case": case,
                    "body": tissues.pop("foreground"),
                    **tissues,
                    "shuffled": part["shuffled"]["mae"],
                    **{f"SSIM {window}": scores.get("ssim") for window, scores in part["windows"].items()},
                    "tokens": result["tokens"][case],
                }
            )
    return rows


def table(out: Path) -> str:
    """Markdown of all results in OUT."""
    found = results(out)
    if not found:
        sys.exit(f"no result in {out}: run --part ours and --part monai first")
    _same_voxels(found)
    rows = rows_of(found)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_shown(row.get(column)) for column in columns] for row in rows]
    lines = ["MAE in HU, stored support:", "", *_grid(columns, shown), ""]
    facts = [
        [
            name,
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['training']['minutes']:.1f}",
            " + ".join(str(stage["steps"]) for stage in result["training"]["stages"].values()),
            f"{result['codes']['used']} of {result['settings']['codes']}",
            f"{result['codes']['perplexity']:.0f}",
            f"{_mean_body(result):.1f}",
            f"× {_mean_body(result, 'shuffled') / _mean_body(result):.2f}",
            result["machine"]["device"],
        ]
        for name, result in found.items()
    ]
    head = ["network", "parameters", "minutes", "steps", "codes used", "perplexity", "body MAE, mean of cases"]
    lines += _grid([*head, "codes shuffled", "device"], facts)
    return "\n".join(lines)


def _same_voxels(found: dict[str, dict[str, Any]]) -> None:
    """Refuses to compare what was judged on other voxels."""
    shares = [{case: part["share"] for case, part in result["cases"].items()} for result in found.values()]
    assert all(share == shares[0] for share in shares), "the networks were judged on different voxels"


def _mean_body(result: dict[str, Any], way: str = "tissues") -> float:
    parts = [part[way]["foreground"] if way == "tissues" else part[way] for part in result["cases"].values()]
    return float(np.mean([part["mae"] for part in parts]))


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return (f"{value:.3f}" if value < 1 else f"{value:.1f}") if isinstance(value, float) else str(value)


def picture(out: Path) -> None:
    """Coronal slices of each val case in two windows: source, each network, and how far it is off."""
    from matplotlib.figure import Figure

    from transforms.windows import WINDOWS, window

    found = results(out)
    cases = list(next(iter(found.values()))["cases"])
    views = [(case, name) for case in cases for name in ("soft_tissue", "lung")]
    figure = Figure(figsize=(3 * (1 + 2 * len(found)), 3 * len(views)), layout="constrained")
    axes = figure.subplots(len(views), 1 + 2 * len(found), squeeze=False)
    for row, (case, name) in zip(axes, views, strict=True):
        cuts = {network: np.load(out / network / f"slice_{case}.npz") for network in found}
        width = WINDOWS[name][0]
        truth = window(next(iter(cuts.values()))["truth"], *WINDOWS[name])
        panels = [(f"{case}, {name}", truth, {"cmap": "gray", "vmin": 0, "vmax": 1})]
        for network, cut in cuts.items():
            made = window(cut["made"], *WINDOWS[name])
            panels.append((network, made, {"cmap": "gray", "vmin": 0, "vmax": 1}))
            limits = {"cmap": "RdBu_r", "vmin": -width / 4, "vmax": width / 4}
            panels.append((f"{network}: ± {width / 4:.0f} HU", (made - truth) * width, limits))
        for axis, (title, image, looks) in zip(row, panels, strict=True):
            axis.imshow(image[::-1].T, origin="lower", interpolation="none", **looks)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(out / "real.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("ours", "monai", "table"))
    parser.add_argument("--name", help="of the folder below OUT, for several runs of one part")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--preset", default="base", choices=sorted(DENSE_WIDTHS))
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-points", type=int, default=3_000_000)
    parser.add_argument("--max-shift", type=float, default=0.25, help="as max_shift of ours, for both")
    parser.add_argument("--norm", choices=NORMS, help="over what our encoder normalises (as the preset has it)")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--stage2-rate", type=float, default=0.5, help="of the learning rate, for stage 2")
    parser.add_argument(
        "--start", default="own", choices=("own", "kmeans"), help="of MONAI's codebook; kmeans: as ours"
    )
    parser.add_argument("--trial-steps", type=int, default=160)
    parser.add_argument("--workers", type=int, default=max(min(14, (os.cpu_count() or 2) - 2), 0))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faulthandler.dump_traceback_later(60 * given.minutes + 1800, exit=True)  # whatever hangs, it ends
    judges = {"ours": judge_ours, "monai": judge_monai}
    for part in [given.part] if given.part else [*judges, "table"]:
        if part == "table":
            text = table(given.out)
            (given.out / "real.md").write_text(text + "\n")
            picture(given.out)
            print(text)
            print(json.dumps({"benchmark": "real", "rows": rows_of(results(given.out)), **_short(given.out)}))
            continue
        check(given)
        place = given.out / (given.name or part)
        result = judges[part](given, place)
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(given).items()}
        result |= {"settings": settings, "machine": machine(DEVICE.type)}
        (place / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        say(f"{part}: done, {place / 'result.json'}")


def _short(out: Path) -> dict[str, Any]:
    kept = ("training", "parameters", "codes", "settings", "machine")
    return {"runs": {name: {key: result[key] for key in kept} for name, result in results(out).items()}}


if __name__ == "__main__":
    main()
