"""What alignment adds to the engine of app/training: its step, what of it is kept, its record, its answers, its files.

Only what requires a gradient is trained and kept in checkpoints: the projector, LoRA layers, or a tiny language model
of our own. The tokenizer is not in the network at all.
"""

import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn
from torch.utils.data import Dataset, Subset

from app.language.align_data import TextDataset
from app.language.align_setup import FrozenTokenizer, Language, check_resumed
from app.shared.json_files import write_object
from app.training import checkpoints, shipped
from app.training.handlers import OnEvent
from app.training.state import TrainingState
from app.training.step import AMP_TYPES, TrainStep
from app.training.training_state import check_parameters
from networks.qwen import VolumeQwen, save_language


def to_device(batch: dict, device: torch.device, non_blocking: bool = False) -> dict:
    """`prepare_batch` of an alignment."""
    return {k: v.to(device, non_blocking=non_blocking) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class AnswerStep(TrainStep):
    """The step of an alignment: the loss on answers alone."""

    def size(self, part: dict) -> dict[str, int]:
        return {"tokens": int(part["attention_mask"].sum())}

    def terms(self, engine: SupervisedTrainer, inputs: dict, _part: dict) -> dict[str, torch.Tensor]:
        return terms_of(engine.network, inputs)


class AnswerValidation:
    """`iteration_update` of the evaluator: the same without a gradient."""

    def __init__(self, *, amp: str = "off"):
        self.amp = AMP_TYPES[amp]

    def __call__(self, engine: SupervisedEvaluator, batch: dict) -> dict[str, Any]:
        network = engine.network
        network.eval()
        inputs, device = engine.prepare_batch(batch, engine.state.device), engine.state.device.type
        eager = torch.compiler.set_stance("force_eager")  # layers compiled for training would be compiled once more
        with eager, torch.no_grad(), torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            terms = terms_of(network, inputs)
        return {"terms": {name: float(term) for name, term in terms.items()}, "samples": len(batch["case_id"])}


def terms_of(network: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    result = network(inputs)
    return {"loss": result.loss, "correct": result.correct}


def steps_per_epoch(dataset: Dataset, *, batch_size: int) -> int:
    """Full batches of all ranks together."""
    return max(1, len(dataset) // (batch_size * idist.get_world_size()))


class LearnedState(TrainingState):
    """Of an alignment: what learns. The rest is the base model's."""

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        learned = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
        return {self.folder.name: learned}

    def check_stored(self, stored: dict[str, dict], step: int) -> None:
        (own,), (state,) = self.weights().values(), stored.values()
        check_parameters(state, own, path=checkpoints.step_file(self.folder.path, self.folder.name, step))

    def load_weights(self, stored: dict[str, dict], step: int) -> None:
        (own,), (state,) = self.weights().values(), stored.values()
        for name, value in state.items():
            own[name].copy_(value)


class AlignRecord:
    """train_args.json: what a later load has to check or repeat. A run that is resumed is held to it before it begins,
    and one that has nothing left to train leaves it as it is.
    """

    def __init__(
        self, *, folder, network: VolumeQwen, language: Language, tokenizer: FrozenTokenizer, settings: dict[str, Any]
    ):
        self.folder, self.projector = folder, network.projector
        self.language, self.tokenizer, self.settings = language, tokenizer, settings

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_STARTED, self._write)

    def _check(self, _engine: Engine) -> None:
        if self.folder.start_step is not None:
            check_resumed(Path(self.folder.path), self.content())

    def _write(self, _engine: Engine) -> None:
        if idist.get_rank() == 0:
            write_object(Path(self.folder.path) / "train_args.json", self.content(), indent=2, default=str)

    def content(self) -> dict[str, Any]:
        return {
            **self.settings,
            "base_model": self.language.identity,
            "trained_language": self.language.trained,
            "use_lora": self.language.adapter is not None,
            "tokenizer_path": place_of(self.tokenizer),
            "tokenizer": self.tokenizer.hash,
            "in_features": self.projector.in_features,
            "detects": None if self.projector.detector is None else self.projector.detector.num_kinds,
            "position_scale": self.projector.position_scale,
            "position_grid": self.projector.position_grid,
        }


def place_of(tokenizer: FrozenTokenizer) -> str:
    """The name of one that ships, which another machine has too; else where it lies here."""
    return shipped.name_of(tokenizer.hash) or str(Path(tokenizer.file).resolve())


class SampleAnswers(OnEvent):
    """A few questions of the validation rows with the model's answers beside the true ones."""

    def __init__(
        self,
        *,
        folder,
        network: VolumeQwen,
        language: Language,
        dataset: TextDataset | Subset,  # a Subset is empty: nothing is held out
        on: CallableEventWithFilter,
        num_samples: int = 4,
        max_new_tokens: int = 64,
    ):
        self.folder, self.network, self.language, self.dataset, self.on = (
            folder, network, language, dataset, on,
        )  # fmt: skip
        step = max(1, len(dataset) // num_samples)
        self.numbers, self.max_new_tokens = range(0, len(dataset), step)[:num_samples], max_new_tokens

    def __call__(self, engine: SupervisedTrainer) -> None:
        if idist.get_rank() != 0 or not self.numbers:
            return
        self.network.eval()
        batch = self.language.collate(side="left")([self.dataset.question(number) for number in self.numbers])
        ids = self.network.generate(to_device(batch, engine.state.device), max_new_tokens=self.max_new_tokens)
        answers = self.language.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = [self.dataset.rows[number] for number in self.numbers]
        asked = [
            f"{row.image}\nasked:  {row.prompt}\ntruth:  {row.answer}\nanswer: {answer.strip()}\n"
            for row, answer in zip(rows, answers, strict=True)
        ]
        self.folder.record_text("\n".join(asked))


class WriteAligned:
    """What `ask` and `evaluate` load: projector, adapter and a language model of the run's own.

    After each epoch, at the end, and of the best validation where that is not the end's.
    """

    def __init__(self, *, state: LearnedState, language: Language, epoch: int, on: CallableEventWithFilter):
        self.state, self.folder, self.language, self.epoch, self.on = state, state.folder, language, epoch, on

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self._write_epoch)
        engine.add_event_handler(Events.COMPLETED, self._write_end)

    def _write_epoch(self, engine: SupervisedTrainer) -> None:
        if idist.get_rank() == 0:
            self._write(f"epoch{-(-engine.state.iteration // self.epoch) - 1}")

    def _write_end(self, _engine: SupervisedTrainer) -> None:
        if idist.get_rank() != 0:
            return
        path, language = Path(self.folder.path), self.language
        (path / "projector_best.pt").unlink(missing_ok=True)  # of an earlier end of this run
        for earlier in ("lora_best", "language_best"):
            shutil.rmtree(path / earlier, ignore_errors=True)
        best = checkpoints.read_best(path)
        if best is not None and best != checkpoints.complete_steps(path)[-1]:
            name = self.folder.name
            last = {name: {key: value.clone() for key, value in self.state.weights()[name].items()}}
            stored = checkpoints.read_tensors(checkpoints.step_file(path, name, best))
            self.state.load_weights({name: stored}, best)
            self._write("best")
            if language.trained:
                save_language(language.model, language.tokenizer, path / "language_best")
            self.state.load_weights(last, best)
        self._write("final")
        if language.is_own:  # an adapter is kept in a folder of its own: taken out of the model that is saved
            model = language.model if language.adapter is None else language.adapter.unload()
            save_language(model, language.tokenizer, path / "language_final")

    def _write(self, suffix: str) -> None:
        """The projector and, where there is one, the adapter; written beside and renamed."""
        path = Path(self.folder.path)
        checkpoints.write_atomically(self.state.network.projector.state_dict(), path / f"projector_{suffix}.pt")
        if self.language.adapter is not None:
            part, target = path / f"lora_{suffix}.part", path / f"lora_{suffix}"
            shutil.rmtree(part, ignore_errors=True)
            self.language.adapter.save_pretrained(part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
