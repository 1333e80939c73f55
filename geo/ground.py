"""What lies where on the globe, as GeoJSON of an image that may be anybody's: it never fails, but says what is wrong with the place."""

import json
import logging
from collections.abc import Callable

import numpy as np

from ..common.extras import require
from ..common.objects import Objects
from ..image_raster_files_uhr_bat import reason
from .georeference import Georeference
from .objects import objects_frame
from .writing import geojson_bytes

logger = logging.getLogger(__name__)


def on_ground(
    georeference: Georeference, image_size: tuple[int, int], frame_on: Callable
) -> tuple[dict | None, str | None]:
    """(a FeatureCollection in WGS 84 or None, why there is none of a georeferenced image or None).

    Args:
        image_size: (height, width) in pixels.
        frame_on: (transform, crs) -> a GeoDataFrame.
    """
    if georeference.crs is None:
        return None, None
    try:
        _check_place(georeference, image_size)
        collection = json.loads(geojson_bytes(frame_on(georeference.transform, georeference.crs), {}))
        _check_degrees(collection)
        return collection, None
    except ImportError as error:  # says what to install
        return None, str(error)
    except Exception as error:  # GDAL, GEOS, PROJ and pandas each have errors of their own
        logger.info("An image has no GeoJSON.", exc_info=True)
        return None, f"The image's place on the ground leads to no longitude and latitude: {reason(error)}"


def object_members(objects: Objects, image_size: tuple[int, int], georeference: Georeference) -> dict:
    """Objects as JSON: {"image_size": [height, width], "objects": [...], "refused": [{"text", "why"}], "note": why there is no
    object, "ground_error": why no object of a georeferenced image has its ground, or None}.

    An object: an [`ImageObject`], with `box` (left, top, right, bottom) or `point` (x, y) in pixels of the image, and "ground",
    its geometry of GeoJSON in WGS 84, or None.
    """
    collection, error = on_ground(
        georeference, image_size, lambda *place: objects_frame(objects, transform=place[0], crs=place[1])
    )
    record = objects.record()
    for idx, one in enumerate(record["objects"]):
        one["ground"] = collection and collection["features"][idx]["geometry"]
    return {"image_size": list(image_size), **record, "ground_error": error}


def _check_place(place, image_size):
    """Raises `ValueError` where an image's transform and CRS do not say where on the ground it lies, or PROJ does: a
    transform without an area, heights alone, coordinates from the centre of the earth, far outside a projection."""
    require("geo", "pyproj")
    import pyproj

    height, width = image_size
    a, b, c, d, e, f = numbers = place.transform[:6]
    area = abs(a * e - b * d)
    if not np.isfinite(numbers).all() or not area:
        raise ValueError(f"its transform {tuple(numbers)} gives a pixel no area")
    crs = pyproj.CRS.from_user_input(place.crs)
    if crs.is_geocentric or crs.is_vertical and not crs.is_compound:
        raise ValueError(f"its CRS is {crs.name}")
    columns, rows = np.meshgrid(np.linspace(0, width, 3), np.linspace(0, height, 3))
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    transformer = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    longitude, latitude = transformer.transform(x, y, errcheck=True)
    again = transformer.transform(longitude, latitude, direction="INVERSE", errcheck=True)
    if not np.hypot(again[0] - x, again[1] - y).max() < area**0.5:
        raise ValueError(f"it lies outside of what {crs.name} covers")


def _check_degrees(collection):
    """Raises `ValueError` unless every polygon and point has places, all of them on the globe."""
    for feature in collection["features"]:
        geometry = feature["geometry"]
        is_known = geometry and geometry["type"] in ("Polygon", "MultiPolygon", "Point")
        places = np.array(_places(geometry["coordinates"]) if is_known else [])
        if not places.size or not (np.abs(places[:, :2]) <= (180, 90)).all():
            raise ValueError("its degrees are not those of the globe")


def _places(coordinates):
    if coordinates and not isinstance(coordinates[0], list):
        return [coordinates]
    return [place for part in coordinates for place in _places(part)]
