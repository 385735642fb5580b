"""A file is old or new, never half; what goes wrong names the file, not the one beside it."""

import os

import pytest

from app.shared.atomic_files import write_text, written_whole


def test_old_or_new(tmp_path):
    file = tmp_path / "made" / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), written_whole(file) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    with written_whole(file) as beside:
        assert beside.parent == file.parent and beside.suffix == ".txt"
        beside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and [path.name for path in file.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("named", [True, False])
def test_an_error_names_the_file(tmp_path, named):
    with pytest.raises(OSError) as error, written_whole(tmp_path / "a.txt") as beside:
        raise OSError(28, os.strerror(28), *([str(beside)] if named else []))
    assert error.value.filename == (str(tmp_path / "a.txt") if named else None)
