"""Conversations as token ids with a place for each volume, and batches of them.

Uses the model's own chat template; text that people wrote (questions, reports, choices) is data and can never become a
control token. One volume pad a volume in the ids; `collate_chats` expands it to the volume's tokens and marks them in
`mask_3d`, so that neither a pad nor an image is ever taken for a token. Knows no files and no models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.qwen import IGNORED
from networks.tokens import TokenSequence

VOLUME_PAD = "<|video_pad|>"  # a volume stands where the stock models put a video; images keep their own pad
VOLUME = f"<|vision_start|>{VOLUME_PAD}<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
FUSIONS = ("placeholder", "prefix")


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # IGNORED except on the answer
    answer_cut: bool


def neutralise(text: str, tokenizer) -> str:
    """Breaks every control token in the text with a space, so that it is read as plain characters."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_chat(
    tokenizer,
    question: str,
    *,
    answer: str | None = None,
    num_volumes: int = 1,
    words: str | None = None,
    image_tokens: Sequence[int] = (),
    fusion: str = "placeholder",
    max_text_tokens: int = 1024,
) -> Encoded | None:
    """Ids of one question, with the answer and its end token as labels where there is one.

    `words` stand where a volume would and say what it shows: so a model can learn to read before it learns to see.
    None where nothing of the answer would be left within `max_text_tokens`; a question that long raises.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion}")
    images = "".join(f"<|vision_start|>{IMAGE_PAD * count}<|vision_end|>" for count in image_tokens)
    volumes = VOLUME * num_volumes if fusion == "placeholder" else VOLUME_PAD * num_volumes
    if words is not None:
        volumes += VOLUME.replace(VOLUME_PAD, neutralise(words, tokenizer))
    content = images + neutralise(question, tokenizer)
    messages = [{"role": "user", "content": volumes + content if fusion == "placeholder" else content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if fusion == "prefix":
        prompt = volumes + prompt
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if len(prompt_ids) - sum(image_tokens) > max_text_tokens:
        raise ValueError(f"the question takes {len(prompt_ids)} text tokens, the limit is {max_text_tokens}")
    if answer is None:
        return Encoded(prompt_ids, [IGNORED] * len(prompt_ids), False)
    answer = neutralise(answer, tokenizer).strip()
    answer_ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    room = max_text_tokens - len(prompt_ids) + sum(image_tokens)
    if not answer or room < 1:
        return None
    kept = answer_ids[:room]
    return Encoded(prompt_ids + kept, [IGNORED] * len(prompt_ids) + kept, len(kept) < len(answer_ids))


def expand(
    ids: Sequence[int], labels: Sequence[int], *, counts: Sequence[int], volume_id: int
) -> tuple[list[int], list[int], list[bool]]:
    """Repeats the pad of each volume `counts` times; ids without any pad get all volumes in front."""
    num_pads = sum(token == volume_id for token in ids)
    if num_pads == 0:
        front = sum(counts)
        return [volume_id] * front + list(ids), [IGNORED] * front + list(labels), [True] * front + [False] * len(ids)
    if num_pads != len(counts):
        raise ValueError(f"ids must hold one volume pad a volume, got {num_pads} pads for {len(counts)} volumes")
    remaining = iter(counts)
    out_ids, out_labels, mask = [], [], []
    for token, label in zip(ids, labels, strict=True):
        repeat = next(remaining) if token == volume_id else 1
        out_ids += [token] * repeat
        out_labels += [label] * repeat
        mask += [token == volume_id] * repeat
    return out_ids, out_labels, mask


def collate_chats(samples: Sequence[dict], *, pad_id: int, volume_id: int, side: str = "right", context: int) -> dict:
    """Pads samples of {`input_ids`, `labels`, `volumes`: TokenSequences} to one batch; left for generation."""
    rows = []
    for sample in samples:
        counts = [len(volume.feats) for volume in sample["volumes"]]
        rows.append(expand(sample["input_ids"], sample["labels"], counts=counts, volume_id=volume_id))
    length = max(len(ids) for ids, _, _ in rows)
    if length > context:
        raise ValueError(f"{length} tokens are more than the context of {context}: lower max_3d_tokens or the text")

    def stack(parts: list[list], fill, dtype: torch.dtype) -> Tensor:
        pads = [[fill] * (length - len(part)) for part in parts]
        padded = [part + pad if side == "right" else pad + part for part, pad in zip(parts, pads, strict=True)]
        return torch.tensor(padded, dtype=dtype)

    ids, labels, masks = ([row[part] for row in rows] for part in range(3))
    volumes = [volume for sample in samples for volume in sample["volumes"]]
    return {
        "input_ids": stack(ids, pad_id, torch.long),
        "attention_mask": stack([[1] * len(row) for row in ids], 0, torch.long),
        "labels": stack(labels, IGNORED, torch.long),
        "mask_3d": stack(masks, False, torch.bool),
        "feats_3d": torch.cat([volume.feats for volume in volumes]) if volumes else torch.zeros(0, 0),
        "coords_3d": torch.cat([numbered(*pair) for pair in enumerate(volumes)])
        if volumes
        else torch.zeros(0, 4).int(),
        "case_id": [sample.get("case_id", "") for sample in samples],
    }


def numbered(number: int, volume: TokenSequence) -> Tensor:
    """Coordinates with the volume's number in the batch in front."""
    return torch.nn.functional.pad(volume.coords, (1, 0), value=number)
