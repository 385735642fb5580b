"""A headless Chromium for tests of pages: opened by its debugging pipe, so that it needs no driver and no port."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120  # for an answer


def find_chromium() -> str:
    """Where it is missing a test skips; under .ci/run, which installs it, it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("VOXELINGO_CI"):
        pytest.fail("no Chromium: .ci/run has to install it (apt-get install chromium)")
    if found is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    return found


class Browser:
    """One page at a time. Everything that it loads, and everything that it complains of, is kept."""

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(
            prefix="page_test_", ignore_cleanup_errors=True
        )  # children of a killed browser may still write
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars")
        quiet = ("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-dev-shm-usage")
        command = [find_chromium(), *options, *quiet, f"--user-data-dir={self.profile.name}", "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for pair in (os.pipe(), os.pipe()) for end in pair]
        its_input, self.input, self.output, its_output = ends

        def wire() -> None:  # it reads from 3 and writes to 4
            os.dup2(its_input, 3)
            os.dup2(its_output, 4)

        log = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=wire, pass_fds=(3, 4), **log)
        os.close(its_input)
        os.close(its_output)
        self.number, self.kept = 0, b""
        self.loaded: list[str] = []
        self.complaints: list[str] = []
        (page,) = (one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        attach = {"targetId": page["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            told = self._message(until)
            if told.get("id") == self.number:
                assert "error" not in told, (method, told)
                return told["result"]
            self._keep(told)

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.kept:
            ready, _, _ = select.select([self.output], [], [], max(until - time.monotonic(), 0))
            assert ready, f"Chromium did not answer within {SECONDS} s"
            more = os.read(self.output, 1 << 20)
            assert more, "Chromium ended"
            self.kept += more
        message, _, self.kept = self.kept.partition(b"\0")
        return json.loads(message)

    def _keep(self, told: dict[str, Any]) -> None:
        method, params = told.get("method", ""), told.get("params", {})
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.loaded.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])

    def open(self, page: Path | str, *, width: int, scheme: str = "light", media: str = "") -> None:
        """Shows a file or an address as a screen of this width in a light or dark scheme; `media` print: on paper."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features, media=media)
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", url=address)
        until = time.monotonic() + SECONDS
        while self.ask("document.readyState + location.href") != f"complete{address}":
            assert time.monotonic() < until, "the page was not loaded"
            time.sleep(0.1)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, top to bottom."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.input, self.output):
            os.close(end)
        self.profile.cleanup()
