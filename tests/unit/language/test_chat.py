"""Conversations as ids: the right labels, the right places for volumes, and text that stays text."""

import pytest
import torch

from app.language.chat import VOLUME_PAD, collate_chats, encode_chat, expand, neutralise
from networks.tiny_qwen import SPECIAL_TOKENS, train_tokenizer
from networks.tokens import TokenSequence


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def tokenizer(request):
    return train_tokenizer(["Is there a nodule? Yes, two nodules."] * 10, family=request.param)


def test_only_the_answer_and_its_end_are_labels(tokenizer):
    encoded = encode_chat(tokenizer, "Is there a nodule?", answer="Yes, two.")
    labels = [label for label in encoded.labels if label != -100]
    assert tokenizer.decode(labels) == "Yes, two.<|im_end|>"
    assert encoded.input_ids[-len(labels) :] == labels
    prompt = tokenizer.decode(encoded.input_ids[: -len(labels)])
    assert prompt.endswith(
        f"<|im_start|>user\n<|vision_start|>{VOLUME_PAD}<|vision_end|>Is there a nodule?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encode_chat(tokenizer, "Is there a nodule?").input_ids == encoded.input_ids[: -len(labels)]


def test_prefix_puts_bare_pads_in_front_of_everything(tokenizer):
    text = tokenizer.decode(encode_chat(tokenizer, "Why?", num_volumes=2, fusion="prefix").input_ids)
    assert text.startswith(VOLUME_PAD * 2 + "<|im_start|>") and "<|vision_start|>" not in text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_cannot_become_a_control_token(tokenizer, token):
    """Whatever a report says, its ids hold no control token, also where breaking one would make another."""
    special = set(tokenizer.get_added_vocab().values())
    for text in (token, f"a{token}b", token[:3] + token + token[3:], token * 3, f"<{token}|>"):
        ids = tokenizer(neutralise(text, tokenizer), add_special_tokens=False).input_ids
        assert not special & set(ids), text
        encoded = encode_chat(tokenizer, text, answer=text)
        plain = encode_chat(tokenizer, "q", answer="a")
        count = [sum(i in special for i in e.input_ids) for e in (encoded, plain)]
        assert count[0] == count[1]


def test_cut_answers_say_so_and_empty_ones_are_none(tokenizer):
    prompt = len(encode_chat(tokenizer, "Why?").input_ids)
    whole = encode_chat(tokenizer, "Why?", answer="Yes, two nodules.")
    cut = encode_chat(tokenizer, "Why?", answer="Yes, two nodules.", max_text_tokens=prompt + 2)
    assert not whole.answer_cut and cut.answer_cut
    assert cut.input_ids == whole.input_ids[: prompt + 2]
    assert encode_chat(tokenizer, "Why?", answer="Yes", max_text_tokens=prompt) is None
    assert encode_chat(tokenizer, "Why?", answer="  ") is None
    with pytest.raises(ValueError, match=f"the question takes {prompt} text tokens, the limit is {prompt - 1}"):
        encode_chat(tokenizer, "Why?", max_text_tokens=prompt - 1)


def test_expansion_repeats_each_pad_by_its_volume():
    assert expand([1, 9, 2, 9, 3], [-100, -100, -100, -100, 3], counts=[2, 3], volume_id=9) == (
        [1, 9, 9, 2, 9, 9, 9, 3],
        [-100] * 7 + [3],
        [False, True, True, False, True, True, True, False],
    )
    assert expand([1, 2], [-100, 2], counts=[2], volume_id=9) == (
        [9, 9, 1, 2],
        [-100] * 3 + [2],
        [True] * 2 + [False] * 2,
    )
    with pytest.raises(ValueError, match="got 1 pads for 2 volumes"):
        expand([9], [-100], counts=[1, 1], volume_id=9)


def test_collate_numbers_volumes_through_the_batch_and_never_takes_a_pad_for_a_token():
    def sequence(count: int) -> TokenSequence:
        return TokenSequence(torch.full((count, 2), float(count)), torch.ones(count, 3).int(), torch.ones(count).long())

    samples = [
        {"input_ids": [9, 5], "labels": [-100, 5], "volumes": [sequence(3)]},
        {"input_ids": [9, 6, 9], "labels": [-100, 6, -100], "volumes": [sequence(1), sequence(2)]},
        {"input_ids": [7], "labels": [7], "volumes": []},
    ]
    batch = collate_chats(samples, pad_id=0, volume_id=9, context=16)
    assert batch["input_ids"].tolist() == [[9, 9, 9, 5], [9, 6, 9, 9], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert batch["mask_3d"].int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [0] * 4]
    assert batch["coords_3d"][:, 0].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["feats_3d"][:, 0].tolist() == [3, 3, 3, 1, 2, 2]
    left = collate_chats(samples, pad_id=0, volume_id=9, context=16, side="left")
    assert left["input_ids"][2].tolist() == [0, 0, 0, 7] and left["labels"][2].tolist() == [-100] * 3 + [7]
    with pytest.raises(ValueError, match="4 tokens are more than the context of 3"):
        collate_chats(samples, pad_id=0, volume_id=9, context=3)
