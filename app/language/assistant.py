"""CTAssistant: an aligned language model behind two methods, `from_pretrained` and `ask`.

Checks that tokenizer, base model and projector belong together, and gives every answer with where it came from and what
it is not for. Trains nothing and measures nothing.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from app.language import chat
from app.language.align_setup import FrozenTokenizer, identify, make_collate
from app.language.align_training import to_device
from app.shared.devices import choose_device
from app.shared.hashes import hash_path
from app.shared.json_files import read_object
from app.shared.notice import NOTICE
from app.shared.refusals import Refused
from app.text.rows import REPORT_QUESTION
from app.tokens.open_scan import ScanSource, scan_source, scan_sources
from app.tokens.token_files import CTTokens
from app.training import checkpoints, shipped
from app.training.key_rules import RULES, Rule
from networks import qwen
from networks.cell_detector import CellDetector
from networks.projector import Projector
from networks.tokens import TokenSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedScan:
    """Something to ask about: its tokens and where they came from."""

    name: str
    tokens: CTTokens
    origin: dict[str, Any]  # hash of the scan and geometry of its series; no header text
    source: str = ""  # where it was found, below what was asked about


@dataclass(frozen=True)
class Answer:
    scan: str
    question: str
    answer: str
    provenance: dict[str, Any]
    source: str = ""
    notice: str = NOTICE

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class CTAssistant:
    """Answers questions about CT scans, or writes their reports. Build with `from_pretrained`."""

    def __init__(self, *, model: qwen.VolumeQwen, text_tokenizer, tokenizer: FrozenTokenizer, settings: dict[str, Any]):
        self.model, self.text_tokenizer, self.tokenizer, self.settings = model, text_tokenizer, tokenizer, settings
        budget = {"max_tokens": settings["max_3d_tokens"], "method": settings["token_reduction"]}
        self.reduce = tokenizer.reducer(**budget, detector=model.projector.detector)
        self.collate = make_collate(model.language, text_tokenizer, side="left")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "outputs/align",
        *,
        tokenizer: str | None = None,
        language_model: str | None = None,
        device: torch.device | None = None,
    ) -> "CTAssistant":
        """From the output folder of an alignment run, or an exported bundle.

        `tokenizer` and `language_model` say where they are now, if not where they were then; others are refused.
        """
        path, device = aligned_folder(path), device or choose_device()
        settings = read_settings(path)
        where = tokenizer or tokenizer_of(path, settings)
        frozen = FrozenTokenizer(where, demo=False, device=device, levels=settings["levels"])
        if frozen.hash != settings["tokenizer"]:
            what = f"{path} was aligned to tokenizer {settings['tokenizer'][:12]}, {frozen.file} is {frozen.hash[:12]}"
            raise Refused("OTHER_TOKENIZER", what, "give that tokenizer with --tokenizer, or align again", status=2)
        files = aligned_files(path, settings)
        sizes, detects = frozen.network.sizes, settings["detects"]
        language, text_tokenizer = load_base(path, settings, device, own=files.language, now_at=language_model)
        projector = Projector(
            settings["in_features"],
            qwen.language_width(language),
            num_layers=settings["projector_layers"],
            use_3d_pos=settings["use_3d_pos"],
            position_scale=settings["position_scale"],
            position_grid=settings.get("position_grid", 128),  # 128 where it was not recorded
            detector=None
            if detects is None
            else CellDetector(sizes.latent_channels, detects, grid=sizes.resolution // 8),
        )
        file, adapter = files.projector, files.adapter
        weights = checkpoints.read_tensors(file)
        try:
            projector.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError):
            raise Refused("BAD_PROJECTOR", f"{file} is not the projector that {path} describes") from None
        if not all(weight.isfinite().all() for weight in projector.parameters()):
            what = f"{file} holds values that are no numbers"
            raise Refused("BAD_PROJECTOR", what, "align again, or take an older epoch")
        if adapter is not None:
            try:
                qwen.load_lora(language, adapter)
            except ValueError as error:
                raise Refused("BAD_ADAPTER", str(error)) from error
        model = qwen.VolumeQwen(language, projector, position=settings["position"]).to(device).eval()
        settings = {**settings, "projector_sha256": hash_path(file)}
        if files.language is not None:
            settings["base_model"] = {**settings["base_model"], "sha256": hash_path(files.language)}
        if adapter is not None:
            settings["adapter_sha256"] = hash_path(adapter)
        return cls(model=model, text_tokenizer=text_tokenizer, tokenizer=frozen, settings=settings)

    def with_budget(self, max_3d_tokens: int) -> "CTAssistant":
        """The same with at most so many tokens of a volume."""
        settings = {**self.settings, "max_3d_tokens": max_3d_tokens}
        parts = {"model": self.model, "text_tokenizer": self.text_tokenizer, "tokenizer": self.tokenizer}
        return CTAssistant(**parts, settings=settings)

    def ask(
        self,
        scan: Any,
        question: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = 256,
        write: Callable[[str], None] | None = None,
    ) -> Answer | list[Answer]:
        """An answer from a raw scan, a prepared case or a token file; without a question, a report.

        Several questions give a list. `write` gets the text of a single question piece by piece.
        """
        opened = scan if isinstance(scan, TokenizedScan) else self.open(scan)
        questions = [question] if question is None or isinstance(question, str) else list(question)
        questions = [REPORT_QUESTION if q is None else q for q in questions]
        if write is not None and len(questions) > 1:
            raise ValueError(f"one question can be streamed at a time, got {len(questions)}")
        streamer = None if write is None else qwen.stream_to(self.text_tokenizer, write)
        if not questions:
            return []
        texts = self.answer_many(
            [(q, self.reduce(opened.tokens)) for q in questions], max_new_tokens=max_new_tokens, streamer=streamer
        )
        about = {"scan": opened.name, "source": opened.source, "provenance": self.provenance(opened)}
        answers = [Answer(question=q, answer=text, **about) for q, text in zip(questions, texts, strict=True)]
        return answers[0] if question is None or isinstance(question, str) else answers

    def answer_many(
        self, asked: Sequence[tuple[str, TokenSequence | None]], *, max_new_tokens: int = 256, streamer=None
    ) -> list[str]:
        """Texts for (question, volume) pairs in one batch; a volume of None asks without one."""
        samples = []
        for question, volume in asked:
            encoded = self.encode(question, num_volumes=int(volume is not None))
            samples.append({**encoded._asdict(), "volumes": [] if volume is None else [volume]})
        batch = to_device(self.collate(samples), self.model.device)
        ids = self.model.generate(batch, max_new_tokens=max_new_tokens, streamer=streamer)
        return [text.strip() for text in self.text_tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def encode(self, question: str, *, num_volumes: int = 1) -> chat.Encoded:
        """A question as the model reads it; one that is too long raises."""
        settings = {name: self.settings[name] for name in ("fusion", "max_text_tokens")}
        try:
            return chat.encode_chat(self.text_tokenizer, question, num_volumes=num_volumes, **settings)
        except ValueError as error:
            raise ValueError(f"{error}: ask more shortly") from None

    def fits(self, question: str, *, num_tokens: int = 0) -> bool:
        """Whether a question is short enough to be asked, also beside a volume of `num_tokens`."""
        try:
            encoded = self.encode(question)
        except ValueError:
            return False
        return len(encoded.input_ids) + num_tokens <= qwen.context_length(self.model.language)

    def open(self, scan: Any) -> TokenizedScan:
        """Tokens with their origin of whatever `app.tokens.open_scan` opens."""
        source = scan_source(scan) if isinstance(scan, str | Path) else scan
        opened = self.tokenizer.ct.open(source)
        tokens = self.tokenizer.ct.encode(opened)
        if isinstance(opened, CTTokens):
            name, origin = "tokens", {"scan_sha256": opened.source_hash} if opened.source_hash else {}
        else:
            digest = opened.source_hash or hashlib.sha256(opened.volume.hu.tobytes()).hexdigest()
            name, origin = opened.name, {"scan_sha256": digest}
        place = ""
        if isinstance(source, ScanSource):
            name, place = source.name, source.place if source is scan else Path(scan).name
            origin |= {"tokens_sha256": source.key} if source.kind == "tokens" else {}
        return TokenizedScan(name, tokens, {**origin, **_series(tokens)}, place)

    def of_tokens(self, tokens: CTTokens) -> TokenizedScan:
        """What was tokenized already."""
        origin = {"scan_sha256": tokens.source_hash} if tokens.source_hash else {}
        return TokenizedScan("tokens", tokens, {**origin, **_series(tokens)})

    def open_all(self, path: Path) -> Iterator[TokenizedScan | ValueError]:
        """Everything at a path, by the one door for scans; what is refused comes as its refusal."""
        for source in scan_sources(path):
            try:
                yield self.open(source)
            except (ValueError, OSError) as error:
                yield ValueError(f"{source.place}: {error}")

    def provenance(self, scan: TokenizedScan) -> dict[str, Any]:
        """What an answer rests on: scan, tokenizer, models, settings."""
        return {
            **scan.origin,
            "num_tokens": len(scan.tokens.codes),
            "tokenizer_sha256": self.tokenizer.hash,
            "base_model": self.settings["base_model"],
            "projector_sha256": self.settings["projector_sha256"],
            "adapter_sha256": self.settings.get("adapter_sha256"),
            "settings": {name: self.settings[name] for name in SETTINGS_OF_ANSWERS},
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        }


SETTINGS_OF_ANSWERS = ("max_3d_tokens", "token_reduction", "levels", "use_3d_pos", "position", "fusion", "use_lora")


MAX_NUMBER = 1 << 24  # beyond is damage, and more than memory holds
KEYS = ("projector_layers", "amp", "max_text_tokens", "max_3d_tokens", "token_reduction", "levels", "use_3d_pos")
SETTINGS = {  # of train_args.json, what is used: whoever wrote it
    **{name: RULES[name] for name in (*KEYS, "position", "fusion", "use_lora")},
    **dict.fromkeys(("tokenizer", "tokenizer_path"), Rule(str, "a text")),
    "in_features": Rule(int, f"a whole number from 1 to {1 << 16}", minimum=1, holds=lambda width: width <= 1 << 16),
    "detects": Rule(int, "a whole number from 1 to 64, or null", optional=True, holds=lambda kinds: 1 <= kinds <= 64),
    "position_scale": Rule((int, float), "a number above 0", holds=lambda scale: 0 < scale < math.inf),
    "base_model": Rule(
        dict,
        "a model with its name, or null where it was built",
        holds=lambda base: isinstance(base.get("name", 0), str | None),
    ),
}


def _series(tokens: CTTokens) -> dict[str, Any]:
    """Geometry of the scan that tokens are of, as plain numbers, and what was found of it where its file says so."""
    affine = tokens.source_affine
    return {
        **({} if tokens.findings is None else {"codes": [*tokens.findings] or ["OK"]}),
        "shape": list(tokens.source_shape),
        "spacing": [round(float(step), 6) for step in np.linalg.norm(affine[:3, :3], axis=0)],
        "affine": affine.round(6).tolist(),
    }


def aligned_folder(path: str | Path) -> Path:
    """Where the aligned model lies: an output folder is it, a bundle has it below its models."""
    bundled = Path(path) / "models" / "align"
    return bundled if bundled.is_dir() else Path(path)


def read_settings(path: Path) -> dict[str, Any]:
    file = path / "train_args.json"
    if not file.is_file():
        raise Refused(
            "NO_ALIGNMENT",
            f"{path} holds no aligned model",
            "first run python -m monai.bundle run training --config_file bundles/align.json, or pass --align",
        )
    settings = {"levels": 1, "detects": None, **(read_object(file) or {})}  # of before these were recorded
    if not set(settings) >= set(SETTINGS):
        raise Refused("NO_ALIGNMENT", f"{file} is damaged", "align again")
    for name, rule in SETTINGS.items():
        value = settings[name]
        if value is None and rule.optional:
            continue
        if not rule.allows(value) or (isinstance(value, int) and value > MAX_NUMBER):
            what = f"{file} must have {rule.says} as its {name}, it has {str(value)[:40]}"
            raise Refused("NO_ALIGNMENT", what, "copy the folder again, or align again")
    return settings


def tokenizer_of(path: Path, settings: dict[str, Any]) -> str:
    """Where the tokenizer of an alignment is: where it was, else what ships with the hash that was recorded."""
    place, name = path / settings["tokenizer_path"], shipped.name_of(settings["tokenizer"])
    return str(place if place.exists() or name is None else shipped.pretrained_folder() / name)


def load_base(
    path: Path, settings: dict[str, Any], device: torch.device, *, own: Path | None = None, now_at: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """The language model that the projector belongs to, wherever it is now; another one is refused."""
    base = settings["base_model"]
    name = now_at or base["name"] if own is None else str(own)
    if name is None:
        raise Refused("NOT_FINISHED", f"the alignment in {path} did not reach its end")
    half = settings["amp"] == "bf16" and device.type == "cuda" and own is None
    try:
        language, text_tokenizer = qwen.load_language(name, dtype=torch.bfloat16 if half else torch.float32)
    except ValueError as error:
        what = str(error)
        raise Refused("BAD_MODEL", what, "the base model is kept by name: it must be there or on the hub") from error
    present = identify(name, language) if own is None else base
    if {**present, "name": None} != {**base, "name": None}:
        raise Refused("OTHER_MODEL", f"{path} was aligned to {base}, {name} is now {present}")
    return language, text_tokenizer


class AlignedFiles(NamedTuple):
    projector: Path
    adapter: Path | None
    language: Path | None  # a model of the run's own


def aligned_files(path: Path, settings: dict[str, Any]) -> AlignedFiles:
    """Of the best validation, else of the end, else of the last whole epoch."""
    ends = [path / f"projector_{end}.pt" for end in ("best", "final")]
    file = next((end for end in ends if end.is_file()), None)
    if file is None:
        epochs = sorted(path.glob("projector_epoch*.pt"), key=lambda p: int(p.stem.removeprefix("projector_epoch")))
        if not epochs:
            raise Refused("NO_ALIGNMENT", f"{path} has no projector yet", "let an epoch finish")
        file = epochs[-1]
        log.info("the run did not end: taking %s", file.name)
    adapter = path / file.stem.replace("projector", "lora") if settings["use_lora"] else None
    own = [path / file.stem.replace("projector", "language"), path / "language_final"]  # frozen: of the end alone
    return AlignedFiles(file, adapter, next((folder for folder in own if folder.is_dir()), None))
