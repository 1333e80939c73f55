"""Token compression against plain-loop oracles, written from the equations of sections 3.3, 3.4 and appendix C."""

import doctest
import math
import random
from fractions import Fraction

import pytest
import torch
from images import raises
from recorder import Recorder
from torch.overrides import TorchFunctionMode

import uhr_bat.token_compression_uhr_bat as token_compression
from uhr_bat.token_compression_uhr_bat import align_importance, merge_tokens, select_tokens


RULES = [(threshold, coverage) for threshold in ("ge", "gt") for coverage in (False, True)]


# align_importance, eq. 6-7 and 16


def align_oracle(anchor, grid):
    """Eq. 16 at the centre of every token of `grid`, the outermost values continued to the edge."""
    h, w = len(anchor), len(anchor[0])
    H, W = grid
    out = [[0.0] * W for _ in range(H)]
    for u in range(H):
        for v in range(W):
            y = min(max((u + 0.5) * h / H - 0.5, 0), h - 1)
            x = min(max((v + 0.5) * w / W - 0.5, 0), w - 1)
            y0, x0 = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            dy, dx = y - y0, x - x0
            top = anchor[y0][x0] * (1 - dx) + anchor[y0][x1] * dx
            bottom = anchor[y1][x0] * (1 - dx) + anchor[y1][x1] * dx
            out[u][v] = top * (1 - dy) + bottom * dy
    return out


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (5, 1)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (8, 8), (12, 20), (3, 7)])
def test_importance_is_interpolated_between_the_centres_of_the_anchor_tokens(size, grid):
    anchor = torch.rand(size, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(align_oracle(anchor.tolist(), grid))
    torch.testing.assert_close(align_importance(anchor, grid), expected, rtol=1e-6, atol=1e-7)


def test_aligned_importance_has_the_hand_computed_values():
    aligned = align_importance(torch.tensor([[0.0, 4.0], [8.0, 12.0]]), (2, 4))
    assert aligned.tolist() == [[0, 1, 3, 4], [8, 9, 11, 12]]


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_leading_axis_is_aligned_alone_and_the_dtype_stays(leading, dtype):
    anchor = torch.rand(*leading, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    aligned = align_importance(anchor, (6, 9))
    assert aligned.shape == (*leading, 6, 9) and aligned.dtype == dtype
    for one, expected in zip(anchor.reshape(-1, 3, 4), aligned.reshape(-1, 6, 9)):
        assert torch.equal(align_importance(one, (6, 9)), expected)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 7])
@pytest.mark.parametrize("grid", [(12, 12), (11, 29), (288, 288)])
def test_a_constant_map_stays_constant(value, grid):
    # float32 arithmetic returns two or three different values for some of these.
    aligned = align_importance(torch.full((24, 24), value), grid)
    assert torch.equal(aligned, torch.full(grid, value))


def test_the_map_on_its_own_grid_is_unchanged():
    anchor = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(align_importance(anchor, (4, 6)), anchor)


@pytest.mark.parametrize("shape, grid", [((4,), (2, 2)), ((0, 4), (2, 2)), ((4, 4), (0, 2))])
def test_a_map_without_two_sides_or_an_empty_grid_is_refused(shape, grid):
    with raises(
        ValueError,
        "anchor_importance must be a map [..., height, width] and grid (height, width), no side of them 0. "
        f"Got shape {shape} and grid {grid}.",
    ):
        align_importance(torch.zeros(shape), grid)


# select_tokens, eq. 8-12


def select_oracle(importance, regions, budget, threshold, coverage):
    """The rules one by one in exact arithmetic. Returns the slots."""
    N = len(importance)
    n = min(budget, N)
    exact = [Fraction(value) for value in importance]
    members = {label: [i for i in range(N) if regions[i] == label] for label in set(regions)}
    mean = {label: sum(exact[i] for i in group) / len(group) for label, group in members.items()}  # eq. 8

    def by_importance(tokens):
        return sorted(tokens, key=lambda i: (-exact[i], i))

    def is_preserved(i, label):  # eq. 9
        return exact[i] >= mean[label] if threshold == "ge" else exact[i] > mean[label]

    preserved = {label: [i for i in group if is_preserved(i, label)] for label, group in members.items()}
    redundant = {label: [i for i in group if i not in preserved[label]] for label, group in members.items()}

    def candidates():  # eq. 11-12: lists of tokens, each list one output token
        out = []
        for label in sorted(members, key=lambda label: (-mean[label], label)):
            out += [[i] for i in by_importance(preserved[label])]
            if redundant[label]:
                out.append(redundant[label])
        return out

    while len(candidates()) < n:
        pool = [i for label in members for i in by_importance(redundant[label])[:-1]]
        promoted = by_importance(pool)[0]
        redundant[regions[promoted]].remove(promoted)
        preserved[regions[promoted]].append(promoted)

    if coverage:
        first = [redundant[label] or by_importance(preserved[label])[:1] for label in members]
        rest = [candidate for candidate in candidates() if candidate not in first]
        chosen = first + rest[: n - len(first)]
        chosen = [candidate for candidate in candidates() if candidate in chosen]
    else:
        chosen = candidates()[:n]

    slots = [-1] * N
    for slot, candidate in enumerate(chosen):
        for i in candidate:
            slots[i] = slot
    return slots


def random_case(seed):
    """Importance and regions of a few tokens, most of the time with many ties."""
    rng = random.Random(seed)
    N = rng.choice([1, 2, 3, 5, 8, 13, 24])
    values = rng.choice([[0.1], [0.1, 0.2, 0.3], [0.0, 0.5, 1.0], [k / 7 for k in range(7)], None])
    importance = [rng.random() if values is None else rng.choice(values) for _ in range(N)]
    importance = torch.tensor(importance, dtype=rng.choice([torch.float32, torch.bfloat16]))
    num_regions = rng.choice([1, 2, 4, N])
    labels = rng.sample(range(100), num_regions)
    regions = list(range(N)) if num_regions == N else [rng.choice(labels) for _ in range(N)]
    rng.shuffle(regions)
    return importance, torch.tensor(regions), rng


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 250), marks=pytest.mark.slow)])
@pytest.mark.parametrize("threshold, coverage", RULES)
def test_slots_equal_the_rules_in_exact_arithmetic(threshold, coverage, seeds):
    for seed in seeds:
        importance, regions, rng = random_case(seed)
        N, R = len(importance), len(set(regions.tolist()))
        for budget in {1, R, rng.randint(1, N), N, N + 5}:
            if coverage and budget < R:
                continue
            slots = select_tokens(importance, regions, budget, threshold=threshold, coverage=coverage)
            expected = select_oracle(importance.tolist(), regions.tolist(), budget, threshold, coverage)
            assert slots.dtype == torch.long and slots.tolist() == expected, (seed, budget)


@pytest.mark.slow
@pytest.mark.parametrize("threshold, coverage", RULES)
def test_slots_equal_the_rules_for_a_few_hundred_tokens(threshold, coverage):
    generator = torch.Generator().manual_seed(0)
    regions = torch.randint(20, (300,), generator=generator)
    for importance in (torch.rand(300, generator=generator), torch.randint(9, (300,), generator=generator) / 7):
        for budget in (20, 70, 165, 250, 299):
            slots = select_tokens(importance, regions, budget, threshold=threshold, coverage=coverage)
            expected = select_oracle(importance.tolist(), regions.tolist(), budget, threshold, coverage)
            assert slots.tolist() == expected


def test_the_order_is_regions_by_mean_then_tokens_by_importance_then_the_merged_one():
    importance = torch.tensor([1.0, 4.0, 1.0, 2.0, 9.0, 8.0, 0.0, 1.0])
    regions = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2])
    # Region 2: mean 4.5, keeps 9 and 8. Region 5: mean 2, keeps 4 and 2 (not below the mean).
    assert select_tokens(importance, regions, 6).tolist() == [5, 3, 5, 4, 0, 1, 2, 2]
    assert select_tokens(importance, regions, 4).tolist() == [-1, 3, -1, -1, 0, 1, 2, 2]
    assert select_tokens(importance, regions, 2).tolist() == [-1, -1, -1, -1, 0, 1, -1, -1]


def test_gt_merges_what_is_at_the_mean():
    importance = torch.tensor([1.0, 2.0, 3.0])
    regions = torch.zeros(3, dtype=torch.long)
    assert select_tokens(importance, regions, 2, threshold="gt").tolist() == [1, 1, 0]
    assert select_tokens(torch.ones(3), regions, 1, threshold="gt").tolist() == [0, 0, 0]


def test_ties_go_to_the_smaller_label_and_the_smaller_index():
    assert select_tokens(torch.ones(4), torch.tensor([3, 1, 3, 1]), 4).tolist() == [2, 0, 3, 1]


def test_a_budget_above_the_candidates_preserves_the_most_important_redundant_tokens():
    importance = torch.tensor([10.0, 3.0, 1.0, 2.0, 10.0, 3.0, 4.0])
    regions = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    # Candidates: 4 and merged (5, 6), then 0 and merged (1, 2, 3). Then 6 (importance 4), then 1 (3; 5 is the least of
    # its region and stays), then 3.
    assert select_tokens(importance, regions, 4).tolist() == [2, 3, 3, 3, 0, 1, 1]
    assert select_tokens(importance, regions, 5).tolist() == [3, 4, 4, 4, 0, 2, 1]
    assert select_tokens(importance, regions, 6).tolist() == [3, 4, 5, 5, 0, 2, 1]
    assert select_tokens(importance, regions, 7).tolist() == [3, 4, 6, 5, 0, 2, 1]


def test_of_equal_redundant_tokens_the_last_one_stays_merged():
    importance = torch.tensor([1.0, 9.0, 1.0, 1.0])
    assert select_tokens(importance, torch.zeros(4, dtype=torch.long), 3).tolist() == [1, 0, 2, 2]


def test_coverage_reaches_the_regions_that_the_order_alone_does_not():
    importance = torch.tensor([9.0, 8.0, 9.0, 8.0, 2.0, 1.0, 0.5])
    regions = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    assert select_tokens(importance, regions, 4).tolist() == [0, 2, 1, 2, 3, -1, -1]
    # Merged (1, 3), merged (5), and token 6, which is all of its region; then the best preserved token.
    assert select_tokens(importance, regions, 3, coverage=True).tolist() == [-1, 0, -1, 0, -1, 1, 2]
    assert select_tokens(importance, regions, 4, coverage=True).tolist() == [0, 1, -1, 1, -1, 2, 3]


@pytest.mark.parametrize("threshold, coverage", RULES)
def test_the_budget_is_spent_exactly_and_no_slot_is_empty(threshold, coverage):
    for seed in range(120):
        importance, regions, rng = random_case(seed)
        budget = rng.randint(len(set(regions.tolist())), len(regions) + 2)
        slots = select_tokens(importance, regions, budget, threshold=threshold, coverage=coverage)
        assert set(slots.tolist()) - {-1} == set(range(min(budget, len(regions))))
        for slot in set(slots.tolist()) - {-1}:
            assert len(set(regions[slots == slot].tolist())) == 1
        if coverage:
            assert set(regions[slots >= 0].tolist()) == set(regions.tolist())


@pytest.mark.parametrize("sizes", [range(1, 41), pytest.param(range(41, 201), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_region_of_constant_importance_keeps_every_token(dtype, sizes):
    # Lemma 1. A float32 mean lies above its members for 40 % of these sizes, a float64 mean of float64 for some.
    for value in (0.1, 1 / 7, 1.1e-5):
        for size in sizes:
            importance = torch.full((size,), value, dtype=dtype)
            regions = torch.zeros(size, dtype=torch.long)
            # One slot for each token even though the budget does not ask for it: with one less, the last is dropped.
            assert select_tokens(importance, regions, size).tolist() == list(range(size))
            expected = [*range(size - 1), -1] if size > 1 else [0]
            assert select_tokens(importance, regions, max(size - 1, 1)).tolist() == expected
            assert select_tokens(importance, regions, 1, threshold="gt").tolist() == [0] * size


def test_every_region_preserves_its_best_token():
    # Lemma 1: with the whole grid of values as one region, float64 included.
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        importance = 0.1 + torch.randint(2, (7,), generator=generator).double() * 2e-17
        slots = select_tokens(importance, torch.zeros(7, dtype=torch.long), 1)
        assert slots.tolist().count(0) == 1 and slots[importance.argmax()] == 0


def test_labels_only_matter_through_their_order():
    importance = torch.rand(60, generator=torch.Generator().manual_seed(0))
    regions = torch.randint(9, (60,), generator=torch.Generator().manual_seed(1))
    spread = torch.tensor([0, 3, 4, 100, 5000, 5001, 10**6, 10**9, 2**62])[regions]
    assert torch.equal(select_tokens(importance, regions, 25), select_tokens(importance, spread, 25))


def test_every_token_a_region_is_top_k_by_importance():
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for threshold, coverage in [("ge", False), ("gt", False)]:
        slots = select_tokens(importance, torch.arange(50), 12, threshold=threshold, coverage=coverage)
        assert [int((slots == slot).nonzero()) for slot in range(12)] == importance.topk(12).indices.tolist()


def test_the_operations_and_the_memory_of_selection_are_bounded_for_any_number_of_tokens_and_regions():
    counts = []
    for N, R, budget in ((10, 2, 5), (5000, 300, 4000)):
        with Recorder() as recorder:
            select_tokens(torch.rand(N), torch.randint(R, (N,)), budget)
        counts.append(recorder.num_operations)
        assert recorder.largest <= 8 * max(N, 100)
    assert counts[1] <= 1.5 * counts[0]


def test_selection_needs_no_gradient():
    importance = torch.rand(10).requires_grad_()
    assert not select_tokens(importance, torch.arange(10), 4).requires_grad


@pytest.mark.parametrize("shapes", [((4,), (5,)), ((2, 2), (2, 2)), ((), ()), ((0,), (0,))])
def test_importance_and_regions_of_different_tokens_are_refused(shapes):
    with raises(
        ValueError,
        "importance and regions must be vectors of the same length, at least 1. "
        f"Got shapes {shapes[0]} and {shapes[1]}.",
    ):
        select_tokens(torch.ones(shapes[0]), torch.ones(shapes[1], dtype=torch.long), 2)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_token_is_refused(budget):
    with raises(ValueError, f"budget must be at least 1 token. Got {budget}."):
        select_tokens(torch.ones(4), torch.arange(4), budget)


def test_coverage_refuses_a_budget_below_the_number_of_regions():
    with raises(ValueError, "A token for every region needs a budget of at least 3 for 3 regions. Got 2."):
        select_tokens(torch.ones(4), torch.tensor([7, 7, 9, 0]), 2, coverage=True)


def test_an_unknown_threshold_is_refused_with_the_known_ones():
    with raises(ValueError, "Unknown threshold 'mean'. Known thresholds: ge, gt."):
        select_tokens(torch.ones(4), torch.arange(4), 2, threshold="mean")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_importance_that_is_not_finite_is_refused(value):
    with raises(ValueError, "importance must be finite. Got 2 of 4 values that are not."):
        select_tokens(torch.tensor([1.0, value, 2.0, value]), torch.arange(4), 2)


def test_negative_labels_of_regions_are_refused():
    with raises(ValueError, "Labels of regions must not be negative. Got -2."):
        select_tokens(torch.ones(4), torch.tensor([0, -1, 3, -2]), 2)


# merge_tokens, eq. 10


def merge_oracle(tokens, slots, num_slots):
    """Mean of every slot (eq. 10) in exact arithmetic, rounded to float64 once."""
    out = []
    for slot in range(num_slots):
        members = [row for row, s in zip(tokens, slots) if s == slot]
        out.append([float(sum(Fraction(value) for value in column) / len(members)) for column in zip(*members)])
    return out


def random_slots(N, num_slots, generator):
    """Slots 0..num_slots-1, each at least once, and dropped tokens."""
    slots = torch.cat([torch.arange(num_slots), torch.randint(-1, num_slots, (N - num_slots,), generator=generator)])
    return slots[torch.randperm(N, generator=generator)]


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("N, num_slots", [(1, 1), (5, 5), (40, 1), (40, 7), (200, 60)])
def test_every_slot_is_the_mean_of_its_tokens(dtype, rtol, N, num_slots):
    generator = torch.Generator().manual_seed(N)
    tokens = torch.rand(N, 6, generator=generator).to(dtype)
    slots = random_slots(N, num_slots, generator)
    merged = merge_tokens(tokens, slots, num_slots)
    expected = torch.tensor(merge_oracle(tokens.tolist(), slots.tolist(), num_slots), dtype=torch.float64)
    assert merged.dtype == dtype and merged.shape == (num_slots, 6)
    torch.testing.assert_close(merged.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_after_a_mean_in_float32(dtype):
    tokens = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = merge_tokens(tokens, torch.zeros(500, dtype=torch.long), 1)
    assert torch.equal(merged, tokens.double().mean(dim=0, keepdim=True).to(dtype))


def test_dropped_tokens_do_not_count_even_if_they_are_not_numbers():
    tokens = torch.tensor([[1.0], [math.nan], [3.0], [math.inf]])
    assert merge_tokens(tokens, torch.tensor([0, -1, 0, -1]), 1).tolist() == [[2.0]]


def test_preserved_tokens_come_out_unchanged_and_in_order():
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = merge_tokens(tokens, torch.tensor([2, -1, 0, 3, -1, 1]), 4)
    assert torch.equal(merged, tokens[[2, 5, 0, 3]])


def test_merged_tokens_keep_the_sum_of_what_they_merge():
    # Lemma 2: |R| times the merged token is the sum of the redundant tokens.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(300, 8, generator=generator)
    importance, regions = torch.rand(300, generator=generator), torch.randint(11, (300,), generator=generator)
    slots = select_tokens(importance, regions, 300 // 2)
    merged = merge_tokens(tokens, slots, 150)
    for slot in range(150):
        members = tokens[slots == slot].double()
        torch.testing.assert_close(merged[slot].double() * len(members), members.sum(dim=0), rtol=1e-5, atol=1e-5)


def test_the_decision_applies_to_any_tensor_of_the_scale():
    # Merging one-hot tokens gives the weight of every token in every output: rows sum to one, equal in a row.
    generator = torch.Generator().manual_seed(0)
    importance, regions = torch.rand(40, generator=generator), torch.randint(5, (40,), generator=generator)
    slots = select_tokens(importance, regions, 12)
    weights = merge_tokens(torch.eye(40), slots, 12)
    tokens = torch.randn(40, 3, generator=generator)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(weights @ tokens, merge_tokens(tokens, slots, 12))


def test_columns_are_merged_alone_however_wide_the_tokens_are():
    generator = torch.Generator().manual_seed(0)
    # 23 MiB, of which a block is 8.
    tokens, slots = torch.randn(2000, 3000, generator=generator), random_slots(2000, 80, generator)
    merged = merge_tokens(tokens, slots, 80)
    for columns in (slice(0, 9), slice(1040, 1060), slice(2990, 3000)):
        assert torch.equal(merge_tokens(tokens[:, columns], slots, 80), merged[:, columns])


def test_gradients_reach_every_kept_token_as_one_over_the_size_of_its_slot():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    slots = random_slots(20, 6, generator)
    assert torch.autograd.gradcheck(lambda tokens: merge_tokens(tokens, slots, 6), tokens)
    upstream = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    merge_tokens(tokens, slots, 6).backward(upstream)
    expected = torch.zeros(20, 4, dtype=torch.float64)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[i] = upstream[slot] / slots.tolist().count(slot)
    torch.testing.assert_close(tokens.grad, expected)


def test_gradients_of_half_precision_tokens_have_their_dtype():
    tokens = torch.ones(4, 2, dtype=torch.bfloat16, requires_grad=True)
    merge_tokens(tokens, torch.tensor([0, 1, 1, -1]), 2).sum().backward()
    assert tokens.grad.dtype == torch.bfloat16 and tokens.grad[:, 0].tolist() == [1, 0.5, 0.5, 0]


def test_merging_never_holds_all_tokens_in_float32():
    tokens = torch.ones(4096, 2048, dtype=torch.bfloat16)
    slots = torch.full((4096,), -1)
    slots[::32] = torch.arange(128)
    with Recorder() as recorder:
        merge_tokens(tokens, slots, 128)
    assert recorder.largest <= 4 * 128 * 2048  # the tokens that stay
    with Recorder() as recorder:
        merge_tokens(tokens, torch.arange(4096) % 64, 64)
    assert recorder.largest <= 4 * 2**21  # a block, a quarter of all


@pytest.mark.parametrize("slots, message", [([0, 1, 2, -1], "-1..2"), ([0, -2, 1, 1], "-2..1")])
def test_slots_out_of_range_are_refused(slots, message):
    with raises(ValueError, f"slots must lie in -1..1 for 2 slots. Got {message}."):
        merge_tokens(torch.ones(4, 3), torch.tensor(slots), 2)


def test_empty_slots_are_refused():
    with raises(ValueError, "Every slot needs a token, but 2 of 5 slots are empty."):
        merge_tokens(torch.ones(4, 3), torch.tensor([0, -1, 2, 4]), 5)
    with raises(ValueError, "Every slot needs a token, but 1 of 1 slots are empty."):
        merge_tokens(torch.ones(4, 3), torch.full((4,), -1), 1)


@pytest.mark.parametrize("shapes", [((4, 3), (5,)), ((4,), (4,)), ((2, 2, 3), (2, 2)), ((0, 3), (0,))])
def test_tokens_and_slots_of_different_tokens_are_refused(shapes):
    with raises(
        ValueError,
        f"tokens must be [N, D] and slots [N] with the same N, at least 1. Got {shapes[0]} and {shapes[1]}.",
    ):
        merge_tokens(torch.ones(shapes[0]), torch.zeros(shapes[1], dtype=torch.long), 1)


# The module and the devices


def test_the_names_of_the_steps_are_here_wherever_their_code_lives():
    fixed = {"align_importance", "cluster_regions", "grid_regions", "vote_regions", "select_tokens", "merge_tokens"}
    assert fixed <= set(token_compression.__all__)
    assert all(callable(getattr(token_compression, name)) for name in token_compression.__all__)


def test_the_drawn_example_of_the_selection_is_true():
    (example,) = doctest.DocTestFinder().find(select_tokens, module=False, globs=vars(token_compression))
    assert len(example.examples) == 6
    assert doctest.DocTestRunner().run(example).failed == 0


class OnDevice(torch.Tensor):
    """A tensor that says it is on "mps" and computes on the CPU; as there, nothing can be float64."""

    @staticmethod
    def __new__(cls, inner):
        assert inner.dtype != torch.float64, "Cannot convert a MPS Tensor to float64 dtype"
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="mps", requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs or {}))
        out = func(*leaves[0], **leaves[1])
        if func is torch.ops.aten._to_copy.default and leaves[1].get("device") == torch.device("cpu"):
            return out
        return torch.utils._pytree.tree_map_only(torch.Tensor, OnDevice, out)


class DeviceWithoutFloat64(TorchFunctionMode):
    """For the length of a `with` block, what is moved to "mps" becomes an [`OnDevice`]."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and not isinstance(args[0], OnDevice) and args[1:] == (torch.device("mps"),):
            return OnDevice(args[0])
        return func(*args, **(kwargs or {}))


def test_the_stand_in_for_a_device_without_float64_refuses_it():
    with DeviceWithoutFloat64():
        tensor = torch.ones(3).to(torch.device("mps"))
        assert tensor.device.type == "mps" and torch.equal((tensor + 1).cpu(), torch.full((3,), 2.0))
        with pytest.raises(AssertionError, match="float64"):
            tensor.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_importance_is_aligned_on_a_device_without_float64_as_on_the_cpu(dtype):
    anchor = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with DeviceWithoutFloat64():
        aligned = align_importance(OnDevice(anchor), (6, 9))
        assert aligned.device.type == "mps" and aligned.dtype == dtype
        assert torch.equal(aligned.cpu(), align_importance(anchor, (6, 9)))


@pytest.mark.parametrize("threshold, coverage", RULES)
def test_tokens_are_selected_on_a_device_without_float64_as_on_the_cpu(threshold, coverage):
    generator = torch.Generator().manual_seed(0)
    importance, regions = torch.rand(300, generator=generator), torch.randint(20, (300,), generator=generator)
    rules = {"threshold": threshold, "coverage": coverage}
    with DeviceWithoutFloat64():
        slots = select_tokens(OnDevice(importance), OnDevice(regions), 70, **rules)
        assert slots.device.type == "mps" and slots.dtype == torch.long
        assert torch.equal(slots.cpu(), select_tokens(importance, regions, 70, **rules))
