"""Objects of models of other families: random weights write no boxes, so the text alone is the makers' own example."""

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from images import random_image
from uhr_bat import ask, cli
from uhr_bat.common import asking

UTM = rasterio.CRS.from_epsg(32654)
ROTATED = rasterio.Affine(1.7320508075688772, 1.0, 375000.0, 1.0, -1.7320508075688772, 3908000.0)


@pytest.fixture
def says(monkeypatch):
    """Makes every answer a text."""
    return lambda text: monkeypatch.setattr(asking, "answer_texts", lambda processor, ids: [text] * len(ids))


@pytest.fixture
def scene(tmp_path):
    """A rotated raster of 100 x 200 px (height, width)."""
    path, pixels = tmp_path / "scene.tif", np.asarray(random_image(100, 200))
    profile = {"driver": "GTiff", "height": 100, "width": 200, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    with rasterio.open(path, "w", crs=UTM, transform=ROTATED, **profile) as raster:
        raster.write(pixels.transpose(2, 0, 1))
    return path


def run(*arguments) -> int:
    return cli.main([str(one) for one in arguments])


@pytest.mark.parametrize("family, text", [
    ("qwen3_vl", '```json\n[{"bbox_2d": [100, 300, 150, 500], "label": "ship"}]\n```'),
    # 8 tiles of 4 rows a side are 32 rows, of 8 px each: a picture of 256 px.
    ("qwen2_5_vl", '[{"bbox_2d": [25.6, 76.8, 38.4, 128], "label": "ship"}]'),
    ("gemma3", '[{"box_2d": [300, 100, 500, 150], "label": "ship"}]'),
    ("internvl", "<ref>ship</ref><box>[[100, 300, 150, 500]]</box>"),
])  # fmt: skip
def test_an_answer_has_its_objects_in_pixels_of_the_image(family, text, loaded, says, scene):
    processor, model = loaded(family)
    says(text)
    answer = ask(processor, model, str(scene), "Where is the ship?", budgets=8, max_tiles=2, max_new_tokens=1)
    (ship,) = answer.objects
    # A square of 200 px, with 50 px above the image.
    assert ship.label == "ship" and ship.box == pytest.approx((20, 10, 30, 50))
    assert (answer.text, answer.num_tokens, answer.image.width) == (text, 8, 200)


def test_pixels_of_a_picture_that_is_shown_as_several_are_refused(host_folder, says, scene, capsys, tmp_path):
    says('[{"bbox_2d": [25, 76, 38, 128], "label": "ship"}]')
    options = ["--model", host_folder("qwen2_5_vl"), "--set", "tile=32", "--set", "places=levels", "--budgets", "8"]
    assert run("ask", scene, "Where?", *options, "--objects", tmp_path / "a.csv", "--max-tiles", "2") == 0
    assert "its pixels are of one picture, but the model was shown several" in capsys.readouterr().out


def test_ask_writes_the_objects_on_the_ground_and_says_what_it_refused(host_folder, says, scene, tmp_path, capsys):
    says('[{"box_2d": [300, 100, 500, 150], "label": "ship"}, {"box_2d": [9, 9, 1, 1]}] as you can see')
    options = ["--model", host_folder("gemma3"), "--budgets", "8", "--max-tiles", "2", "--max-new-tokens", "1"]
    assert run("ask", scene, "Where?", *options, "--objects", tmp_path / "new" / "ships.geojson") == 0
    printed = capsys.readouterr().out
    assert "Objects: 1, " in printed and """'{"box_2d": [9, 9, 1, 1]}': x ends at 1 and begins at 9""" in printed
    ships = gpd.read_file(tmp_path / "new" / "ships.geojson").to_crs(UTM)
    corners = [ROTATED @ corner for corner in ((20, 10), (30, 10), (30, 50), (20, 50))]
    found = {tuple(np.round(corner, 3)) for corner in ships.geometry[0].exterior.coords}
    assert found == {tuple(np.round(corner, 3)) for corner in corners}
    assert json.loads((tmp_path / "new" / "ships.geojson").read_text())["question"] == "Where?"


def test_ask_refuses_a_file_of_objects_before_the_model(scene, tmp_path, capsys):
    for path, why in (("a.shp", "ends in .geojson or .json or .gpkg or .csv"), (scene, "ends in")):
        assert run("ask", scene, "Where?", "--objects", tmp_path / path) == 2
        assert why in capsys.readouterr().err
    copy = scene.rename(tmp_path / "scene.csv")
    assert run("ask", copy, "Where?", "--objects", copy) == 2
    assert "would write over a file that is read" in capsys.readouterr().err
