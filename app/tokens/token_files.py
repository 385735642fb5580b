"""Token files: the one reader and the one writer of `.npz` files with a volume's codes and all that decoding needs.

Codes and coordinates lie in Morton order of the latent grid; where cells have unlike numbers of codes, `levels` says
how many each has, and `codes` holds 0 beyond them. A file from outside is hostile: nothing in it is executed,
every array is checked against its own header before memory is taken, and contents that contradict each other are
refused. A packed file holds the same in fewer bytes (packing.py) and takes the code tables of its tokenizer to be read.
Knows no network.
"""

import io
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, UInt8
from numpy.lib import format as npy

from app.shared.array_files import UNREADABLE, ZIP_TIME, damage, read_arrays
from app.shared.atomic_files import written_whole
from app.shared.refusals import Refused
from app.tokens import packing
from app.tokens.code_tables import CodeTables
from app.tokens.rate import Rate, rate
from networks.residual import NO_CODE
from networks.sparse.topology import bits_for, morton_keys

FILE_VERSION = 2
VERSION_OF_LEVELS = 3  # cells of unlike numbers of codes: older software would take the filling for codes
PACKED = "packed"  # the one array of a packed file
SUPPORT_LEVELS = 3  # support_0: children of each latent; support_1, support_2: of each cell of the two levels below
MAX_BYTES = 2**30  # of all arrays of a file, unpacked


@dataclass(frozen=True, kw_only=True)
class CTTokens:
    """One volume as tokens. `source_…` is the scan as it came in; `affine` takes a latent index to RAS mm.

    `source_hash` is empty for an array in memory. `findings` are the codes of what was found, fixed or cut off on the
    way here; files of older software do not say.
    """

    codes: Int32[np.ndarray, "M ..."]  # (M,), or (M, levels), NO_CODE where a cell has fewer
    coords: Int32[np.ndarray, "M 3"]
    latent_shape: tuple[int, int, int]
    affine: Float[np.ndarray, "4 4"]
    source_shape: tuple[int, int, int]
    source_affine: Float[np.ndarray, "4 4"]
    features: str
    windows: tuple[str, ...]
    spacing: float
    keep: str
    tokenizer: str  # sha256 of the weights that made it
    source_hash: str = ""
    findings: tuple[str, ...] | None = None
    support: tuple[UInt8[np.ndarray, " _"], ...] | None = None
    voxels: int | None = None  # that the encoder saw; files of older software do not say
    refined: int | None = None  # steps that led to these codes from the encoder's; None: they are the encoder's

    @property
    def levels(self) -> int:
        """Codes a latent, at most."""
        return 1 if self.codes.ndim == 1 else self.codes.shape[1]

    @property
    def mean_levels(self) -> float:
        return float((self.codes != NO_CODE).sum() / len(self.codes))

    def first_levels(self, levels: int | None) -> Int32[np.ndarray, "M ..."]:
        """The codes of the first quantiser levels, of a cell with fewer all; None: of all there are."""
        if levels is None or levels == self.levels:
            return self.codes
        if not 1 <= levels <= self.levels:
            what = f"levels must lie in 1..{self.levels}, the levels of these tokens, got {levels}"
            raise Refused("TOO_FEW_LEVELS", what)
        return np.ascontiguousarray(self.codes[:, 0] if levels == 1 else self.codes[:, :levels])

    def with_levels(self, levels: Int64[np.ndarray, " M"]) -> "CTTokens":
        """With so many codes of each cell, of its first ones."""
        codes = np.where(np.arange(self.levels) < levels[:, None], self.codes, np.int32(NO_CODE))
        kept = replace(self, codes=codes)
        return replace(kept, codes=kept.first_levels(int(levels.max())))

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        return tuple(8 * n for n in self.latent_shape)

    @property
    def grid_affine(self) -> Float[np.ndarray, "4 4"]:
        """Voxel index of the tokenizer's grid to RAS mm."""
        return self.affine @ np.linalg.inv(latent_to_voxel())


def latent_to_voxel() -> Float[np.ndarray, "4 4"]:
    """The middle of latent i is that of voxels 8 i to 8 i + 7."""
    matrix = np.diag([8.0, 8.0, 8.0, 1.0])
    matrix[:3, 3] = 3.5
    return matrix


def write_tokens(
    path: str | Path, tokens: CTTokens, *, tables: CodeTables | None = None, pack: bool = False
) -> Rate | None:
    """A whole file or none; the same tokens give the same bytes.

    With their tokenizer's tables it also says how many bits they take (`bits`), which is returned, or is packed.
    """
    path, arrays, rate_of_file = Path(path), _arrays_of(tokens), None
    if tables is not None:
        content, rate_of_file = _packed_file(arrays, tables)
    with written_whole(path) as beside, open(beside, "wb") as stream:  # given a name, NumPy puts its own ending behind
        if pack:
            stream.write(content)
        else:
            np.savez_compressed(stream, **arrays, **({} if rate_of_file is None else {"bits": rate_of_file.as_array()}))
    return rate_of_file


def rate_of(tokens: CTTokens, tables: CodeTables) -> Rate:
    """All bits that a decoder needs of the volume; support counts where the tokens carry it."""
    return _packed_file(_arrays_of(tokens), tables)[1]


def _packed_file(arrays: dict[str, np.ndarray], tables: CodeTables) -> tuple[bytes, Rate]:
    """An npz of one array of bytes, without what NumPy's own writer adds for files of four gigabytes."""
    parts = packing.packed(arrays, tables)
    array, file = io.BytesIO(), io.BytesIO()
    npy.write_array(array, np.frombuffer(parts.joined(), np.uint8), version=(1, 0))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{PACKED}.npy", ZIP_TIME), array.getvalue())
    content = file.getvalue()
    return content, rate(parts, arrays, num_codes=tables.num_codes, file_bytes=len(content))


def is_packed(path: Path) -> bool:
    """Whether a file that can be read is packed."""
    with zipfile.ZipFile(path) as archive:
        return archive.namelist() == [f"{PACKED}.npy"]


def _arrays_of(tokens: CTTokens) -> dict[str, np.ndarray]:
    has_code = tokens.codes != NO_CODE
    given = {name: getattr(tokens, name) for name in packing.FIELDS}
    stored = {name: np.array(value, packing.FIELDS[name]) for name, value in given.items() if value is not None}
    behind = {name: stored.pop(name) for name in ("findings", "voxels", "refined") if name in stored}  # in the file
    arrays = {
        "codes": np.where(has_code, tokens.codes, 0).astype(np.min_scalar_type(int(tokens.codes.max()))),
        "coords": tokens.coords.astype(np.int32),
        **stored,
        "version": np.array(FILE_VERSION if has_code.all() else VERSION_OF_LEVELS, np.int32),
    }
    if not has_code.all():
        arrays["levels"] = has_code.sum(1).astype(np.uint8)
    return arrays | behind | {f"support_{i}": part for i, part in enumerate(tokens.support or ())}


def read_tokens(path: str | Path, *, tables: CodeTables | None = None) -> CTTokens:
    """The tokens in a file, checked. Refused where it is damaged or no token file; a packed one takes tables."""
    path = Path(path)
    try:
        arrays = read_arrays(path, max_bytes=MAX_BYTES)
        if PACKED in arrays:
            if arrays[PACKED].dtype != np.uint8 or arrays[PACKED].ndim != 1 or len(arrays) > 1:
                raise ValueError("its packed part must be bytes, and all there is")
            content = arrays[PACKED].tobytes()
            arrays = packing.unpacked(content, tables, support_levels=SUPPORT_LEVELS)
            arrays["version"] = np.array(FILE_VERSION, np.int32)
        tokens = _tokens_of(arrays)
    except Refused:
        raise
    except FileNotFoundError:
        raise Refused("NO_TOKENS", f"token file {path} does not exist") from None
    except UNREADABLE as error:
        raise Refused("DAMAGED_TOKENS", f"{path.name} is damaged or no token file: {damage(error)}") from error
    return tokens


def _tokens_of(arrays: dict[str, np.ndarray]) -> CTTokens:
    if (version := int(arrays["version"])) > VERSION_OF_LEVELS:
        raise ValueError(f"it is of version {version}, this software reads up to {VERSION_OF_LEVELS}")
    codes, coords = _codes(arrays), arrays["coords"]
    shape = _triple(arrays["latent_shape"], "latent_shape")
    if coords.dtype.kind != "i" or coords.shape != (len(codes), 3):
        raise ValueError(f"coords must be integers ({len(codes)}, 3), got {coords.dtype} {coords.shape}")
    if coords.min() < 0 or (coords >= np.array(shape)).any():
        raise ValueError(f"coords leave the latent grid {shape}")
    affine, spacing = _affine(arrays["affine"], "affine"), float(arrays["spacing"])
    if not 0 < spacing < math.inf:
        raise ValueError(f"spacing must be mm above 0, got {spacing}")
    inner = affine[:3, :3].T @ affine[:3, :3]
    if not np.allclose(inner, np.eye(3) * (8 * spacing) ** 2, rtol=0, atol=1e-3 * (8 * spacing) ** 2):
        raise ValueError(f"affine and spacing contradict each other: its cells are not cubes of 8 x {spacing:g} mm")
    rows = torch.nn.functional.pad(torch.from_numpy(coords.astype(np.int32)), (1, 0))
    keys = morton_keys(rows, bits_for(shape))
    if bool((keys[1:] <= keys[:-1]).any()):
        raise ValueError("coords are not in Morton order, or not unique")
    return CTTokens(
        codes=codes,
        coords=coords.astype(np.int32),
        latent_shape=shape,
        affine=affine,
        source_shape=_triple(arrays["source_shape"], "source_shape"),
        source_affine=_affine(arrays["source_affine"], "source_affine"),
        features=_text(arrays["features"]),
        windows=_names(arrays["windows"], "windows", least=0 if _text(arrays["features"]) == "sdf" else 1),
        spacing=spacing,
        keep=_text(arrays["keep"]),
        tokenizer=_text(arrays["tokenizer"]),
        source_hash=_text(arrays["source_hash"]) if "source_hash" in arrays else "",
        findings=_names(arrays["findings"], "findings") if "findings" in arrays else None,
        support=_support(arrays, len(codes)),
        voxels=_count(arrays["voxels"], "voxels") if "voxels" in arrays else None,
        refined=_count(arrays["refined"], "refined") if "refined" in arrays else None,
    )


def _codes(arrays: dict[str, np.ndarray]) -> Int32[np.ndarray, "M ..."]:
    """The codes of each cell; where `levels` says that it has fewer than others, NO_CODE beyond them."""
    codes = arrays["codes"]
    whole = codes.dtype.kind in "iu" and codes.ndim in (1, 2) and codes.size > 0
    if not whole or codes.min() < 0 or codes.max() >= 1 << 31:
        raise ValueError(f"codes must be integers from 0 up, (M,) or (M, levels), got {codes.dtype} {codes.shape}")
    codes = codes.astype(np.int32)
    if "levels" not in arrays:
        return codes
    levels, most = arrays["levels"], 1 if codes.ndim == 1 else codes.shape[1]
    if levels.dtype.kind != "u" or levels.shape != (len(codes),):
        raise ValueError(f"levels must be unsigned integers ({len(codes)},), got {levels.dtype} {levels.shape}")
    if most == 1 or levels.min() < 1 or levels.max() != most:
        counted = f"{levels.min()} to {levels.max()}"
        raise ValueError(f"levels and codes contradict each other: {counted} codes a cell, and codes {codes.shape}")
    lacking = np.arange(most) >= levels[:, None]
    if codes[lacking].any():
        raise ValueError(f"levels and codes contradict each other: {int((codes[lacking] > 0).sum())} codes too many")
    return np.where(lacking, np.int32(NO_CODE), codes)


def _support(arrays: dict[str, np.ndarray], num_tokens: int) -> tuple[np.ndarray, ...] | None:
    names = [name for name in arrays if name.startswith("support")]
    if not names:
        return None
    if sorted(names) != [f"support_{i}" for i in range(SUPPORT_LEVELS)]:
        raise ValueError(f"its support must have {SUPPORT_LEVELS} levels, it has {', '.join(sorted(names))}")
    parts, cells = [], num_tokens
    for i in range(SUPPORT_LEVELS):
        part = arrays[f"support_{i}"]
        if part.dtype != np.uint8 or part.shape != (cells,) or not part.all():
            raise ValueError(
                f"support_{i} must hold {cells} bytes, each with a child, it has {part.dtype} {part.shape} "
                f"with {int((part == 0).sum())} empty"
            )
        parts.append(part)
        cells = int(np.unpackbits(part).sum())
    return tuple(parts)


def _triple(array: np.ndarray, name: str) -> tuple[int, int, int]:
    if array.shape != (3,) or array.dtype.kind not in "iu" or array.min() < 1 or array.max() > 2**17:
        raise ValueError(f"{name} must be three positive sizes, got {array.tolist()}")
    return tuple(int(n) for n in array)


def _count(array: np.ndarray, name: str) -> int:
    if array.shape != () or array.dtype.kind not in "iu" or array < 1:
        raise ValueError(f"{name} must be a number above 0, got {array.dtype} {array.shape}")
    return int(array)


def _affine(array: np.ndarray, name: str) -> np.ndarray:
    square = array.shape == (4, 4) and array.dtype.kind == "f" and np.isfinite(array).all()
    if not square or not np.array_equal(array[3], [0, 0, 0, 1]) or abs(np.linalg.det(array[:3, :3])) < 1e-9:
        raise ValueError(f"{name} must be an invertible 4 x 4 matrix")
    return array.astype(np.float64)


def _names(array: np.ndarray, name: str, *, least: int = 0) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1 or array.size < least:
        raise ValueError(f"{name} must be a list of {least} or more names, got {array.dtype} {array.shape}")
    return tuple(array.tolist())


def _text(array: np.ndarray) -> str:
    if array.dtype.kind != "U" or array.size != 1:
        raise ValueError(f"a text field holds {array.dtype} {array.shape}")
    return str(array.item())
