"""What a client may take of the server: bytes, seconds, places."""

import asyncio
import json

import pytest
from uhr_bat.serving import limits
from uhr_bat.serving.limits import Limits

SCOPE = {"type": "http", "method": "POST", "headers": []}


class Client:
    """One connection: the parts of a request as they come, and what was sent back."""

    def __init__(self, *parts, waits=False):
        self.parts, self.waits, self.sent = list(parts), waits, []

    async def receive(self):
        if self.parts:
            part = self.parts.pop(0)
            more = bool(self.parts) or self.waits
            return part if isinstance(part, dict) else {"type": "http.request", "body": part, "more_body": more}
        if self.waits:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def reason(self):
        return json.loads(self.sent[1]["body"])["error"]["message"]


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def guard(app=echo, **settings):
    return Limits(app, **{"max_bytes": 10, "max_requests": 2} | settings)


def call(app, client, **scope):
    asyncio.run(app(SCOPE | scope, client.receive, client.send))
    return client


def test_a_request_in_parts_reaches_the_application_whole():
    client = call(guard(), Client(b"12345", b"67890"))
    assert client.status == 200 and client.sent[1]["body"] == b"1234567890"


def test_what_is_longer_than_any_text_and_no_image_is_not_waited_for():
    settings = {"max_bytes": 100, "max_text_bytes": 20}
    assert call(guard(**settings), Client(b'"data:', b"1" * 40, b"2" * 40)).status == 200
    client = call(guard(**settings), Client(b"1" * 15, b"2" * 15, b"data:" * 5, waits=True))
    assert client.status == 413 and "30 bytes or more without an image" in client.reason
    compressed = call(guard(), Client(b"1"), headers=[(b"content-encoding", b"gzip")])
    assert compressed.status == 415 and "'gzip'" in compressed.reason


@pytest.mark.parametrize("headers, parts", [([(b"content-length", b"11")], []), ([], [b"12345678", b"9012"])])
def test_a_request_that_is_too_large_is_refused_before_it_is_read_to_its_end(headers, parts):
    client = call(guard(), Client(*parts, waits=True), headers=headers)
    assert client.status == 413 and "over the limit of 10 bytes" in client.reason


def test_a_request_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(limits, "RECEIVE_SECONDS", 0.01)
    app = guard()
    client = call(app, Client(b"1", waits=True))
    assert client.status == 408 and "within 0.01 seconds" in client.reason and app.active == 0


def test_a_client_that_goes_on_the_way_is_not_answered():
    app = guard()
    client = call(app, Client(b"1", {"type": "http.disconnect"}))
    assert client.sent == [] and app.active == 0


def test_more_requests_than_there_is_room_for_are_refused_and_counted():
    refused, held = [], asyncio.Event()

    async def hold(scope, receive, send):
        await held.wait()
        await echo(scope, receive, send)

    async def at_once():
        app, clients = guard(hold, on_refusal=refused.append), [Client(b"1") for _ in range(3)]
        first = [asyncio.create_task(app(SCOPE, one.receive, one.send)) for one in clients[:2]]
        await asyncio.sleep(0)
        await app(SCOPE, clients[2].receive, clients[2].send)
        held.set()
        await asyncio.gather(*first)
        return clients

    clients = asyncio.run(at_once())
    assert [client.status for client in clients] == [200, 200, 429] and refused == [429]


def test_who_sends_slowly_holds_bytes_and_nobodys_place():
    async def at_once():
        app, slow = guard(max_requests=1), [Client(b"123456789", waits=True) for _ in range(4)]
        tasks = [asyncio.create_task(app(SCOPE, one.receive, one.send)) for one in slow]
        await asyncio.sleep(0)
        quick, large = Client(b"1"), Client(b"12345")
        await app(SCOPE, quick.receive, quick.send)
        await app(SCOPE, large.receive, large.send)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return app, quick, large

    app, quick, large = asyncio.run(at_once())
    assert quick.status == 200  # 37 of 40 bytes are held
    assert large.status == 429 and "as many bytes" in large.reason
    assert app.held_bytes == app.active == 0


def test_a_client_that_takes_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.01)
    client, app = Client(b"1"), guard()

    async def stuck(message):
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(app(SCOPE, client.receive, stuck))
    assert app.active == 0


def test_other_methods_are_not_held():
    app = guard(max_requests=0)
    assert call(app, Client(b""), method="GET").status == 200
