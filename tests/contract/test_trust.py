"""Files from outside run no code: every reading of weights in the tree, and a checkpoint that carries code."""

import ast
import pickle
import re
import zipfile

import pytest
import torch

from app.shared.refusals import Refused
from app.tokens.tokenizer import CTTokenizer
from tests.contract.test_architecture import ROOT, SOURCES, ids, name_of, tree_of

CONFIGS = sorted((ROOT / "bundles").glob("*.json"))


def calls_of(path, pattern):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)
            and re.fullmatch(pattern, ast.unparse(node.func))]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_weights_and_arrays_are_read_without_running_code(path):
    for call in calls_of(path, r"torch\.load|np\.load|numpy\.load"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        wanted = ("weights_only", "True") if "torch" in ast.unparse(call.func) else ("allow_pickle", "False")
        default = "np.load" in ast.unparse(call.func) and "allow_pickle" not in given  # NumPy's own default
        assert given.get(wanted[0]) == wanted[1] or default, f"{name_of(path)}:{call.lineno}"
    assert not calls_of(path, r"(pickle|marshal|dill|joblib)\.loads?|yaml\.(unsafe_)?load|eval|exec"), name_of(path)


@pytest.mark.parametrize("path", SOURCES + CONFIGS, ids=ids(SOURCES + CONFIGS))
def test_nobodys_remote_code_is_trusted(path):
    found = re.findall(r"trust_remote_code\W+(\w+)", path.read_text(encoding="utf-8"))
    assert set(found) <= {"False", "false"}, f"{name_of(path)}: trust_remote_code {found}"


class Evil:
    def __reduce__(self):
        return open, ("opened", "w")


def pickled(path):
    path.write_bytes(pickle.dumps({"weights": Evil()}))


def zipped(path):
    torch.save({"encoder.weight": Evil()}, path)


def in_a_legacy_file(path):
    torch.save({"encoder.weight": Evil()}, path, _use_new_zipfile_serialization=False)


def cut_short(path):
    torch.save({"encoder.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])


def no_pickle_in_it(path):
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch opened'\ntR.")


@pytest.mark.parametrize("write", [pickled, zipped, in_a_legacy_file, cut_short, no_pickle_in_it])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_never_runs(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b" / "models").mkdir(parents=True)
    for place in (tmp_path / "model.pt", tmp_path / "b" / "models" / "model.pt"):
        write(place)
        with pytest.raises(Refused, match=r"^BAD_CHECKPOINT: "):
            CTTokenizer.from_pretrained(tmp_path / "b" if place.parent.name == "models" else place)
    assert not (tmp_path / "opened").exists()
