"""Tiny Qwen-VLs that read volumes, and batches for them."""

import torch
import torch._dynamo.testing

from app.language.chat import collate_chats, encode_chat
from networks.projector import Projector
from networks.qwen import (
    VolumeQwen,
    embedding_spread,
)
from networks.tiny_qwen import build_tiny
from networks.tokens import TokenSequence

TEXTS = ["Is there a nodule in the left lung?", "Yes, two nodules of 8 mm.", "No effusion is seen."] * 20
FAMILIES = ("qwen2_vl", "qwen3_vl")
WIDTH = 6
ATOL = 2e-5


def volume(num_tokens: int, seed: int) -> TokenSequence:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(512, generator=generator)[:num_tokens].sort().values
    coords = torch.stack([cells // 64, cells // 8 % 8, cells % 8], 1).int()
    return TokenSequence(torch.randn(num_tokens, WIDTH, generator=generator), coords, torch.ones(num_tokens).long())


def make_model(family: str, *, position: str = "1d", width: int = WIDTH) -> tuple[VolumeQwen, object]:
    language, tokenizer = build_tiny(TEXTS, family=family, width=32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        projector = Projector(width, 32, use_3d_pos=False)
        projector.match_scale(torch.randn(64, width), embedding_spread(language))
    return VolumeQwen(language, projector, position=position).eval(), tokenizer


def make_batch(
    tokenizer, samples: list[tuple[str, str | None, list[TokenSequence]]], *, fusion="placeholder", side="right"
):
    encoded = [
        {"volumes": volumes}
        | encode_chat(tokenizer, question, answer=answer, num_volumes=len(volumes), fusion=fusion)._asdict()
        for question, answer, volumes in samples
    ]
    pads = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])
    return collate_chats(encoded, pad_id=pads[0], volume_id=pads[1], side=side, context=4096)


THREE = [
    ("Is there a nodule?", "Yes, two.", [volume(9, 0)]),
    ("Where?", "No effusion is seen in the left lung.", [volume(20, 1), volume(5, 2)]),
    ("Is there a nodule in the left lung?", "No.", [volume(3, 3)]),
]
