"""The house rules as tests: who imports whom, what a file may do when imported, that docs and disk agree.

Reads sources as text and syntax trees.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.training.preflight import walk

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("app", "transforms", "networks")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
STAGES = ("vae.json", "vq_stage1.json", "vq_stage2.json")
ALLOWED = {  # who may import which of ours
    "transforms": {"transforms"},
    "networks": {"networks"},
    "app": {"app", "transforms", "networks"},
}
APP_ROOMS = (  # each knows only those before it
    "shared", "dataset", "text", "measures", "prepare", "shapes", "phantoms", "training", "tokens", "language",
    "evaluation", "export", "serving",
)  # fmt: skip
MAX_LOOSE_FILES = 7  # of app/: the commands, and what uses many rooms
OWNERS = {  # optional or heavy libraries, each behind one door
    "transformers": {"networks/qwen.py", "networks/tiny_qwen.py"},
    "tokenizers": {"networks/qwen.py", "networks/tiny_qwen.py"},
    "peft": {"networks/qwen.py"},
    "spconv": {"networks/sparse/spconv_backend.py"},
    "cumm": {"networks/sparse/spconv_backend.py"},
    "triton": {
        f"networks/kernels/{part}.py"
        for part in (
            "attention",
            "children",
            "code_search",
            "convolution",
            "errors",
            "launch",
            "linear",
            "maps",
            "norm",
            "producer_convolution",
            "producer_gradient",
            "rows",
        )
    },
}
SPARSE_LAYERS = (
    "torch_maps",
    "maps",
    "topology",
    "tensor",
    "backend",
    "ops",
    "whole_blocks",
    "graphs",
    "modules",
)  # each may import those before it
ASK_KERNELS = {"networks/sparse/maps.py", "networks/sparse/ops.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path):
    """Full dotted names of everything a file imports, at any depth; `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def ids(paths):
    return [name_of(path) for path in paths]


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_rooms_import_only_who_they_may(path):
    room = name_of(path).split("/")[0]
    ours = {name.split(".")[0] for name in imports_of(path)} & {*ROOMS, "tests"}
    assert ours <= ALLOWED[room], f"{name_of(path)} imports {sorted(ours - ALLOWED[room])}"


def rooms_used(path):
    """The rooms of app/ that a file imports from, each with the import that shows it; a loose file as its own room."""
    parts = [name.split(".") for name in imports_of(path) if name.startswith("app.")]
    return {part[1]: ".".join(part) for part in parts}


APP = [path for path in SOURCES if name_of(path).startswith("app/")]


@pytest.mark.parametrize("path", APP, ids=ids(APP))
def test_rooms_of_app_know_only_those_before_them(path):
    room = name_of(path).split("/")[1]
    if room.endswith(".py"):
        return
    assert room in APP_ROOMS, f"{room} is no room of {APP_ROOMS}"
    allowed = APP_ROOMS[: APP_ROOMS.index(room) + 1]
    back = {name: shown for name, shown in rooms_used(path).items() if name not in allowed}
    assert not back, f"{name_of(path)} imports {back}: {room} knows only {allowed}"


def test_the_rule_of_rooms_has_met_real_imports():
    assert len([1 for path in APP for room in rooms_used(path) if not name_of(path).startswith(f"app/{room}/")]) > 60


def test_app_has_few_loose_files():
    loose = [path.name for path in APP if path.parent == ROOT / "app"]
    assert len(loose) <= MAX_LOOSE_FILES, f"app/ has {sorted(loose)}"


def test_a_stage_run_on_data_of_ones_own_loads_nothing_of_language_or_of_raw_scans():
    configs = [json.loads((ROOT / "bundles" / name).read_text()) for name in STAGES]
    targets = {value for config in configs for _, key, value in walk(config) if key == "_target_"}
    modules = sorted({target.rpartition(".")[0] for target in targets if target.startswith("app.")})
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rooms = {name.split(".")[1] for name in loaded.split() if name.startswith("app.")}
    assert modules and not rooms & {"language", "evaluation", "tokens", "export", "prepare", "shapes"}, sorted(rooms)


# not the kernels, whose files are as long as a card wants them and whose functions are called as what they replace
HAND_WRITTEN = [path for path in SOURCES if not name_of(path).startswith("networks/kernels/")]


def test_files_are_at_most_400_lines_and_functions_60():
    assert not {name_of(path) for path in HAND_WRITTEN if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    nodes = [(name_of(path), node) for path in HAND_WRITTEN for node in ast.walk(tree_of(path))]
    functions = [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]
    assert not {(name, node.name) for name, node in functions if node.end_lineno - node.lineno >= 60}


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_heavy_libraries_stay_with_their_owners(path):
    for library in {name.split(".")[0] for name in imports_of(path)} & set(OWNERS):
        assert name_of(path) in OWNERS[library], f"{library} may be imported by {OWNERS[library]} only"


def layer_of(module):
    """Place of networks.sparse.X among the layers; None for the package itself."""
    name = "backend" if module.endswith("_backend") else module
    return SPARSE_LAYERS.index(name) if name in SPARSE_LAYERS else None


def test_sparse_core_is_layered():
    judged = 0
    for path in sorted((ROOT / "networks/sparse").glob("*.py")):
        own = layer_of(path.stem)
        if path.stem == "__init__":
            continue
        assert own is not None, f"networks/sparse/{path.name} belongs to no layer of {SPARSE_LAYERS}"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[:1] != ["networks"]:
                continue
            assert parts[1] == "sparse", f"{path.name} imports {name}: the sparse core knows no network"
            for part in parts[2:]:
                other = layer_of(part)
                if other is not None:
                    judged += 1
                    assert other <= own and (other < own or own == layer_of("torch_backend")), (
                        f"{path.name} imports {name}"
                    )
    assert judged >= 6  # the rule has met real imports


def test_kernels_know_rows_and_levels_and_no_network():
    judged = 0
    for path in sorted((ROOT / "networks/kernels").glob("*.py")):
        ours = {name for name in imports_of(path) if name.startswith("networks.")}
        judged += len(ours)
        wrong = {name for name in ours if not re.match(r"networks\.(kernels|sparse\.topology)\.", name)}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}"
    assert judged >= 20  # the rule has met real imports


def test_kernels_are_asked_for_by_few_and_never_imported():
    """Triton may be absent or broken: kernels are looked up by name, where their plain twin stands by."""
    for path in SOURCES:
        if name_of(path).startswith("networks/kernels/"):
            continue
        assert not {n for n in imports_of(path) if n.startswith("networks.kernels")}, f"{name_of(path)} imports kernels"
        asks = "networks.kernels." in path.read_text(encoding="utf-8")
        assert asks == (name_of(path) in ASK_KERNELS), f"{name_of(path)}: only {sorted(ASK_KERNELS)} ask for kernels"


def signatures_of(path):
    """Public functions of a file with their parameters, as written."""
    made = (node for node in tree_of(path).body if isinstance(node, ast.FunctionDef))
    return {node.name: ast.unparse(node.args) for node in made if not node.name.startswith("_")}


def test_both_modules_of_maps_have_equal_functions():
    plain, fused = (signatures_of(ROOT / "networks" / name) for name in ("sparse/torch_maps.py", "kernels/maps.py"))
    assert plain == fused and len(plain) == 12


def test_every_convolution_backend_has_the_same_functions():
    names = ("sparse/torch_backend.py", "sparse/spconv_backend.py", "kernels/convolution.py")
    plain, *fast = (signatures_of(ROOT / "networks" / name) for name in names)
    assert len(plain) == 3
    for other in fast:
        assert {name: other[name] for name in plain} == plain and "refusal" in other


def test_backends_are_reached_only_through_the_choice():
    for path in SOURCES:
        users = {n for n in imports_of(path) if re.match(r"networks\.sparse\.\w+_backend|networks\.sparse\.ops\b", n)}
        if name_of(path).startswith("networks/sparse/") or name_of(path) == "app/doctor.py":
            continue
        assert not {n for n in users if "_backend" in n}, f"{name_of(path)} imports a backend"


def at_import(tree):
    """Every node that runs when the module is imported: all but function bodies."""
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.Lambda):
            pending += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        else:
            pending += ast.iter_child_nodes(node)


FORBIDDEN_CALLS = re.compile(
    r"(print|open|input|exec|eval|exit)$|np\.(?!(array|diag|eye|iinfo|finfo)$)|(numpy|random|time|subprocess|socket|shutil|warnings|logging)\.(?!getLogger$)"
    r"|torch\.(?!(no_grad|inference_mode|compile)$|library)|os\.|sys\.|Path\("
)
FORBIDDEN_READS = ("os.environ", "sys.argv", "sys.path", "sys.stdout", "sys.stderr")


def deeds_at_import(path):
    found = []
    for node in at_import(tree_of(path)):
        if isinstance(node, ast.Call) and FORBIDDEN_CALLS.match(ast.unparse(node.func)):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_READS:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_nothing_is_computed_printed_or_read_at_import(path):
    deeds = deeds_at_import(path)
    if name_of(path) == "app/main.py":  # MONAI Label puts only this folder on the path
        deeds = [deed for deed in deeds if "sys.path" not in deed and "__file__" not in deed]
    assert not deeds, f"{name_of(path)} does this when imported: {deeds}"


def test_the_import_rule_sees_what_it_forbids(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import os, torch\nTABLE = torch.arange(8)\nif os.environ.get('X'):\n    print(1)\n"
        "def f(x=torch.zeros(1)):\n    return os.environ\n"
    )
    assert len(deeds_at_import(path)) == 5  # arange, environ.get and environ itself, print, the default


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_no_state_in_modules(path):
    tree = tree_of(path)
    changed = [name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names]
    assert not changed, f"{name_of(path)} changes module variables {changed}"
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
            names = [ast.unparse(target) for target in node.targets]
            assert all(name.isupper() or name == "__all__" for name in names), f"{name_of(path)}: {names} can change"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=ids(SOURCES + TESTS))
def test_a_file_opens_with_what_it_is(path):
    text = ast.get_docstring(tree_of(path))
    assert text, f"{name_of(path)} has no docstring"
    assert len(text.splitlines()) <= 10, f"{name_of(path)}: what it is takes {len(text.splitlines())} lines"


def test_no_drawer_for_everything():
    names = {path.name for path in SOURCES + TESTS}
    assert not names & {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_annotations_stay_real_for_jaxtyping(path):
    assert "__future__.annotations" not in imports_of(path)


def test_compiled_kernels_are_hidden_from_the_type_checker():
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if any(mark.startswith("triton.jit") for mark in marks):
                    assert "no_type_check" in marks, f"{name_of(path)}: {node.name} lacks @no_type_check"


def test_the_oracle_knows_nothing_of_ours():
    names = {name.split(".")[0] for name in imports_of(ROOT / "tests/oracle.py")}
    assert not names & {*ROOMS, "tests"}


# ---- the tree in docs, packaging


def tree_of_docs():
    """The text block under "## The house"."""
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    block = re.search(r"^## The house\n.*?^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return block[1] if block else None


def paths_of(tree):
    """Full paths of a tree that is indented by two blanks a level; folders end with a slash."""
    stack, found = [], set()
    for line in tree.splitlines():
        match = re.match(r"( *)([\w./]+)(?:\s|$)", line)
        if match:
            del stack[len(match[1]) // 2 :]
            found.add("".join(stack) + match[2])
            stack.append(match[2])
    return found


def test_the_tree_of_docs_is_what_lies_on_disk():
    tree = tree_of_docs()
    assert tree is not None, 'docs/contributing.md has no ```text block under "## The house"'
    shown = paths_of(tree)
    assert not {path for path in shown if not (ROOT / path).exists()}, "only in docs/contributing.md"
    real = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert {path for path in shown if path.endswith(".py") and path.split("/")[0] in ROOMS} == real
    assert {"tests/oracle.py", "tests/conftest.py", "bundles/"} <= shown


def test_a_tree_is_read_with_its_folders():
    tree = "app/      people\n  a.py    one\n  deep/   room\n    b.py  two\nnetworks/\n  c.py\n"
    assert paths_of(tree) == {"app/", "app/a.py", "app/deep/", "app/deep/b.py", "networks/", "networks/c.py"}


def project_table():
    tomllib = pytest.importorskip("tomllib" if __import__("sys").version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    found = {name_of(path.parent).replace("/", ".") for path in SOURCES}
    assert set(project_table()["tool"]["setuptools"]["packages"]) == found | {"bundles"}  # the wheel holds it too


def test_dependencies_have_both_bounds():
    project = project_table()["project"]
    needs = [*project["dependencies"], *(n for extra in project["optional-dependencies"].values() for n in extra)]
    for need in needs:
        assert re.search(r"==|>=.*,<", need), f"{need} is open at one end"
