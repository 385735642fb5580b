"""`tokenize` and `reconstruct`: scans to token files and back, one or a folder of them.

Both give what they print. A mistake of the user ends them in one line; an input that cannot be used is listed, and the
rest is done.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.shapes.mesh_files import WRITERS, write_mesh
from app.shared.output_folder import check_folder
from app.shared.refusals import Refused, as_refused, check_path
from app.shared.terminal import progress
from app.tokens import open_scan, shape_tokens
from app.tokens.open_scan import ScanSource
from app.tokens.token_files import CTTokens, is_packed, rate_of, read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid, write_nifti

READING_THREADS = 4  # scans that are opened at a time where a card computes; each takes up to a few GiB of memory


def tokenize(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    support: bool = False,
    levels: float | None = None,
    refine: int = 0,
    pack: bool = False,
    series: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Token files of a scan, a prepared case, or every case of a prepared dataset.

    OUT is a file where it ends in .npz and there is one scan, else a folder. Gives an entry a case; one that cannot be
    used is listed as refused, the rest is done. `levels`: so many codes a cell, the first of the tokenizer's levels; a
    fraction is their mean over the cells, each keeps as many as pay.
    `refine`: so many steps from the encoder's codes to others that decode to fewer errors.
    `pack`: entropy-coded, in about as many bytes as each entry's `bits` tell.
    """
    check_path(source, name="SOURCE")
    check_path(out)
    source, out = Path(source), Path(out)
    ct = CTTokenizer.from_pretrained(tokenizer)
    wanted = ct.check_levels(levels)
    ct.check_refine(refine)
    if is_shape := ct.sizes.features == "sdf":
        sources = list(shape_tokens.shapes_in(source, ct.sizes.resolution))
    else:
        sources = list(open_scan.scan_sources(source, series=series, token_files=False))
    single = out.suffix == ".npz"
    if single and len(sources) > 1:
        sources = _for_one_file(sources, several=f"{source} holds more than one scan, {out} is one file")
    _check_kind(source, out, single=single, kinds=".npz")
    check_folder(out.parent if single else out)
    entries = []

    def place_of(scan: ScanSource) -> Path:
        return out if single else out / f"{scan.name}.npz"

    def look(scan: ScanSource) -> Any:
        return scan if place_of(scan).exists() and not overwrite else ct.look(scan)

    opened = _ahead(sources, None if is_shape else look, ct.device)
    for scan, ready in zip(progress(sources, "tokenize"), opened, strict=True):
        path = place_of(scan)
        try:
            tokens = _tokens_of_earlier_call(path, ct, scan.source_hash) if scan.source_hash and not overwrite else None
            asked = {"support": support, "levels": wanted, "refine": refine, "pack": pack}
            if is_reused := tokens is not None and _is_as_asked(path, tokens, **asked):
                bits = rate_of(tokens, ct.tables)
            else:
                encode = partial(shape_tokens.encode_shape, ct) if is_shape else partial(ct.encode, refine=refine)
                tokens = encode(ready(), support=support, levels=wanted)
                bits = write_tokens(path, tokens, tables=ct.tables, pack=pack)
        except ValueError as error:
            entries.append(_refused(scan.name, error))
            continue
        entries.append(_tokenized(path, scan.name, tokens, bits) | {"message": "there already" if is_reused else ""})
    return _summary(entries, ct)


def _tokenized(path: Path, name: str, tokens: CTTokens, bits: Any) -> dict[str, Any]:
    row = {"case": name, "status": "ok", "codes": _codes_of(tokens), "tokens": str(path), "count": len(tokens.codes)}
    return row | {"bits": bits.as_json(tokens=len(tokens.codes), voxels=tokens.voxels)}


def _ahead(
    sources: Sequence[Any], look: Callable[[Any], Any] | None, device: torch.device
) -> Iterator[Callable[[], Any]]:
    """For each source a call that gives `look` of it. Beside a card the next ones are looked at while it computes."""
    if look is None or device.type != "cuda":
        yield from (partial(look or (lambda scan: scan), source) for source in sources)
        return
    with ThreadPoolExecutor(READING_THREADS) as readers:
        waiting = deque()
        for source in sources:
            waiting.append(readers.submit(look, source).result)
            if len(waiting) > READING_THREADS:
                yield waiting.popleft()
        yield from waiting


def _for_one_file(sources: Sequence[ScanSource], *, several: str) -> list[ScanSource]:
    """Those that do not open without their hash: a file that is there already is of the one that does."""
    refused = open_scan.errors_of(sources, several=Refused("MANY_SCANS", several))
    return [one if why is None else one._replace(source_hash="") for one, why in zip(sources, refused, strict=True)]


def _check_kind(source: Path, out: Path, *, single: bool, kinds: str) -> None:
    """One file in and a file of another kind out is a slip, not a folder's name."""
    if source.is_file() and out.suffix and not single and not out.is_dir():
        raise Refused("NO_OUTPUT", f"what is written ends in {kinds}, OUT is {out}", "give such a file, or a folder")


def _tokens_of_earlier_call(path: Path, ct: CTTokenizer, source_hash: str) -> CTTokens | None:
    """Tokens of an earlier, interrupted call. Those of another tokenizer or scan are neither taken nor overwritten."""
    if not path.exists():
        return None
    try:
        tokens = read_tokens(path, tables=ct.tables)
    except Refused as refused:
        if refused.code == "OTHER_TOKENIZER":
            raise Refused("EXISTS", f"{path.name} is there already: {refused.what}") from refused
        raise Refused(refused.code, refused.what, "it is in OUT already: --overwrite makes it again") from refused
    if tokens.tokenizer != ct.digest:
        raise Refused("EXISTS", f"{path.name} is there already, by tokenizer {tokens.tokenizer[:12]}")
    if tokens.source_hash != source_hash:
        raise Refused("EXISTS", f"{path.name} is there already, of another scan")
    return tokens


def _is_as_asked(path: Path, tokens: CTTokens, *, support: bool, levels: float, refine: int, pack: bool) -> bool:
    """Without the support, of other levels, steps or otherwise packed than is asked for now, a file is made again."""
    short = (levels - tokens.mean_levels) * len(tokens.codes)  # codes: the last step of a cell may be of several levels
    alike = short == 0 if float(levels).is_integer() else -1 < short < tokens.levels
    alike = alike and (tokens.refined or 0) == refine
    return alike and (tokens.support is not None or not support) and is_packed(path) == pack


def _codes_of(tokens: CTTokens) -> list[str]:
    """Codes of the findings in their scan; a file of older software does not say."""
    return ["EXISTS"] if tokens.findings is None else [*tokens.findings] or ["OK"]


def _refused(name: str, error: ValueError) -> dict[str, Any]:
    refused = as_refused(error)
    return {"case": name, "status": "refused", "codes": [refused.code], "message": refused.text}


def reconstruct(
    tokens: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    like: str | Path | None = None,
    use_support: bool = True,
    levels: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """NIfTI files in HU of a token file or a folder of them, in world coordinates; `like` a scan, on its own grid.

    `levels`: of the first so many codes of each cell.
    """
    check_path(tokens, name="TOKENS")
    check_path(out)
    source, out = Path(tokens), Path(out)
    files = sorted(source.rglob("*.npz")) if source.is_dir() else [source]
    if not files or not source.exists():
        raise Refused("NO_TOKENS", f"{source} holds no token file", status=2)
    single = out.name.lower().endswith((".nii", ".nii.gz", *WRITERS))
    if single and len(files) > 1:
        raise Refused("MANY_SCANS", f"{source} holds {len(files)} token files, {out} is one file")
    _check_kind(source, out, single=single, kinds=f".nii, .nii.gz, or of a shape {', '.join(WRITERS)}")
    check_folder(out.parent if single else out)
    ct = CTTokenizer.from_pretrained(tokenizer)
    try:
        grid = None if like is None else open_scan.grid_of(Path(like), tables=ct.tables)
    except ValueError as error:
        raise Refused("BAD_LIKE", f"{like}: {as_refused(error).what}") from error
    is_shape = ct.sizes.features == "sdf"
    if is_shape and grid is not None:
        raise Refused("BAD_CALL", "a shape becomes a mesh, --like asks for a volume", "leave --like out")
    if single and is_shape == out.name.lower().endswith((".nii", ".nii.gz")):
        kinds = ", ".join(WRITERS) if is_shape else ".nii or .nii.gz"
        what = f"this tokenizer's output ends in {kinds}, OUT is {out}"
        raise Refused("NO_OUTPUT", what, "give such a file, or a folder")
    entries = []
    for file in progress(files, "reconstruct"):
        name = file.relative_to(source).with_suffix("").as_posix() if source.is_dir() else file.stem
        path = out if single else out / f"{name}{'.ply' if is_shape else '.nii.gz'}"
        try:
            if path.exists() and not overwrite:  # it may be the user's own scan
                raise Refused("EXISTS", f"{path} is there already")
            content = ct.read(file)
            decoded = ct.decode_sparse(content, use_support=use_support, levels=levels)
            mesh = shape_tokens.mesh_of(decoded, content) if is_shape else None
        except ValueError as error:
            entries.append(_refused(name, error))
            continue
        if mesh is not None:
            write_mesh(path, mesh)
        else:
            volume = ct.to_hu(decoded, content)
            write_nifti(path, volume if grid is None else onto_grid(volume, *grid))
        ok = {"case": name, "status": "ok", "codes": _codes_of(content), "mesh" if is_shape else "image": str(path)}
        entries.append({**ok, "forced_children": decoded.forced})
    return _summary(entries, ct)


def _summary(entries: list[dict[str, Any]], ct: CTTokenizer) -> dict[str, Any]:
    done = sum(entry["status"] == "ok" for entry in entries)
    by = {"file": ct.source, "sha256": ct.digest}
    return {"cases": entries, "ok": done, "refused": len(entries) - done, "tokenizer": by}


def lines(done: dict[str, Any]) -> Iterator[str]:
    """What the commands print of it."""
    for entry in done["cases"]:
        file = next((entry[name] for name in ("tokens", "image", "mesh") if name in entry), "")
        codes = "" if entry["codes"] == ["OK"] else ", ".join(entry["codes"])
        why = ": ".join(part for part in (codes, entry.get("message", "")) if part)
        yield "  ".join(part for part in (entry["status"], entry["case"], file, _rate_in_words(entry), why) if part)
    yield f"{done['ok']} ok, {done['refused']} refused, by tokenizer {done['tokenizer']['file']}"


def _rate_in_words(entry: dict[str, Any]) -> str:
    if "bits" not in entry:
        return ""
    bits, voxels = entry["bits"], entry["bits"]["per_voxel"]
    of_voxels = "" if voxels is None else f", {voxels:.4f} a voxel"
    return f"{entry['count']} tokens, {bits['per_token']:.1f} bits a token{of_voxels}"
