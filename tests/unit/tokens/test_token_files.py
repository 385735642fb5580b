"""Token files come back as they went, and a damaged or hostile one is refused in one line."""

import errno
import io
import os
import pickle
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from app.tokens.token_files import CTTokens, read_tokens, write_tokens


def same(one, other):
    for field in fields(CTTokens):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "support" and a is not None:
            assert len(a) == len(b) and all(
                np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
            )
        elif isinstance(a, np.ndarray):
            assert np.array_equal(a, b) and a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("kind", ["plain", "levels", "no_support", "nothing_found", "older"])
def test_round_trip(tokens, tmp_path, kind, rng):
    if kind == "levels":
        tokens = replace(tokens, codes=rng.integers(0, 256, (len(tokens.codes), 3)).astype(np.int32))
    if kind == "nothing_found":
        tokens = replace(tokens, findings=())
    if kind == "older":
        tokens = replace(tokens, findings=None, voxels=None)
    if kind == "no_support":
        tokens = replace(tokens, support=None)
    write_tokens(tmp_path / "a" / "case.npz", tokens)
    same(read_tokens(tmp_path / "a" / "case.npz"), tokens)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["case.npz"]


def test_same_tokens_same_bytes(tokens, tmp_path):
    write_tokens(tmp_path / "one.npz", tokens)
    write_tokens(tmp_path / "two.npz", tokens)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_any_numpy_reads_it(tokens, tmp_path):
    write_tokens(tmp_path / "case.npz", tokens)
    with np.load(tmp_path / "case.npz", allow_pickle=False) as stored:
        assert set(stored.files) == {
            *("codes", "coords", "latent_shape", "affine", "source_shape", "source_affine", "source_hash"),
            *("features", "windows", "spacing", "keep", "tokenizer", "version", "findings"),
            *("support_0", "support_1", "support_2", "voxels"),
        }
        assert stored["codes"].dtype == np.uint8 and stored["coords"].dtype == np.int32
        assert stored["windows"].tolist() == ["lung", "bone"] and str(stored["keep"]) == "body"


@pytest.mark.parametrize(
    ("highest", "kind"), [(255, np.uint8), (256, np.uint16), (8191, np.uint16), (65536, np.uint32)]
)
def test_codes_lie_in_the_smallest_unsigned_type(tokens, tmp_path, highest, kind):
    codes = tokens.codes.copy()
    codes[3] = highest
    write_tokens(tmp_path / "case.npz", replace(tokens, codes=codes))
    with np.load(tmp_path / "case.npz") as stored:
        assert stored["codes"].dtype == kind
    same(read_tokens(tmp_path / "case.npz"), replace(tokens, codes=codes))


def test_files_of_older_software_are_read(tokens, tmp_path):
    """Its codes were int32, of version 1, and it did not say how many voxels there were."""
    write_tokens(tmp_path / "case.npz", tokens)
    rewritten(tmp_path / "case.npz", codes=tokens.codes, version=np.array(1, np.int32), voxels=None)
    same(read_tokens(tmp_path / "case.npz"), replace(tokens, voxels=None))


def test_latents_lie_in_the_middle_of_their_voxels(tokens):
    # voxel 0 and voxel 7 of latent 0 are equally far from its centre
    centre = tokens.affine @ [0, 0, 0, 1]
    first, last = tokens.grid_affine @ [0, 0, 0, 1], tokens.grid_affine @ [7, 7, 7, 1]
    assert np.allclose(centre, (first + last) / 2)
    assert tokens.grid_shape == (24, 24, 24)


def rewritten(path, **changes):
    """The file with some arrays replaced (None: left out)."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


DAMAGED = {
    "codes as floats": lambda t: {"codes": t.codes.astype(np.float32)},
    "no codes": lambda t: {"codes": None},
    "fewer codes": lambda t: {"codes": t.codes[:-1]},
    "negative code": lambda t: {"codes": t.codes * 0 - 1},
    "code beyond 31 bits": lambda t: {"codes": t.codes.astype(np.uint64) + (1 << 31)},
    "no voxels": lambda t: {"voxels": np.array(0)},
    "nothing": lambda t: {"codes": t.codes[:0], "coords": t.coords[:0]},
    "coords outside": lambda t: {"coords": t.coords + 1},
    "coords twice": lambda t: {"coords": t.coords * 0},
    "coords in another order": lambda t: {"coords": t.coords[::-1]},
    "coords flat": lambda t: {"coords": t.coords[:, :2]},
    "grid of zero": lambda t: {"latent_shape": np.array([0, 3, 3])},
    "affine not finite": lambda t: {"affine": t.affine * np.nan},
    "affine of no volume": lambda t: {"affine": t.affine * 0},
    "windows as numbers": lambda t: {"windows": np.arange(2)},
    "windows without a name": lambda t: {"windows": np.array([], "U4")},
    "one window outside a list": lambda t: {"windows": np.array("lung")},
    "tokenizer missing": lambda t: {"tokenizer": None},
    "later version": lambda t: {"version": np.array(99)},
    "support level missing": lambda t: {"support_1": None},
    "support too short": lambda t: {"support_1": t.support[1][:-1]},
    "support empty byte": lambda t: {"support_0": t.support[0] * 0},
    "support without a child at the end": lambda t: {"support_2": np.append(t.support[2][:-1], np.uint8(0))},
    "support of another volume": lambda t: {"support_0": t.support[0] | 255},
    "support as int": lambda t: {"support_2": t.support[2].astype(np.int32)},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_one_line(tokens, tmp_path, damage):
    write_tokens(tmp_path / "case.npz", tokens)
    rewritten(tmp_path / "case.npz", **DAMAGED[damage](tokens))
    with pytest.raises(ValueError, match=r"case\.npz is damaged or no token file: ") as caught:
        read_tokens(tmp_path / "case.npz")
    assert "\n" not in str(caught.value)


def test_a_file_without_windows_says_so(tokens, tmp_path):
    write_tokens(tmp_path / "case.npz", tokens)
    for damage in ("windows without a name", "one window outside a list"):
        rewritten(tmp_path / "case.npz", **DAMAGED[damage](tokens))
        with pytest.raises(ValueError, match=r"windows must be a list of 1 or more names, got <U4 \("):
            read_tokens(tmp_path / "case.npz")


def test_a_file_that_may_not_be_read_says_why(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("app.tokens.token_files.zipfile.ZipFile", denied)
    with pytest.raises(ValueError, match=r"^DAMAGED_TOKENS: .*: Permission denied\. Tokenize"):
        read_tokens(tmp_path / "case.npz")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_cut_short_is_one_line(tokens, tmp_path, share):
    write_tokens(tmp_path / "case.npz", tokens)
    content = (tmp_path / "case.npz").read_bytes()
    (tmp_path / "case.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged or no token file"):
        read_tokens(tmp_path / "case.npz")


def test_any_flipped_byte_is_refused_or_harmless(tokens, tmp_path, rng):
    write_tokens(tmp_path / "case.npz", tokens)
    content = bytearray((tmp_path / "case.npz").read_bytes())
    refused = 0
    for place in rng.integers(0, len(content), 200):
        other = bytearray(content)
        other[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "case.npz").write_bytes(other)
        try:
            same(read_tokens(tmp_path / "case.npz"), tokens)
        except ValueError:
            refused += 1
    assert refused > 100


class Armed:
    def __reduce__(self):
        return open, ("/dev/null",)


def test_pickles_are_not_opened(tokens, tmp_path):
    write_tokens(tmp_path / "case.npz", tokens)
    rewritten(tmp_path / "case.npz", extra=np.array([Armed()], dtype=object))
    with pytest.raises(ValueError, match=r"extra\.npy holds object"):
        read_tokens(tmp_path / "case.npz")
    (tmp_path / "case.npz").write_bytes(pickle.dumps(Armed()))
    with pytest.raises(ValueError, match="no token file"):
        read_tokens(tmp_path / "case.npz")


def test_a_header_that_claims_too_much_takes_no_memory(tokens, tmp_path):
    write_tokens(tmp_path / "case.npz", tokens)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i4", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(tmp_path / "case.npz", "a") as archive:
        archive.writestr("large.npy", head.getvalue())
    with pytest.raises(ValueError, match=r"large\.npy should hold 4000000000000000 bytes, it has 0"):
        read_tokens(tmp_path / "case.npz")


def test_a_file_that_unpacks_to_too_much_is_refused(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("app.tokens.token_files.MAX_BYTES", 2000)
    write_tokens(tmp_path / "case.npz", tokens)
    with pytest.raises(ValueError, match="unpacks to more"):
        read_tokens(tmp_path / "case.npz")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_tokens(tmp_path / "case.npz")


def test_an_affine_that_contradicts_the_spacing_is_refused(tokens, tmp_path):
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    write_tokens(tmp_path / "good.npz", replace(tokens, affine=turned @ tokens.affine))
    read_tokens(tmp_path / "good.npz")
    skewed = np.eye(4)
    skewed[0, 1] = 0.2
    for changes in (
        {"spacing": 3.0},
        {"affine": np.diag([2.0, 1.0, 1.0, 1.0]) @ tokens.affine},
        {"affine": skewed @ tokens.affine},
        {"spacing": float("nan")},
        {"spacing": float("inf")},
        {"spacing": 0.0},
    ):
        write_tokens(tmp_path / "bad.npz", replace(tokens, **changes))
        with pytest.raises(ValueError, match=r"contradict each other|spacing must be mm above 0"):
            read_tokens(tmp_path / "bad.npz")
