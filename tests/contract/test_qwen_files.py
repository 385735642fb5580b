"""Language models and adapters on disk: what was saved loads with the stock classes, what lacks a part is named."""

import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from safetensors import safe_open

from networks.qwen import (
    VolumeQwen,
    add_lora,
    load_language,
    load_lora,
    save_language,
)
from tests.qwen_models import FAMILIES, THREE, make_batch, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_round_trip_and_merge(family, tmp_path):
    model, tokenizer = make_model(family)
    model.end_tokens = lambda: [0]
    model.language.requires_grad_(False)
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
    model.language.requires_grad_(False)
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
    model.language.requires_grad_(False)
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
