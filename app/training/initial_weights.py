"""What a stage needs before its first step: weights of the stage before, and for stage 1 a codebook laid over them.

Does nothing when a run resumes.
"""

import copy
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from jaxtyping import Float
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from torch import Tensor
from torch.utils.data import DataLoader

from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.training import checkpoints, shipped
from app.training.ranks import distribute
from app.training.state import TrainingState
from app.training.step import SparseBatch, let_learn
from app.training.stopping import StopWhenAsked
from app.training.training_state import read_state
from networks.components import VOXELS_PER_LATENT, lay_components
from networks.losses import TokenizerLoss
from networks.quantizer import MIN_VECTORS_PER_CODE, broadcast, gather_rows
from networks.sparse import SparseTensor
from networks.vqvae import SparseVQVAE
from transforms.windows import window_bounds

log = logging.getLogger(__name__)

CELLS_PER_VALUE = 40  # cells that principal components are fitted to, for each value of a cell
CELLS_OF_A_SAMPLE = 1024  # of one sample
VECTORS_PER_CODE = 64  # encoder outputs that a codebook is laid over, for each code
MAX_PASSES = 16  # over the cases, each drawn anew, to fill a codebook at the start
STAGE1_COMMAND = "python -m monai.bundle run training --config_file bundles/vq_stage1.json"
WARM_UP_HANDLERS = ("StopAtNonFiniteLoss", "LrScheduleHandler", "Console", "MetricsRows")  # of stage 0


@dataclass(eq=False, kw_only=True)
class ComponentsStart:
    """What stage 0 needs before its first step where the sizes say `pca`: principal components of cells."""

    network: SparseVQVAE
    folder: Any
    loader: DataLoader
    prepare_batch: SparseBatch

    def run(self) -> None:
        if self.network.sizes.pca and self.folder.start_step is None:
            self._lay_components()

    def _rows(self, rows_of: Callable[[SparseTensor], Tensor], *, wanted: int, least: int = 0) -> Float[Tensor, "N _"]:
        """Rows of training samples, drawn until all ranks together have as many as are wanted.

        Ends where one pass over the cases gives fewer than `least`: more passes only vary the same voxels.
        """
        device = next(self.network.parameters()).device
        one_pass = math.ceil(len(self.loader.dataset) / (self.loader.batch_size * idist.get_world_size()))
        rows, seen = [], 0
        for number, batch in enumerate(loader_over(self.loader, MAX_PASSES * one_pass), start=1):
            for part in batch if isinstance(batch, list) else [batch]:
                rows.append(rows_of(self.prepare_batch(part, device)))
                seen += idist.all_reduce(len(rows[-1]))
            if seen >= wanted or (number == one_pass and seen < least):
                break
        return torch.cat(rows)

    @torch.no_grad()
    def _lay_components(self) -> None:
        network = self.network
        for part in (network.encoder, network.decoder):
            part.hu.lay([window_bounds(name) for name in network.sizes.windows])
        rows = gather_rows(
            self._rows(lambda x: thinned_cells(network.encoder.cells(x)), wanted=CELLS_PER_VALUE * VOXELS_PER_LATENT)
        )
        rows = rows[rows.double().sum(1).argsort()]  # in one order on any number of ranks: sums round alike
        maps = network.encoder.components, network.decoder.components
        share = lay_components(*maps, rows)
        for buffer in (buffer for one in maps for buffer in one.buffers()):
            broadcast(buffer)
        width = network.sizes.latent_channels
        log.info("%d principal components of %d cells keep %.1f %% of their variance", width, len(rows), 100 * share)


def thinned_cells(cells: SparseTensor) -> Float[Tensor, "M _"]:
    """Of each sample about CELLS_OF_A_SAMPLE at most."""
    samples = [one for one in cells.feats.split(cells.level.sample_sizes) if len(one)]
    return torch.cat([cells.feats[:0], *(one[:: math.ceil(len(one) / CELLS_OF_A_SAMPLE)] for one in samples)])


def loader_over(loader: DataLoader, max_steps: int, *, start: int = 0) -> DataLoader:
    """A training loader over other steps."""
    sampler = copy.copy(loader.sampler)
    sampler.start, sampler.max_steps = start, max_steps
    same = ("dataset", "batch_size", "num_workers", "collate_fn", "pin_memory")
    kept = {name: getattr(loader, name) for name in same}
    return type(loader)(sampler=sampler, generator=torch.Generator(), **kept)


@dataclass(eq=False, kw_only=True)
class CodebookStart(ComponentsStart):
    """What stage 1 needs before its first step: a trained autoencoder, and a codebook laid over its outputs.

    Weights come from `pretrained_vae_path` (auto: stage 0's output where there is one); without any, the autoencoder is
    trained first, a phase of its own.
    """

    loss_function: TokenizerLoss
    pretrained_vae_path: str | None
    learns: Sequence[str]  # parts, after that
    warmup: dict  # flat keys of `bundles/vae.json` with their values for that phase

    def run(self) -> None:
        if self.folder.start_step is not None:
            return
        path = self.pretrained_vae_path
        if path == "auto" and self.folder.warm_up_step is not None:
            path = None
        if path == "auto":
            path = "outputs/vae" if checkpoints.complete_steps("outputs/vae") else None
        if path is None:
            self._train_autoencoder()
        else:
            file = checkpoints.start_from(self.network, path, codebook=False)
            log.info("autoencoder weights from %s", file)
        self._lay_codebook()

    def _train_autoencoder(self) -> None:
        steps, start = self.warmup["max_steps"], self.folder.warm_up_step or 0
        log.info("no autoencoder weights: training one for %d steps before the codebook", steps)
        stage0 = self._stage0(loader_over(self.loader, steps, start=start))
        trainer, schedule = (stage0.get_parsed_content(name) for name in ("train#trainer", "schedule"))
        state = WarmUpState(folder=self.folder, network=self.network, optimizer=trainer.optimizer, schedule=schedule)
        trainer.last_saved_step = start or None
        if not start:
            super().run()
        self.folder.phase, self.folder.warmed_up = "warmup", True
        if start:
            state.load(trainer, start)
            trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", start))
            self.folder.go_on()
            log.info("resumed at warm-up step %d", start)
        StopWhenAsked(save=state.save, folder=self.folder).attach(trainer)
        if start < steps:
            trainer.run()
            state.save(trainer)  # laying the codebook and the first validation can take long
        self.folder.phase = "train"
        let_learn(self.network, self.learns)

    def _stage0(self, loader: DataLoader) -> ConfigParser:
        """What `bundles/vae.json` declares, on this run's network and data, of its handlers those that watch steps."""
        config = ConfigParser.load_config_file(str(bundles_folder() / "vae.json"))
        let_learn(self.network, config["learns"])
        config |= self.warmup | {"network": self.network, "folder": self.folder, "prepare_batch": self.prepare_batch}
        config |= {"device": next(self.network.parameters()).device, "loss_function": self.loss_function}
        train = config["train"]
        entries = [entry for entry in train["handlers"] if isinstance(entry, dict)]
        train["handlers"] = [entry for entry in entries if entry["_target_"].rpartition(".")[2] in WARM_UP_HANDLERS]
        train["loader"], train["trainer"]["network"] = loader, distribute(self.network)
        return ConfigParser(config)

    @torch.no_grad()
    def _lay_codebook(self) -> None:
        """k-means on encoder outputs of training samples, as many as there have to be for every code."""
        vq, encoder = self.network.vq, self.network.eval().encoder
        wanted, least = VECTORS_PER_CODE * vq.num_embeddings, MIN_VECTORS_PER_CODE * vq.num_embeddings
        rows = self._rows(lambda x: encoder(x)[0].feats, wanted=wanted, least=least)
        if not rows.std(0).mean() > 1e-3:
            raise Refused(
                "CONSTANT_ENCODER",
                f"the encoder gives the same output everywhere (spread {rows.std(0).mean():.2g})",
                "give trained weights with --pretrained_vae_path, or null to train the autoencoder first",
            )
        try:
            vq.start_from(rows, generator=torch.Generator().manual_seed(self.warmup["seed"]))
        except ValueError as error:
            raise Refused("TOO_LITTLE_DATA", str(error).split(":")[0]) from error
        log.info("codebook of %d codes laid over %d encoder outputs", vq.num_embeddings, rows.shape[0])


class WarmUpState(TrainingState):
    """Of a warm-up: one file, which the first complete set replaces."""

    def save(self, engine: SupervisedTrainer) -> None:
        engine.last_saved_step = step = engine.state.iteration
        if idist.get_rank() == 0:
            content = {"network": self.network.state_dict(), **self.misc(engine)}
            checkpoints.save_warm_up(self.folder.path, step, content)

    def load(self, engine: SupervisedTrainer, step: int) -> None:
        file = checkpoints.step_file(self.folder.path, "warmup", step)
        stored = read_state(file, step=step, optimizer=self.optimizer)
        self.check_sizes(checkpoints.check_weights(stored.get("network"), file))
        checkpoints.load_weights(self.network, stored["network"], file)
        self.load_misc(engine, stored, step)


@dataclass(eq=False, kw_only=True)
class Stage2Start:
    """Weights of stage 1. On the demo a missing stage 1 is trained first; with the user's data it is refused."""

    network: SparseVQVAE
    folder: Any
    init_from: str
    demo: bool
    stage1: str = "vq_stage1.json"

    def run(self) -> None:
        if self.folder.start_step is not None:
            return
        path = shipped.weights_of(self.init_from)
        if not path.is_file() and not checkpoints.complete_steps(path):
            if not self.demo or path != Path("outputs/vq_stage1"):
                command = STAGE1_COMMAND.replace("vq_stage1.json", self.stage1)
                remedy = f"first run {command} with your dataset_dir"
                raise Refused("NO_STAGE1", f"{path} has no checkpoint of stage 1", remedy)
            train_demo_stage1("NO_STAGE1")
        log.info("weights from %s", checkpoints.start_from(self.network, path, codebook=True))


def train_demo_stage1(code: str) -> None:
    """Stage 1 on the built-in phantoms, in a process of its own; `code` says what is missing where that fails."""
    log.info("no tokenizer yet: training one on the demo first (%s)", STAGE1_COMMAND)
    idist.barrier()  # before the first files appear every rank has seen that there are none
    if idist.get_rank() == 0:
        config = bundles_folder() / "vq_stage1.json"
        call = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(config)]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if status := subprocess.run(call, env=alone).returncode:
            raise Refused(code, f"stage 1 ended with status {status}", "see its output above", status=1)
    idist.barrier()
