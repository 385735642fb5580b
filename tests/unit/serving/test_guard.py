"""The guard around a server: who may ask, how much may be sent, that nothing leaves as a trace."""

import asyncio
import json
import logging

import pytest

from app.serving.guard import Guard, is_loopback, why_not_local

HERE = ("127.0.0.1", 5000)


def ask(app, *, client=HERE, headers=(), body=(b"",), local_only=True, max_bytes=100):
    """Status and detail of one request whose body comes in parts."""
    parts, sent = list(body), []

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    given = [(b"host", b"localhost:8000"), *((n.encode(), v.encode()) for n, v in headers)]
    given = [pair for pair in given if pair[0] not in {n.encode() for n, _ in headers} or pair in given[1:]]
    scope = {"type": "http", "method": "POST", "client": client, "headers": given}
    asyncio.run(Guard(app, max_bytes=max_bytes, local_only=local_only)(scope, receive, send))
    return sent[0]["status"], sent[-1].get("body", b"")


async def read_all(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"read"})


async def break_down(scope, receive, send):
    raise RuntimeError("/studies/Doe_John.nii.gz is broken")


async def answer_then_break(scope, receive, send):
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"Internal Server Error"})
    raise RuntimeError("/studies/Doe_John.nii.gz is broken")


async def parse(scope, receive, send):
    """What Starlette does where a handler breaks: it answers, then passes it on."""
    try:
        json.loads("[" * 100_000 if scope["client"] == HERE else "{no json")
    except Exception:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise


async def answer_500(scope, receive, send):
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"of its own"})


def code_of(answer):
    return answer[0], json.loads(answer[1])["detail"]["code"]


def test_this_machine_is_answered():
    assert ask(read_all, body=(b"a" * 60, b"b" * 40)) == (200, b"read")
    assert ask(read_all, client=("::1", 1), headers=[("origin", "http://localhost:8042")])[0] == 200


@pytest.mark.parametrize(
    "given",
    [
        {"client": ("10.0.0.7", 5000)},
        {"headers": [("host", "evil.example")]},
        {"headers": [("host", "127.0.0.1.evil.example")]},
        {"headers": [("origin", "https://evil.example")]},
        {"headers": [("origin", "null")]},
        {"headers": [("host", "[::1")]},
        {"headers": [("origin", "http://a]b")]},
    ],
)
def test_others_are_not_unless_a_host_was_named(given):
    assert code_of(ask(read_all, **given)) == (403, "NOT_LOCAL")
    assert ask(read_all, local_only=False, **given)[0] == 200


def test_more_than_is_allowed_is_refused_whether_it_is_told_or_not():
    assert code_of(ask(read_all, headers=[("content-length", "101")])) == (413, "TOO_LARGE")
    assert code_of(ask(read_all, body=(b"a" * 60, b"b" * 41))) == (413, "TOO_LARGE")


async def swallow(scope, receive, send):
    """What a framework does: it answers of its own where reading a request failed."""
    try:
        await read_all(scope, receive, send)
    except Exception:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"There was an error parsing the body"})


def test_too_much_is_told_though_the_application_says_otherwise():
    assert code_of(ask(swallow, body=(b"a" * 101,))) == (413, "TOO_LARGE")


@pytest.mark.parametrize("app", [break_down, answer_then_break])
def test_what_breaks_leaves_no_name_in_answer_or_log(app, caplog):
    with caplog.at_level(logging.DEBUG):
        answer = ask(app)
    assert code_of(answer) == (500, "FAULT") and b"Doe" not in answer[1]
    assert "RuntimeError" in caplog.text and "Doe" not in caplog.text


@pytest.mark.parametrize("client", [HERE, ("::1", 1)])
def test_json_that_cannot_be_read_is_a_call_and_no_fault(client, caplog):
    assert code_of(ask(parse, client=client)) == (422, "BAD_CALL") and "FAULT" not in caplog.text


def test_a_500_that_nothing_broke_for_passes_as_it_is():
    assert ask(answer_500) == (500, b"of its own")


def test_names_that_only_look_like_this_machine_are_not():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in (None, "", "0.0.0.0", "localhost.evil.example", "10.0.0.1")] == [False] * 5
    assert why_not_local(None, {"host": "localhost"}) is None
