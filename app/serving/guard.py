"""What stands between a server and the network: who may ask, how much may be sent, what is said where something breaks.

MONAI Label listens to every network, lets any web page ask it, takes uploads of any size, and logs requests with names
and traces with paths. An ASGI application around its own; knows nothing of MONAI Label.
"""

import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):
    """More was sent than is allowed."""


class Guard:
    """Args: `app`: any ASGI application. `max_bytes` of a request. `local_only`: answers this machine alone."""

    def __init__(self, app: Callable[..., Awaitable[None]], *, max_bytes: int, local_only: bool) -> None:
        self.app, self.max_bytes, self.local_only = app, max_bytes, local_only

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.local_only and (reason := why_not_local(scope.get("client"), headers)) is not None:
            await refuse(send, 403, "NOT_LOCAL", reason, "start the server with --host to be asked from elsewhere")
            return
        if int(headers.get("content-length", "0") or 0) > self.max_bytes:
            await self._refuse_size(send)
            return
        await self._counted(scope, receive, send)

    async def _counted(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, counts what comes in, and keeps what breaks inside from leaving as a trace."""
        received, too_large, started = 0, False, False
        held: list[Message] = []  # a framework's own answer to an error, which it sends before it raises the error

        async def count() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                too_large = True
                raise TooLarge
            return message

        async def pass_on(message: Message) -> None:
            nonlocal started
            if too_large:  # the application's answer to half a request: the client gets the refusal alone
                return
            if not started and (held or message.get("status") == 500):
                held.append(message)
                return
            started = True
            await send(message)

        try:
            await self.app(scope, count, pass_on)
            for message in held:
                await send(message)
        except Exception as error:
            unread = isinstance(error, json.JSONDecodeError | RecursionError)
            if not unread and not too_large:
                log.error("FAULT: %s while answering %s", type(error).__name__, scope["method"])
            if not started and not too_large and unread:
                await refuse(send, 422, "BAD_CALL", "the JSON of the request cannot be read", "correct it")
            elif not started and not too_large:
                await refuse(send, 500, "FAULT", type(error).__name__, "report it with this line")
        if too_large:
            await self._refuse_size(send)

    async def _refuse_size(self, send: Send) -> None:
        most = f"a request holds at most {self.max_bytes / 2**20:g} MiB"
        await refuse(send, 413, "TOO_LARGE", most, "send less, or start the server with --conf max_upload_mb N")


def why_not_local(client: tuple[str, int] | None, headers: dict[str, str]) -> str | None:
    """The reason why a request is not this machine's own; None where it is.

    Whoever controls a name can point it here, and any page in a browser here can ask: so both are looked at.
    """
    if client is not None and not is_loopback(client[0]):
        return "it comes from another machine"
    if not is_loopback(_host_of(f"//{headers.get('host', '')}")):
        return "it asks for another host"
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_host_of(origin)):
        return "it comes from another site's page"
    return None


def _host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # such as an IPv6 address whose bracket is not closed
        return None


def is_loopback(host: str | None) -> bool:
    if host in ("localhost", "testclient"):
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def refuse(send: Send, status: int, code: str, message: str, remedy: str) -> None:
    body = json.dumps({"detail": {"code": code, "message": message, "remedy": remedy}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
