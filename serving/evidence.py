"""What was kept of every image to answer, and the objects that the answer points to, as JSON: places in pixels, and on the ground
where that is known.

Letters: S scales, N tokens of a scale.
"""

import json
import logging

import numpy as np

from ..common.asking import answer_objects
from ..common.extras import require
from ..geo import evidence_frame, geojson_bytes, objects_frame, visual_tokens
from ..geometry_uhr_bat import token_box
from ..image_raster_files_uhr_bat import reason
from .front import EncodedImage, Selection

logger = logging.getLogger(__name__)


def evidence_members(selection: Selection, images: list[EncodedImage]) -> list[dict]:
    """For every image {"image_size": [height, width], "tokens": [...], "geojson": FeatureCollection or None,
    "geojson_error": why there is none of a georeferenced image, or None}.

    A token: {"scale": side of its view in pixels, "slot": its place among those of its scale in the prompt, "score":
    how much the question looks at it (eq. 2; the mean where several were merged), "boxes": [[top, left, bottom, right]]
    in pixels, one for each token of the image that went into it}. The GeoJSON is that of `uhr-bat evidence-map`: WGS 84,
    polygons in the order of the tokens. It never fails: by then the answer is there, and is worth more.
    """
    return [_of_image(selection.compressed, image_idx, image) for image_idx, image in enumerate(images)]


def _of_image(compressed, image_idx, image):
    scales, tokens = compressed.scales[image_idx], []
    for scale, (grid, positions, slots, scores, _) in zip(scales, visual_tokens(compressed, image_idx)):
        boxes = token_box(positions, image.image_size, grid).tolist()
        for slot in np.unique(slots).tolist():
            first, stop = np.searchsorted(slots, (slot, slot + 1))
            score = float(scores[first:stop].mean())
            tokens.append({"scale": scale, "slot": slot, "score": score, "boxes": boxes[first:stop]})
    collection, error = _geojson(compressed, image_idx, image, scales)
    return {"image_size": list(image.image_size), "tokens": tokens, "geojson": collection, "geojson_error": error}


def _geojson(compressed, image_idx, image, scales):
    def frame_on(transform, crs):
        return evidence_frame(compressed, image.image_size, scales, transform=transform, crs=crs, image_idx=image_idx)

    return _on_ground(image, frame_on)


def _on_ground(image, frame_on):
    """(a GeoJSON or None, why there is none of a georeferenced image or None); `frame_on(transform, crs)` makes its frame."""
    place = image.georeference
    if place.crs is None:
        return None, None
    try:
        check_place(place, image.image_size)
        collection = json.loads(geojson_bytes(frame_on(place.transform, place.crs), {}))
        check_degrees(collection)
        return collection, None
    except ImportError as error:  # says what to install
        return None, str(error)
    except Exception as error:  # GDAL, GEOS, PROJ and pandas each have errors of their own
        logger.info("An image has no GeoJSON.", exc_info=True)
        return None, f"The image's place on the ground leads to no longitude and latitude: {reason(error)}"


def object_members(model, text: str, selection: Selection, image: EncodedImage) -> dict:
    """{"image_size": [height, width], "objects": [...], "refused": [{"text", "why"}], "note": why there is no object,
    "ground_error": why no object of a georeferenced image has its ground, or None}.

    An object: an [`ImageObject`], with `box` (left, top, right, bottom) or `point` (x, y) in pixels of the image, and "ground",
    its geometry of GeoJSON in WGS 84, or None. It never fails, as `evidence_members`.
    """
    found = answer_objects(model, text, selection.compressed, image.image_size)
    collection, error = _on_ground(image, lambda *place: objects_frame(found, transform=place[0], crs=place[1]))
    record = found.record()
    for idx, one in enumerate(record["objects"]):
        one["ground"] = collection and collection["features"][idx]["geometry"]
    return {"image_size": list(image.image_size), **record, "ground_error": error}


def check_place(place, image_size):
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


def check_degrees(collection):
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
