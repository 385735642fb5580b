"""A trained tokenizer behind two methods: a scan to tokens, tokens back to HU; and the commands made of them.

Whole volumes always: crops are for training. `tokenize` and `reconstruct` are the bodies of the commands of that name
and give what they print; a mistake of the user ends them in one line, an input that cannot be used is listed.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from app import checkpoints, data, prepared, scans
from app.preflight import fail
from app.refusals import RefusedInput, code_of, text_of
from app.scans import Found, Scan, Volume
from app.token_files import CTTokens, latent_to_voxel, read_tokens, write_tokens
from app.training import choose_device
from networks.presets import Preset
from networks.sparse import SparseTensor
from networks.tiles import Decoded, decode_whole, encode_whole
from networks.vqvae import SparseVQVAE, Tokens, support_of
from transforms.array import CUT_OFF, DROPPED, densify, fill_for, hu_from_windows

log = logging.getLogger(__name__)

MIN_POINTS = 100


class Seen(NamedTuple):
    """Voxels for a network, the affine of their grid, and what share of all denser than air lies beyond that grid."""

    x: SparseTensor
    affine: Float[np.ndarray, "4 4"]
    beyond: float


class CTTokenizer:
    """Scans to tokens and back.

    Args:
        network: a trained SparseVQVAE.
        digest: sha256 of its weights, written into every token file.
        source: where it came from, to be said.
        max_points: voxels in work at a time; a larger volume goes through in parts, with the same result.
    """

    def __init__(self, network: SparseVQVAE, *, digest: str, source: str = "", max_points: int | None = None):
        if network.vq is None:
            raise ValueError("a continuous autoencoder makes no tokens: give the output folder of stage 1 or 2")
        self.network, self.digest, self.source = network.eval(), digest, source
        self.max_points = max_points or network.sizes.max_points

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, device: str | torch.device | None = None, max_points: int | None = None
    ) -> "CTTokenizer":
        """From a checkpoint, an output folder or an exported bundle; by default the newest stage under outputs/."""
        file = checkpoints.find_tokenizer(path)
        network = checkpoints.load_tokenizer(file)
        log.info("tokenizer %s", file)
        digest = checkpoints.weights_hash(network.state_dict())
        made = cls(network, digest=digest, source=str(file), max_points=max_points)
        made.network.to(choose_device() if device is None else device)
        return made

    @property
    def sizes(self) -> Preset:
        return self.network.sizes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def open(self, scan: Any) -> Scan:
        """What `app.scans` calls a scan; a raw one on the grid that the training data were prepared on."""
        return scans.open_scan(scan, self.sizes.windows, grid=self.sizes.prepared)

    def encode(self, scan: Any, *, support: bool = False) -> CTTokens:
        """Tokens of a scan: a path (prepared case or raw), a PreparedCase, or anything with `hu` and `affine`.

        With `support` the tokens also carry which voxels there were, so that decoding need not predict them.
        """
        scan = scan if isinstance(scan, Scan) else self.open(scan)
        x, affine, beyond = self.features(scan.volume)
        findings = [code for code in scan.codes if code != "OK"]
        if beyond >= CUT_OFF:
            side = self.sizes.resolution * self.sizes.spacing
            log.warning(
                "%s: %.1f %% of what is denser than air lies beyond the %g mm grid", scan.name, 100 * beyond, side
            )
            findings.append("FOV_CROPPED")
        tokens = encode_whole(self.network, x, max_points=self.max_points)
        return CTTokens(
            codes=tokens.codes.cpu().numpy(),
            coords=tokens.coords[:, 1:].cpu().numpy(),
            latent_shape=tokens.latent_shape,
            affine=affine @ latent_to_voxel(),
            source_shape=scan.source_shape,
            source_affine=scan.source_affine,
            source_hash=scan.source_hash,
            findings=tuple(dict.fromkeys(findings)),
            features=self.sizes.features,
            windows=self.sizes.windows,
            spacing=float(self.sizes.spacing),
            keep=self.sizes.keep,
            tokenizer=self.digest,
            support=tuple(part.cpu().numpy() for part in support_of(x.level)) if support else None,
        )

    def features(self, volume: Volume) -> Seen:
        """What the network sees of a RAS volume."""
        sizes = self.sizes
        if sizes.features != "window":
            raise ValueError(f"this tokenizer was trained on features {sizes.features}, a scan gives windows")
        steps = data.preprocessing(
            resolution=sizes.resolution, spacing=sizes.spacing, keep=sizes.keep, windows=sizes.windows
        )
        item: dict[str, Any] = {"image": volume.hu, "affine": volume.affine}
        for step in [*steps, *data.sampling(windows=sizes.windows)]:  # Compose would hide a refusal (see data.py)
            item = step(item)
        if len(item["coords"]) < MIN_POINTS:
            raise RefusedInput(
                "EMPTY",
                f"only {len(item['coords'])} voxels are left of the scan, {MIN_POINTS} are needed: is it empty?",
            )
        coords = torch.from_numpy(np.pad(item["coords"].astype(np.int32), ((0, 0), (1, 0))))
        feats = torch.from_numpy(np.ascontiguousarray(item["feats"], np.float32))
        x = SparseTensor(feats.to(self.device), coords.to(self.device), tuple(item["spatial_shape"]), 1)
        return Seen(x, np.asarray(item["affine"], np.float64), item["beyond"])

    def decode(self, tokens: CTTokens | str | Path) -> Volume:
        """HU on the tokenizer's grid; voxels that no token speaks for are air (-1024)."""
        tokens = read_tokens(tokens) if isinstance(tokens, str | Path) else tokens
        return self.to_hu(self.decode_sparse(tokens), tokens)

    def decode_sparse(self, tokens: CTTokens, *, use_support: bool = True) -> Decoded:
        """Window values on the stored support where the tokens carry one, else on predicted voxels."""
        self.check(tokens)
        rows = torch.nn.functional.pad(torch.from_numpy(tokens.coords), (1, 0)).to(self.device)
        codes = torch.from_numpy(tokens.codes).to(self.device)
        support = None
        if use_support and tokens.support is not None:
            support = [torch.from_numpy(part).to(self.device) for part in tokens.support]
        given = Tokens(codes, rows, tokens.latent_shape, 1)
        return decode_whole(self.network, given, support=support, max_points=self.max_points)

    def check(self, tokens: CTTokens) -> None:
        """Raises unless this very tokenizer made the tokens."""
        sizes = self.sizes
        if tokens.tokenizer != self.digest:
            raise RefusedInput(
                "OTHER_TOKENIZER",
                f"the tokens were made by tokenizer {tokens.tokenizer[:12]}, this one is {self.digest[:12]}: "
                "give theirs with --tokenizer, or tokenize the scan again",
            )
        levels = 1 if tokens.codes.ndim == 1 else tokens.codes.shape[1]
        top = int(tokens.codes.max())
        pairs = {
            "codes a latent": (levels, sizes.quantizer_levels),
            "codes up to": (top, min(top, sizes.num_embeddings - 1)),
            "a grid of": (tokens.grid_shape, (sizes.resolution,) * 3),
            **{
                name: (getattr(tokens, name), getattr(sizes, name))
                for name in ("features", "windows", "spacing", "keep")
            },
        }
        for name, (told, own) in pairs.items():
            if told != own:
                raise RefusedInput(
                    "DAMAGED_TOKENS", f"the tokens tell {name} {told}, their tokenizer {own}: tokenize the scan again"
                )

    def to_hu(self, decoded: Decoded, tokens: CTTokens) -> Volume:
        return Volume(dense_hu(decoded.values, self.sizes), tokens.grid_affine)


# ---- commands


def tokenize(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    support: bool = False,
    series: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Token files of a scan, a prepared case, or every case of a prepared dataset.

    OUT is a file where it ends in .npz and there is one scan, else a folder. Gives an entry a case; one that cannot be
    used is listed as refused, the rest is done.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        fail("NO_SOURCE", f"{source} does not exist", "give a scan, a prepared case or a prepared dataset")
    made = _loaded(tokenizer)
    cases, single = list(_cases_in(source, made, series)), out.suffix == ".npz"
    if single and len(cases) > 1:
        cases = _one_good(cases, source, out)
    _check_kind(source, out, single=single, kinds=".npz")
    check_folder(out.parent if single else out)
    entries = []
    for name, source_hash, open_it in progress(cases, "tokenize"):
        path = out if single else out / f"{name}.npz"
        try:
            if isinstance(open_it, ValueError):
                raise open_it
            tokens = None if overwrite else _there_already(path, made, source_hash=source_hash, support=support)
            message = "" if tokens is None else "there already"
            if tokens is None:
                tokens = made.encode(open_it(), support=support)
                write_tokens(path, tokens)
        except ValueError as error:
            entries.append(_refused(name, error))
            continue
        entries.append(
            {
                "case": name,
                "status": "ok",
                "codes": _codes_of(tokens),
                "tokens": str(path),
                "count": len(tokens.codes),
                "message": message,
            }
        )
    return _summary(entries, made)


def _one_good(cases: list[Found], source: Path, out: Path) -> list[Found]:
    """Cases for one file: what does not open with its refusal, which only the values may tell, and one that does."""
    tried: list[Found] = []
    for case in cases:
        try:
            if callable(case.open):
                case.open()
        except ValueError as error:
            case = case._replace(open=error)
        tried.append(case)
        if sum(callable(one.open) for one in tried) > 1:
            fail("MANY_SCANS", f"{source} holds more than one scan, {out} is one file", "give a folder as OUT")
    return tried


def _check_kind(source: Path, out: Path, *, single: bool, kinds: str) -> None:
    """One file in and a file of another kind out is a slip, not a folder's name."""
    if source.is_file() and out.suffix and not single and not out.is_dir():
        fail("NO_OUTPUT", f"what is written ends in {kinds}, OUT is {out}", "give such a file, or a folder")


def check_folder(path: Path, *, name: str = "OUT") -> None:
    """Before any work: a folder can be made or is there, and can be written; `name` is what the user calls it."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                fail("NO_OUTPUT", f"{part} is a file, {name} needs a folder there", f"give another {name}")
            if not os.access(part, os.W_OK | os.X_OK):
                fail("NO_OUTPUT", f"{part} may not be written", f"give another {name}, or mend its permissions")
            return


def _there_already(path: Path, made: CTTokenizer, *, source_hash: str, support: bool) -> CTTokens | None:
    """Tokens of an earlier, interrupted call. Those of another tokenizer or scan are neither taken nor overwritten.

    Those without the support that is asked for now are made again.
    """
    if not path.exists():
        return None
    try:
        tokens = read_tokens(path)
    except RefusedInput as error:
        raise RefusedInput(error.code, f"{text_of(error)}: it is in OUT already, --overwrite makes it again") from error
    if tokens.tokenizer != made.digest:
        raise RefusedInput(
            "EXISTS", f"{path.name} is there already, by tokenizer {tokens.tokenizer[:12]}: --overwrite, or another OUT"
        )
    if tokens.source_hash != source_hash:
        raise RefusedInput("EXISTS", f"{path.name} is there already, of another scan: --overwrite, or another OUT")
    return None if support and tokens.support is None else tokens


def _codes_of(tokens: CTTokens) -> list[str]:
    """What was found of their scan; a file of older software does not say."""
    return ["EXISTS"] if tokens.findings is None else [*tokens.findings] or ["OK"]


def _refused(name: str, error: ValueError) -> dict[str, Any]:
    return {"case": name, "status": "refused", "codes": [code_of(error)], "message": text_of(error)}


def _cases_in(source: Path, made: CTTokenizer, series: str | None) -> Iterator[Found]:
    """Every scan of a source."""
    is_prepared = scans.is_case(source) or (source.is_dir() and prepared.find_datasets(source))
    if is_prepared and series is not None:
        fail("BAD_VALUE", f"{source} is prepared, so --series names nothing", "leave it out")
    if scans.is_case(source):
        try:
            source_hash, open_it = prepared.open_case(source).source_hash, lambda: made.open(source)
        except ValueError as error:
            source_hash, open_it = "", error
        yield Found(source.name, source_hash, open_it)
    elif is_prepared:
        cases = prepared.list_cases(source)
        several = len({case.dataset for case in cases}) > 1
        for case in cases:
            name = f"{case.dataset}/{case.case_id}" if several else case.case_id
            if isinstance(case, prepared.DamagedCase):
                yield Found(name, "", case.error)
            else:
                yield Found(name, case.source_hash, lambda case=case: made.open(case))
    else:
        yield from scans.raw_scans(source, series=series, grid=made.sizes.prepared)


def reconstruct(
    tokens: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    like: str | Path | None = None,
    use_support: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """NIfTI files in HU of a token file or a folder of them, in world coordinates; `like` a scan, on its own grid."""
    source, out = Path(tokens), Path(out)
    files = sorted(source.rglob("*.npz")) if source.is_dir() else [source]
    if not files or not source.exists():
        fail("NO_TOKENS", f"{source} holds no token file", "make one with `python -m app tokenize SOURCE OUT`")
    single = out.name.endswith((".nii", ".nii.gz"))
    if single and len(files) > 1:
        fail("MANY_SCANS", f"{source} holds {len(files)} token files, {out} is one file", "give a folder as OUT")
    _check_kind(source, out, single=single, kinds=".nii or .nii.gz")
    check_folder(out.parent if single else out)
    try:
        grid = None if like is None else scans.grid_of(Path(like))
    except ValueError as error:
        reason = getattr(error, "message", error)  # without the remedy that a refusal of `prepare` brings
        fail("BAD_LIKE", f"{like}: {reason}", "give one scan that can be read", status=3)
    made = _loaded(tokenizer)
    entries = []
    for file in progress(files, "reconstruct"):
        name = file.relative_to(source).with_suffix("").as_posix() if source.is_dir() else file.stem
        path = out if single else out / f"{name}.nii.gz"
        try:
            if path.exists() and not overwrite:  # it may be the user's own scan
                raise RefusedInput("EXISTS", f"{path} is there already: --overwrite, or another OUT")
            content = read_tokens(file)
            decoded = made.decode_sparse(content, use_support=use_support)
        except ValueError as error:
            entries.append(_refused(name, error))
            continue
        volume = made.to_hu(decoded, content)
        write_nifti(path, volume if grid is None else onto_grid(volume, *grid))
        ok = {"case": name, "status": "ok", "codes": _codes_of(content), "image": str(path)}
        entries.append({**ok, "forced_children": decoded.forced})
    return _summary(entries, made)


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)


def _loaded(path: str | Path | None) -> CTTokenizer:
    try:
        return CTTokenizer.from_pretrained(path)
    except ValueError as error:
        fail("BAD_TOKENIZER", str(error), "give another with --tokenizer")


def _summary(entries: list[dict[str, Any]], made: CTTokenizer) -> dict[str, Any]:
    done = sum(entry["status"] == "ok" for entry in entries)
    by = {"file": made.source, "sha256": made.digest}
    return {"cases": entries, "ok": done, "refused": len(entries) - done, "tokenizer": by}


def lines(done: dict[str, Any]) -> Iterator[str]:
    """What the commands print of it."""
    for entry in done["cases"]:
        told, message = entry.get("tokens") or entry.get("image") or "", entry.get("message", "")
        codes = "" if entry["codes"] == ["OK"] else ", ".join(entry["codes"])
        said = ": ".join(part for part in (codes, message) if part)
        yield "  ".join(part for part in (entry["status"], entry["case"], told, said) if part)
    yield f"{done['ok']} ok, {done['refused']} refused, by tokenizer {done['tokenizer']['file']}"


# ---- volumes out


def dense_hu(values: SparseTensor, sizes: Preset) -> Float[np.ndarray, "X Y Z"]:
    """Window values of one volume as HU on the whole grid."""
    hu = hu_from_windows(values.feats.float().cpu().numpy(), sizes.windows)
    return densify(hu, values.coords[:, 1:].cpu().numpy(), values.spatial_shape, fill=fill_for(sizes.keep))


def onto_grid(volume: Volume, shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"]) -> Volume:
    """The volume on another grid, linear, air outside."""
    there = np.linalg.inv(volume.affine) @ affine
    hu = ndimage.affine_transform(
        np.asarray(volume.hu, np.float32), there[:3, :3], there[:3, 3], shape, order=1, mode="constant", cval=DROPPED
    )
    return Volume(hu, affine)


def write_nifti(path: Path, volume: Volume) -> None:
    """int16 HU in mm, whole or not at all."""
    image = nibabel.Nifti1Image(np.clip(np.rint(volume.hu), -32768, 32767).astype(np.int16), volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nibabel.save(image, beside)
        os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)  # nobody knows the file beside
        raise
    finally:
        beside.unlink(missing_ok=True)
