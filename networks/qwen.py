"""A Qwen2-VL or Qwen3-VL that reads 3D tokens: features in, loss or answers out. Owns transformers and peft.

A batch is a dict: `input_ids`, `attention_mask`, `mask_3d` (B, L), `feats_3d` (M, D), `coords_3d` (M, 4) = (number of
the volume in the batch, x, y, z), one row for each True of `mask_3d` in reading order; `labels` for training;
`pixel_values` and `image_grid_thw` for ordinary images. Whether tokens stand in the user's turn or in front is the
batch's affair. Positions are always given: what the models guess from embeddings alone counts pads and reuses the
offsets of an earlier call.
"""

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    TextStreamer,
)
from transformers import logging as transformers_logging

from networks.projector import Projector

FAMILIES = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
POSITIONS = ("1d", "mrope3d")
IGNORED = -100  # label of a position that is not an answer
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class AnswerLoss(NamedTuple):
    loss: Float[Tensor, ""]  # mean over a sample's answer tokens, then over samples
    correct: Float[Tensor, ""]  # share of answer tokens predicted right
    num_tokens: int


class VolumeQwen(nn.Module):
    """A language model and the projector that feeds it. `language` may carry LoRA layers (see `add_lora`)."""

    def __init__(self, language: nn.Module, projector: Projector, *, position: str = "1d"):
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position}")
        if projector.last.out_features != language_width(language):
            raise ValueError(
                f"the projector writes width {projector.last.out_features}, "
                f"the language model reads {language_width(language)}"
            )
        self.language, self.projector, self.position = language, projector, position

    @property
    def device(self) -> torch.device:
        return self.projector.last.weight.device

    def forward(self, batch: dict) -> AnswerLoss:
        """Loss on answer positions only; no other logits are ever computed."""
        hidden = self.hidden_states(batch)
        wanted = batch["labels"][:, 1:] != IGNORED
        if not bool(wanted.any(1).all()):
            raise ValueError("every sample needs an answer token, got one whose labels are all -100")
        logits = self.language.lm_head(hidden[:, :-1][wanted]).float()
        labels = batch["labels"][:, 1:][wanted]
        share = wanted / wanted.sum(1, keepdim=True) / len(wanted)
        loss = (F.cross_entropy(logits, labels, reduction="none") * share[wanted]).sum()
        return AnswerLoss(loss, (logits.argmax(1) == labels).float().mean(), len(labels))

    def hidden_states(self, batch: dict) -> Float[Tensor, "B L E"]:
        """States after the last layer; `language.lm_head` makes them logits."""
        inputs = self.language_inputs(batch)
        return self.language.model(**inputs, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def generate(self, batch: dict, *, max_new_tokens: int = 256, streamer=None, **options) -> list[list[int]]:
        """New tokens of each sample, greedy unless `options` say otherwise, cut before the end token."""
        if not bool(batch["attention_mask"][:, -1].all()):
            raise ValueError("generation needs left-padded batches, got pads at the end")
        options = {"do_sample": False, **options}
        if not options["do_sample"]:  # the stock files carry sampling defaults that greedy search would warn about
            options |= {"temperature": None, "top_p": None, "top_k": None}
        inputs = self.language_inputs(batch)
        ends = self.end_tokens()
        options |= {"eos_token_id": ends, "pad_token_id": ends[0]}
        with torch.compiler.set_stance("force_eager"):  # one token at a time, with a cache that grows
            ids = self.language.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
        self.language.model.rope_deltas = None
        return [list(takewhile(lambda token: token not in ends, row)) for row in ids.tolist()]

    def end_tokens(self) -> list[int]:
        ends = self.language.generation_config.eos_token_id
        if ends is None:
            ends = self.language.config.get_text_config().eos_token_id
        return list(ends) if isinstance(ends, list | tuple) else [ends]

    def language_inputs(self, batch: dict) -> dict:
        """What the language model takes: embeddings with the volumes in place, mask, explicit positions, images."""
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        return {
            "inputs_embeds": self.embed(batch),
            "attention_mask": batch["attention_mask"],
            "position_ids": self.position_ids(batch),
            **images,
        }

    def embed(self, batch: dict) -> Float[Tensor, "B L E"]:
        """Text embeddings with each volume's projected tokens at its places."""
        mask, feats = batch["mask_3d"], batch["feats_3d"]
        if int(mask.sum()) != len(feats):
            raise ValueError(f"mask_3d marks {int(mask.sum())} positions, feats_3d has {len(feats)} rows")
        embeds = self.language.get_input_embeddings()(batch["input_ids"])
        if len(feats) == 0:
            return embeds
        tokens = self.projector(feats.to(self.projector.last.weight.dtype), batch["coords_3d"][:, 1:])
        return embeds.masked_scatter(mask[:, :, None], tokens.to(embeds.dtype))

    def position_ids(self, batch: dict) -> Int64[Tensor, "3 B L"]:
        """Rows t, h, w of M-RoPE. Text and, with `1d`, volumes count up; pads are never counted."""
        has_images = "image_grid_thw" in batch
        if self.position == "1d" and not has_images:
            line = (batch["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
            return line.expand(3, -1, -1)
        image_mask = batch["input_ids"] == self.language.config.image_token_id
        image_mask = image_mask & ~batch["mask_3d"] if has_images else torch.zeros_like(batch["mask_3d"])
        merge = self.language.config.vision_config.spatial_merge_size
        return mixed_positions(
            batch["attention_mask"].bool(),
            image_mask=image_mask,
            image_cells=(batch["image_grid_thw"] // torch.tensor([1, merge, merge]).to(image_mask.device)).tolist()
            if has_images
            else [],
            volume_mask=batch["mask_3d"] if self.position == "mrope3d" else torch.zeros_like(image_mask),
            coords=batch["coords_3d"],
        )


def mixed_positions(
    attention: Bool[Tensor, "B L"],
    *,
    image_mask: Bool[Tensor, "B L"],
    image_cells: list[list[int]],
    volume_mask: Bool[Tensor, "B L"],
    coords: Int[Tensor, "M 4"],
) -> Int64[Tensor, "3 B L"]:
    """Text counts up, images span (t, h, w) of their grid, volumes (z, y, x) of their cells; text goes on after."""
    positions = torch.zeros(3, *attention.shape, dtype=torch.long, device=attention.device)
    images, volume_row = iter(image_cells), 0
    for sample in range(attention.shape[0]):
        real = attention[sample].nonzero()[:, 0]
        kinds = (image_mask[sample, real].long() + 2 * volume_mask[sample, real].long()).tolist()
        parts, start, at = [], 0, 0
        while at < len(kinds):
            end = at
            while end < len(kinds) and kinds[end] == kinds[at]:
                end += 1
            if kinds[at] == 0:
                part = torch.arange(end - at).expand(3, -1)
            elif kinds[at] == 1:
                t, h, w = next(images)
                end = at + t * h * w
                part = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3).T
            else:  # neighbouring volumes (in front of the text nothing separates them) are told apart by their number
                same = (coords[volume_row : volume_row + end - at, 0] == coords[volume_row, 0]).long().cumprod(0)
                end = at + int(same.sum())
                part = coords[volume_row : volume_row + end - at, 1:].flip(1).T.long().cpu()
                volume_row += end - at
            parts.append(part + start)
            if kinds[at] == 1:  # as the stock models: the time axis of an image does not move the text on
                start += max(h, w)
            else:
                start = int(parts[-1].max()) + 1
            at = end
        positions[:, sample, real] = torch.cat(parts, 1).to(positions.device)
    return positions


def language_width(language: nn.Module) -> int:
    return language.config.get_text_config().hidden_size


def context_length(language: nn.Module) -> int:
    return language.config.get_text_config().max_position_embeddings


def embedding_spread(language: nn.Module) -> float:
    """Standard deviation of the text embeddings, what a fresh projector is scaled to."""
    return float(language.get_input_embeddings().weight.detach().float().std())


def family_of(name: str | Path) -> str:
    """Which Qwen-VL a hub name or path is, by its config alone; anything else raises."""
    try:
        family = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"vl_model must be a Qwen2-VL or Qwen3-VL by hub name or path, got {name}: {first}") from None
    if family not in FAMILIES:
        raise ValueError(f"vl_model must be a Qwen2-VL or Qwen3-VL, got {name} of type {family}")
    return family


def load_language(name: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """A stock Qwen-VL and its text tokenizer, by hub name or path. No remote code, safetensors only."""
    transformers_logging.disable_progress_bar()
    family = family_of(name)
    try:
        language = FAMILIES[family].from_pretrained(name, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"weights or tokenizer of {name} could not be loaded: {first}") from None
    check_tokenizer(tokenizer, language.config, name)
    return language, tokenizer


def check_tokenizer(tokenizer, config, name: str | Path) -> None:
    """That it is the model's own: where its files are missing, transformers makes an empty one without a word."""
    for token, wanted in (("<|image_pad|>", config.image_token_id), ("<|video_pad|>", config.video_token_id)):
        if (found := tokenizer.convert_tokens_to_ids(token)) != wanted:
            raise ValueError(f"the tokenizer of {name} is missing or another model's: {token} is {found}, not {wanted}")
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {name} has no chat template: its file chat_template.jinja is missing")


def save_language(language: nn.Module, tokenizer, folder: str | Path) -> None:
    """A folder that `load_language` and the stock classes open."""
    transformers_logging.disable_progress_bar()
    language.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def wrap_tokenizer(tokenizer, *, end: str, pad: str, special: list[str], chat_template: str):
    """A trained `tokenizers.Tokenizer` as the class that `load_language` returns."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, additional_special_tokens=special
    )
    wrapped.chat_template = chat_template
    return wrapped


def revision_of(language: nn.Module) -> str | None:
    """Commit of a model that came from the hub; None for one from a folder."""
    return getattr(language.config, "_commit_hash", None)


def use_checkpointing(language: nn.Module) -> None:
    """Recomputes each layer in backward; only active in training mode."""
    for layer in language.model.language_model.layers:
        layer.forward = partial(_recomputed, layer)


def _recomputed(layer: nn.Module, *args, **kwargs):
    forward = partial(type(layer).forward, layer)
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_layers(language: nn.Module, *, backend: str | Callable = "inductor") -> None:
    """Fuses the small operations of each layer, forward and backward, and keeps less between; batches of any length.

    One compilation serves all layers; each kind of batch has its own (padded or not, one sample or more). Generation
    goes on as before, and so does a forward pass that torch cannot compile: it says so. A backward pass that it cannot
    compile raises. The setting is torch's, of the whole process.
    """
    torch._dynamo.config.suppress_errors = True
    for layer in language.model.language_model.layers:
        layer.compile(dynamic=True, backend=backend)


def add_lora(language: nn.Module, *, r: int = 8, alpha: int = 32, dropout: float = 0.0) -> nn.Module:
    """Puts low-rank layers into the language part in place (never the image encoder); returns what saves them."""
    peft = import_peft()
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS)
    return peft.get_peft_model(language, config)


ADAPTER = "adapter_model.safetensors"


def load_lora(language: nn.Module, folder: str | Path) -> nn.Module:
    """Puts saved low-rank layers back, in place. From safetensors alone."""
    peft = import_peft()
    if not Path(folder, ADAPTER).is_file():  # peft would read a pickle instead, or ask the hub
        raise ValueError(f"low-rank layers of {folder} could not be loaded: there is no {ADAPTER}")
    try:
        return peft.PeftModel.from_pretrained(language, str(folder))
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"low-rank layers of {folder} could not be loaded: {first}") from None


def import_peft():
    try:
        import peft
    except ImportError:
        raise ValueError("use_lora needs the package peft, which is not installed: pip install peft") from None
    return peft


def stream_to(tokenizer, write):
    """A streamer that hands each finished piece of text to `write`."""

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
