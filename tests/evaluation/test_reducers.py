"""Published rules on small cases, and how commands name them. What all selectors promise: `tests/test_token_selectors.py`."""

import pytest
import torch
from uhr_bat.evaluation.reducers import (
    conditional_diversity,
    diversity,
    dominant_and_contextual,
    find_selector,
    similarity_merging,
)


def test_diversity_takes_one_of_each_kind_before_a_second_of_any():
    kinds = torch.eye(5)[torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4])] + 0.01 * torch.randn(10, 5)
    slots = diversity(torch.rand(10), torch.zeros(10, dtype=torch.long), kinds, 5)
    assert kinds[slots >= 0].argmax(1).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_conditional_diversity_leaves_out_what_is_alike_and_what_is_not_asked_for():
    kinds = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])]
    importance = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.0, 0.1])
    slots = conditional_diversity(importance, torch.zeros(6, dtype=torch.long), kinds, 2)
    assert (slots >= 0).nonzero()[:, 0].tolist() == [0, 2]


def test_similarity_merging_joins_the_most_similar_pairs():
    tokens = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.3, 1], [-1, 0], [-1, -1]])
    slots = similarity_merging(torch.rand(6), torch.zeros(6, dtype=torch.long), tokens, 4)
    assert slots[0] == slots[1] and slots[2] == slots[3] and len(slots.unique()) == 4


def test_the_rest_joins_the_contextual_token_that_it_resembles_most():
    tokens = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2, 1, 0])]
    importance = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 8])
    slots = dominant_and_contextual(importance, torch.zeros(8, dtype=torch.long), tokens, 4, contextual=0.5)
    assert len(slots[[1, 2, 6]].unique()) == 1 and len(slots[[3, 4, 5]].unique()) == 1
    assert slots[0] != slots[7] and (torch.bincount(slots)[slots[[0, 7]]] == 1).all()


def test_a_rule_is_found_by_its_name_and_one_that_merges_scales_needs_budgets_per_scale():
    assert find_selector("diversity", 146) is diversity and find_selector("top_k") == "top_k"
    with pytest.raises(ValueError, match="no selector 'best'. There are: preserve_and_merge, .*conditional_diversity"):
        find_selector("best")
    assert find_selector("similarity_merging", [4, 8]) is similarity_merging
    with pytest.raises(ValueError, match="'similarity_merging' merges tokens of different scales.*one of 146"):
        find_selector("similarity_merging", 146)
