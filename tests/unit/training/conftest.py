"""What tests of pre-flight share: a command line, and a config with one mistake."""

import json
import re

import pytest

from app.shared.refusals import Refused
from app.training import preflight
from tests.preflight_calls import EVALUATE, STAGE1


@pytest.fixture
def check():
    """Runs the check on a command line; gives the line it ended with, or None."""

    def run(*flags, config=STAGE1):
        what = "run" if config == EVALUATE else "training"
        words = ["/x/monai/bundle/__main__.py", "run", what, "--config_file", str(config), *map(str, flags)]
        try:
            preflight.check_run(preflight.read_command_line(words))
        except Refused as refused:
            said = str(refused)
            assert refused.status == 2 and "\n" not in said
            assert re.match(r"[A-Z_]+: .+\. .+[.?]$", said) and "?." not in said, said
            return said
        return None

    return run


@pytest.fixture
def config(tmp_path):
    """A config file with one mistake in it."""

    def write(**content):
        file = tmp_path / "stage.json"
        start = {"max_steps": 5, "part": {"_target_": "collections.OrderedDict"}, "training": ["$@part"]}
        file.write_text(json.dumps({**start, **content}))
        return file

    return write
