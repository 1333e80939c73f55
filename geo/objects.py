"""Objects of an answer as GIS software reads them: a table of boxes and points, as GeoJSON, GeoPackage or CSV."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.extras import require
from ..common.files import whole_files
from ..common.objects import Objects
from ..geometry_uhr_bat import box_corners
from .degrees import in_degrees
from .georeference import PLAIN, Georeference, crs_name, has_degrees
from .writing import GEOJSON, GEOPACKAGE, check_vectors, write_vectors

OBJECT_COLUMNS = ("label", "score", "level", "source", "left", "top", "right", "bottom")
OBJECT_LAYER = "objects"
CSV = ".csv"
# Of a text that a spreadsheet would take for a formula.
FORMULA = ("=", "+", "-", "@")
OBJECT_FILES = (*GEOJSON, GEOPACKAGE, CSV)


def objects_frame(objects: Objects, *, transform=None, crs=None):
    """The objects as a GeoDataFrame, in their order. Columns:
    - label, source: texts, see [`ImageObject`];
    - score: float64, NaN where there is none; level: Int64, <NA> where there is none;
    - left, top, right, bottom: float64, in pixels of the image; a point has left = right and top = bottom;
    - geometry: a Polygon of a box, rotated as the image lies, its ring counterclockwise (in numbers); a Point of a point.

    Args:
        transform: from pixels to coordinates (`box_corners`), as rasterio's. None: geometry in pixels (column, row).
        crs: of these coordinates, anything that geopandas takes.

    Raises:
        ImportError: geopandas is missing; says what to install.
    """
    require("geo", "geopandas")
    import geopandas as gpd
    import pandas as pd
    import shapely

    edges = np.array([one.edges for one in objects], float).reshape(-1, 4)
    corners = box_corners(edges[:, [1, 0, 3, 2]], transform)
    shapes = shapely.orient_polygons(shapely.polygons(corners))
    is_point = np.array([one.box is None for one in objects], bool)
    shapes[is_point] = shapely.points(corners[is_point, 0])
    columns = {
        "label": pd.Series([one.label for one in objects], dtype="object"),
        "score": pd.Series([np.nan if one.score is None else one.score for one in objects], dtype="float64"),
        "level": pd.Series([pd.NA if one.level is None else one.level for one in objects], dtype="Int64"),
        "source": pd.Series([one.source for one in objects], dtype="object"),
        **dict(zip(OBJECT_COLUMNS[4:], edges.T)),
    }
    return gpd.GeoDataFrame(columns, geometry=gpd.GeoSeries(shapes, crs=crs), crs=crs)


def check_objects(path: Path, georeference: Georeference = PLAIN, columns: Sequence[str] = ()):
    """Raises `ValueError` for a file that `write_objects`, or with its first `columns` `write_joined`, cannot write, before a model
    is asked."""
    if path.suffix.lower() != CSV:
        check_vectors(path, georeference.crs, OBJECT_LAYER, (*columns, *OBJECT_COLUMNS))


def write_objects(objects: Objects, path: Path, about: dict[str, str], georeference: Georeference = PLAIN):
    """Objects as a GeoJSON, a GeoPackage (layer `objects`) or a CSV, by the ending; whole or not at all.

    The first two are those of `write_vectors`; what was refused, and why there is no object, stand beside the features. A CSV
    has the columns of `objects_frame`, `wkt`, the geometry in the image's own coordinates, and of an image whose place is known
    `longitude` and `latitude` of the middle of each. Its texts have a "'" before what would be a formula in a spreadsheet.

    Args:
        about: name -> text, as question and answer.
        georeference: of the image.

    Raises:
        ValueError: what `check_objects` refuses.
        ImportError: a package is missing; says what to install.
    """
    path, place = Path(path), {"transform": georeference.transform, "crs": georeference.crs}
    frame = objects_frame(objects, **place)
    if path.suffix.lower() == CSV:
        _write_table(_table(frame), path)
    else:
        write_vectors(frame, path, about | _told(objects), georeference.words, OBJECT_LAYER)


class Answered(NamedTuple):
    """The objects of one of several answers.

    Attributes:
        columns: name -> text, which every row of its objects begins with, as image and question.
        objects: that it points to.
        georeference: of its image.
        ground: of every object its geometry of GeoJSON in WGS 84; None where that is not known.
    """

    columns: dict[str, str]
    objects: Objects
    georeference: Georeference
    ground: list[dict] | None


def write_joined(answers: Iterable[Answered], path: Path, about: dict[str, str]):
    """Objects of several answers as one file of the forms of `write_objects`, in their order.

    A GeoPackage is in the CRS of the images where they share one; else, as GeoJSON always, in WGS 84, and an object whose place is
    not known has no geometry. Where no image has a CRS, coordinates are those of `write_objects`. A CSV has each object in the
    coordinates of its own image, and the column `crs` says which.

    Args:
        answers: with the same columns, one or more.
        about: as of `write_objects`.
    """
    import geopandas as gpd
    import pandas as pd
    import shapely

    answers, path = list(answers), Path(path)
    is_table = path.suffix.lower() == CSV
    systems = {str(one.georeference.crs) for one in answers}
    own = systems == {"None"} or len(systems) == 1 and path.suffix.lower() == GEOPACKAGE
    frames = []
    for answer in answers:
        frame = objects_frame(answer.objects, transform=answer.georeference.transform, crs=answer.georeference.crs)
        if is_table:
            frame = _table(frame, answer.ground is not None)
        elif not own:
            shapes = [None] * len(frame) if answer.ground is None else list(map(shapely.geometry.shape, answer.ground))
            frame = frame.set_geometry(gpd.GeoSeries(shapes, frame.index, crs="EPSG:4326"))
        for column, (name, text) in enumerate(answer.columns.items()):
            frame.insert(column, name, pd.Series([text] * len(frame), frame.index, dtype="object"))
        frames.append(frame)
    frame = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
    if is_table:
        _write_table(frame, path)
        return
    every = [one for answer in answers for one in answer.objects]
    refused = [one for answer in answers for one in answer.objects.refused]
    words = {one.georeference.words for one in answers}
    words = words.pop() if len(words) == 1 else "of each image: of its transform where it has one, else its pixels"
    write_vectors(frame, path, about | _told(Objects(every, answers[0].objects.text, refused)), words, OBJECT_LAYER)


def _told(objects) -> dict[str, str]:
    """What a file says of what is none of its objects."""
    told = {"refused": "; ".join(objects.refusals), "empty": objects.note}
    return {name: text for name, text in told.items() if text}


def _table(frame, placed=True):
    """The columns of a CSV; `placed`: whether degrees follow from the frame's CRS."""
    import shapely

    table = frame.drop(columns="geometry").assign(wkt=frame.geometry.to_wkt(rounding_precision=-1))
    if frame.crs is None:
        return table
    if placed and has_degrees(frame.crs):
        middles = in_degrees(shapely.centroid(np.asarray(frame.geometry)), frame.crs)
        table["longitude"], table["latitude"] = ([getattr(one, axis) for one in middles] for axis in "xy")
    return table.assign(crs=crs_name(frame.crs))


def _write_table(table, path):
    for name in table.select_dtypes(exclude="number").columns:
        table[name] = [f"'{text}" if str(text).startswith(FORMULA) else text for text in table[name]]
    with whole_files(path.parent) as built:
        table.to_csv(built / path.name, index=False)
