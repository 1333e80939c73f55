"""The pointer: its factors against plain loops, one token for each object, and an answer of which the first token alone changes."""

import numpy as np
import pytest
import torch
from small import BUDGETS, GRIDS, IMAGE, pad_left, prompt, random_pixels, small_config, small_model
from uhr_bat.modeling_pointing_uhr_bat import BLURS, MAP_SIDE, Pointing, Seen, count_points
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.planning.costs import pointer_flops
from uhr_bat.planning.flops import FlopMeter

QUESTION = prompt(5, "image", 6, 7, 8)
POINTER = {"hidden": 16, "width": 8, "threshold": 0.3}


def pointing_model(**changes):
    """A random model that points to some tokens and tells of them loudly."""
    model = small_model(**{"pointer": POINTER, **changes})
    torch.manual_seed(5)
    for name, parameter in model.model.pointer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.constant_(parameter, 0.5)
    torch.nn.init.normal_(model.model.pointer.tell_2.weight, std=2)
    return model


def read(model, ids=QUESTION, seed=0, **inputs):
    """(logits of the last position, what was kept) of one forward pass."""
    compressed = model.compress(input_ids=ids, pixel_values=random_pixels(seed=seed), **inputs)
    with torch.no_grad():
        logits = model(input_ids=ids, mm_encoder_outputs={"image": compressed}).logits[0, -1]
    return logits, compressed


# ---- Counting --------------------------------------------------------------------------------------------------------


def seen_at(*places):
    """`Seen` of tokens (row, column, tokens a side)."""
    rows, columns, sides = map(torch.tensor, zip(*places))
    return Seen(None, (torch.stack((rows, columns), dim=1) + 0.5) / sides[:, None], 1 / sides.float())


@pytest.mark.parametrize(
    "places, scores, kept",
    [
        ([(0, 0, 8), (0, 2, 8)], [0.9, 0.8], [0, 1]),  # a token lies between them
        ([(0, 0, 8), (0, 1, 8)], [0.7, 0.8], [1]),  # they touch: the surer one
        ([(3, 3, 8), (4, 4, 8)], [0.9, 0.8], [0]),  # by a corner
        ([(0, 0, 4), (1, 1, 8)], [0.9, 0.6], [1]),  # one inside the other: the finer one
        ([(0, 0, 4), (0, 2, 8)], [0.9, 0.6], [1]),  # of two levels, beside each other
        ([(0, 0, 4), (0, 3, 8)], [0.9, 0.6], [1, 0]),
        ([(0, 0, 8), (0, 1, 8), (0, 2, 8)], [0.6, 0.9, 0.7], [1]),
        ([(0, 0, 8), (0, 1, 8), (0, 2, 8)], [0.8, 0.6, 0.7], [0, 2]),
        ([(0, 0, 8)], [0.29], []),
    ],
)
def test_of_tokens_that_touch_or_overlap_one_counts(places, scores, kept):
    assert count_points(torch.tensor(scores), seen_at(*places), 0.3).tolist() == kept


# ---- The factors -----------------------------------------------------------------------------------------------------


def test_places_on_the_map_are_means_over_a_neighbourhood():
    model = pointing_model()
    pointer = model.model.pointer
    rng = np.random.default_rng(0)
    V = 7
    fits, trust = torch.randn(1, 2, V), torch.rand(1, V)
    centres = torch.from_numpy(rng.random((1, V, 2))).float()
    found = pointer._there(fits, trust, centres)
    cells = (centres[0] * MAP_SIDE).long()
    for token in range(V):
        for place in range(2):
            features = [fits[0, place, token], trust[0, token] * fits[0, place, token]]
            for blur in BLURS:
                near = (-((cells - cells[token]) ** 2).sum(1) / (2 * blur**2)).exp() * trust[0]
                weight = near.sum() + 0.02
                features += [(near * fits[0, place]).sum() / weight, weight.log()]
            wanted = pointer.near_2(torch.nn.functional.gelu(pointer.near_1(torch.stack(features))))
            assert torch.allclose(found[0, place, token], wanted[0], atol=1e-5)


def test_padding_of_tokens_and_of_text_changes_nothing():
    pointer = pointing_model().model.pointer
    tokens, centres = torch.randn(1, 5, 24), torch.rand(1, 5, 2)
    states, words = torch.randn(1, 3, 24), torch.randn(1, 3, 24)
    visible, heard = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    alone = pointer.point(pointer.see(tokens), centres, visible, states, words, heard)
    pad = torch.nn.functional.pad
    padded = pointer.point(
        pointer.see(pad(tokens, (0, 0, 0, 2), value=3.0)),
        pad(centres, (0, 0, 0, 2), value=0.5),
        pad(visible, (0, 2)),
        *(pad(one, (0, 0, 2, 0), value=3.0) for one in (states, words)),
        pad(heard, (2, 0)),
    )
    assert torch.allclose(alone.of_places, padded.of_places[..., :5], atol=1e-6)
    assert alone.scores.shape == (1, 5) and torch.equal(alone.scores, alone.of_places.amax(1))


def test_tokens_are_seen_without_where_they_lie():
    model = pointing_model()
    features = model.encode_image(random_pixels())[0]
    compressed = model.compress(input_ids=QUESTION, image_features=[features])
    seen = model.model.seen_tokens(compressed, 0)
    places = compressed.places(0)
    wanted = torch.cat([(one.points + 0.5) / torch.tensor(one.grid) for one in places])
    assert torch.allclose(seen.centres, wanted)
    assert torch.allclose(seen.sides, torch.cat([torch.full((n,), 1 / grid[0]) for n, grid in zip(BUDGETS, GRIDS)]))
    for scale, (rows, slots) in enumerate(zip(compressed.tokens[0], compressed.slots[0])):
        plain = model.model.without_scale(features, scale)
        means = torch.stack([plain[slots == slot].mean(0) for slot in range(len(rows))])
        start = sum(BUDGETS[:scale])
        assert torch.allclose(seen.tokens[start : start + len(rows)], means, atol=1e-5)


def pointing_of(of_places, places):
    """What is pointed to with given probabilities float[2, V] for either place, in words float[2, 2 D]."""
    certain = torch.full((1, of_places.shape[1]), 50.0)
    one = torch.full((1,), 50.0)
    zeros = torch.zeros(1, 2, of_places.shape[1])
    return Pointing(certain, certain, of_places.logit()[None], zeros, one, one, places[None])


@pytest.mark.parametrize(
    ("of_places", "more"),
    [
        (((0.9, 0.0, 0.0, 0.9), (0.0, 0.9, 0.0, 0.0)), 1),  # two and one
        (((0.9, 0.0, 0.0, 0.0), (0.0, 0.9, 0.0, 0.8)), -1),
        (((0.9, 0.0, 0.3, 0.0), (0.0, 0.9, 0.0, 0.2)), 1),  # one each, and what is not counted
        (((0.9, 0.0, 0.0, 0.0), (0.0, 0.9, 0.0, 0.2)), -1),
    ],
)
def test_what_is_counted_and_where_there_is_more_is_told(of_places, more):
    pointer, D = pointing_model().model.pointer, 24
    places, last = torch.randn(2, 2 * D), torch.randn(1, D)
    pointer.tell_2.weight.data.zero_(), pointer.tell_2.bias.data.zero_()
    seen = Seen(None, torch.tensor([[0.1, 0.1], [0.4, 0.4], [0.7, 0.7], [0.9, 0.9]])[None], torch.full((1, 4), 0.05))
    with torch.no_grad():
        torch.nn.init.normal_(pointer.tell_number.weight)
        pointing = pointing_of(torch.tensor(of_places), places)
        every = torch.ones(1, 4, dtype=torch.bool)
        found = pointer.count(pointing, seen, every)
        names = torch.randn(1, 2, D)
        told = pointer.tell(pointing, found, names, every, last)
        number, place, _ = pointer.tell_which(last)[0].sigmoid()
        counted = (torch.tensor(of_places).amax(0) >= pointer.settings.threshold).nonzero()[:, 0]
        wanted = number * pointer.tell_number.weight[:, len(counted)]
        wanted = wanted + place * more * pointer.tell_loud.weight[0] * (names[0, 0] - names[0, 1])
    assert sorted(found.tokens[0].tolist()) == counted.tolist() and found.order.tolist() == [more]
    assert torch.allclose(told[0], wanted, atol=1e-4)


# ---- Answers ---------------------------------------------------------------------------------------------------------


def test_a_pointer_changes_the_first_token_of_an_answer_and_nothing_else():
    model = pointing_model()
    logits, compressed = read(model)
    assert 0 < int((compressed.pointed[0] > 0).sum()) < sum(BUDGETS)
    for name, parameter in model.model.pointer.named_parameters():
        if name.startswith(("tell_2", "tell_number", "tell_loud")):
            parameter.data.zero_()
    silent, _ = read(model)
    assert (logits - silent).abs().max() > 0.1
    loud = pointing_model()
    inputs = {"pixel_values": random_pixels(), "do_sample": False, "max_new_tokens": 6}
    told, untold = loud.generate(input_ids=QUESTION, **inputs), model.generate(input_ids=QUESTION, **inputs)
    start = QUESTION.shape[1]
    assert told[0, start] == logits.argmax() and told[0, start] != untold[0, start]
    # From the same first token on, both say the same.
    forced = torch.cat((QUESTION, told[:, start : start + 1]), dim=1)
    with torch.no_grad():
        visual = {"image": model.compress(input_ids=QUESTION, pixel_values=random_pixels()), "told": True}
        assert model(input_ids=forced, mm_encoder_outputs=visual).logits[0, -1].argmax() == told[0, start + 1]


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"num_beams": 1, "num_return_sequences": 1}])
def test_answers_do_not_depend_on_how_they_are_generated(settings):
    model = pointing_model()
    inputs = {"input_ids": QUESTION, "pixel_values": random_pixels(), "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, **settings))


def test_a_batch_is_what_its_prompts_are_alone():
    model = pointing_model()
    prompts = QUESTION, prompt(5, 9, "image", 30, 31), prompt(5, 6, 7)
    batch = pad_left(*prompts)
    pixels = torch.cat((random_pixels(seed=0), random_pixels(seed=1)))
    compressed = model.compress(**batch, pixel_values=pixels)
    with torch.no_grad():
        logits = model(**batch, mm_encoder_outputs={"image": compressed}).logits[:, -1]
        text = model(input_ids=prompts[2]).logits[0, -1]
    for row in range(2):
        alone, own = read(model, prompts[row], seed=row)
        assert torch.allclose(logits[row], alone, atol=1e-4)
        assert torch.allclose(compressed.pointed[row], own.pointed[0], atol=1e-5)
    assert torch.allclose(logits[2], text, atol=1e-4)


def test_in_training_the_question_ends_where_the_answer_begins():
    model = pointing_model()
    logits, alone = read(model)
    ids = torch.cat((QUESTION, torch.tensor([[11, 12]])), dim=1)
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=labels, pixel_values=random_pixels())
        padded = [torch.nn.functional.pad(one, (0, 2), value=fill) for one, fill in ((ids, 0), (labels, -100))]
        mask = (torch.arange(len(ids[0]) + 2) < len(ids[0])).long()[None]
        right = model(input_ids=padded[0], labels=padded[1], attention_mask=mask, pixel_values=random_pixels())
    assert torch.allclose(outputs.logits[0, QUESTION.shape[1] - 1], logits, atol=1e-4)
    assert torch.allclose(outputs.image_outputs.pointed[0], alone.pointed[0], atol=1e-5)
    assert torch.allclose(right.loss, outputs.loss, atol=1e-4)


def test_objects_are_the_tokens_that_are_pointed_to():
    model = pointing_model()
    _, compressed = read(model)
    ((*named,),) = model.point([[1, 2]], compressed)
    scores = compressed.pointed[0]
    assert len(named) == int((scores > 0).sum())
    starts = np.cumsum([0, *BUDGETS])
    for label, level, position, score in named:
        slot = int(compressed.slots[0][level].flatten()[position])
        assert label == "" and score == pytest.approx(float(scores[starts[level] + slot]))


def test_the_box_of_a_merged_token_is_where_it_was_counted():
    model = pointing_model(selector="preserve_and_merge", num_regions=2)
    with torch.no_grad():
        _, compressed = read(model, budgets=[1, 2, 3], ids=prompt(5, "image", 6, 7, 8, num_tokens=6))
    compressed.pointed = [torch.full((6,), 0.9)]
    (named,) = model.point([[1]], compressed)
    places = [(level, row) for level, one in enumerate(compressed.places(0)) for row in one.points.tolist()]
    assert len(named) == len(places) == 6
    for (_, level, position, _), (of_level, mean) in zip(named, places):
        members = (compressed.slots[0][level].flatten() == compressed.slots[0][level].flatten()[position]).nonzero()[
            :, 0
        ]
        width = GRIDS[level][1]
        apart = [(int(one) // width - mean[0]) ** 2 + (int(one) % width - mean[1]) ** 2 for one in members]
        own = (position // width - mean[0]) ** 2 + (position % width - mean[1]) ** 2
        assert level == of_level and own == pytest.approx(min(apart))


def test_prompts_that_nobody_points_in_are_as_without_a_pointer():
    model, plain = pointing_model(), small_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    two = prompt(5, "image", 6, "image", 7, num_tokens=7)
    pixels = random_pixels(2)
    dates = {"registration": [[[1.0, 0, 0], [0, 1, 0]]]}
    for ids, inputs in ((two, {}), (two, dates), (prompt(5, "image"), {})):
        inputs = inputs | {
            "pixel_values": pixels[: int((ids == IMAGE).any()) + (ids is two)],
            "budgets": [1, 2, 4] if ids is two else None,
        }
        if ids is two:
            inputs["budgets"] = [2, 4, 8]
        found = [one.compress(input_ids=ids, **inputs) for one in (model, plain)]
        with torch.no_grad():
            logits = [
                one(input_ids=ids, mm_encoder_outputs={"image": kept}).logits
                for one, kept in zip((model, plain), found)
            ]
        assert torch.equal(*logits)
        assert found[0].pointed is None or all(one is None for one in found[0].pointed)
        assert model.point([[1]], found[0]) == [None]


# ---- Loading, cost ---------------------------------------------------------------------------------------------------


def test_a_pointer_is_saved_loaded_and_frozen(tmp_path):
    model = pointing_model()
    model.save_pretrained(tmp_path)
    loaded = UHRBatForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not any(one.requires_grad for one in loaded.model.pointer.parameters())
    assert torch.allclose(read(loaded)[0], read(model)[0], atol=1e-3)
    assert loaded.config.pointing.threshold == 0.3


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pointer": {"width": 0}}, "`width` of `pointer` is a whole number"),
        ({"pointer": {"threshold": 1}}, "`threshold` of `pointer` is a probability"),
        ({"pointer": {"depth": 2}}, "`pointer` has no depth"),
        ({"pointer": {}, "token_mlp": True}, "without `token_mlp`"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(Exception, match=says):
        small_config(**changes)


def test_the_plan_counts_the_pointer_to_the_last_flop():
    model = pointing_model()
    with FlopMeter() as meter:
        read(model)
        with_pointer = meter.get_total_flops()
    model.model.pointer = None
    with FlopMeter() as meter:
        read(model)
        without = meter.get_total_flops()
    assert with_pointer - without == pointer_flops(model.config, sum(BUDGETS), 3)
