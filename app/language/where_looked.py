"""Where an answer rests: each place of a volume is made featureless in turn, and the answer becomes likelier or less.

A place is a token, or a group of neighbouring ones where there are many. Featureless: its vectors are the volume's
mean, so that nothing else of what the model reads changes. Says what an answer hangs on, not whether that is right.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from app.language import chat
from app.language.align_setup import make_collate
from app.language.align_training import to_device
from app.language.assistant import CTAssistant
from networks.qwen import IGNORED
from networks.tokens import TokenSequence, cell_keys, group_tokens

MAX_PLACES = 128  # a forward pass each
BATCH_SIZE = 8


class Occlusion(NamedTuple):
    """`loss`: by how much the answer's log-probability falls without each token; above 0 it speaks for the answer."""

    probability: float  # of the answer, with the whole volume
    lowest: float  # of the answer, without the place that it needs most
    loss: Float[Tensor, " T"]
    coords: Int32[Tensor, "T 3"]  # latent cells


def where_looked(assistant: CTAssistant, question: str, answer: str, volume: TokenSequence) -> Occlusion | None:
    """None for an answer without words."""
    settings = {name: assistant.settings[name] for name in ("fusion", "max_text_tokens")}
    encoded = chat.encode_chat(assistant.text_tokenizer, question, answer=answer, **settings)
    if encoded is None:
        return None
    keys, order = cell_keys(volume.coords).sort(stable=True)  # cells that a detector shows come before the others
    place = torch.empty_like(keys).index_copy_(0, order, group_tokens(keys, MAX_PLACES))
    without = [assistant.reduce.without(volume, place == number) for number in range(int(place.max()) + 1)]
    scores = log_probabilities(assistant, encoded, [volume, *without])
    loss = scores[0] - scores[1:]
    return Occlusion(float(scores[0].exp()), float(scores[1:].min().exp()), loss[place], volume.coords)


@torch.inference_mode()
def log_probabilities(
    assistant: CTAssistant, encoded: chat.Encoded, volumes: list[TokenSequence]
) -> Float[Tensor, " volumes"]:
    """Of the same answer to the same question beside each volume, summed over the answer's tokens."""
    collate = make_collate(assistant.model.language, assistant.text_tokenizer)
    scores = []
    for at in range(0, len(volumes), BATCH_SIZE):
        samples = [{**encoded._asdict(), "volumes": [volume]} for volume in volumes[at : at + BATCH_SIZE]]
        batch = to_device(collate(samples), assistant.model.device)
        wanted = batch["labels"][:, 1:] != IGNORED
        hidden = assistant.model.hidden_states(batch)[:, :-1][wanted]
        predicted = torch.log_softmax(assistant.model.language.lm_head(hidden).float(), 1)
        labels: Int64[Tensor, " tokens"] = batch["labels"][:, 1:][wanted]
        scores.append(predicted.gather(1, labels[:, None]).reshape(len(samples), -1).sum(1).cpu())
    return torch.cat(scores)
