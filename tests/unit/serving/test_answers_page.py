"""The page at /answers: one document that lets nothing else in, and all other requests pass it by."""

import asyncio
import base64
import hashlib
import re
from html import unescape

import pytest

from app.serving.answers_page import AnswersPage, document


def ask(path, method="GET"):
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    asyncio.run(AnswersPage(app)({"type": "http", "path": path, "method": method}, None, send))
    return passed, sent


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_it_is_given_at_its_path(method):
    passed, (start, body) = ask("/answers", method)
    headers = dict(start["headers"])
    assert not passed and start["status"] == 200 and headers[b"x-frame-options"] == b"DENY"
    assert headers[b"content-length"] == str(len(document().encode())).encode()
    assert (body["body"] == b"") == (method == "HEAD")


@pytest.mark.parametrize(("path", "method"), [("/info/", "GET"), ("/answers", "POST"), ("/answers/x", "GET")])
def test_everything_else_passes_by(path, method):
    assert ask(path, method) == ([path], [])


def test_one_script_runs_and_nothing_is_fetched_from_elsewhere():
    text = document()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in unescape(policy) and "default-src 'none'" in unescape(policy)
    assert not re.findall(r"https?://|innerHTML|insertAdjacentHTML|eval\(", text)
    assert "Research use only, not for diagnosis." in text
