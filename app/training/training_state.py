"""What a resumed run takes from its `misc_…` and `warmup_…` files, vetted before anything of the run changes.

Such a file is this run's where it is of the step that its name tells, its optimizer went over the same parameters with
finite moments of their shapes, and it is what was saved. Older files carry no hash.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.optim import Adam, Optimizer

from app.shared.refusals import Refused
from app.training import checkpoints, seals
from networks.presets import CHECKSUM

ADAM = {"step", "exp_avg", "exp_avg_sq"}


def read_state(path: Path, *, step: int, optimizer: Optimizer, counts: Sequence[str] = ()) -> dict:
    """A file's content. `counts` names whole numbers in it that are no more than the step."""
    stored = checkpoints.read_tensors(path)
    why = _why_not(stored, step, optimizer, counts)
    if why is None and stored.get(CHECKSUM) not in (None, seals.content_hash(stored)):
        why = "its content is not what was saved"
    if why is not None:
        raise Refused("BAD_CHECKPOINT", f"{path} cannot be gone on with ({why})", "use an older step, or begin again")
    return stored


def _why_not(stored: object, step: int, optimizer: Optimizer, counts: Sequence[str]) -> str | None:
    if not isinstance(stored, dict):
        return "it holds no named values"
    if type(stored.get("step")) is not int or stored["step"] != step:
        return f"it is of step {stored.get('step')!r:.40}"
    for name in counts:
        if type(stored.get(name)) is not int or not 0 <= stored[name] <= step:
            return f"{name} is {stored.get(name)!r:.40} at step {step}"
    scaler = stored.get("scaler")
    if not isinstance(scaler, dict) or not all(_is_number(value) and value >= 0 for value in scaler.values()):
        return "its scaler holds what is no number"
    try:
        return _why_not_optimizer(stored.get("optimizer"), step, optimizer)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        return f"its optimizer is no optimizer's: {type(error).__name__}"


def _why_not_optimizer(stored: dict, step: int, optimizer: Optimizer) -> str | None:
    groups, own = stored["param_groups"], optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in own]:
        return "its optimizer went over other parameters"
    if not all(_is_number(group["lr"]) for group in groups):
        return "its learning rate is no number"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_id = dict(zip((number for group in own for number in group["params"]), parameters, strict=True))
    states = stored["state"]
    if not states.keys() <= of_id.keys():
        return "its optimizer went over other parameters"
    if isinstance(optimizer, Adam) and ((step and not states) or not all(s.keys() >= ADAM for s in states.values())):
        return "moments of its optimizer are missing"
    for number, state in states.items():
        for name, value in state.items():
            if not _fits(name, value, of_id[number].shape, step):
                return f"{name!r:.40} of its optimizer does not fit parameter {number}"
    return None


def _fits(name: str, value: object, shape: torch.Size, step: int) -> bool:
    """Whether a value that an optimizer keeps of a parameter can be one."""
    if not isinstance(value, torch.Tensor):
        return value is None or (_is_number(value) and name not in ADAM)
    known = value.layout == torch.strided and value.shape in (torch.Size(), shape) and bool(value.isfinite().all())
    if not known:
        return False
    if name == "step":
        return value.ndim == 0 and 0 <= float(value) <= step
    return not name.endswith("_sq") or bool((value >= 0).all())


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check_parameters(stored: object, own: Mapping[str, torch.Tensor], *, path: str | Path) -> None:
    """Refuses weights that are not those of these parameters: other names, other shapes, no numbers."""
    names = stored.keys() if isinstance(stored, dict) else ()
    wrong = sorted(map(str, set(names) ^ set(own)))
    if not wrong:
        wrong = [name for name, value in own.items() if not _is_like(stored[name], value)]
    if wrong:
        what = f"{path} is not of the parameters that are trained here ({len(wrong)} differ, first {wrong[0]:.80})"
        raise Refused("BAD_CHECKPOINT", what, "use an older step, or begin again")


def _is_like(value: object, own: torch.Tensor) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.is_floating_point()
    return plain and value.shape == own.shape and bool(value.isfinite().all())
