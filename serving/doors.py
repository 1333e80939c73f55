"""Who may ask, from which pages, and the log of who did. Plain ASGI, before a request is read."""

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Collection
from urllib.parse import urlsplit
from uuid import uuid4

from .refusals import Refusal, clip

logger = logging.getLogger(__name__)

# What of a client's own name of a request is taken over: nothing that a log or a page could take for something else.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")
# A page's origin, as browsers send it.
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@*]+")
# Letters of a path in the log.
PATH_LETTERS = 200


class Named:
    """Around an application: every answer has the header `x-request-id`, the client's own if that is one word, and where
    a log is wanted a line there: client, method, path, status (499: the client went), seconds, bytes, name."""

    def __init__(self, app, log: bool):
        self.app, self.log = app, log

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, num_bytes = time.perf_counter(), 499, 0
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if REQUEST_ID.fullmatch(given) else uuid4().hex.encode()

        async def send_named(message):
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", name)]}
                status = message["status"]
            num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        finally:
            if self.log:
                client = (scope.get("client") or ("-",))[0]
                path = clip(scope["path"], PATH_LETTERS).encode("unicode_escape").decode()
                seconds = time.perf_counter() - begun
                logger.info(
                    "%s %s %s %s %.3f s %d bytes %s",
                    client, scope["method"], path, status, seconds, num_bytes, name.decode(),
                )  # fmt: skip


class Doors:
    """Around an application: who has no key, or comes by a name or from a page that is not this server's, gets a 4xx.

    Args:
        app: ASGI application.
        keys: of which a request for a `locked` path must bring one; none: everybody may ask.
        hosts: names by which the server is asked, beside those of this machine, and of which pages in browsers may be. None: any.
        locked: beginning of the paths that want a key.
        origins: of other pages that may ask, "*" for all.
    """

    def __init__(
        self, app, keys: Collection[str] = (), hosts: Collection[str] | None = None, locked="/v1", origins: Collection[str] = ()
    ):  # fmt: skip
        self.app, self.keys, self.locked = app, [key.encode() for key in keys], locked
        self.hosts, self.origins = None if hosts is None else {host.lower() for host in hosts}, frozenset(origins)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            try:
                self.check(scope["path"], dict(scope["headers"]))
            except Refusal as refusal:
                from fastapi.responses import JSONResponse

                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
                # A body that is not read: the connection ends with the answer.
                response = JSONResponse(refusal.body(), refusal.status, headers=headers | {"Connection": "close"})
                await response({"type": "http"}, None, send)
                return
        await self.app(scope, receive, send)

    def check(self, path, headers):
        if self.hosts is not None and not self.knows(headers.get(b"host", b"localhost").decode("latin-1")):
            # A page of a stranger whose name leads to this machine would read the answers otherwise (DNS rebinding).
            raise Refusal(
                f"This server is not called {clip(headers[b'host'].decode('latin-1'), 100)!r}. Ask it as localhost, or start "
                "it with --allow-hosts and that name.",
                status=403,
                code="unknown_host",
            )
        origin = headers.get(b"origin")
        if self.hosts is not None and origin is not None and not self.knows_page(origin.decode("latin-1")):
            # What a browser asks for a page without asking first, such as a text, would be worked on.
            raise Refusal(
                f"Pages of {clip(origin.decode('latin-1'), 100)!r} may not ask. Start the server with --cors-origin and that origin.",
                status=403,
                code="unknown_origin",
            )
        if self.keys and path.startswith(self.locked):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = key.strip() if kind.lower() == b"bearer" else b""
            if not any([hmac.compare_digest(given, key) for key in self.keys]):
                raise Refusal(
                    "The API key is wrong."
                    if given
                    else "An API key is missing: send the header `Authorization: Bearer KEY`.",
                    status=401,
                    code="invalid_api_key",
                )

    def knows_page(self, origin: str) -> bool:
        return not self.origins.isdisjoint({origin, "*"}) or self.knows(origin.partition("://")[2])

    def knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.hosts or is_this_machine(name)


def is_this_machine(host: str) -> bool:
    """Whether a name or an address leads nowhere but to the machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_origins(origins: Collection[str]):
    """Raises `ValueError` for what no browser sends as a page's origin."""
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(f"--cors-origin is a page's origin, as https://example.org, or *. Got {origin!r}.")
