"""A Qwen2-VL or Qwen3-VL of true architecture and a fraction of a million weights, its tokenizer learned on the spot.

For tests, dummy data and the demo: the same classes, special tokens and chat format as the published models, so that
whatever runs here runs there. Knows no phantoms and trains nothing but the tokenizer.
"""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from networks.qwen import FAMILIES, wrap_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"  # words with their space, single digits, signs, white space
SYSTEM_PROMPT = "You are a helpful assistant."


def chat_template(system: str | None) -> str:
    """Jinja source of the Qwen chat format: `<|im_start|>role`, newline, text, `<|im_end|>`, newline, for each turn."""
    default = (
        "{%- if loop.first and message.role != 'system' -%}{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}"
        "{%- endif -%}"
        if system
        else ""
    )
    return (
        "{%- for message in messages -%}" + default + "{{ '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.content is string -%}{{ message.content }}"
        "{%- else -%}{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
        "{%- else -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def train_tokenizer(texts: Iterable[str], *, family: str = "qwen2_vl", vocab_size: int = 512):
    """Byte-level BPE with Qwen's special tokens: any text can be written, nothing is unknown."""
    bpe = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return wrap_tokenizer(
        bpe,
        end="<|im_end|>",
        pad="<|endoftext|>",
        special=list(SPECIAL_TOKENS),
        chat_template=chat_template(SYSTEM_PROMPT if family == "qwen2_vl" else None),
    )


def build_tiny(
    texts: Iterable[str],
    *,
    family: str = "qwen2_vl",
    width: int = 64,
    num_layers: int = 2,
    vocab_size: int = 512,
    seed: int = 0,
) -> tuple[nn.Module, object]:
    """A randomly initialised tiny model and a tokenizer trained on `texts`; the same seed gives the same weights."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family}")
    tokenizer = train_tokenizer(texts, family=family, vocab_size=vocab_size)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    head = 16
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": width // head,
        "num_key_value_heads": max(1, width // head // 2),
        "max_position_embeddings": 4096,
        "initializer_range": width**-0.5,  # 0.02 is for wide models; here attention would start flat and stay so
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    if family == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": width, "num_heads": 2, "patch_size": 4}
    else:
        text |= {"head_dim": head}
        text["rope_parameters"] |= {"mrope_interleaved": True}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
        vision |= {"out_hidden_size": width, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = FAMILIES[family].config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language = FAMILIES[family](config)
    language.generation_config.eos_token_id = ids["<|im_end|>"]
    language.generation_config.pad_token_id = ids["<|endoftext|>"]
    return language.eval(), tokenizer
