"""The page's parts without a browser: what users may name, what is said to them, what the map is served."""

import pytest
from images import random_image, raises
from starlette.applications import Starlette
from starlette.testclient import TestClient
from uhr_bat.serving import demo
from uhr_bat.serving.refusals import Refusal
from uhr_bat.serving.showing import Gone
from uhr_bat.serving.sources import SourceRules


def test_options_of_a_raster_are_read_as_they_are_typed():
    typed = {"bands": " 4,3,2 ", "value_range": "0,2047", "window": None}
    assert demo.read_options(**typed) == {"bands": [4, 3, 2], "value_range": [0.0, 2047.0]}
    assert demo.read_options(window="0,0,512,512", bands="red,nir,blue") == {
        "window": [0, 0, 512, 512], "bands": ["red", "nir", "blue"],
    }  # fmt: skip
    with raises(ValueError, "Value range is written as 0,2047, dtype or percentile. Got '0,1,2'."):
        demo.read_options(value_range="0,1,2")


@pytest.mark.parametrize("typed, given", [(None, "nothing"), ("", "nothing"), (99999, "99999"), (0, "0"), ([], "[]")])
def test_a_budget_that_is_none_is_said(typed, given):
    with raises(ValueError, f"The budget is a number of visual tokens from 1 to 2,944. Got {given}."):
        demo.read_budget(typed, 2944)
    assert demo.read_budget(146.0, 2944) == 146


def test_whoever_sits_at_this_machine_opens_its_files_and_addresses(tmp_path):
    path = tmp_path / "a.png"
    random_image(8, 8).save(path)
    one, other = demo.name_image(f" {path} ", None), demo.receive_image(str(path), None)
    assert (one.name, one.content, one.digest) == ("a.png", str(path), other.digest)
    twice = [demo.name_image("https://host/deep/c.tif?key=1", None) for _ in range(2)]
    assert twice[0].name == "c.tif" and twice[0].digest != twice[1].digest  # what is there may have changed
    with raises(FileNotFoundError, f"{tmp_path / 'b.png'}: there is no such image file."):
        demo.name_image(str(tmp_path / "b.png"), None)
    with raises(ValueError, "There is no path or address."):
        demo.name_image("  ", None)


def test_strangers_open_what_they_drop_and_what_lies_below_the_allowed_folder_alone(tmp_path):
    allowed, dropped = tmp_path / "allowed", tmp_path / "dropped"
    for folder in (allowed, dropped):
        folder.mkdir()
        random_image(8, 8).save(folder / "a.png")
    rules = SourceRules(2**20, allowed)
    assert demo.name_image(str(allowed / "a.png"), rules).name == "a.png"
    for text in (
        str(dropped / "a.png"),
        "/etc/passwd",
        "http://127.0.0.1/a.png",
        "/vsicurl/https://host/a.tif",
        "a.png",
    ):
        with pytest.raises(Refusal):
            demo.name_image(text, rules)
    source = demo.receive_image(str(dropped / "a.png"), rules)
    assert source.content == (dropped / "a.png").read_bytes()  # in memory: nothing that it names is opened
    with pytest.raises(Refusal):
        demo.receive_image(str(dropped / "a.png"), SourceRules(10))


def test_what_was_typed_is_shown_as_it_is():
    assert demo.tell_error(ValueError("<b>")) == '<p role="alert" class="error">&lt;b&gt;</p>'
    assert demo.tell("a & b") == '<p role="status">a &amp; b</p>'


class MadeUpDesk:
    def __init__(self):
        self.asked = []

    def known(self, name):
        if name != "a-1":
            raise Gone(f"no {name}")
        return f"content of {name}".encode()

    overview = geojson = kept_png = objects_geojson = known

    def page(self, name, address):
        return self.known(name).decode() + address

    def detail(self, name, box, side):
        self.asked.append((box, side))
        return self.known(name)


def test_the_map_its_pictures_and_the_files_are_served_by_name():
    desk = MadeUpDesk()
    client = TestClient(Starlette(routes=demo.routes(desk)))
    kinds = {"/overview.jpg": "image/jpeg", "/kept.geojson": "application/geo+json", "/kept.png": "image/png"}
    kinds["/objects.geojson"] = "application/geo+json"
    for path, kind in kinds.items():
        answer = client.get(f"/shown/a-1{path}")
        assert (answer.content, answer.headers["content-type"]) == (b"content of a-1", kind)
        assert answer.headers["cache-control"].startswith("private")
        gone = client.get(f"/shown/b{path}")
        assert (gone.status_code, gone.text) == (404, "no b")
    assert client.get("/shown/a-1.html").text == "content of a-1{}"
    assert client.get("/shown/a-1/detail.jpg?box=1,2,3,4&side=50").status_code == 200
    assert desk.asked == [((1, 2, 3, 4), 50)]
    for query in ("", "?box=1,2,3&side=5", "?box=a,b,c,d&side=5", "?box=1,2,3,4"):
        assert client.get(f"/shown/a-1/detail.jpg{query}").status_code == 400
