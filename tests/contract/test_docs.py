"""README and docs say what is: their commands and Python parse, their links lead somewhere, their keys are all there.

Commands are held to what they would call, without running them: the options of `python -m app`, the keys and values of
a bundle run, the files of a benchmark.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from fire.parser import DefaultParseValue

from app.__main__ import app
from app.dataset.prepared import PreparedCase
from app.language.assistant import CTAssistant
from app.tokens.tokenizer import CTTokenizer
from app.training.key_rules import RULES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
key_table = importlib.import_module("key_table")

PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests/benchmarks/RESULTS.md",
    *sorted(ROOT.glob("docs/*.md")),
]
BUNDLES = (*key_table.STAGES, *key_table.OTHERS)
OTHER_TOOLS = ("pip", "pytest", "ruff", "monailabel", "python3.11", ".", "curl")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """Every command of a page's bash blocks as words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in split if words]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def merged(files):
    config = {}
    for file in files:
        config |= json.loads((ROOT / file).read_text(encoding="utf-8"))
    return config


def check_bundle_run(words):
    """The config files lie there, and every flag is a key of theirs with a value that its rule allows."""
    flags = dict(zip(words[0::2], words[1::2], strict=True))
    files = DefaultParseValue(flags.pop("--config_file"))
    config = merged([files] if isinstance(files, str) else files)
    for flag, text in flags.items():
        key = flag.removeprefix("--")
        assert key in config, f"{flag}: no key of {files}"
        value = None if text in ("None", "$None") else DefaultParseValue(text)
        rule = RULES.get(key)
        assert rule is None or (value is None and rule.optional) or rule.allows(value), f"{flag} {text}: {rule.says}"


def check_command(words):
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "voxelingo":  # the same, installed
        words = ["python", "-m", "app", *words[1:]]
    if words[:3] == ["python", "-m", "app"]:
        tool = typer.main.get_command(app).commands[words[3]]
        tool.make_context(words[3], list(words[4:]))
    elif words[:4] == ["python", "-m", "monai.bundle", "run"]:
        run_id = [] if words[4].startswith("--") else [words[4]]
        assert run_id in ([], ["training"])
        check_bundle_run(words[4 + len(run_id) :])
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words[2]
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words[1]
    else:
        assert words[0] in OTHER_TOOLS, words


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}:{' '.join(words)}" for page, words in COMMANDS])
def test_every_command_can_be_called_as_it_stands(page, words):
    check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "python -m app tokenise a b",
        "python -m app ask scan --modle x",
        "python -m monai.bundle run training --config_file bundles/va.json",
        "python -m monai.bundle run training --config_file bundles/vae.json --data_dir OUT",
        "python -m monai.bundle run training --config_file bundles/vae.json --max_steps many",
        "python -m tests.benchmarks.bench_nothing",
    ],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises(Exception):  # noqa: B017 whatever its parser raises
        check_command(shlex.split(line))


def test_the_pages_have_commands():
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", text):
        if target and "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        other = (page.parent / target if target else page).read_text(encoding="utf-8")
        titles = [
            re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", other, re.M)
        ]
        assert anchor in titles, f"{page.name}: {target}#{anchor}"


def test_tests_that_the_page_of_hostile_inputs_names_are_there():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/security.md").read_text(encoding="utf-8")))
    assert len(named) > 20 and named <= {file.name for file in (ROOT / "tests").rglob("test_*.py")}


def test_the_readme_is_short_and_has_the_lines_that_continuous_integration_reads():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    main_job = "pip install -e . && python -m monai.bundle run training --config_file bundles/vq_stage1.json"
    assert f"\n{main_job}\n" in text and '\npip install -e ".[dev]" && pytest\n' in text


def test_the_chinese_readme_has_the_commands_figures_and_pages_of_the_readme():
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert commands(chinese) == commands(english)
    assert figures(chinese) == figures(english)
    assert set(links(chinese)) - {"README.md"} == set(links(english)) - {"README.zh.md"}
    assert "README.zh.md" in links(english) and "README.md" in links(chinese)


def figures(page):
    """All numbers of a page's text, each as often as it stands there."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return Counter(re.findall(r"(?<![\w.])[+-]?\d*\.\d+|(?<![\w.])\d{2,}(?![\w.])", text))


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


# ---- keys


@pytest.mark.parametrize("name", BUNDLES)
def test_every_flat_key_has_a_meaning(name):
    keys = key_table.flat_keys(name)
    assert keys and not [key for key in keys if key not in key_table.MEANINGS]


def test_every_key_with_a_rule_has_a_meaning_and_no_meaning_is_left_over():
    listed = {key for name in BUNDLES for key in key_table.flat_keys(name)}
    assert set(RULES) <= set(key_table.MEANINGS)
    assert set(key_table.MEANINGS) - listed - set(RULES) == set()


def test_the_key_tables_are_what_the_bundles_give():
    page = key_table.PAGE.read_text(encoding="utf-8")
    assert key_table.page_with(page, key_table.tables()) == page, "run python docs/key_table.py"


# ---- Python

PYTHON = [(page.name, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{at}" for at, (page, _) in enumerate(PYTHON)])
def test_what_the_python_imports_is_there(page, block):
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


KINDS = {"case": PreparedCase, "tokenizer": CTTokenizer, "assistant": CTAssistant}  # of the names that pages use


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{at}" for at, (page, _) in enumerate(PYTHON)])
def test_what_the_python_calls_is_there(page, block):
    """Methods, and the arguments that are named."""
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    for call in (call for call in calls if isinstance(call.func, ast.Attribute)):
        kind = KINDS.get(getattr(call.func.value, "id", None))
        if kind is not None:
            parameters = inspect.signature(getattr(kind, call.func.attr)).parameters
            assert not [word.arg for word in call.keywords if word.arg not in parameters]


def test_the_example_of_the_network_runs():
    (block,) = (block for _, block in PYTHON if "make_vqvae" in block)
    seen = {}
    exec(block, seen)
    assert seen["tokens"].codes.shape == (1,) and seen["output"].recon.feats.shape == (2, 4)
    assert torch.equal(seen["output"].recon.coords, seen["x"].coords)
