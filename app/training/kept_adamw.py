"""AdamW whose fused step, with the clipping before it, goes over lists that are kept from step to step.

At every step torch gathers parameters, gradients, moments and counts of steps anew, and sorts them by device and type:
over a hundred parameters that takes the host several times longer than to start the kernels. Those are the same here,
over the same tensors, so that weights and moments are the same to the bit; counts of steps lie in one vector, which one
kernel raises, and `state` has its elements. What does not fit takes torch's way.
"""

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


class _Lists(NamedTuple):
    """What learned at the step at which they were made."""

    state: dict  # of the optimizer; to load a state puts another in its place
    all_parameters: list[Tensor]
    idle: list[bool]  # whether each of all had no gradient
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    counts: Tensor  # these steps as a vector, in the same memory


class KeptAdamW(AdamW):
    """torch's AdamW to the bit, and in its checkpoints. Faster where it is fused and all it learns is in one group."""

    _lists: _Lists | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        grads = self.kept_gradients() if closure is None else None
        if grads is None:
            # without what torch hangs around a class's step, which hangs around this one already: hooks run once
            plain = AdamW.step.__wrapped__ if getattr(AdamW.step, "hooked", False) else AdamW.step
            loss = plain(self, closure)
            self._lists = self._make_lists()
            return loss
        kept, group = self._lists, self.param_groups[0]
        marks = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # GradScaler sets them
        scale, overflow = (None if mark is None else mark.to(kept.counts.device) for mark in marks)
        kept.counts.add_(1)
        torch._fused_adamw_(  # what AdamW itself calls: no public function takes lists without sorting them
            kept.parameters,
            grads,
            kept.means,
            kept.squares,
            [],
            kept.steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=scale,
            found_inf=overflow,
        )
        if overflow is not None:
            kept.counts.sub_(overflow)
        return None

    def kept_gradients(self) -> list[Tensor] | None:
        """Gradients in the order of the lists; None where there are no lists for what has a gradient now."""
        kept = self._lists
        if kept is None or kept.state is not self.state or not self._fits():
            return None
        parameters = self.param_groups[0]["params"]
        grads = [parameter.grad for parameter in parameters]
        if [grad is None for grad in grads] != kept.idle or not all(map(is_, parameters, kept.all_parameters)):
            return None
        return grads if len(kept.parameters) == len(grads) else [grad for grad in grads if grad is not None]

    def _fits(self) -> bool:
        """Whether torch would take the step in one call, as this class does."""
        group = self.param_groups[0]
        other = group["amsgrad"] or group["capturable"] or not group["decoupled_weight_decay"]
        plain = all(type(value) in (int, float) for value in (group["lr"], *group["betas"]))
        return len(self.param_groups) == 1 and bool(group["fused"]) and plain and not other

    def _make_lists(self) -> _Lists | None:
        """For the same parameters at later steps, after torch's own has made what was missing of their state."""
        if not self._fits():
            return None
        everything = list(self.param_groups[0]["params"])
        parameters = [parameter for parameter in everything if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        held = [*parameters, *means, *squares]
        kinds = {(value.device, value.dtype) for value in held} | {(s.device, parameters[0].dtype) for s in steps}
        classes = {type(value) for value in (*held, *(parameter.grad for parameter in parameters))}
        if len(kinds) != 1 or not classes <= {Tensor, nn.Parameter} or parameters[0].device.type not in ("cpu", "cuda"):
            return None
        counts = torch.stack(steps)
        steps = list(counts.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        idle = [parameter.grad is None for parameter in everything]
        return _Lists(self.state, everything, idle, parameters, means, squares, steps, counts)


@torch.no_grad()
def clip_gradients(optimizer: Optimizer, *, max_norm: float) -> None:
    """`clip_grad_norm_` over all that an optimizer learns, to the bit: norms of parameters, and of these the norm."""
    grads = optimizer.kept_gradients() if isinstance(optimizer, KeptAdamW) else None
    if grads is None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
        return
    norms = torch._foreach_norm(grads, 2.0)  # as clip_grad_norm_ does once it has sorted them
    total = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    torch._foreach_mul_(grads, torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))
