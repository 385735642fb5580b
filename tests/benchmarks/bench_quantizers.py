"""Every quantiser option on one autoencoder: stage 1 with the same steps each, judged by the tokenizer card.

    python tests/benchmarks/bench_quantizers.py OUT [--also PREPARED] [--options ema,fsq] [--steps 300]

Trains stage 0 once on the built-in phantoms, then the codebook under each option with everything else at the demo's
defaults, and evaluates on the held-out phantoms and, with --also, on every case of another prepared dataset that no
training has seen. Prints a table and one JSON line. Runs the bundles as a user does.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "ema": [],
    "gradient": ["--codebook", "gradient"],
    "fsq": ["--codebook", "fsq"],
    "rotation trick": ["--rotation_trick", "True"],
    "on a sphere": ["--normalize_codes", "True"],
    "2 levels": ["--quantizer_levels", "2"],
    "4 levels": ["--quantizer_levels", "4"],
}


def bundle(place: Path, run_id: str, config: str, *words: str) -> float:
    """Seconds of a run; ends with its output where it fails."""
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        run_id,
        "--config_file",
        str(ROOT / "bundles" / config),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - started


def numbers(card: Path) -> dict[str, float]:
    found = json.loads((card / "tokenizer_card.json").read_text())
    body = {way: part["tissues"]["foreground"]["mae"]["mean"] for way, part in found["errors"].items()}
    codes = found["codes"]
    return {
        "cases": found["data"]["cases"],
        "mae": body["stored support"],
        "mae_codes_alone": body["codes alone"],
        "shuffled_ratio": found["shuffled_ratio"],
        "used": sum(codes["used"]) / len(codes["used"]) / codes["num_embeddings"],
        "perplexity": sum(codes["perplexity"]) / len(codes["perplexity"]),
        "bits_per_voxel": found["rate"]["bits_per_voxel"]["mean"],
    }


def judged(place: Path, name: str, also: Path | None) -> dict[str, dict[str, float]]:
    """The tokenizer in an output folder on the held-out phantoms and on the other dataset."""
    sets = {"phantoms": [], "other": ["--dataset_dir", str(also.resolve()), "--split", "$None"] if also else None}
    found = {}
    for data, more in sets.items():
        if more is not None:
            words = ["--tokenizer", name, "--output_dir", f"{name}/{data}", *more]
            bundle(place, "run", "evaluate_tokenizer.json", *words)
            found[data] = numbers(place / name / data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--also", type=Path, help="another prepared dataset to judge on")
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--steps", type=int, default=300, help="of stage 1; 0 takes what lies in OUT")
    parser.add_argument("--stage2", type=int, default=0, help="steps of stage 2 after it, judged too")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "outputs" / "vae").exists():
        bundle(given.out, "training", "vae.json")
    rows = {}
    for option in given.options.split(","):
        name = f"outputs/{option.replace(' ', '_')}"
        if given.steps:
            words = ["--output_dir", name, "--max_steps", str(given.steps), *OPTIONS[option]]
            seconds = bundle(given.out, "training", "vq_stage1.json", *words)
            rows[option] = {"seconds": round(seconds), **judged(given.out, name, given.also)}
        if given.stage2:
            words = ["--init_from", name, "--output_dir", f"{name}_stage2", "--max_steps", str(given.stage2)]
            seconds = bundle(given.out, "training", "vq_stage2.json", *words, *OPTIONS[option])
            rows[f"{option}, stage 2"] = {"seconds": round(seconds), **judged(given.out, f"{name}_stage2", given.also)}
        print(list(rows.items())[-1], file=sys.stderr, flush=True)
    for data in rows[next(iter(rows))].keys() - {"seconds"}:
        print(f"\n{data}, {rows[next(iter(rows))][data]['cases']} cases: MAE in HU over the body")
        print(
            "| option | MAE, stored support | MAE, codes alone | shuffled | codes used | perplexity | bits per voxel |"
        )
        print("|---|---|---|---|---|---|---|")
        for option, row in rows.items():
            part = row[data]
            print(
                f"| {option} | {part['mae']:.1f} | {part['mae_codes_alone']:.1f} | × {part['shuffled_ratio']:.2f} "
                f"| {part['used']:.0%} | {part['perplexity']:.0f} | {part['bits_per_voxel']:.4f} |"
            )
    print(json.dumps({"benchmark": "quantizers", "steps": given.steps, "rows": rows}))


if __name__ == "__main__":
    main()
