# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT budgets: who may spend how many visual tokens (section 3.3, "Per-scale Budgets"): share, count, check.

`budgets` int[S] is what the scales of one prompt may spend: a wish. `token_counts` int[I][S] is what every image does
spend at every scale: a fact, min(share of the budget, tokens that show the image), known before the model runs. One
budget for all scales is a single number, for which the tokens of all scales compete; its counts are int[I][1].

A total, of tokens or of tiles, is divided here and nowhere else:

| among | in proportions of | by | what does not come out even |
|---|---|---|---|
| images of a prompt | equal shares | `equal_shares`, `split_budgets` | goes to the first image |
| scales | their budgets | `apportion` | goes token by token to the scale that is furthest behind |
| scales, as budgets | their budgets | `budgets_of_total` | as above, never decreasing |
| levels | any weights | `share_in_order` | is passed on to the next finer level |

Letters: I images, S scales, B prompts. `available` int[I][S]: tokens of every image and scale that show the image.
"""

from collections.abc import Sequence
from numbers import Integral


def is_one_budget(budgets) -> bool:
    """Whether `budgets` is one number for all scales."""
    return isinstance(budgets, Integral)


def split_budgets(budgets: Sequence[int] | int, scales: Sequence[int], num_images: int = 1) -> list[list[int]]:
    """Share the budgets of a prompt among its images, so that the prompt's total stays B.

    Args:
        budgets: visual tokens that each scale may spend, in the order of `scales`; never fewer at a finer scale
            ("we assign larger B_s values", section 3.3), but for 0, which leaves a scale out. Or one number for all.
        scales: sides of the views in pixels.
        num_images: images in the prompt. Each gets the floor of its share, the first one the remainder too. Where a scale
            has fewer tokens than there are images, the last ones get one each: a question is about them more often.

    Returns:
        int[num_images][S], of every image at least 1 at one scale; int[num_images][1] for one number.

    Raises:
        ValueError: a missing or surplus budget, a decreasing one, nothing to spend, or fewer tokens than images.
    """
    if not scales:
        raise ValueError("`scales` is empty: at least the anchor scale is needed.")
    if is_one_budget(budgets):
        budgets, scales = [budgets], ["all"]
    budgets = [int(budget) for budget in budgets]
    if len(budgets) != len(scales):
        raise ValueError(
            f"`budgets` needs one number per scale. Got {len(budgets)} budgets {budgets} and {len(scales)} scales "
            f"{list(scales)}."
        )
    spending = [budget for budget in budgets if budget]
    if any(low > high for low, high in zip(spending, spending[1:])):
        raise ValueError(
            f"`budgets` must not decrease from one scale to the next finer one. Got {budgets} for the scales "
            f"{list(scales)}."
        )
    if not spending or min(spending) < 1 or max(spending) < num_images:
        raise ValueError(
            f"One budget must be at least 1 token per image, and none below 0, which leaves its scale out. Got {budgets} for "
            f"{num_images} image(s) in one prompt."
        )
    return [list(counts) for counts in zip(*(equal_shares(budget, num_images) for budget in budgets))]


def equal_shares(total: int, number: int) -> list[int]:
    """int[number] that add up to `total`: floors, the first with the remainder; of fewer than `number`, the last ones get
    one each."""
    share, rest = divmod(total, number)
    return [share + rest] + [share] * (number - 1) if share else [0] * (number - rest) + [1] * rest


def first_with_tokens(available: Sequence[int]) -> int:
    """Index of the anchor, the first scale that has any of int[S] tokens; 0 where none has."""
    return next((idx for idx, number in enumerate(available) if number), 0)


def anchor_tokens(budget: int, available: Sequence[int], share: float) -> int:
    """Of one budget, the tokens that are the anchor's alone (`first_with_tokens`): its `share` as far as it has so
    many, and what all finer scales together cannot spend; 0 where all scales compete for all of it.

    Args:
        available: int[S], tokens that every scale has.
    """
    anchor = available[first_with_tokens(available)]
    own = min(round(share * budget), anchor)
    return own and max(own, min(budget - sum(available) + anchor, anchor))


def bounds_of_regions(budget: int, available: Sequence[int], share: float) -> list[int]:
    """int[S], how many regions every scale may have where each of them gets a token of one budget: the anchor as many as it
    has tokens of its own (`anchor_tokens`), those that compete equal parts; 0 of a scale that has or gets no tokens."""
    own = anchor_tokens(budget, available, share)
    competing = sum(map(bool, available)) - bool(own)
    part = max(1, (budget - own) // max(1, competing)) if budget > own else 0
    bounds = [part if number else 0 for number in available]
    if own:
        bounds[first_with_tokens(available)] = own
    return bounds


def count_tokens(budgets, scales, images_per_prompt: Sequence[int], available) -> list[list[int]]:
    """int[I][S], the visual tokens that every image spends at every scale: min(its share of the budget, `available`).

    Args:
        budgets: int[S], what the scales of a prompt may spend, or one number: then int[I][1] comes back.
        scales: sides of the views in pixels.
        images_per_prompt: int[B], images that share the budgets of each prompt.
        available: int[I][S].

    Raises:
        ValueError: `images_per_prompt` do not add up to the images, or wrong budgets (see `split_budgets`).
    """
    if sum(images_per_prompt) != len(available):
        raise ValueError(f"The prompts hold {sum(images_per_prompt)} images, but {len(available)} were passed.")
    shares = [share for number in images_per_prompt if number for share in split_budgets(budgets, scales, number)]
    if is_one_budget(budgets):
        available = [[sum(limits)] for limits in available]
    return [[min(pair) for pair in zip(*rows)] for rows in zip(shares, available)]


def apportion(
    total: int,
    budgets: Sequence[int],
    available: Sequence[int] | None = None,
    least: int = 0,
    finer_first: bool = False,
) -> list[int]:
    """int[S] that add up to `total`, in the proportions of `budgets`, at most `available` each.

    Webster's method: token by token to the scale that is furthest behind. It returns the exact proportion where that is
    whole, and so finds min(budgets, available) again from its sum.

    Args:
        available: int[S], or None for any number.
        least: that every scale gets first, as far as it has them.
        finer_first: of equal budgets the finer scale gets the token that is left, so that none is above a finer one's;
            else the coarser does.

    Raises:
        ValueError: the scales have fewer tokens than `total`.
    """
    available = [total] * len(budgets) if available is None else available
    limits = [limit if budget else 0 for budget, limit in zip(budgets, available)]
    if total > sum(limits):
        raise ValueError(
            f"{total} visual tokens were asked for, but the image has {sum(limits)} at the scales with a budget. Lower "
            f"`budgets`."
        )
    first = [min(least, limit) for limit in limits]
    counts = [0] * len(limits)
    for _ in range(total - sum(first)):
        behind = {
            scale: budgets[scale] / (2 * counts[scale] + 1)
            for scale, limit in enumerate(limits)
            if first[scale] + counts[scale] < limit
        }
        most = max(behind.values())
        furthest = [scale for scale, ratio in behind.items() if ratio == most]
        counts[max(furthest, key=lambda scale: (-budgets[scale], scale)) if finer_first else furthest[0]] += 1
    return [sum(pair) for pair in zip(first, counts)]


def budgets_of_total(total: int, budgets: Sequence[int] | int, available: Sequence[int], least: int = 0):
    """Budgets, int[S] or one number as `budgets` are, of which `total` tokens are spent, in the proportions of `budgets`.

    They never decrease, as budgets must not: what is asked of a scale beyond its tokens is not spent.

    Args:
        available, least: see `apportion`; a scale without tokens gets a budget of `least`, too.
    """
    if is_one_budget(budgets):
        return total
    shares = [max(share, least) for share in apportion(total, budgets, available, least, finer_first=True)]
    return [share and max(shares[: place + 1]) for place, share in enumerate(shares)]


def share_in_order(
    total: int, weights: Sequence[float], available: Sequence[int], least=0, rounding=round
) -> list[int]:
    """int[L], at most `available` each: in order, every level gets its part of what is left, and what it cannot use goes to
    the finer ones; what the finest cannot use, to the coarser ones.

    Args:
        total: to share; what no level can use stays.
        weights: of the levels.
        least: that every level gets in any case, as far as it has them.
        rounding: of a part to whole numbers.
    """
    counts = []
    for place, limit in enumerate(available):
        part = rounding((total - sum(counts)) * weights[place] / sum(weights[place:]))
        counts.append(min(max(part, least), limit))
    for place in reversed(range(len(counts))):
        counts[place] = min(available[place], counts[place] + max(total - sum(counts), 0))
    return counts


def images_of_prompts(runs: Sequence[Sequence[int]], num_images: int, token_counts=None) -> list[int]:
    """int[B], images of each prompt, where nobody said: from the runs of image tokens in the prompts.

    Args:
        runs: lengths of the runs of image tokens of each prompt. A run is an image, or images that touch each other.
        num_images: images of all prompts together.
        token_counts: int[I][S] where they are known: images then are taken in order until they fill a prompt.

    Raises:
        ValueError: it cannot be told which images belong to which prompt.
    """
    placeholders = [sum(lengths) for lengths in runs]
    if sum(placeholders) < num_images:
        raise ValueError(f"The prompts hold {sum(placeholders)} image tokens, but {num_images} images were passed.")
    if sum(placeholders) == num_images:  # one placeholder per image
        return placeholders
    if token_counts is not None:
        totals = iter([sum(counts) for counts in token_counts])
        images_per_prompt = []
        for wanted in placeholders:
            number = 0
            while wanted > 0:
                wanted -= next(totals, wanted)
                number += 1
            images_per_prompt.append(number)
        return images_per_prompt
    if sum(map(len, runs)) == num_images:
        return [len(lengths) for lengths in runs]
    if len(runs) == 1 and len(runs[0]) <= num_images:
        return [num_images]
    raise ValueError(
        f"Image features and image tokens do not match, tokens: {placeholders} per prompt, features: {num_images} "
        "images. Pass `images_per_prompt` and `token_counts` as the processor returned them, or the `budgets` that it "
        "was given."
    )


def recover_counts(runs, images_per_prompt, budgets: Sequence[int], available) -> list[list[int]]:
    """int[I][S], what the images of prompts that are expanded spend, where a trainer lost `token_counts` on the way.

    The run of an image's tokens says how many there are; images that touch each other get equal shares of their run.
    How an image's tokens were divided among the scales is taken from the proportions of `budgets`.

    Raises:
        ValueError: the images have fewer tokens than the prompts ask for.
    """
    totals = []
    for lengths, number in zip(runs, images_per_prompt):
        if number and len(lengths) != number:
            lengths = equal_shares(sum(lengths), number)
        totals += lengths
    if is_one_budget(budgets):
        return [[total] for total in totals]
    return [apportion(total, budgets, limits) for total, limits in zip(totals, available)]


def check_counts(token_counts, placeholders: Sequence[int], images_per_prompt: Sequence[int], scales, available):
    """Raises `ValueError` unless prompts, images and counts fit each other; both numbers are named.

    Args:
        token_counts: int[I][S].
        placeholders: int[B], image tokens of each prompt: one per image, or as many as its images spend.
        images_per_prompt: int[B].
        scales: sides of the views in pixels.
        available: int[I][S].
    """
    if len(token_counts) != len(available) or any(len(counts) not in (1, len(scales)) for counts in token_counts):
        raise ValueError(
            f"`token_counts` must have the shape [{len(available)}, {len(scales)}]: images and scales. Got "
            f"[{len(token_counts)}, {len(token_counts[0]) if len(token_counts) else 0}]."
        )
    if len(images_per_prompt) != len(placeholders) or sum(images_per_prompt) != len(available):
        raise ValueError(
            f"The prompts hold {list(images_per_prompt)} images, but {len(available)} were passed for "
            f"{len(placeholders)} prompts."
        )
    totals = [sum(counts) for counts in token_counts]
    left = iter(totals)
    expanded = [sum(next(left) for _ in range(number)) for number in images_per_prompt]
    if list(placeholders) not in (list(images_per_prompt), expanded):
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {list(placeholders)} per prompt, features: "
            f"{totals} per image. Pass the `budgets` that the processor was given, or the `token_counts` that it "
            "returned."
        )
    for counts, limits in zip(token_counts, available):
        names = [f"scale {scale} px" for scale in scales]
        if len(counts) < len(scales):
            names, limits = ["all scales"], [sum(limits)]
        for name, spent, limit in zip(names, counts, limits):
            if not 0 <= spent <= limit:
                raise ValueError(f"The budget of {name} is {spent} tokens, but {limit} tokens of it show the image.")
        if not sum(counts):
            raise ValueError(f"An image spends no token: its counts are {list(counts)} for the scales {list(scales)}.")


def settle_counts(
    budgets, token_counts, images_per_prompt, runs: Sequence[Sequence[int]], scales, default_budgets, available
) -> tuple[list[int], list[list[int]]]:
    """`images_per_prompt` int[B] and `token_counts` int[I][S] of a batch, from whatever came with it.

    Exact counts first; else what `budgets`, or the default ones, give; else what the prompts say, if they are expanded. With
    two scales, default budgets [16, 24] and more tokens than that in the image ("<" is a placeholder):

    | came in: prompt | `token_counts` | `budgets` | came out: counts | because |
    |---|---|---|---|---|
    | "< how many?" | | | [16, 24] | the default budgets |
    | "< how many?" | | [4, 6] | [4, 6] | the given budgets |
    | "< how many?" | | 10 | [10] | one number: all scales compete |
    | "< how many?" | [9, 1] | any | [9, 1] | exact counts go first |
    | "<<<<< <<<<< how?", 2 images | | [4, 6] | [2, 3], [2, 3] | images of a prompt share its budgets |
    | "<<<<<<<<<< how?" | | | [4, 6] | 10 tokens, in the proportions of the default |
    | "<<<<<<<<<< how?" | | [16, 24] | refused | 10 placeholders, but 40 tokens |

    Args:
        budgets: int[S] or None; token_counts: int[I][S] or None; images_per_prompt: int[B] or None.
        runs: lengths of the runs of image tokens of each prompt.
        scales: sides of the views in pixels.
        default_budgets: int[S], those of the configuration.
        available: int[I][S].

    Raises:
        ValueError: prompts, images and counts that do not fit each other.
    """
    placeholders = [sum(lengths) for lengths in runs]
    expanded = sum(placeholders) != len(available)
    if images_per_prompt is None:
        images_per_prompt = images_of_prompts(runs, len(available), token_counts)
    if token_counts is None:
        wanted = default_budgets if budgets is None else budgets
        token_counts = count_tokens(wanted, scales, images_per_prompt, available)
        # An image has a token of each scale at least: with fewer, the prompt is wrong rather than expanded.
        if budgets is None and expanded and sum(placeholders) >= sum(map(bool, sum(token_counts, []))):
            token_counts = recover_counts(runs, images_per_prompt, default_budgets, available)
    check_counts(token_counts, placeholders, images_per_prompt, scales, available)
    return images_per_prompt, token_counts
