"""Tokens to regions against plain-loop oracles, written from the equations of sections 3.4 and appendix C."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from images import raises
from recorder import Recorder
from uhr_bat.token_clustering_uhr_bat import cluster_regions, grid_regions, vote_labels, vote_regions

# What may be held at once beside a few numbers per token, 2^21 elements of float32.
BLOCK_BYTES = 4 * 2**21


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


@pytest.mark.parametrize("method", ["kmeans", "birch"])
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
def test_clustering_never_holds_a_matrix_of_tokens_by_regions_or_a_copy_of_the_features(dtype):
    N, D, R = 9216, 512, 512
    features, coords = random_scene(96, D)
    features = features.to(dtype)
    with Recorder() as recorder:
        cluster_regions(features, coords, R, num_iterations=2)
    # A block is 8 MiB; N x R and N x D take 18 MiB in float32.
    assert recorder.largest <= BLOCK_BYTES


def test_the_number_of_operations_does_not_grow_with_the_number_of_regions():
    features, coords = random_scene(16, 8)
    counts = []
    for num_regions in (3, 200):
        with Recorder() as recorder:
            cluster_regions(features, coords, num_regions, num_iterations=2)
        counts.append(recorder.num_operations)
    assert counts[1] <= 1.5 * counts[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_several_blocks_are_clustered_as_plain_lloyd_does(dtype):
    side, D, R = 64, 520, 12  # 8.1 MiB in float32, a block is 8
    features, coords = random_scene(side, 20, num_kinds=30)
    features = features @ torch.randn(20, D, generator=torch.Generator().manual_seed(0)) + 1.0
    features = features.to(dtype)
    drawn = torch.randperm(side**2, generator=torch.Generator().manual_seed(0))[:R]
    embedding = torch.cat([F.normalize(features.double(), dim=1), 0.05 * coords], dim=1)
    centres, previous, expected = embedding[drawn], None, torch.zeros(side**2)
    while previous is None or not torch.equal(previous, expected):
        previous, expected = expected, (embedding @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=1)
        centres = torch.stack([embedding[expected == label].mean(dim=0) for label in range(R)])
    regions = cluster_regions(features, coords, R, num_iterations=100)
    assert torch.equal(regions, expected)


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
    with raises(ImportError, 'method="birch" needs scikit-learn: pip install "uhr-bat[regions]"'):
        cluster_regions(*random_scene(4, 3), 2, method="birch")


def test_an_unknown_method_is_refused_with_the_known_ones():
    with raises(ValueError, "Unknown method 'ward'. Known methods: kmeans, birch."):
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


# vote_labels and vote_regions, eq. 15


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


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.int16])
def test_votes_are_the_labels_themselves_in_their_dtype_and_order(dtype):
    labels = torch.tensor([[7, 7, -4, 5, 0, 0], [5, 5, 5, -4, 0, 9]], dtype=dtype)
    votes = vote_labels(labels, 2)
    assert votes.dtype == dtype and votes.tolist() == [[5, -4, 0]]
    assert torch.equal(vote_labels(labels, 1), labels)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_regions_of_votes_are_the_votes_numbered(patch_size):
    labels = torch.randint(-1, 4, (6, 12), generator=torch.Generator().manual_seed(0))
    votes = vote_labels(labels, patch_size)
    assert torch.equal(vote_regions(labels, patch_size), vote_regions(votes, 1))


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


def test_thousands_of_labels_never_make_a_matrix_of_tokens_by_labels():
    labels = torch.randperm(1280 * 2048, generator=torch.Generator().manual_seed(0)).reshape(1280, 2048)
    with Recorder() as recorder:
        votes = vote_labels(labels, 4)
    # No label twice: the smallest of every patch wins.
    assert torch.equal(votes, labels.unfold(0, 4, 4).unfold(1, 4, 4).amin(dim=(2, 3)))
    # Strips of a block, in int64, where the map takes 20 MiB.
    assert recorder.largest <= 2 * BLOCK_BYTES


@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_a_map_that_the_patches_do_not_cut_evenly_is_refused(shape):
    with raises(ValueError, f"A label map of {shape[0]}x{shape[1]} px is not a multiple of the patch of 2 px."):
        vote_regions(torch.zeros(shape, dtype=torch.long), 2)


@pytest.mark.parametrize("shape, patch_size", [((4,), 2), ((1, 4, 4), 2), ((0, 4), 2), ((4, 0), 2), ((4, 4), 0)])
def test_labels_that_are_no_map_and_empty_patches_are_refused(shape, patch_size):
    with raises(
        ValueError,
        "labels must be a map [height, width], no side of it 0, and patch_size at least 1. "
        f"Got shape {shape} and {patch_size}.",
    ):
        vote_regions(torch.zeros(shape, dtype=torch.long), patch_size)


# grid_regions


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
