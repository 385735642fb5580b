"""Rows of text with tokens of scans, as samples and batches for alignment; also a user's own Dataset in two forms.

Form A brings precomputed `feats_3d`, `coords_3d`, `input_ids`, `attention_mask`, `labels`; form B `inputs_3d`
(`sparse_sdf`, `sparse_index`, `batch_idx`) that the frozen tokenizer encodes. Both leave through the same collate. What
cannot be used is counted by reason, never replaced in silence.
"""

import contextlib
import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from app.language import chat
from app.language.volume_tokens import Reducer, TokenSource, sparse_inputs
from app.shared.refusals import Refused, refusal_of
from app.shared.terminal import progress
from app.text.rows import TextRow
from app.tokens.token_files import CTTokens
from app.training.loaders import CaseLoader, StepSampler
from app.training.step import sample_seed
from networks.tokens import TokenSequence

log = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20  # of sequences, in each process that makes samples


class TextDataset(Dataset):
    """Samples `{input_ids, labels, volumes, case_id}` of rows whose tokens are known.

    Without volumes the report of a scan, where there is one, stands in the volume's place: a model learns to read.
    Rows that cannot be learned from (no answer, an answer cut to nothing, a question beyond the context, no volume) are
    left out; `dropped` counts them by reason.
    """

    def __init__(
        self,
        rows: Sequence[TextRow],
        *,
        volumes: dict[str, CTTokens],
        reduce: Reducer,
        tokenizer,
        fusion: str = "placeholder",
        max_text_tokens: int = 1024,
        with_volumes: bool = True,
        seed: int = 0,
    ):
        self.volumes, self.reduce, self.with_volumes, self.seed = volumes, reduce, with_volumes, seed
        self.reduced: dict[str, TokenSequence] = {}  # of the volumes that were read first
        self.bytes_left = KEPT_BYTES
        self.encode = partial(
            chat.encode_chat,
            tokenizer,
            num_volumes=int(with_volumes),
            fusion=fusion,
            max_text_tokens=max_text_tokens,
        )
        self.reports = {} if with_volumes else {row.image: row.answer for row in rows if row.kind == "report"}
        self.dropped: Counter[str] = Counter()
        self.rows, self.encoded = [], []
        for row in rows:
            if row.image not in volumes:
                self.dropped["no volume"] += 1
                continue
            try:
                encoded = self.encode(row.prompt, answer=row.answer, words=self.reports.get(row.image))
            except ValueError:
                self.dropped["question too long"] += 1
                continue
            if encoded is None:
                self.dropped["no answer left" if row.answer else "empty answer"] += 1
                continue
            self.dropped["answer cut"] += encoded.answer_cut  # these rows stay, with a shorter answer
            self.rows.append(row)
            self.encoded.append(encoded)
        if not self.rows:
            what = f"no row can be learned from: {dict(self.dropped)} of {len(rows)}"
            raise Refused("NO_CASES", what, "check answers and max_text_tokens", status=2)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        """By its number; with the step in front it is one to learn from, drawn for that step."""
        if isinstance(index, int):
            return self._sample(self.rows[index], self.encoded[index])
        step, number = index
        sample, seed = self._sample(self.rows[number], self.encoded[number]), sample_seed(self.seed, step, str(number))
        return sample | {"volumes": [self.reduce.to_learn_from(one, seed=seed) for one in sample["volumes"]]}

    def question(self, number: int) -> dict:
        """A sample without its answer, to be answered."""
        row = self.rows[number]
        return self._sample(row, self.encode(row.prompt, words=self.reports.get(row.image)))

    def _sample(self, row: TextRow, encoded: chat.Encoded) -> dict:
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "volumes": [self._volume(row.image)] if self.with_volumes else [],
            "case_id": row.image,
        }

    def _volume(self, image: str) -> TokenSequence:
        """The sequence of one volume, kept while there is room: a scan has many questions."""
        if image in self.reduced:
            return self.reduced[image]
        volume = self.reduce(self.volumes[image])
        if (size := sum(part.nbytes for part in volume)) <= self.bytes_left:
            self.bytes_left -= size
            self.reduced[image] = volume
        return volume


class OwnDataset(Dataset):
    """A user's torch Dataset of items in form A or B, as samples.

    An item that cannot be used ends the run by its number; with `skip_bad` the next one that can takes its place.
    `vocabulary`: token ids are below it.
    """

    def __init__(
        self, items: Dataset, *, reduce: Reducer, network=None, skip_bad: bool = False, vocabulary: int | None = None
    ):
        self.items, self.skip_bad = items, skip_bad
        self.read = partial(as_sample, reduce=reduce, network=network, vocabulary=vocabulary)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        wanted = index if isinstance(index, int) else index[1]
        for number in chain(range(wanted, len(self)), range(wanted)):
            try:
                return self.read(self.items[number])
            except Exception as error:  # items are made by the user's code, which may raise anything
                reason = str(error).strip().split("\n")[0]
                if not self.skip_bad:
                    what = f"item {number} of the dataset cannot be used ({type(error).__name__}: {reason})"
                    raise Refused("BAD_DATASET", what, "repair it, or pass --skip_bad True") from None
                log.warning("left out item %d of the dataset: %s", number, reason)
        what = f"no item of the dataset can be used, of {len(self)}"
        raise Refused("NO_CASES", what, "the lines above say why", status=2)


def as_sample(item: dict, *, reduce: Reducer, network=None, vocabulary: int | None = None) -> dict:
    """One item of form A or B; its pads are removed, its volumes reduced to the budget."""
    mask = torch.as_tensor(item["attention_mask"]).bool()
    ids, labels = (torch.as_tensor(item[name])[mask].tolist() for name in ("input_ids", "labels"))
    if all(label == chat.IGNORED for label in labels[1:]):
        raise ValueError(f"labels are all {chat.IGNORED}: there is nothing to learn")
    if vocabulary is not None and not all(0 <= token < vocabulary for token in ids):
        raise ValueError(
            f"input_ids must lie in 0..{vocabulary - 1}, got {min(ids)}..{max(ids)}: of another tokenizer?"
        )
    if "feats_3d" in item:
        volumes = split_volumes(item["feats_3d"], item["coords_3d"], reduce=reduce)
    elif "inputs_3d" in item:
        if network is None:
            raise ValueError("items bring inputs_3d, which a tokenizer has to encode: give vae_ckpt")
        volumes = encode_inputs_3d(network, item["inputs_3d"], reduce=reduce)
    else:
        raise ValueError(f"an item must hold feats_3d and coords_3d, or inputs_3d, got {', '.join(sorted(item))}")
    return {"input_ids": ids, "labels": labels, "volumes": volumes, "case_id": str(item.get("case_id", ""))}


def split_volumes(feats: Tensor, coords: Tensor, *, reduce: Reducer) -> list[TokenSequence]:
    """Features of form A by the volume number in the first coordinate."""
    if feats.shape[1] != reduce.width:
        raise ValueError(f"feats_3d must be (N, {reduce.width}) as the tokenizer's codes, got {tuple(feats.shape)}")
    if len(feats) == 0:
        raise ValueError("feats_3d has no rows: an item needs a volume")
    parts = [coords[:, 0] == number for number in coords[:, 0].unique().tolist()]
    return [reduce.rows(feats[part], coords[part, 1:]) for part in parts]


def encode_inputs_3d(network, inputs: dict, *, reduce: Reducer) -> list[TokenSequence]:
    """Form B: values on voxels of the tokenizer's own grid, a sequence for each sample."""
    tokens = network.encode(sparse_inputs(inputs, network), levels=reduce.levels)
    codes, coords = tokens.codes.cpu(), tokens.coords.cpu()
    parts = [coords[:, 0] == sample for sample in range(tokens.batch_size)]
    return [reduce.rows(reduce.lookup(codes[part]), coords[part, 1:]) for part in parts]


def load_own_dataset(name: str) -> Dataset:
    """`package.module.Class`, called without arguments."""
    module, _, kind = name.rpartition(".")
    try:
        dataset = getattr(importlib.import_module(module), kind)()
    except Exception as error:  # the user's code, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise Refused("BAD_DATASET", f"{name} cannot be loaded ({reason})") from error
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise Refused("BAD_DATASET", f"{name} has no __len__ or __getitem__", "give a torch Dataset")
    return dataset


def encode_rows(
    rows: Iterable[TextRow], source: TokenSource, *, skip_bad: bool = False
) -> tuple[dict[str, CTTokens], list[str]]:
    """Tokens of every image once, before training; what cannot be read is named, and ends the run unless skipped."""
    wanted: dict[str, TextRow] = {}
    for row in rows:
        if wanted.setdefault(row.image, row).path != row.path:
            what = f"{row.image} names two scans: {wanted[row.image].path}, {row.path}"
            raise Refused("BAD_MANIFEST", what, "rename one")
    volumes, bad = {}, []

    def encode(image: str) -> None:
        try:
            if wanted[image].path is None:
                raise Refused("SCANS_MISSING", wanted[image].missing, "give image_root", status=2)
            volumes[image] = source(wanted[image].path)
        except (ValueError, OSError, KeyError, EOFError) as error:
            bad.append(image)
            refused = refusal_of(error)
            reason = str(error).splitlines()[0] if refused is None else f"{refused.code}: {refused.what}"
            if not skip_bad:
                leave = "repair it, or leave it out with --skip_bad True (of python -m app: --skip-bad)"
                raise Refused("BAD_SCAN", f"{image} cannot be used: {reason}", leave) from error
            log.warning("left out %s: %s", image, reason)

    visit_in_shares(list(wanted), encode, says="encoding scans")
    bad = [image for image in wanted if image in set(bad)]  # each once, though visited twice
    if not volumes:
        what = f"none of {len(wanted)} scans can be used"
        raise Refused("NO_CASES", what, "run `python -m app check` on the data", status=2)
    return volumes, bad


class _Visits(Dataset):
    """Items that a loader's worker visits for what this leaves on disk. A visit that fails is left to the next one."""

    def __init__(self, items: Sequence, visit: Callable[[Any], None]):
        self.items, self.visit = items, visit

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> int:
        with contextlib.suppress(Exception):  # the process that waits visits it again, and says what is wrong
            self.visit(self.items[number])
        return number


def visit_in_shares(items: Sequence, visit: Callable[[Any], None], *, says: str, workers: int = 1) -> None:
    """Visits all items; of several processes each first visits a share, so that all then find the rest on disk.

    These are the ranks of a run, or `workers` of a run without ranks.
    """
    rank, world = idist.get_rank(), idist.get_world_size()
    log.info("%s: %d", says, len(items))
    if world > 1:
        for item in with_progress(items[rank::world], f"{says}, one of {world} shares"):
            visit(item)
        idist.barrier()
    elif workers > 1:
        # its own generator, as a loader draws from the global one; forked, as a visit cannot be pickled
        options = {"batch_size": None, "generator": torch.Generator(), "multiprocessing_context": "fork"}
        visited = iter(CaseLoader(_Visits(items, visit), num_workers=workers, **options))
        for _ in with_progress(items, f"{says}, {workers} at a time"):
            next(visited)
    for item in with_progress(items, says):
        visit(item)


def with_progress(items: Sequence, says: str) -> Iterable:
    """The items with a bar, of which several processes show one."""
    return progress(items, says) if idist.get_rank() == 0 else items


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    max_steps: int,
    collate: Callable,
    seed: int = 0,
    batch_split: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """One long epoch of `max_steps` batches; each a list of micro-batches split by sample."""
    sampler = StepSampler(len(dataset), batch_size=batch_size, max_steps=max_steps, seed=seed)
    return CaseLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(split_collate, collate=collate, batch_split=batch_split),
        persistent_workers=num_workers > 0,
    )


def make_held_out_loader(dataset: Dataset, *, batch_size: int, collate: Callable, num_workers: int = 0) -> DataLoader:
    """Every sample once, in order; each rank has as many."""
    rank, world = idist.get_rank(), idist.get_world_size()
    share = range(rank, len(dataset) // world * world, world)
    if not share:  # of which MONAI would warn at every validation
        warnings.filterwarnings("ignore", "`dataloader` is empty")
    return CaseLoader(dataset, batch_size=batch_size, sampler=share, num_workers=num_workers, collate_fn=collate)


def split_collate(samples: list[dict], *, collate: Callable, batch_split: int) -> list[dict]:
    """Micro-batches of a batch, each padded to its own longest sample."""
    per_part = -(-len(samples) // min(batch_split, len(samples)))
    return [collate(samples[at : at + per_part]) for at in range(0, len(samples), per_part)]


def tokens_folder(output_dir: str | Path) -> Path:
    """Where encoded tokens are kept between runs: beside the output folders, by tokenizer hash."""
    return Path(output_dir).parent / "tokens"
