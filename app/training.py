"""Training as MONAI's SupervisedTrainer runs it: one iteration, what starts and freezes a network, and the handlers.

Nothing here loops over steps or saves the engine. Randomness of a step is a function of (seed, step), so that a resumed
run is the same run: the trainer's iteration is the step, and batches come from a sampler that starts anywhere.
"""

import copy
import logging
import math
import os
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from app import checkpoints
from app.checkpoints import unwrapped
from app.preflight import fail, one_line_errors
from networks.losses import TokenizerLoss, reconstruction
from networks.quantizer import MIN_VECTORS_PER_CODE
from networks.sparse import SparseTensor
from networks.vqvae import SparseVQVAE

log = logging.getLogger(__name__)

MAX_PASSES = 16  # over the cases, each drawn anew, to fill a codebook at the start
FUNCTIONS_OF_STEP = (lr_scheduler.LambdaLR, lr_scheduler.OneCycleLR)
AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def to_sparse(batch: dict, device: torch.device) -> SparseTensor:
    """The batch dictionary of `app.data.collate` as the networks take it."""
    feats, coords = (batch[key].to(device, non_blocking=True) for key in ("feats", "coords"))
    return SparseTensor(feats, coords, tuple(batch["spatial_shape"]), batch["batch_size"])


def seed_step(seed: int, step: int, *, rank: int = 0) -> None:
    """Random numbers of a step depend on nothing that happened before it."""
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)


def sample_seed(seed: int, step: int, case_id: str) -> int:
    """Of what is drawn for one sample, so that it does not matter what shares its batch."""
    return zlib.crc32(f"{seed}/{step}/{case_id}".encode())


class TrainStep:
    """`iteration_update`: all micro-batches of a step, then one optimizer step and one codebook update."""

    def __init__(
        self,
        *,
        quantize: bool,
        seed: int = 0,
        amp: str = "off",
        grad_clip: float | None = 1.0,
        hold_encoder_steps: int = 0,
    ):
        if amp not in AMP_TYPES:
            raise ValueError(f"amp must be one of {', '.join(AMP_TYPES)}, got {amp!r}")
        self.quantize, self.seed, self.amp, self.grad_clip = quantize, seed, AMP_TYPES[amp], grad_clip
        self.hold_encoder_steps = hold_encoder_steps  # the decoder adapts to the codes first
        self.scaler = torch.amp.GradScaler(enabled=self.amp == torch.float16)

    def __call__(self, engine: SupervisedTrainer, batch: dict | list[dict]) -> dict:
        started = time.perf_counter()
        parts = batch if isinstance(batch, list) else [batch]
        samples = sum(part["batch_size"] for part in parts)
        seed_step(self.seed, engine.state.iteration, rank=idist.get_rank())
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        sums: torch.Tensor | float = 0.0
        points = 0
        for part in parts:
            x = to_sparse(part, engine.state.device)
            with torch.autocast(engine.state.device.type, dtype=self.amp, enabled=self.amp is not None):
                seeds = [sample_seed(self.seed, engine.state.iteration, case) for case in part["case_id"]]
                terms = engine.loss_function(engine.network(x, quantize=self.quantize, seeds=seeds), x)
            share = part["batch_size"] / samples
            if terms["loss"].requires_grad:
                self.scaler.scale(terms["loss"] * share).backward()
            names = list(terms)
            sums = sums + torch.stack([term.detach().double() for term in terms.values()]) * share
            points += len(x)
        self._optimize(engine)
        totals = mean_of_ranks(dict(zip(names, sums.tolist(), strict=True)))  # waits for the device, once
        case_ids = [case for part in parts for case in part["case_id"]]
        self._stop_if_not_finite(engine, totals, case_ids)
        return {**totals, "points": points, "seconds": time.perf_counter() - started}

    def _optimize(self, engine: SupervisedTrainer) -> None:
        if engine.state.iteration <= self.hold_encoder_steps:
            for parameter in unwrapped(engine.network).encoder.parameters():
                parameter.grad = None
        learned = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if learned:
            self.scaler.unscale_(engine.optimizer)
            if self.grad_clip is not None:
                nn.utils.clip_grad_norm_(learned, self.grad_clip)
            self.scaler.step(engine.optimizer)
            self.scaler.update()
        vq = unwrapped(engine.network).vq
        if vq is not None and self.quantize:
            vq.update(generator=torch.Generator().manual_seed(self.seed * 1_000_003 + engine.state.iteration))

    @staticmethod
    def _stop_if_not_finite(engine: Engine, totals: dict[str, float], case_ids: list[str]) -> None:
        if not math.isfinite(totals["loss"]):
            last = getattr(engine, "last_saved_step", None)
            kept = f"the last checkpoint is step {last}" if last is not None else "no checkpoint exists yet"
            fail(
                "NOT_FINITE",
                f"loss is {totals['loss']} at step {engine.state.iteration} on cases {', '.join(case_ids)}; {kept}",
                "resume from it with a lower learning_rate, or check these cases with `python -m app check`",
                status=1,
            )


def mean_of_ranks(totals: dict[str, float]) -> dict[str, float]:
    """Every rank has as many samples, so the mean over ranks is the mean over samples."""
    if idist.get_world_size() == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64, device=idist.device())
    values = idist.all_reduce(values) / idist.get_world_size()
    return dict(zip(totals, values.tolist(), strict=True))


class ProcessGroup:
    """Joined before anything else of a run that torchrun started, left at its end."""

    def join(self) -> None:
        if "RANK" not in os.environ:
            fail(
                "NO_TORCHRUN",
                "bundles/multi_gpu.json runs under torchrun",
                "torchrun --nproc_per_node=N -m monai.bundle …",
            )
        if not dist.is_initialized():
            choose_device()
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            one_line_errors()  # torch has put its own hook before ours
        if dist.get_rank() != 0:  # one voice on the console
            logging.getLogger().setLevel(logging.WARNING)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def distribute(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over ranks, where there are several."""
    if idist.get_world_size() == 1 or not trainable(network):
        return network
    with warnings.catch_warnings():  # the argument's new name is not in every torch we support
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def freeze(network: SparseVQVAE, parts: Iterable[str]) -> SparseVQVAE:
    """The network with some of its parts fixed. Has to come before the optimizer."""
    for name in parts:
        for parameter in getattr(network, name).parameters():
            parameter.requires_grad_(False)
    return network


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def average(network: nn.Module, *, ema_rate: float) -> AveragedModel:
    """Averaged parameters with decay min(rate, (1 + n) / (10 + n)); buffers, so the codebook too, are copies."""

    def blend(averaged: list[torch.Tensor], current: list[torch.Tensor], _: torch.Tensor) -> None:
        n = int(model.n_averaged)  # on the CPU; the copy that torch hands over would have to be waited for
        torch._foreach_lerp_(averaged, current, 1 - min(ema_rate, (1 + n) / (10 + n)))

    model = AveragedModel(unwrapped(network), multi_avg_fn=blend)
    return model


def make_scheduler(
    optimizer: Optimizer, *, name: str, max_steps: int, warmup_lr_steps: int | None = None, options: dict | None = None
) -> lr_scheduler.LRScheduler:
    """cosine, one_cycle, constant, or any class of torch.optim.lr_scheduler with its options; the first two warm up."""
    warmup = round(0.02 * max_steps) if warmup_lr_steps is None else warmup_lr_steps
    if name == "one_cycle":
        peak = optimizer.param_groups[0]["lr"]
        return lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=max_steps + 1, **(options or {}))
    if name not in ("cosine", "constant"):
        kind = getattr(lr_scheduler, name, None)
        if not (isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)):
            raise ValueError(f"lr_scheduler must be cosine, one_cycle, constant or a torch scheduler, got {name!r}")
        return kind(optimizer, **(options or {}))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if name == "constant":
            return 1.0
        done = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

    return lr_scheduler.LambdaLR(optimizer, factor)


def resume_schedule(schedule: lr_scheduler.LRScheduler, stored: dict, *, step: int) -> None:
    """Takes a schedule to a step. Ours are functions of the step, so that this run's rate and length count."""
    if not isinstance(schedule, FUNCTIONS_OF_STEP):
        schedule.load_state_dict(stored)
    elif step > 0:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step - 1, "_step_count": step})
        schedule.step()


def resume_optimizer(optimizer: Optimizer, stored: dict, *, keep_settings: bool) -> None:
    """Loads what an optimizer gathered; with `keep_settings` its rates stay those of this run's config."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(stored)
    if keep_settings:
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)


class ValidationStep:
    """`iteration_update` of the evaluator: whole cases, no randomness, and the same with latents shuffled in the case.

    A decoder that reads shape off the coordinates alone gives the same error for both.
    """

    def __init__(self, *, quantize: bool, loss_function: TokenizerLoss, amp: str = "off"):
        self.quantize, self.loss_function, self.amp = quantize, loss_function, AMP_TYPES[amp]

    def __call__(self, engine: SupervisedEvaluator, batch: dict) -> dict:
        network = unwrapped(engine.network)
        network.eval()
        x = to_sparse(batch, engine.state.device)
        with torch.no_grad(), torch.autocast(x.feats.device.type, dtype=self.amp, enabled=self.amp is not None):
            output = network(x, quantize=self.quantize)
            values = network.vq.lookup(output.codes) if output.codes is not None else output.latents.feats
            mixed, _ = network.decode_on(output.latents.replace(shuffled_rows(values, output.latents)), x.level)
            terms = self.loss_function(output, x)
            terms["shuffled"] = reconstruction(mixed, x, loss_type=self.loss_function.loss_type)
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


class CodebookStart:
    """What stage 1 needs before its first step: a trained autoencoder, and a codebook laid over its outputs.

    Weights come from `pretrained_vae_path` (auto: stage 0's output where there is one); without any, the autoencoder is
    trained first for `warmup_steps`, a phase of its own. Does nothing when the run resumes.
    """

    def __init__(
        self,
        *,
        network: SparseVQVAE,
        folder,
        pretrained_vae_path: str | None,
        loader: DataLoader,
        loss_function: TokenizerLoss,
        warmup: dict,
        vectors_per_code: int = 64,
    ):
        self.network, self.folder, self.path = network, folder, pretrained_vae_path
        self.loader, self.loss_function, self.warmup = loader, loss_function, warmup
        self.vectors_per_code = vectors_per_code

    def run(self) -> None:
        if self.folder.start_step is not None:
            return
        path = self.path
        if path == "auto":
            path = "outputs/vae" if checkpoints.complete_steps("outputs/vae") else None
        if path is None:
            self._train_autoencoder()
        else:
            file = checkpoints.start_from(self.network, path, codebook=False)
            log.info("autoencoder weights from %s", file)
        self._lay_codebook()

    def _loader(self, max_steps: int) -> DataLoader:
        """The training loader over other steps."""
        sampler = copy.copy(self.loader.sampler)
        sampler.start, sampler.max_steps = 0, max_steps
        same = ("dataset", "batch_size", "num_workers", "collate_fn", "pin_memory")
        kept = {name: getattr(self.loader, name) for name in same}
        return type(self.loader)(sampler=sampler, generator=torch.Generator(), **kept)

    def _train_autoencoder(self) -> None:
        steps, device = self.warmup["steps"], next(self.network.parameters()).device
        log.info("no autoencoder weights: training one for %d steps before the codebook", steps)
        codes = list(self.network.vq.parameters())
        for parameter in codes:  # without codes they would have no gradient, which ranks wait for
            parameter.requires_grad_(False)
        optimizer = torch.optim.AdamW(trainable(self.network), lr=self.warmup["learning_rate"], weight_decay=0.0)
        schedule = make_scheduler(optimizer, name=self.warmup["lr_scheduler"], max_steps=steps)
        trainer = SupervisedTrainer(
            device=device,
            max_epochs=1,
            epoch_length=steps,
            train_data_loader=self._loader(steps),
            network=distribute(self.network),
            optimizer=optimizer,
            loss_function=self.loss_function,
            iteration_update=TrainStep(quantize=False, seed=self.warmup["seed"], amp=self.warmup["amp"]),
            decollate=False,
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: schedule.step())
        self.folder.record_steps(trainer, optimizer=optimizer, phase="warmup", every=self.warmup, last=steps)
        trainer.run()
        for parameter in codes:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _lay_codebook(self) -> None:
        """k-means on encoder outputs of training samples, drawn until there are enough for every code.

        One pass over the cases has to hold what k-means takes at least: more passes only vary the same voxels.
        """
        vq, device = self.network.vq, next(self.network.parameters()).device
        world = idist.get_world_size()
        one_pass = math.ceil(len(self.loader.dataset) / (self.loader.batch_size * world))
        rows, seen = [], 0
        self.network.eval()
        for number, batch in enumerate(self._loader(MAX_PASSES * one_pass), start=1):
            for part in batch if isinstance(batch, list) else [batch]:
                latents, _ = self.network.encoder(to_sparse(part, device))
                rows.append(latents.feats)
                seen += idist.all_reduce(len(latents))
            too_few = number == one_pass and seen < MIN_VECTORS_PER_CODE * vq.num_embeddings
            if too_few or seen >= self.vectors_per_code * vq.num_embeddings:
                break
        rows = torch.cat(rows)
        if not rows.std(0).mean() > 1e-3:
            fail(
                "CONSTANT_ENCODER",
                f"the encoder gives the same output everywhere (spread {rows.std(0).mean():.2g})",
                "give trained weights with --pretrained_vae_path, or null to train the autoencoder first",
            )
        try:
            vq.start_from(rows, generator=torch.Generator().manual_seed(self.warmup["seed"]))
        except ValueError as error:
            fail("TOO_LITTLE_DATA", str(error).split(":")[0], "give more cases or lower --num_embeddings")
        log.info("codebook of %d codes laid over %d encoder outputs", vq.num_embeddings, rows.shape[0])


class Stage2Start:
    """Weights of stage 1. On the demo a missing stage 1 is trained first; with the user's data it is refused."""

    def __init__(self, *, network: SparseVQVAE, folder, init_from: str, scale: str):
        self.network, self.folder, self.init_from, self.scale = network, folder, init_from, scale

    def run(self) -> None:
        if self.folder.start_step is not None:
            return
        path = Path(self.init_from)
        if not path.is_file() and not checkpoints.complete_steps(path):
            command = "python -m monai.bundle run training --config_file bundles/vq_stage1.json"
            if self.scale != "demo" or path != Path("outputs/vq_stage1"):
                fail("NO_STAGE1", f"{path} has no checkpoint of stage 1", f"first run {command} with your dataset_dir")
            log.info("no stage 1 yet: training it on the demo first (%s)", command)
            if idist.get_rank() == 0:
                config = Path(__file__).resolve().parent.parent / "bundles" / "vq_stage1.json"
                call = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(config)]
                alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
                if status := subprocess.run(call, env=alone).returncode:
                    fail("NO_STAGE1", f"stage 1 ended with status {status}", "see its output above", status=1)
            idist.barrier()
        log.info("weights from %s", checkpoints.start_from(self.network, path, codebook=True))


class StageHandlers:
    """All that hangs on the trainer, in the order in which it has to happen.

    After each step: schedule, average, log; where due: validate, picture, save.
    """

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        averaged: AveragedModel,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        evaluator: SupervisedEvaluator,
        every: dict,
    ):
        self.folder, self.network, self.averaged = folder, unwrapped(network), averaged
        self.optimizer, self.schedule, self.evaluator, self.every = optimizer, schedule, evaluator, every
        self.validated_step: int | None = None

    def attach(self, engine: SupervisedTrainer) -> None:
        last = engine.state.epoch_length

        def due(key: str) -> Callable[[Engine, int], bool]:
            return lambda _, step: step % self.every[key] == 0 or step == last

        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        self.folder.record_steps(engine, optimizer=self.optimizer, phase="train", every=self.every, last=last)
        completed = Events.ITERATION_COMPLETED
        engine.add_event_handler(completed(event_filter=due("val_interval")), self._validate)
        engine.add_event_handler(completed(event_filter=due("i_sample")), self._picture)
        engine.add_event_handler(completed(event_filter=due("i_save")), self._save)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _start(self, engine: SupervisedTrainer) -> None:
        step = self.folder.start_step
        if step is None:
            self.averaged.module.load_state_dict(self.network.state_dict())
            self.folder.begin(self.network)
            self._validate(engine)
            if self.folder.warmed_up:
                self._save(engine)
            return
        weights = {name: checkpoints.step_file(self.folder.path, name, step) for name in self.folder.names}
        live, mean = (checkpoints.read_tensors(path) for path in weights.values())
        misc = checkpoints.read_tensors(checkpoints.step_file(self.folder.path, "misc", step))
        for stored in (live, mean):
            sizes = type(self.network.sizes).from_tensor(stored["_extra_state"])
            checkpoints.check_same(sizes, self.network.sizes, source=self.folder.path, skip=set())
        last = engine.state.epoch_length
        if step >= last:
            log.info("nothing left to train: step %d of %d (a larger --max_steps goes on)", step, last)
            engine.terminate()
            return
        self.network.load_state_dict(live)
        self.averaged.module.load_state_dict(mean)
        self.averaged.n_averaged.fill_(misc["num_averaged"])
        resume_optimizer(self.optimizer, misc["optimizer"], keep_settings=isinstance(self.schedule, FUNCTIONS_OF_STEP))
        resume_schedule(self.schedule, misc["schedule"], step=step)
        scaler = getattr(engine._process_function, "scaler", None)
        if scaler is not None and misc["scaler"]:
            scaler.load_state_dict(misc["scaler"])
        engine.state.iteration = step
        engine.data_loader.sampler.start = step
        engine.last_saved_step = step
        self.folder.begin(self.network)
        log.info("resumed at step %d", step)

    def _advance(self, engine: SupervisedTrainer) -> None:
        self.schedule.step()
        self.averaged.update_parameters(self.network)

    def _validate(self, engine: SupervisedTrainer) -> None:
        self.evaluator.run()
        self.validated_step = engine.state.iteration
        self.folder.record_validation(engine.state.iteration, self.evaluator.state.metrics)

    def _picture(self, engine: SupervisedTrainer) -> None:
        if self.validated_step != engine.state.iteration:
            self._validate(engine)
        self.folder.record_samples(engine.state.iteration, window=self.network.sizes.windows[0])

    def _close(self, engine: SupervisedTrainer) -> None:
        engine.data_loader.close()
        self.evaluator.data_loader.close()

    def _save(self, engine: SupervisedTrainer) -> None:
        if idist.get_rank() != 0:
            return
        step, path = engine.state.iteration, Path(self.folder.path)
        live, mean = self.folder.names
        scaler = getattr(engine._process_function, "scaler", None)
        misc = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "num_averaged": int(self.averaged.n_averaged),
        }
        weights = {live: self.network.state_dict(), mean: self.averaged.module.state_dict()}
        checkpoints.save_set(path, step, weights, misc)
        self.folder.record_best(step)
        checkpoints.prune(path, self.every["keep_last"])
        engine.last_saved_step = step
