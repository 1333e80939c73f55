"""What a client may take of the server: bytes, seconds, places. Plain ASGI, before anything reads the request."""

import asyncio

from .refusals import Refusal

# Seconds for the whole of a request to arrive.
RECEIVE_SECONDS = 60
# Seconds for a client to take a part of the answer.
SEND_SECONDS = 60
# Requests of the greatest size whose bytes may be held at a time, by many small ones or few large ones.
HELD_REQUESTS = 4


class Limits:
    """Around an application: POST requests that are too large, too slow or too many get a 4xx, and keep nothing.

    Args:
        app: ASGI application.
        max_bytes: of a request's body.
        max_requests: that are worked on at a time.
        max_text_bytes: of a body without an image of its own: what has none by then is not waited for.
        on_refusal: called with the status of a request that is refused here, 499 of one that the client left.
    """

    def __init__(
        self,
        app,
        max_bytes: int,
        max_requests: int,
        max_text_bytes: int | None = None,
        on_refusal=lambda status: None,
    ):
        self.app, self.max_bytes, self.max_requests, self.on_refusal = app, max_bytes, max_requests, on_refusal
        self.max_text_bytes = max_bytes if max_text_bytes is None else max_text_bytes
        self.active = self.held_bytes = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            # A request takes a place when it has arrived: who sends slowly holds its bytes and nobody's place.
            self.check_places()
            if not await self.read(scope, receive, body):
                self.on_refusal(499)  # the client went
            else:
                self.check_places()
                self.active += 1
                try:
                    await self.app(scope, hand_over(bytes(body), receive), sent_in_time(send))
                finally:
                    self.active -= 1
        except Refusal as refusal:
            await self.refuse(refusal, send)
        finally:
            self.held_bytes -= len(body)

    def check_places(self):
        if self.active >= self.max_requests:
            raise busy(f"{self.max_requests} requests are being worked on, which is the most of this server.")

    async def read(self, scope, receive, body: bytearray) -> bool:
        """Appends what arrives to `body`; whether all of it did, and the client did not go."""
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() not in ("", "identity"):
            raise Refusal(f"A request is sent as it is, without {encoding[:50]!r} (Content-Encoding).", status=415)
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit():
            self.check_size(int(stated))
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    self.check_size(len(body) + len(part))
                    if self.held_bytes + len(part) > HELD_REQUESTS * self.max_bytes:
                        raise busy("The server holds as many bytes of requests as it may.")
                    was_text = len(body) <= self.max_text_bytes
                    body += part
                    self.held_bytes += len(part)
                    if was_text and len(body) > self.max_text_bytes:
                        self.check_image(body)
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise Refusal(
                f"The request did not arrive within {RECEIVE_SECONDS} seconds.", status=408, code="timeout"
            ) from None

    def check_size(self, num_bytes):
        if num_bytes > self.max_bytes:
            raise Refusal(
                f"The request has {num_bytes} bytes or more, over the limit of {self.max_bytes} bytes.",
                status=413,
                code="request_too_large",
            )

    def check_image(self, body):
        if not any(word in body for word in (b"data:", b"DATA:")):
            raise Refusal(
                f"The request has {len(body)} bytes or more without an image of its own (data: URL), over the limit of "
                f"{self.max_text_bytes} bytes for text.",
                status=413,
                code="request_too_large",
            )

    async def refuse(self, refusal, send):
        from fastapi.responses import JSONResponse

        self.on_refusal(refusal.status)
        # The rest of the body is not read: the connection ends with the answer.
        response = JSONResponse(refusal.body(), refusal.status, headers={"Connection": "close"})
        await response({"type": "http"}, None, send)


def busy(why: str) -> Refusal:
    return Refusal(f"{why} Try again.", status=429, code="rate_limit_exceeded")


def hand_over(body, receive):
    """`receive` of an application whose body was read before it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return left.pop() if left else await receive()

    return receive_again


def sent_in_time(send):
    """`send` that gives up a client who takes nothing."""

    async def send_in_time(message):
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)

    return send_in_time
