"""Tiles that are read and encoded where the question looks: how many, which, and that nothing else changes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from images import raises, random_image
from small import BUDGETS, IMAGE, count_tiles, pad_left, prompt, small_model
from uhr_bat.image_pyramids_uhr_bat import ImagePyramid, best_tiles, least_tokens, overlapping_tiles, split_tiles
from uhr_bat.modeling_importance_uhr_bat import weigh_superseded
from uhr_bat.modeling_outputs_uhr_bat import TileCache

NATIVE = {"selector": "distinct", "refinement": [3, 5], "refinement_layers": [1, 1]}


def pyramid_of(image, scales=(8, 16, 24), **kwargs):
    return ImagePyramid(image, scales, anchor=8, tile_size=8, patch_size=4, arithmetic=(1 / 255,), **kwargs)


@pytest.fixture
def image():
    return random_image(50, 37)


# Decisions


def test_every_level_gets_an_equal_share_of_what_the_anchor_leaves_and_passes_on_what_it_cannot_use():
    assert split_tiles([4, 16, 64, 144], 228) == [4, 16, 64, 144]
    assert split_tiles([4, 16, 64, 144], 60) == [4, 16, 20, 20]
    assert split_tiles([4, 16, 64], 4) == [4, 0, 0]


def test_fewer_tiles_than_the_anchor_has_are_refused_with_both_numbers():
    with raises(ValueError, "`max_tiles` is 3, but the 4 tiles of the anchor are always encoded, and count."):
        split_tiles([4, 16], 3)


def test_the_tokens_that_are_promised_are_there_whichever_tiles_are_chosen():
    rng = np.random.default_rng(0)
    num_shown = rng.integers(0, 17, 30)
    shown = np.flatnonzero(num_shown)
    promised = least_tokens(num_shown, 6)
    totals = [num_shown[rng.choice(shown, 6, replace=False)].sum() for _ in range(200)]
    assert promised == np.sort(num_shown[shown])[:6].sum() and min(totals) >= promised


@pytest.mark.parametrize("width, finer", [(2, 4), (8, 12), (3, 3), (7, 8)])
def test_tiles_of_the_next_level_that_lie_on_chosen_ones(width, finer):
    chosen = torch.arange(0, width * width, 3)
    expected = {
        row * finer + column
        for row in range(finer) for column in range(finer)
        for one in chosen.tolist()
        if row * width < (one // width + 1) * finer and (row + 1) * width > one // width * finer
        and column * width < (one % width + 1) * finer and (column + 1) * width > one % width * finer
    }  # fmt: skip
    assert overlapping_tiles(chosen, width, finer).tolist() == sorted(expected)


def test_the_best_tiles_are_taken_and_the_number_is_kept_where_there_are_too_few():
    tiles, num_shown = torch.tensor([2, 5, 7]), np.array([4, 0, 4, 4, 0, 4, 4, 4])
    assert best_tiles(torch.tensor([0.1, 0.5, 0.5]), tiles, 2, num_shown).tolist() == [5, 7]
    assert best_tiles(torch.tensor([0.1, 0.5, 0.5]), tiles, 5, num_shown).tolist() == [0, 2, 3, 5, 7]


# The model


def features_of(model, image, max_tiles, **kwargs):
    (features,) = model.encode_image(image_pyramids=[pyramid_of(image, max_tiles=max_tiles, **kwargs)])
    return features


@pytest.mark.parametrize("rules", [{}, NATIVE], ids=["paper", "ours"])
def test_with_all_tiles_nothing_changes(image, rules):
    from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor

    model = small_model(**rules)
    processor = UHRBatImageProcessor(
        crop_size={"height": 8, "width": 8}, scales=[8, 16, 24], patch_size=4, do_normalize=False
    )
    whole = model.encode_image(**processor(image, return_tensors="pt"))
    tiles = model.encode_image(**processor(image, max_tiles=14))
    ids = prompt(5, "image", 6, 7)
    for expected, found in zip(
        *(model.compress(input_ids=ids, image_features=one).tokens[0] for one in (whole, tiles))
    ):
        assert torch.equal(expected, found)


def test_the_limit_of_tiles_is_hard_and_the_tokens_are_exact(image):
    model = small_model(**NATIVE)
    calls = count_tiles(model)
    features = features_of(model, image, 7)
    counts = [min(pair) for pair in zip(BUDGETS, features.available)]
    ids = prompt(5, "image", 6, 7, num_tokens=sum(counts))
    compressed = model.compress(input_ids=ids, image_features=[features], token_counts=[counts])
    assert sum(calls) == 7 and [len(one) for one in compressed.tokens[0]] == counts
    # Tokens stand where their tiles do, and only there.
    kept = (compressed.slots[0][2] >= 0).view(3, 2, 3, 2).any(3).any(1).sum()
    assert kept <= features.pyramid.num_chosen[2]


def test_levels_down_to_the_images_own_resolution_share_one_budget(image):
    model = small_model(**NATIVE)
    features = features_of(model, image, 12, scales=None)
    assert features.scales == [8, 16, 32, 56]
    ids = prompt(5, "image", 6, num_tokens=9)
    compressed = model.compress(input_ids=ids, image_features=[features], token_counts=[[9]])
    assert len(compressed.pooler_output[0]) == 9 and compressed.scales == [[8, 16, 32, 56]]
    assert [tuple(one.shape) for one in compressed.importance[0]] == features.grids
    output = model.generate(ids, image_features=[features], token_counts=[[9]], num_beams=2, max_new_tokens=2)
    assert output.shape == (1, ids.shape[1] + 2)


@pytest.mark.parametrize("max_tiles", [1, 2, 3])
def test_levels_that_get_no_tile_are_passed_over(image, max_tiles):
    model = small_model(**NATIVE)
    features = features_of(model, image, max_tiles, scales=None)
    ids = prompt(5, "image", 6, num_tokens=2)
    compressed = model.compress(input_ids=ids, image_features=[features], token_counts=[[2]])
    seen = [int((importance > 0).any()) for importance in compressed.importance[0]]
    assert seen == [1, 0, int(max_tiles == 3), int(max_tiles > 1)]


def test_a_second_question_finds_the_tiles_of_the_first_and_a_full_cache_changes_nothing(image):
    model, ids = small_model(**NATIVE), prompt(5, "image", 6, num_tokens=9)
    features = features_of(model, image, 12, scales=None)
    calls = count_tiles(model)

    def ask(features):
        return model.compress(input_ids=ids, image_features=[features], token_counts=[[9]]).pooler_output[0]

    first, encoded = ask(features), sum(calls)
    assert torch.equal(ask(features), first) and sum(calls) == encoded
    features.cache = TileCache(2000, "cpu")  # a tile has 4 x 24 numbers of 4 bytes
    assert torch.equal(ask(features), first) and features.cache.size <= 2000
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, first) for found in pool.map(ask, [features] * 8))


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_was_encoded_travels_and_answers_as_it_did(image, travel):
    model, ids = small_model(**NATIVE), prompt(5, "image", 6, num_tokens=9)
    features = features_of(model, image, 12, scales=None)

    def ask(features):
        return model.compress(input_ids=ids, image_features=[features], token_counts=[[9]]).pooler_output[0]

    first = ask(features)
    arrived = travel(features)
    assert len(features.cache) and not len(arrived.cache) and torch.equal(ask(arrived), first)


def batch_of(samples):
    return {"image_pyramids": [pyramid_of(random_image(50, 37, seed=sample), max_tiles=12) for sample in samples]}


def test_a_worker_of_a_data_loader_hands_pyramids_on():
    loader = torch.utils.data.DataLoader([0, 1, 2], 2, num_workers=1, collate_fn=batch_of, timeout=60)
    found = [pyramid for batch in loader for pyramid in batch["image_pyramids"]]
    for idx, pyramid in enumerate(found):
        np.testing.assert_array_equal(pyramid.pixels(1, [0]), batch_of([idx])["image_pyramids"][0].pixels(1, [0]))


def test_prompts_of_a_batch_and_images_of_a_prompt_look_by_themselves(image):
    model = small_model(**NATIVE)
    one, other = features_of(model, image, 12, scales=None), features_of(model, random_image(40, 90, seed=1), 12)
    batch = pad_left(prompt(5, "image", 6, num_tokens=9), prompt(8, 5, "image", 9, "image", 4, num_tokens=9))
    counts = [[9], [9], [9]]
    compressed = model.compress(
        **batch, image_features=[one, one, other], token_counts=counts, images_per_prompt=[1, 2]
    )
    alone = model.compress(input_ids=prompt(5, "image", 6, num_tokens=9), image_features=[one], token_counts=[[9]])
    torch.testing.assert_close(compressed.pooler_output[0], alone.pooler_output[0])
    assert compressed.scales == [one.scales, one.scales, other.scales]


def test_training_reaches_the_tower_through_chosen_tiles(image):
    model = small_model(**NATIVE).train()
    ids = prompt(5, "image", 6, num_tokens=9)
    pyramids = [pyramid_of(image, None, max_tiles=12)]
    labels = ids.masked_fill(ids == IMAGE, -100)
    model(input_ids=ids, image_pyramids=pyramids, token_counts=[[9]], labels=labels).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_deeper_level_takes_the_vector_between_its_neighbours():
    embedding = small_model(native_scales=[48, 96]).model.scale_embedding
    places = torch.arange(3)
    vectors = embedding.scale_vectors
    flat = embedding(24, places) - vectors[2]
    assert len(vectors) == 5
    between = embedding(round(24 * 2**0.5), places * 0) - (vectors[2] + vectors[3]) / 2
    torch.testing.assert_close(between, flat[:1].expand(3, -1), atol=0.02, rtol=0)
    each = embedding(torch.tensor([24, 48, 192]), places)
    torch.testing.assert_close(each[2], embedding(192, places)[2])
    torch.testing.assert_close(each[0], embedding(24, places)[0])


def test_a_pyramid_without_a_limit_or_with_other_tiles_is_refused(image):
    model = small_model()
    with pytest.raises(ValueError, match="does not say how many tiles a question may use: pass `max_tiles`"):
        model.encode_image(image_pyramids=[pyramid_of(image)])
    other = ImagePyramid(image, [16], tile_size=16, patch_size=4, max_tiles=3)
    with pytest.raises(ValueError, match="has tiles of 16 px with patches of 4 px, but the model's have 8 and 4 px"):
        model.encode_image(image_pyramids=[other])


def test_what_is_encoded_closer_weighs_less_from_the_third_level_on():
    grids = [(2, 2), (4, 4), (8, 8), (16, 16), (32, 32)]
    positions = [torch.arange(side * side) for side, _ in grids]
    positions[3] = torch.tensor([row * 16 + column for row in range(4) for column in range(2, 6)])  # of two tiles
    positions[4] = torch.tensor([5 * 32 + 6])
    maps = [torch.ones(len(one)) for one in positions]
    found = weigh_superseded(maps, positions, grids, 2, 0.25)
    assert all(torch.equal(*pair) for pair in zip(found[:2], maps)) and torch.equal(found[4], maps[4])
    below = (found[2] == 0.25).nonzero()[:, 0].tolist()
    assert below == [row * 8 + column for row in range(2) for column in range(1, 3)]
    assert found[3].tolist() == [0.25 if place == 2 * 16 + 3 else 1 for place in positions[3].tolist()]
