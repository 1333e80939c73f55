"""What changed between two dates of a place, as a table of polygons: regions of tokens that differ from the other date.

Letters: H and W height and width of a grid in tokens.
"""

import numpy as np

from ..common.extras import require
from ..geometry_uhr_bat import token_corners

CHANGE_COLUMNS = ("tokens", "score", "mean", "rank")
# Times the mean difference of an image, from which a token counts as changed.
CHANGED = 8.0


def changes_frame(
    compressed, image_size: tuple[int, int], *, least: float = CHANGED, transform=None, crs=None, image_idx: int = 1
):
    """Regions of one of two dates that differ from the other, the one that differs most first, as a GeoDataFrame.

    A region is of tokens of the finest scale that share edges. Columns:
    - tokens: how many;
    - score, mean: the greatest difference of its tokens and their mean, where 1 is the mean of the image;
    - rank: by the score, 1 is the greatest;
    - geometry: a Polygon, perhaps with holes, its outer ring counterclockwise (in numbers: y is taken to grow upwards).

    Whatever differs is there, asked about or not: other crops and shadows too. The question has no part in it.

    Args:
        compressed: what `model.compress` returned for two dates.
        image_size: (height, width) in pixels of the image that the model saw.
        least: difference from which a token counts as changed.
        transform: from pixels to coordinates (`token_corners`), as rasterio's. None: geometry in pixels (column, row).
        crs: of these coordinates, anything that geopandas takes.
        image_idx: which image of the batch.

    Raises:
        ValueError: the result is of images that were not compared.
        ImportError: geopandas is missing; says what to install.
    """
    require("geo", "geopandas")
    import geopandas as gpd
    import shapely

    if compressed.differences is None or compressed.differences[image_idx] is None:
        raise ValueError(
            "These images were not compared as two dates of one place: ask with `before`, or `dates=True`."
        )
    maps = compressed.differences[image_idx]
    differences = maps[len(maps) - 1].float().cpu().numpy()  # float[H, W]
    positions = np.flatnonzero(differences >= least)
    squares = shapely.polygons(token_corners(positions, image_size, differences.shape, transform))
    shown = shapely.area(squares) > 0
    squares, values = squares[shown], differences.ravel()[positions[shown]]
    regions = shapely.orient_polygons(shapely.get_parts(shapely.coverage_union_all(squares)))
    inside, region = shapely.STRtree(regions).query(shapely.centroid(squares), predicate="within")
    values = values[inside]
    counts = np.bincount(region, minlength=len(regions))
    score = np.zeros(len(regions))
    np.maximum.at(score, region, values)
    columns = {"tokens": counts, "score": score, "mean": np.bincount(region, values, len(regions)) / counts}
    frame = gpd.GeoDataFrame(columns, geometry=gpd.GeoSeries(regions, crs=crs), crs=crs)
    frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    frame["rank"] = np.arange(1, len(frame) + 1)
    return frame[[*CHANGE_COLUMNS, "geometry"]]
