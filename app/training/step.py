"""Training as MONAI's SupervisedTrainer runs it: one iteration, and what it takes: device, average, schedule.

Nothing here loops over steps: initial_weights.py is what comes before the first, handlers.py what hangs on each.
Randomness of a step is a function of (seed, step), so that a resumed run is the same run.
"""

import dataclasses
import logging
import math
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from app.training.host_copy import HostCopy
from app.training.kept_adamw import clip_gradients
from app.training.ranks import average_gradients, mean_of_ranks
from app.training.side_stream import SideStream
from app.training.voxel_runs import coords_of, num_voxels
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from networks.vqvae import SparseVQVAE
from transforms.grid import RESAMPLER

log = logging.getLogger(__name__)

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class SparseBatch:
    """`prepare_batch` of a tokenizer: a batch of `loaders.collate` on its device, windowed there, as networks take it.

    `windowing` ends the chain that a config declares. It runs here, for HU are an eighth of what would have to travel.
    A batch that brings features has been windowed.
    """

    def __init__(self, windowing: Callable[[dict[str, Any]], dict[str, Any]]):
        self.windowing = windowing

    def __call__(self, batch: dict, device: torch.device, non_blocking: bool = True) -> SparseTensor:
        name = "feats" if "feats" in batch else "values"
        moved = {name: batch[name].to(device, non_blocking=non_blocking)}
        feats = moved["feats"] if "feats" in moved else self.windowing(moved)["feats"]
        coords = coords_of(batch, device, non_blocking=non_blocking)
        return SparseTensor(feats, coords, tuple(batch["spatial_shape"]), batch["batch_size"])


def row_weights(batch: dict, x: SparseTensor) -> torch.Tensor | None:
    """How much each row counts in the reconstruction, where the batch says so."""
    if "weights" not in batch:
        return None
    device = x.feats.device
    rows = batch["weights"].to(device)[:, None]
    weights = SparseTensor(rows, coords_of(batch, device), x.spatial_shape, x.batch_size)
    return weights.feats[:, 0]


def seed_step(seed: int, step: int, *, rank: int = 0) -> None:
    """Random numbers of a step depend on nothing that happened before it."""
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)


def sample_seed(seed: int, step: int, case_id: str) -> int:
    """Of what is drawn for one sample, so that it does not matter what shares its batch."""
    return zlib.crc32(f"{seed}/{step}/{case_id}".encode())


class TrainStep:
    """`iteration_update`: all micro-batches of a step, then one optimizer step.

    Losses are known to handlers of BACKWARD_COMPLETED, which may end the run before anything has changed. What a
    micro-batch comes to, and in what it is counted, each kind of training says for itself.
    """

    def __init__(self, *, seed: int = 0, amp: str = "off", grad_clip: float | None = 1.0):
        if amp not in AMP_TYPES:
            raise ValueError(f"amp must be one of {', '.join(AMP_TYPES)}, got {amp!r}")
        self.seed, self.amp, self.grad_clip, self.beside = seed, AMP_TYPES[amp], grad_clip, SideStream()
        self.scaler = torch.amp.GradScaler(enabled=self.amp == torch.float16)
        self.begun = False

    def inputs(self, engine: SupervisedTrainer, part: dict) -> Any:
        """What the network reads of a micro-batch."""
        return engine.prepare_batch(part, engine.state.device)

    def terms(self, engine: SupervisedTrainer, inputs: Any, part: dict) -> dict[str, torch.Tensor]:
        """The `loss` of a micro-batch, a mean over its samples, and what else is to be told of it."""
        raise NotImplementedError

    def size(self, part: dict) -> dict[str, int]:
        """How much is in a micro-batch."""
        raise NotImplementedError

    def __call__(self, engine: SupervisedTrainer, batch: dict | list[dict]) -> dict:
        started = time.perf_counter()
        parts = batch if isinstance(batch, list) else [batch]
        samples = sum(len(part["case_id"]) for part in parts)
        seed_step(self.seed, engine.state.iteration, rank=idist.get_rank())
        if not (self.begun and engine.network.training):  # parts may have come as they evaluate
            engine.network.train()
            self.begun = True
        engine.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        sums: torch.Tensor | float = 0.0
        sizes: Counter[str] = Counter()
        for number, part in enumerate(parts, 1):
            with self.beside(engine.state.device):
                inputs = self.inputs(engine, part)
            with torch.autocast(engine.state.device.type, dtype=self.amp, enabled=self.amp is not None):
                terms = self.terms(engine, inputs, part)
            share = len(part["case_id"]) / samples
            names = list(terms)
            sums = sums + torch.stack([term.detach().float() for term in terms.values()]).double() * share
            sizes.update(self.size(part))
            if number == len(parts):  # they reach the host while the device is busy with the last backward
                read = HostCopy(sums, first=mean_of_ranks)
            if terms["loss"].requires_grad:
                self.scaler.scale(terms["loss"] * share).backward()
            self.beside.hold(inputs, engine.state.device)
        average_gradients(parameters_of(engine.optimizer))
        totals = dict(zip(names, read.tolist(), strict=True))
        engine.state.output = totals
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimize(engine)
        return {**totals, **sizes, "seconds": time.perf_counter() - started}

    def optimize(self, engine: SupervisedTrainer) -> None:
        step_optimizer(engine.optimizer, scaler=self.scaler, grad_clip=self.grad_clip)


class TokenizerStep(TrainStep):
    """The step of stages 0 to 2, with one update of the codebook.

    Args:
        quantize: whether the latents pass through the codebook.
        hold_encoder_steps: so many steps the encoder waits, while the decoder adapts to the codes.
        level_dropout: share of samples that are decoded from fewer quantiser levels than there are.
    """

    def __init__(
        self,
        *,
        quantize: bool,
        seed: int = 0,
        amp: str = "off",
        grad_clip: float | None = 1.0,
        hold_encoder_steps: int = 0,
        level_dropout: float = 0.0,
    ):
        super().__init__(seed=seed, amp=amp, grad_clip=grad_clip)
        self.quantize, self.hold_encoder_steps, self.level_dropout = quantize, hold_encoder_steps, level_dropout
        self.codes: list[torch.Tensor] = []  # of the last step

    def __call__(self, engine: SupervisedTrainer, batch: dict | list[dict]) -> dict:
        self.codes = []
        return super().__call__(engine, batch)

    def size(self, part: dict) -> dict[str, int]:
        return {"points": num_voxels(part)}

    def inputs(self, engine: SupervisedTrainer, part: dict) -> SparseTensor:
        x = super().inputs(engine, part)
        if isinstance(engine.network, SparseVQVAE):  # one of one's own makes its maps when it runs
            engine.network.prepare(x.level)
        return x

    def terms(self, engine: SupervisedTrainer, inputs: SparseTensor, part: dict) -> dict[str, torch.Tensor]:
        seeds = [sample_seed(self.seed, engine.state.iteration, case) for case in part["case_id"]]
        output = engine.network(inputs, quantize=self.quantize, seeds=seeds, level_dropout=self.level_dropout)
        if output.codes is not None:
            self.codes.append(output.codes)
        weights = row_weights(part, inputs)  # a loss of one's own need not know of them
        return engine.loss_function(output, inputs, **({} if weights is None else {"row_weights": weights}))

    def optimize(self, engine: SupervisedTrainer) -> None:
        network = engine.network
        if engine.state.iteration <= self.hold_encoder_steps:
            for parameter in network.encoder.parameters():
                parameter.grad = None
        super().optimize(engine)
        if network.vq is not None and self.quantize:
            network.vq.update(generator=torch.Generator().manual_seed(self.seed * 1_000_003 + engine.state.iteration))


def step_optimizer(optimizer: Optimizer, *, scaler: torch.amp.GradScaler, grad_clip: float | None) -> None:
    """One step along the gradients there are, clipped together; none where nothing has a gradient."""
    if any(parameter.grad is not None for parameter in parameters_of(optimizer)):
        scaler.unscale_(optimizer)
        if grad_clip is not None:
            clip_gradients(optimizer, max_norm=grad_clip)
        scaler.step(optimizer)
        scaler.update()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def to_train(
    network: SparseVQVAE, *, device: torch.device | str, learns: Sequence[str], grid: Sequence | None = None
) -> SparseVQVAE:
    """The network on its device, with only the named parts to learn; how its data came onto their grids is recorded."""
    grid = tuple(grid) if isinstance(grid, list) else grid  # as a config gives it
    network.sizes = dataclasses.replace(network.sizes, prepared=grid, resampler=RESAMPLER)
    let_learn(network, learns)
    return network.to(device)


def let_learn(network: SparseVQVAE, parts: Sequence[str]) -> None:
    """Fixes all parameters but those of the named parts."""
    known = dict(network.named_children())
    for name in parts:
        if name not in known:
            raise ValueError(f"learns must name parts among {', '.join(known)}, got {name!r}")
    for name, part in known.items():
        part.requires_grad_(name in parts)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def average(network: nn.Module, *, ema_rate: float) -> AveragedModel:
    """Averaged parameters with decay min(rate, (1 + n) / (10 + n)); buffers, so the codebook too, are copies."""

    def blend(averaged: list[torch.Tensor], current: list[torch.Tensor], _: torch.Tensor) -> None:
        n = int(model.n_averaged)  # on the CPU; the copy that torch hands over would have to be waited for
        torch._foreach_lerp_(averaged, current, 1 - min(ema_rate, (1 + n) / (10 + n)))

    model = _Average(network, multi_avg_fn=blend)
    return model


class _Average(AveragedModel):
    """torch's, which sorts parameters by device and copies buffers one by one at every step; here all lie together.

    Where parameters and buffers hang is found once: to walk through modules takes the host longer than to start the
    copies. What hangs there is looked up at each step, for a module may put another tensor in a buffer's place.
    """

    places: tuple[nn.Module, list[list[dict]], list[list[dict]]] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if self.places is None or self.places[0] is not model:
            both = [*self.module.modules()], [*model.modules()]
            parameters, buffers = (
                [[own for one in modules if (own := getattr(one, kind))] for modules in both]
                for kind in ("_parameters", "_buffers")
            )
            found = model, parameters, buffers
            object.__setattr__(self, "places", found)  # nn.Module would take the model for a part of its own
        _, *kinds = self.places
        (averaged, current), (buffers, given) = (
            [[value for own in part for value in own.values() if value is not None] for part in kind] for kind in kinds
        )
        if int(self.n_averaged):
            self.multi_avg_fn(averaged, current, self.n_averaged)
        else:
            torch._foreach_copy_(averaged, current)
        if buffers:
            torch._foreach_copy_(buffers, given)
        self.n_averaged += 1


def make_scheduler(
    optimizer: Optimizer, *, name: str, max_steps: int, warmup_lr_steps: int | None = None, options: dict | None = None
) -> lr_scheduler.LRScheduler:
    """cosine, one_cycle, constant, or any class of torch.optim.lr_scheduler with its options; the first two warm up."""
    warmup = round(0.02 * max_steps) if warmup_lr_steps is None else warmup_lr_steps
    if name not in ("cosine", "constant"):
        kind = lr_scheduler.OneCycleLR if name == "one_cycle" else getattr(lr_scheduler, name, None)
        if not (isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)):
            raise ValueError(f"lr_scheduler must be cosine, one_cycle, constant or a torch scheduler, got {name!r}")
        own = {"max_lr": optimizer.param_groups[0]["lr"], "total_steps": max_steps + 1} if name == "one_cycle" else {}
        try:
            make = partial(kind, **own, **(options or {}))
            _try_schedule(make, [group["lr"] for group in optimizer.param_groups], max_steps)
            return make(optimizer)
        except Exception as error:  # what torch says of arguments is one line
            reason = str(error) or type(error).__name__
            raise ValueError(f"lr_scheduler {name} with lr_scheduler_options {options}: {reason}") from None
    if options:
        raise ValueError(f"lr_scheduler {name} takes no lr_scheduler_options, got {options}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if name == "constant":
            return 1.0
        done = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

    return lr_scheduler.LambdaLR(optimizer, factor)


def _try_schedule(make: Callable[[Optimizer], lr_scheduler.LRScheduler], rates: list[float], max_steps: int) -> None:
    """Takes the first step and the last: some options are found wrong only there, the last after days."""
    stand_in = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])
    schedule = make(stand_in)
    stand_in.step()
    for step in (1, max_steps):
        schedule.last_epoch = step - 1
        schedule.step()


def resume_optimizer(optimizer: Optimizer, schedule: lr_scheduler.LRScheduler, stored: dict, *, step: int) -> None:
    """Loads what an optimizer gathered. Rates and other settings are those of this run, as if it had had them always.

    A schedule is a function of its settings and the number of steps: one just made is stepped there, to the bit.
    """
    groups = zip(optimizer.param_groups, stored["param_groups"], strict=True)
    own = [{**group, "params": before["params"]} for group, before in groups]
    optimizer.load_state_dict({**stored, "param_groups": own})
    with warnings.catch_warnings():  # torch misses a step of the optimizer before each
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(step):
            schedule.step()
    now, before = optimizer.param_groups[0]["lr"], stored["param_groups"][0]["lr"]
    if not math.isclose(now, before):
        what = "the schedule was brought to step %d with this run's settings: its rate is %.4g, it was %.4g"
        log.info(what, step, now, before)


class ValidationStep:
    """`iteration_update` of the evaluator: whole cases, no randomness, and the same with latents shuffled in the case.

    A decoder that reads shape off the coordinates alone gives the same error for both.
    """

    def __init__(self, *, quantize: bool, loss_function: TokenizerLoss, amp: str = "off"):
        self.quantize, self.loss_function, self.amp = quantize, loss_function, AMP_TYPES[amp]

    def __call__(self, engine: SupervisedEvaluator, batch: dict) -> dict:
        network = engine.network
        network.eval()
        x = engine.prepare_batch(batch, engine.state.device)
        with torch.no_grad(), torch.autocast(x.feats.device.type, dtype=self.amp, enabled=self.amp is not None):
            output = network(x, quantize=self.quantize)
            values = network.vq.lookup(output.codes) if output.codes is not None else output.latents.feats
            mixed, _ = network.decode_on(output.latents.replace(shuffled_rows(values, output.latents)), x.level)
            terms = self.loss_function(output, x)
            if output.codes is not None and output.codes.ndim == 2:
                first, _ = network.decode_on(output.latents.replace(network.vq.lookup(output.codes[:, 0])), x.level)
                terms["recon_level0"] = self.loss_function.reconstruction(first, x)
            terms["shuffled"] = self.loss_function.reconstruction(mixed, x)
        return {
            "terms": {name: float(term) for name, term in terms.items()},
            "codes": output.codes,
            "num_codes": network.sizes.num_embeddings,
            "windows": network.sizes.windows,
            "absolute_error": (output.recon.feats - x.feats.float()).abs().mean(0),
            "case_id": batch["case_id"],
            "input": x,
            "recon": output.recon,
            "latents": output.latents,
        }


def shuffled_rows(values: torch.Tensor, latents: SparseTensor) -> torch.Tensor:
    """Rows exchanged at random within each sample, the same way every time."""
    generator = torch.Generator().manual_seed(0)
    parts = values.split(latents.level.sample_sizes)
    return torch.cat([part[torch.randperm(len(part), generator=generator).to(part.device)] for part in parts])
