"""A Qwen2-VL or Qwen3-VL of 2B shape with random weights, on disk in the published form, and text to align it to.

Tries alignment and asking at full size where nothing can be downloaded. Writes model/, tokenizer.pt (of preset `base`,
untrained), scans/ (token files) and text.jsonl:
python -m tests.benchmarks.make_qwen qwen3_vl FOLDER [--small]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig

from app.tokens.token_files import CTTokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from networks.qwen import FAMILIES, save_language, wrap_tokenizer
from networks.tiny_qwen import SPECIAL_TOKENS, SYSTEM_PROMPT, chat_template
from networks.tokens import cell_keys

FIRST_SPECIAL = 151643
COMMON = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN2 = {  # config.json of Qwen2-VL-2B-Instruct: flat
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_token_id": 151654,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
    **COMMON,
}
QWEN3 = {  # config.json of Qwen3-VL-2B-Instruct: nested
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    **COMMON,
}


def text_tokenizer(family: str):
    """Bytes and nothing learned, with the special tokens at their published ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"unused {number}" for number in range(FIRST_SPECIAL - len(alphabet))]
    bpe = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    made = wrap_tokenizer(
        bpe,
        end="<|im_end|>",
        pad="<|endoftext|>",
        special=list(SPECIAL_TOKENS),
        chat_template=chat_template(SYSTEM_PROMPT if family == "qwen2_vl" else None),
    )
    assert made.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|video_pad|>"]) == [151643, 151645, 151656]
    return made


def shrink(config: dict) -> dict:
    """The same config with small widths, to try this file on a CPU."""
    text = config.get("text_config", config)
    text |= {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1}
    vision = config["vision_config"]
    vision |= {"depth": 2, "num_heads": 2, "intermediate_size": 64, "deepstack_visual_indexes": [0, 1]}
    vision |= {"embed_dim": 64, "hidden_size": 256, "out_hidden_size": 256}
    return config


def write_model(family: str, folder: Path, *, small: bool) -> None:
    config = {"qwen2_vl": QWEN2, "qwen3_vl": QWEN3}[family]
    config = shrink(config) if small else config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        language = FAMILIES[family](AutoConfig.from_pretrained(folder))
    torch.set_default_dtype(torch.float32)
    language.generation_config.eos_token_id = [151645, 151643]
    language.generation_config.pad_token_id = 151643
    count = sum(p.numel() for p in language.parameters())
    made = time.perf_counter() - start
    save_language(language, text_tokenizer(family), folder)
    (folder / "config.json").write_text(json.dumps(config))  # in the published form again
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**30
    print(f"{family}: {count / 1e9:.3f} billion parameters made in {made:.1f} s, {size:.2f} GiB on disk", flush=True)


def write_text(folder: Path, *, rows: int = 8, latents: int = 9000) -> None:
    """Random tokens of a random tokenizer of preset `base`: far more than the budget, so that pooling has to act."""
    torch.manual_seed(0)
    network = make_vqvae("base")
    torch.save(network.state_dict(), folder / "tokenizer.pt")
    ct = CTTokenizer.from_pretrained(folder / "tokenizer.pt", device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    lines = []
    for number in range(rows):
        cells = rng.choice(32**3, latents, replace=False)
        coords = torch.from_numpy(np.stack([cells // 1024, cells // 32 % 32, cells % 32], 1).astype(np.int32))
        coords = coords[cell_keys(coords).argsort()].numpy()
        tokens = CTTokens(
            codes=rng.integers(0, ct.sizes.num_embeddings, latents).astype(np.int32),
            coords=coords,
            latent_shape=(32, 32, 32),
            affine=np.eye(4),
            source_shape=(256, 256, 256),
            source_affine=np.eye(4),
            features=ct.sizes.features,
            windows=ct.sizes.windows,
            spacing=float(ct.sizes.spacing),
            keep=ct.sizes.keep,
            tokenizer=ct.digest,
            support=None,
        )
        write_tokens(folder / f"scans/case{number}.npz", tokens)
        report = "The lungs are clear. No pleural effusion. " * 3
        lines.append({"image": f"scans/case{number}.npz", "report": report, "split": "train", "patient": f"p{number}"})
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    write_model(given.family, given.folder / "model", small=given.small)
    write_text(given.folder)


if __name__ == "__main__":
    main()
