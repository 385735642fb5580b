"""The wheel: what an installation without a checkout holds, and that it is one version everywhere."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from app.shared.version import VERSION
from tests.runs import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip would fill it, and the names in the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("app", "bundles", "networks", "transforms"):
        left_out = shutil.ignore_patterns("__pycache__", "logs", "model", "lib", "bin")
        shutil.copytree(ROOT / name, place / "source" / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, place / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(place), "."]
    subprocess.run(command, cwd=place / "source", check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place / "site")
        return place / "site", wheel.name, packed.namelist()


def run_from(site, place, *words):
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'voxelingo'; import app.__main__ as m; m.run()"
    )
    call = [sys.executable, "-I", "-B", "-c", script, *words]
    return subprocess.run(call, cwd=place, capture_output=True, text=True, check=True).stdout.strip()


def test_the_wheel_holds_the_bundles_and_the_app(installed):
    _, _, names = installed
    for name in ("vq_stage1.json", "inference.json", "metadata.json", "meta_schema_20240725.json", "logging.conf"):
        assert f"bundles/{name}" in names
    assert "app/main.py" in names and not [name for name in names if name.startswith("tests")]


def test_where_names_the_installed_folders(installed, tmp_path):
    site, _, _ = installed
    assert run_from(site, tmp_path, "where", "bundles") == str(site / "bundles")
    assert json.loads(run_from(site, tmp_path, "where", "app", "--json")) == {"app": str(site / "app")}


def test_there_is_one_version(installed, tmp_path):
    site, wheel, _ = installed
    assert run_from(site, tmp_path, "--version") == f"voxelingo {VERSION}"
    assert re.match(r"voxelingo-([\d.]+)-", wheel)[1] == VERSION
    told = json.loads((ROOT / "bundles" / "metadata.json").read_text())
    assert told["version"] == VERSION and VERSION in told["changelog"]
