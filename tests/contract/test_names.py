"""A name means one thing in the whole tree: classes, functions, files of tests."""

import ast

from tests.contract.test_architecture import HAND_WRITTEN, TESTS, name_of, tree_of


def test_no_two_classes_have_one_name():
    classes = [node.name for path in HAND_WRITTEN for node in tree_of(path).body if isinstance(node, ast.ClassDef)]
    assert not sorted({name for name in classes if classes.count(name) > 1 and not name.startswith("_")})


NAMED_AFTER_BODIES = ("app/__main__.py", "app/demo.py")  # commands, stages of the demo: called as what they call
ONE_MEANING = {  # functions of several files by one name, and what they have in common
    "lines": "what a command prints of what its body gives",
    "main": "what a file does that is run by its name",
    **dict.fromkeys(("forward", "input_grad", "weight_grad"), "each backend of the convolution has them"),
    **dict.fromkeys(("morton_keys", "morton_coords"), "topology asks the maps of a device for them"),
    "window_values": "of arrays, and bit for bit the same of tensors",
}


def test_no_two_functions_have_one_name_unless_they_mean_one_thing():
    files = [path for path in HAND_WRITTEN if name_of(path) not in NAMED_AFTER_BODIES]
    names = [node.name for path in files for node in tree_of(path).body if isinstance(node, ast.FunctionDef)]
    repeated = {name for name in names if names.count(name) > 1 and not name.startswith("_")}
    assert repeated == set(ONE_MEANING), "two functions of one name mean one thing, or one of them gets another name"


def test_names_of_test_files_are_unique():
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names))
