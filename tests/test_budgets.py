from math import floor

import pytest
from uhr_bat.budgets_uhr_bat import (
    apportion,
    bounds_of_regions,
    budgets_of_total,
    check_counts,
    count_tokens,
    images_of_prompts,
    settle_counts,
    share_in_order,
    split_budgets,
)

SCALES = [64, 128, 256, 384]
BUDGETS = [16, 24, 40, 66]
AVAILABLE = [64, 224, 832, 1920]


def settle(runs, num_images=1, **given):
    """(images_per_prompt, token_counts) of prompts whose runs of image tokens have these lengths."""
    given = {"budgets": None, "token_counts": None, "images_per_prompt": None, **given}
    return settle_counts(runs=runs, scales=SCALES, default_budgets=BUDGETS, available=[AVAILABLE] * num_images, **given)


def test_images_of_a_prompt_share_its_budgets_and_the_first_gets_the_remainder():
    assert split_budgets([7, 8], [32, 64], 3) == [[3, 4], [2, 2], [2, 2]]


def test_where_a_scale_has_fewer_tokens_than_images_the_last_ones_get_one_each():
    shares = split_budgets([2, 3, 4, 5], SCALES, 4)
    assert shares == [[0, 0, 1, 2], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert [sum(scale) for scale in zip(*shares)] == [2, 3, 4, 5]


def test_a_budget_of_0_leaves_its_scale_out():
    assert split_budgets([0, 8, 0, 9], SCALES, 2) == [[0, 4, 0, 5], [0, 4, 0, 4]]


@pytest.mark.parametrize(
    ("budgets", "num_images", "message"),
    [
        ([1, 2, 3], 1, "Got 3 budgets"),
        ([4, 3, 5, 6], 1, r"must not decrease.*\[4, 3, 5, 6\]"),
        ([0, 0, 0, 0], 1, "at least 1 token per image"),
        ([2, 3, 4, 5], 6, "at least 1 token per image.* 6 image"),
        ([-1, 3, 4, 5], 1, "at least 1 token per image"),
    ],
)
def test_wrong_budgets_are_refused_with_both_numbers(budgets, num_images, message):
    with pytest.raises(ValueError, match=message):
        split_budgets(budgets, SCALES, num_images)


def test_an_image_spends_no_more_than_it_shows():
    counts = count_tokens(BUDGETS, SCALES, [1, 0, 1], [[8, 30, 30, 99], [64, 5, 0, 66]])
    assert counts == [[8, 24, 30, 66], [16, 5, 0, 66]]


@pytest.mark.parametrize(
    ("total", "available", "expected"),
    [
        (146, AVAILABLE, BUDGETS),
        (73, AVAILABLE, [8, 12, 20, 33]),
        (16 + 5 + 0 + 66, [64, 5, 0, 66], [16, 5, 0, 66]),
        (1, AVAILABLE, [0, 0, 0, 1]),
        (3040, AVAILABLE, AVAILABLE),
    ],
)
def test_tokens_are_apportioned_in_the_proportions_of_the_budgets_up_to_what_there_is(total, available, expected):
    assert apportion(total, BUDGETS, available) == expected


def test_of_equal_budgets_one_scale_gets_the_token_that_is_left():
    assert apportion(47, [16, 16, 33], [12, 19, 49]) == [12, 11, 24]
    assert apportion(47, [16, 16, 33], [12, 19, 49], finer_first=True) == [11, 12, 24]
    assert apportion(150, [16, 18, 34, 34], [14, 44, 55, 58], 1, finer_first=True) == [14, 29, 53, 54]


@pytest.mark.parametrize(
    ("total", "budgets", "available", "least", "expected"),
    [
        (73, 146, AVAILABLE, 0, 73),
        (73, BUDGETS, AVAILABLE, 0, [8, 12, 20, 33]),
        (5, BUDGETS, AVAILABLE, 1, [1, 1, 1, 2]),
        (40, [16, 0, 24], [20, 30, 8], 0, None),
        (24, [16, 0, 24], [20, 30, 8], 0, [16, 0, 16]),  # 16 + 0 + 8 are spent
        (16, BUDGETS, [16, 0, 0, 0], 1, [16, 16, 16, 16]),
    ],
)
def test_budgets_of_a_total_spend_it_and_never_decrease(total, budgets, available, least, expected):
    if expected is None:
        with pytest.raises(ValueError, match="40 visual tokens.*has 28"):
            budgets_of_total(total, budgets, available, least)
        return
    found = budgets_of_total(total, budgets, available, least)
    assert found == expected
    if isinstance(found, list):
        assert sum(map(min, found, available)) == total


def test_what_a_level_cannot_use_goes_to_the_finer_ones_and_then_to_the_coarser_ones():
    assert share_in_order(56, [1, 1, 1], [16, 64, 144]) == [16, 20, 20]
    assert share_in_order(146, BUDGETS, [10, 200, 200, 50]) == [10, 25, 61, 50]
    assert share_in_order(5, [1, 1], [9, 9], rounding=floor) == [2, 3]
    assert share_in_order(3, BUDGETS, AVAILABLE, least=1) == [1, 1, 1, 1]


def test_more_tokens_than_the_image_has_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="3041 visual tokens.*has 3040.*`budgets`"):
        apportion(3041, BUDGETS, AVAILABLE)


@pytest.mark.parametrize(
    ("runs", "num_images", "token_counts", "expected"),
    [
        ([[14]], 1, None, [1]),
        ([[1], [], [1, 1]], 3, None, [1, 0, 2]),  # not expanded yet
        ([[2]], 2, None, [2]),
        ([[10, 10], [], [14]], 3, None, [2, 0, 1]),
        ([[20], [], [14]], 3, [[10], [10], [14]], [2, 0, 1]),
        ([[20]], 2, None, [2]),
        ([[]], 0, None, [0]),
    ],
)
def test_images_of_prompts_are_read_from_their_image_tokens(runs, num_images, token_counts, expected):
    assert images_of_prompts(runs, num_images, token_counts) == expected


def test_images_that_touch_in_a_batch_cannot_be_told_apart():
    with pytest.raises(
        ValueError, match=r"tokens: \[20, 14\] per prompt, features: 3 images.*`token_counts`.*`budgets`"
    ):
        images_of_prompts([[20], [14]], 3)


def test_exact_counts_go_first():
    counts = [[1, 2, 3, 4]]
    assert settle([[10]], budgets=BUDGETS, token_counts=counts) == ([1], counts)


def test_a_prompt_that_is_not_expanded_spends_the_given_budgets_or_the_default_ones():
    assert settle([[1]]) == ([1], [BUDGETS])
    assert settle([[1]], budgets=[1, 2, 3, 4]) == ([1], [[1, 2, 3, 4]])


def test_an_expanded_prompt_says_what_was_spent():
    assert settle([[73]]) == ([1], [[8, 12, 20, 33]])
    assert settle([[37], [73]], 2) == ([1, 1], [[4, 6, 10, 17], [8, 12, 20, 33]])


def test_images_of_one_expanded_prompt_get_equal_shares_where_they_touch():
    assert settle([[73]], 2) == ([2], [[4, 6, 10, 17], [4, 6, 10, 16]])
    assert settle([[37, 36]], 2) == settle([[73]], 2)


@pytest.mark.parametrize(
    ("token_counts", "placeholders", "images_per_prompt", "message"),
    [
        ([[1, 2, 3]], [6], [1], r"shape \[1, 4\].*Got \[1, 3\]"),
        ([[1, 2, 3, 4]], [13], [1], r"tokens: \[13\] per prompt, features: \[10\] per image"),
        ([[1, 2, 3, 4]], [10, 10], [1, 0], r"tokens: \[10, 10\] per prompt, features: \[10\] per image"),
        ([[1, 2, 3, 4]], [10], [2], "hold .2. images, but 1 were passed"),
        ([[65, 24, 40, 66]], [195], [1], "scale 64 px is 65 tokens, but 64 tokens"),
        ([[0, 0, 0, 0]], [0], [1], "spends no token"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_both_numbers(token_counts, placeholders, images_per_prompt, message):
    with pytest.raises(ValueError, match=message):
        check_counts(token_counts, placeholders, images_per_prompt, SCALES, [AVAILABLE])


def test_fewer_image_tokens_than_scales_are_a_wrong_prompt_and_not_an_expanded_one():
    with pytest.raises(ValueError, match=r"tokens: \[2\] per prompt, features: \[146\] per image.*`budgets`"):
        settle([[2]])
    with pytest.raises(ValueError, match=r"tokens: \[2\] per prompt, features: 1 images"):
        settle([[1, 1]])


@pytest.mark.parametrize(
    "available, share, bounds",
    [
        ([4, 16, 36], 0, [4, 4, 4]),
        ([4, 16, 36], 0.2, [3, 5, 5]),
        ([4, 16, 36], 0.5, [4, 5, 5]),
        ([16, 36, 0], 0.5, [7, 7, 0]),
        ([0, 16, 36], 0.5, [0, 7, 7]),
        ([16, 4, 0], 0.1, [10, 4, 0]),
        ([16, 36, 36], 1, [14, 0, 0]),
    ],
)
def test_regions_of_a_scale_are_no_more_than_its_part_of_one_budget(available, share, bounds):
    assert bounds_of_regions(14, available, share) == bounds
