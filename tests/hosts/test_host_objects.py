"""Objects of models of other families: random weights write no boxes, so the text alone is the makers' own example."""

import json
import re

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from images import random_image
from rasterio.features import rasterize
from uhr_bat import ask, cli
from uhr_bat.common import asking
from uhr_bat.common.loading import ROOT
from uhr_bat.geo import detect
from uhr_bat.pipeline_uhr_bat import UHRBatPipeline
from uhr_bat.serving import batch

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


def test_a_pipeline_has_the_objects_of_a_model_in_memory_and_the_same_answer_without(loaded, says, scene, caplog):
    processor, model = loaded("qwen3_vl")
    pipe = UHRBatPipeline(model=model, processor=processor)
    assert "is not supported" not in caplog.text
    chat = [{"role": "user", "content": [{"type": "image", "path": str(scene)}, {"type": "text", "text": "Where is it?"}]}]
    options = {"max_new_tokens": 4, "processor_kwargs": {"budgets": 8, "max_tiles": 2}, "return_full_text": False}
    (plain,), (found,) = (pipe(text=chat, objects=objects, **options) for objects in (False, True))
    assert found["generated_text"] == plain["generated_text"] and found["objects"]["objects"] == []
    says('[{"bbox_2d": [100, 300, 150, 500], "label": "ship"}]')
    (ship,) = pipe(text=chat, objects=True, **options)[0]["objects"]["objects"]
    assert ship["label"] == "ship" and ship["box"] == pytest.approx((20, 10, 30, 50))


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


def test_the_pages_code_runs_as_it_stands(host_folder, says, scene, tmp_path, monkeypatch, capsys):
    says('[{"bbox_2d": [100, 300, 150, 500], "label": "ship"}]')
    monkeypatch.setattr(asking, "generate", lambda *args, **kwargs: torch.zeros(1, 1, dtype=torch.long))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/objects.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block.replace("Qwen/Qwen3-VL-8B-Instruct", str(host_folder("qwen3_vl"))), "objects.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ship (20.0, 10.0, 30.0, 50.0) None None\n")
    assert len(gpd.read_file("ships.geojson")) == 1


@pytest.mark.slow
def test_tree_bench_compares_boxes_in_pixels_whatever_the_familys_unit(host_folder, says, tmp_path):
    random_image(100, 200).save(tmp_path / "a.png")
    record = {"index": 1, "image": "a.png", "question": "Which?", "options": ["A. red", "B. blue"], "answer": "B"}
    record |= {"category": "Perception", "bboxes": [[20, 10, 30, 50]]}
    (tmp_path / "TreeBench.jsonl").write_text(json.dumps(record) + "\n")
    says('{"bbox_2d": [100, 300, 150, 500], "label": "ship"} B')
    options = ["--model", host_folder("qwen3_vl"), "--set", "tile=32", "--set", "levels=2", "--max-new-tokens", "1"]
    run_folder = tmp_path / "run"
    assert run("evaluate", "tree-bench", "--data", tmp_path, "--output", run_folder, "--budgets", "8", *options) == 0
    figures = json.loads((run_folder / "figures.json").read_text())
    found = {row["scorer"]: row["micro"][0] for row in figures["scores"] if row["view"] == "image"}
    assert found["tree-bench/mean-iou-3"] == pytest.approx(1) and found["tree-bench/mean-iou-2"] == 0
    assert found["tree-bench/letter-2"] == 1


# ---- detect ----------------------------------------------------------------------------------------------------------

RED = (255, 0, 0)
# (left, top, right, bottom): inside a window, over borders of several, longer than any window of 32 px, two side by side.
THINGS = [
    (5, 4, 12, 9),
    (20, 20, 40, 36),
    (60, 50, 150, 57),
    (100, 80, 110, 84),
    (112, 80, 122, 84),
    (190, 90, 200, 100),
]


@pytest.fixture
def painted(tmp_path):
    """name of a lie -> a raster of 100 x 200 px with red things on grey."""

    def paint(transform, name="painted.tif"):
        pixels = np.full((3, 100, 200), 90, np.uint8)
        for left, top, right, bottom in THINGS:
            pixels[:, top:bottom, left:right] = np.array(RED)[:, None, None]
        profile = {"driver": "GTiff", "height": 100, "width": 200, "count": 3, "dtype": "uint8", "photometric": "rgb"}
        with rasterio.open(tmp_path / name, "w", crs=UTM, transform=transform, **profile) as raster:
            raster.write(pixels)
        return tmp_path / name

    return paint


@pytest.fixture
def sees_red(monkeypatch):
    """A model whose answer names the red things that its window shows, as Qwen3-VL writes them; the windows that it saw."""
    seen = []
    cut = detect.resize_image

    def look(image, size, box):
        seen.append(box)
        return cut(image, size, box)

    def say(processor, ids):
        top, left, bottom, right = seen[-1]
        side = max(bottom - top, right - left)
        found = []
        for x0, y0, x1, y1 in THINGS:
            edges = [max(x0, left) - left, max(y0, top) - top, min(x1, right) - left, min(y1, bottom) - top]
            if edges[0] < edges[2] and edges[1] < edges[3]:
                found.append({"bbox_2d": [1000 * edge / side for edge in edges], "label": "barge"})
        return [f"```json\n{json.dumps(found)}\n```" if found else "There are no barges."]

    monkeypatch.setattr(detect, "resize_image", look)
    monkeypatch.setattr(asking, "answer_texts", say)
    return seen


@pytest.fixture
def options(host_folder):
    return ["--model", host_folder("qwen3_vl"), "--set", "tile=32", "--max-new-tokens", "1", "--max-tiles", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("name, transform", [
    ("rotated", ROTATED), ("south-up", rasterio.Affine(2.0, 0, 375000, 0, 2.0, 3908000)),
])  # fmt: skip
def test_all_things_are_found_once_and_lie_where_the_raster_shows_them(
    name, transform, painted, sees_red, options, tmp_path, capsys
):
    path, output = painted(transform), tmp_path / "out" / "barges.geojson"
    assert run("detect", path, "barges", "--output", output, "--everywhere", *options) == 0
    assert len(sees_red) == 32 and "6 objects in 32 of 32 windows of 32 px" in capsys.readouterr().out
    found = gpd.read_file(output).to_crs(UTM)
    boxes = sorted(
        tuple(round(edge, 6) for edge in row) for row in found[["left", "top", "right", "bottom"]].to_numpy()
    )
    assert boxes == sorted(THINGS) and set(found["label"]) == {"barge"}
    with rasterio.open(path) as raster:
        red = raster.read(1) == 255
        np.testing.assert_array_equal(rasterize(list(found.geometry), red.shape, transform=transform) == 1, red)
    assert [one.name for one in output.parent.iterdir()] == ["barges.geojson"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_is_refused_with_other_settings(
    painted, sees_red, options, tmp_path, monkeypatch, capsys
):
    path, output = painted(ROTATED), tmp_path / "barges.gpkg"
    generate = asking.generate

    def stops(*args, **kwargs):
        if len(sees_red) == 9:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(asking, "generate", stops)
    arguments = ["detect", path, "barges", "--output", output, "--everywhere", *options]
    assert run(*arguments) == 130 and not output.exists()
    assert run(*arguments[:2], "ships", *arguments[3:]) == 2
    assert "holds a run with things 'barges', but 'ships' is asked for" in capsys.readouterr().err
    with open(detect.lines_path(output), "a", encoding="utf-8") as lines:
        lines.write('{"window": [0, 0')  # killed while it wrote
    assert run(*arguments) == 0
    assert len(sees_red) == 9 + 32 - 8 and len(gpd.read_file(output)) == 6
    assert not detect.lines_path(output).exists()


@pytest.mark.slow
def test_the_windows_that_are_asked_are_those_where_the_question_looks(painted, sees_red, options, tmp_path, capsys):
    path = painted(ROTATED)
    arguments = ["detect", path, "barges", "--output", tmp_path / "a.csv", "--max-windows", "3", *options]
    assert run(*arguments) == 0
    assert len(sees_red) == 3 and "in 3 of 32 windows" in capsys.readouterr().out
    asked = [tuple(window) for window in sees_red]
    sees_red.clear()
    assert run(*arguments[:-4], "--everywhere", *arguments[-4:]) == 0
    assert len(set(asked)) == 3 and set(asked) <= set(sees_red) and asked != sees_red[:3]


@pytest.mark.slow
def test_nothing_found_is_a_file_without_rows_that_says_what_was_answered(painted, says, options, tmp_path, capsys):
    says("There are no barges.")
    output = tmp_path / "none.geojson"
    assert run("detect", painted(ROTATED), "barges", "--output", output, "--max-windows", "2", *options) == 0
    assert "The answer holds no box and no point: 'There are no barges.'" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["features"] == [] and "There are no barges." in written["empty"]


def test_what_cannot_be_detected_is_refused_before_the_weights(painted, host_folder, tmp_path, capsys, monkeypatch):
    path, output = painted(ROTATED), tmp_path / "a.geojson"
    monkeypatch.delattr(detect, "load_model")
    for model, why in (
        (["--model", host_folder("llava")], "how models of the type 'llava' write boxes is not known"),
        ([], "it answers in words, and what it points to it has from a question about the whole image (`ask --objects`). Ask one of these families: qwen3_vl,"),
        (["--max-windows", "0"], "--max-windows must be at least 1. Got 0"),
        (["--output", path.with_name("painted.csv")], "would write over a file that is read"),
    ):
        image = path
        if model[:1] == ["--output"]:
            image = path.rename(path.with_name("painted.csv"))
        assert run("detect", image, "ships", "--output", output, *model) == 2
        assert why in capsys.readouterr().err


@pytest.fixture
def batch_of(host_folder, says, scene, tmp_path, monkeypatch):
    """Asks `uhr-bat batch` about the rotated raster, a raster elsewhere and a plain picture, without Ray; (its exit code, the
    file of objects)."""
    random_image(200, 200).save(tmp_path / "plain.png")
    pixels = np.asarray(random_image(50, 50)).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "height": 50, "width": 50, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    with rasterio.open(tmp_path / "other.tif", "w", crs="EPSG:32632", transform=ROTATED, **profile) as raster:
        raster.write(pixels)
    (tmp_path / "questions.txt").write_text("Where is the ship?\nWhere?\n")

    def ask_here(work, settings, batch_size, **options):
        worker = batch.Worker(settings, batch_size, None)
        for image, questions in work:
            rows = [
                dict.fromkeys(batch.COLUMNS) | {"image": image.source, "item": "", "question": one} for one in questions
            ]
            try:
                worker.answer_all(image.source, rows)
            except OSError as error:
                rows = [row | {"error": str(error)} for row in rows]
            yield from rows

    monkeypatch.setattr(batch, "ask", ask_here)
    monkeypatch.setattr(batch, "require", lambda *names: None)

    def go(names, objects, text='[{"bbox_2d": [100, 300, 150, 500], "label": "=ship"}]', output="rows.csv"):
        says(text)
        (tmp_path / "images.txt").write_text("\n".join(names))
        options = ["--images", tmp_path / "images.txt", "--questions", tmp_path / "questions.txt", "--budgets", "8"]
        options += ["--model", host_folder("qwen3_vl"), "--max-tiles", "2", "--max-new-tokens", "1"]
        code = run("batch", *options, "--output", tmp_path / output, "--objects", tmp_path / objects)
        return code, tmp_path / objects

    return go


@pytest.mark.slow
def test_a_batch_joins_the_objects_of_all_answers_to_their_images_and_questions(batch_of, scene, tmp_path, capsys):
    code, path = batch_of([scene.name, "other.tif", "plain.png", "gone.tif"], "all.geojson")
    assert code == 1 and f"6 objects: {path}" in capsys.readouterr().out  # one image is gone
    ships = gpd.read_file(path)
    names = [tmp_path / name for name in ("scene.tif", "other.tif", "plain.png")]
    assert ships["image"].tolist() == [str(name) for name in names for _ in range(2)]
    assert ships["question"].tolist() == ["Where is the ship?", "Where?"] * 3
    assert ships["label"].tolist() == ["=ship"] * 6 and "bbox_2d" in str(ships["answer"][0])
    assert ships.loc[0, ["left", "top", "right", "bottom"]].tolist() == [20, 10, 30, 50]
    corners = {tuple(np.round(ROTATED @ corner, 3)) for corner in ((20, 10), (30, 10), (30, 50), (20, 50))}
    assert {tuple(np.round(one, 3)) for one in ships.to_crs(UTM).geometry[0].exterior.coords} == corners
    assert abs(ships.geometry[2].centroid.x - 9) < 3  # degrees east: another zone
    assert ships.geometry[4] is None or ships.geometry[4].is_empty  # a picture has no place
    # What was answered is not asked again, and its objects go on from the rows.
    assert batch_of([scene.name, "other.tif", "plain.png", "gone.tif"], "all.csv", text="nothing")[0] == 1
    table = pd.read_csv(tmp_path / "all.csv")
    assert table["label"].tolist() == ["'=ship"] * 6 and table["left"].tolist() == [20, 20, 5, 5, 20, 20]
    assert table["crs"].fillna("").tolist()[::2] == ["WGS 84 / UTM zone 54N", "WGS 84 / UTM zone 32N", ""]
    assert table["longitude"].notna().tolist() == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_a_batch_of_images_of_one_crs_keeps_it_in_a_geopackage_and_pixels_where_there_is_none(
    batch_of, scene, tmp_path
):
    assert batch_of([scene.name], "one.gpkg")[0] == 0
    ships = gpd.read_file(tmp_path / "one.gpkg", layer="objects")
    assert ships.crs == UTM and ships["question"].tolist() == ["Where is the ship?", "Where?"]
    assert batch_of(["plain.png"], "plain.geojson", output="plain.csv")[0] == 0
    written = json.loads((tmp_path / "plain.geojson").read_text())
    assert (
        written["features"][0]["geometry"]["coordinates"][0][0] == [20, 60] and "pixels" in written["coordinate_space"]
    )
    assert batch_of(["plain.png"], "none.geojson", text="nothing there", output="none.csv")[0] == 0
    written = json.loads((tmp_path / "none.geojson").read_text())
    assert written["features"] == [] and "nothing there" in written["empty"]
