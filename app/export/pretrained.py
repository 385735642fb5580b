"""A tokenizer that ships: the averaged weights of a training run as float16, with card, credits, settings and hashes.

    python -m app.export.pretrained bundles/pretrained/NAME --tokenizer outputs/vq_stage2 --credits CREDITS.md \
        --command "how it was trained" --runs outputs/vae outputs/vq_stage1 outputs/vq_stage2 --dataset DATA

Written beside and renamed. The card is that of the float16 weights, read back as every command will read them. What the
runs say of places on this machine is left out.
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from app.evaluation.tokenizer_evaluation import TokenizerEvaluation
from app.shared.hashes import hash_path
from app.shared.json_files import write_object
from app.shared.notice import NOTICE
from app.shared.refusals import Refused
from app.shared.version import VERSION
from app.tokens.tokenizer import CTTokenizer, find_tokenizer
from app.training import checkpoints, seals
from app.training.shipped import COUNTS, RECORD, SUMS, WEIGHTS, with_sums

MAX_BYTES = 28_000_000
PLAIN = (int, float, bool, type(None))


def write_pretrained(
    out: str | Path, *, tokenizer: str | Path, credits_text: str, command: str, runs: list[str | Path] = ()
) -> dict[str, Any]:
    """The folder, and its record."""
    out, file = Path(out), find_tokenizer(tokenizer)
    if out.exists():
        raise Refused("EXISTS", f"{out} is there already", "give another place, or remove it first", status=2)
    state, sizes = checkpoints.read_weights(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside, out.name)
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(save(in_halves(state)))  # save_file writes what only its owner can read
        size = (folder / WEIGHTS).stat().st_size
        if size > MAX_BYTES:
            what = f"the weights take {size:,} bytes, {MAX_BYTES:,} may ship"
            raise Refused("BAD_VALUE", what, "train a smaller network")
        record = {
            "name": out.name,
            "version": VERSION,
            "file_sha256": hash_path(folder / WEIGHTS),
            "tokenizer_sha256": "",
            "bytes": size,
            "sizes": json.loads(bytes(sizes.to_tensor().tolist())),
            "command": command,
            "settings": {Path(run).name: settings_of(Path(run)) for run in runs},
        }
        write_object(folder / RECORD, record)
        record["tokenizer_sha256"] = CTTokenizer.from_pretrained(folder, device="cpu").digest
        write_object(folder / RECORD, record)
        (folder / "README.md").write_text(readme(record, credits_text), encoding="utf-8")
        os.replace(folder, out)
    return record


def in_halves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers rounded to float16 and sealed as they will be read back; counts as they are, without sums."""
    rounded = {name: value.half().float() if _is_halved(name, value) else value for name, value in state.items()}
    for name, value in rounded.items():
        if not value.isfinite().all():
            raise Refused("BAD_CHECKPOINT", f"{name} holds values beyond float16", "train with a lower learning rate")
    stored = {name: value for name, value in rounded.items() if not name.endswith(SUMS)}
    sealed = seals.sealed(with_sums(stored))
    return {
        name: (value.half() if _is_halved(name, value) else value).contiguous()
        for name, value in sealed.items()
        if name in stored
    }


def _is_halved(name: str, value: torch.Tensor) -> bool:
    """Counts of a codebook, which predict codes, go beyond what float16 holds."""
    return value.dtype == torch.float32 and not name.endswith(COUNTS)


def settings_of(run: Path) -> dict[str, Any]:
    """The flat keys of a run, without places and expressions."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN) or (isinstance(value, str) and not set(value) & set("/\\$@%"))


def readme(record: dict[str, Any], credits_text: str) -> str:
    sizes = record["sizes"]
    return "\n".join(
        [
            f"# {record['name']}",
            "",
            f"A tokenizer of CT: {sizes['resolution']}³ voxels of {sizes['spacing']:g} mm, "
            f"{sizes['quantizer_levels']} x {sizes['num_embeddings']} codes a cell, windows "
            f"{', '.join(sizes['windows'])}. float16, {record['bytes'] / 1e6:.1f} MB, version {record['version']}.",
            "",
            f"    voxelingo tokenize SCAN OUT --tokenizer {record['name']}",
            "",
            f"How good it is on patients it has not seen: tokenizer_card.md. {NOTICE}",
            "",
            f"sha256 of `{WEIGHTS}`: `{record['file_sha256']}`  ",
            f"sha256 of the weights, as token files name them: `{record['tokenizer_sha256']}`",
            "",
            "## How it was trained",
            "",
            f"Settings of {', '.join(record['settings']) or 'the runs'} stand in `{RECORD}`.",
            "",
            *(f"    {line}" for line in record["command"].splitlines()),
            "",
            credits_text.strip(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--tokenizer", required=True, help="output folder or checkpoint of the last stage")
    parser.add_argument("--credits", required=True, type=Path, help="Markdown: data, licences, credit")
    parser.add_argument("--command", required=True, help="the exact commands, a line each")
    parser.add_argument("--runs", nargs="*", default=[], help="output folders of all stages, for their settings")
    parser.add_argument("--dataset", help="prepared dataset for the card; none: no card")
    parser.add_argument("--split", default="val")
    parser.add_argument("--max-cases", type=int)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    text = given.credits.read_text(encoding="utf-8")
    how = {"credits_text": text, "command": given.command, "runs": given.runs}
    record = write_pretrained(given.out, tokenizer=given.tokenizer, **how)
    if given.dataset:
        judged = {"dataset_dir": given.dataset, "split": given.split, "max_cases": given.max_cases}
        TokenizerEvaluation(tokenizer=given.out, output_dir=given.out, **judged).run()
    print(json.dumps({key: record[key] for key in ("name", "bytes", "file_sha256", "tokenizer_sha256")}))


if __name__ == "__main__":
    main()
