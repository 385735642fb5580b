"""Alignment for end-to-end tests: a tokenizer, a tiny Qwen3-VL on disk, a manifest of token files, a run on them."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from app.tokens.open_scan import Volume
from app.tokens.token_files import write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.training.train import train
from networks import make_vqvae
from networks.qwen import save_language
from networks.tiny_qwen import build_tiny

NUM_CASES = 12


def make_volume(seed: int) -> Volume:
    """Bright on the left or on the right."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(-300, 40, (32, 32, 32)).astype(np.int16)
    half = slice(0, 16) if seed % 2 else slice(16, 32)
    hu[half] += 400
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -124
    return Volume(hu, affine)


def make_home(home: Path) -> Path:
    """A tokenizer, a Qwen3-VL on disk, and a manifest of token files with questions and reports."""
    torch.manual_seed(0)
    network = make_vqvae(
        "tiny", resolution=32, spacing=8.0, latent_channels=16, keep="nonzero", num_embeddings=16, num_blocks=1
    )
    torch.save(network.state_dict(), home / "tokenizer.pt")
    ct = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    lines = []
    for number in range(NUM_CASES):
        write_tokens(home / f"scans/case{number}.npz", ct.encode(make_volume(number)))
        side = "left" if number % 2 else "right"
        common = {
            "image": f"scans/case{number}.npz",
            "split": "val" if number > 7 else "train",
            "patient": f"p{number}",
        }
        lines.append({**common, "question": "On which side?", "answer": side, "type": "side"})
        lines.append(
            {
                **common,
                "report": "Pleural effusion on the left." if number % 2 else "A nodule on the right.",
                "Pleural effusion": number % 2,
                "Lung nodule": 1,
            }
        )
    (home / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    language, tokenizer = build_tiny([json.dumps(line) for line in lines], family="qwen3_vl", width=32)
    save_language(language, tokenizer, home / "qwen")
    return home


def align(home: Path, out: Path, **changes) -> None:
    settings = {
        "data": str(home / "text.jsonl"),
        "vl_model": os.path.relpath(home / "qwen"),
        "vae_ckpt": str(home / "tokenizer.pt"),
        "output_dir": str(out),
        "num_workers": 0,
        "i_save": 4,
        "i_log": 1,
        "use_lora": True,
        "epochs": 2,
        "learning_rate": 1e-3,
        "max_3d_tokens": 40,
    }
    train("align", **{name: value for name, value in {**settings, **changes}.items() if value is not None})
