"""Options of a request: what a viewer is shown, and what it sent as checked values.

A viewer shows a list as a choice whose first entry is the default, and sends back what was chosen, numbers as text.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from app.shared.refusals import Refused
from networks.presets import Preset
from transforms.windows import WINDOWS

HU = "HU"
MAX_NEW_TOKENS = 1024
MAX_LETTERS = 2000  # of a question
NIFTI = ".nii.gz"
OTHER_PLACE = (  # OHIF asks for NRRD, whose voxels it lays over the scan in its own order
    "where an answer rests is told as NIfTI alone: a viewer that reads voxels without their place in the world could "
    "show it on the wrong side"
)


class Options(NamedTuple):
    """`window`: None for HU. `levels`: of the quantiser, None for all."""

    window: str | None = None
    levels: int | None = None
    support: bool = False
    question: str | None = None
    max_3d_tokens: int | None = None
    max_new_tokens: int = 256


def shown(model: str, sizes: Preset, *, budget: int | None) -> dict[str, Any]:
    """What /info tells of a model. `budget` is what an aligned model was trained with, and the most it is given."""
    levels = list(range(sizes.quantizer_levels, 0, -1))
    about_tokens: dict[str, Any] = {"levels": levels} if len(levels) > 1 else {}
    if model == "tokenize":
        return {**about_tokens, "support": False}
    if model == "reconstruct":
        return {"window": [HU, *WINDOWS], **about_tokens}
    budgets = [budget >> halvings for halvings in range(4) if budget and budget >> halvings >= 8]
    text = {"max_3d_tokens": budgets, "max_new_tokens": Options().max_new_tokens}
    return text if model == "report" else {"question": "", **text}


def read(model: str, sent: Mapping[str, Any], offered: Mapping[str, Any]) -> Options:
    """What was sent for the options that the model offers, checked; what is missing is the default."""
    given = {name: sent[name] for name in offered if sent.get(name) not in (None, "", [])}
    if model == "show_answer" and str(sent.get("result_extension") or NIFTI) != NIFTI:
        raise Refused("BAD_VALUE", OTHER_PLACE, "ask on the server's page /answers")
    checked = {}
    for name, value in given.items():
        choices = offered[name] if isinstance(offered[name], list) else []
        first = value[0] if isinstance(value, list) else value  # a client that echoes a list of choices means its first
        checked[name] = _CHECKS[name](name, first, choices)
    if model == "ask" and not checked.get("question"):
        raise Refused("BAD_VALUE", "question is empty", "ask something, or take the model report")
    return Options(**checked)


def _window(name: str, value: Any, choices: list[Any]) -> str | None:
    if value not in choices:
        raise Refused("BAD_VALUE", f"{name} must be one of {', '.join(choices)}")
    return None if value == HU else value


def _whole(name: str, value: Any, choices: list[Any]) -> int:
    lowest, highest = (1, max(choices)) if choices else (1, MAX_NEW_TOKENS)
    number = int(value) if isinstance(value, int | str) and str(value).strip().isdecimal() else 0
    if isinstance(value, bool) or not lowest <= number <= highest:
        raise Refused("BAD_VALUE", f"{name} must be a whole number from {lowest} to {highest}")
    return number


def _flag(name: str, value: Any, choices: list[Any]) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise Refused("BAD_VALUE", f"{name} must be true or false")
    return str(value).lower() == "true"


def _text(name: str, value: Any, choices: list[Any]) -> str:
    if not isinstance(value, str) or len(value) > MAX_LETTERS:
        raise Refused("BAD_VALUE", f"{name} must be text of at most {MAX_LETTERS} letters")
    return value.strip()


_CHECKS = {
    "window": _window,
    "levels": _whole,
    "support": _flag,
    "question": _text,
    "max_3d_tokens": _whole,
    "max_new_tokens": _whole,
}
