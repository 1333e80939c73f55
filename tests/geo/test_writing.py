"""GeoJSON, GeoPackage and GeoTIFF of what was kept, as rasterio and geopandas read them."""

import json
import sqlite3
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from made_up import ABOUT, GRIDS, ROTATED, SCALES, compression
from PIL import Image, ImageOps
from pyproj import Transformer
from uhr_bat.geo import Georeference, evidence_frame, read_georeference, write_raster, write_vectors
from uhr_bat.geo.degrees import in_degrees
from uhr_bat.geo.styles import style_path, write_style
from uhr_bat.geo.writing import RASTER_SIDE
from uhr_bat.geometry_uhr_bat import pixel_tokens, token_corners

SIZE = (45, 70)
# A harbour in Japan in metres, in degrees, and on the map of the Web.
PLACES = {
    "UTM": ("EPSG:32654", (2.4, 0, 375141.6, 0, -2.4, 3908606.4)),
    "UTM, turned": ("EPSG:32654", ROTATED),
    "degrees": ("EPSG:4326", (2e-5, 0, 139.63, 0, -2e-5, 35.31)),
    "degrees, latitude first": ("EPSG:6668", (2e-5, 0, 139.63, 0, -2e-5, 35.31)),
    "Web Mercator": ("EPSG:3857", (3, 0, 15543000, 0, -3, 4204000)),
    "south": ("EPSG:32756", (10, 0, 334000, 0, -10, 6252000)),
}


def vectors(tmp_path, name, transform=None, crs=None, slots=None, regions=None, words=""):
    """The frame, and the file of it."""
    frame = evidence_frame(compression(SIZE, slots, regions), SIZE, SCALES, transform=transform, crs=crs)
    write_vectors(frame, tmp_path / name, ABOUT, words)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    return frame, tmp_path / name


@pytest.mark.parametrize("place", PLACES)
def test_a_geojson_has_the_corners_of_tokens_in_longitude_and_latitude(tmp_path, place):
    crs, transform = PLACES[place]
    _, path = vectors(tmp_path, "kept.geojson", transform, crs)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert "crs" not in content and {name: content[name] for name in ABOUT} == ABOUT
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    features = iter(content["features"])
    for scale, grid, slots in zip(SCALES, GRIDS, compression(SIZE).slots[0]):
        for slot, position in enumerate(np.flatnonzero(slots >= 0)):
            feature = next(features)
            assert (feature["properties"]["scale"], feature["properties"]["slot"]) == (scale, slot)
            assert feature["geometry"]["type"] == "Polygon"
            (ring,) = feature["geometry"]["coordinates"]
            corners = np.stack(to_degrees.transform(*token_corners(position, SIZE, grid, transform).T), axis=-1)
            assert ring[0] == ring[-1] and shapely.LinearRing(ring).is_ccw
            # To 2e-9 degrees, less than a millimetre: the corners, in whatever order.
            gaps = np.abs(np.array(ring)[:-1, None] - corners).max(-1)
            assert gaps.min(0).max() < 2e-9 and gaps.min(1).max() < 2e-9
    assert next(features, None) is None


def test_a_geojson_is_read_as_wgs_84_with_its_columns(tmp_path):
    crs, transform = PLACES["UTM"]
    slots = [[0, 0, 1, -1], [-1] * 16, [-1] * 36]
    frame, path = vectors(tmp_path, "kept.json", transform, crs, slots, [[2, 2, 5, 5], [-1] * 16, [-1] * 36])
    read = gpd.read_file(path)
    assert read.crs.to_epsg() == 4326
    columns = ["scale", "slot", "kind", "tokens", "region", "score", "rank"]
    assert read[columns].values.tolist() == frame[columns].values.tolist()
    assert read.geom_type.tolist() == ["MultiPolygon", "Polygon"]
    assert read.to_crs(crs).area.tolist() == pytest.approx(frame.area.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    "crs, transform",
    [("EPSG:32601", (100, 0, 262000, 0, -100, 5002000)), ("EPSG:4326", (0.001, 0, 179.97, 0, -0.001, 10))],
)
def test_tokens_across_the_antimeridian_are_cut_there(tmp_path, crs, transform):
    frame, path = vectors(tmp_path, "kept.geojson", transform, crs)
    read = gpd.read_file(path)
    west, _, east, _ = read.bounds.T.to_numpy()
    assert west.min() == -180 and east.max() == 180
    across = (west == -180) & (east == 180)
    assert across.any() and (read.geom_type[across] == "MultiPolygon").all()
    parts = read.explode(ignore_index=True)
    assert (parts.bounds.maxx - parts.bounds.minx).max() < 1
    assert shapely.area(parts.to_crs(crs).geometry).sum() == pytest.approx(shapely.area(frame.geometry).sum(), rel=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_a_geopackage_keeps_the_crs_and_the_numbers(tmp_path, place):
    crs, transform = PLACES[place]
    slots, regions = [[0, 0, 1, 2], [-1] * 16, range(36)], [[0, 0, 1, 1], [-1] * 16, range(36)]
    frame, path = vectors(tmp_path, "kept.gpkg", transform, crs, slots, regions)
    read = gpd.read_file(path)
    assert read.crs == frame.crs and pyogrio.read_info(path)["geometry_type"] == "MultiPolygon"
    for ours, theirs in zip(frame.geometry, read.geometry):
        assert shapely.get_parts(ours).tolist() == shapely.get_parts(theirs).tolist()
    assert pyogrio.read_info(path)["dataset_metadata"] == ABOUT


@pytest.mark.parametrize("transform", [None, (2, 0, 10, 0, -2, 20)])
@pytest.mark.parametrize("name", ["kept.geojson", "kept.gpkg"])
def test_coordinates_without_a_crs_stay_as_they_are_and_say_so(tmp_path, name, transform):
    words = Georeference(transform).words
    assert ("pixels" in words) == (transform is None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame, path = vectors(tmp_path, name, transform, words=words)
    if name.endswith("gpkg"):
        about = pyogrio.read_info(path)["dataset_metadata"]
    else:
        about = json.loads(path.read_text(encoding="utf-8"))
        assert "crs" not in about
    assert about["coordinate_space"] == words
    np.testing.assert_allclose(gpd.read_file(path).total_bounds, frame.total_bounds, atol=1e-9)


def test_a_crs_without_longitude_and_latitude_is_refused_and_nothing_is_left(tmp_path):
    frame = evidence_frame(compression(SIZE), SIZE, SCALES, transform=ROTATED, crs='LOCAL_CS["site",UNIT["metre",1]]')
    with pytest.raises(
        ValueError, match="CRS, site, leads to no longitude and latitude. Write a .gpkg, which keeps the CRS."
    ):
        write_vectors(frame, tmp_path / "kept.geojson", ABOUT)
    assert not list(tmp_path.iterdir())
    write_vectors(frame, tmp_path / "kept.gpkg", ABOUT)
    assert gpd.read_file(tmp_path / "kept.gpkg").crs.name == "site"


def test_another_ending_is_refused(tmp_path):
    frame = evidence_frame(compression(SIZE), SIZE, SCALES)
    with pytest.raises(ValueError, match=r"kept.shp: polygons are written as .geojson, .json or .gpkg"):
        write_vectors(frame, tmp_path / "kept.shp", ABOUT)


# The raster


def raster_of(tmp_path, size, georeference, **kwargs):
    result = compression(size, **kwargs)
    write_raster(tmp_path / "attention.tif", result, size, SCALES, ABOUT, georeference)
    return result, tmp_path / "attention.tif"


@pytest.mark.parametrize("place", PLACES)
def test_the_raster_has_the_grid_of_the_image_and_in_every_pixel_its_token(tmp_path, place):
    crs, transform = PLACES[place]
    crs, transform = rasterio.CRS.from_user_input(crs), Affine(*transform)
    # As an image that is not read whole says it: the scale in the middle spends nothing.
    result, path = raster_of(tmp_path, SIZE, Georeference(transform, crs), regions=[range(4), [-1] * 16, range(36)])
    with rasterio.open(path) as raster:
        assert (raster.height, raster.width, raster.count) == (*SIZE, 3)
        assert raster.crs == crs and raster.transform.almost_equals(transform, 1e-12)
        assert set(raster.dtypes) == {"float32"} and np.isnan(raster.nodata)
        assert raster.profile["tiled"] and raster.profile["compress"] == "deflate"
        assert ABOUT.items() <= raster.tags().items()
        assert raster.descriptions[2] == "importance at scale 24 px, 6 x 6 tokens"
        for band, importance in zip(raster.read(), result.importance[0]):
            np.testing.assert_array_equal(band, importance.numpy().ravel()[pixel_tokens(SIZE, importance.shape)])


def test_what_no_token_shows_has_no_data(tmp_path):
    # The first row of the anchor's tokens has no valid pixels.
    result = compression(SIZE, regions=[[-1, -1, 0, 1], range(16), range(36)])
    result.importance[0][0][0] = 0
    write_raster(tmp_path / "attention.tif", result, SIZE, SCALES, ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "attention.tif") as raster:
            hidden = raster.read_masks(1) == 0
            # 45 rows in a square of 70: the upper half of it ends at row 35 - 12.
            assert hidden[:23].all() and not hidden[23:].any() and raster.read_masks(3).all()
            assert raster.crs is None


@pytest.mark.parametrize("size", [(30_000, 21_001), (2_049, 9_001)])
def test_the_raster_of_a_large_image_is_coarser_and_of_its_extent(tmp_path, size):
    transform = Affine(*PLACES["UTM"][1])
    result, path = raster_of(tmp_path, size, Georeference(transform, rasterio.CRS.from_epsg(32654)))
    with rasterio.open(path) as raster:
        assert RASTER_SIDE / 2 < max(raster.shape) <= RASTER_SIDE
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            at = raster.transform @ (corner[0] * raster.width, corner[1] * raster.height)
            assert at == pytest.approx(transform @ (corner[0] * size[1], corner[1] * size[0]), abs=1e-6)
        # A place on the ground has the importance of the token whose polygon it lies in.
        frame = evidence_frame(result, size, SCALES, transform=transform)
        places = frame.representative_point()
        for score, scale, values in zip(frame["score"], frame["scale"], raster.sample(zip(places.x, places.y))):
            assert values[SCALES.index(scale)] == np.float32(score)


# The coordinates of an image


def test_a_raster_states_its_coordinates_and_a_plain_image_has_none(tmp_path):
    profile = {"driver": "GTiff", "height": 4, "width": 5, "count": 1, "dtype": "uint8"}
    crs, transform = rasterio.CRS.from_epsg(32654), Affine(*ROTATED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rasterio.open(tmp_path / "a.tif", "w", crs=crs, transform=transform, **profile):
            pass
        assert read_georeference(tmp_path / "a.tif") == (transform, crs)
        with rasterio.open(tmp_path / "b.tif", "w", transform=transform, **profile):
            pass
        assert read_georeference(tmp_path / "b.tif") == (transform, None)
        (tmp_path / "c.bin").write_bytes(b"no raster")
        assert read_georeference(tmp_path / "c.bin") == (None, None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_exif_turns_lies_where_its_stored_pixels_do(tmp_path, orientation):
    # The grey of a pixel says which stored one it is.
    stored, exif = np.arange(12, dtype=np.uint8).reshape(3, 4), Image.Exif()
    exif[274] = orientation
    for name in ("a.jpg", "a.png"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif)
    for name in ("a.jpg", "a.png"):
        (tmp_path / "a.wld").write_text("2\n0\n0\n-2\n101\n199\n")
        with Image.open(tmp_path / name) as image:
            upright = ImageOps.exif_transpose(image).size
        transform = read_georeference(tmp_path / name).transform
        with Image.open(tmp_path / "a.png") as image:
            shown = np.asarray(ImageOps.exif_transpose(image))
        assert upright == shown.shape[::-1]
        for (row, column), value in np.ndenumerate(shown):
            place = 100 + 2 * (value % 4 + 0.5), 200 - 2 * (value // 4 + 0.5)
            assert transform @ (column + 0.5, row + 0.5) == pytest.approx(place)
    (tmp_path / "a.wld").unlink()
    assert read_georeference(tmp_path / "a.jpg") == (None, None)


# Layers of a GeoPackage


@pytest.fixture
def package(tmp_path):
    """Somebody's GeoPackage, with a layer and a table of its own."""
    path = tmp_path / "site.GPKG"
    gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:32654").to_file(path, layer="parcels")
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE notes (text)")
        file.execute("INSERT INTO notes VALUES ('keep')")
    return path


def test_a_geopackage_keeps_its_other_layers_and_replaces_its_own(package):
    frame = evidence_frame(compression(SIZE), SIZE, SCALES, transform=ROTATED, crs="EPSG:32654")
    for layer, question in (("evidence", "first"), ("evidence", "again"), ("second", "other")):
        write_vectors(frame, package, {"question": question}, layer=layer)
    assert sorted(pyogrio.list_layers(package)[:, 0]) == ["evidence", "notes", "parcels", "second"]
    assert gpd.read_file(package, layer="parcels")["a"].tolist() == [1]
    for layer, question in (("evidence", "again"), ("second", "other")):
        assert len(gpd.read_file(package, layer=layer)) == len(frame)
        assert pyogrio.read_info(package, layer=layer)["layer_metadata"] == {"question": question}
    with closing(sqlite3.connect(package)) as file:
        assert file.execute("SELECT text FROM notes").fetchall() == [("keep",)]


@pytest.mark.parametrize("layer, why", [("Parcels", "layer parcels of other columns, which stays"),
                                        ("notes", "layer notes of other columns"), ("gpkg_a", "can be called"), ("", "can be called")])  # fmt: skip
def test_a_layer_that_is_not_ours_is_never_replaced(package, layer, why):
    before = package.read_bytes()
    frame = evidence_frame(compression(SIZE), SIZE, SCALES, transform=ROTATED, crs="EPSG:32654")
    with pytest.raises(ValueError, match=why):
        write_vectors(frame, package, ABOUT, layer=layer)
    assert package.read_bytes() == before


def test_runs_that_add_to_one_geopackage_at_once_lose_no_layer(package):
    frame = evidence_frame(compression(SIZE), SIZE, SCALES, transform=ROTATED, crs="EPSG:32654")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_vectors(frame, package, ABOUT, layer=f"e{number}"), range(4)))
    assert {"e0", "e1", "e2", "e3", "parcels"} <= {layer for layer, _ in pyogrio.list_layers(package)}


def test_a_geopackage_that_another_program_writes_to_is_left_alone(package, tmp_path):
    frame = evidence_frame(compression(SIZE), SIZE, SCALES, transform=ROTATED, crs="EPSG:32654")
    with closing(sqlite3.connect(package)) as file:
        file.execute("PRAGMA journal_mode=wal")
        file.execute("INSERT INTO notes VALUES ('new')")
        file.commit()
        with pytest.raises(ValueError, match="another program has it open"):
            write_vectors(frame, package, ABOUT)
    with closing(sqlite3.connect(package)) as file:  # as QGIS does to look at it
        assert file.execute("SELECT * FROM notes").fetchall() == [("keep",), ("new",)]
        with pytest.raises(ValueError, match="another program has it open"):
            write_vectors(frame, package, ABOUT)
    with pytest.raises(ValueError, match="layer parcels of other columns"):
        write_vectors(frame, package, ABOUT, layer="parcels")
    assert [path.name for path in tmp_path.iterdir()] == [package.name]  # no journal of our looking
    (tmp_path / "no.gpkg").write_text("text")
    with pytest.raises(ValueError, match="this is no GeoPackage"):
        write_vectors(frame, tmp_path / "no.gpkg", ABOUT)


# Poles, edges that are bent, and longitudes beyond 180


def squares(crs, west, south, side, count):
    return gpd.GeoSeries(
        [shapely.box(west + x * side, south + y * side, west + (x + 1) * side, south + (y + 1) * side)
         for y in range(count) for x in range(count)], crs=crs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "crs, west, south, side, count",
    [
        ("EPSG:3031", -2e6, -2e6, 1e6, 4),  # the pole is a corner of four
        ("EPSG:3031", -1.5e6, -1.5e6, 1e6, 3),  # inside of one
        ("EPSG:3413", -1e6, -1.5e6, 1e6, 2),  # on an edge
        ("EPSG:32661", 1.8e6 - 700, 1.8e6 - 3, 1e5, 4),  # a step from an edge
        ("EPSG:32601", 262000, 5e6, 1e5, 3),  # the antimeridian
        ("EPSG:3857", -20037508.342789244, -20037508.342789244, 20037508.342789244, 2),  # the world
        ("EPSG:4326", 170, -80, 20, 3),
        ("EPSG:4326", 0, -90, 180, 1),
    ],
)
def test_every_place_of_a_polygon_lies_in_it_in_degrees_too_and_no_other(crs, west, south, side, count):
    polygons = squares(crs, west, south, side, count)
    ring = polygons.iloc[0].difference(polygons.iloc[0].buffer(-side / 4))  # a hole
    polygons = gpd.GeoSeries([*polygons, ring], crs=crs)
    moved = in_degrees(polygons, crs)
    assert shapely.is_valid(moved).all()
    low, high = np.array([west, south]), np.array([west, south]) + side * count
    places = np.random.default_rng(0).uniform(low, high, (4000, 2))
    if not polygons.crs.is_geographic and side > 1e5:
        places[:1000] = np.random.default_rng(1).uniform(-2000, 2000, (1000, 2))  # near the origin, which is a pole of some
    longitude, latitude = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(*places.T)
    longitude = (longitude + 180) % 360 - 180
    wrong = sum(
        (shapely.contains_xy(one, *places.T) != shapely.contains_xy(other, longitude, latitude)).sum()
        for one, other in zip(polygons, moved)
    )
    # A bent edge is right to a thousandth of its length.
    assert wrong <= len(places) * len(polygons) / 2000
    assert np.abs(shapely.total_bounds(moved)).max() <= 180


def test_a_geojson_at_a_pole_holds_the_places_beside_it(tmp_path):
    _, path = vectors(tmp_path, "kept.geojson", (20_000, 0, -35 * 20_000, 0, -20_000, 22.5 * 20_000), "EPSG:3031")
    read = gpd.read_file(path)
    longitude, latitude = Transformer.from_crs("EPSG:3031", "EPSG:4326", always_xy=True).transform(700, 700)
    assert (read[read["scale"] == SCALES[0]].contains(shapely.Point(longitude, latitude))).sum() == 1
    assert read.total_bounds[1] == -90


# The raster as GDAL and QGIS have it


def test_the_raster_is_cloud_optimised_and_the_style_shows_its_finest_band(tmp_path):
    size = (700, 1500)
    result, path = raster_of(tmp_path, size, Georeference(Affine(*ROTATED), rasterio.CRS.from_epsg(32654)))
    with rasterio.open(path) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and raster.overviews(1)[:2] == [2, 4]
        band = raster.read(3)
    write_style(style_path(path), band, 3)
    renderer = ElementTree.parse(path.with_suffix(".qml")).find("pipe/rasterrenderer")
    assert renderer.get("band") == "3"
    assert float(renderer.get("classificationMin")) == pytest.approx(np.nanmin(band))
    alphas = [(float(item.get("value")), item.get("alpha")) for item in renderer.iter("item")]
    assert alphas[0][1] == "0" and alphas[1][1] == "255" and alphas[0][0] < alphas[1][0] <= np.nanmax(band)
    assert style_path(path) == path.with_suffix(".qml")
    path.with_suffix(".qml").write_text("<qgis>somebody's</qgis>")
    assert style_path(path) is None
