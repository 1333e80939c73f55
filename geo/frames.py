"""What was kept of an image as a table of polygons: one row for every visual token that the decoder reads.

Letters: H and W height and width of a grid in tokens, N = H * W. Sizes are (height, width).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ..common.extras import require
from ..geometry_uhr_bat import token_corners

KEPT, MERGED = "kept", "merged"
COLUMNS = ("scale", "slot", "kind", "tokens", "region", "score", "rank")


def _commonest(values):
    return values.mode().iloc[0]


def visual_tokens(compressed, image_idx: int = 0) -> Iterator[tuple]:
    """For every scale of one image the tokens that went into its visual tokens, in the order of these:
    (grid, positions long[V], slots long[V], scores float64[V], regions long[V]), in NumPy."""
    compressed.check_letterbox()
    of_image = (field[image_idx] for field in (compressed.slots, compressed.importance, compressed.regions))
    for slots, importance, regions in zip(*of_image):
        slots = slots.cpu().numpy()
        positions = np.flatnonzero(slots >= 0)
        positions = positions[np.argsort(slots[positions], kind="stable")]
        scores, regions = importance.detach().double().cpu().numpy().ravel(), regions.cpu().numpy()
        yield tuple(importance.shape), positions, slots[positions], scores[positions], regions[positions]


def evidence_frame(
    compressed, image_size: tuple[int, int], scales: Sequence[int], *, transform=None, crs=None, image_idx: int = 0
):
    """The visual tokens of one image as a GeoDataFrame, in the order in which the decoder reads them.

    Row i is `compressed.pooler_output[image_idx][i]`. Columns:
    - scale: side of the view in pixels;
    - slot: place among the visual tokens of its scale (`compressed.slots`);
    - kind: "kept", a token of its own, or "merged", the mean of several;
    - tokens: how many;
    - region: of its tokens within the scale, the commonest one where they differ;
    - score: importance, float64, eq. 2 and 6-7; the mean of merged tokens. Comparable between scales;
    - rank: by the score, 1 is the greatest; the first of equals;
    - geometry: a Polygon of kept tokens, a MultiPolygon of merged ones, outer rings counterclockwise (in numbers: y is
      taken to grow upwards); empty for a token that shows the letterbox alone, as without `mask_padding`.

    Args:
        compressed: what `model.compress` returned.
        image_size: (height, width) in pixels of the image that the model saw.
        scales: sides of the views in pixels, `compressed.scales[image_idx]`.
        transform: from pixels to coordinates (`token_corners`), as rasterio's. None: geometry in pixels (column, row).
        crs: of these coordinates, anything that geopandas takes.
        image_idx: which image of the batch.

    Raises:
        ValueError: the result has another number of scales, or comes from a `dynamic_pyramid`.
        ImportError: geopandas is missing; says what to install.
    """
    require("geo", "geopandas")
    import geopandas as gpd
    import pandas as pd
    import shapely

    compressed.check_letterbox()
    if len(scales) != len(compressed.slots[image_idx]):
        raise ValueError(f"`scales` names {len(scales)} scales, but the result has {len(compressed.slots[image_idx])}.")
    parts = []
    for scale, (grid, positions, slots, scores, regions) in zip(scales, visual_tokens(compressed, image_idx)):
        corners = token_corners(positions, image_size, grid, transform)
        columns = {"scale": scale, "slot": slots, "tokens": 1, "region": regions, "score": scores}
        parts.append(gpd.GeoDataFrame(columns, geometry=_polygons(corners), crs=crs))
    tokens = pd.concat(parts, ignore_index=True)

    how = {"tokens": "sum", "region": _commonest, "score": "mean"}
    # Tokens of a scale share edges and never overlap, which is what "coverage" asks for.
    frame = tokens.dissolve(["scale", "slot"], how, method="coverage").reset_index()
    frame["kind"] = np.where(frame["tokens"] > 1, MERGED, KEPT)
    frame["rank"] = frame["score"].rank(method="first", ascending=False).astype(int)
    merged = frame["tokens"] > 1
    outlines = shapely.orient_polygons(frame.geometry.to_numpy())
    outlines[merged] = [shapely.MultiPolygon(shapely.get_parts(outline).tolist()) for outline in outlines[merged]]
    frame = frame.set_geometry(gpd.GeoSeries(outlines, crs=crs))
    return frame[[*COLUMNS, "geometry"]]


def _polygons(corners):
    """Polygons of [n, 4, 2]; empty ones where the corners enclose nothing."""
    import shapely

    polygons = shapely.polygons(corners)
    polygons[shapely.area(polygons) == 0] = shapely.Polygon()
    return polygons
