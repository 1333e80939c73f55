"""Every selector keeps the same promises; this project's rule against a plain loop; the reducers on small cases."""

import pytest
import torch
import torch.nn.functional as F
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.token_compression_uhr_bat import distinctiveness, merge_tokens
from uhr_bat.token_selectors_uhr_bat import SELECTORS, distinct, diversity, similarity_merging, top_k, uniform


def problem(N=60, D=8, R=5, seed=0):
    """(importance, regions, tokens)"""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(N, generator=generator),
        torch.randint(0, R, (N,), generator=generator),
        torch.randn(N, D, generator=generator),
    )


def select(name, *arguments, **settings):
    return SELECTORS[name][0](*arguments, **settings)


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
    for name in SELECTORS:
        assert UHRBatConfig(selector=name).selector == name
    with pytest.raises(Exception, match="selector"):
        UHRBatConfig(selector="best")


@pytest.mark.parametrize("budget", [1, 2, 7, 31, 59, 60, 99])
@pytest.mark.parametrize("name", SELECTORS)
def test_the_budget_is_spent_exactly_and_no_place_is_empty(name, budget):
    importance, regions, tokens = problem()
    slots = select(name, importance, regions, tokens, budget)
    n = min(budget, 60)
    assert sorted(set(slots.tolist()) - {-1}) == list(range(n))
    assert merge_tokens(tokens, slots, n).shape == (n, 8)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_same_input_gives_the_same_places_and_is_left_as_it_is(name):
    arguments = problem(seed=1)
    before = [value.clone() for value in arguments]
    assert torch.equal(select(name, *arguments, 9), select(name, *arguments, 9))
    assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize("name", SELECTORS)
def test_equal_tokens_of_equal_importance_are_no_obstacle(name):
    slots = select(name, torch.zeros(12), torch.zeros(12, dtype=torch.long), torch.ones(12, 4), 5)
    assert sorted(set(slots.tolist()) - {-1}) == list(range(5))


@pytest.mark.parametrize("name", SELECTORS)
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


# ---- Reducers for comparison ----------------------------------------------------------------------------------------


def test_top_k_keeps_the_most_important_in_order_and_the_first_of_equals():
    importance = torch.tensor([1.0, 5, 3, 5, 3])
    slots = top_k(importance, torch.zeros(5, dtype=torch.long), torch.randn(5, 2), 3)
    assert slots.tolist() == [-1, 0, 1, 2, -1]


def test_uniform_keeps_the_middle_of_equal_stretches():
    slots = uniform(torch.rand(9), torch.zeros(9, dtype=torch.long), torch.randn(9, 2), 3)
    assert (slots >= 0).nonzero()[:, 0].tolist() == [1, 4, 7]


def test_diversity_takes_one_of_each_kind_before_a_second_of_any():
    kinds = torch.eye(5)[torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4])] + 0.01 * torch.randn(10, 5)
    slots = diversity(torch.rand(10), torch.zeros(10, dtype=torch.long), kinds, 5)
    assert kinds[slots >= 0].argmax(1).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_conditional_diversity_leaves_out_what_is_alike_and_what_is_not_asked_for():
    kinds = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])]
    importance = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.0, 0.1])
    slots = select("conditional_diversity", importance, torch.zeros(6, dtype=torch.long), kinds, 2)
    assert (slots >= 0).nonzero()[:, 0].tolist() == [0, 2]


def test_similarity_merging_joins_the_most_similar_pairs():
    tokens = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.3, 1], [-1, 0], [-1, -1]])
    slots = similarity_merging(torch.rand(6), torch.zeros(6, dtype=torch.long), tokens, 4)
    assert slots[0] == slots[1] and slots[2] == slots[3] and len(slots.unique()) == 4


def test_the_rest_joins_the_contextual_token_that_it_resembles_most():
    tokens = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2, 1, 0])]
    importance = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 8])
    slots = select("dominant_and_contextual", importance, torch.zeros(8, dtype=torch.long), tokens, 4, contextual=0.5)
    assert len(slots[[1, 2, 6]].unique()) == 1 and len(slots[[3, 4, 5]].unique()) == 1
    assert slots[0] != slots[7] and (torch.bincount(slots)[slots[[0, 7]]] == 1).all()
