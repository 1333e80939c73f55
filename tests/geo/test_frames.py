"""Polygons of what was kept: the rows of the frame, and the pixels that each polygon was made of."""

import numpy as np
import pytest
import shapely
import torch
from made_up import GRIDS, ROTATED, SCALES, compression
from PIL import Image
from small import BUDGETS, prompt, random_pixels, small_model
from uhr_bat import evidence_frame
from uhr_bat.geometry_uhr_bat import tile_of, token_box
from uhr_bat.image_views_uhr_bat import image_to_tiles

TILE, PATCH = 8, 4
# Squares, portrait and landscape, even and odd margins, multiples of the finest view and others.
SIZES = [(24, 24), (15, 24), (24, 9), (48, 31), (45, 70), (100, 37), (1, 24)]


def tiles_of(image):
    return image_to_tiles(Image.fromarray(image), SCALES, TILE)


def changed_tokens(tiles, others):
    """int[N] of every scale: how much the values of each token's patch differ between two images."""
    p = TILE // PATCH
    for scale, grid in zip(SCALES, GRIDS):
        difference = np.abs(tiles[scale].astype(int) - others[scale])
        patches = difference.reshape(-1, 3, p, PATCH, p, PATCH).max((1, 3, 5)).reshape(-1, p * p)
        yield patches[tile_of(np.arange(grid[0] * grid[1]), grid[1], p)]


def pixels_inside(polygon, transform, size):
    """bool[h, w], pixels whose centre lies in a polygon of map coordinates; an edge belongs to the one below or right."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5 + 1e-6
    a, b, c, d, e, f = transform
    return shapely.contains_xy(polygon, a * columns + b * rows + c, d * columns + e * rows + f)


@pytest.mark.parametrize("size", SIZES)
def test_painting_the_pixels_of_a_polygon_changes_the_token_that_it_is_of(size):
    rng = np.random.default_rng(1)
    image = rng.integers(90, 110, (*size, 3), dtype=np.uint8)
    tiles = tiles_of(image)
    frame = evidence_frame(compression(size), size, SCALES, transform=ROTATED, crs="EPSG:32654")
    positions = [np.flatnonzero(slots >= 0) for slots in compression(size).slots[0]]
    assert len(frame) == sum(map(len, positions))
    covered = np.zeros((len(SCALES), *size), int)
    for row in frame.itertuples():
        scale_idx = SCALES.index(row.scale)
        position = positions[scale_idx][row.slot]
        inside = pixels_inside(row.geometry, ROTATED, size)
        covered[scale_idx] += inside
        if not inside.any():  # a token that is smaller than a pixel
            continue
        painted = np.where(inside[..., None], np.uint8(255), image)
        changes = list(changed_tokens(tiles, tiles_of(painted)))[scale_idx]
        assert changes.argmax() == position
        # The filter reaches two pixels of the view: half a patch, so no farther than the tokens around.
        width = GRIDS[scale_idx][1]
        rows, columns = np.abs(np.divmod(np.flatnonzero(changes), width) - np.array([divmod(position, width)]).T)
        assert max(rows.max(), columns.max()) <= 1
        if row.scale == max(size):  # a view of the image's own pixels: nothing is resized
            assert np.flatnonzero(changes).tolist() == [position]
    assert (covered == 1).all()


def test_a_row_says_what_its_slot_holds():
    # Image of 8 x 8 px. The anchor keeps token 3 and merges 0 with 1; the second scale spends nothing; the third merges
    # two places that do not touch.
    slots = [[0, 0, -1, 1], [-1] * 16, [1] + [-1] * 33 + [0, 1]]
    regions = [[4, 4, 4, 5], [-1] * 16, [7] * 36]
    result = compression((8, 8), slots, regions)
    result.importance[0][0] = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
    result.importance[0][2] = torch.arange(36.0).view(6, 6) / 100
    frame = evidence_frame(result, (8, 8), SCALES)
    assert frame.crs is None
    rows = [tuple(row) for row in frame.drop(columns="geometry").itertuples(index=False)]
    assert [row[:5] for row in rows] == [
        (8, 0, "merged", 2, 4),
        (8, 1, "kept", 1, 5),
        (24, 0, "kept", 1, 7),
        (24, 1, "merged", 2, 7),
    ]
    assert frame["score"].tolist() == pytest.approx([0.375, 0.5, 0.34, 0.175])
    assert frame["rank"].tolist() == [2, 1, 3, 4]
    side = 8 / 6
    outlines = [
        shapely.MultiPolygon([shapely.box(0, 0, 8, 4)]),
        shapely.box(4, 4, 8, 8),
        shapely.box(4 * side, 5 * side, 5 * side, 8),
        shapely.MultiPolygon([shapely.box(0, 0, side, side), shapely.box(5 * side, 5 * side, 8, 8)]),
    ]
    for geometry, outline in zip(frame.geometry, outlines):
        assert geometry.geom_type == outline.geom_type
        assert geometry.symmetric_difference(outline).area == pytest.approx(0, abs=1e-12)


def test_a_merged_region_has_the_area_of_its_tokens_and_its_holes():
    size, grid = (45, 70), (6, 6)
    ring = [7, 8, 9, 13, 15, 19, 20, 21]  # around token 14
    slots = np.full(36, -1)
    slots[ring], slots[14] = 0, 1
    result = compression(size, [[-1] * 4, [-1] * 16, slots], [[-1] * 4, [-1] * 16, [0] * 36])
    merged, middle = evidence_frame(result, size, SCALES, transform=ROTATED).geometry
    top, left, bottom, right = token_box(ring, size, grid).T
    assert merged.area == pytest.approx(4 * ((bottom - top) * (right - left)).sum())  # 2 m x 2 m a pixel
    assert len(merged.geoms) == 1 and len(merged.geoms[0].interiors) == 1
    assert shapely.Polygon(merged.geoms[0].interiors[0]).equals(middle)


def test_a_region_that_slots_disagree_about_is_the_commonest():
    result = compression((8, 8), [[0, 0, 0, -1], [-1] * 16, [-1] * 36], [[9, 3, 3, 1], [-1] * 16, [-1] * 36])
    assert evidence_frame(result, (8, 8), SCALES)["region"].tolist() == [3]


@pytest.mark.parametrize("transform", [None, (2, 0, 10, 0, -2, 20), (2, 0, 10, 0, 2, 20), ROTATED])
def test_rings_are_counterclockwise_whatever_the_transform_mirrors(transform):
    slots = [[0, 0, 0, 1], [-1] * 16, list(range(36))]
    frame = evidence_frame(compression((8, 8), slots), (8, 8), SCALES, transform=transform)
    for outline in frame.geometry:
        for polygon in shapely.get_parts(outline):
            assert polygon.exterior.is_ccw and not any(hole.is_ccw for hole in polygon.interiors)


def test_a_token_of_the_letterbox_has_a_row_without_a_place():
    # 24 x 9 px on a grid of 6 x 6: the first column of tokens, 0 and 6 in it, shows the letterbox alone.
    slots = [[-1] * 4, [-1] * 16, [0, -1, 1, -1, -1, -1, 1] + [-1] * 29]
    frame = evidence_frame(compression((24, 9), slots, [[-1] * 4, [-1] * 16, [0] * 36]), (24, 9), SCALES)
    kept, merged = frame.geometry
    assert kept.is_empty and frame["kind"].tolist() == ["kept", "merged"]
    top, left, bottom, right = token_box(2, (24, 9), (6, 6))
    assert merged.equals(shapely.box(left, top, right, bottom))


@pytest.mark.parametrize("budgets", [list(BUDGETS), 9, [0, 3, 4]])
def test_the_rows_are_the_visual_tokens_that_the_decoder_reads(budgets):
    model = small_model()
    result = model.compress(
        input_ids=prompt("image", 5, 6, num_tokens=1), pixel_values=random_pixels(), budgets=budgets
    )
    frame = evidence_frame(result, (24, 24), SCALES)
    assert len(frame) == len(result.pooler_output[0])
    assert frame["rank"].sort_values().tolist() == list(range(1, len(frame) + 1))
    (features,) = model.encode_image(random_pixels())
    for row, visual_token in zip(frame.itertuples(), result.pooler_output[0]):
        scale_idx = SCALES.index(row.scale)
        # A token's place is in the polygon where its middle is.
        middles = (
            token_box(np.arange(len(features.tokens[scale_idx])), (24, 24), GRIDS[scale_idx]).reshape(-1, 2, 2).mean(1)
        )
        inside = shapely.contains_xy(row.geometry, middles[:, 1], middles[:, 0])
        assert inside.sum() == row.tokens
        torch.testing.assert_close(features.tokens[scale_idx][inside].mean(0), visual_token)
        assert row.score == pytest.approx(float(result.importance[0][scale_idx].ravel()[inside].mean()))


def test_scales_of_another_model_are_refused():
    with pytest.raises(ValueError, match="`scales` names 2 scales, but the result has 3"):
        evidence_frame(compression((8, 8)), (8, 8), [8, 16])
