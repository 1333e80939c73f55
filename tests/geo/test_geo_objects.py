"""Objects as GIS software reads them: on the ground where the image shows them, however it lies."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from made_up import ROTATED
from rasterio.features import rasterize
from uhr_bat.common.objects import ImageObject, Objects, Refused
from uhr_bat.geo import Georeference, check_objects, objects_frame, write_objects

UTM = rasterio.CRS.from_epsg(32654)
LYING = {
    "north-up": Affine(2.0, 0, 375000, 0, -2.0, 3908000),
    "rotated": Affine(*ROTATED),
    "south-up": Affine(2.0, 0, 375000, 0, 2.0, 3908000),
    "mirrored": Affine(-2.0, 0.5, 375000, 0.25, 2.0, 3908000),
}
SHAPE = (60, 80)
FOUND = Objects(
    [
        ImageObject("ship", (10, 5, 30, 12), score=0.5, level=2, source="token"),
        ImageObject('Köln, "pier"', (0, 40, 80, 60), source="bbox_2d"),
        ImageObject("plane", point=(70.5, 20.5), source="point"),
    ],
    "three",
    [Refused("[9, 9]", "4 numbers make a box, and these are 2")],
)
ABOUT = {"image": "scene.tif", "question": "Where?", "answer": "three"}


def painted(shapes, transform):
    return (
        rasterize(list(shapes), SHAPE, transform=transform, dtype="uint8") if len(shapes) else np.zeros(SHAPE, "uint8")
    )


@pytest.mark.parametrize("name", LYING)
@pytest.mark.parametrize("ending", ["geojson", "gpkg", "csv"])
def test_objects_painted_back_cover_the_pixels_of_their_boxes(name, ending, tmp_path):
    transform = LYING[name]
    path = tmp_path / f"objects.{ending}"
    write_objects(FOUND, path, ABOUT, Georeference(transform, UTM))
    if ending == "csv":
        table = pd.read_csv(path)
        read = gpd.GeoDataFrame(table, geometry=gpd.GeoSeries.from_wkt(table["wkt"]), crs=UTM)
    else:
        read = gpd.read_file(path).to_crs(UTM)
    assert read["label"].tolist() == [one.label for one in FOUND]
    wanted = np.zeros(SHAPE, "uint8")
    wanted[5:12, 10:30], wanted[40:60, 0:80], wanted[20, 70] = 1, 2, 3
    shapes = [(shape, number) for number, shape in enumerate(read.geometry, 1)]
    np.testing.assert_array_equal(painted(shapes, transform), wanted)
    assert read.loc[0, ["left", "top", "right", "bottom"]].tolist() == [10, 5, 30, 12]
    assert (
        read.loc[0, ["score", "level"]].tolist() == [0.5, 2]
        and pd.isna(read.loc[1, "score"])
        and pd.isna(read.loc[1, "level"])
    )


def test_a_csv_has_degrees_of_the_middles(tmp_path):
    write_objects(FOUND, tmp_path / "a.csv", ABOUT, Georeference(LYING["rotated"], UTM))
    table = pd.read_csv(tmp_path / "a.csv")
    middle = gpd.GeoSeries(gpd.points_from_xy(*[[value] for value in LYING["rotated"] @ (20, 8.5)]), crs=UTM).to_crs(
        4326
    )[0]
    assert (table["longitude"][0], table["latitude"][0]) == pytest.approx((middle.x, middle.y), abs=1e-9)
    assert table["crs"][0] == "WGS 84 / UTM zone 54N"


def test_a_plain_image_has_pixels_and_says_so(tmp_path):
    write_objects(FOUND, tmp_path / "a.geojson", ABOUT)
    read = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))
    assert read["coordinate_space"].startswith("pixels of the image") and read["answer"] == "three"
    assert read["features"][2]["geometry"] == {"type": "Point", "coordinates": [70.5, 20.5]}
    assert read["refused"] == "'[9, 9]': 4 numbers make a box, and these are 2"


@pytest.mark.parametrize("ending", ["geojson", "gpkg", "csv"])
def test_no_objects_are_a_file_without_rows_that_says_what_the_answer_was(ending, tmp_path):
    path = tmp_path / f"none.{ending}"
    write_objects(Objects((), "two ships"), path, ABOUT, Georeference(LYING["rotated"], UTM))
    if ending == "csv":
        assert (
            path.read_text().startswith("label,score,level,source,left,top,right,bottom,wkt")
            and len(pd.read_csv(path)) == 0
        )
        return
    assert len(gpd.read_file(path)) == 0
    if ending == "geojson":
        assert json.loads(path.read_text())["empty"] == "The answer holds no box and no point: 'two ships'."


@pytest.mark.filterwarnings("error")
def test_points_beyond_the_antimeridian_come_back_within_a_turn(tmp_path):
    place = Georeference(Affine(0.5, 0, 170, 0, -0.5, 10), rasterio.CRS.from_epsg(4326))
    found = Objects([ImageObject("a", point=(30, 2)), ImageObject("b", (20, 0, 24, 2))])
    write_objects(found, tmp_path / "a.geojson", ABOUT, place)
    assert gpd.read_file(tmp_path / "a.geojson").geometry[0].coords[0] == (-175, 9)
    write_objects(found, tmp_path / "a.csv", ABOUT, place)
    assert pd.read_csv(tmp_path / "a.csv")[["longitude", "latitude"]].values.tolist() == [[-175, 9], [-179, 9.5]]


@pytest.mark.parametrize("label", ['=HYPERLINK("https://a.example")', "+1", "-1+2", "@SUM(A1)"])
def test_a_label_is_no_formula_in_a_spreadsheet(label, tmp_path):
    found = Objects([ImageObject(label, point=(1, 2)), ImageObject("a=b-c", point=(1, 2))])
    write_objects(found, tmp_path / "a.csv", ABOUT)
    assert pd.read_csv(tmp_path / "a.csv")["label"].tolist() == [f"'{label}", "a=b-c"]
    write_objects(found, tmp_path / "a.geojson", ABOUT)
    assert gpd.read_file(tmp_path / "a.geojson")["label"][0] == label


def test_a_layer_of_another_kind_stays(tmp_path):
    gpd.GeoDataFrame({"name": ["mine"]}, geometry=gpd.points_from_xy([0], [0])).to_file(
        tmp_path / "a.gpkg", layer="objects"
    )
    with pytest.raises(ValueError, match="a layer objects of other columns, which stays"):
        check_objects(tmp_path / "a.gpkg", Georeference())
    other = tmp_path / "b.gpkg"
    write_objects(FOUND, other, ABOUT)
    write_objects(Objects(FOUND[:1]), other, ABOUT)  # one of ours is replaced
    assert len(gpd.read_file(other, layer="objects")) == 1


def test_a_frame_of_boxes_in_pixels_has_rings_that_are_counterclockwise():
    frame = objects_frame(FOUND)
    assert frame.geometry[0].exterior.is_ccw and frame.geometry[0].bounds == (10, 5, 30, 12)
