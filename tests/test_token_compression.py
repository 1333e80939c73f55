"""Token compression against plain-loop oracles, written from the equations of sections 3.3, 3.4 and appendix C."""

import math
import random
import re
import sys
from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uhr_bat.token_compression_uhr_bat as token_compression
from uhr_bat.token_compression_uhr_bat import (
    align_importance,
    cluster_regions,
    grid_regions,
    merge_tokens,
    select_tokens,
    vote_regions,
)


RULES = [(threshold, coverage) for threshold in ("ge", "gt") for coverage in (False, True)]


def raises(error, message):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


class Recorder(TorchDispatchMode):
    """Names of the operations that ran and the size in bytes of the largest tensor that one of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


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


# cluster_regions, eq. 13-14


def grid_coords(side):
    """(row, column) centres of a square grid of tokens, in [0, 1]."""
    centre = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(centre, centre)


def random_scene(side, D, seed=0, num_kinds=None):
    """Features of a `side` x `side` grid, around `num_kinds` directions if given."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(side * side, D, generator=generator)
    if num_kinds:
        kinds = torch.randn(num_kinds, D, generator=generator)
        features = 0.3 * features + kinds[torch.randint(num_kinds, (side * side,), generator=generator)]
    return features, grid_coords(side)


def embedding_oracle(features, coords, coord_weight):
    """Eq. 13 in float64, token by token."""
    rows = []
    for feature, coord in zip(features.tolist(), coords.tolist()):
        length = math.sqrt(sum(value * value for value in feature)) or 1.0
        rows.append([value / length for value in feature] + [coord_weight * value for value in coord])
    return rows


def lloyd_oracle(rows, centres, num_iterations):
    """Plain Lloyd (eq. 14). Returns the labels and the objective J after every assignment."""
    labels, objectives = None, []
    for _ in range(num_iterations):
        previous, labels, objective = labels, [], 0.0
        for row in rows:
            distances = [sum((a - b) ** 2 for a, b in zip(row, centre)) for centre in centres]
            labels.append(distances.index(min(distances)))
            objective += min(distances)
        objectives.append(objective)
        if labels == previous:
            break
        for m in range(len(centres)):
            members = [row for row, label in zip(rows, labels) if label == m]
            if members:
                centres[m] = [sum(column) / len(members) for column in zip(*members)]
    return labels, objectives


def relabel_oracle(labels):
    return [sorted(set(labels)).index(label) for label in labels]


@pytest.mark.parametrize("num_iterations", [1, 2, 10, 50])
@pytest.mark.parametrize("coord_weight", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_equals_plain_lloyd_from_the_same_tokens(num_iterations, coord_weight, seed):
    features, coords = random_scene(8, 5, seed)
    drawn = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:7].tolist()
    rows = embedding_oracle(features, coords, coord_weight)
    expected, _ = lloyd_oracle(rows, [rows[i] for i in drawn], num_iterations)
    regions = cluster_regions(
        features,
        coords,
        7,
        coord_weight=coord_weight,
        num_iterations=num_iterations,
        generator=torch.Generator().manual_seed(seed),
    )
    assert regions.dtype == torch.long and regions.tolist() == relabel_oracle(expected)


def test_more_iterations_never_make_the_objective_worse():
    features, coords = random_scene(12, 6, num_kinds=5)
    rows = embedding_oracle(features, coords, 0.05)
    objectives = []
    for num_iterations in range(1, 15):
        regions = cluster_regions(features, coords, 9, num_iterations=num_iterations).tolist()
        members = [[row for row, region in zip(rows, regions) if region == m] for m in range(max(regions) + 1)]
        centres = [[sum(column) / len(group) for column in zip(*group)] for group in members]
        objectives.append(sum(sum((a - b) ** 2 for a, b in zip(row, centres[m])) for row, m in zip(rows, regions)))
    assert all(after <= before + 1e-6 for before, after in zip(objectives, objectives[1:]))
    assert objectives[-1] < objectives[0]


def test_directions_that_lie_apart_become_regions_whatever_their_length():
    direction = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0])
    features = torch.eye(3)[direction] * torch.linspace(1, 1000, 9)[:, None]
    generator = torch.Generator().manual_seed(1)  # draws one token of each direction
    assert set(direction[torch.randperm(9, generator=torch.Generator().manual_seed(1))[:3]].tolist()) == {0, 1, 2}
    regions = cluster_regions(features, grid_coords(3), 3, generator=generator)
    assert len({(int(a), int(b)) for a, b in zip(direction, regions)}) == 3


def test_equal_features_are_split_by_where_they_lie():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:2]
    regions = cluster_regions(torch.ones(16, 4), grid_coords(4), 2, generator=generator, num_iterations=1)
    distances = torch.cdist(grid_coords(4).double(), grid_coords(4)[drawn].double())
    clear = (distances[:, 0] - distances[:, 1]).abs() > 1e-6
    assert torch.equal(regions[clear], distances.argmin(dim=1)[clear])


def test_a_region_that_loses_its_tokens_leaves_no_gap_in_the_labels():
    # Two kinds of equal tokens without coordinates: only two of the five centres ever win a token.
    features = torch.eye(2).repeat_interleave(8, dim=0)
    regions = cluster_regions(features, grid_coords(4), 5, coord_weight=0.0)
    assert sorted(set(regions.tolist())) == [0, 1]
    assert len(set(regions[:8].tolist())) == len(set(regions[8:].tolist())) == 1


@pytest.mark.parametrize("num_regions", [1, 2, 30, 99])
@pytest.mark.parametrize("seed", range(3))
def test_labels_run_from_zero_without_a_gap(num_regions, seed):
    features, coords = random_scene(10, 3, seed, num_kinds=4)
    regions = cluster_regions(features, coords, num_regions)
    assert sorted(set(regions.tolist())) == list(range(max(regions) + 1)) and max(regions) < num_regions


@pytest.mark.parametrize("method", ["kmeans", "kmeans_pca", "birch"])
@pytest.mark.parametrize("num_regions", [16, 17, 1000])
def test_as_many_regions_as_tokens_make_every_token_a_region(method, num_regions):
    features, coords = random_scene(4, 3)
    assert cluster_regions(features, coords, num_regions, method=method).tolist() == list(range(16))


def test_one_token_is_one_region():
    assert cluster_regions(torch.ones(1, 3), torch.full((1, 2), 0.5), 600).tolist() == [0]


def test_the_same_generator_gives_the_same_regions_and_the_default_is_seed_zero():
    features, coords = random_scene(12, 4)
    first, second, third = (
        cluster_regions(features, coords, 10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(first, cluster_regions(features, coords, 10))
    assert torch.equal(first, cluster_regions(features, coords, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_blocks_does_not_change_the_regions(monkeypatch, dtype):
    features, coords = random_scene(20, 16, num_kinds=6)
    expected = cluster_regions(features.to(dtype), coords, 12)
    for size in (1, 50, 1000, 10**9):
        monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", size)
        assert torch.equal(cluster_regions(features.to(dtype), coords, 12), expected)


@pytest.mark.parametrize("size", [1, 77, 1000])
def test_the_centres_are_the_same_to_the_bit_for_every_size_of_the_blocks(monkeypatch, size):
    features, coords = random_scene(20, 37)
    norms = features.norm(dim=1)
    regions = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    centres = torch.zeros(6, 39)
    expected = token_compression._mean_centres(features, norms, coords, regions, centres)
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", size)
    assert torch.equal(token_compression._mean_centres(features, norms, coords, regions, centres), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_other_dtypes_are_clustered_in_float32(dtype):
    features, coords = random_scene(12, 8, num_kinds=6)
    features = features.to(dtype)
    assert torch.equal(cluster_regions(features, coords, 9), cluster_regions(features.float(), coords, 9))


def test_autocast_does_not_change_the_regions():
    features, coords = random_scene(16, 8)
    expected = cluster_regions(features, coords, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cluster_regions(features, coords, 20), expected)


def test_zero_features_are_placed_by_their_coordinates():
    regions = cluster_regions(torch.zeros(16, 3), grid_coords(4), 4)
    assert sorted(set(regions.tolist())) == [0, 1, 2, 3]


def test_clustering_needs_no_gradient_and_leaves_its_inputs_alone():
    features, coords = random_scene(6, 3)
    before = features.clone(), coords.clone()
    regions = cluster_regions(features.requires_grad_(), coords, 5)
    assert not regions.requires_grad
    assert torch.equal(features.detach(), before[0]) and torch.equal(coords, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clustering_never_holds_a_matrix_of_tokens_by_regions_or_a_copy_of_the_features(monkeypatch, dtype):
    N, D, R = 4096, 128, 256
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", 2**16)
    features, coords = random_scene(64, D)
    features = features.to(dtype)
    with Recorder() as recorder:
        cluster_regions(features, coords, R, num_iterations=3)
    # A block, the centres, or a few numbers per token; N x R and N x D would be 4 and 2 MiB in float32.
    assert recorder.largest <= 4 * max(2**16, R * (D + 2), 4 * N)


def test_clustering_waits_for_the_device_at_most_once_per_iteration():
    features, coords = random_scene(16, 8)
    with Recorder() as recorder:
        cluster_regions(features, coords, 20)
    waits = [name for name in recorder.names if name in ("equal", "_local_scalar_dense", "_unique2", "nonzero")]
    assert waits.count("equal") <= 9 and len(waits) <= 12


def test_clustering_runs_as_many_operations_for_a_hundred_regions_as_for_three():
    features, coords = random_scene(16, 8)
    counts = []
    for num_regions in (3, 100):
        with Recorder() as recorder:
            cluster_regions(features, coords, num_regions, num_iterations=2)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]


# k-means on principal components, an option


def wide_scene(side=40, D=300, rank=None, seed=0):
    """Features around 30 directions, spread as `rank` random axes allow (all of D by default)."""
    generator = torch.Generator().manual_seed(seed)
    features, coords = random_scene(side, rank or D, seed, num_kinds=30)
    return features if rank is None else features @ torch.randn(rank, D, generator=generator) + 1.0, coords


def inertia(features, coords, regions, coord_weight=0.05):
    """Eq. 14's objective in float64, with the exact means of the regions as centres."""
    embedding = torch.cat([features.double() / features.double().norm(dim=1)[:, None], coord_weight * coords], dim=1)
    groups = [embedding[regions == label] for label in regions.unique()]
    return sum((group - group.mean(dim=0)).square().sum().item() for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_regions", [1, 7, 60])
@pytest.mark.parametrize("seed", range(3))
def test_on_features_that_the_components_hold_whole_the_regions_are_those_of_kmeans(seed, num_regions, dtype):
    features, coords = wide_scene(rank=20, seed=seed)
    features = features.to(dtype)
    exact, reduced = (
        cluster_regions(
            features,
            coords,
            num_regions,
            method=method,
            num_iterations=100,  # until nothing moves: the last assignment is one more iteration
            generator=torch.Generator().manual_seed(seed),
        )
        for method in ("kmeans", "kmeans_pca")
    )
    # bfloat16 rounds every number on its own, which no 128 components hold.
    assert (exact == reduced).float().mean() >= (1 if dtype is torch.float32 else 0.9)


@pytest.mark.parametrize("D", [1, 126, 128])
def test_features_that_are_not_wider_than_the_components_are_clustered_by_kmeans(D):
    features, coords = random_scene(12, D, num_kinds=6)
    expected = cluster_regions(features, coords, 9)
    assert torch.equal(cluster_regions(features, coords, 9, method="kmeans_pca"), expected)


@pytest.mark.parametrize("coord_weight", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_the_inertia_is_that_of_kmeans_to_half_a_percent(seed, coord_weight):
    features, coords = wide_scene(seed=seed)
    exact, reduced = (
        inertia(features, coords, cluster_regions(features, coords, 60, method=method, coord_weight=coord_weight))
        for method in ("kmeans", "kmeans_pca")
    )
    assert reduced <= 1.005 * exact


@pytest.mark.parametrize("kind", ["wide", "deep", "far apart"])
def test_the_last_assignment_is_to_the_nearest_exact_mean(monkeypatch, kind):
    features, coords = wide_scene(rank=20 if kind == "deep" else None)
    if kind == "far apart":
        features = torch.eye(300)[torch.arange(1600) % 300]
    before = []
    kmeans = token_compression._kmeans
    monkeypatch.setattr(token_compression, "_kmeans", lambda *args: before.append(kmeans(*args)) or before[0])
    regions = cluster_regions(features, coords, 60, method="kmeans_pca", num_iterations=1)
    embedding = torch.cat([features.double() / features.double().norm(dim=1)[:, None], 0.05 * coords], dim=1)
    means = torch.stack([embedding[before[0] == label].mean(dim=0) for label in before[0].unique()])
    distances = torch.cdist(embedding, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest, mean_idx = distances.min(dim=1)
    assert (before[0].unique(return_inverse=True)[1] != mean_idx).any()  # the assignment has something to do
    assert (distances.gather(1, mean_idx.unique()[regions][:, None])[:, 0] - nearest).max() <= 1e-6


def test_components_draw_nothing_from_the_global_generator_and_repeat():
    features, coords = wide_scene()
    torch.manual_seed(0)
    first = cluster_regions(features, coords, 30, method="kmeans_pca")
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(cluster_regions(features, coords, 30, method="kmeans_pca"), first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = cluster_regions(features, coords, 30, method="kmeans_pca", generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other, first)


@pytest.mark.parametrize("num_regions", [1, 2, 30, 99])
def test_components_give_labels_from_zero_without_a_gap(num_regions):
    features, coords = wide_scene(side=12)
    for scene in (features, features[:5].repeat(29, 1)[:144], torch.zeros_like(features)):
        regions = cluster_regions(scene, coords, num_regions, method="kmeans_pca")
        assert regions.dtype == torch.long and len(regions) == 144
        assert regions.unique().tolist() == list(range(max(regions) + 1)) and max(regions) < num_regions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_blocks_does_not_change_the_regions_of_components(monkeypatch, dtype):
    features, coords = wide_scene(rank=20)
    expected = cluster_regions(features.to(dtype), coords, 12, method="kmeans_pca")
    for size in (1000, 10**5, 10**9):
        monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", size)
        assert torch.equal(cluster_regions(features.to(dtype), coords, 12, method="kmeans_pca"), expected)


def test_components_never_hold_a_matrix_of_tokens_by_regions_or_a_copy_of_the_features(monkeypatch):
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", 2**16)
    monkeypatch.setattr(token_compression, "PCA_TOKENS", 200)
    features, coords = wide_scene(side=48, D=512)
    features = features.bfloat16()
    N, D, R = 48 * 48, 512, 256
    with Recorder() as recorder:
        cluster_regions(features, coords, R, num_iterations=3, method="kmeans_pca")
    # A block, the centres, the components, or 128 numbers per token; N x R is 2.4 and N x D 4.7 MB.
    assert recorder.largest <= 4 * max(2**16, R * (D + 2), 200 * D, 130 * N)


@pytest.mark.parametrize("num_regions", [1, 3, 12, 60])
def test_birch_gives_at_most_the_asked_number_of_regions_without_a_gap(num_regions):
    pytest.importorskip("sklearn")
    features, coords = random_scene(12, 6, num_kinds=5)
    regions = cluster_regions(features, coords, num_regions, method="birch")
    assert regions.dtype == torch.long and regions.unique().tolist() == list(range(num_regions))
    assert torch.equal(regions, cluster_regions(features, coords, num_regions, method="birch"))


def test_birch_separates_kinds_that_lie_apart():
    pytest.importorskip("sklearn")
    direction = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
    regions = cluster_regions(torch.eye(4)[direction], grid_coords(8), 4, method="birch")
    assert len({(int(a), int(b)) for a, b in zip(direction, regions)}) == 4


def test_birch_gives_fewer_regions_where_tokens_do_not_differ():
    pytest.importorskip("sklearn")
    regions = cluster_regions(torch.ones(9, 3), torch.zeros(9, 2), 4, method="birch")
    assert regions.tolist() == [0] * 9


def test_birch_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with raises(ImportError, 'method="birch" needs scikit-learn: pip install scikit-learn'):
        cluster_regions(*random_scene(4, 3), 2, method="birch")


def test_an_unknown_method_is_refused_with_the_known_ones():
    with raises(ValueError, "Unknown method 'ward'. Known methods: kmeans, kmeans_pca, birch."):
        cluster_regions(*random_scene(4, 3), 2, method="ward")


@pytest.mark.parametrize("num_regions, num_iterations", [(0, 10), (-3, 10), (2, 0)])
def test_no_regions_or_no_iterations_are_refused(num_regions, num_iterations):
    with raises(
        ValueError,
        f"num_regions and num_iterations must be at least 1. Got {num_regions} and {num_iterations}.",
    ):
        cluster_regions(*random_scene(4, 3), num_regions, num_iterations=num_iterations)


@pytest.mark.parametrize("shapes", [((16, 3), (15, 2)), ((16, 3), (16, 3)), ((16,), (16, 2)), ((4, 4, 3), (4, 2))])
def test_features_and_coords_of_different_tokens_are_refused(shapes):
    with raises(
        ValueError,
        f"features must be [N, D] and coords [N, 2] with the same N. Got {shapes[0]} and {shapes[1]}.",
    ):
        cluster_regions(torch.ones(shapes[0]), torch.ones(shapes[1]), 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["kmeans", "birch"])
def test_features_and_coords_that_are_not_finite_are_refused(value, method):
    message = (
        "features and coords must be finite in float32, and so must the lengths of the features. "
        "Got {} of 16 tokens with other features and {} with other coordinates."
    )
    features, coords = random_scene(4, 3)
    features[2, 1] = features[2, 2] = features[5, 0] = value
    with raises(ValueError, message.format(2, 0)):
        cluster_regions(features, coords, 2, method=method)
    features, coords = random_scene(4, 3)
    coords[7, 1] = value
    with raises(ValueError, message.format(0, 1)):
        cluster_regions(features, coords, 2, method=method)


# vote_regions, eq. 15


def vote_oracle(labels, patch_size, background):
    """Eq. 15 patch by patch, then the labels of section 3: segments first, background tokens after them."""
    H, W = len(labels), len(labels[0])
    votes = []
    for top in range(0, H, patch_size):
        for left in range(0, W, patch_size):
            pixels = [labels[top + dy][left + dx] for dy in range(patch_size) for dx in range(patch_size)]
            votes.append(max(sorted(set(pixels)), key=pixels.count))
    segments = sorted(set(votes) - {background})
    regions, num_background = [], 0
    for vote in votes:
        if vote == background:
            regions.append(len(segments) + num_background)
            num_background += 1
        else:
            regions.append(segments.index(vote))
    return regions


@pytest.mark.parametrize("patch_size", [1, 2, 3, 14])
@pytest.mark.parametrize("num_labels", [1, 2, 3, 50])
@pytest.mark.parametrize("background", [0, 1, -1, 99])
def test_every_patch_takes_the_label_of_most_of_its_pixels(patch_size, num_labels, background):
    generator = torch.Generator().manual_seed(num_labels)
    labels = torch.randint(-1, num_labels - 1, (3 * patch_size, 4 * patch_size), generator=generator)
    expected = vote_oracle(labels.tolist(), patch_size, background)
    regions = vote_regions(labels, patch_size, background=background)
    assert regions.dtype == torch.long and regions.tolist() == expected


def test_a_tie_goes_to_the_smallest_label():
    labels = torch.tensor([[7, 7, -4, 5], [5, 5, 5, -4]])
    # 7 twice against 5 twice, then -4 twice against 5 twice.
    assert vote_regions(labels, 2).tolist() == [1, 0]


def test_a_tie_with_the_background_goes_by_label_too():
    labels = torch.tensor([[0, 0, 3, 3], [3, 3, 0, 3]])
    assert vote_regions(labels, 2).tolist() == [1, 0]
    assert vote_regions(labels, 2, background=3).tolist() == [0, 1]


def test_background_tokens_are_regions_of_their_own_after_the_segments():
    labels = torch.tensor([[0, 9], [4, 0], [9, 0]])
    assert vote_regions(labels, 1).tolist() == [2, 1, 0, 3, 1, 4]


def test_a_map_of_background_makes_every_token_a_region():
    assert vote_regions(torch.zeros(4, 6, dtype=torch.long), 2).tolist() == list(range(6))


def test_a_map_without_background_has_its_segments_only():
    assert vote_regions(torch.full((4, 6), 1000), 2).tolist() == [0] * 6


def test_thousands_of_labels_never_make_a_matrix_of_tokens_by_labels(monkeypatch):
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", 2**14)
    labels = torch.randperm(256 * 256, generator=torch.Generator().manual_seed(0)).reshape(256, 256)
    with Recorder() as recorder:
        regions = vote_regions(labels, 4)
    assert regions.tolist() == vote_oracle(labels.tolist(), 4, 0)
    # Strips of the map, and a few numbers per token.
    assert recorder.largest <= 8 * 2**14


@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_a_map_that_the_patches_do_not_cut_evenly_is_refused(shape):
    with raises(
        ValueError, f"A label map of {shape[0]}x{shape[1]} px is not a multiple of the patch of 2 px."
    ):
        vote_regions(torch.zeros(shape, dtype=torch.long), 2)


@pytest.mark.parametrize("shape, patch_size", [((4,), 2), ((1, 4, 4), 2), ((0, 4), 2), ((4, 0), 2), ((4, 4), 0)])
def test_labels_that_are_no_map_and_empty_patches_are_refused(shape, patch_size):
    with raises(
        ValueError,
        "labels must be a map [height, width], no side of it 0, and patch_size at least 1. "
        f"Got shape {shape} and {patch_size}.",
    ):
        vote_regions(torch.zeros(shape, dtype=torch.long), patch_size)


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


@pytest.mark.parametrize("threshold, coverage", RULES)
def test_slots_equal_the_rules_in_exact_arithmetic(threshold, coverage):
    for seed in range(250):
        importance, regions, rng = random_case(seed)
        N, R = len(importance), len(set(regions.tolist()))
        for budget in {1, R, rng.randint(1, N), N, N + 5}:
            if coverage and budget < R:
                continue
            slots = select_tokens(importance, regions, budget, threshold=threshold, coverage=coverage)
            expected = select_oracle(importance.tolist(), regions.tolist(), budget, threshold, coverage)
            assert slots.dtype == torch.long and slots.tolist() == expected, (seed, budget)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_region_of_constant_importance_keeps_every_token(dtype):
    # Lemma 1. A float32 mean lies above its members for 40 % of these sizes, a float64 mean of float64 for some.
    for value in (0.1, 1 / 7, 1.1e-5):
        for size in range(1, 201):
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


def test_selection_runs_the_same_operations_for_any_number_of_tokens_and_regions():
    names = []
    for N, R, budget in ((10, 2, 5), (5000, 300, 4000)):
        with Recorder() as recorder:
            select_tokens(torch.rand(N), torch.randint(R, (N,)), budget)
        names.append(recorder.names)
        assert recorder.largest <= 8 * max(N, 100)
    assert names[0] == names[1]


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


@pytest.mark.parametrize("size", [1, 10, 100])
def test_the_size_of_the_blocks_does_not_change_the_merged_tokens(monkeypatch, size):
    generator = torch.Generator().manual_seed(0)
    tokens, slots = torch.randn(50, 9, generator=generator), random_slots(50, 8, generator)
    expected = merge_tokens(tokens, slots, 8)
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", size)
    assert torch.equal(merge_tokens(tokens, slots, 8), expected)


@pytest.mark.parametrize("size", [1, 2**21])
def test_gradients_reach_every_kept_token_as_one_over_the_size_of_its_slot(monkeypatch, size):
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", size)
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


def test_merging_never_holds_all_tokens_in_float32(monkeypatch):
    monkeypatch.setattr(token_compression, "BLOCK_ELEMENTS", 2**15)
    tokens = torch.ones(4096, 256, dtype=torch.bfloat16)
    slots = torch.full((4096,), -1)
    slots[::32] = torch.arange(128)
    with Recorder() as recorder:
        merge_tokens(tokens, slots, 128)
    assert recorder.largest <= 4 * 128 * 256
    with Recorder() as recorder:
        merge_tokens(tokens, torch.arange(4096) % 64, 64)
    assert recorder.largest <= 4 * 2**15


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


# The module


def test_the_module_offers_the_steps_and_nothing_else():
    assert token_compression.__all__ == [
        "align_importance",
        "cluster_regions",
        "grid_regions",
        "vote_regions",
        "select_tokens",
        "merge_tokens",
    ]


@pytest.mark.parametrize("grid, num_regions", [((6, 6), 9), ((6, 6), 8), ((5, 7), 10), ((4, 4), 1), ((3, 3), 100)])
def test_grid_regions_are_cells_of_the_whole_scale(grid, num_regions):
    height, width = grid
    side = int(num_regions**0.5)
    cells = [
        (int(row * min(side, height) / height), int(column * min(side, width) / width))
        for row in range(height)
        for column in range(width)
    ]
    found = grid_regions(torch.arange(height * width), grid, num_regions)
    assert [sorted(set(cells)).index(cell) for cell in cells] == found.tolist()
    assert int(found.max()) + 1 <= num_regions


def test_grid_regions_skip_cells_that_show_nothing():
    positions = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11])  # the middle rows of 4 x 4, letterbox above and below
    assert grid_regions(positions, (4, 4), 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grid_regions(positions[4:], (4, 4), 4).tolist() == [0, 0, 1, 1]


def test_grid_regions_need_a_region():
    with pytest.raises(ValueError, match="num_regions must be at least 1. Got 0."):
        grid_regions(torch.tensor([0]), (4, 4), 0)
