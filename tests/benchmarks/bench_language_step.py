"""One alignment step at the shape of Qwen2-VL-2B: ours against the plain way, same batch, dtype and checkpointing.

The plain way is what the original recipe does: the stock model's own loss over the logits of all positions, features
encoded anew at each step, every prefix padded to the budget, layers as they come; ours is measured with its layers
compiled, as in training, and without. Asserts first that all give the same loss. Run on a GPU:
python tests/benchmarks/bench_language_step.py [projector] [lora]
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from networks import make_vqvae
from networks.projector import Projector
from networks.qwen import FAMILIES, VolumeQwen, add_lora, compile_layers, use_checkpointing
from networks.sparse import SparseTensor
from networks.tokens import reduce_tokens
from tests.benchmarks.shapes import body

SPATIAL_TOKENS, TEXT_TOKENS, ANSWER_TOKENS, BATCH, REPEATS = 2048, 128, 64, 2, 6


def build_2b() -> torch.nn.Module:
    """Random weights of the true shape; the image encoder is there too, as it takes memory."""
    config = FAMILIES["qwen2_vl"].config_class(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        language = FAMILIES["qwen2_vl"](config)
    torch.set_default_dtype(torch.float32)
    return language


def make_input(tokenizer: torch.nn.Module) -> SparseTensor:
    """Two whole scans at the preset's 256 voxels a side; their latents are far more than the budget."""
    coords = body(256).int()
    coords = coords[:, -3:].cpu()
    both = torch.cat([torch.nn.functional.pad(coords, (1, 0), value=sample) for sample in range(BATCH)]).cuda()
    generator = torch.Generator(device="cuda").manual_seed(0)
    feats = torch.rand(len(both), tokenizer.sizes.in_channels, device="cuda", generator=generator) * 2 - 1
    return SparseTensor(feats, both, (256, 256, 256), BATCH)


def make_batch(tokenizer: torch.nn.Module, x: SparseTensor) -> dict:
    with torch.no_grad():
        tokens = tokenizer.encode(x)
        feats = tokenizer.vq.lookup(tokens.codes)
    samples = [tokens.coords[:, 0] == sample for sample in range(BATCH)]
    kept = [reduce_tokens(feats[s], tokens.coords[s, 1:], max_tokens=SPATIAL_TOKENS) for s in samples]
    ids = torch.randint(0, 150000, (BATCH, SPATIAL_TOKENS + TEXT_TOKENS), device="cuda")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for sample, sequence in enumerate(kept):
        mask[sample, : len(sequence.feats)] = True
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mask_3d": mask,
        "labels": labels,
        "feats_3d": torch.cat([sequence.feats for sequence in kept]),
        "coords_3d": torch.cat([torch.nn.functional.pad(q.coords, (1, 0), value=n) for n, q in enumerate(kept)]),
    }


def ours(model: VolumeQwen, batch: dict, _encode) -> torch.Tensor:
    return model(batch).loss


def plain(model: VolumeQwen, batch: dict, encode) -> torch.Tensor:
    with torch.no_grad():
        batch = {**batch, "feats_3d": encode()}
    return model.language(
        inputs_embeds=model.embed(batch),
        attention_mask=batch["attention_mask"],
        position_ids=model.position_ids(batch),
        labels=batch["labels"],
        use_cache=False,
    ).loss


def eager(step):
    """A step whose layers are not compiled."""

    def run(*args) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return step(*args)

    return run


def measure(step, model: VolumeQwen, batch: dict, encode) -> dict:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    times = []
    for number in range(REPEATS + 2):
        if number == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step(model, batch, encode)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "first": times[0],
        "seconds": sorted(times[2:])[REPEATS // 2],
        "gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    torch.manual_seed(0)
    tokenizer = make_vqvae("base").cuda().eval().requires_grad_(False)
    x = make_input(tokenizer)
    batch = make_batch(tokenizer, x)

    def encode() -> torch.Tensor:
        """Encodes anew, then gives the same rows as ours: the original would cut instead of pooling."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            tokenizer.vq.lookup(tokenizer.encode(x).codes)
        return batch["feats_3d"]

    def cached() -> torch.Tensor:
        return batch["feats_3d"]

    language = build_2b()
    compile_layers(language)
    ways = {"ours": (ours, encode), "not compiled": (eager(ours), encode), "plain": (eager(plain), encode)}
    ways["plain, cached"] = (eager(plain), cached)
    rows = []
    for lora in [word == "lora" for word in sys.argv[1:] or ("projector", "lora")]:
        language.requires_grad_(False)
        if lora:
            add_lora(language, dropout=0.0)
        model = VolumeQwen(language, Projector(tokenizer.sizes.latent_channels, 1536).cuda())
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            pair = [float(step(model.eval(), batch, cached)) for step, _ in ways.values()]
        assert max(pair) - min(pair) < 0.02 * pair[-1], pair
        model.train()
        for checkpointing in (True, False):
            if checkpointing:
                use_checkpointing(language)
            else:
                for layer in language.model.language_model.layers:
                    layer.__dict__.pop("forward", None)
            row = {name: measure(step, model, batch, features) for name, (step, features) in ways.items()}
            fast, slow = row["ours"], row["plain"]
            row |= {"speedup": slow["seconds"] / fast["seconds"], "memory": fast["gib"] / slow["gib"]}
            rows.append({"lora": lora, "checkpointing": checkpointing, **row})
            told = ", ".join(f"{name} {row[name]['seconds'] * 1e3:.0f} ms {row[name]['gib']:.1f} GiB" for name in ways)
            print(
                f"lora {lora!s:5} checkpointing {checkpointing!s:5}: {told}: "
                f"{row['speedup']:.2f}x as fast, {row['memory']:.2f} of the memory, "
                f"first step {fast['first']:.0f} s",
                flush=True,
            )
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "points": len(x),
                "latents": len(tokenizer.encode(x).codes),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
