# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT raster windows: coordinate systems that may be asked for, and which part of a raster is read.

A coordinate system in words is an authority's code or WKT that names no file. GDAL and PROJ take far more: addresses that
they fetch, paths that they read, strings of PROJ with grids. Nothing of that reaches them from here.

Sizes are (height, width), coordinates (row, column).
"""

import math
import os
import re
import warnings
from typing import Any

import numpy as np

from .image_raster_files_uhr_bat import import_rasterio, reason

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
# A millionth of a pixel is what the inverse of a transform rounds by.
PIXEL_ERROR = 1e-6
# Points along each side of bounds whose places in another coordinate system are looked at.
NUM_POINTS = 513
# Of coordinates, in whatever unit: GDAL takes whole turns off a place of EPSG:3857 one by one, for 1e30 without an end.
MAX_PLACE = 1e10
FORMS = (
    "A window is (top, left, bottom, right) in pixels, ((top, bottom), (left, right)), rasterio's Window, or (west, south, "
    "east, north, crs)."
)


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
    CRS, CRSError = import_rasterio("crs").CRS, import_rasterio("errors").CRSError

    shown = repr(crs if len(str(crs)) <= 80 else f"{str(crs)[:80]}...")
    try:
        if hasattr(crs, "to_wkt"):
            return CRS.from_user_input(crs)
        if isinstance(crs, (int, np.integer)) and not isinstance(crs, bool):
            return CRS.from_epsg(int(crs))
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


# Places


def compose(first, second):
    """The affine transform that applies `second`, then `first`: their product, in every version of affine."""
    a, b, c, d, e, f = tuple(first)[:6]
    a2, b2, c2, d2, e2, f2 = tuple(second)[:6]
    places = (a * c2 + b * f2 + c, d * c2 + e * f2 + f)
    return type(first)(a * a2 + b * d2, a * b2 + b * e2, places[0], d * a2 + e * d2, d * b2 + e * e2, places[1])


def apply(transform, x, y) -> tuple:
    """The places of points, numbers or arrays."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * x + b * y + c, d * x + e * y + f


def upright_transform(transform, upright: tuple[bool, bool, bool], size: tuple[int, int]):
    """The transform of the pixels of an image that was turned upright, from that of the stored ones.

    Args:
        upright: what was done to the stored pixels (`upright_by`).
        size: (height, width) of the upright image.
    """
    transposed, rows_reversed, columns_reversed = upright
    affine = type(transform)
    if transposed:
        transform = compose(transform, affine(0, 1, 0, 1, 0, 0))
    if rows_reversed:
        transform = compose(transform, affine(1, 0, 0, 0, -1, size[0]))
    if columns_reversed:
        transform = compose(transform, affine(-1, 0, size[1], 0, 1, 0))
    return transform


def period_of(crs) -> float | None:
    """By how much x grows once around the globe, where the same place comes again then: in degrees, and in projections
    onto a cylinder; None in others."""
    transform = import_rasterio("warp").transform

    if crs.is_geographic:
        return 2 * math.pi / crs.units_factor[1]
    try:
        x, y = transform("EPSG:4326", crs, [float(degree) for degree in range(-180, 180)], [0.0] * 360)
    except Exception:  # of another planet, of a building site
        return None
    if not np.isfinite(x).all():
        return None
    steps = np.diff(x)
    step = np.median(steps)
    even = np.abs(steps - step) < 1e-6 * abs(step)
    level = np.ptp(y) < 1e-6 * abs(step)
    return float(360 * step) if step > 0 and even.sum() >= len(steps) - 1 and level else None


def _outline(bounds, crs, to_crs, period):
    """x and y, in another coordinate system, of points along the border of bounds; x goes on where it would begin anew.

    Where the border goes around a pole, so do the points: all that lies between it and the pole is inside.
    """
    transform = import_rasterio("warp").transform

    west, south, east, north = bounds
    steps = np.linspace(0, 1, NUM_POINTS)
    across, up = west + (east - west) * steps, south + (north - south) * steps
    still = np.ones(NUM_POINTS)
    x = np.concatenate((across, east * still, across[::-1], west * still))
    y = np.concatenate((south * still, up, north * still, up[::-1]))
    if crs != to_crs:
        x, y = (np.asarray(values) for values in transform(crs, to_crs, x, y))
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if period is None or not len(x) or crs == to_crs:
        return x, y
    x = np.unwrap(x, period=period)
    if abs(x[-1] - x[0]) > period / 2:  # once around
        # A cylinder has no pole: its y goes on for ever.
        pole = period / 4 if to_crs.is_geographic else 1e9
        inside = []
        if to_crs.is_geographic:
            for place, px, py in zip((pole, -pole), *transform(to_crs, crs, [0, 0], [pole, -pole])):
                inside += [place] if west <= px <= east and south <= py <= north else []
        inside = inside or [math.copysign(pole, np.mean(y))]
        x, y = np.append(x, (x.min(), x.min() + period)), np.append(y, (inside[0], inside[-1]))
    return x, y


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _pixels_of(given, x, y, period, transform, size, name):
    """(top, left, bottom, right) in pixels of what bounds, whose outline is x and y, hold of an image; None for nothing."""
    height, width = size
    parts = []
    for turn in (range(-2, 3) if period else (0,)) if len(x) else ():
        columns, rows = apply(~transform, x + turn * (period or 0), y)
        edges = outwards(rows.min(), columns.min(), rows.max(), columns.max())
        part = max(edges[0], 0), max(edges[1], 0), min(edges[2], height), min(edges[3], width)
        if part[0] < part[2] and part[1] < part[3]:
            parts.append(part)
    if len(parts) > 1:
        top, left, bottom, right = zip(*parts)
        joined = min(top), min(left), max(bottom), max(right)
        if _area(joined) > sum(map(_area, parts)):
            raise ValueError(
                f"{name}: the bounds {given} lie at both ends of the image, in {len(parts)} parts: "
                f"{', '.join(map(str, parts))} in pixels (top, left, bottom, right). Pass one of them."
            )
        return joined
    return parts[0] if parts else None


# Windows


def outwards(top, left, bottom, right) -> tuple[int, int, int, int]:
    """Whole pixels that hold a part, whose edges may be off by `PIXEL_ERROR`."""
    first = (math.floor(edge + PIXEL_ERROR) for edge in (top, left))
    return *first, *(math.ceil(edge - PIXEL_ERROR) for edge in (bottom, right))


def _told(values) -> str:
    """Numbers in an error: no types, and none of a million letters."""
    text = ", ".join(f"{value:.10g}" if isinstance(value, (int, float)) else str(value)[:80] for value in values)
    return f"({text})"


def _numbers(values, window, name) -> list[float]:
    try:
        numbers = [float(value) for value in values]
        if all(map(math.isfinite, numbers)):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: the edges of a window are finite numbers. Got {str(window)[:200]}. {FORMS}")


def choose_window(dataset, crs, window, size: tuple[int, int], name: str, transform=None) -> tuple[int, int, int, int]:
    """The part of an image that is read, (top, left, bottom, right) in pixels.

    Args:
        dataset: rasterio's, of which it is known whether it has RPCs.
        crs, transform: of the image, upright; None where it has none.
        window: None is all of the image; (top, left, bottom, right) in pixels, rasterio's ((top, bottom), (left, right))
            or its `Window`; (west, south, east, north, crs) for bounds, which are cut off at the image's border. What is
            no whole pixel is rounded outwards. In degrees, west may be greater than east: bounds across the antimeridian.
        size: (height, width) of the whole image.

    Raises:
        ValueError: a part that is empty or not inside the image, or in two parts; bounds for an image without coordinates.
    """
    height, width = size
    if window is None:
        return 0, 0, height, width
    if hasattr(window, "toranges"):
        window = window.toranges()
    if isinstance(window, (str, bytes)) or not hasattr(window, "__len__") or len(window) not in (2, 4, 5):
        raise ValueError(f"{name}: {str(window)[:200]!r} is no window. {FORMS}")
    if len(window) == 5:
        *bounds, bounds_crs = window
        return _window_of_bounds(dataset, crs, transform, _numbers(bounds, window, name), bounds_crs, size, name)
    if len(window) == 2:
        if not all(hasattr(edges, "__len__") and len(edges) == 2 for edges in window):
            raise ValueError(f"{name}: {str(window)[:200]!r} is no window. {FORMS}")
        (top, bottom), (left, right) = window
    else:
        top, left, bottom, right = window
    edges = _numbers((top, left, bottom, right), window, name)
    top, left, bottom, right = outwards(*edges)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"{name}: the window (top {edges[0]:.10g}, left {edges[1]:.10g}, bottom {edges[2]:.10g}, right {edges[3]:.10g}) "
            f"is not inside the image of {height} x {width} pixels (height x width)."
        )
    return top, left, bottom, right


def _window_of_bounds(dataset, crs, transform, bounds, bounds_crs, size, name):
    if crs is None or transform is None:
        check_no_rpcs(dataset, name)
        raise ValueError(f"{name}: it has no coordinate system that bounds could be given in. Pass pixels.")
    bounds_crs = parse_crs(bounds_crs, name)
    given = _told((*bounds, bounds_crs.to_string()))
    if max(map(abs, bounds)) > MAX_PLACE:
        raise ValueError(
            f"{name}: the bounds {given} reach beyond {MAX_PLACE:g}, where no coordinate system has a place."
        )
    west, south, east, north = bounds
    if bounds_crs.is_geographic:
        turn, quarter = (angle / bounds_crs.units_factor[1] for angle in (2 * math.pi, math.pi / 2))
        if not -quarter <= south <= north <= quarter:
            raise ValueError(
                f"{name}: {south:.10g} to {north:.10g} are no latitudes from south to north. Bounds are (west, south, east, "
                f"north, crs), longitude before latitude. Got {given}."
            )
        if west > east:
            east += turn * math.ceil((west - east) / turn)
        bounds = west, south, min(east, west + turn), north
    elif west > east or south > north:
        raise ValueError(
            f"{name}: bounds are (west, south, east, north, crs), west below east and south below north. Got {given}."
        )
    try:
        period = period_of(crs)
        x, y = _outline(bounds, bounds_crs, crs, period)
    except Exception as error:  # PROJ knows no way from one to the other
        raise ValueError(
            f"{name}: the bounds {given} have no place in the image's coordinate system ({error}). Pass pixels, or "
            f"bounds in its own."
        ) from error
    part = _pixels_of(given, x, y, period, transform, size, name)
    if part is None:
        height, width = size
        columns, rows = apply(transform, np.array([0, width, 0, width]), np.array([0, 0, height, height]))
        own = columns.min(), rows.min(), columns.max(), rows.max()
        raise ValueError(f"{name}: the bounds {given} lie outside the image, whose own are {tuple(map(float, own))}.")
    return part


def of_gcps(dataset, name: str) -> tuple:
    """(coordinate system, transform) of ground control points, by the affine transform that fits them best; (None, None)
    without. Warns where it is off by more than a pixel."""
    points, crs = dataset.gcps
    if len(points) < 3 or crs is None:
        return None, None
    transform = import_rasterio("transform").from_gcps(points)
    found = apply(~transform, *(np.array([getattr(point, axis) for point in points]) for axis in "xy"))
    off = max(np.abs(np.subtract(found, [[p.col for p in points], [p.row for p in points]])).max(axis=1))
    if off > 1:
        warnings.warn(
            f"{name}: its place is that of {len(points)} control points, from which an even grid is up to {off:.1f} pixels off. "
            f"Pass `rasterio.vrt.WarpedVRT(dataset)` for more.",
            stacklevel=2,
        )
    return crs, transform


# Areas


def read_area(area: Any, crs, transform, size: tuple[int, int], name: str) -> list:
    """Polygons in pixels of the image, (column, row).

    Args:
        area: the path of a GeoJSON or a GeoPackage or another file of polygons; a GeoJSON as a dictionary, or an object
            with `__geo_interface__`, in longitude and latitude unless it says otherwise.
        crs, transform: of the image.
        size: (height, width) of the image.

    Raises:
        ImportError: geopandas is not installed.
        OSError: the file cannot be read.
        ValueError: no polygons, or an image without coordinates.
    """
    if crs is None or transform is None:
        raise ValueError(
            f"{name}: it has no coordinate system that an area could be given in. Pass a window in pixels."
        )
    try:
        import geopandas
        import shapely.affinity
    except ImportError as error:
        raise ImportError('Reading an area needs geopandas: pip install "uhr-bat[geo]"') from error

    shown = str(area)[:200]
    if isinstance(area, (str, os.PathLike)):
        if not os.path.exists(area):
            raise FileNotFoundError(f"{shown}: there is no such file of an area.")
        try:
            found = geopandas.read_file(area)
        except Exception as error:
            raise OSError(f"{shown}: the area cannot be read ({reason(error)}).") from error
    else:
        shape = getattr(area, "__geo_interface__", area)
        features = shape.get("features") if isinstance(shape, dict) else None
        shapes = features if features is not None else [shape]
        try:
            shapes = [part["geometry"] if "geometry" in part else part for part in shapes]
            shapes = [shapely.geometry.shape(part) for part in shapes if part is not None]
        except Exception as error:
            raise ValueError(f"{name}: {shown!r} is no area: pass a file, a GeoJSON or a polygon.") from error
        stated = getattr(area, "crs", None) or _stated_crs(shape, name) or "EPSG:4326"
        found = geopandas.GeoDataFrame(geometry=shapes, crs=stated)
    shapes = found[found.geometry.notna()].explode(ignore_index=True)
    shapes = shapes[(shapes.geom_type == "Polygon") & ~shapes.is_empty]
    if not len(shapes):
        raise ValueError(f"{shown}: the area has no polygon.")
    if shapes.crs is None:
        raise ValueError(f"{shown}: the area states no coordinate system. Write it with one.")
    # Straight lines of one system are none of the other.
    bounds = shapes.total_bounds
    longest = max(bounds[2] - bounds[0], bounds[3] - bounds[1]) / NUM_POINTS
    try:
        moved = shapes.geometry.segmentize(longest).to_crs(crs.to_wkt())
        if period := period_of(crs):
            (height, width), corners = size, np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
            moved = _around(moved, period, apply(transform, width * corners[:, 0], height * corners[:, 1]))
        a, b, c, d, e, f = tuple(~transform)[:6]
        return list(moved.affine_transform([a, b, d, e, c, f]))
    except Exception as error:  # places that the image's system does not have
        raise ValueError(
            f"{name}: the area {shown} has no place in the image's coordinate system ({error})."
        ) from error


def _stated_crs(shape, name):
    """That of a GeoJSON's member `crs`, which its older form has; None without."""
    member = shape.get("crs") if isinstance(shape, dict) else None
    if member is None:
        return None
    stated = str((member.get("properties") or {}).get("name")) if isinstance(member, dict) else str(member)
    urn = re.fullmatch(r"urn:ogc:def:crs:(\w+):[\w.]*:(\w+)", stated)
    return parse_crs(f"{urn[1]}:{urn[2]}" if urn else stated, name).to_wkt()


def _around(shapes, period, corners):
    """Polygons whose x comes again after a period: in one piece, and wherever they meet an image with these corners (x, y)."""
    import geopandas
    import shapely.affinity

    whole = []
    for shape in shapes:
        rings = [np.array(ring.coords) for ring in (shape.exterior, *shape.interiors)]
        for ring in rings:
            ring[:, 0] = np.unwrap(ring[:, 0], period=period)
        for ring in rings[1:]:  # holes lie within
            ring[:, 0] += period * np.round((rings[0][:, 0].mean() - ring[:, 0].mean()) / period)
        whole.append(shapely.Polygon(rings[0], rings[1:]))
    (left, right), found = (corners[0].min(), corners[0].max()), []
    for shape in whole:
        first, _, last, _ = shape.bounds
        if not math.isfinite(first + last):
            found.append(shape)
            continue
        turns = range(math.ceil((left - last) / period), math.floor((right - first) / period) + 1)
        found += [shapely.affinity.translate(shape, turn * period) for turn in turns] or [shape]
    return geopandas.GeoSeries(found)


def area_window(shapes: list, name: str) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in pixels of polygons in pixels."""
    bounds = np.array([shape.bounds for shape in shapes])
    if not np.isfinite(bounds).all():
        raise ValueError(f"{name}: the area has no place in the image's coordinate system.")
    left, top = bounds[:, :2].min(axis=0)
    right, bottom = bounds[:, 2:].max(axis=0)
    return outwards(top, left, bottom, right)


def outside_area(shapes: list, box, size: tuple[int, int]) -> np.ndarray:
    """bool[size]: pixels of a box (top, left, bottom, right), read in a size, whose centres lie in none of the polygons."""
    top, left, bottom, right = box
    transform = import_rasterio().Affine((right - left) / size[1], 0, left, 0, (bottom - top) / size[0], top)
    return import_rasterio("features").geometry_mask(shapes, out_shape=size, transform=transform)


def check_no_rpcs(dataset, name: str):
    """Raises `ValueError` where coordinates are asked of an image that has those of a camera (RPCs) alone."""
    if dataset.rpcs is not None:
        raise ValueError(
            f"{name}: its coordinates are RPCs, those of a camera, which need heights of the ground. Pass "
            f"`rasterio.vrt.WarpedVRT(dataset, src_crs='EPSG:4326', crs=..., RPC_DEM=...)`, or a window in pixels."
        )
