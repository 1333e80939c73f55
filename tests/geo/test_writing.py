"""GeoJSON, GeoPackage and GeoTIFF of what was kept, as rasterio and geopandas read them."""

import json
import warnings

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from made_up import ABOUT, GRIDS, ROTATED, SCALES, compression
from pyproj import Transformer
from uhr_bat.geo import Georeference, evidence_frame, read_georeference, write_raster, write_vectors
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
