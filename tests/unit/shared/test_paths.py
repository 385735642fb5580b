"""A path that is empty or a pipe is refused by every command before it opens anything: a pipe would be waited for."""

import os

import pytest

from app.check import check
from app.language.ask import ask
from app.prepare.cohort import prepare
from app.shared.refusals import Refused, check_path
from app.tokens.commands import reconstruct, tokenize

COMMANDS = {
    "prepare": lambda path, out: prepare(path, out),
    "check": lambda path, out: check(path),
    "tokenize": lambda path, out: tokenize(path, out),
    "reconstruct": lambda path, out: reconstruct(path, out),
    "ask": lambda path, out: ask(str(path), ["Is there an effusion?"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_is_not_waited_for(command, tmp_path):
    os.mkfifo(tmp_path / "scan.nii.gz")
    with pytest.raises(
        Refused, match=r"NO_SOURCE: .* is a pipe or a device\. Save what comes from it as a file first\."
    ):
        COMMANDS[command](tmp_path / "scan.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_not_the_current_folder(path):
    with pytest.raises(Refused, match="BAD_VALUE: OUT is empty"):
        check_path(path)


def test_files_folders_and_what_is_not_there_pass(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "none", "x" * 5000):
        check_path(path)
