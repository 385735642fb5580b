"""3D tokens in tiny Qwen2-VL and Qwen3-VL of true architecture: equal to the stock models wherever they should be."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from safetensors import safe_open
from torch import distributed
from torch.nn import functional as F

from app.language.chat import collate, encode_chat
from networks.projector import Projector
from networks.qwen import (
    VolumeQwen,
    add_lora,
    compile_layers,
    embedding_spread,
    freeze,
    load_language,
    load_lora,
    save_language,
    use_checkpointing,
)
from networks.tiny_qwen import build_tiny
from networks.tokens import TokenSequence

TEXTS = ["Is there a nodule in the left lung?", "Yes, two nodules of 8 mm.", "No effusion is seen."] * 20
FAMILIES = ("qwen2_vl", "qwen3_vl")
WIDTH = 6
ATOL = 2e-5


def volume(num_tokens: int, seed: int) -> TokenSequence:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(512, generator=generator)[:num_tokens].sort().values
    coords = torch.stack([cells // 64, cells // 8 % 8, cells % 8], 1).int()
    return TokenSequence(torch.randn(num_tokens, WIDTH, generator=generator), coords, torch.ones(num_tokens).long())


def make_model(family: str, *, position: str = "1d", width: int = WIDTH) -> tuple[VolumeQwen, object]:
    language, tokenizer = build_tiny(TEXTS, family=family, width=32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        projector = Projector(width, 32, use_3d_pos=False)
        projector.match_scale(torch.randn(64, width), embedding_spread(language))
    return VolumeQwen(language, projector, position=position).eval(), tokenizer


def make_batch(
    tokenizer, samples: list[tuple[str, str | None, list[TokenSequence]]], *, fusion="placeholder", side="right"
):
    encoded = [
        {"volumes": volumes}
        | encode_chat(tokenizer, question, answer=answer, num_volumes=len(volumes), fusion=fusion)._asdict()
        for question, answer, volumes in samples
    ]
    pads = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])
    return collate(encoded, pad_id=pads[0], volume_id=pads[1], side=side, context=4096)


THREE = [
    ("Is there a nodule?", "Yes, two.", [volume(9, 0)]),
    ("Where?", "No effusion is seen in the left lung.", [volume(20, 1), volume(5, 2)]),
    ("Is there a nodule in the left lung?", "No.", [volume(3, 3)]),
]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request):
    return make_model(request.param)


@pytest.mark.parametrize("fusion", ["placeholder", "prefix"])
def test_logits_equal_the_stock_model_on_spliced_embeddings(made, fusion):
    model, tokenizer = made
    question, answer, volumes = THREE[1]
    batch = make_batch(tokenizer, [THREE[1]], fusion=fusion)
    pieces = encode_chat(tokenizer, question, answer=answer, num_volumes=2, fusion=fusion).input_ids
    table = model.language.get_input_embeddings().weight
    pad, waiting = tokenizer.convert_tokens_to_ids("<|video_pad|>"), iter(volumes)
    spliced = torch.cat([model.projector(next(waiting).feats) if i == pad else table[i][None] for i in pieces])
    assert (pieces[:2] == [pad, pad]) == (fusion == "prefix")
    fresh = build_tiny(TEXTS, family=model.language.config.model_type, width=32)[0]
    expected = fresh(inputs_embeds=spliced[None]).logits
    actual = model.language.lm_head(model.hidden_states(batch))
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=1e-4)


def test_prefix_and_placeholder_agree_when_the_tokens_stand_at_the_same_place(made):
    """Ids without a pad take the volumes in front; ids that begin with the pads say the same thing."""
    model, tokenizer = made
    batch = make_batch(tokenizer, [THREE[0]], fusion="prefix")
    pads = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])
    bare = encode_chat(tokenizer, THREE[0][0], answer=THREE[0][1], num_volumes=0)._asdict() | {"volumes": THREE[0][2]}
    front = collate([bare], pad_id=pads[0], volume_id=pads[1], context=4096)
    torch.testing.assert_close(model.hidden_states(batch), model.hidden_states(front), atol=0, rtol=0)
    placed = make_batch(tokenizer, [THREE[0]])
    assert not torch.allclose(model(batch).loss, model(placed).loss)


@pytest.mark.parametrize("position", ["1d", "mrope3d"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_singles(family, side, position):
    model, tokenizer = make_model(family, position=position)
    hidden = model.hidden_states(together := make_batch(tokenizer, THREE, side=side))
    for row, sample in enumerate(THREE):
        single = model.hidden_states(make_batch(tokenizer, [sample]))[0]
        actual = hidden[row][together["attention_mask"][row].bool()]
        torch.testing.assert_close(actual, single, atol=ATOL, rtol=1e-4)


def test_loss_is_the_stock_loss_and_a_batch_the_mean_of_its_samples(made):
    model, tokenizer = made
    singles = []
    for sample in THREE:
        batch = make_batch(tokenizer, [sample])
        logits = model.language.lm_head(model.hidden_states(batch))
        expected = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
        singles.append(model(batch).loss)
        torch.testing.assert_close(singles[-1], expected)
    torch.testing.assert_close(model(make_batch(tokenizer, THREE)).loss, torch.stack(singles).mean())


def test_only_answer_positions_reach_the_vocabulary(made):
    model, tokenizer = made
    batch = make_batch(tokenizer, THREE)
    rows = []
    hook = model.language.lm_head.register_forward_hook(
        lambda _m, inputs, _o: rows.append(inputs[0].shape[:-1].numel())
    )
    result = model(batch)
    hook.remove()
    answers = sum(len(tokenizer(answer).input_ids) + 1 for _, answer, _ in THREE)
    assert rows == [answers] == [result.num_tokens]


def greedy(model: VolumeQwen, batch: dict, steps: int) -> list[int]:
    """One sample, one token at a time, the whole sequence computed again at each step."""
    grown, out = dict(batch), []
    for _ in range(steps):
        token = model.language.lm_head(model.hidden_states(grown)[:, -1:]).argmax(-1)
        out.append(int(token))
        for name, value in (("input_ids", token), ("attention_mask", token * 0 + 1), ("mask_3d", token != token)):
            grown[name] = torch.cat([grown[name], value], 1)
    return out


@pytest.mark.parametrize("position", ["1d", "mrope3d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_greedy_recomputation_alone_and_in_a_batch(family, position):
    model, tokenizer = make_model(family, position=position)
    model.end_tokens = lambda: [0]  # random weights would stop at once or never; 0 is in neither output
    asked = [(question, None, volumes) for question, _, volumes in THREE]
    together = model.generate(make_batch(tokenizer, asked, side="left"), max_new_tokens=6)
    for row, sample in enumerate(asked):
        expected = greedy(model, make_batch(tokenizer, [sample]), 6)
        assert model.generate(make_batch(tokenizer, [sample]), max_new_tokens=6) == [expected]
        assert together[row] == expected


def test_forward_after_generation_of_another_batch_size(made):
    model, tokenizer = made
    before = model.hidden_states(make_batch(tokenizer, THREE))
    model.generate(make_batch(tokenizer, [(q, None, v) for q, _, v in THREE[:2]], side="left"), max_new_tokens=2)
    torch.testing.assert_close(model.hidden_states(make_batch(tokenizer, THREE)), before, atol=0, rtol=0)


def test_mrope3d_places_tokens_by_cell_and_text_goes_on_after_the_highest(made):
    model, tokenizer = made
    cells = torch.tensor([[1, 2, 3], [7, 0, 5]]).int()
    sequence = TokenSequence(torch.zeros(2, WIDTH), cells, torch.ones(2).long())
    batch = make_batch(tokenizer, [("Where?", None, [sequence])], fusion="prefix", side="left")
    placed = VolumeQwen(model.language, model.projector, position="mrope3d").position_ids(batch)
    assert placed[:, 0, :4].tolist() == [[3, 5, 8, 9], [2, 0, 8, 9], [1, 7, 8, 9]]
    assert model.position_ids(batch)[:, 0, :4].tolist() == [[0, 1, 2, 3]] * 3


def test_pads_are_not_counted_as_positions(made):
    """Pads at either end and in the middle, as collations of others leave them, change nothing."""
    model, tokenizer = made
    batch = make_batch(tokenizer, [THREE[0]])
    middle = int(batch["mask_3d"][0].nonzero().max()) + 1
    grown = dict(batch)
    for name in ("input_ids", "attention_mask", "mask_3d"):
        gap = torch.zeros(1, 5, dtype=batch[name].dtype)
        grown[name] = torch.cat([gap, batch[name][:, :middle], gap, batch[name][:, middle:], gap], 1)
    real = grown["attention_mask"].bool()
    assert torch.equal(model.position_ids(grown)[:, real], model.position_ids(batch)[:, 0])
    torch.testing.assert_close(model.hidden_states(grown)[real], model.hidden_states(batch)[0], atol=ATOL, rtol=1e-4)


def text_as_volume(model: VolumeQwen, ids: torch.Tensor) -> TokenSequence:
    """A volume whose projected tokens are exactly the embeddings of these ids."""
    coords = torch.stack([torch.arange(len(ids))] * 3, 1).int()
    return TokenSequence(model.language.get_input_embeddings().weight.detach()[ids], coords, torch.ones_like(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_beside_volumes_equal_the_stock_model(family):
    """With the volume's tokens equal to text embeddings, the whole is a stock call with an ordinary image."""
    model, tokenizer = make_model(family, width=32)
    torch.nn.init.eye_(model.projector.proj.weight)
    torch.nn.init.zeros_(model.projector.proj.bias)
    words = torch.tensor(tokenizer(" two nodules").input_ids)
    config = model.language.config
    grid = torch.tensor([[1, 4, 8]])
    image = {"pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": grid}
    encoded = encode_chat(tokenizer, "Where?", image_tokens=[8])._asdict() | {"volumes": [text_as_volume(model, words)]}
    pads = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])
    batch = collate([encoded], pad_id=pads[0], volume_id=pads[1], context=4096) | image
    plain = batch["input_ids"].masked_scatter(batch["mask_3d"], words)
    kinds = (plain == config.image_token_id).int()
    expected = build_tiny(TEXTS, family=family, width=32)[0](input_ids=plain, mm_token_type_ids=kinds, **image).logits
    actual = model.language.lm_head(model.hidden_states(batch))
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=1e-4)
    other = batch | {"pixel_values": torch.randn(32, 96)}
    assert not torch.allclose(model.hidden_states(other), model.hidden_states(batch), atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family, lora):
    gradients, visits = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, tokenizer = make_model(family)
        freeze(model.language)
        if lora:
            add_lora(model.language, dropout=0.0)
        if checkpointing:
            use_checkpointing(model.language)
        model.train()
        first = model.language.model.language_model.layers[0].mlp
        first.register_forward_pre_hook(lambda *_, at=checkpointing: visits.append(at))
        model(make_batch(tokenizer, THREE)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert visits == [False, True, True], "a layer is computed again in backward, and only with checkpointing"
    plain, recomputed = gradients
    assert set(plain) == set(recomputed) and any("lora" in name for name in plain) == lora
    assert plain["projector.proj.weight"].abs().max() > 0
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


COMPILED = list(itertools.product(FAMILIES, [False, True], [False, True]))
BRIEFLY = [("qwen2_vl", True, False), ("qwen3_vl", False, True)]  # each choice once: compiling takes ten seconds


@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [pytest.param(*case, marks=[] if case in BRIEFLY else pytest.mark.slow) for case in COMPILED],
)
def test_compiled_layers_give_the_same_from_one_compilation(family, lora, checkpointing):
    torch.compiler.reset()
    model, tokenizer = make_model(family)
    freeze(model.language)
    if lora:
        add_lora(model.language, dropout=0.0)
    model.train()
    batches = [make_batch(tokenizer, samples) for samples in (THREE, THREE[:2], THREE[1:])]
    asked = make_batch(tokenizer, [(q, None, v) for q, _, v in THREE], side="left")

    def steps():
        for batch in batches:
            model.zero_grad()
            result = model(batch)
            result.loss.backward()
            yield result.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, said = list(steps()), model.eval().generate(asked, max_new_tokens=4)
    if checkpointing:
        use_checkpointing(model.language)
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_layers(model.language, backend=compiled)
    model.train()
    for (loss, gradients), (same_loss, same_gradients) in zip(plain, steps(), strict=True):
        torch.testing.assert_close(same_loss, loss, atol=ATOL, rtol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same_gradients[name], gradient, atol=ATOL, rtol=1e-4)
    told = compiled.frame_count  # an error would be zero of them
    assert 1 <= told <= 2, "batches of every length share a compilation, layers too; one more where nothing is padded"
    assert model.eval().generate(asked, max_new_tokens=4) == said
    assert compiled.frame_count == told, "generation compiles nothing"


def test_ranks_do_not_cut_compiled_layers(tmp_path, monkeypatch):
    """Gradients are exchanged in buckets; here each holds less than a layer."""
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
    torch.compiler.reset()
    model, tokenizer = make_model("qwen2_vl")
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_layers(model.language, backend=counted)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        ranks = torch.nn.parallel.DistributedDataParallel(
            model.train(), bucket_cap_mb=0.001, find_unused_parameters=True
        )
        ranks(make_batch(tokenizer, THREE)).loss.backward()
    finally:
        distributed.destroy_process_group()
    assert 1 <= counted.frame_count <= 2, "as without ranks"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_round_trip_and_merge(family, tmp_path):
    model, tokenizer = make_model(family)
    model.end_tokens = lambda: [0]
    freeze(model.language)
    adapter = add_lora(model.language, r=4)
    changed = [name for name, p in model.language.named_parameters() if p.requires_grad]
    assert changed and all("language_model" in name and "visual" not in name for name in changed)
    generator = torch.Generator().manual_seed(0)
    for p in model.language.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    asked = make_batch(tokenizer, [(q, None, v) for q, _, v in THREE], side="left")
    model.eval()
    said, loss = model.generate(asked, max_new_tokens=8), model(make_batch(tokenizer, THREE)).loss
    adapter.save_pretrained(tmp_path)
    again, _ = make_model(family)
    again.end_tokens = lambda: [0]
    assert again.generate(asked, max_new_tokens=8) != said
    reloaded = load_lora(again.language, tmp_path)
    again.eval()
    assert again.generate(asked, max_new_tokens=8) == said
    assert torch.equal(again(make_batch(tokenizer, THREE)).loss, loss)
    reloaded.merge_and_unload()
    torch.testing.assert_close(again(make_batch(tokenizer, THREE)).loss, loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_with_the_stock_classes(family, tmp_path):
    model, tokenizer = make_model(family)
    save_language(model.language, tokenizer, tmp_path)
    language, reloaded = load_language(tmp_path)
    for name, value in model.language.state_dict().items():
        assert torch.equal(language.state_dict()[name], value), name
    chat = [{"role": "user", "content": "Is it 8 mm²?"}]
    text = reloaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nIs it 8 mm²?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n") == (family == "qwen2_vl")
    assert reloaded(text).input_ids == tokenizer(text).input_ids


def as_published(folder: Path) -> None:
    """Rewrites a saved Qwen2-VL's config in the form in which the published models carry it: flat, `rope_scaling`."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    vision = config["vision_config"]
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": vision["patch_size"]}
    for name in ("model_type", "rope_parameters"):
        del vision[name]
    del text["model_type"], text["layer_types"]
    file.write_text(json.dumps({**text, **config, "torch_dtype": "bfloat16", "transformers_version": "4.41.2"}))


def test_the_published_form_of_a_qwen2_vl_loads(tmp_path):
    """Flat config, keys without `language_model`, no lm_head beside tied embeddings: as on the hub."""
    model, tokenizer = make_model("qwen2_vl")
    for parameter in model.language.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_language(model.language, tokenizer, tmp_path)
    as_published(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "visual.merger.ln_q.weight"} <= names
    assert "lm_head.weight" not in names
    language, _ = load_language(tmp_path)
    again = VolumeQwen(language, model.projector, position="mrope3d").eval()
    ours = VolumeQwen(model.language, model.projector, position="mrope3d").eval()
    batch = make_batch(tokenizer, THREE)
    assert torch.equal(again.hidden_states(batch), ours.hidden_states(batch))
    assert again.end_tokens() == tokenizer.convert_tokens_to_ids(["<|im_end|>"])


class Evil:
    def __reduce__(self):
        return open, ("opened", "w")


def test_an_adapter_or_a_language_model_with_code_in_it_is_refused_and_the_code_never_runs(tmp_path, monkeypatch):
    """Pickles in place of safetensors, and a config that names classes of its folder."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make_model("qwen2_vl")
    save_language(model.language, tokenizer, tmp_path / "language")
    freeze(model.language)
    add_lora(model.language, r=4).save_pretrained(tmp_path / "lora")
    for folder, safe, pickled in (("lora", "adapter_model.safetensors", "adapter_model.bin"),
                                  ("language", "model.safetensors", "pytorch_model.bin")):  # fmt: skip
        (tmp_path / folder / safe).unlink()
        torch.save({"weight": Evil()}, tmp_path / folder / pickled)
    with pytest.raises(ValueError, match=r"low-rank layers of .*lora could not be loaded"):
        load_lora(make_model("qwen2_vl")[0].language, "lora")
    with pytest.raises(ValueError, match="weights or tokenizer of language could not be loaded"):
        load_language("language")
    config = json.loads((tmp_path / "language/config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
    (tmp_path / "language/config.json").write_text(json.dumps(config))
    (tmp_path / "language/evil.py").write_text("open('opened', 'w')")
    with pytest.raises(ValueError, match="language"):
        load_language("language")
    assert not (tmp_path / "opened").exists()


def test_folders_that_lack_a_part_are_named(tmp_path):
    """A copy of the weights alone would get an empty tokenizer, and learn from nothing."""
    model, tokenizer = make_model("qwen2_vl")
    save_language(model.language, tokenizer, tmp_path)
    freeze(model.language)
    add_lora(model.language, r=4).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"low-rank layers of .*lora could not be loaded"):
        load_lora(make_model("qwen2_vl")[0].language, tmp_path / "lora")
    for files, message in (
        (["chat_template.jinja"], "no chat template"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer of .* is missing or another model's"),
        (["model.safetensors"], "could not be loaded"),
    ):
        for file in files:
            (tmp_path / file).write_bytes(b"cut short") if file == "model.safetensors" else (tmp_path / file).unlink()
        with pytest.raises(ValueError, match=message):
            load_language(tmp_path)


def test_a_question_without_a_volume_is_the_stock_model(made):
    model, tokenizer = made
    batch = make_batch(tokenizer, [("Is there a nodule?", "No.", [])])
    actual = model.language.lm_head(model.hidden_states(batch))
    torch.testing.assert_close(actual, model.language(input_ids=batch["input_ids"]).logits, atol=ATOL, rtol=1e-4)


def test_wrong_models_and_batches_are_named(made, tmp_path):
    model, tokenizer = made
    batch = make_batch(tokenizer, THREE)
    with pytest.raises(ValueError, match="mask_3d marks 37 positions, feats_3d has 36 rows"):
        model.hidden_states(batch | {"feats_3d": batch["feats_3d"][1:], "coords_3d": batch["coords_3d"][1:]})
    with pytest.raises(ValueError, match="every sample needs an answer token"):
        model(batch | {"labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(batch)
    with pytest.raises(ValueError, match="writes width 16, the language model reads 32"):
        VolumeQwen(model.language, Projector(WIDTH, 16))
    with pytest.raises(ValueError, match="position must be one of 1d, mrope3d, got 2d"):
        VolumeQwen(model.language, model.projector, position="2d")
    with pytest.raises(ValueError, match="vl_model must be a Qwen2-VL or Qwen3-VL by hub name or path"):
        load_language(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"must be a Qwen2-VL or Qwen3-VL, got .* of type bert"):
        load_language(tmp_path)
