"""Points and polygons of any CRS in longitude and latitude, as RFC 7946 has them: cut at the antimeridian, whole at a pole.

GDAL is given corners alone, which is wrong where an edge is curved in degrees, and at a pole, which has no longitude.
"""

import math

import numpy as np

# An edge is bent where its middle lies off the straight one by more than this part of its length.
BENT = 1e-3
# How often the pieces of such an edge are halved at most, from the pieces that it begins as.
HALVINGS, PIECES = 16, 4
# Nearer to 90 degrees than this is the pole, 0.1 mm from it; what is narrower than this is rounding.
POLE = 1e-9


def in_degrees(geometries, crs) -> np.ndarray:
    """Points, Polygons and MultiPolygons in WGS 84, longitude first, within -180 to 180, outer rings counterclockwise.

    A corner stays a corner. Edges get more points only where they are bent in degrees. What has no longitude and latitude,
    as beyond the rim of the Earth, is left out; a point is then empty. None stays None.

    Args:
        geometries: of shapely, any number.
        crs: of their coordinates, one that leads to longitude and latitude (`has_degrees`).
    """
    import shapely

    geometries, places = np.asarray(geometries, dtype=object), _Places(crs)
    is_point = shapely.get_type_id(geometries) == shapely.GeometryType.POINT
    is_polygon = ~is_point & ~shapely.is_missing(geometries)
    found = geometries.copy()
    found[is_point] = _points(geometries[is_point], places)
    found[is_polygon] = _polygons(geometries[is_polygon], places)
    return found


def _points(points, places) -> np.ndarray:
    import shapely

    found = np.full(len(points), shapely.Point(), dtype=object)
    there = ~shapely.is_empty(points)
    degrees = places.degrees(shapely.get_coordinates(points[there]))
    outside = np.abs(degrees[:, 0]) > 180
    degrees[outside, 0] = (degrees[outside, 0] + 180) % 360 - 180
    seen = np.isfinite(degrees).all(1)
    found[np.flatnonzero(there)[seen]] = shapely.points(degrees[seen])
    return found


def _polygons(geometries, places) -> np.ndarray:
    import shapely

    parts, owners = shapely.get_parts(geometries, return_index=True)
    corners, of = shapely.get_coordinates(parts, return_index=True)
    degrees = places.degrees(corners)
    plain = _plain(corners, degrees, of, len(parts), places)
    moved = shapely.set_coordinates(parts.copy(), np.where(np.isfinite(degrees), degrees, 0))
    pieces = [[] for _ in geometries]
    for owner, part, whole, is_plain in zip(owners, parts, moved, plain):
        pieces[owner] += [whole] if is_plain else places.cut(part)
    joined = [
        pieces[idx][0] if len(pieces[idx]) == 1 and kind == 3 else
        shapely.MultiPolygon(pieces[idx]) if pieces[idx] else shapely.Polygon()
        for idx, kind in enumerate(shapely.get_type_id(geometries))
    ]  # fmt: skip
    return shapely.orient_polygons(np.array(joined, dtype=object))


def _plain(corners, degrees, of, number, places) -> np.ndarray:
    """bool[number]: polygons whose corners say all, from their corners float[n, 2] and which polygon's each is, long[n]."""
    inside = np.isfinite(degrees).all(1) & (np.abs(degrees[:, 0]) <= 180) & (np.abs(degrees[:, 1]) < 90 - POLE)
    plain = np.ones(number, bool)
    np.logical_and.at(plain, of, inside)
    if places.geographic:
        return plain
    low, high = np.full(number, np.inf), np.full(number, -np.inf)
    np.fmin.at(low, of, degrees[:, 0])
    np.fmax.at(high, of, degrees[:, 0])
    plain &= ~(high - low >= 180)
    # Of rings that follow one another the last edge leads to the next ring: it is none, and says nothing of either.
    same = (of[1:] == of[:-1]) & inside[1:] & inside[:-1]
    middles = places.degrees((corners[1:] + corners[:-1]) / 2)
    shrink = np.stack([np.cos(np.radians(degrees[:-1, 1])), np.ones(len(same))], axis=1)
    with np.errstate(invalid="ignore"):
        off = np.abs((middles - (degrees[1:] + degrees[:-1]) / 2) * shrink).max(1)
        length = np.abs((degrees[1:] - degrees[:-1]) * shrink).max(1)
        np.logical_and.at(plain, of[:-1], ~same | (off <= BENT * length))
    return plain


class _Places:
    """From a CRS to degrees."""

    def __init__(self, crs):
        import pyproj

        crs = pyproj.CRS.from_user_input(crs)
        self.geographic = crs.is_geographic
        self._unit = math.degrees(crs.axis_info[0].unit_conversion_factor) if self.geographic else None
        self._transform = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform
        self._poles = []
        if not self.geographic:
            back = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
            poles = np.stack(back.transform([0, 0], [90, -90]), axis=1)
            # A CRS may show a pole where it has none to show: it must come back.
            self._poles = [
                pole for pole, lat in zip(poles, (90, -90)) if abs(self.degrees(pole[None])[0, 1] - lat) < POLE
            ]

    def degrees(self, points) -> np.ndarray:
        """float[n, 2] longitude and latitude of float[n, 2]. Longitudes of a CRS in degrees keep their turn, as 190."""
        longitude, latitude = (np.array(axis, float) for axis in self._transform(points[:, 0], points[:, 1]))
        if self.geographic:
            longitude += 360 * np.round((points[:, 0] * self._unit - longitude) / 360)
        lost = ~(np.isfinite(longitude) & np.isfinite(latitude))
        return np.where(lost[:, None], np.nan, np.stack([longitude, latitude], axis=1))

    def cut(self, polygon) -> list:
        """The parts in degrees of a polygon that needs more than its corners."""
        import shapely

        shell, *holes = (_folded(self._ring(ring.coords)) for ring in (polygon.exterior, *polygon.interiors))
        if holes:
            shell = shapely.difference(shell, shapely.union_all(holes))
        parts = [part for part in shapely.get_parts(shell) if part.geom_type == "Polygon"]
        return [part for part in parts if min(part.bounds[2] - part.bounds[0], part.bounds[3] - part.bounds[1]) > POLE]

    def _ring(self, coords):
        """A polygon whose longitudes go on beyond 180 where the ring does."""
        import shapely

        points = np.asarray(coords, float)[:, :2]
        if not self.geographic:
            points = self._bent(self._with_poles(points))
        degrees = self.degrees(points[:-1])
        degrees = degrees[np.isfinite(degrees).all(1)]
        if len(degrees) < 3:
            return shapely.Polygon()
        if not self.geographic:
            degrees = _round_poles(degrees)
        ring = shapely.Polygon(degrees)
        return ring if ring.is_valid else shapely.make_valid(ring)

    def _bent(self, points):
        """The ring with more points where its edges are bent in degrees, or leave the Earth."""
        steps = np.arange(PIECES)[:, None] / PIECES
        points = np.concatenate(
            [*(start + (end - start) * steps for start, end in zip(points, points[1:])), points[-1:]]
        )
        for _ in range(HALVINGS):
            degrees, middles = self.degrees(points), (points[1:] + points[:-1]) / 2
            seen, lost = self.degrees(middles), np.isnan(degrees).any(1)
            ways = degrees[1:] - degrees[:-1]
            at_pole = np.abs(degrees[:, 1]) >= 90 - POLE
            # A pole has the longitude of whatever leads to it.
            ways[at_pole[1:] | at_pole[:-1], 0] = 0
            ways[:, 0] = (ways[:, 0] + 180) % 360 - 180
            starts = np.where(at_pole[:-1, None], degrees[1:] - ways, degrees[:-1])
            off = seen - starts - ways / 2
            off[:, 0] = (off[:, 0] + 180) % 360 - 180
            shrink = np.stack([np.cos(np.radians(seen[:, 1])), np.ones(len(seen))], axis=1)
            off, length = (np.abs(way * shrink).max(1) for way in (off, ways))
            halved = np.nan_to_num(off > BENT * length) & (length > 1e3 * POLE) | (lost[1:] != lost[:-1])
            if not halved.any():
                break
            places = np.flatnonzero(halved)
            points = np.insert(points, places + 1, middles[places], axis=0)
        return points

    def _with_poles(self, points):
        """The ring with a corner at each pole that it goes through."""
        import shapely

        for pole in self._poles:
            ring, point = shapely.LineString(points), shapely.Point(pole)
            close = 1e-9 * max(1, np.abs(points).max())
            if ring.distance(point) > close:
                continue
            gaps = np.abs(points - pole).max(1)
            if gaps.min() <= close:
                points = np.where((gaps <= close)[:, None], pole, points)
            else:
                edges = [shapely.LineString(pair).distance(point) for pair in zip(points, points[1:])]
                points = np.insert(points, int(np.argmin(edges)) + 1, pole, axis=0)
        return points


def _folded(ring):
    """A polygon with longitudes of any turn within -180 to 180."""
    import shapely

    if ring.is_empty:
        return ring
    west, _, east, _ = ring.bounds
    parts = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        part = shapely.intersection(ring, shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90))
        parts.append(shapely.transform(part, lambda points, turn=turn: points - (360 * turn, 0)))
    return shapely.union_all(parts)


def _round_poles(degrees) -> np.ndarray:
    """A ring [n, 2], open, whose longitudes never jump: at a pole it goes from the longitude before to that behind, and a
    ring round a pole is closed along it."""
    at_pole = np.abs(degrees[:, 1]) >= 90 - POLE
    if at_pole.all():
        return degrees
    start = int(np.argmin(at_pole))
    degrees, at_pole = np.roll(degrees, -start, axis=0), np.roll(at_pole, -start)
    seen = degrees[~at_pole, 0]
    seen = np.unwrap(np.append(seen, seen[0]), period=360)
    ring, number = [], 0
    for (_, latitude), pole in zip(degrees, at_pole):
        if pole:
            ends = seen[number - 1], seen[number]
            ring += [(end, math.copysign(90, latitude)) for end in ends]
        else:
            ring.append((seen[number], latitude))
            number += 1
    turned = seen[-1] - seen[0]
    if abs(turned) > 180:  # once round a pole, which lies inside
        pole = math.copysign(90, degrees[:, 1].mean())
        ring += [(seen[-1], degrees[0, 1]), (seen[-1], pole), (seen[0], pole)]
    return np.array(ring)
