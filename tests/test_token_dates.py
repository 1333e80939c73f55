"""Two dates of one place: where the tokens of one lie on the other, and what is kept because it differs."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio.transform
import rasterio.warp
import torch
from PIL import Image
from small import BUDGETS, prompt, random_pixels, small_model
from uhr_bat import register
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.token_dates_uhr_bat import difference, inverse, places_of, read_at, scale_beside

GRID = (9, 9)
EVERY = torch.arange(81)
SAME = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def picture(height, width, transform=None, crs=None):
    return SimpleNamespace(height=height, width=width, transform=transform, crs=crs, filename=f"{height} x {width}")


def moved(registration, y, x):
    return (np.array(registration) @ (y, x, 1)).tolist()


def test_images_without_a_place_are_registered_by_their_pixels():
    assert np.allclose(register(picture(30, 40), picture(60, 80)), SAME)
    # A wide image on a square one: its height, the middle half of its square, is all of the other's.
    registration = register(picture(20, 40), picture(10, 10))
    assert moved(registration, 0.25, 0.5) == pytest.approx([0, 0.5])
    assert moved(registration, 0.75, 1.0) == pytest.approx([1, 1])


def test_windows_of_images_without_a_place_are_parts_of_the_whole_images(tmp_path):
    for name, side in (("small.png", 40), ("large.png", 80)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    small, large = (
        UHRBatImageProcessor().open_image(tmp_path / name, window=(20, 20, 40, 40))
        for name in ("small.png", "large.png")
    )
    # The last half of one and the second quarter of the other meet in a corner alone.
    with pytest.raises(ValueError, match="no common ground"):
        register(small, large)
    whole = UHRBatImageProcessor().open_image(tmp_path / "small.png")
    assert np.allclose(register(large, whole), [[0.25, 0, 0.25], [0, 0.25, 0.25]])


def test_images_with_a_place_are_registered_by_the_ground():
    utm = rasterio.CRS.from_epsg(32654)
    whole = picture(100, 100, rasterio.Affine(2, 0, 375000, 0, -2, 3908000), utm)
    # Half as large on the ground, at another resolution, from the middle on.
    corner = picture(400, 400, rasterio.Affine(0.25, 0, 375100, 0, -0.25, 3907900), utm)
    registration = register(whole, corner)
    assert moved(registration, 0.5, 0.5) == pytest.approx([0, 0], abs=1e-9)
    assert moved(registration, 1, 1) == pytest.approx([1, 1])
    assert np.allclose(inverse(registration), register(corner, whole))
    degrees = rasterio.warp.transform_bounds(utm, "EPSG:4326", 375000, 3907800, 375200, 3908000)
    geographic = picture(100, 100, rasterio.transform.from_bounds(*degrees, 100, 100), rasterio.CRS.from_epsg(4326))
    assert np.allclose(register(whole, geographic), SAME, atol=0.02)
    apart = picture(100, 100, rasterio.Affine(2, 0, 475000, 0, -2, 3908000), utm)
    with pytest.raises(ValueError, match="no common ground: 100 x 100 and 100 x 100 lie apart"):
        register(whole, apart)
    # What encloses it overlaps, but a corner of the other is cut off by the diagonal.
    diagonal = picture(100, 100, rasterio.Affine(2, 2, 375210, 2, -2, 3907900), utm)
    beside = picture(100, 100, rasterio.Affine(2, 0, 375200, 0, -2, 3908000), utm)
    for other in (diagonal, beside):
        with pytest.raises(ValueError, match="no common ground.* but for a narrow strip"):
            register(whole, other)
    # A map of the world, most of which no zone of UTM has.
    world = picture(18_000_000, 36_000_000, rasterio.Affine(1e-5, 0, -180, 0, -1e-5, 90), rasterio.CRS.from_epsg(4326))
    y, x = moved(register(whole, world), 0.5, 0.5)
    lon, lat = rasterio.warp.transform(utm, "EPSG:4326", [375100], [3907900])
    assert (y, x) == pytest.approx((0.25 + (90 - lat[0]) / 360, (lon[0] + 180) / 360), abs=1e-9)
    assert np.allclose(inverse(register(world, whole)), register(whole, world))
    # Longitudes of one of them go on where those of the other begin anew.
    wgs84, zone, web = map(rasterio.CRS.from_epsg, (4326, 32701, 3857))
    fiji = [picture(50, 50, rasterio.Affine(0.02, 0, west, 0, -0.02, -17), wgs84) for west in (179.5, -180.5)]
    assert np.allclose(register(*fiji), SAME) and np.allclose(register(*reversed(fiji)), SAME)
    seam = picture(100, 100, rasterio.Affine(200, 0, 171937, 0, -200, 8039394), zone)
    wests = [x - 4600 * 25 for x in (20037508.34, -20037508.34)]
    webs = [picture(50, 50, rasterio.Affine(4600, 0, west, 0, -2300, -1920000), web) for west in wests]
    for one in (seam, *webs):
        found = [register(one, other) for other in fiji] + [inverse(register(other, one)) for other in fiji]
        assert all(np.allclose(other, found[0], atol=0.01) for other in found[1:])
        assert moved(found[0], 0.5, 0.5)[1] == pytest.approx(0.5, abs=0.01)
    large = picture(1000, 1000, rasterio.Affine(1000, 0, 0, 0, -1000, 4_000_000), utm)
    degrees = rasterio.warp.transform_bounds(utm, "EPSG:4326", 0, 3_000_000, 1_000_000, 4_000_000)
    bent = picture(1000, 1000, rasterio.transform.from_bounds(*degrees, 1000, 1000), rasterio.CRS.from_epsg(4326))
    with pytest.raises(ValueError, match="bent against each other by .*warp one onto the grid"):
        register(large, bent)


def test_values_are_read_between_the_centres_of_the_tokens_that_there_are():
    values = torch.tensor([[1.0], [3.0], [5.0]])  # of the tokens 0, 1 and 3 of a grid of 2 x 2
    found, known = read_at(
        torch.tensor([[0.0, 0.25], [0.5, 0.5], [-0.4, 0.0], [1.0, 0.0], [5.0, 5.0]]),
        values, torch.tensor([0, 1, 3]), (2, 2),
    )  # fmt: skip
    assert known.tolist() == [True, True, True, False, False]
    assert found[:3, 0].tolist() == pytest.approx([1.5, 3.0, 1.0])


def features(seed=0):
    return torch.randn(81, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [0, 1, -1])
def test_what_changed_differs_most_in_other_light_and_when_all_lies_a_token_apart(columns):
    before = features()
    after = before.view(*GRID, -1).roll(columns, 1).reshape(81, -1).clone()
    after[40] = features(1)[40]
    after = 1.05 * after + features(2)[0]  # brighter, in haze
    found = difference(after, places_of(EVERY, GRID, GRID, SAME), before, EVERY, GRID)
    inside = found.view(GRID)[:, 1:-1]  # what came in at the edge differs, too
    assert found.argmax() == 40 or columns
    assert inside.argmax() == 4 * 7 + 3 and inside.flatten().sort().values[-2] < found[40] / 20


def test_dates_that_are_equal_or_show_other_ground_are_all_alike():
    ones = torch.ones(81)
    places = places_of(EVERY, GRID, GRID, SAME)
    assert torch.equal(difference(features(), places, features(), EVERY, GRID), ones)
    assert torch.equal(difference(features(), places + 50, features(1), EVERY, GRID), ones)
    assert torch.equal(difference(features(), places, features(1)[:0], EVERY[:0], GRID), ones)


def test_what_only_one_date_shows_takes_no_part_in_what_changed():
    before, after = (
        features(),
        features(2),
    )  # of other ground, in other colours, but for the five columns that both show
    after += 9
    after.view(*GRID, -1)[:, :5] = before.view(*GRID, -1)[:, 4:]
    after[40] = features(1)[40]
    shift = [[1.0, 0.0, 0.0], [0.0, 1.0, 4 / 9]]
    found = difference(after, places_of(EVERY, GRID, GRID, shift), before, EVERY, GRID)
    # Of 45 tokens one changed, and moves their mean by a 45th.
    assert found[40] == pytest.approx(44) and found.view(GRID)[:, :5].sum() == pytest.approx(45)
    assert (found.view(GRID)[:, 5:] == 1).all()


def test_the_scale_of_the_other_date_is_the_one_of_as_large_tokens_on_the_ground():
    grids = [(12, 12), (24, 24), (48, 48)]
    quarter = [[4.0, 0.0, 0.0], [0.0, 4.0, -1.0]]  # all of the other is a sixteenth of this square
    assert [scale_beside(grid, grids, SAME) for grid in grids] == [0, 1, 2]
    assert [scale_beside(grid, grids, quarter) for grid in grids] == [0, 0, 0]
    assert [scale_beside(grid, grids, inverse(quarter)) for grid in grids] == [2, 2, 2]
    assert scale_beside((96, 96), grids, SAME) == 2


# ---- A model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_model(selector="distinct")


def kept(model, pixels, **images):
    ids = prompt("image", "image", 5, 6, 7, num_tokens=1)
    images |= {"budgets": [2 * budget for budget in BUDGETS], "images_per_prompt": [len(pixels)]}
    return model.model.compress(ids, pixel_values=pixels, **images)


def test_equal_dates_keep_what_each_keeps_by_itself(model):
    pixels = random_pixels(1).expand(2, -1, -1, -1, -1)
    # A tensor that goes along with the others to their device and type is a map, too.
    alone, both = kept(model, pixels), kept(model, pixels, registration=torch.tensor([SAME], dtype=torch.bfloat16))
    assert alone.differences is None and all((maps[2] == 1).all() for maps in both.differences)
    for one, other in zip(alone.slots, both.slots):
        assert [slots.tolist() for slots in one] == [slots.tolist() for slots in other]


def test_what_changed_is_weighed_at_both_dates_by_the_mean_importance_of_both(model):
    pixels = random_pixels(1).repeat(2, 1, 1, 1, 1)
    pixels[1, 5] = 9 * random_pixels(1, seed=1)[0, 5]  # the first tile of the finest scale
    alone, both = kept(model, pixels), kept(model, pixels, registration=[SAME])
    mean = (alone.importance[0][2] + alone.importance[1][2]) / 2
    for date in (0, 1):
        differences = both.differences[date][2]
        assert differences.mean() == pytest.approx(1) and differences.flatten()[[0, 1, 6, 7]].min() > 2
        assert torch.allclose(both.importance[date][2], mean * (0.1 + differences), rtol=1e-4)
        assert [len(tokens) for tokens in both.tokens[date]] == list(BUDGETS)


def test_other_numbers_of_images_are_no_two_dates(model):
    ids = prompt("image", 5, num_tokens=1)
    with pytest.raises(ValueError, match="2 images of one place in a prompt. Got 1"):
        model.model.compress(ids, pixel_values=random_pixels(1), registration=[SAME])
    with pytest.raises(ValueError, match="`registration` has 2 entries, but there are 1 prompts"):
        kept(model, random_pixels(2), registration=[SAME, SAME])
    for wrong in (None, "north", [[0.0] * 3] * 2, [[1, 0, float("nan")], [0, 1, 0]]):
        with pytest.raises(ValueError, match=rf"A registration is .* Got {re.escape(str(wrong))}"):
            kept(model, random_pixels(2), registration=[wrong])
