"""What an alignment run consists of before its first step: choices, frozen tokenizer, text with tokens, language model.

`scale: auto` is the demo (phantoms and a tiny Qwen trained whole) without data, and the real thing (a stock Qwen-VL,
projector or LoRA) with it. What a run was made with is written down, so that nothing is ever loaded against another
tokenizer or base model.
"""

import copy
import hashlib
import json
import logging
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from app.language import align_data, chat, phantom_text
from app.language.cell_detection import LOCATED, phantom_detector
from app.language.volume_tokens import Reducer, TokenSource
from app.shared.hashes import hash_path
from app.shared.refusals import Refused
from app.text.manifests import check_rows, read_rows
from app.text.rows import TextRow
from app.tokens.token_files import CTTokens
from app.tokens.tokenizer import CTTokenizer, find_tokenizer
from app.training import checkpoints, shipped
from app.training.initial_weights import STAGE1_COMMAND, train_demo_stage1
from networks import qwen
from networks.cell_detector import CellDetector
from networks.projector import Projector
from networks.sparse.ops import defect
from networks.tiny_qwen import build_tiny
from networks.vqvae import SparseVQVAE

log = logging.getLogger(__name__)

TINY_MODELS = {"tiny_qwen2_vl": "qwen2_vl", "tiny_qwen3_vl": "qwen3_vl"}  # built here, from the text
TINY_SIZES = {"width": 64, "num_layers": 2}
LORA_SIZES = ("lora_r", "lora_alpha")
RESUMED_WITH = {  # what a run cannot change on its way, and the code of its refusal
    "tokenizer": "OTHER_TOKENIZER",
    "base_model": "OTHER_MODEL",
    **dict.fromkeys(("use_lora", *LORA_SIZES, "trained_language"), "OTHER_SETTINGS"),
    **dict.fromkeys(("projector_layers", "use_3d_pos", "levels", "detects"), "OTHER_SETTINGS"),
}


def is_tiny(vl_model: str) -> bool:
    """Whether this is a language model that is built here, from the text."""
    return vl_model in TINY_MODELS


def can_compile(vl_model: str) -> bool:
    """Whether the layers of a language model run faster compiled, on this machine."""
    return torch.cuda.is_available() and not is_tiny(vl_model) and not defect("triton", torch.cuda.current_device())


def check_choices(
    *,
    demo: bool,
    vl_model: str,
    data: str | None = None,
    dataset: str | None = None,
    use_lora: bool = False,
    detector_phantoms: int = 0,
) -> None:
    """Says what was chosen, and looks for what the end of hours of encoding needs (a Qwen-VL, peft)."""
    if data is not None and not Path(data).exists():
        remedy = "give a manifest, a prepared dataset with text.jsonl, or a folder"
        raise Refused("NO_DATA", f"{data} does not exist", remedy)
    if detector_phantoms and (data or dataset):
        what = f"detector_phantoms is {detector_phantoms}, but phantoms do not show how findings look in your scans"
        raise Refused("BAD_VALUE", what, "leave --detector_phantoms out beside data of your own", status=2)
    text = f"text of {data or dataset}" if data or dataset else "text of built-in phantoms"
    log.info("scale %s: %s", "demo" if demo else "full", text)
    tiny = is_tiny(vl_model)
    whole = tiny and not use_lora
    log.info("language model: %s%s%s", vl_model, ", built here" * tiny, " and trained whole" * whole)
    try:
        if not tiny:
            qwen.family_of(vl_model)
    except ValueError as error:
        raise Refused("BAD_MODEL", str(error)) from error
    try:
        if use_lora:
            qwen.import_peft()
    except ValueError as error:
        raise Refused("NO_PEFT", str(error)) from error


class FrozenTokenizer:
    """The tokenizer as it is given: never trained, always in evaluation mode, known by its hash.

    Args:
        path: checkpoint, output folder, bundle or name; None takes the newest output of one's own scans, else the one
            that ships; on the demo the newest output of all, and a missing one is trained.
        levels: so many codes a cell are read, the first of the tokenizer's levels; None: all.
    """

    def __init__(
        self,
        path: str | None,
        *,
        demo: bool,
        device: torch.device,
        config: str | None = None,
        levels: int | None = 1,
    ):
        if config is not None:
            log.info("vae_config is not needed: the checkpoint carries its sizes")
        if path is None and not any(map(checkpoints.complete_steps, checkpoints.NEWEST_TOKENIZERS)):
            if not demo and not shipped.names():
                what = "there is no tokenizer yet"
                raise Refused("NO_TOKENIZER", what, f"first run {STAGE1_COMMAND}, or pass --vae_ckpt")
            if demo:
                train_demo_stage1("NO_TOKENIZER")
        self.file = find_tokenizer(path, for_phantoms=demo)
        self.ct = CTTokenizer.from_pretrained(self.file, device=device)
        self.network: SparseVQVAE = self.ct.network.requires_grad_(False)
        self.hash = self.ct.digest
        try:
            self.levels = self.network.check_levels(levels)
        except ValueError as error:
            raise Refused("TOO_FEW_LEVELS", str(error), "leave --levels out, or give another tokenizer") from None
        self.lookup_on_cpu = copy.deepcopy(self.network.vq).cpu()  # samples are made on the CPU, also in workers

    def vectors(self) -> torch.Tensor:
        """A vector for each code number: what a projector will see the like of."""
        return self.lookup_on_cpu.lookup(torch.arange(self.lookup_on_cpu.num_embeddings)).detach().float()

    def reducer(self, *, max_tokens: int, method: str, detector: CellDetector | None = None) -> Reducer:
        lookup, width = self.lookup_on_cpu.lookup, self.network.sizes.latent_channels
        on_cpu = None if detector is None else copy.deepcopy(detector).cpu()
        how = {"max_tokens": max_tokens, "method": method, "levels": self.levels, "detector": on_cpu}
        return Reducer(lookup, width=width, **how)

    def source(self, cache_dir: str | Path) -> TokenSource:
        return TokenSource(self.ct, cache_dir=cache_dir)


class AlignmentText:
    """Rows of one split and the tokens of their images, read when they are first asked for.

    Args:
        max_rows: at most this many, evenly spread over the rows there are.
        phantoms: count, seed, `about` and share of `reports` of the built-in text, which is taken without data.
    """

    def __init__(
        self,
        *,
        tokenizer: FrozenTokenizer,
        split: str,
        data: str | None = None,
        image_root: str | None = None,
        output_dir: str = "outputs/align",
        skip_bad: bool = False,
        max_rows: int | None = None,
        phantoms: dict | None = None,
    ):
        self.tokenizer, self.split, self.data, self.image_root = tokenizer, split, data, image_root
        self.cache, self.skip_bad, self.max_rows = align_data.tokens_folder(output_dir), skip_bad, max_rows
        self.phantoms = {"count": 800, "seed": 0, "about": None, "reports": 1.0} | (phantoms or {})

    @cached_property
    def rows_and_volumes(self) -> tuple[list[TextRow], dict[str, CTTokens]]:
        source = self.tokenizer.source(self.cache)
        if self.data is None:
            rows, volumes = phantom_text.builtin(source, split=self.split, **self.phantoms)
            return self._some(rows), volumes
        rows = self._some(rows_of_split(self.data, self.split, image_root=self.image_root))
        return rows, align_data.encode_rows(rows, source, skip_bad=self.skip_bad)[0]

    def _some(self, rows: list[TextRow]) -> list[TextRow]:
        if self.max_rows is None or len(rows) <= self.max_rows:
            return rows
        return [rows[number * len(rows) // self.max_rows] for number in range(self.max_rows)]

    @property
    def texts(self) -> list[str]:
        """All that is read and written: what a tokenizer of text is learned from."""
        return [f"{row.prompt}\n{row.answer}" for row in self.rows_and_volumes[0]]


def rows_of_split(data: str, split: str, *, image_root: str | None) -> list[TextRow]:
    """Rows of one split of a manifest; its problems are said with those of training."""
    rows = read_rows(data, image_root=image_root)
    kept = [row for row in rows if row.split == split]
    if split == "train":
        report = check_rows(rows)
        for problem in report["problems"].values():
            log.warning("%s", problem)
        log.info(
            "%d rows of %d images to train on, %d rows held out", len(kept), report["images"], len(rows) - len(kept)
        )
    if not kept:
        what = f"{data} has no row with split {split}"
        raise Refused("NO_CASES", what, "add a column split, or more patients", status=2)
    return kept


class Language:
    """The language model and its tokenizer, with what may be trained left trainable.

    Any Qwen-VL by hub name or path; a tiny one is built on the text, which no other reads.
    `identity` is what a projector belongs to.
    """

    def __init__(
        self,
        *,
        vl_model: str,
        amp: str,
        text: AlignmentText | None = None,
        train_language: bool = False,
        lora: dict | None = None,
        layers: dict | None = None,
        tiny: dict | None = None,
        seed: int = 0,
    ):
        if train_language and lora is not None and lora["use"]:
            what = "use_lora and train_language are both on"
            raise Refused("BAD_VALUE", what, "turn one of them off: --train_language False")
        self.trained = train_language
        half = amp == "bf16" and torch.cuda.is_available() and not train_language
        if is_tiny(vl_model):
            family = TINY_MODELS[vl_model]
            sizes = TINY_SIZES | (tiny or {})
            self.model, self.tokenizer = build_tiny(text.texts, family=family, seed=seed, **sizes)
            words = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
            self.identity = {"name": None, "built": family, "seed": seed, **sizes}
            self.identity["vocabulary"] = hashlib.sha256(words).hexdigest()  # it follows from the text
        else:
            try:
                self.model, self.tokenizer = qwen.load_language(
                    vl_model, dtype=torch.bfloat16 if half else torch.float32
                )
            except ValueError as error:
                raise Refused("BAD_MODEL", str(error)) from error
            self.identity = identify(vl_model, self.model)
        self.model.requires_grad_(False)
        self.adapter = None
        if lora is not None and lora["use"]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.adapter = qwen.add_lora(self.model, r=lora["r"], alpha=lora["alpha"], dropout=lora["dropout"])
        if train_language:
            for part in (self.model.model.language_model, self.model.lm_head):
                part.requires_grad_(True)
        layers = {"use_checkpoint": False, "compile": False} | (layers or {})
        if layers["use_checkpoint"]:
            qwen.use_checkpointing(self.model)
        if layers["compile"]:
            qwen.compile_layers(self.model)

    @property
    def is_own(self) -> bool:
        """Whether nobody but this run has it: it was built here, or its weights are changed."""
        return self.trained or self.identity["name"] is None

    @property
    def width(self) -> int:
        return qwen.language_width(self.model)

    def collate(self, *, side: str = "right"):
        """How samples become batches for this model."""
        return make_collate(self.model, self.tokenizer, side=side)


def make_collate(model: nn.Module, tokenizer, *, side: str = "right"):
    volume_id = tokenizer.convert_tokens_to_ids(chat.VOLUME_PAD)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return partial(
        chat.collate_chats, pad_id=pad_id, volume_id=volume_id, side=side, context=qwen.context_length(model)
    )


def identify(name: str, model: nn.Module) -> dict:
    """Name and revision of a model from the hub, or place and hash of a folder."""
    if Path(name).is_dir():
        return {"name": str(Path(name).resolve()), "sha256": hash_path(name)}
    return {"name": name, "revision": qwen.revision_of(model)}


def make_detector(
    *,
    tokenizer: FrozenTokenizer,
    output_dir: str,
    num_phantoms: int,
    about: list[str] | None = None,
    seed: int = 0,
) -> CellDetector | None:
    """Of the findings that are spoken of and whose cells are known; None with no phantoms."""
    kinds = [kind for kind in LOCATED if about is None or kind in about]
    if not num_phantoms or not kinds:
        return None
    source, levels = tokenizer.source(align_data.tokens_folder(output_dir)), tokenizer.levels
    how = {"count": num_phantoms, "seed": seed, "kinds": kinds, "levels": levels}
    return phantom_detector(source, tokenizer.lookup_on_cpu.lookup, **how)


def make_projector(
    *,
    tokenizer: FrozenTokenizer,
    language: Language,
    num_layers: int = 1,
    use_3d_pos: bool = False,
    detector: CellDetector | None = None,
    seed: int = 0,
) -> Projector:
    """A fresh projector whose outputs have the spread of the language model's own embeddings."""
    spread, vectors = qwen.embedding_spread(language.model), tokenizer.vectors()
    if detector is not None:  # whose numbers lie around 0
        vectors = torch.nn.functional.pad(vectors, (0, detector.num_numbers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(
            vectors.shape[1],
            language.width,
            num_layers=num_layers,
            use_3d_pos=use_3d_pos,
            position_scale=spread,
            position_grid=tokenizer.network.sizes.resolution // 8,
            detector=detector,
        )
    projector.match_scale(vectors, spread)
    return projector


def make_text_dataset(  # noqa: PLR0913
    *,
    text: AlignmentText,
    tokenizer: FrozenTokenizer,
    language: Language,
    max_3d_tokens: int = 2048,
    token_reduction: str = "pool",
    detector: CellDetector | None = None,
    chat_options: dict | None = None,
    dataset: str | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Samples of the rows, or of the user's own Dataset named by its dotted path."""
    reduce = tokenizer.reducer(max_tokens=max_3d_tokens, method=token_reduction, detector=detector)
    if dataset is not None:
        own = align_data.load_own_dataset(dataset)
        words = language.model.get_input_embeddings().num_embeddings
        return align_data.OwnDataset(own, reduce=reduce, network=tokenizer.network, skip_bad=skip_bad, vocabulary=words)
    rows, volumes = text.rows_and_volumes
    options = {"seed": text.phantoms["seed"], **(chat_options or {})}
    examples = align_data.TextDataset(rows, volumes=volumes, reduce=reduce, tokenizer=language.tokenizer, **options)
    left_out = {reason: count for reason, count in examples.dropped.items() if count}
    note = f"; left out or cut: {left_out}" if left_out else ""
    log.info("%d examples to %s on%s", len(examples), "train" if text.split == "train" else "validate", note)
    return examples


def make_held_out(*, dataset: str | None = None, **settings: Any) -> Dataset:
    """The same of rows that are held out; none, and that is said, where there are none that can be used."""
    try:
        if dataset is not None:
            raise Refused("NO_CASES", "a Dataset of your own brings no rows that are held out", "give data", status=2)
        return make_text_dataset(**settings)
    except Refused as refused:
        if refused.code != "NO_CASES":
            raise
        log.warning("nothing is validated, so the last step counts as the best: %s", refused.what)
        return Subset([], [])


def check_resumed(folder: Path, args: dict) -> None:
    """A run goes on with the tokenizer, the base model and the sizes that it began with; what else changed is said."""
    file = folder / "train_args.json"
    began = json.loads(file.read_text()) if file.is_file() else args
    changed = [
        name for name in args if began.get(name) != args[name] and not (name in LORA_SIZES and not args["use_lora"])
    ]
    for name in changed:
        if name in RESUMED_WITH:
            what = f"the run in {folder} began with {name} {began.get(name)}, this one has {args[name]}"
            raise Refused(
                RESUMED_WITH[name],
                what,
                "resume with the same settings, or start afresh in another --output_dir",
                status=2,
            )
    differences = ", ".join(
        f"{name} {args[name]} (was {began.get(name)})" for name in changed if name != "tokenizer_path"
    )
    if differences:
        log.warning("this run goes on with other settings than it began with: %s", differences)
