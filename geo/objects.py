"""Objects of an answer as GIS software reads them: a table of boxes and points, as GeoJSON, GeoPackage or CSV."""

from pathlib import Path

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


def check_objects(path: Path, georeference: Georeference):
    """Raises `ValueError` for a file that `write_objects` cannot write, before a model is asked."""
    if path.suffix.lower() != CSV:
        check_vectors(path, georeference.crs, OBJECT_LAYER, OBJECT_COLUMNS)


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
    import shapely

    path, place = Path(path), {"transform": georeference.transform, "crs": georeference.crs}
    frame = objects_frame(objects, **place)
    if path.suffix.lower() != CSV:
        told = {"refused": "; ".join(objects.refusals), "empty": objects.note}
        about = about | {name: text for name, text in told.items() if text}
        write_vectors(frame, path, about, georeference.words, OBJECT_LAYER)
        return
    table = frame.drop(columns="geometry").assign(wkt=frame.geometry.to_wkt(rounding_precision=-1))
    if georeference.crs is not None and has_degrees(georeference.crs):
        middles = in_degrees(shapely.centroid(np.asarray(frame.geometry)), georeference.crs)
        table["longitude"], table["latitude"] = ([getattr(one, axis) for one in middles] for axis in "xy")
    if georeference.crs is not None:
        table["crs"] = crs_name(georeference.crs)
    for name in {"label", "crs"} & set(table.columns):
        table[name] = table[name].map(lambda text: f"'{text}" if text.startswith(FORMULA) else text)
    with whole_files(path.parent) as built:
        table.to_csv(built / path.name, index=False)
