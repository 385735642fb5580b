"""MONAI Label as a process of its own, started by the command of docs/serving.md, for tests of mark label."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from app.tokens.token_files import read_tokens

PATIENT = "Doe_John_19700101"
SECONDS_TO_START = 300


class Server(NamedTuple):
    url: str
    log: Path
    home: Path  # what the server calls the folder of temporary files

    def ask(self, model, **given):
        import requests

        return requests.post(f"{self.url}/infer/{model}", timeout=600, **given)


def start(app: Path, studies: Path, place: Path, *, conf: dict, options=()):
    """The command of the docs, in a folder that holds nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--port", str(port), *options]
    for name, value in conf.items():
        command += ["--conf", name, str(value)]
    place.mkdir()
    kept = {**os.environ, "TMPDIR": str(place)}
    for name in ("PYTHONPATH", "MONAI_LABEL_SESSION_PATH"):
        kept.pop(name, None)
    log = place / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=place, env=kept, stdout=out, stderr=subprocess.STDOUT)
    return process, Server(f"http://127.0.0.1:{port}", log, place)


def wait_for(process, server):
    import requests  # MONAI Label brings it

    for _ in range(SECONDS_TO_START):
        try:
            return requests.get(f"{server.url}/info/", timeout=5)
        except requests.ConnectionError:
            assert process.poll() is None, server.log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(server.log.read_text()[-3000:])


def end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def tokens_of(answer, folder):
    file = folder / "answer.npz"
    file.write_bytes(base64.b64decode(answer.json()["npz"]))
    return read_tokens(file)
