"""Who may ask, from which pages, and what a log says of it."""

import asyncio
import logging
from types import SimpleNamespace

import httpx
import pytest
from uhr_bat.serving import serve
from uhr_bat.serving.app import Service, make_app, sse
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.sources import SourceRules

QUESTION = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": True}


@pytest.fixture
def service():
    """Without a model: an answer is a piece, or fails after it where `failing` says so."""
    decoder = SimpleNamespace(running=0, is_alive=True)
    engine = SimpleNamespace(front=SimpleNamespace(cache=ContentCache(0)), decoder=decoder, window=100)
    service = Service(engine, "m", SourceRules(1000), 1000)
    service.failing = False

    async def stream(request):
        yield sse({"piece": "one"})
        if service.failing:
            raise RuntimeError("the decoder died")

    service.stream = stream
    return service


def ask(service, *requests, **options):
    """The responses to (method, path, headers, body) by an application."""

    async def all_of_them():
        transport = httpx.ASGITransport(make_app(service, 4, **options), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                await client.request(method, path, headers=headers, json=body)
                for method, path, headers, body in requests
            ]

    return asyncio.run(all_of_them())


def chat(**headers):
    return "POST", "/v1/chat/completions", headers, QUESTION


@pytest.mark.parametrize(
    "header, status",
    [("Bearer one", 200), ("bearer  two", 200), ("Bearer three", 401), ("Bearer ", 401), ("one", 401), (None, 401),
     ("Basic one", 401), ("Bearer one one", 401), ("Bearer \u00e9", 401)],
)  # fmt: skip
def test_who_has_no_key_gets_a_401_in_openais_form(service, header, status):
    headers = {} if header is None else {"Authorization": header.encode()}
    asked = [("GET", "/v1/models", headers, None), ("POST", "/v1/chat/completions", headers, QUESTION)]
    for response in ask(service, *asked, keys=["one", "two"]):
        assert response.status_code == status
        if status == 401:
            error = response.json()["error"]
            assert error["code"] == "invalid_api_key" and error.keys() == {"message", "type", "param", "code"}
            assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_page_of_a_stranger_may_not_ask_a_server_of_this_machine(service):
    pages = [
        "https://else.example",
        "null",
        "http://localhost.else.example",
        "http://localhost:3000",
        "https://map.example",
    ]
    asked = [("POST", "/v1/chat/completions", {"Origin": page}, QUESTION) for page in pages]
    options = {"hosts": ["127.0.0.1"], "origins": ["https://map.example"]}
    responses = ask(service, *asked, **options)
    assert [response.status_code for response in responses] == [403, 403, 403, 200, 200]
    assert responses[0].json()["error"]["code"] == "unknown_origin"
    assert {one.status_code for one in ask(service, *asked, **options | {"origins": ["*"]})} == {200}


def test_health_needs_no_key(service):
    assert [one.status_code for one in ask(service, ("GET", "/health", {}, None), keys=["one"])] == [200]


def test_pages_of_an_origin_may_ask_and_read_errors_too(service):
    page = {"Origin": "https://map.example"}
    before = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    asked = [("OPTIONS", "/v1/chat/completions", before, None), ("GET", "/v1/models", page, None)]
    asked += [("GET", "/v1/nothing", page, None), ("POST", "/v1/chat/completions", page, {"model": 5})]
    options = {"keys": ["one"], "origins": ["https://map.example", "app://obsidian.md"]}
    for response in ask(service, *asked, **options):
        assert response.headers["Access-Control-Allow-Origin"] == "https://map.example"
    (other,) = ask(service, ("GET", "/health", {"Origin": "https://else.example"}, None), **options)
    assert "Access-Control-Allow-Origin" not in other.headers
    (none,) = ask(service, ("GET", "/health", page, None))
    assert "Access-Control-Allow-Origin" not in none.headers


@pytest.mark.parametrize(
    "host, status",
    [("localhost:8000", 200), ("ships.localhost", 200), ("127.9.9.9:1", 200), ("[::1]", 200), ("Ships.Example:80", 200),
     ("rebound.example", 403), ("localhost.example", 403), ("127.0.0.1.example", 403), ("10.0.0.8", 403), ("[", 403)],
)  # fmt: skip
def test_a_server_of_this_machine_is_asked_by_its_own_names(service, host, status):
    (response,) = ask(service, ("GET", "/health", {"Host": host}, None), hosts=["ships.example"])
    assert response.status_code == status
    assert status == 200 or "--allow-hosts" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "given, taken", [("a-1.B:2", True), ("", False), ("a b", False), ("x" * 129, False), ("<b>", False)]
)
def test_a_client_names_its_request_in_one_word(service, given, taken):
    (response,) = ask(service, ("GET", "/health", {"x-request-id": given}, None))
    name = response.headers["x-request-id"]
    assert name == given if taken else len(name) == 32 and name.isalnum()


def test_the_log_has_a_line_for_every_request(service, caplog):
    caplog.set_level(logging.INFO)
    ask(service, ("GET", "/v1/no%0Athing?key=secret", {"x-request-id": "mine"}, None), chat(), access_log=True)
    first, second = [record.getMessage() for record in caplog.records if record.name.endswith("doors")]
    assert "GET /v1/no\\nthing 404" in first and first.endswith(" mine") and "secret" not in first
    assert "POST /v1/chat/completions 200" in second


def test_a_stream_that_fails_on_its_way_is_counted(service):
    service.failing = True
    failed, page = ask(service, chat(), ("GET", "/metrics", {}, None))
    assert failed.status_code == 200 and '"error"' in failed.text.splitlines()[-2]
    assert 'uhr_bat_requests_total{status="500"} 1.0' in page.text.splitlines()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cors-origin", "https://map.example/"], "Got 'https://map.example/'"),
        (["--cors-origin", "map.example"], "Got 'map.example'"),
        (["--api-key", ""], "--api-key is empty"),
    ],
)
def test_options_that_open_no_door_are_refused(options, message, capsys):
    assert serve.main(options) != 0
    assert message in capsys.readouterr().err
