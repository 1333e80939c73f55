"""One image and a question's importance: budgets per scale or one of all, and importance refined scale by scale."""

import pytest
import torch
from small import BUDGETS, GRIDS, IMAGE, SIZES, prompt, random_pixels, small_config, small_model
from uhr_bat import planner_of, token_rules_uhr_bat
from uhr_bat.evaluation.reducers import diversity, similarity_merging
from uhr_bat.token_compression_uhr_bat import align_importance, distinctiveness
from uhr_bat.token_rules_uhr_bat import CompressionRules, check_coverage, choose_of_all_scales, look_up

QUESTION = torch.tensor([[5, IMAGE, 6, 7, 8]])
REFINED = {"refinement": [6, 10], "refinement_layers": [0, 2]}


def half_shown():
    """int[1, N]: the image fills the upper half of every scale."""
    return torch.cat([(torch.arange(h * w) < h * w // 2).long() for h, w in GRIDS])[None]


# ---- One budget of all scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_share", [0, 0.4, 1])
@pytest.mark.parametrize("budget", [1, 5, 14, 55, 56, 70])
@pytest.mark.parametrize("selector", ["preserve_and_merge", "distinct", "top_k", "uniform", diversity])
def test_one_budget_is_spent_exactly_among_all_scales(selector, budget, anchor_share):
    rules = {"selector": selector, "anchor_share": anchor_share}
    out = small_model().compress(input_ids=QUESTION, pixel_values=random_pixels(), budgets=budget, rules=rules)
    assert len(out.pooler_output[0]) == min(budget, 56)
    for tokens, slots in zip(out.tokens[0], out.slots[0]):
        assert sorted(set(slots.tolist()) - {-1}) == list(range(len(tokens)))


def test_the_best_tokens_of_all_scales_are_kept_scale_by_scale_in_order():
    model = small_model(selector="distinct", distinctiveness_power=0.5)
    (features,) = model.encode_image(random_pixels())
    out = model.compress(input_ids=QUESTION, image_features=[features], budgets=14)
    scores = [
        importance.flatten() * distinctiveness(tokens, regions) ** 0.5
        for importance, tokens, regions in zip(out.importance[0], features.tokens, out.regions[0])
    ]
    best = torch.cat(scores).argsort(descending=True, stable=True)[:14].sort().values
    assert torch.equal(out.pooler_output[0], torch.cat(features.tokens)[best])


def test_a_share_of_one_budget_is_the_anchors_alone_and_the_finer_scales_compete_for_the_rest():
    model = small_model(selector="top_k")
    inputs = {"input_ids": QUESTION, "image_features": model.encode_image(random_pixels())}
    out = model.compress(**inputs, budgets=14, rules={"anchor_share": 0.2})
    anchor, *finer = [importance.flatten() for importance in out.importance[0]]
    wanted = [anchor.topk(min(3, len(anchor))).indices, torch.cat(finer).topk(14 - min(3, len(anchor))).indices]
    slots = [slots.flatten() for slots in out.slots[0]]
    kept = [slots[0], torch.cat(slots[1:])]
    assert [set((one >= 0).nonzero()[:, 0].tolist()) for one in kept] == [set(one.tolist()) for one in wanted]
    with pytest.raises(ValueError, match="`anchor_share` is a part of the budget, from 0 to 1. Got 1.5"):
        model.compress(**inputs, budgets=14, rules={"anchor_share": 1.5})


def test_the_anchor_whose_share_it_is_is_the_first_scale_that_shows_the_image():
    rules = CompressionRules.of(small_config(selector="top_k", anchor_share=0.5))
    sizes = (0, *SIZES[1:])
    scales = [torch.rand(size) for size in sizes], [torch.zeros(size).long() for size in sizes]
    slots, counts = choose_of_all_scales(*scales, [torch.rand(size, 4) for size in sizes], 20, rules)
    assert counts == [0, 10, 10] and [int((one >= 0).sum()) for one in slots] == counts


@pytest.mark.parametrize(
    "share, numbers, says",
    [
        (0.8, [4, 1, 1], "has 4, the finer ones have 2 .* budget of 5 .*0.8 gives them 4 and 1. Lower .* at most 0.6,"),
        (0.4, [4, 1, 1], "has 4, the finer ones have 2 .* budget of 5 .*0.4 gives them 2 and 3. Raise the budget to at least 6"),
        (0.6, [4, 1, 0], "has 4, the finer ones have 1 .*0.6 gives them 3 and 2. Raise `anchor_share` to at least 0.8"),
    ],
)
def test_coverage_names_what_was_given_where_the_anchors_share_leaves_too_few_tokens(share, numbers, says):
    rules = CompressionRules.of(small_config(coverage=True, anchor_share=share))
    regions = [torch.arange(size) % R if R else torch.full((size,), -1) for size, R in zip(SIZES, numbers)]
    with pytest.raises(ValueError, match=says):
        check_coverage(regions, 5, list(SIZES), rules)


def test_with_coverage_all_of_a_budget_may_be_the_anchors_but_not_almost_all():
    model, inputs = small_model(coverage=True), {"input_ids": QUESTION, "pixel_values": random_pixels(), "budgets": 4}
    (slots,) = model.compress(**inputs, rules={"anchor_share": 1}).slots
    assert [int((one >= 0).sum()) for one in slots] == [4, 0, 0]
    with pytest.raises(ValueError, match="budget of 4 tokens `anchor_share` 0.8 gives them 3 and 1. Lower .* at most 0.5,"):
        model.compress(**inputs, rules={"anchor_share": 0.8})


def test_an_anchors_share_that_was_asked_for_beside_budgets_of_every_scale_is_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(token_rules_uhr_bat.logger, "warning_once", said.append)
    model, inputs = small_model(), {"input_ids": QUESTION, "pixel_values": random_pixels()}
    model.compress(**inputs)
    model.compress(**inputs, budgets=14, rules={"anchor_share": 0.5})
    assert not said
    model.compress(**inputs, budgets=list(BUDGETS), rules={"anchor_share": 0.5})
    model.config.anchor_share = 0.2
    model.compress(**inputs)
    model.compress(**inputs, token_counts=torch.tensor([BUDGETS]))
    planner_of(model).plan((20, 20), seconds=False)
    assert [text[:18] for text in said] == ["`anchor_share` 0.5"] + ["`anchor_share` 0.2"] * 3
    assert "has no effect on budgets of every scale" in said[0]


def test_a_selector_that_merges_across_scales_is_refused_one_budget():
    model, rules = small_model(), {"selector": similarity_merging}
    with pytest.raises(ValueError, match="'similarity_merging' merges tokens of different scales.*one of 9 tokens"):
        model.compress(input_ids=QUESTION, pixel_values=random_pixels(), budgets=9, rules=rules)
    out = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), rules=rules)
    assert [len(tokens) for tokens in out.tokens[0]] == list(BUDGETS)


def test_one_budget_may_be_that_of_the_configuration_and_is_shared_by_images():
    model = small_model(budgets=15, selector="top_k")
    out = model.compress(
        input_ids=torch.tensor([[5, IMAGE, 9, IMAGE, 6]]), image_features=model.encode_image(random_pixels(2))
    )
    assert [len(tokens) for tokens in out.pooler_output] == [8, 7]
    ids = torch.cat([torch.tensor([[5]]), prompt("image", 9, num_tokens=8), prompt("image", 6, num_tokens=7)], dim=1)
    expanded = model.compress(input_ids=ids, pixel_values=random_pixels(2))
    assert all(map(torch.equal, expanded.pooler_output, out.pooler_output))


def test_places_of_a_scale_are_those_of_all_scales_in_the_same_order():
    rules = CompressionRules.of(small_config(selector="preserve_and_merge"))
    generator = torch.Generator().manual_seed(0)
    importance = [torch.rand(size, generator=generator) for size in SIZES]
    regions = [torch.randint(0, 3, (size,), generator=generator) for size in SIZES]
    tokens = [torch.randn(size, 4, generator=generator) for size in SIZES]
    slots, counts = choose_of_all_scales(importance, regions, tokens, 20, rules)
    assert sum(counts) == 20
    for scale, count in zip(slots, counts):
        assert sorted(set(scale.tolist()) - {-1}) == list(range(count))


# ---- Importance -----------------------------------------------------------------------------------------------------


def test_importance_is_looked_up_where_the_image_is_and_nowhere_else():
    importance = torch.tensor([4.0, 2])  # the upper row of 2 x 2; the lower one is letterbox
    found = look_up(importance, torch.tensor([0, 1]), (2, 2), torch.arange(8), (4, 4))
    whole = align_importance(torch.tensor([[4.0, 2], [4, 2]]), (4, 4))
    torch.testing.assert_close(found, whole.flatten()[:8])


@pytest.mark.parametrize("number", [0, 3, 40])
def test_few_places_of_a_large_grid_are_looked_up_as_the_whole_grid_is(number):
    generator = torch.Generator().manual_seed(1)
    positions = torch.tensor([0, 1, 4, 5, 6, 9, 17])  # of a grid of 4 x 5
    importance = torch.rand(len(positions), generator=generator)
    every = torch.arange(50 * 70)
    places = torch.randint(len(every), (number,), generator=generator)
    expected = look_up(importance, positions, (4, 5), every, (50, 70))[places]
    found = look_up(importance, positions, (4, 5), places, (50, 70))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_the_gradient_of_what_is_looked_up_is_finite_where_cells_show_none_of_the_image():
    importance = torch.rand(8, requires_grad=True)  # the middle half of a 4 x 4 grid
    look_up(importance, torch.arange(4, 12), (4, 4), torch.arange(16, 48), (8, 8)).sum().backward()
    assert importance.grad.sum().item() == pytest.approx(32) and importance.grad.isfinite().all()


def test_without_a_refinement_every_scale_is_looked_up_from_the_anchor():
    model = small_model()
    (features,) = model.encode_image(random_pixels())
    anchor = model.estimate_importance(QUESTION[0], features.anchor_tokens)
    maps = model.model.refine_importance(QUESTION[0], features, anchor, CompressionRules.of(model.config))
    on_grid = torch.empty(4).index_copy(0, features.anchor_positions, anchor).view(2, 2)
    for found, grid in zip(maps, GRIDS):
        torch.testing.assert_close(found, align_importance(on_grid, grid).flatten())


@pytest.mark.parametrize("mask", [None, half_shown()], ids=["whole", "half"])
@torch.no_grad()
def test_refined_importance_is_the_steps_of_its_definition(mask):
    model = small_model()
    (features,) = model.encode_image(random_pixels(), mask)
    anchor = model.estimate_importance(QUESTION[0], features.anchor_tokens)
    maps = model.model.refine_importance(QUESTION[0], features, anchor, CompressionRules.of(model.config, REFINED))

    order = features.anchor_positions.argsort()
    before = anchor[order]
    torch.testing.assert_close(maps[0], before / before.mean())
    for scale, (n, layer) in enumerate(zip(REFINED["refinement"], REFINED["refinement_layers"]), start=1):
        positions, tokens = features.positions[scale], features.tokens[scale]
        prior = look_up(before, features.positions[scale - 1], GRIDS[scale - 1], positions, GRIDS[scale])
        prior = prior / prior.sum()
        n = min(n, len(tokens))
        chosen = sorted(sorted(range(len(prior)), key=lambda i: (-float(prior[i]), i))[:n])
        # The same pass as over the anchor, with other tokens; at the finest scale the last token of the prompt asks.
        other = small_model(importance_layer=layer, question_tokens="last" if scale == 2 else "all")
        attention = other.estimate_importance(QUESTION[0], tokens[chosen])
        summed = prior.clone()
        summed[chosen] += attention / attention.sum()
        before = summed / summed.sum()
        torch.testing.assert_close(maps[scale], before * len(before))


def test_refinement_changes_what_is_kept_and_spends_the_same():
    model = small_model(selector="distinct")
    features = model.encode_image(random_pixels())
    plain = model.compress(input_ids=QUESTION, image_features=features, budgets=14)
    refined = model.compress(input_ids=QUESTION, image_features=features, budgets=14, rules=REFINED)
    assert len(refined.pooler_output[0]) == len(plain.pooler_output[0]) == 14
    assert not torch.equal(refined.pooler_output[0], plain.pooler_output[0])


def test_a_scale_that_shows_nothing_takes_no_part_in_the_refinement():
    model = small_model(selector="distinct", **REFINED)
    mask = torch.ones(1, 56)
    mask[0, 4:20] = 0
    out = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), pixel_attention_mask=mask, budgets=9)
    assert [len(tokens) for tokens in out.tokens[0]][1] == 0 and len(out.pooler_output[0]) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refinement": [3]}, "`refinement` needs 2 numbers, or none. Got 1"),
        ({"refinement": [3, 0]}, "at least 1 per scale"),
        ({"refinement": [3, 4], "refinement_layers": [1]}, "`refinement_layers` needs 2 numbers, or none. Got 1"),
        ({"refinement": [3, 4], "refinement_layers": [1, 3]}, "`refinement_layers` is 3, but the decoder has 3 layers"),
        ({"distinctiveness_power": -1.0}, "is a number that is not negative. Got -1"),
        ({"budgets": 0}, "at least 1 token"),
        ({"budgets": 256}, "sum to 256 visual tokens, but the context window holds 256"),
    ],
)
def test_contradictions_in_the_configuration_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        small_config(**changes)
