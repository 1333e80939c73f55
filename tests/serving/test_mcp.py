"""The tools for agents, as the package's own client calls them: in the process, over stdio and over HTTP."""

import asyncio
import base64
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mcp")
from images import random_image  # noqa: E402
from mcp import Client, StdioServerParameters  # noqa: E402
from PIL import Image  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from rasters import random_bands, write_dates, write_raster  # noqa: E402
from served import serve_app  # noqa: E402
from uhr_bat import ask  # noqa: E402
from uhr_bat.common.loading import ROOT  # noqa: E402
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration  # noqa: E402
from uhr_bat.serving import mcp, mcp_tools  # noqa: E402
from uhr_bat.serving.engine import Piece  # noqa: E402

TOOLS = {"open", "ask", "objects", "where", "look", "plan"}
QUESTION = "How many ships are at the pier?"
FEW = {"max_tiles": 8, "max_tokens": 4}
HEIGHT, WIDTH = 90, 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the server may open: pictures, a raster on the ground, and a link that leads out of it."""
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "open"
    folder.mkdir()
    for seed in range(3):
        random_image(HEIGHT, WIDTH, seed=seed).save(folder / f"{seed}.png")
    rasterio = pytest.importorskip("rasterio")
    place = rasterio.transform.from_origin(500_000, 4_000_000, 10, 10)
    write_raster(folder / "scene.tif", random_bands(4, 400, 300), crs="EPSG:32654", transform=place)
    write_dates(folder)
    random_image(8, 8).save(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    return folder


@pytest.fixture(scope="module")
def tools(folder):
    args = mcp.parser().parse_args(
        ["--name", "tiny", "--allow-local-files", str(folder), "--max-image-bytes", "1000000"]
    )
    return mcp.make_tools(args)


class Kept(mcp.Loaded):
    """Tools that are there for the next server too."""

    async def close(self):
        pass


@pytest.fixture
def talk(tools):
    """Runs a conversation with a server, in the process; what it returns."""

    def talk(conversation, **options):
        async def run():
            async with Client(mcp.make_server(Kept(tools)), **options) as client:
                return await conversation(client)

        return asyncio.run(run())

    return talk


@pytest.fixture
def call(talk):
    """The result of one call, which succeeds: its facts."""

    def call(name, **arguments):
        return facts(talk(lambda client: client.call_tool(name, arguments)))

    return call


def facts(result):
    assert not result.is_error, result.content
    (text,) = [part.text for part in result.content if part.type == "text"]
    assert json.loads(text) == result.structured_content
    return result.structured_content


def sentence(result):
    assert result.is_error
    (part,) = result.content
    return part.text


def picture(result):
    (part,) = [part for part in result.content if part.type == "image"]
    assert part.mime_type == "image/jpeg"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(part.data))), float)


def test_all_tools_say_what_they_do_and_take(talk):
    listed = talk(lambda client: client.list_tools()).tools
    assert {tool.name for tool in listed} == TOOLS
    for tool in listed:
        assert tool.description and tool.annotations.read_only_hint
        assert tool.input_schema["required"] and all(tool.input_schema["properties"].values())


def test_opening_tells_size_place_levels_and_cost_and_encodes_nothing(call, tools):
    before = dict(tools.front.cache.made)
    found = call("open", image="scene.tif")
    assert found["image_size"] == [400, 300] and found["crs"] == "WGS 84 / UTM zone 54N"
    assert found["transform"] == [10, 0, 500_000, 0, -10, 4_000_000]
    assert [level["side"] for level in found["levels"]] == [64, 128, 256, 416]
    assert found["cost"]["tiles"] == sum(level["tiles_read"] for level in found["levels"]) <= 128
    assert found["cost"]["flops"] > 0 and found["cost"]["peak_memory_bytes"] > 0
    made = tools.front.cache.made
    assert {name: made.get(name) for name in ("image", "selection")} == {
        name: before.get(name) for name in ("image", "selection")
    }
    assert call("plan", height=400, width=300)["cost"] == found["cost"]


def test_an_answer_is_the_servers_with_its_evidence_in_pixels_and_on_the_ground(call, tools):
    said = call("ask", image="scene.tif", question=QUESTION, evidence=5, **FEW)

    async def asked():
        url = {"url": str(tools.service.sources.folder / "scene.tif")}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]
        request = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 4}
        request |= {"max_tiles": 8, "native": True, "evidence": True}
        return await tools.service.whole(await tools.service.parse(json.dumps(request).encode()))

    whole = asyncio.run(asked())
    assert said["answer"] == whole["choices"][0]["message"]["content"]
    (evidence,) = whole["evidence"]
    scores = sorted((token["score"] for token in evidence["tokens"]), reverse=True)
    assert said["visual_tokens"] == len(scores) and [one["score"] for one in said["evidence"]] == scores[:5]
    for token in said["evidence"]:
        for top, left, bottom, right in token["boxes"]:
            assert 0 <= top < bottom <= 400 and 0 <= left < right <= 300
    assert [feature["properties"]["score"] for feature in said["geojson"]["features"]] == pytest.approx(scores[:5])
    longitude, latitude = said["geojson"]["features"][0]["geometry"]["coordinates"][0][0]
    assert 140.9 < longitude < 141.1 and 36 < latitude < 36.2


def test_an_answer_about_two_dates_is_that_of_ask_with_places_of_the_later(call, tools, folder):
    said = call("ask", image="later.tif", before="earlier.tif", question=QUESTION, **FEW)
    options = {"max_tiles": 8, "native": True, "max_new_tokens": 4}
    front, before = tools.front, str(folder / "earlier.tif")
    expected = ask(front.processor, front.model, str(folder / "later.tif"), QUESTION, before=before, **options)
    assert (said["answer"].strip(), said["visual_tokens"]) == (expected.text, expected.num_tokens)
    assert said["confidence"] == pytest.approx(expected.confidence, abs=1e-3)
    assert said["window"] == [0, 0, 90, 140]


def test_boxes_of_a_part_are_in_pixels_of_the_whole_image(call):
    said = call("ask", image="scene.tif", question=QUESTION, window=[300, 200, 400, 300], **FEW)
    assert said["window"] == [300, 200, 400, 300] and said["evidence"]
    for token in said["evidence"]:
        assert all(box[0] >= 300 and box[1] >= 200 and box[2] <= 400 and box[3] <= 300 for box in token["boxes"])


def test_windows_lie_in_the_image_the_best_first_and_a_question_is_compressed_once(call, tools):
    found = call("where", image="scene.tif", question=QUESTION, number=3, side=64, max_tiles=8)
    shares = [window["share"] for window in found["windows"]]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 1
    for window in found["windows"]:
        top, left, bottom, right = window["window"]
        assert 0 <= top and 0 <= left and bottom <= 400 and right <= 300 and bottom - top == right - left == 64
    made = dict(tools.front.cache.made)
    assert (
        call("where", image="scene.tif", question=QUESTION, number=1, side=64, max_tiles=8)["windows"]
        == found["windows"][:1]
    )
    assert tools.front.cache.made == made


def test_a_look_shows_a_window_as_large_as_the_picture_may_be(talk, folder):
    part = talk(lambda client: client.call_tool("look", {"image": "0.png", "window": [10, 20, 74, 84]}))
    shown = {"image_size": [HEIGHT, WIDTH], "window": [10, 20, 74, 84], "picture_size": [64, 64]}
    assert facts(part) == shown | {"picture_pixels_per_pixel": 1, "full_resolution": True}
    true = np.asarray(Image.open(folder / "0.png"), float)[10:74, 20:84]
    assert np.abs(picture(part) - true).mean() < np.abs(picture(part) - true[::-1]).mean()
    whole = talk(lambda client: client.call_tool("look", {"image": "0.png", "side": 40}))
    assert picture(whole).shape == (30, 40, 3) and not facts(whole)["full_resolution"]


def test_a_look_with_a_question_is_yellow_where_that_looks(talk, tmp_path, folder):
    Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255)).save(folder / "blue.png")
    arguments = {"image": "blue.png", "question": QUESTION, "max_tiles": 8}
    drawn = picture(talk(lambda client: client.call_tool("look", arguments)))
    yellow = drawn[..., 0] > 60
    assert 0 < yellow.mean() < 0.5


def test_an_answer_without_objects_says_so(call, monkeypatch):
    # A model that points to nothing itself.
    monkeypatch.setattr(UHRBatForConditionalGeneration, "point", lambda self, ids, compressed: [None] * len(ids))
    found = call("objects", image="scene.tif", question=QUESTION, **FEW)
    assert found["objects"] == [] and found["note"].startswith("The answer holds no box and no point")
    assert found["image_size"] == [400, 300] and found["ground_error"] is None


def test_objects_are_told_rows_first_in_pixels_and_on_the_ground(call, monkeypatch):
    async def said(asked):  # of 1,000 of a side of the square, 50 px of which lie left of the image
        return [Piece('{"box_2d": [100, 300, 240, 330], "label": "ship"}', [], 9)]

    monkeypatch.setattr(mcp_tools, "said", said)
    # A model that points to nothing itself.
    monkeypatch.setattr(UHRBatForConditionalGeneration, "point", lambda self, ids, compressed: [None] * len(ids))
    (found,) = call("objects", image="scene.tif", question=QUESTION, **FEW)["objects"]
    assert found["label"] == "ship" and found["box"] == pytest.approx([40, 70, 96, 82])
    assert found["ground"]["type"] == "Polygon"


@pytest.mark.parametrize("name, arguments, message", [
    ("ask", {}, "image: Field required."),
    ("ask", {"image": "0.png", "question": " "}, "There is no question."),
    ("ask", {"image": "0.png", "question": "q", "image_size": 3}, "ask has no argument 'image_size'. It has image, question,"),
    ("ask", {"image": "0.png", "question": "q", "max_tiles": 1}, "the 4 tiles of the anchor are always encoded"),
    ("ask", {"image": "0.png", "question": "q", "max_tiles": True}, "max_tiles: Input should be a valid integer."),
    ("ask", {"image": "0.png", "question": "q", "max_tokens": 10**6}, "context window"),
    ("ask", {"image": "scene.tif", "question": "q", "reading": {"bands": [9]}}, "band"),
    ("ask", {"image": "scene.tif", "question": "q", "reading": {"colour": 1}}, "reading.colour: "),
    ("ask", {"image": "scene.tif", "question": "q", "window": [0, 0, 900, 9]}, "400"),
    ("ask", {"image": "apart.tif", "before": "earlier.tif", "question": "q"}, ": earlier.tif and apart.tif lie apart"),
    ("ask", {"image": "later.tif", "before": "../secret.png", "question": "q"}, "The image '../secret.png' is not read: "),
    ("ask", {"image": "later.tif", "before": "", "question": "q"}, "There is no image."),
    ("ask", {"image": "later.tif", "before": "earlier.tif", "question": "q", "max_tiles": 7}, "7 tiles of a prompt are shared"),
    ("ask", {"image": 3, "question": "q"}, "image: Input should be a valid string."),
    ("where", {"image": "0.png", "question": "q", "side": 5}, "side: Input should be greater than or equal to 16."),
    ("where", {"image": "0.png", "question": "q", "number": 0}, "number: Input should be greater than or equal to 1."),
    ("look", {"image": "0.png", "window": [0, 0, 9, 900]}, "is no part of the image of 90 x 120 pixels"),
    ("look", {"image": "scene.tif", "reading": {"bands": [9]}}, "scene.tif: "),
    ("look", {"image": "0.png", "window": [5, 5, 5, 9]}, "is no part of the image"),
    ("look", {"image": "0.png", "window": [0, 0, 9]}, "window: List should have at least 4 items"),
    ("plan", {"height": 0, "width": 9}, "height: Input should be greater than or equal to 1."),
    ("plan", {"height": 10**12, "width": 9}, "height: Input should be less than or equal to 1000000."),
    ("plan", {"height": 900, "width": 900, "budgets": "1KiB"}, "Not even budgets of"),
    ("plan", {"height": 900, "width": 900, "budgets": "many"}, "A limit is memory"),
    ("open", {"image": "none.png"}, "The image 'none.png' is not read: there is no such file"),
    ("open", {"image": "link.png"}, "The image 'link.png' is not read: there is no such file"),
    ("look", {"image": "../secret.png"}, "The image '../secret.png' is not read: there is no such file"),
    ("look", {"image": "/etc/passwd"}, "The image '/etc/passwd' is not read: there is no such file"),
    ("look", {"image": "file:///etc/passwd"}, "there is no such file"),
    ("open", {"image": "https://127.0.0.1/a.png"}, "its host has an address that is not public"),
    ("open", {"image": "data:image/png;base64,AAAA"}, "image"),
    ("open", {"image": " "}, "There is no image."),
    ("open", {"image": "."}, "The image '.' is not read: there is no such file"),
    ("where", {"image": "0.png", "question": "\ud800?"}, "Letter 1 of the text, '\\ud800', is half of one"),
    ("plan", {"height": 900, "width": 900, "budgets": "1" * 5000}, "Got '1111"),
    ("sing", {}, "There is no tool 'sing'. There are open, ask, objects, where, look, plan."),
])  # fmt: skip
def test_what_is_wrong_with_a_call_is_a_sentence(talk, tools, name, arguments, message):
    said = sentence(talk(lambda client: client.call_tool(name, arguments)))
    assert message in said and "\n" not in said and "Traceback" not in said and len(said) <= 1000
    assert str(tools.service.sources.folder) not in said


@pytest.mark.parametrize("values", [{"bands": [{}] * 9}, {"value_range": ["a"] * 9}])
def test_of_a_long_list_of_wrong_values_one_is_looked_at(values):
    with pytest.raises(ValidationError) as caught:
        mcp.Reading.model_validate(values)
    assert {part for error in caught.value.errors() for part in error["loc"] if isinstance(part, int)} == {0}


@pytest.mark.parametrize("place, error, told", [
    ("/data", "/data/a.tif: gone, not /database/b.tif and x/data", "a.tif: gone, not /database/b.tif and x/data"),
    ("/data", "[Errno 2] No such file: '/data/a.tif' in '/data'", "[Errno 2] No such file: 'a.tif' in '.'"),
    ("/", "/a.tif and https://b.org/c are gone", "/a.tif and https://b.org/c are gone"),
])  # fmt: skip
def test_errors_do_not_tell_where_the_folder_lies_whatever_step_raised_them(
    talk, tools, monkeypatch, place, error, told
):
    def gone(*args):
        raise OSError(error)

    monkeypatch.setattr(mcp_tools, "overview_jpeg", gone)
    picture = (
        "data:image/png;base64," + base64.b64encode((tools.service.sources.folder / "0.png").read_bytes()).decode()
    )
    monkeypatch.setattr(tools.service, "sources", replace(tools.service.sources, folder=Path(place)))
    assert sentence(talk(lambda client: client.call_tool("look", {"image": picture}))) == told


def test_a_raster_that_was_renamed_is_looked_at_where_it_lies_now(call, folder):
    arguments = {"question": QUESTION, "side": 64, "max_tiles": 8}
    shutil.copy(folder / "scene.tif", folder / "before.tif")
    found = call("where", image="before.tif", **arguments)
    (folder / "before.tif").rename(folder / "after.tif")
    assert call("where", image="after.tif", **arguments | {"question": QUESTION + " Now?"})["image_size"] == [400, 300]
    assert call("where", image="after.tif", **arguments) == found
    assert call("look", image="after.tif")["full_resolution"]


def test_more_calls_than_the_server_works_on_are_refused_and_those_that_ended_do_not_count(talk, tools, monkeypatch):
    size, plan, begun, go_on = {"height": 400, "width": 300}, tools._plan, [], threading.Event()

    def slowly(*args):
        begun.append(True)
        go_on.wait(20)
        return plan(*args)

    async def conversation(client):
        waiting = [asyncio.create_task(client.call_tool("plan", size)) for _ in range(2)]
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        refused = await client.call_tool("open", {"image": "scene.tif"})
        go_on.set()
        return refused, [*await asyncio.gather(*waiting), await client.call_tool("plan", size)]

    monkeypatch.setattr(tools.engine, "max_requests", 2)
    monkeypatch.setattr(tools, "_plan", slowly)
    refused, done = talk(conversation)
    assert sentence(refused) == "2 calls are being worked on, which is the most of this server. Try again."
    assert len({facts(one)["cost"]["flops"] for one in done}) == 1


def test_what_nobody_foresaw_is_a_sentence_too(talk, tools, monkeypatch):
    monkeypatch.setattr(tools, "_plan", lambda *args: 1 / 0)
    said = sentence(talk(lambda client: client.call_tool("plan", {"height": 9, "width": 9})))
    assert said == "The server failed; its log says why."


def test_ten_calls_at_once_are_right_and_an_image_is_encoded_once(talk, tools):
    questions = [
        {"image": f"{idx % 3}.png", "question": f"{QUESTION} Look {idx} times.", "max_tiles": 16, "max_tokens": 5}
        for idx in range(10)
    ]

    async def at_once(client):
        return await asyncio.gather(*(client.call_tool("ask", arguments) for arguments in questions))

    async def by_turns(client):
        return [await client.call_tool("ask", arguments) for arguments in questions]

    tools.front.cache.made.pop("image", None)
    together = [facts(result) for result in talk(at_once)]
    assert tools.front.cache.made.get("image", 0) <= 3
    assert together == [facts(result) for result in talk(by_turns)]


def test_progress_is_told_and_grows(talk, monkeypatch):
    monkeypatch.setattr(mcp, "TICK", 0.01)
    told = []

    async def tell(progress, total, message):
        told.append((progress, message))

    arguments = {"image": "1.png", "question": QUESTION + " And now?", **FEW}
    talk(lambda client: client.call_tool("ask", arguments, progress_callback=tell))
    assert [progress for progress, _ in told] == sorted({progress for progress, _ in told})
    messages = [message for _, message in told]
    assert {"encoding and choosing", "answering"} <= set(messages) and any(" s" in message for message in messages)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_cancelled_call_is_left_and_the_next_one_is_right(talk, tools, monkeypatch, mode):
    begun, go_on, ended = threading.Event(), threading.Event(), []
    select = tools.front.select

    def slowly(*args, **kwargs):
        begun.set()
        go_on.wait(20)
        try:
            return select(*args, **kwargs)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    async def conversation(client):
        monkeypatch.setattr(tools.front, "select", slowly)
        arguments = {"image": "2.png", "question": f"Is it {mode}?", **FEW}
        task = asyncio.create_task(client.call_tool("ask", arguments))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.list_tools()  # what was cancelled is known to the server by then
        await asyncio.sleep(0.2)
        go_on.set()
        monkeypatch.setattr(tools.front, "select", select)
        result = await client.call_tool("ask", {"image": "0.png", "question": "Is it?", **FEW})
        for _ in range(100):
            if ended:
                break
            await asyncio.sleep(0.1)
        return result

    assert facts(talk(conversation, mode=mode))["answer"] is not None
    assert ended == ["Abandoned"]  # nothing was computed for whoever went


@pytest.mark.slow
def test_the_pages_client_gets_the_same_over_stdio_and_nothing_else_is_on_the_wire(
    folder, call, tmp_path, monkeypatch, capsys
):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/agents.md").read_text(encoding="utf-8"), re.DOTALL)
    said = call("ask", image="scene.tif", question="How many objects are at the pier?")
    shutil.copy(folder / "scene.tif", tmp_path / "my_image.tif")
    monkeypatch.chdir(tmp_path)

    def started(command, args):
        assert command == "uhr-bat"
        line = " ".join(shlex.quote(part) for part in (sys.executable, "-m", "uhr_bat", *args))
        return StdioServerParameters(command="sh", args=["-c", f"{line} | tee wire"], env=dict(os.environ))

    exec(
        block.replace("from mcp import Client, StdioServerParameters", "from mcp import Client"),
        {"StdioServerParameters": started},
    )
    assert capsys.readouterr().out.strip() == said["answer"]
    lines = (tmp_path / "wire").read_text().splitlines()
    assert len(lines) >= 4 and all(json.loads(line)["jsonrpc"] == "2.0" for line in lines)


def test_a_line_that_is_no_message_is_answered_over_stdio_and_the_next_one_is_read(monkeypatch):
    told = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    begin = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": told}
    lines = ['{"jsonrpc": "2.0", "id": 7, "method', "", '{"id": 8}', "[]", json.dumps(begin)]
    wire = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(wire, write_through=True))
    ready = Kept(SimpleNamespace(engine=SimpleNamespace(max_requests=2)))
    mcp.make_server(ready).run("stdio")
    *errors, begun = map(json.loads, wire.getvalue().decode().splitlines())
    assert [(one["id"], one["error"]["code"]) for one in errors] == [(None, -32700), (None, -32600), (None, -32600)]
    assert "no JSON" in errors[0]["error"]["message"] and begun["id"] == 1 and begun["result"]["serverInfo"]


@pytest.mark.slow
def test_over_http_the_answer_is_the_same_by_both_protocols_for_whoever_has_the_key(folder, call, tools, monkeypatch):
    import httpx
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    said = call("ask", image="0.png", question=QUESTION, **FEW)
    monkeypatch.setattr(mcp, "make_tools", lambda args: tools)
    monkeypatch.setattr(tools.engine, "close", Kept(tools).close)
    app = mcp.build(mcp.parser().parse_args(["--name", "tiny", "--api-key", "secret"]))

    async def run(address, mode):
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer secret"}, timeout=120) as http:
            async with Client(streamable_http_client(address, http_client=http), mode=mode) as client:
                return await client.call_tool("ask", {"image": "0.png", "question": QUESTION, **FEW})

    with serve_app(app) as url:
        address = f"{url}/mcp"
        assert [facts(asyncio.run(run(address, mode))) for mode in ("auto", "legacy")] == [said, said]
        assert httpx.post(address, json={}).status_code == 401
        assert httpx.post(address, json={}, headers={"Host": "elsewhere.example"}).status_code == 403


def test_options_that_no_server_can_have_are_refused_before_a_model_is_loaded(capsys, tmp_path):
    assert mcp.main(["--allow-local-files", str(tmp_path / "none")]) == 2
    assert "there is no such folder to allow" in capsys.readouterr().err
    assert mcp.main([str(tmp_path)]) == 2
    assert "this is no model folder" in capsys.readouterr().err
