"""A thousand damaged mesh files of every format through the whole of `sdf`: a shape or one clear line each."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from app.__main__ import app
from app.shapes.mesh_files import Mesh, write_mesh
from app.shapes.shape_files import read_shape
from tests.unit.shapes.test_mesh_files import FACES, FILES, VERTICES

COUNT = 1000
WORDS = [b"nan", b"inf", b"99999999999", b"-1 ", b"\xff\xff\xff\x7f", b"1e400 ", b"0", b"<", b"\n"]


def cut(content, rng):
    return content[: int(rng.integers(0, len(content)))]


def spoil_bytes(content, rng):
    changed = bytearray(content)
    for place in rng.integers(0, len(content), rng.integers(1, 40)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def double(content, rng):
    at = int(rng.integers(1, len(content)))
    return content[:at] + content[max(0, at - 30) :]


def put_in(content, rng):
    at = int(rng.integers(1, len(content)))
    return content[:at] + rng.choice(WORDS) + content[at:]


def turn(content, rng):
    at = int(rng.integers(1, len(content)))
    return content[at:] + content[:at]


def change_a_number(content, rng):
    """Of a text one digit, so that a coordinate or an index is another; of bytes one in the latter half."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57] or range(len(content) // 2, len(content))
    at = int(rng.choice(places))
    return content[:at] + bytes([rng.integers(48, 58)]) + content[at + 1 :]


def flatten(content, rng):
    """No area, or no extent: every coordinate alike."""
    return content.replace(b"32", b"28").replace(b"33", b"27") if rng.random() < 0.5 else bytes(len(content))


def be_text(content, rng):
    return b"Dear reader,\nthis is a letter and no mesh.\n" * int(rng.integers(0, 60))


DAMAGES = (cut, spoil_bytes, double, put_in, turn, change_a_number, flatten, be_text)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Files of every format, each damaged in one way; the same at each run."""
    rng = np.random.default_rng(17)
    folder = tmp_path_factory.mktemp("damaged")
    contents = {name: make() for name, make in FILES.items()}
    write_mesh(folder / "binary.stl", Mesh(VERTICES, FACES))
    contents["binary.stl"] = (folder / "binary.stl").read_bytes()
    (folder / "binary.stl").unlink()
    for number in range(COUNT):
        name = list(contents)[number % len(contents)]
        damage = DAMAGES[number // len(contents) % len(DAMAGES)]
        (folder / f"{number:04}_{damage.__name__}_{name}").write_bytes(damage(contents[name], rng))
    return folder


def sdf(*words):
    ended = CliRunner().invoke(app, ["sdf", *map(str, words), "--resolution", "16"])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), repr(ended.exception)
    return ended


def test_no_damage_is_more_than_one_clear_line(damaged, tmp_path):
    ended = sdf(damaged, tmp_path / "out", "--workers", "1", "--json")
    assert ended.exit_code in (0, 3) and "Traceback" not in ended.stderr
    done = json.loads(ended.stdout)
    assert len(done["cases"]) == COUNT == done["ok"] + done["refused"]
    for case in done["cases"]:
        if case["status"] == "ok":
            (file,) = case["files"]
            assert len(read_shape(tmp_path / "out" / file["file"]).coords) == file["points"]
        else:
            assert case["codes"][0] in ("BAD_MESH", "OPEN_MESH"), case
            assert "\n" not in case["message"] and len(case["message"]) > 20 and case["remedy"], case
    formats = {
        ending: [c["status"] for c in done["cases"] if c["source"].endswith(ending)]
        for ending in (".stl", ".obj", ".ply", ".vtp")
    }
    assert all({"ok", "refused"} == set(found) for found in formats.values())
    rows = list(csv.DictReader((tmp_path / "out/failures.csv").open()))
    assert [row["source"] for row in rows] == [c["source"] for c in done["cases"] if c["status"] == "refused"]


@pytest.mark.parametrize("number", range(0, COUNT, 41))
def test_a_damaged_file_alone_says_the_same_in_its_line(number, damaged, tmp_path):
    (file,) = damaged.glob(f"{number:04}_*")
    ended = sdf(file, tmp_path / "out")
    lines = ended.stdout.strip().splitlines()
    if ended.exit_code == 0:
        assert lines[0].startswith("ok  ") and lines[1].startswith("1 ok, 0 refused")
    else:
        assert ended.exit_code == 3 and lines[0].startswith("refused  ") and lines[1].startswith("0 ok, 1 refused")
        assert file.name in lines[0] and ("BAD_MESH" in lines[0] or "OPEN_MESH" in lines[0])
    assert len(lines) == 2
