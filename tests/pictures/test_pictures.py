"""The pictures: where they put what, on small scenes whose object is known."""

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from uhr_bat.common.objects import ImageObject
from uhr_bat.geometry_uhr_bat import token_box
from uhr_bat.image_sources_uhr_bat import ImageSource
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps, UHRBatCompressionOutput
from uhr_bat.pictures import __main__ as command
from uhr_bat.pictures import drawing, pages
from uhr_bat.scenes import painting
from uhr_bat.token_compression_uhr_bat import cluster_regions, select_tokens

GRIDS = ((8, 8), (16, 16), (40, 40))
# (height, width), and the object's (top, left, bottom, right) in pixels: whole tokens of the anchor.
SCENES = {
    "landscape": ((120, 240), (30, 180, 60, 210)),
    "portrait": ((240, 120), (180, 30, 210, 60)),
    "square": ((240, 240), (30, 30, 90, 60)),
    "corner": ((180, 240), (0, 0, 30, 30)),
}


def shown_tokens(size, grid):
    """bool[H, W], tokens that show any of the image: pixel after pixel."""
    side = max(size)
    shown = np.zeros(grid, bool)
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = (y + 0.5 + (side - size[0]) // 2) / side, (x + 0.5 + (side - size[1]) // 2) / side
            shown[int(row * grid[0]), int(column * grid[1])] = True
    return shown


def compressed_scene(size, box, pruned=0.9):
    """What `compress` returns where the question looks at the object and nowhere else."""
    side = max(size)
    top, left, bottom, right = np.array(box) + np.tile([(side - size[0]) // 2, (side - size[1]) // 2], 2)
    inside = torch.zeros(side, side)
    inside[top:bottom, left:right] = 1
    kept = {"importance": [], "regions": [], "slots": []}
    positions = []
    for grid in GRIDS:
        places = torch.from_numpy(shown_tokens(size, grid)).flatten().nonzero()[:, 0]
        # Share of the object in every token, and a little everywhere.
        height, width = grid
        share = inside.unfold(0, side // height, side // height).unfold(1, side // width, side // width)
        importance = share.float().mean((2, 3)).flatten()[places] + 0.01
        coords = torch.stack((places // grid[1], places % grid[1]), 1) / grid[0]
        features = torch.nn.functional.one_hot((importance > 0.5).long(), 2).float()
        kept["importance"].append(importance)
        kept["regions"].append(cluster_regions(features, coords, 8, coord_weight=0.3))
        budget = max(1, round((1 - pruned) * len(places)))
        kept["slots"].append(select_tokens(importance, kept["regions"][-1], budget))
        positions.append(places)
    return UHRBatCompressionOutput(
        importance=[TokenMaps(kept["importance"], positions, GRIDS, fill=0)],
        regions=[TokenMaps(kept["regions"], positions, GRIDS, fill=-1, flat=True)],
        slots=[TokenMaps(kept["slots"], positions, GRIDS, fill=-1, flat=True)],
    )


def object_mask(size, box):
    mask = np.zeros(size, bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


def brightness(image):
    return np.asarray(image.convert("L")).astype(int)


# Geometry


def drawings_of_token(image, position, grid, **kwargs):
    """bool[height, width] of every kind of drawing: the pixels that are drawn as the one token at `position`."""
    tokens = torch.arange(grid[0] * grid[1]) == position
    drawings = [
        drawing.draw_attention(image, tokens.view(grid), 0, 1, **kwargs),
        drawing.draw_regions(image, tokens.long(), grid, **kwargs),
        drawing.draw_kept(image, torch.where(tokens, 0, -1), grid, **kwargs),
    ]
    # The lone token is a region of its own, which stays grey.
    attention, regions, kept = (np.asarray(drawing).astype(int) for drawing in drawings)
    return [attention.sum(-1) > 300, (regions == 100).all(-1), (kept == 100).all(-1)]


@pytest.mark.parametrize("size", [(45, 70), (70, 45), (69, 70), (44, 70)])
@pytest.mark.parametrize("position", [23, 45, 54, 66])
def test_a_token_is_drawn_on_the_pixels_that_its_patch_was_made_of(size, position):
    image = Image.new("RGB", size[::-1], (100, 100, 100))
    # Ten patches of 7 pixels a side: the odd pixel of the margin lies below or right of the image.
    margins = [(70 - length) // 2 for length in size]
    rows, columns = (7 * idx - margin for idx, margin in zip(divmod(position, 10), margins))
    expected = np.zeros(size, bool)
    expected[max(rows, 0) : max(rows + 7, 0), max(columns, 0) : max(columns + 7, 0)] = True
    assert expected.any()
    for drawn in drawings_of_token(image, position, (10, 10)):
        np.testing.assert_array_equal(drawn, expected)


def test_a_smaller_copy_is_drawn_on_where_the_image_itself_would_be():
    size, grid = (999, 1500), (30, 30)
    small = Image.new("RGB", (500, 333), (100, 100, 100))  # a third, whose own letterbox begins half a pixel higher
    top, left, bottom, right = (token_box(400, size, grid) / 3).tolist()
    rows, columns = np.arange(333)[:, None] + 0.5, np.arange(500) + 0.5
    expected = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
    for drawn in drawings_of_token(small, 400, grid, image_size=size):
        np.testing.assert_array_equal(drawn, expected)


def test_tokens_of_a_slot_are_counted():
    assert drawing.count_slots(torch.tensor([2, 0, 2, -1, 1, 2])).tolist() == [3, 1, 3, 0, 1, 3]
    assert drawing.count_slots(torch.tensor([-1, -1])).tolist() == [0, 0]


def test_an_image_is_made_smaller_but_never_larger():
    assert drawing.screen_image(Image.new("RGBA", (400, 100)), 200).size == (200, 50)
    assert drawing.screen_image(Image.new("L", (40, 10)), 200).size == (40, 10)
    assert drawing.screen_image(Image.new("RGB", (4000, 1)), 200).size == (200, 1)


# Golden: the object is where the pictures say


@pytest.mark.parametrize("name", SCENES)
def test_the_brightest_kept_area_covers_the_object(name):
    size, box = SCENES[name]
    result, inside = compressed_scene(size, box), object_mask(size, box)
    image = Image.new("RGB", size[::-1], (160, 160, 160))
    for slots, grid in zip(result.slots[0], GRIDS):
        drawn = brightness(drawing.draw_kept(image, slots, grid))
        brightest = drawn == drawn.max()
        assert drawn.max() == 160
        # All of the object, and little else: what is left is about a tenth.
        assert brightest[inside].all()
        assert brightest.mean() < inside.mean() + 0.2
        assert drawn[~brightest].max() < 0.6 * 160


@pytest.mark.parametrize("name", SCENES)
def test_the_brightest_attention_lies_on_the_object(name):
    size, box = SCENES[name]
    result, inside = compressed_scene(size, box), object_mask(size, box)
    image = Image.new("RGB", size[::-1], (100, 100, 100))
    for importance in result.importance[0]:
        high = float(importance.max())
        drawn = brightness(drawing.draw_attention(image, importance, 0, high))
        assert (inside == (drawn == drawn.max())).all()
        assert drawn[inside].mean() > 2 * drawn[~inside].mean()


def test_less_is_bright_at_a_smaller_budget():
    size, box = SCENES["landscape"]
    image = Image.new("RGB", size[::-1], (160, 160, 160))
    bright = []
    for pruned in (0.85, 0.95, 0.975):
        result = compressed_scene(size, box, pruned)
        bright.append((brightness(drawing.draw_kept(image, result.slots[0][-1], GRIDS[-1])) == 160).mean())
    assert 0.2 > bright[0] > bright[1] > bright[2] > 0


def test_kept_merged_and_dropped_tokens_can_be_told_apart():
    image = Image.new("RGB", (40, 40), (200, 180, 160))
    drawn = np.asarray(drawing.draw_kept(image, torch.tensor([0, 1, 1, -1]), (2, 2))).astype(int)
    assert (drawn[:20, :20] == (200, 180, 160)).all()
    merged, dropped = drawn[5, 30], drawn[30, 30]
    assert (drawn[:20, 20:] == merged).all() and (drawn[20:, :20] == merged).all()
    assert (drawn[20:, 20:] == dropped).all() and dropped.max() < 20
    # Violet, whatever the image shows there.
    assert merged[2] > merged[0] > merged[1] and 30 < merged.mean() < 120


def test_regions_have_lines_between_them_and_single_tokens_none():
    image = Image.new("RGB", (80, 80), (90, 90, 90))
    regions = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 3, 1, 1, 4, 5, 1, 1])
    drawn = np.asarray(drawing.draw_regions(image, regions, (4, 4)))
    assert (drawn[:40, 40] == 255).all()
    assert (drawn[10, 1:40] == drawn[10, 1]).all() and (drawn[10, 1] != drawn[10, 50]).any()
    # Background tokens.
    assert (drawn[60:79, 2:38] == 90).all()


def test_small_tokens_have_no_lines():
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    regions = torch.arange(32 * 32) // 32 // 8
    assert np.asarray(drawing.draw_regions(image, regions, (32, 32))).max() < 255


# Pages


@pytest.mark.slow
@pytest.mark.parametrize("size", [(120, 240), (240, 120), (6, 240), (240, 6)], ids=str)
def test_every_page_has_the_width_that_was_asked_for(size):
    box = (0, 0, min(size), min(size))
    result = compressed_scene(size, box)
    image = painting.example(size[::-1])
    question = "Where is the ship? " * 12
    drawn = [
        pages.attention_picture(result, image, question, width=700),
        pages.regions_picture(result, image, width=700),
        pages.kept_picture(result, image, question, width=700),
        pages.budgets_picture({"few": result, "more": compressed_scene(size, box, 0.5)}, image, width=700),
    ]
    for page in drawn:
        assert page.mode == "RGB" and page.width == 700
        assert 100 < page.height < 4000
        assert np.asarray(page).std() > 5


@pytest.mark.slow
def test_a_page_shows_its_panels_whole_and_upright():
    size, box = SCENES["corner"]
    result = compressed_scene(size, box)
    image = painting.example(size[::-1])
    page = pages.budgets_picture({"one": result}, image)
    # Two columns of panels with 14 pixels beside them, and a legend of 40 pixels below.
    width = (pages.WIDTH - 3 * 14) // 2
    height = round(width * size[0] / size[1])
    bottom = page.height - 14 - 40
    for left, drawn in (14, image), (28 + width, drawing.draw_kept(image, result.slots[0][-1], GRIDS[-1])):
        panel = page.crop((left, bottom - height, left + width, bottom)).resize(image.size)
        assert np.abs(np.asarray(panel).astype(int) - np.asarray(drawn)).mean() < 8


@pytest.mark.slow
def test_t_sne_colours_the_largest_regions(monkeypatch):
    monkeypatch.setattr(pages, "TSNE_TOKENS", 400)
    result = compressed_scene(*SCENES["square"])
    num_tokens = int((result.regions[0][-1] >= 0).sum())
    tokens = torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(0))
    page = pages.tsne_picture(result, tokens)
    assert page.width == pages.WIDTH
    colours = {tuple(colour) for colour in np.asarray(page).reshape(-1, 3)}
    assert {tuple(drawing.parse_colour(colour)) for colour in drawing.PALETTE} <= colours


@pytest.mark.slow
def test_t_sne_needs_the_tokens_of_its_scale():
    result = compressed_scene(*SCENES["square"])
    with pytest.raises(ValueError, match="needs the 1600 tokens of the scale, at least 5. Got 3."):
        pages.tsne_picture(result, torch.zeros(3, 6))


# The command


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    painting.write(path, (1200, 240))
    return path


@pytest.mark.slow
def test_the_command_draws_all_pictures(image_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pages, "TSNE_TOKENS", 200)
    arguments = [str(image_path), "How many ships?", "--output", str(tmp_path / "out"), "--width", "700"]
    assert command.main([*arguments, "--budgets", "8,16,24,32", "16,32,48,64"]) == 0
    names = ["attention", "regions", "kept", "budgets", "pruning", "tsne"]
    drawn = [Path(path).stem for path in capsys.readouterr().out.split()]
    assert [name for name in drawn if name != "objects"] == names  # which there are if the answer points to some
    for name in names:
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width == 700


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.png", "?"], "missing.png: there is no such image file."),
        (["IMAGE", "?", "--model", "nowhere"], "nowhere: this is no model folder"),
        (["IMAGE", "?", "--width", "200"], "at least 600 pixels"),
        (["IMAGE", "?", "--budgets", "1,2"], "2 budgets [1, 2] and 4 scales"),
    ],
    ids=["missing", "model", "width", "budgets"],
)
def test_the_command_says_what_is_wrong(image_path, tmp_path, capsys, arguments, message):
    arguments = [str(image_path) if argument == "IMAGE" else argument for argument in arguments]
    assert command.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_scikit_learn_the_command_says_what_to_install(image_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert command.main([str(image_path), "?", "--output", str(tmp_path / "out")]) == 2
    assert 'pip install "uhr-bat[pictures]"' in capsys.readouterr().err


# Small things of large images


def test_a_part_of_an_image_is_drawn_on_as_the_whole_is():
    size, grid, box = (60, 90), (18, 18), (13, 20, 43, 65)
    image, slots = Image.new("RGB", size[::-1], (100, 100, 100)), torch.arange(18 * 18) % 5 - 1
    whole = np.asarray(drawing.draw_kept(image, slots, grid))
    part = drawing.draw_kept(image.crop((20, 13, 65, 43)), slots, grid, size, box)
    np.testing.assert_array_equal(np.asarray(part), whole[13:43, 20:65])


class Waves(ImageSource):
    """An image that has a copy of an eighth of its size."""

    def __init__(self, pixels):
        self.pixels, (self.height, self.width) = pixels, pixels.shape[:2]

    def for_scale(self, side):
        return Waves(np.asarray(Image.fromarray(self.pixels).reduce(8)))

    @contextmanager
    def parts(self):
        yield lambda top, left, bottom, right: (self.pixels[top:bottom, left:right], None)


@pytest.mark.parametrize("box", [None, (101, 203, 701, 761)])
def test_a_part_of_a_smaller_copy_shows_the_very_part_that_was_asked_for(box):
    rows, columns = np.mgrid[:1024, :776]
    waves = (127 + 100 * np.sin(rows / 20) * np.cos(columns / 20)).astype(np.uint8)[..., None].repeat(3, axis=2)
    drawn, whole = (
        np.asarray(drawing.screen_image(one, 40, box), float) for one in (Waves(waves), Image.fromarray(waves))
    )
    assert drawn.shape == whole.shape and np.abs(drawn - whole).mean() < 1.5


def pink(picture):
    """bool[h, w]: where a mark is drawn."""
    pixels = np.asarray(picture).astype(int)
    return (np.abs(pixels - (255, 43, 214)) < 40).all(-1)


def test_kept_tokens_that_would_be_dots_are_shown_larger_beside_their_place():
    size, grid = (2000, 2000), (400, 400)  # a token of 5 px is 1 px of a panel
    pixels = np.full((*size, 3), 60, np.uint8)
    pixels[1500:1505, 300:305] = (0, 255, 0)
    position = 300 * 400 + 60
    maps = [TokenMaps([torch.tensor([one])], [torch.tensor([position])], [grid], fill, flat)
            for one, fill, flat in ((1.0, 0, False), (0, -1, True), (0, -1, True))]  # fmt: skip
    output = UHRBatCompressionOutput(importance=maps[:1], regions=maps[1:2], slots=maps[2:])
    picture = pages.kept_picture(output, Image.fromarray(pixels), "Where?")
    green = (np.abs(np.asarray(picture).astype(int) - (0, 255, 0)) < 60).all(-1)
    assert pink(picture).any() and green.sum() > 100


def test_objects_are_marked_where_they_are_and_the_first_are_shown_larger():
    pixels = np.full((1500, 3000, 3), 60, np.uint8)
    pixels[1000:1004, 400:408] = (0, 255, 0)
    label = r"ship of $\price$ " * 30  # which is no formula
    found = [ImageObject(label, (400, 1000, 408, 1004), score=0.9), ImageObject("buoy", point=(2900.0, 100.0))]
    picture = pages.objects_picture(found, Image.fromarray(pixels), r"Where is $\price$?")
    green = (np.abs(np.asarray(picture).astype(int) - (0, 255, 0)) < 60).all(-1)
    assert green.sum() > 10 * 8 * 4  # of which a third would be left
    panel = pink(picture)[:, : picture.width // 3]
    rows, columns = np.nonzero(panel)
    assert columns.min() < 0.25 * panel.shape[1] and columns.max() > 0.9 * panel.shape[1]
