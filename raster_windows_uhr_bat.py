"""UHR-BAT raster windows: coordinate systems that may be asked for, and which part of a raster is read.

A coordinate system in words is an authority's code or WKT that names no file. GDAL and PROJ take far more: addresses that
they fetch, paths that they read, strings of PROJ with grids. Nothing of that reaches them from here.

Sizes are (height, width), coordinates (row, column).
"""

import math
import re
from typing import Any

from .raster_files_uhr_bat import import_rasterio

# Authorities of PROJ's database, and the form of their codes.
AUTHORITIES = ("EPSG", "ESRI", "IAU_2015", "IGNF", "NKG", "NRCAN", "OGC")
CODE = re.compile(r"([A-Za-z][A-Za-z0-9_]*):([A-Za-z0-9_.]{1,32})")
# Letters of a WKT: the longest of EPSG's have 5,000.
MAX_WKT = 20_000
# Keywords of WKT that say where an axis, a datum or a projection is. Those that name files (PARAMETERFILE,
# ABRIDGEDTRANSFORMATION, GEOIDMODEL) are not among them.
WKT_KEYWORDS = frozenset(
    """
    PROJCS GEOGCS GEOCCS LOCAL_CS COMPD_CS VERT_CS VERTCS LINUNIT DATUM VERT_DATUM LOCAL_DATUM SPHEROID PRIMEM UNIT AXIS PARAMETER
    PROJECTION TOWGS84 AUTHORITY PROJCRS PROJECTEDCRS GEOGCRS GEOGRAPHICCRS GEODCRS GEODETICCRS BASEGEOGCRS BASEGEODCRS
    COMPOUNDCRS VERTCRS VERTICALCRS ENGCRS ENGINEERINGCRS EDATUM ENGINEERINGDATUM VDATUM VRF VERTICALDATUM TRF
    GEODETICDATUM ENSEMBLE MEMBER ENSEMBLEACCURACY DYNAMIC FRAMEEPOCH ANCHOR ANCHOREPOCH ELLIPSOID PRIMEMERIDIAN
    CONVERSION METHOD CS ORDER MERIDIAN BEARING ANGLEUNIT LENGTHUNIT SCALEUNIT TIMEUNIT USAGE SCOPE AREA BBOX
    VERTICALEXTENT TIMEEXTENT ID REMARK AXISMINVALUE AXISMAXVALUE RANGEMEANING
    """.split()
)
WKT_TEXT = re.compile(r'"[^"]*"')
# PROJ takes operations of its own for methods, with parameters in their names.
WKT_METHOD = re.compile(r'(?:METHOD|PROJECTION)\s*[\[(]\s*"([^"]*)"', re.IGNORECASE)
# The one extension that is common: GDAL's of web Mercator and geostationary views.
WKT_PROJ = re.compile(r'EXTENSION\s*[\[(]\s*"PROJ4"\s*,\s*"([^"]*)"\s*[\])]', re.IGNORECASE)
PROJ_KEYS = frozenset("proj a b R type lat_0 lat_ts lon_0 x_0 y_0 k units h sweep wktext no_defs over ellps".split())
PROJECTIONS = frozenset(("merc", "geos", "longlat", "eqc", "utm", "tmerc", "stere", "lcc", "laea", "aea"))


# Coordinate systems


def _proj_names_file(text: str) -> bool:
    """Whether a string of PROJ says more than a projection of a sphere or an ellipsoid."""
    for part in text.split():
        key, _, value = part.removeprefix("+").partition("=")
        if (key, value) == ("nadgrids", "@null"):
            continue
        if key not in PROJ_KEYS or not re.fullmatch(r"[A-Za-z0-9_.-]*", value):
            return True
        if key == "proj" and value not in PROJECTIONS:
            return True
    return False


def wkt_names_file(text: str) -> bool:
    """Whether a WKT says more than where axes, datum and projection are: what PROJ might open a file for."""
    if len(text) > MAX_WKT or any(_proj_names_file(found) for found in WKT_PROJ.findall(text)):
        return True
    text = WKT_PROJ.sub("0", text)
    if any("=" in method or method.lstrip().upper().startswith("PROJ") for method in WKT_METHOD.findall(text)):
        return True
    bare = WKT_TEXT.sub("0", text)
    keywords = re.findall(r"([^\[\](),]*)[\[(]", bare)
    return not bare.isascii() or '"' in bare or not {word.strip().upper() for word in keywords} <= WKT_KEYWORDS


def parse_crs(crs: Any, name: str):
    """rasterio's `CRS` of what a window may be given in.

    Args:
        crs: "EPSG:4326" or another code of the `AUTHORITIES`; WKT that names no file; a number of EPSG; or an object that
            has `to_wkt`, as those of rasterio and pyproj.
        name: what the error calls the image.

    Raises:
        ValueError: anything else: an address, a path, a string of PROJ, a code that there is not.
    """
    import_rasterio()
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    shown = repr(crs if len(str(crs)) <= 80 else f"{str(crs)[:80]}...")
    try:
        if hasattr(crs, "to_wkt"):
            return CRS.from_user_input(crs)
        if isinstance(crs, int) and not isinstance(crs, bool):
            return CRS.from_epsg(crs)
        if isinstance(crs, str):
            text = crs.strip()
            if code := CODE.fullmatch(text):
                authority = code[1].upper()
                if authority in AUTHORITIES:
                    return CRS.from_authority(authority, code[2])
            elif re.match(r"[A-Za-z_]+\s*[\[(]", text):
                if not wkt_names_file(text):
                    return CRS.from_wkt(text)
                raise ValueError(
                    f"{name}: the coordinate system {shown} of the window may name files, which are not opened. Pass an "
                    f"authority's code, as EPSG:4326, or WKT of axes, datum and projection alone."
                )
    except CRSError as error:
        raise ValueError(
            f"{name}: the coordinate system {shown} of the window is not known. Pass an authority's code, as EPSG:4326, "
            f"or WKT."
        ) from error
    raise ValueError(
        f"{name}: {shown} is no coordinate system that a window is given in. Pass an authority's code, as EPSG:4326, or "
        f"WKT; addresses, paths and strings of PROJ are not read."
    )


# Windows


def choose_window(dataset, crs, window, size: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    """The part of an image that is read, (top, left, bottom, right) in pixels.

    Args:
        crs: rasterio's, of the image; None where it has none.
        window: None is all of the image; (top, left, bottom, right) in pixels, rasterio's ((top, bottom), (left, right))
            or its `Window`; (west, south, east, north, crs) for bounds, which are cut off at the image's border and
            rounded outwards to whole pixels.
        size: (height, width) of the whole image.

    Raises:
        ValueError: a part that is empty or not inside the image; bounds for an image without coordinates.
    """
    height, width = size
    if window is None:
        return 0, 0, height, width
    if hasattr(window, "toranges"):
        window = window.toranges()
    if len(window) == 5:
        *bounds, bounds_crs = window
        if crs is None:
            raise ValueError(f"{name}: it has no coordinate system that bounds could be given in. Pass pixels.")
        from rasterio.warp import transform_bounds

        west, south, east, north = transform_bounds(parse_crs(bounds_crs, name), crs, *map(float, bounds))
        corners = [
            ~dataset.transform * corner for corner in ((west, south), (west, north), (east, south), (east, north))
        ]
        columns, rows = zip(*corners)
        # A millionth of a pixel is what the inverse rounds by.
        edges = [math.floor(min(rows) + 1e-6), math.floor(min(columns) + 1e-6)]
        edges += [math.ceil(max(rows) - 1e-6), math.ceil(max(columns) - 1e-6)]
        part = max(edges[0], 0), max(edges[1], 0), min(edges[2], height), min(edges[3], width)
        if part[0] >= part[2] or part[1] >= part[3]:
            raise ValueError(
                f"{name}: the bounds {window} lie outside the image, whose own are {tuple(dataset.bounds)}."
            )
        return part
    if len(window) == 2:
        (top, bottom), (left, right) = window
    else:
        top, left, bottom, right = window
    top, left, bottom, right = (int(edge) for edge in (top, left, bottom, right))
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"{name}: the window (top {top}, left {left}, bottom {bottom}, right {right}) is not inside the image of "
            f"{height} x {width} pixels (height x width)."
        )
    return top, left, bottom, right


__all__ = ["choose_window", "parse_crs", "wkt_names_file"]
