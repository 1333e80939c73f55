"""Every selector keeps the same promises; this project's rule against a plain loop; a function of the user's own."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import BUDGETS, IMAGE, random_pixels, small_model
from uhr_bat.configuration_uhr_bat import SELECTOR_NAMES, UHRBatConfig
from uhr_bat.evaluation.reducers import REDUCERS
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.token_compression_uhr_bat import distinctiveness, merge_tokens
from uhr_bat.token_selectors_uhr_bat import SELECTORS, distinct, top_k, uniform

NAMES = (*SELECTORS, *REDUCERS)  # the model's own, and published ones that evaluation compares with


def problem(N=60, D=8, R=5, seed=0):
    """(importance, regions, tokens)"""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(N, generator=generator),
        torch.randint(0, R, (N,), generator=generator),
        torch.randn(N, D, generator=generator),
    )


def select(name, *arguments, **settings):
    return (REDUCERS.get(name) or SELECTORS[name][0])(*arguments, **settings)


def distinct_oracle(importance, regions, tokens, budget, power):
    """The indices of the kept tokens, by a loop over tokens."""
    scores = []
    for token, region in zip(tokens, regions):
        members = F.normalize(tokens[regions == region], dim=1)
        cosine = F.cosine_similarity(token, members.mean(0), dim=0) if len(members) > 1 else torch.tensor(1.0)
        scores.append(max(0.0, float(1 - cosine)))
    scores = importance * torch.tensor(scores) ** power
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:budget])


# ---- What all of them promise ---------------------------------------------------------------------------------------


def test_the_configuration_knows_every_selector():
    assert tuple(SELECTORS) == SELECTOR_NAMES
    for name in SELECTORS:
        assert UHRBatConfig(selector=name).selector == name


@pytest.mark.parametrize("selector", ["best", "conditional_diversity", top_k, None])
def test_what_a_configuration_cannot_name_is_refused_with_the_mend(selector, tmp_path):
    with pytest.raises(Exception, match=r'compress\(..., rules=\{"selector": function\}\)'):
        UHRBatConfig(selector=selector)
    UHRBatConfig().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"selector": str(selector)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="those of other papers are in `uhr_bat.evaluation.reducers`"):
        UHRBatConfig.from_pretrained(tmp_path)


def test_without_refinement_its_layers_need_not_be_taken_out(tmp_path):
    UHRBatConfig(refinement=[1, 2, 3], refinement_layers=[0, 0, 1]).save_pretrained(tmp_path)
    config = UHRBatConfig.from_pretrained(tmp_path, selector="preserve_and_merge", refinement=[])
    assert (config.selector, config.refinement, config.refinement_layers) == ("preserve_and_merge", [], [])


@pytest.mark.parametrize("gone", [{"selector": "conditional_diversity"}, {"region_method": "kmeans_pca"}])
def test_a_folder_that_names_a_rule_that_is_gone_loads_with_another(gone, tmp_path):
    small_model(selector="top_k", region_method="grid").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | gone))
    (name,) = gone
    with pytest.raises(Exception, match=gone[name]):
        UHRBatConfig.from_pretrained(tmp_path)
    now = {"selector": "uniform", "region_method": "none"}[name]
    model = UHRBatForConditionalGeneration.from_pretrained(tmp_path, **{name: now})
    assert getattr(model.config, name) == now


@pytest.mark.parametrize("budget", [1, 2, 7, 31, 59, 60, 99])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_spent_exactly_and_no_place_is_empty(name, budget):
    importance, regions, tokens = problem()
    slots = select(name, importance, regions, tokens, budget)
    n = min(budget, 60)
    assert sorted(set(slots.tolist()) - {-1}) == list(range(n))
    assert merge_tokens(tokens, slots, n).shape == (n, 8)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_places_and_is_left_as_it_is(name):
    arguments = problem(seed=1)
    before = [value.clone() for value in arguments]
    assert torch.equal(select(name, *arguments, 9), select(name, *arguments, 9))
    assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens_of_equal_importance_are_no_obstacle(name):
    slots = select(name, torch.zeros(12), torch.zeros(12, dtype=torch.long), torch.ones(12, 4), 5)
    assert sorted(set(slots.tolist()) - {-1}) == list(range(5))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_errors_with_both_numbers(name):
    importance, regions, tokens = problem()
    with pytest.raises(ValueError, match="at least 1 token. Got 0"):
        select(name, importance, regions, tokens, 0)
    with pytest.raises(ValueError, match="60"):
        select(name, importance[:5], regions, tokens, 3)
    with pytest.raises(ValueError, match="finite. Got 1 of 60"):
        select(name, importance.index_fill(0, torch.tensor([3]), float("nan")), regions, tokens, 3)


# ---- This project's rule --------------------------------------------------------------------------------------------


def test_distinctiveness_is_one_minus_the_cosine_to_the_regions_mean():
    tokens = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 1], [-5, 0], [7, 7]])
    regions = torch.tensor([4, 4, 4, 9, 9, 2])
    # Region 4 has the mean direction (2, 1), region 9 (-1, 1); the last token is alone.
    expected = 1 - torch.tensor([2 / 5**0.5, 1 / 5**0.5, 2 / 5**0.5, 0.5**0.5, 0.5**0.5, 1])
    torch.testing.assert_close(distinctiveness(tokens, regions), expected)


def test_distinctiveness_does_not_depend_on_the_length_of_tokens_or_on_their_type():
    _, regions, tokens = problem()
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) * 100 + 0.01
    expected = distinctiveness(tokens, regions)
    torch.testing.assert_close(distinctiveness(tokens * lengths, regions), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distinctiveness(tokens.bfloat16(), regions), expected, rtol=0.05, atol=0.02)
    assert expected.dtype == torch.float32 and (expected >= 0).all() and (expected <= 2).all()


@pytest.mark.parametrize("power", [0, 0.75, 2])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_important_and_differs_from_its_region_is_kept_in_order(power, seed):
    importance, regions, tokens = problem(seed=seed)
    for budget in (1, 6, 25):
        slots = distinct(importance, regions, tokens, budget, distinctiveness_power=power)
        kept = distinct_oracle(importance, regions, tokens, budget, power)
        assert (slots >= 0).nonzero()[:, 0].tolist() == kept
        assert slots[kept].tolist() == list(range(budget))


def test_with_coverage_what_is_dropped_of_a_region_goes_into_one_token():
    importance, regions, tokens = problem()
    slots = distinct(importance, regions, tokens, 20, coverage=True)
    assert (slots >= 0).all()
    counts = torch.bincount(slots)
    for place in (counts > 1).nonzero()[:, 0]:
        assert len(regions[slots == place].unique()) == 1
    assert (counts > 1).sum() == 5 and (counts == 1).sum() == 15
    with pytest.raises(ValueError, match="at least 5 for 5 regions. Got 4"):
        distinct(importance, regions, tokens, 4, coverage=True)


def test_a_region_may_be_kept_whole_with_coverage():
    importance = torch.tensor([1.0, 9, 8, 7])
    slots = distinct(importance, torch.tensor([0, 1, 1, 1]), torch.eye(4), 4, coverage=True)
    assert slots.tolist() == [0, 1, 2, 3]


# ---- The simplest ones -----------------------------------------------------------------------------------------------


def test_top_k_keeps_the_most_important_in_order_and_the_first_of_equals():
    importance = torch.tensor([1.0, 5, 3, 5, 3])
    slots = top_k(importance, torch.zeros(5, dtype=torch.long), torch.randn(5, 2), 3)
    assert slots.tolist() == [-1, 0, 1, 2, -1]


def test_uniform_keeps_the_middle_of_equal_stretches():
    slots = uniform(torch.rand(9), torch.zeros(9, dtype=torch.long), torch.randn(9, 2), 3)
    assert (slots >= 0).nonzero()[:, 0].tolist() == [1, 4, 7]


# ---- A function of the user's own ------------------------------------------------------------------------------------

QUESTION = {"input_ids": torch.tensor([[5, IMAGE, 6, 7]])}


def last_ones(importance, regions, tokens, budget):
    """The last tokens of a scale; the earliest of them holds all that stand before it."""
    return torch.arange(len(tokens)).sub(len(tokens) - budget).clamp_min(0)


def test_a_function_decides_which_tokens_of_every_scale_stay():
    model = small_model()
    (features,) = model.encode_image(random_pixels())
    out = model.compress(**QUESTION, image_features=[features], rules={"selector": last_ones})
    for tokens, kept, slots, budget in zip(features.tokens, out.tokens[0], out.slots[0], BUDGETS):
        first = len(tokens) - budget
        assert slots.tolist() == [0] * first + list(range(budget))
        torch.testing.assert_close(kept, torch.cat((tokens[: first + 1].mean(0, keepdim=True), tokens[first + 1 :])))
    one = model.compress(**QUESTION, image_features=[features], budgets=9, rules={"selector": top_k})
    named = model.compress(**QUESTION, image_features=[features], budgets=9, rules={"selector": "top_k"})
    assert torch.equal(one.pooler_output[0], named.pooler_output[0])


@torch.no_grad()
def test_a_function_reaches_the_selection_through_generate_and_forward_too():
    model, (features,) = small_model(), small_model().encode_image(random_pixels())
    images, rules = {"image_features": [features]}, {"selector": last_ones}
    kept = model.compress(**QUESTION, **images, rules=rules)
    ids, mask, _ = model.expand_placeholders(QUESTION["input_ids"], torch.ones(1, 4, dtype=torch.long), kept)
    prompt, greedy = {"input_ids": ids, "attention_mask": mask}, {"do_sample": False, "max_new_tokens": 4}
    by_hand = model.generate(**prompt, mm_encoder_outputs={"image": kept}, **greedy)
    assert torch.equal(model.generate(**QUESTION, **images, rules=rules, **greedy), by_hand)
    assert torch.equal(
        model(**prompt, **images, rules=rules).logits, model(**prompt, mm_encoder_outputs={"image": kept}).logits
    )
    with pytest.raises(ValueError, match="`rules` choose among the tokens of images"):
        model.generate(input_ids=torch.tensor([[5, 6]]), rules=rules)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n, budget: list(range(n)), "'mine' must return slots as a tensor of torch.int64.*Got a list"),
        (lambda n, budget: torch.zeros(n), "torch.int64, one for each token. Got torch.float32"),
        (lambda n, budget: torch.ones(n, dtype=torch.bool), "Got torch.bool"),
        (lambda n, budget: torch.arange(budget), r"a slot for each of 4 tokens. Got the shape \[2\]"),
        (lambda n, budget: torch.zeros(n, 1, dtype=torch.long), r"Got the shape \[4, 1\]"),
        (lambda n, budget: torch.arange(n), r"slots in -1..1 for a budget of 2. Got 0..3"),
        (lambda n, budget: torch.arange(n) % 2 - 2, r"slots in -1..1 for a budget of 2. Got -2..-1"),
        (lambda n, budget: torch.zeros(n, dtype=torch.long), "all 2 slots of a budget of 2 for 4 tokens. Got 1"),
    ],
)
def test_what_is_no_slots_is_refused_with_both_numbers(returned, message):
    def mine(importance, regions, tokens, budget):
        return returned(len(tokens), budget)

    with pytest.raises((ValueError, TypeError), match=message):
        small_model().compress(**QUESTION, pixel_values=random_pixels(), rules={"selector": mine})


def test_rules_that_there_are_not_are_refused_before_a_selection():
    model = small_model()
    for rules, message in (
        ({"selectr": last_ones}, "There is no rule 'selectr'. There are: selector, distinctiveness_power"),
        ({"selector": "diversity"}, "Got 'diversity'. Any other rule is handed in as a function"),
        ({"selector": 3}, "Got 3"),
        ({"coverage": "no"}, "'coverage' expected bool, got str"),
        ({"coord_frame": "place"}, "'coord_frame' expected one of .*, got place"),
        ({"num_regions": 0}, "`num_regions` must be at least 1, or None for the budget. Got 0"),
        ({"distinctiveness_power": -1}, "`distinctiveness_power` is a number that is not negative. Got -1"),
        ({"refinement": [1]}, "`refinement` needs 2 numbers, or none. Got 1"),
        ({"refinement": [1, 1], "refinement_layers": [0, 9]}, "`refinement_layers` is 9, but the decoder has 3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.compress(**QUESTION, pixel_values=random_pixels(), rules=rules)


@torch.no_grad()
def test_a_function_that_changes_what_it_was_given_spoils_no_later_question():
    model = small_model()
    (features,) = model.encode_image(random_pixels())

    def greedy(importance, regions, tokens, budget):
        slots = top_k(importance, regions, tokens, budget)
        importance.zero_(), regions.zero_()
        return slots

    before = model.compress(**QUESTION, image_features=[features], rules={"selector": top_k})
    spoilt = model.compress(**QUESTION, image_features=[features], rules={"selector": greedy})
    assert all(map(torch.equal, before.importance[0], spoilt.importance[0]))
    assert all(map(torch.equal, before.regions[0], spoilt.regions[0]))

    def worse(importance, regions, tokens, budget):
        tokens.mul_(2)
        return top_k(importance, regions, tokens, budget)

    with pytest.raises(ValueError, match=r"'worse' changed the tokens that it was given.*`tokens.clone\(\)`"):
        model.compress(**QUESTION, image_features=[features], rules={"selector": worse})


def test_what_a_function_kept_is_drawn_and_mapped_as_any_other_choice():
    pytest.importorskip("geopandas", reason="geopandas is not installed")
    from uhr_bat.geo.frames import evidence_frame
    from uhr_bat.pictures.pages import kept_picture

    out = small_model().compress(**QUESTION, pixel_values=random_pixels(), rules={"selector": last_ones})
    frame = evidence_frame(out, (24, 24), out.scales[0])
    assert len(frame) == sum(BUDGETS)
    assert frame["tokens"].tolist() == [3, 1, 12, 1, 1, 1, 1, 30, 1, 1, 1, 1, 1, 1]
    assert kept_picture(out, Image.new("RGB", (24, 24))).width > 0
