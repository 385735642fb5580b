"""Shapes through a tokenizer that was trained on signed distance: meshes and files of `sdf` to tokens, and to meshes.

The counterpart of `CTTokenizer.encode` and `.decode`, which speak of HU.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from app.shapes.bands import Shape, check_surface, mesh_affine, shape_of
from app.shapes.mesh_files import READERS, Mesh, read_mesh
from app.shapes.shape_files import holds_shape, read_shape
from app.shared.hashes import hash_path
from app.shared.refusals import Refused
from app.tokens.open_scan import ScanSource, TokenizerNeeds
from app.tokens.token_files import CTTokens, latent_to_voxel
from app.tokens.tokenizer import CTTokenizer
from networks.sparse import SparseTensor
from networks.support import support_of
from networks.tiles import Decoded, encode_whole
from transforms.isosurface import placed, surface_of_band

KEEP = "band"


class Opened(NamedTuple):
    shape: Shape
    source_hash: str
    findings: tuple[str, ...]


def encode_shape(
    tokenizer: CTTokenizer, source: Opened | ScanSource, *, support: bool = False, levels: int | None = None
) -> CTTokens:
    """Tokens of a signed distance; without support the voxels are predicted when it is decoded."""
    opened = source.open(TokenizerNeeds()) if isinstance(source, ScanSource) else source
    shape = opened.shape
    x = shape_tensor(tokenizer, shape)
    with torch.inference_mode():
        encoded = encode_whole(tokenizer.network, x, max_points=tokenizer.max_points, levels=levels)
    return CTTokens(
        codes=encoded.codes.cpu().numpy(),
        coords=encoded.coords[:, 1:].cpu().numpy(),
        latent_shape=encoded.latent_shape,
        affine=shape.affine @ latent_to_voxel(),
        source_shape=(shape.resolution,) * 3,
        source_affine=shape.affine,
        source_hash=opened.source_hash,
        findings=opened.findings,
        features="sdf",
        windows=(),
        spacing=float(np.linalg.norm(shape.affine[:3, 0])),
        keep=KEEP,
        tokenizer=tokenizer.digest,
        support=tuple(part.cpu().numpy() for part in support_of(x.level)) if support else None,
    )


def shape_tensor(tokenizer: CTTokenizer, shape: Shape) -> SparseTensor:
    """What the network sees of a signed distance."""
    own = tokenizer.sizes.resolution
    if own % shape.resolution or shape.resolution % 8:
        what = f"the shape has resolution {shape.resolution}, the tokenizer {own}"
        raise Refused("OTHER_TOKENIZER", what, f"make the shape with sdf --resolution {own}")
    if shape.sign == "none":
        raise Refused("BAD_VALUE", "the shape is unsigned", "make it again from a closed mesh, without --unsigned")
    coords = torch.from_numpy(np.pad(shape.coords.astype(np.int32), ((0, 0), (1, 0))))
    feats = torch.from_numpy(np.array(shape.values[:, None], np.float32))
    return SparseTensor(feats.to(tokenizer.device), coords.to(tokenizer.device), (shape.resolution,) * 3, 1)


def mesh_of(decoded: Decoded, tokens: CTTokens) -> Mesh:
    """The surface of a decoded distance, in the mm of what was tokenized."""
    return band_mesh(decoded.values, tokens.grid_affine)


def band_mesh(values: SparseTensor, affine: np.ndarray) -> Mesh:
    """The zero level of a distance on sparse voxels, in mm, with its fronts outside."""
    surface = surface_of_band(values.coords[:, 1:].cpu().numpy(), values.feats[:, 0].float().cpu().numpy())
    if not len(surface.faces):
        raise Refused("NO_SURFACE", "the tokens decode to no surface", "train the tokenizer for longer")
    return Mesh(*placed(surface, affine))


def shapes_in(source: Path, resolution: int) -> Iterator[ScanSource]:
    """Files of signed distance and meshes at a path; of several resolutions of a shape the tokenizer's own."""
    if not source.exists():
        what = f"{source} does not exist"
        raise Refused("NO_SOURCE", what, "give a mesh, a file of signed distance, or a folder of them")
    if source.is_dir():
        files = [file for file in sorted(source.rglob("*")) if file.suffix.lower() in READERS]
        files += sorted(source.rglob(f"*_r{resolution}.npz"))
        what = f"{source} holds no mesh and no file {f'*_r{resolution}.npz'}"
    else:
        files = [source] if source.suffix == ".npz" or holds_shape(source) else []
        what = f"{source.name} is neither a mesh nor a file of signed distance, which this tokenizer reads"
    if not files:
        remedy = f"of a volume or a case make one first: python -m app sdf {source} OUT --resolution {resolution}"
        raise Refused("NO_CASES", what, remedy, status=2)
    names = [_name(file, source) for file in files]
    for file, name in zip(files, names, strict=True):
        digest = hash_path(file)
        opened = partial(_open, file, resolution, digest)
        apart = f"{name}_{file.suffix.lstrip('.').lower()}" if names.count(name) > 1 else name  # a.stl beside a.ply
        yield ScanSource("raw", apart, file.name, digest, digest, opened, opened)


def _name(file: Path, source: Path) -> str:
    return file.relative_to(source).with_suffix("").as_posix() if source.is_dir() else file.stem


def _open(file: Path, resolution: int, digest: str, *_: object) -> Opened:
    return open_shape(file, resolution, source_hash=digest)


def open_shape(file: Path, resolution: int, *, source_hash: str = "") -> Opened:
    """A file of signed distance as it is, or a mesh at this resolution."""
    if file.suffix.lower() not in READERS:
        return Opened(read_shape(file), source_hash, ())
    mesh = read_mesh(file)
    surface = check_surface(mesh, name=file.name)
    shape = shape_of(surface, mesh_affine(surface.mesh, resolution), resolution=resolution)
    return Opened(shape, source_hash, surface.findings)
