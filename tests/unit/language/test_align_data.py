"""Samples for alignment: forms A and B are the same batch, nothing is replaced in silence, tokens are kept on disk."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from app.language import align_data, phantom_text
from app.language.align_data import OwnDataset, TextDataset, as_sample, encode_rows, make_loader
from app.language.align_setup import make_collate
from app.language.volume_tokens import Reducer, TokenSource, extract_3d_latent_and_indices
from app.measures.controls import swap_sides
from app.shared.refusals import Refused
from app.text.rows import TextRow
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from networks.cell_detector import CellDetector
from networks.tiny_qwen import build_tiny


@pytest.fixture(scope="module")
def ct():
    torch.manual_seed(0)
    sizes = {"resolution": 32, "spacing": 8.0, "latent_channels": 16, "num_embeddings": 16, "num_blocks": 1}
    network = make_vqvae("tiny", keep="nonzero", **sizes)
    return CTTokenizer(network, digest="a" * 64)


@pytest.fixture(scope="module")
def language():
    return build_tiny(["Is there a nodule? Yes, two."] * 5, width=32)


@pytest.fixture
def reduce(ct):
    return Reducer(ct.network.vq.lookup, width=ct.sizes.latent_channels, max_tokens=20)


def scan(seed: int) -> Volume:
    hu = np.random.default_rng(seed).integers(-400, 400, (16, 16, 16)).astype(np.int16)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -60
    return Volume(hu, affine)


def form_b(seed: int) -> dict:
    """A volume as values on voxels, two samples' worth of numbering left to the item."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(32**3, generator=generator)[:400].sort().values
    index = torch.stack([cells // 1024, cells // 32 % 32, cells % 32], 1).int()
    feats = torch.rand(400, 4, generator=generator) * 2 - 1
    return {"sparse_sdf": feats, "sparse_index": index, "batch_idx": torch.zeros(400).long()}


def text_part(tokenizer) -> dict:
    ids = torch.tensor([*tokenizer("Is there a nodule? Yes").input_ids, 0, 0])
    mask = torch.ones_like(ids)
    mask[-2:] = 0
    labels = torch.where(torch.arange(len(ids)) < 5, -100, ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_form_a_equals_form_b(ct, language, reduce):
    model, tokenizer = language
    inputs = form_b(0)
    features = {
        "values": inputs["sparse_sdf"],
        "coords": torch.nn.functional.pad(inputs["sparse_index"], (1, 0)),
        "spatial_shape": (32, 32, 32),
        "batch_size": 1,
    }
    feats, coords, codes = extract_3d_latent_and_indices(features, ct.network)
    torch.testing.assert_close(feats, ct.network.vq.lookup(codes))
    for ours, theirs in zip(
        (feats, coords, codes), extract_3d_latent_and_indices(inputs, ct.network, "cpu"), strict=True
    ):
        assert torch.equal(ours, theirs)
    text = text_part(tokenizer)
    forms = [{"feats_3d": feats, "coords_3d": coords, **text}, {"inputs_3d": inputs, **text}]
    samples = [as_sample(form, reduce=reduce, network=ct.network) for form in forms]
    collate = make_collate(model, tokenizer)
    one, other = (collate([sample]) for sample in samples)
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
    kept = int(one["mask_3d"].sum())
    assert len(codes) > 20 >= kept > 12 and one["input_ids"].shape[1] == kept + int(text["attention_mask"].sum())


def test_forms_that_cannot_be_used_are_named(ct, language, reduce):
    text = text_part(language[1])
    with pytest.raises(ValueError, match=r"feats_3d must be \(N, 16\) as the tokenizer's codes, got \(3, 7\)"):
        as_sample({"feats_3d": torch.zeros(3, 7), "coords_3d": torch.zeros(3, 4).int(), **text}, reduce=reduce)
    with pytest.raises(ValueError, match="give vae_ckpt"):
        as_sample({"inputs_3d": form_b(0), **text}, reduce=reduce)
    with pytest.raises(ValueError, match="an item must hold feats_3d and coords_3d, or inputs_3d"):
        as_sample(text, reduce=reduce)


class TwoItems(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


def test_own_datasets_are_found_by_name_and_batched_with_several_volumes(ct, language, reduce):
    model, tokenizer = language
    item = {
        "feats_3d": torch.randn(4, 16),
        "coords_3d": torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]),
    }
    own = OwnDataset(TwoItems([{**item, **text_part(tokenizer)}] * 2), reduce=reduce)
    assert [len(volume.feats) for volume in own[0]["volumes"]] == [1, 3]
    loader = make_loader(own, batch_size=2, max_steps=1, collate=make_collate(model, tokenizer), batch_split=2)
    (parts,) = list(loader)
    assert [part["coords_3d"][:, 0].tolist() for part in parts] == [[0, 1, 1, 1]] * 2
    assert isinstance(align_data.load_own_dataset("torch.utils.data.TensorDataset"), Dataset)
    for name, says in (
        ("nowhere.Here", "cannot be loaded"),
        ("collections.OrderedDict.fromkeys", "cannot be loaded"),
        ("torch.utils.data.Subset", "TypeError"),
    ):
        with pytest.raises(Refused, match=says) as end:
            align_data.load_own_dataset(name)
        assert end.value.status == 2


class OneBroken(TwoItems):
    def __getitem__(self, number):
        if number == 1:
            raise OSError("disk\nof item 1")
        return self.items[number]


def test_an_item_that_cannot_be_read_in_the_middle_of_an_epoch_is_named(language, reduce, caplog):
    feats = {"feats_3d": torch.randn(2, 16), "coords_3d": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])}
    items = [{**feats, **text_part(language[1]), "case_id": name} for name in "abc"]
    with pytest.raises(ValueError, match=r"item 1 of the dataset cannot be used \(OSError: disk\)\. Repair it"):
        OwnDataset(OneBroken(items), reduce=reduce)[(0, 1)]
    kept = OwnDataset(OneBroken(items), reduce=reduce, skip_bad=True)
    assert [kept[number]["case_id"] for number in range(3)] == ["a", "c", "c"]
    assert caplog.text.count("left out item 1 of the dataset: disk") == 1
    with pytest.raises(ValueError, match="no item of the dataset can be used, of 2"):
        OwnDataset(TwoItems([{}, {}]), reduce=reduce, skip_bad=True)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((6,), -100)}, "labels are all -100"),
        ({"labels": torch.zeros(2).long()}, "IndexError"),
        ({"input_ids": torch.full((6,), 10**6)}, "input_ids must lie in 0"),
        ({"feats_3d": torch.zeros(0, 16), "coords_3d": torch.zeros(0, 4).int()}, "feats_3d has no rows"),
        (None, "Type"),
    ],
)
def test_items_of_a_users_own_that_cannot_be_used_are_named(change, message, reduce):
    item = {"feats_3d": torch.zeros(1, 16), "coords_3d": torch.zeros(1, 4).int(), "attention_mask": torch.ones(6)}
    item |= {"input_ids": torch.arange(6), "labels": torch.arange(6)}
    items = TwoItems([(1, 2) if change is None else item | change, item])
    with pytest.raises(ValueError, match=f"item 0 of the dataset cannot be used .*{message}"):
        OwnDataset(items, reduce=reduce, vocabulary=100)[0]
    assert OwnDataset(items, reduce=reduce, vocabulary=100)[1]["input_ids"] == list(range(6))


def test_rows_that_cannot_be_learned_from_are_counted_by_reason(ct, language, reduce):
    tokens = ct.encode(scan(0))
    rows = [
        TextRow("a", "Is there a nodule?", "yes", kind="presence"),
        TextRow("a", "Is there a nodule?", "", kind="presence"),
        TextRow("b", "Is there a nodule?", "yes", kind="presence"),
        TextRow("a", "nodule " * 200, "yes", kind="presence"),
        TextRow("a", "Is there a nodule?", "yes " * 50, kind="presence"),
    ]
    made = TextDataset(rows, volumes={"a": tokens}, reduce=reduce, tokenizer=language[1], max_text_tokens=100)
    assert len(made) == 2
    assert dict(+made.dropped) == {"empty answer": 1, "no volume": 1, "question too long": 1, "answer cut": 1}
    assert len(made[0]["volumes"][0].feats) <= 20 and made[(7, 0)]["input_ids"] == made[0]["input_ids"]
    with pytest.raises(ValueError, match="no row can be learned from"):
        TextDataset(rows[1:3], volumes={"a": tokens}, reduce=reduce, tokenizer=language[1])


@pytest.mark.parametrize(("room", "reductions"), [(align_data.KEPT_BYTES, 1), (10, 3)])
def test_a_volume_of_many_questions_is_reduced_once_while_there_is_room(
    ct, language, reduce, monkeypatch, room, reductions
):
    monkeypatch.setattr(align_data, "KEPT_BYTES", room)
    calls, once = [], Reducer.__call__
    monkeypatch.setattr(Reducer, "__call__", lambda self, tokens: calls.append(1) or once(self, tokens))
    rows = [TextRow("s", "How many?", f"{n}", kind="count") for n in range(3)]
    examples = TextDataset(rows, volumes={"s": ct.encode(scan(0))}, reduce=reduce, tokenizer=language[1])
    read = [examples[number]["volumes"][0] for number in range(3)]
    assert len(calls) == reductions and all(torch.equal(one.feats, read[0].feats) for one in read)


def test_what_is_drawn_for_a_sample_follows_from_seed_step_and_row(ct, language):
    """Whatever rank or micro-batch it is in; a row that is judged or asked about is read as it is."""
    width, tokens = ct.network.sizes.latent_channels, ct.encode(scan(0))
    detector = CellDetector(width, 1, grid=ct.network.sizes.resolution // 8).eval()
    detector.mean += 5
    reduce = Reducer(ct.network.vq.lookup, width=width, detector=detector)
    rows = [TextRow("s", "How many?", f"{n}", kind="count") for n in range(2)]
    make = partial(TextDataset, rows, volumes={"s": tokens}, reduce=reduce, tokenizer=language[1])
    examples, read = make(seed=3), lambda made, at: made[at]["volumes"][0].feats
    drawn = read(examples, (7, 1))
    assert torch.equal(drawn, read(make(seed=3), (7, 1)))
    assert not any(torch.equal(drawn, other) for other in (read(examples, (8, 1)), read(examples, (7, 0))))
    assert not torch.equal(drawn, read(make(seed=4), (7, 1)))
    whole = reduce(tokens).feats
    assert torch.equal(read(examples, 1), whole) and torch.equal(examples.question(1)["volumes"][0].feats, whole)


def test_without_volumes_the_report_stands_in_the_volumes_place(ct, language, reduce):
    """Of the same scan, as data: it cannot close its own place."""
    tokenizer, report = language[1], "Two nodules.<|vision_end|> No effusion."
    rows = [TextRow("a", "Write.", report), TextRow("a", "Is there a nodule?", "yes", kind="presence")]
    rows.append(TextRow("b", "Is there a nodule?", "no", kind="presence"))
    tokens = ct.encode(scan(0))
    options = {"volumes": {"a": tokens, "b": tokens}, "reduce": reduce, "tokenizer": tokenizer}
    read = TextDataset(rows, with_volumes=False, **options)
    texts = [tokenizer.decode(read[at]["input_ids"]) for at in range(3)]
    written = "<|vision_start|>Two nodules.< |vision_end|> No effusion.<|vision_end|>"
    assert f"user\n{written}Write.<|im_end|>" in texts[0] and f"user\n{written}Is there" in texts[1]
    assert "user\nIs there a nodule?<|im_end|>" in texts[2]
    assert all(read[at]["volumes"] == [] for at in range(3))
    answer = [token for token in read[1]["labels"] if token != -100]
    assert tokenizer.decode(answer) == "yes<|im_end|>"
    seen = TextDataset(rows, **options)
    assert tokenizer.decode(seen[1]["input_ids"]) == texts[1].replace(
        written, "<|vision_start|><|video_pad|><|vision_end|>"
    )


def test_tokens_are_kept_under_the_tokenizers_hash_and_the_resampler_and_damaged_ones_made_again(ct, tmp_path):
    source = TokenSource(ct, cache_dir=tmp_path)
    first = source.cached("one", lambda: scan(0))
    file = tmp_path / f"{'a' * 16}.triangle_1.all_levels" / "one.npz"
    stored = file.read_bytes()
    assert np.array_equal(source.cached("one", lambda: scan(1)).codes, first.codes)  # kept: the scan is not looked at
    file.write_bytes(stored[: len(stored) // 2])
    assert np.array_equal(source.cached("one", lambda: scan(0)).codes, first.codes)
    assert file.read_bytes() == stored
    other = CTTokenizer(ct.network, digest="b" * 64)
    with pytest.raises(ValueError, match="made by tokenizer aaaaaaaaaaaa, this one is bbbbbbbbbbbb"):
        TokenSource(other, cache_dir=tmp_path)(file)


def test_of_several_processes_each_first_visits_its_share(monkeypatch):
    story = []
    monkeypatch.setattr(align_data.idist, "get_rank", lambda: 1)
    monkeypatch.setattr(align_data.idist, "get_world_size", lambda: 3)
    monkeypatch.setattr(align_data.idist, "barrier", lambda: story.append("all shares are done"))
    align_data.visit_in_shares(range(7), story.append, says="visiting")
    assert story == [1, 4, "all shares are done", *range(7)]


def test_phantoms_are_made_once_and_then_read(ct, tmp_path, monkeypatch):
    """The same rows and tokens again, with sides swapped in the mirror, and nothing is painted."""
    source = TokenSource(ct, cache_dir=tmp_path)
    settings = {"count": 3, "seed": 0, "split": "train"}
    rows, volumes = phantom_text.phantom_volumes(source, **settings)
    monkeypatch.setattr(phantom_text, "make_phantom", None)
    again, read = phantom_text.phantom_volumes(source, **settings)
    assert again == rows and all(np.array_equal(read[name].codes, volumes[name].codes) for name in volumes)
    other, mirrored = phantom_text.phantom_volumes(source, **settings, mirror=True)
    assert [row.answer for row in other if row.kind == "side"] == [
        swap_sides(row.answer) for row in rows if row.kind == "side"
    ]
    assert set(mirrored) == {f"{name}_mirrored" for name in volumes}
    assert any(not np.array_equal(mirrored[f"{name}_mirrored"].codes, volumes[name].codes) for name in volumes)


def test_phantoms_made_by_two_processes_are_those_made_by_one(ct, tmp_path, monkeypatch):
    """The same files and numbers; what was made by others is read, and no random number of this process is drawn."""
    settings = {"count": 5, "seed": 0, "split": "train"}
    monkeypatch.setattr(phantom_text, "workers_for", lambda source, count: 1)
    rows, volumes = phantom_text.phantom_volumes(TokenSource(ct, cache_dir=tmp_path / "one"), **settings)
    monkeypatch.setattr(phantom_text, "workers_for", lambda source, count: 2)
    here, painted_here, paint = os.getpid(), [], phantom_text.make_phantom

    def painted(number: int, **size: float):
        if os.getpid() == here:
            painted_here.append(number)
        return paint(number, **size)

    monkeypatch.setattr(phantom_text, "make_phantom", painted)
    state = torch.get_rng_state()
    again, read = phantom_text.phantom_volumes(TokenSource(ct, cache_dir=tmp_path / "two"), **settings)
    assert painted_here == [] and torch.equal(torch.get_rng_state(), state)
    assert again == rows and set(read) == set(volumes)
    assert all(np.array_equal(read[name].codes, volumes[name].codes) for name in volumes)


@pytest.mark.parametrize(("share", "kept"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [1, 3, 5]), (0.34, [2, 5]), (0, [])])
def test_of_the_reports_a_share_is_learned_evenly_and_every_question(share, kept):
    rows = [
        TextRow(image=f"{number}", answer="no", kind=kind, question=kind)
        for number in range(6)
        for kind in ("report", "presence")
    ]
    some = phantom_text.some_reports(rows, share=share)
    assert [int(row.image) for row in some if row.kind == "report"] == kept
    assert [row for row in some if row.kind == "presence"] == rows[1::2]


def test_a_visit_that_fails_in_another_process_is_visited_here(tmp_path):
    """So that its reason is told by this process, as it is."""

    def visit(number: int) -> None:
        if number == 2:
            raise Refused("BAD_SCAN", "the third is damaged")
        (tmp_path / str(number)).touch()

    with pytest.raises(Refused, match=r"^BAD_SCAN: the third is damaged"):
        align_data.visit_in_shares(range(4), visit, says="visiting", workers=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "3"]


def test_processes_that_make_phantoms_have_cores_memory_and_work(ct, monkeypatch, tmp_path):
    source = TokenSource(ct, cache_dir=tmp_path)
    monkeypatch.setattr(phantom_text, "num_cores", lambda: 6)
    monkeypatch.setattr(phantom_text, "free_memory", lambda: 100 << 30)
    monkeypatch.setattr(phantom_text.sys, "platform", "linux")
    assert [phantom_text.workers_for(source, count) for count in (1, 16, 480)] == [1, 2, 6]
    monkeypatch.setattr(phantom_text, "free_memory", lambda: 1 << 30)
    assert phantom_text.workers_for(source, 480) == 2
    monkeypatch.setattr(phantom_text.sys, "platform", "darwin")
    assert phantom_text.workers_for(source, 480) == 1


def test_a_bad_scan_ends_the_run_by_name_unless_skipped(ct, tmp_path):
    good = tmp_path / "good.npz"
    write_tokens(good, ct.encode(scan(0)))
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    rows = [TextRow(name, "q", "a", path=tmp_path / name) for name in ("good.npz", "bad.npz")]
    rows.append(TextRow("gone.npz", "q", "a", path=None))
    source = TokenSource(ct, cache_dir=tmp_path / "cache")
    with pytest.raises(Refused, match=r"^BAD_SCAN: bad.npz cannot be used: DAMAGED_TOKENS: bad.npz is damaged"):
        encode_rows(rows, source)
    volumes, bad = encode_rows(rows, source, skip_bad=True)
    assert bad == ["bad.npz", "gone.npz"]
    with pytest.raises(Refused, match=r"^BAD_MANIFEST: good.npz names two scans: "):
        encode_rows([rows[0], TextRow("good.npz", "q", "a", path=tmp_path / "bad.npz")], source)
    np.testing.assert_array_equal(volumes["good.npz"].codes, read_tokens(good).codes)
