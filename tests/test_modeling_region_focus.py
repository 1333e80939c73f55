"""The region focus module and Algorithm 1 of LRS-VQA: attention against plain attention, tiles and tokens against loops."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import IMAGE, PAD, small_config, small_model
from uhr_bat.geo import evidence_frame, page_html, visual_tokens, write_raster
from uhr_bat.image_pyramids_uhr_bat import DynamicPyramid, dynamic_levels
from uhr_bat.modeling_region_focus_uhr_bat import next_tiles
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.pictures import attention_picture, kept_picture

TILE, PATCH, SEPARATOR = 8, 2, 4
FOCUS = {"layers": [0, 2], "separator_token_id": SEPARATOR}
VISION = small_config().vision_config.to_dict() | {"patch_size": PATCH}
IDS = torch.tensor([[5, 6, IMAGE, 7, 8, 9]])


def focus_model(**changes):
    model = small_model(vision_config=VISION, region_focus=FOCUS | changes)
    torch.nn.init.normal_(model.model.image_newline, std=0.3)
    return model


def picture(height=60, width=90, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return DynamicPyramid(Image.fromarray(pixels), tile_size=TILE, patch_size=PATCH)


def looked_at(model, pyramid, ids=IDS, budget=None):
    return model.compress(input_ids=ids, image_pyramids=[pyramid], budgets=budget)


def pooled(model, pyramid, level_idx):
    """float[rows, columns, D] of a whole level, cut to what shows the image: a loop over tiles."""
    level = pyramid.levels[level_idx - 1]
    p = TILE // PATCH
    canvas = torch.zeros(level.tiles[0] * p // 2, level.tiles[1] * p // 2, model.config.text_config.hidden_size)
    for tile in range(level.tiles[0] * level.tiles[1]):
        pixels = torch.from_numpy(pyramid.tiles(level_idx, [tile]))
        with torch.no_grad():
            tokens = model.model.multi_modal_projector(model.model.vision_tower(pixels))[0].view(p, p, -1)
        row, column = (p // 2 * idx for idx in divmod(tile, level.tiles[1]))
        canvas[row : row + p // 2, column : column + p // 2] = (
            tokens[0::2, 0::2] + tokens[1::2, 0::2] + tokens[0::2, 1::2] + tokens[1::2, 1::2]
        ) / 4  # bilinear to half the size
    return canvas[: level.grid[0], : level.grid[1]]


# ---- The module -----------------------------------------------------------------------------------------------------


def test_without_a_region_focus_there_is_nothing_of_it():
    names = small_model().state_dict()
    assert not any("region_focus" in name or "newline" in name for name in names)
    assert set(focus_model().state_dict()) - set(names) and small_config().region_focus is None


def plain_attention(model, sequence, mask=None):
    """float[heads, M]: softmax-free products of the last token at the module's last layer, by the library's own eager run
    of a decoder that has the module's layers."""
    decoder, module = model.model.language_model, model.model.region_focus
    M = sequence.shape[1]
    position = torch.arange(M)
    allowed = position[None] <= position[:, None]
    if mask is not None:
        allowed = allowed & mask.bool()[None]
    bias = torch.zeros(1, 1, M, M).masked_fill(~allowed, torch.finfo(torch.float32).min)
    cos, sin = decoder.rotary_emb(sequence, position[None])
    hidden = module.layers[0](
        sequence, attention_mask=bias, position_ids=position[None], position_embeddings=(cos, sin)
    )
    attention = module.layers[-1].self_attn
    hidden = module.layers[-1].input_layernorm(hidden)[0]
    query = attention.q_proj(hidden).view(M, -1, attention.head_dim)
    key = attention.k_proj(hidden).view(M, -1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, 1)

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos[0][:, None] + torch.cat((-second, first), -1) * sin[0][:, None]

    return torch.einsum("hd,mhd->hm", turn(query)[-1], turn(key)) / attention.head_dim**0.5


def head_and_tail(model, features):
    embed = model.get_input_embeddings()
    head = torch.cat((embed(IDS[0, :2]), features.thumbnail, embed(torch.tensor([SEPARATOR]))))
    return head, embed(IDS[0, 3:])


@torch.no_grad()
def test_scores_of_a_whole_level_are_the_last_tokens_attention_among_its_tokens():
    model, pyramid = focus_model(), picture()
    features = model.encode_image(image_pyramids=[pyramid])[0]
    head, tail = head_and_tail(model, features)
    level = pyramid.levels[0]
    found = model.model.level_tokens(features, 1, list(range(level.tiles[0] * level.tiles[1])))
    H, W = level.grid
    rows = pooled(model, pyramid, 1)
    newline = model.model.image_newline.expand(H, 1, -1)
    torch.testing.assert_close(found.tokens, torch.cat((rows, newline), 1).flatten(0, 1))
    assert found.places.tolist() == list(range(H * (W + 1)))
    logits = plain_attention(model, torch.cat((head, found.tokens, tail))[None])
    expected = logits[:, len(head) : len(head) + len(found.tokens)].softmax(-1).mean(0)
    torch.testing.assert_close(model.model.focus_scores(head, tail, found), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["additive", "upstream"])
def test_what_is_not_there_has_no_part_in_the_attention_or_as_upstream_a_part_of_the_sum(mode):
    model, pyramid = focus_model(mask_mode=mode), picture()
    features = model.encode_image(image_pyramids=[pyramid])[0]
    head, tail = head_and_tail(model, features)
    level = pyramid.levels[1]
    found = model.model.level_tokens(features, 2, [0, 5, 9])
    number = level.num_tokens
    canvas = torch.zeros(number, head.shape[1])
    canvas[found.places] = found.tokens
    there = torch.zeros(number, dtype=torch.bool)
    there[found.places] = True
    mask = torch.cat((torch.ones(len(head)), there.float(), torch.ones(len(tail))))
    logits = plain_attention(model, torch.cat((head, canvas, tail))[None], mask)[:, len(head) : len(head) + number]
    logits = logits + (~there).float() if mode == "upstream" else logits.masked_fill(~there, float("-inf"))
    expected = logits.softmax(-1).mean(0)[found.places]
    torch.testing.assert_close(model.model.focus_scores(head, tail, found), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_is_not_there_leaves_no_place_where_levels_are_packed():
    model, pyramid = focus_model(mask_mode="packed"), picture()
    features = model.encode_image(image_pyramids=[pyramid])[0]
    head, tail = head_and_tail(model, features)
    found = model.model.level_tokens(features, 2, [0, 5, 9])
    logits = plain_attention(model, torch.cat((head, found.tokens, tail))[None])
    expected = logits[:, len(head) : len(head) + len(found.tokens)].softmax(-1).mean(0)
    torch.testing.assert_close(model.model.focus_scores(head, tail, found), expected, rtol=1e-4, atol=1e-6)


# ---- From tokens to tiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4000, 4000), (5304, 7920), (1500, 340)])
def test_the_tile_of_a_token_is_where_its_middle_lies(size):
    levels = dynamic_levels(size, 336, 14)
    for level, finer in zip(levels, levels[1:]):
        H, W = level.grid
        for row, column in ((0, 0), (H // 2, W // 3), (H - 1, W - 1)):
            middle = [(idx + 0.5) / number * end for idx, number, end in zip((row, column), (H, W), finer.grid)]
            tile = [int(at // 12) for at in middle]
            (found,) = next_tiles(torch.tensor([row * (W + 1) + column]), level, finer).tolist()
            assert divmod(found, finer.tiles[1]) == tuple(tile)
        newline = next_tiles(torch.tensor([W]), level, finer).tolist()
        assert newline == next_tiles(torch.tensor([W - 1]), level, finer).tolist()


def plant(monkeypatch, model, place_of):
    """The module looks at one token of every level: that nearest to the place (row, column) in 0..1."""
    asked = []

    def scores(before, after, found):
        level = found.level
        rows, columns = found.places // (level.grid[1] + 1), found.places % (level.grid[1] + 1)
        asked.append((level.grid, len(found.places)))
        away = (rows + 0.5) / level.grid[0] - place_of[0], (columns + 0.5) / level.grid[1] - place_of[1]
        return 1 / (0.01 + away[0] ** 2 + away[1] ** 2)

    monkeypatch.setattr(model.model, "focus_scores", scores)
    return asked


def test_the_descent_ends_at_the_images_own_resolution_where_the_question_looks(monkeypatch):
    model, pyramid = focus_model(), picture(200, 300)
    asked = plant(monkeypatch, model, (0.9, 0.1))
    out = looked_at(model, pyramid)
    assert [grid for grid, _ in asked] == [level.grid for level in pyramid.levels]
    assert [len(tokens) for tokens in out.tokens[0][1:-1]] == [0] * (len(pyramid.levels) - 1)
    kept = out.slots[0][-1] >= 0
    rows, columns = np.divmod(kept.nonzero()[:, 0].numpy(), pyramid.grids[-1][1])
    H, W = pyramid.grids[-1]
    assert np.abs((rows + 0.5) / H - 0.9).max() < 0.2 and np.abs((columns + 0.5) / W - 0.1).max() < 0.2
    # What is kept are the tokens of these places, with a newline after each row, behind thumbnail and separator.
    whole, tokens = pooled(model, pyramid, len(pyramid.levels)), iter(out.tokens[0][-1])
    for row in np.unique(rows):
        for column in columns[rows == row]:
            torch.testing.assert_close(next(tokens), whole[row, column], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(next(tokens), model.model.image_newline.detach())
    assert next(tokens, None) is None
    assert torch.equal(out.pooler_output[0], torch.cat(out.tokens[0]))
    assert len(out.tokens[0][0]) == (TILE // PATCH) ** 2 + 1


def test_more_tiles_than_n_max_end_the_descent_before_them(monkeypatch):
    model = focus_model(n_max=1, alpha_select=1.0)
    asked = plant(monkeypatch, model, (0.5, 0.5))
    out = looked_at(model, picture(200, 300))
    assert len(asked) == 1 and len(out.tokens[0]) == 2 and len(out.tokens[0][1])


def test_the_released_code_looks_at_two_levels(monkeypatch):
    model = focus_model(max_levels=2, n_max=None)
    asked = plant(monkeypatch, model, (0.5, 0.5))
    assert len(looked_at(model, picture(200, 300)).tokens[0]) == 3 and len(asked) == 2


def test_newlines_that_vote_pull_the_last_tile_of_every_row(monkeypatch):
    pyramid, columns = picture(200, 300), {}
    for votes in (False, True):
        model = focus_model(newline_votes=votes, n_max=None, max_levels=2)
        plant(monkeypatch, model, (0.1, 0.1))
        read = []
        encode = model.model.level_tokens
        monkeypatch.setattr(model.model, "level_tokens", lambda *given: read.append(given) or encode(*given))
        out = looked_at(model, pyramid)
        width = pyramid.levels[1].tiles[1]
        columns[votes] = {tile % width for tile in read[1][2]}
        newlines = int((out.tokens[0][2] == model.model.image_newline).all(-1).sum())
        assert newlines == pyramid.levels[1].grid[0] if votes else newlines < pyramid.levels[1].grid[0]
    assert width - 1 in columns[True] and width - 1 not in columns[False]


# ---- Budgets, prompts, images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [19, 23, 30, 41])
def test_a_budget_is_the_most_that_an_image_takes(budget):
    model, pyramid = focus_model(alpha_select=0.9, n_max=None), picture(200, 300)
    number = len(looked_at(model, pyramid, budget=budget).pooler_output[0])
    assert budget - 1 <= number <= budget  # a token that needs a newline of its own may not fit


def test_rules_of_other_images_are_refused_by_name():
    model, images = focus_model(), {"image_pyramids": [picture()]}
    with pytest.raises(ValueError, match="pruned by Algorithm 1.*`region_focus`: leave `rules` out"):
        model.compress(input_ids=IDS, **images, rules={"selector": "uniform"})
    plain = model.compress(input_ids=IDS, **images)
    same = model.compress(input_ids=IDS, **images, rules={"selector": model.config.selector})
    assert all(map(torch.equal, plain.pooler_output, same.pooler_output))


def test_a_budget_without_room_for_a_token_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="18 visual tokens is too small: the thumbnail and the separator take 17"):
        looked_at(focus_model(), picture(), budget=18)
    with pytest.raises(ValueError, match=r"one number. Got \[1, 2, 3\]"):
        looked_at(focus_model(), picture(), budget=[1, 2, 3])


def test_what_was_kept_is_refused_by_pictures_and_maps_which_know_letterboxed_views_alone(tmp_path):
    out = looked_at(focus_model(), picture())
    image = Image.new("RGB", (90, 60))
    for refusing in (
        lambda: write_raster(tmp_path / "map.tif", out, (60, 90), out.scales[0], {}),
        lambda: page_html(out, None, image, out.scales[0], {}),
        lambda: list(visual_tokens(out)),
        lambda: out.places(0),
        lambda: kept_picture(out, Image.new("RGB", (90, 60))),
        lambda: attention_picture(out, Image.new("RGB", (90, 60))),
        lambda: evidence_frame(out, (60, 90), out.scales[0]),
    ):
        with pytest.raises(ValueError, match="without `dynamic_pyramid`"):
            refusing()


def test_a_small_image_is_its_thumbnail():
    out = looked_at(focus_model(), picture(TILE, 5))
    assert [len(tokens) for tokens in out.tokens[0]] == [(TILE // PATCH) ** 2]


def test_a_batch_answers_as_each_prompt_alone_and_the_image_is_encoded_once():
    model, pyramid = focus_model(), picture()
    features = model.encode_image(image_pyramids=[pyramid])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    prompts = [IDS, torch.tensor([[9, IMAGE, 11, 12, 13, 14]])]
    alone = [model.generate(ids, image_pyramids=[pyramid], **options)[0, -4:] for ids in prompts]
    together = model.generate(torch.cat(prompts), image_features=features * 2, **options)
    assert torch.equal(together[:, -4:], torch.stack(alone))
    encoded = len(features[0].cache)
    assert encoded > 1 and torch.equal(
        model.generate(IDS, image_features=features, **options)[0, -4:], alone[0]
    ) and len(features[0].cache) == encoded  # fmt: skip


def test_two_images_of_a_prompt_share_a_budget():
    model, ids = focus_model(), torch.tensor([[5, IMAGE, 6, IMAGE, 7, 8]])
    pyramids = [picture(seed=1), picture(seed=2)]
    out = model.compress(input_ids=ids, image_pyramids=pyramids, budgets=50)
    assert out.images_per_prompt == [2] and all(len(one) <= 25 for one in out.pooler_output)
    beams = model.generate(ids, image_pyramids=pyramids, budgets=50, num_beams=2, max_new_tokens=3, pad_token_id=PAD)
    assert beams.shape[0] == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`region_focus` of the configuration is None"):
        small_model(vision_config=VISION).compress(input_ids=IDS, image_pyramids=[picture()])
    with pytest.raises(ValueError, match="2 placeholders came with 1 dynamic"):
        looked_at(focus_model(), picture(), torch.tensor([[IMAGE, 5, IMAGE, 6]]))
    for changes, message in (
        ({"layers": [0, 9]}, "decoder layers, 0 to 2"),
        ({"alpha_keep": 0}, "a share above 0"),
        ({"n_max": 0}, "at least 1, or None"),
        ({"mask_mode": "none"}, "'additive', 'upstream' or 'packed'"),
        ({"shape": 3}, "has no shape"),
    ):
        with pytest.raises(Exception, match=message):
            focus_model(**changes)
    with pytest.raises(Exception, match="there is no `region_focus`"):
        small_config(importance_source="region_focus")


# ---- The module as the source of our own importance -----------------------------------------------------------------


@torch.no_grad()
def test_importance_is_read_from_the_module_where_the_configuration_says_so():
    model = small_model(region_focus=FOCUS, importance_source="region_focus")
    model.model.region_focus.start_from(model.model.language_model, [0, 1])
    own = small_model()
    own.model.load_state_dict({k: v for k, v in model.model.state_dict().items() if k in own.model.state_dict()})
    anchor = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    found, expected = (one.estimate_importance(IDS[0], anchor) for one in (model, own))  # layer 1, of both
    torch.testing.assert_close(found, expected)
    model.model.region_focus.start_from(model.model.language_model, [0, 2])
    assert not torch.allclose(model.estimate_importance(IDS[0], anchor), expected)


def test_a_folder_brings_the_module_along(tmp_path):
    model = focus_model()
    model.save_pretrained(tmp_path)
    again = UHRBatForConditionalGeneration.from_pretrained(tmp_path)
    pyramid = picture()
    with torch.no_grad():
        found, expected = (looked_at(one.eval(), pyramid).pooler_output[0] for one in (again, model))
    torch.testing.assert_close(found, expected)
    assert again.config.focus.layers == (0, 2)
