"""Parts of an export: code under another name, configs with the sizes, what metadata say and who holds to it."""

import ast
import dataclasses
import json

import pytest
import torch
from monai.bundle import ConfigParser

from app.export import code, configs
from app.export.export import export
from app.export.metadata import SCHEMA, make_metadata
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.shared.version import VERSION
from app.tokens.tokenizer import CTTokenizer
from networks.presets import preset
from tests import tiny_tokenizer as tiny

SOURCE = '''"""Of app.tokens.tokenizer and networks.sparse."""
import networks.kernels as kernels
from app.tokens import (  # app.tokens stays in a comment
    open_scan,
)
from transforms import Windowsd
from os import path as app
TABLE = {"triton": "networks.kernels.convolution", "text": "run app.tokens.tokenizer"}
def f(name):
    return __import__(f"networks.kernels.{name}"), 'app.tokens', app.join("é", "app")
'''


def test_imports_and_names_of_modules_move_and_nothing_else_does():
    moved = code.renamed(SOURCE, "p_1")
    changed = [(a, b) for a, b in zip(SOURCE.splitlines(), moved.splitlines(), strict=True) if a != b]
    assert changed == [
        ("import networks.kernels as kernels", "import p_1.networks.kernels as kernels"),
        ("from app.tokens import (  # app.tokens stays in a comment",
         "from p_1.app.tokens import (  # app.tokens stays in a comment"),
        ("from transforms import Windowsd", "from p_1.transforms import Windowsd"),
        ('TABLE = {"triton": "networks.kernels.convolution", "text": "run app.tokens.tokenizer"}',
         'TABLE = {"triton": "p_1.networks.kernels.convolution", "text": "run app.tokens.tokenizer"}'),
        ('    return __import__(f"networks.kernels.{name}"), \'app.tokens\', app.join("é", "app")',
         '    return __import__(f"p_1.networks.kernels.{name}"), \'p_1.app.tokens\', app.join("é", "app")'),
    ]  # fmt: skip


def test_an_import_that_binds_our_own_name_cannot_be_moved():
    with pytest.raises(ValueError, match="have an as"):
        code.renamed("import app.tokens\n", "p")


def test_no_file_of_ours_names_a_module_that_is_left_behind():
    for path, text in code.read_sources().items():
        for node in ast.walk(ast.parse(code.renamed(text, "p"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            left = [name for name in names if code.MODULE.fullmatch(name)]
            assert not left, f"{path} still names {left}"


def test_packages_of_other_code_or_version_have_other_names():
    sources = code.read_sources()
    name = code.package_name("my-CT 2", "0.1.0", sources)
    assert name.startswith("my_ct_2_0_1_0_") and name.isidentifier()
    assert name == code.package_name("my-CT 2", "0.1.0", dict(sources))
    assert name != code.package_name("my-CT 2", "0.2.0", sources)
    assert name != code.package_name("my-CT 2", "0.1.0", {**sources, "app/extra.py": ""})
    assert code.package_name("7", "1", {}).isidentifier()


def test_a_config_makes_the_very_sizes():
    sizes = preset("tiny").changed(keep="nonzero", windows=["lung", "bone"], prepared=[96, 4.0], num_embeddings=32)
    node = configs.network_of(sizes)
    assert ConfigParser({"net": json.loads(json.dumps(node))}).get_parsed_content("net").sizes == sizes


def test_configs_name_the_bundles_code_alone_and_come_with_their_files():
    made = configs.make_configs(bundles_folder(), preset("tiny"), package="p_1", aligned=True)
    assert set(made) == {"train.json", "inference.json", "evaluate.json", "multi_gpu_train.json", "ask.json"}
    for name, config in made.items():
        text = json.dumps(config)
        for package in code.PACKAGES:
            assert f'"_target_": "{package}.' not in text, name
        if name != "multi_gpu_train.json":
            assert config["initialize"][0] == configs.ON_PATH
    train = made["train.json"]
    assert train["resolution"] == 80 and train["keep"] == "body" and train["init_from"] == configs.WEIGHTS
    assert "ask.json" not in configs.make_configs(bundles_folder(), preset("tiny"), package="p", aligned=False)


def test_metadata_obey_the_vendored_schema_and_state_what_a_scan_must_be():
    import jsonschema

    base = json.loads((bundles_folder() / "metadata.json").read_text())
    sizes = preset("tiny").changed(windows=["lung", "bone"])
    made = make_metadata(base, sizes, name="n", package="p", digest="ab")
    jsonschema.validate(made, json.loads((bundles_folder() / SCHEMA).read_text()))
    assert base["version"] == made["version"] == VERSION
    assert made["tokenizer"] == {
        "sha256": "ab", "orientation": "RAS", "resolution": 80, "spacing": 5.0, "windows": ["lung", "bone"],
        "features": "window", "keep": "body", "num_embeddings": 256, "quantizer_levels": 1, "prepared": None,
        "hu_range": [-1350, 1050],
    }  # fmt: skip
    assert made["network_data_format"]["inputs"]["image"]["value_range"] == [-1350, 1050]


@pytest.fixture
def bundle(tmp_path):
    """Weights and metadata of a bundle, with configs that would leave a trace if anybody evaluated them."""
    network = tiny.make_network()
    digest = CTTokenizer.from_pretrained(save(network, tmp_path / "plain.pt")).digest
    made = make_metadata(json.loads((bundles_folder() / "metadata.json").read_text()), network.sizes, name="n",
                         package="p", digest=digest)  # fmt: skip
    for folder in ("configs", "models"):
        (tmp_path / "b" / folder).mkdir(parents=True)
    save(network, tmp_path / "b" / "models" / "model.pt")
    (tmp_path / "b" / "configs" / "metadata.json").write_text(json.dumps(made))
    evil = f"$open({str(tmp_path / 'evaluated')!r}, 'w')"
    for name in ("train.json", "inference.json"):
        config = {"initialize": [evil], "network_def": evil, "run": [evil]}
        (tmp_path / "b" / "configs" / name).write_text(json.dumps(config))
    (tmp_path / "b" / "p").mkdir()
    (tmp_path / "b" / "p" / "__init__.py").write_text(f"open({str(tmp_path / 'evaluated')!r}, 'w')")
    return tmp_path / "b"


def save(network, path):
    torch.save(network.state_dict(), path)
    return path


def test_a_bundle_is_read_without_evaluating_its_configs_or_code(bundle):
    CTTokenizer.from_pretrained(bundle)
    assert not (bundle.parent / "evaluated").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("spacing", 4.0), ("windows", ["lung"]), ("keep", "nonzero"), ("hu_range", [0, 1]), ("sha256", "0" * 64)],
)
def test_a_bundle_that_describes_another_tokenizer_is_refused(bundle, name, value, capsys):
    file = bundle / "configs" / "metadata.json"
    told = json.loads(file.read_text())
    told["tokenizer"][name] = value
    file.write_text(json.dumps(told))
    assert "BAD_BUNDLE" in refused(bundle, capsys)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tokenizer": 3}', "[" * 100_000])
def test_damaged_metadata_are_refused(bundle, text, capsys):
    (bundle / "configs" / "metadata.json").write_text(text)
    assert "BAD_BUNDLE" in refused(bundle, capsys)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000, "no errors", "errors of no kind"])
def test_a_damaged_card_beside_the_weights_is_refused_before_anything_is_written(content, bundle, tmp_path):
    made = CTTokenizer.from_pretrained(bundle)
    card = {"tokenizer": {"sha256": made.digest}, **({"errors": [3]} if content == "errors of no kind" else {})}
    text = json.dumps(card) if content[0] in "ne" else content
    (bundle / "tokenizer_card.json").write_text(text)
    with pytest.raises(Refused, match=r"^BAD_CARD: .*tokenizer_card.json is no card of a tokenizer"):
        export(tmp_path / "out", tokenizer=bundle)
    assert not (tmp_path / "out").exists()


def test_an_empty_name_is_not_the_default(tmp_path):
    with pytest.raises(Refused, match=r"^BAD_VALUE: tokenizer is empty"):
        export(tmp_path / "out", tokenizer="")


def refused(bundle, capsys):
    with pytest.raises(Refused) as caught:
        CTTokenizer.from_pretrained(bundle)
    return str(caught.value)


def test_sizes_that_a_bundle_states_are_fields_of_a_network():
    from app.tokens.bundles import STATED

    assert set(STATED) <= {field.name for field in dataclasses.fields(preset("tiny"))}
