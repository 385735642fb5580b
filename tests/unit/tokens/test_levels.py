"""One tokenizer, several rates: the first few codes of a cell are a coarser value of it, in training and in files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from app.__main__ import app
from app.language.volume_tokens import Reducer, extract_3d_latent_and_indices
from app.shared.refusals import Refused
from app.tokens.commands import reconstruct, tokenize
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from networks import VectorQuantizer
from networks.residual import ResidualQuantizer, drawn_levels
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save


@pytest.fixture
def quantizer(generator):
    torch.manual_seed(0)
    made = ResidualQuantizer([VectorQuantizer(8, 4) for _ in range(4)])
    made.start_from(torch.randn(400, 4, generator=generator), generator=generator)
    return made.train()


@pytest.fixture(scope="module")
def network():
    return make_network(quantizer_levels=4)


@pytest.fixture(scope="module")
def tokenizer(network):
    return CTTokenizer(network, digest="0" * 64)


def test_the_first_codes_are_a_coarser_value(quantizer, generator):
    rows = torch.randn(300, 4, generator=generator)
    codes = quantizer(rows).codes
    errors = [float((quantizer.lookup(codes[:, :n]) - rows).square().mean()) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]
    assert torch.equal(quantizer.lookup(codes[:, 0]), quantizer.levels[0].codebook[codes[:, 0]])
    for wrong in (codes[:, :0], torch.cat([codes, codes], 1)):
        with pytest.raises(ValueError, match=r"codes must be \(N, 1 to 4\), one a level, got"):
            quantizer.lookup(wrong)


def test_rows_that_keep_fewer_levels_have_the_value_of_those_and_teach_all(quantizer, generator):
    rows = torch.randn(40, 4, generator=generator).requires_grad_()
    kept = torch.arange(40) % 4 + 1
    out = quantizer(rows, kept)
    for n in (1, 2, 3, 4):
        mine = kept == n
        assert torch.allclose(out.values[mine], quantizer.lookup(out.codes[mine, :n]), atol=1e-6)
    out.values.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))
    assert [len(level._pending) for level in quantizer.levels] == [1] * 4
    assert torch.equal(out.codes, quantizer(rows).codes)


def drawn(seed: int, size: int = 3, *, dropout: float = 0.75) -> list[int]:
    return drawn_levels(4, [seed], [size], dropout=dropout).tolist()


def test_a_sample_draws_its_levels_from_its_seed_and_the_first_alone_most_often():
    samples = [drawn(seed, 32) for seed in range(4000)]
    alike = np.array([rows[0] for rows in samples if len(set(rows)) == 1])
    shares = np.bincount(alike, minlength=5)[1:] / 4000
    assert np.abs(shares - 0.5 * np.array([6 / 11, 3 / 11, 2 / 11, 0]) - [0, 0, 0, 0.25]).max() < 0.03
    assert drawn_levels(4, [17, 3], [32, 32], dropout=0.75).tolist() == samples[17] + samples[3]
    assert {n for seed in range(50) for n in drawn(seed, dropout=0.0)} == {4}
    assert set(drawn_levels(1, list(range(50)), [2] * 50, dropout=0.75).tolist()) == {1}


def test_a_quarter_of_the_samples_has_cells_of_all_numbers_of_levels():
    mixed = [rows for rows in (drawn(seed, 400) for seed in range(1000)) if len(set(rows)) > 1]
    assert abs(len(mixed) / 1000 - 0.25) < 0.04
    shares = np.bincount(np.concatenate(mixed), minlength=5)[1:] / (400 * len(mixed))
    assert np.abs(shares - 0.25).max() < 0.01


@torch.no_grad()
def test_the_network_decodes_each_sample_of_its_levels(network, tokenizer):
    x = tokenizer.on_device(tokenizer.rows_of(Volume(hu_volume(), AFFINE)))
    for n in (1, 2, 4):
        tokens = network.encode(x, levels=n)
        assert tokens.codes.shape == ((len(tokens.coords),) if n == 1 else (len(tokens.coords), n))
        seed = next(seed for seed in range(99) if set(drawn(seed, len(tokens.coords))) == {n})
        given = network(x, seeds=[seed], level_dropout=0.75).recon.feats
        alone, _ = network.decode_on(network.latents_of(tokens), x.level)
        assert torch.allclose(given, alone.feats, atol=1e-5)
    whole = network.encode(x)
    assert torch.equal(whole.codes, network(x).codes.int())
    assert torch.equal(whole.codes, network(x, seeds=[0], level_dropout=1.0).codes)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"levels must lie in 1..4, the levels of this tokenizer, got {wrong}"):
            network.encode(x, levels=wrong)
    with pytest.raises(ValueError, match=r"levels must lie in 1..1"):
        make_network().encode(x, levels=2)


def test_fewer_levels_asked_for_at_either_end_are_the_same_volume(tokenizer):
    scan = Volume(hu_volume(), AFFINE)
    four = tokenizer.encode(scan)
    for n in (1, 2):
        fewer = tokenizer.encode(scan, levels=n)
        assert (fewer.levels, four.levels) == (n, 4)
        assert np.array_equal(fewer.codes, four.first_levels(n))
        assert np.array_equal(tokenizer.decode(fewer).hu, tokenizer.decode(four, levels=n).hu)
    assert not np.array_equal(tokenizer.decode(four, levels=1).hu, tokenizer.decode(four).hu)
    with pytest.raises(Refused, match=r"levels must lie in 1..2, the levels of these tokens, got 4"):
        tokenizer.decode(tokenizer.encode(scan, levels=2), levels=4)


def test_more_codes_than_the_tokenizer_has_levels_are_refused(tokenizer):
    tokens = tokenizer.encode(Volume(hu_volume(), AFFINE))
    of_one = CTTokenizer(make_network(), digest="0" * 64)
    with pytest.raises(Refused, match="the tokens tell codes a latent 4, their tokenizer 1"):
        of_one.decode(tokens)


def test_language_models_read_the_first_level(tokenizer):
    scan = Volume(hu_volume(), AFFINE)
    reduce = Reducer(tokenizer.network.vq.lookup, width=tokenizer.sizes.latent_channels)
    assert torch.equal(reduce(tokenizer.encode(scan)).feats, reduce(tokenizer.encode(scan, levels=1)).feats)
    seen = tokenizer.on_device(tokenizer.rows_of(scan))
    batch = {"coords": seen.coords, "feats": seen.feats, "spatial_shape": seen.spatial_shape, "batch_size": 1}
    feats, _, codes = extract_3d_latent_and_indices(batch, tokenizer.network)
    assert torch.equal(feats, tokenizer.network.vq.levels[0].codebook[codes.long()])
    assert torch.equal(reduce(tokenizer.encode(scan)).feats, feats)


def test_language_models_read_the_sum_of_as_many_levels_as_they_are_told(tokenizer):
    scan, lookup = Volume(hu_volume(), AFFINE), tokenizer.network.vq.lookup
    whole, width = tokenizer.encode(scan), tokenizer.sizes.latent_channels
    for levels in (1, 2, 4):
        feats = Reducer(lookup, width=width, levels=levels)(whole).feats
        assert torch.equal(feats, lookup(torch.from_numpy(whole.first_levels(levels)).long()))
    with pytest.raises(Refused, match=r"levels must lie in 1..2, the levels of these tokens, got 4"):
        Reducer(lookup, width=width, levels=4)(tokenizer.encode(scan, levels=2))


def test_the_commands_take_levels_and_name_those_that_are_not_there(network, dataset, tmp_path):
    run = save(network, tmp_path / "run")
    case, file = dataset / "processed" / "case_a", tmp_path / "a.npz"
    assert tokenize(case, file, tokenizer=run, levels=2)["ok"] == 1
    assert read_tokens(file).codes.shape[1] == 2
    assert tokenize(case, file, tokenizer=run, levels=2)["cases"][0]["message"] == "there already"
    assert tokenize(case, file, tokenizer=run)["cases"][0]["message"] == ""
    assert read_tokens(file).codes.shape[1] == 4
    tokenize(case, file, tokenizer=run, levels=1)
    refused = reconstruct(file, tmp_path / "a.nii.gz", tokenizer=run, levels=2)["cases"][0]
    assert refused["codes"] == ["TOO_FEW_LEVELS"] and "levels must lie in 1..1" in refused["message"]
    assert reconstruct(file, tmp_path / "a.nii.gz", tokenizer=run, levels=1)["ok"] == 1
    with pytest.raises(
        Refused, match=r"^BAD_VALUE: levels must lie in 1..4, the levels of this tokenizer, got 5"
    ) as end:
        tokenize(case, file, tokenizer=run, levels=5)
    assert end.value.status == 2
    called = CliRunner().invoke(
        app, ["tokenize", str(case), str(tmp_path / "b.npz"), "--tokenizer", str(run), "--levels", "1"]
    )
    assert called.exit_code == 0 and read_tokens(tmp_path / "b.npz").codes.ndim == 1


@pytest.mark.parametrize("pack", [False, True])
def test_a_file_of_four_levels_is_not_read_by_a_tokenizer_of_one(network, dataset, tmp_path, pack):
    four, one = save(network, tmp_path / "four"), save(make_network(), tmp_path / "one")
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=four, pack=pack)
    refused = reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=one)["cases"][0]
    assert refused["codes"] == ["OTHER_TOKENIZER"] and "the tokens were made by tokenizer" in refused["message"]
    assert "\n" not in refused["message"]
    for levels in (0, 5):
        refused = reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=four, levels=levels)["cases"][0]
        assert refused["codes"] == ["TOO_FEW_LEVELS"]
        assert f"levels must lie in 1..4, the levels of these tokens, got {levels}" in refused["message"]
    assert reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=four, levels=3)["ok"] == 1


def test_support_that_contradicts_the_codes_is_one_line(network, tokenizer, tmp_path):
    tokens = tokenizer.encode(Volume(hu_volume(), AFFINE), support=True)
    first, second, third = tokens.support
    for support in ((first[:-1], second, third), (first | 255, second, third), (first, second, third[:-1]), (first,)):
        write_tokens(tmp_path / "a.npz", replace(tokens, support=support))
        with pytest.raises(Refused, match=r"^DAMAGED_TOKENS: a\.npz is damaged .*support") as end:
            tokenizer.read(tmp_path / "a.npz")
        assert "\n" not in str(end.value)
