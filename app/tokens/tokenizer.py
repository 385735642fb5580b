"""A trained tokenizer behind two methods: a whole scan to tokens, tokens back to HU. Crops are for training."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32

from app.shared.devices import choose_device
from app.shared.json_files import read_object
from app.shared.refusals import Refused, check_path
from app.tokens import open_scan
from app.tokens.allocation import spread_levels, squared_errors
from app.tokens.bundles import check_description
from app.tokens.code_tables import CodeTables, tables_of
from app.tokens.open_scan import Scan, Volume
from app.tokens.token_files import CTTokens, latent_to_voxel, read_tokens
from app.training import checkpoints, data, seals, shipped
from app.training.checkpoints import NEWEST_TOKENIZERS, averaged_file, complete_steps, step_file
from networks.presets import Preset
from networks.refinement import encode_refined
from networks.sparse import SparseTensor
from networks.support import support_of
from networks.tiles import Decoded, decode_whole
from networks.vqvae import BatchTokens, SparseVQVAE
from transforms import Windowsd
from transforms.grid import CUT_OFF, RESAMPLER
from transforms.sparse import KEEPS, densify
from transforms.windows import hu_from_windows, window_bounds

log = logging.getLogger(__name__)

MIN_POINTS = 100
RESAMPLER_CHANGED = (
    "{file} learned from data resampled by an older rule, scans are now resampled by '{now}'; tokens are usable, and "
    "training it again closes the gap (docs/data.md)"
)


class ScanRows(NamedTuple):
    """A scan without its values, and its rows as the network is to see them, on the CPU."""

    scan: Scan | None
    feats: Float[torch.Tensor, "N C"]
    coords: Int32[torch.Tensor, "N 4"]
    spatial_shape: tuple[int, int, int]
    affine: Float[np.ndarray, "4 4"]  # of the rows' grid
    beyond: float  # share of all denser than air that lies beyond that grid


class CTTokenizer:
    """Scans to tokens and back.

    Args:
        network: a trained SparseVQVAE.
        digest: sha256 of its weights, written into every token file.
        source: where it came from, to be said.
        max_points: voxels in work at a time; a larger volume goes through in parts, with the same result.
        chain: transforms from a volume to features, as a config declares them; by default made from the sizes.
    """

    def __init__(
        self,
        network: SparseVQVAE,
        *,
        digest: str,
        source: str = "",
        max_points: int | None = None,
        chain: Sequence[data.Transform] | None = None,
    ):
        if network.vq is None:
            what = "a continuous autoencoder makes no tokens"
            raise Refused("NO_CODEBOOK", what, "give the output folder of stage 1 or 2")
        self.network, self.digest, self.source = network.eval(), digest, source
        self.max_points = max_points or network.sizes.max_points
        self.chain = chain_of(network.sizes) if chain is None else chain

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, device: str | torch.device | None = None, max_points: int | None = None
    ) -> "CTTokenizer":
        """From a checkpoint, an output folder, an exported bundle, or the name of one that ships (`ct_base`).

        By default the newest stage under outputs/ that learned from one's own scans, else the one that ships.
        """
        file = find_tokenizer(path)
        network = checkpoints.load_tokenizer(file)
        log.info("tokenizer %s", file)
        if checkpoints.is_resampled_otherwise(network.sizes):
            log.warning("%s", RESAMPLER_CHANGED.format(file=file.name, now=RESAMPLER))
        digest = seals.weights_hash(network.state_dict())
        check_description(file, network.sizes, digest)
        ct = cls(network, digest=digest, source=str(file), max_points=max_points)
        ct.network.to(choose_device() if device is None else device)
        return ct

    @cached_property
    def tables(self) -> CodeTables:
        """What packed files code codes by; made when first asked for."""
        return tables_of(self.network, self.digest)

    @property
    def sizes(self) -> Preset:
        return self.network.sizes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def open(self, scan: Any) -> Scan | CTTokens:
        """What `app.tokens.open_scan` calls a scan; a raw one on the grid that the training data were prepared on."""
        return open_scan.open_scan(scan, self.sizes.windows, grid=self.sizes.prepared, tables=self.tables)

    def check_levels(self, levels: float | None) -> float:
        """How many levels are meant, a fraction of them on average over the cells; None means all there are."""
        fraction = levels is not None and not float(levels).is_integer()
        if fraction and 1 < levels < self.sizes.quantizer_levels and self.sizes.features == "window":
            return levels
        try:
            return self.network.check_levels(levels)
        except ValueError as error:
            raise Refused("BAD_VALUE", str(error), "leave --levels out for all of them") from error

    def check_refine(self, steps: int) -> None:
        """Refuses steps that cannot be taken."""
        if steps < 0 or (steps and self.sizes.features != "window"):
            why = "" if steps < 0 else ": codes of shapes are not refined"
            raise Refused("BAD_VALUE", f"refine must be a number of steps from 0, got {steps}{why}", "leave it out")

    def encode(self, scan: Any, *, support: bool = False, levels: float | None = None, refine: int = 0) -> CTTokens:
        """Tokens of a scan: a path (case or raw), a PreparedCase, a nibabel image, a MetaTensor, (array, affine).

        A token file gives what it holds, if it is of this tokenizer.
        With `support` the tokens also carry which voxels there were, so that decoding need not predict them. Of a
        tokenizer with several quantiser levels the first `levels` alone are kept, fewer bits for a coarser volume. A
        fraction is their mean: each cell keeps as many as pay, found by decoding each prefix once. `refine`: so many
        steps from the encoder's codes to others that decode to fewer errors, each about three decodings long.
        """
        wanted = self.check_levels(levels)
        whole = float(wanted).is_integer()
        self.check_refine(refine)
        rows = scan if isinstance(scan, ScanRows) else self.look(scan)
        if isinstance(rows, CTTokens):
            self.check_tokens(rows)
            if not whole or refine:
                what = "refine must be 0" if whole else "levels must be a whole number"
                raise Refused("BAD_VALUE", f"{what} for tokens, got {refine if whole else wanted}", "give the scan")
            return dataclasses.replace(rows, codes=rows.first_levels(None if levels is None else int(levels)))
        scan, x = rows.scan, self.on_device(rows)
        findings = [code for code in scan.codes if code != "OK"]
        if rows.beyond >= CUT_OFF:
            side = self.sizes.resolution * self.sizes.spacing
            what = "%s: %.1f %% of what is denser than air lies beyond the %g mm grid"
            log.warning(what, scan.name, 100 * rows.beyond, side)
            findings.append("FOV_CROPPED")
        with torch.inference_mode(not refine):
            how = {"max_points": self.max_points, "levels": int(wanted) if whole else None}
            units = [(high - low) / 2 for low, high in map(window_bounds, self.sizes.windows)]
            tokens = encode_refined(self.network, x, steps=refine, units=units, **how)
        encoded = CTTokens(
            codes=tokens.codes.cpu().numpy(),
            coords=tokens.coords[:, 1:].cpu().numpy(),
            latent_shape=tokens.latent_shape,
            affine=rows.affine @ latent_to_voxel(),
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
            voxels=len(x),
            refined=refine or None,
        )
        if whole:
            return encoded
        prefixes = (self.decode_sparse(encoded, levels=number).values for number in range(1, encoded.levels + 1))
        volumes = (dense_hu(values, self.sizes) for values in prefixes)
        return encoded.with_levels(spread_levels(self.errors_by_level(x, volumes), wanted))

    def errors_by_level(
        self, x: SparseTensor, volumes: Iterable[Float[np.ndarray, "X Y Z"]]
    ) -> Float[np.ndarray, "M L"]:
        """Squared errors in HU, summed over the voxels of each cell, of `volumes` from one code a cell, two, and on."""
        hu, coords = hu_from_windows(x.feats.float().cpu().numpy(), self.sizes.windows), x.coords[:, 1:].cpu().numpy()
        owner = torch.unique_consecutive(x.level.keys >> 9, return_inverse=True)[1].cpu().numpy()  # of eight a side
        return np.stack([squared_errors(hu, volume, coords, owner) for volume in volumes], 1)

    def look(self, scan: Any) -> ScanRows | CTTokens:
        """What encoding does before the network, on the CPU: opens a scan, brings it onto the grid, takes its rows."""
        opened = self.open(scan)
        if isinstance(opened, CTTokens):
            return opened
        return self.rows_of(opened.volume, scan=opened._replace(volume=None))

    def on_device(self, rows: ScanRows) -> SparseTensor:
        """What the network sees."""
        x = SparseTensor(rows.feats.to(self.device), rows.coords.to(self.device), rows.spatial_shape, 1)
        if self.max_points is not None and len(x) > self.max_points:
            x = x.to("cpu")  # sorted where that is fast; parts of it go back one by one
        return x

    def rows_of(self, volume: Volume, *, scan: Scan | None = None) -> ScanRows:
        """A RAS volume on the tokenizer's grid, windowed and sparse."""
        if self.sizes.features != "window":
            what = f"this tokenizer was trained on features {self.sizes.features}, a scan gives windows"
            raise Refused("BAD_TOKENIZER", what)
        item: dict[str, Any] = {"image": volume.hu, "affine": volume.affine}
        for step in self.chain:  # not Compose's call: it hides a refusal behind a RuntimeError
            item = step(item)
        if len(item["coords"]) < MIN_POINTS:
            what = f"only {len(item['coords'])} voxels are left of the scan, {MIN_POINTS} are needed"
            raise Refused("EMPTY", what, "is it empty?")
        coords = torch.from_numpy(np.pad(item["coords"].astype(np.int32), ((0, 0), (1, 0))))
        feats = torch.from_numpy(np.ascontiguousarray(item["feats"], np.float32))
        affine = np.asarray(item["affine"], np.float64)
        return ScanRows(scan, feats, coords, tuple(item["spatial_shape"]), affine, item["beyond"])

    def decode(self, tokens: CTTokens | str | Path, *, levels: int | None = None) -> Volume:
        """HU on the tokenizer's grid, from the first `levels` codes of each cell or from all that there are.

        Voxels that no token speaks for are air (-1024).
        """
        tokens = self.read(tokens) if isinstance(tokens, str | Path) else tokens
        return self.to_hu(self.decode_sparse(tokens, levels=levels), tokens)

    def decode_sparse(self, tokens: CTTokens, *, use_support: bool = True, levels: int | None = None) -> Decoded:
        """Window values on the stored support where the tokens carry one, else on predicted voxels."""
        self.check_tokens(tokens)
        rows = torch.nn.functional.pad(torch.from_numpy(tokens.coords), (1, 0)).to(self.device)
        codes = torch.from_numpy(tokens.first_levels(levels)).to(self.device)
        support = None
        if use_support and tokens.support is not None:
            support = [torch.from_numpy(part).to(self.device) for part in tokens.support]
        given = BatchTokens(codes, rows, tokens.latent_shape, 1)
        with torch.inference_mode():
            return decode_whole(self.network, given, support=support, max_points=self.max_points)

    def read(self, path: str | Path) -> CTTokens:
        """The tokens in a file of this tokenizer, packed or plain."""
        tokens = read_tokens(path, tables=self.tables)
        self.check_tokens(tokens)
        return tokens

    def check_tokens(self, tokens: CTTokens) -> None:
        """Raises unless this very tokenizer made the tokens."""
        sizes = self.sizes
        if tokens.tokenizer != self.digest:
            what = f"the tokens were made by tokenizer {tokens.tokenizer[:12]}, this one is {self.digest[:12]}"
            raise Refused("OTHER_TOKENIZER", what, "give theirs with --tokenizer, or tokenize the scan again")
        top = int(tokens.codes.max())
        pairs = {
            "codes a latent": (tokens.levels, min(tokens.levels, sizes.quantizer_levels)),
            "codes up to": (top, min(top, sizes.num_embeddings - 1)),
            **{name: (getattr(tokens, name), getattr(sizes, name)) for name in ("features", "windows", "keep")},
        }
        if sizes.features == "window":  # a shape has a spacing of its own, and may lie on a coarser grid
            pairs["a grid of"] = (tokens.grid_shape, (sizes.resolution,) * 3)
            pairs["spacing"] = (tokens.spacing, sizes.spacing)
        for name, (stated, own) in pairs.items():
            if stated != own:
                raise Refused("DAMAGED_TOKENS", f"the tokens tell {name} {stated}, their tokenizer {own}")

    def to_hu(self, decoded: Decoded, tokens: CTTokens) -> Volume:
        return Volume(dense_hu(decoded.values, self.sizes), tokens.grid_affine)


def chain_of(sizes: Preset) -> list[data.Transform]:
    """From a dense volume to what a network of these sizes sees: what the stage files declare."""
    settings = {name: getattr(sizes, name) for name in ("resolution", "spacing", "keep", "windows")}
    return [*data.preprocessing(**settings), Windowsd("values", windows=sizes.windows)]


def dense_hu(values: SparseTensor, sizes: Preset) -> Float[np.ndarray, "X Y Z"]:
    """Window values of one volume as HU on the whole grid."""
    hu = hu_from_windows(values.feats.float().cpu().numpy(), sizes.windows)
    return densify(hu, values.coords[:, 1:].cpu().numpy(), values.spatial_shape, fill=KEEPS[sizes.keep].fill)


def find_tokenizer(path: str | Path | None, *, for_phantoms: bool = False) -> Path:
    """The weights of a tokenizer: a file, an output folder, an exported bundle, or the name of one that ships.

    None takes the newest stage here, else the one that ships. A stage that learned from built-in phantoms is taken
    `for_phantoms`, and else only where nothing ships: whoever tried the demo first has scans of patients now.
    """
    path = _default_tokenizer(for_phantoms) if path is None else path
    check_path(path, name="tokenizer")
    path = shipped.weights_of(path)
    if not path.exists():
        known = f"give a checkpoint, an output folder, an exported bundle, or a name: {shipped.names_in_words()}"
        raise Refused("NO_TOKENIZER", f"{path} does not exist", known)
    bundled = path / "models" / "model.pt"
    return bundled if bundled.is_file() else averaged_file(path)


def _default_tokenizer(for_phantoms: bool) -> str | Path:
    stages = [Path(stage) for stage in NEWEST_TOKENIZERS if complete_steps(stage)]
    ships = shipped.DEFAULT in shipped.names()
    passed = [stage for stage in stages if not for_phantoms and ships and _learned_from_phantoms(stage)]
    own = [stage for stage in stages if stage not in passed]
    if own:
        return max(own, key=lambda stage: step_file(stage, "misc", complete_steps(stage)[-1]).stat().st_mtime)
    for stage in passed:
        log.warning("%s learned from built-in phantoms: taking %s (name %s to take it)", stage, shipped.DEFAULT, stage)
    if ships:
        return shipped.DEFAULT
    what = f"there is no tokenizer in {' or '.join(NEWEST_TOKENIZERS)}"
    train_one = "train one (python -m monai.bundle run training --config_file bundles/vq_stage1.json)"
    raise Refused("NO_TOKENIZER", what, f"{train_one}, or name one with --tokenizer")


def _learned_from_phantoms(stage: Path) -> bool:
    """Whether a run was given no data of its own."""
    return (read_object(stage / "config.json") or {}).get("dataset_dir", "") is None
