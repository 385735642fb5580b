"""3D tokens in tiny Qwen2-VL and Qwen3-VL of true architecture: equal to the stock models wherever they should be."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from app.language.chat import collate_chats, encode_chat
from networks.projector import Projector
from networks.qwen import (
    VolumeQwen,
    add_lora,
    compile_layers,
    load_language,
    use_checkpointing,
)
from networks.tiny_qwen import build_tiny
from networks.tokens import TokenSequence
from tests.qwen_models import ATOL, FAMILIES, TEXTS, THREE, WIDTH, make_batch, make_model


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
    front = collate_chats([bare], pad_id=pads[0], volume_id=pads[1], context=4096)
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
    batch = collate_chats([encoded], pad_id=pads[0], volume_id=pads[1], context=4096) | image
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
        model.language.requires_grad_(False)
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
    model.language.requires_grad_(False)
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
