# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT regions: the tokens of a scale, or the pixels of a label map, are grouped (eq. 4, 13-15, appendix C.2).

By what tokens show and where they lie (`cluster_regions`: k-means, BIRCH),
by where they lie alone (`grid_regions`), or by a label map of pixels (`vote_labels`, `vote_regions`). Pure functions of
tensors; nothing here knows a model.

Axes: N tokens of a scale in raster order, V of them that show the image, D width of a token, R regions, H and W height
and width of a grid of tokens or of a map of pixels. All sorts are stable and all sums run in a fixed order, so that the
same input gives the same regions on every run, on a GPU too: `index_add_` there does not.
"""

import math

import torch
import torch.nn.functional as F

# Elements of a temporary block, which bounds the memory: at the finest default scale a matrix of N x R takes 660 MB and
# a float32 copy of the tokens 1.2 GB. On a CPU 8 MiB in float32, near its caches; on a GPU, where every block is a launch
# of kernels, 256 MiB: the four scales of the 7B model are clustered in 0.22 s there, and in 0.70 s in blocks of a CPU.
BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**21, 2**26

# Birch groups the leaves of a tree, in memory quadratic in their number: the threshold of the tree is searched until it
# has 1 to 4 leaves per region, in 12 trees at most, which take the threshold down to 1 / 4096.
BIRCH_LEAVES_PER_REGION = 4
BIRCH_TREES = 12


def block_length(width: int, device: torch.device) -> int:
    """How many rows of `width` elements a temporary block on a device has, at least 1."""
    return max(1, (BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS) // width)


def runs_of(sorted_ids: torch.Tensor, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the run of each id 0..num_ids-1 begins in long[N] ascending ids, and how long it is: long[num_ids] each."""
    bounds = torch.searchsorted(sorted_ids, torch.arange(num_ids + 1, device=sorted_ids.device))
    return bounds[:-1], bounds.diff()


def _embed(features, norms, coords):
    """Clustering embedding u_i (eq. 13): unit features beside scaled coordinates, float32[N, D + 2]."""
    return torch.cat([features.float() / norms[:, None], coords], dim=1)


def _first_largest(scores):
    """Column of the first largest value of every row: long[n]. NumPy's search is 5 to 10 times PyTorch's on a CPU, where
    that one takes a fifth of the product's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)


def _nearest_centre(features, norms, coords, centres, embedding=None):
    """Nearest centre of every token, the first of equals (eq. 14): long[N]. `embedding`: `_embed`, where it is kept."""
    num_rows = block_length(max(centres.shape), features.device)
    # |u - c|^2 = |u|^2 - 2 (u.c - |c|^2 / 2): the nearest centre has the largest bracket.
    offset = centres.square().sum(dim=1) / -2
    regions = torch.empty(len(features), dtype=torch.long, device=features.device)
    parts = (features, norms, coords) if embedding is None else (embedding,)
    for *block, out in zip(*(tensor.split(num_rows) for tensor in (*parts, regions))):
        rows = _embed(*block) if embedding is None else block[0]
        out.copy_(_first_largest(torch.addmm(offset, rows, centres.T)))
    return regions


def _mean_centres(features, norms, coords, regions, centres):
    """Mean embedding of every region, float32[R, D + 2]; a region without tokens keeps its centre."""
    order = regions.argsort(stable=True)
    starts, sizes = runs_of(regions[order], len(centres))
    # In blocks of columns, not of tokens: the sums then do not depend on the size of a block.
    num_columns = block_length(len(features), features.device)
    weights = norms[order].reciprocal()
    # Written into one tensor: small results allocated between large temporaries fragment a CPU's heap (1 GB measured).
    sums = torch.empty_like(centres)
    for block, out in zip(features.split(num_columns, dim=1), sums[:, :-2].split(num_columns, dim=1)):
        out.copy_(F.embedding_bag(order, block.float(), starts, mode="sum", per_sample_weights=weights))
    sums[:, -2:] = F.embedding_bag(order, coords, starts, mode="sum")
    return torch.where(sizes[:, None] > 0, sums.div_(sizes[:, None]), centres)


def _kmeans(features, norms, coords, num_regions, num_iterations, generator):
    """Lloyd's algorithm from `num_regions` different tokens, drawn at random (eq. 14): long[N]."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)  # a CPU's, so that every device starts from the same tokens
    drawn = torch.randperm(len(features), generator=generator, device=generator.device)[:num_regions]
    drawn = drawn.to(features.device)
    centres = _embed(features[drawn], norms[drawn], coords[drawn])
    # An embedding that fits in a block is kept from one assignment to the next.
    embedding = (
        _embed(features, norms, coords) if len(features) <= block_length(features.shape[1], features.device) else None
    )
    regions = _nearest_centre(features, norms, coords, centres, embedding)
    for _ in range(num_iterations - 1):
        centres = _mean_centres(features, norms, coords, regions, centres)
        previous, regions = regions, _nearest_centre(features, norms, coords, centres, embedding)
        # Nothing changes from there on. A GPU goes through the rest of the iterations instead of being waited for.
        if features.device.type == "cpu" and torch.equal(previous, regions):
            break
    return regions


def _birch(features, norms, coords, num_regions, num_iterations, generator):
    """Birch of scikit-learn on the CPU: long[N]. It draws nothing and takes the whole embedding in float32."""
    try:
        from sklearn.cluster import Birch
    except ImportError as error:
        raise ImportError('method="birch" needs scikit-learn: pip install "uhr-bat[regions]"') from error

    embedding = _embed(features, norms, coords).cpu().numpy()
    fine, coarse = 0.0, 1.0  # leaves of unit vectors have no radius above 1
    for _ in range(BIRCH_TREES):
        threshold = (fine + coarse) / 2
        tree = Birch(threshold=threshold, n_clusters=None, compute_labels=False).fit(embedding)
        num_leaves = len(tree.subcluster_centers_)
        enough = num_leaves >= num_regions
        if enough or fine == 0.0:
            birch = tree
        fine, coarse = (threshold, coarse) if enough else (fine, threshold)
        if enough and num_leaves <= BIRCH_LEAVES_PER_REGION * num_regions:
            break
    if fine > 0.0:
        birch.set_params(n_clusters=num_regions).partial_fit()  # groups the leaves, the tree stays as it is
    return torch.from_numpy(birch.predict(embedding)).to(features.device).long()


CLUSTERINGS = {"kmeans": _kmeans, "birch": _birch}


@torch.no_grad()
def cluster_regions(
    features: torch.Tensor,
    coords: torch.Tensor,
    num_regions: int,
    *,
    method: str = "kmeans",
    coord_weight: float = 0.05,
    num_iterations: int = 10,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Partition the tokens of a scale by what they show and where they lie (eq. 13-14).

    "kmeans" takes up to `num_iterations` products of [N, D + 2] with [D + 2, R] and, beside its inputs, the memory of
    a few blocks and three sets of centres. "birch" is scikit-learn's on the CPU: it builds up to 12 trees in search of
    a good number of leaves and needs memory for N x D floats and for the square of the number of leaves.

    Args:
        features: float[N, D], token features; only their direction counts. A zero vector is placed by `coords` alone.
        coords: float[N, 2], (row, column) centre of every token in [0, 1] over the whole scale.
        num_regions: regions at most. From N on, every token is a region of its own.
        method: "kmeans" or "birch".
        coord_weight: what the coordinates are multiplied by beside features of unit length.
        num_iterations: assignments of Lloyd's algorithm at most; on a CPU it stops earlier where no token changes
            its region: the result is the same.
        generator: draws the tokens that k-means starts from; by default a fresh one with seed 0.

    Returns:
        long[N], labels 0..R-1 with every label used, R <= num_regions.

    Raises:
        ValueError: unknown method, counts below 1, shapes that do not agree, or features or coordinates that are not
            finite in float32.
        ImportError: "birch" without scikit-learn.
    """
    if method not in CLUSTERINGS:
        raise ValueError(f"Unknown method {method!r}. Known methods: {', '.join(CLUSTERINGS)}.")
    if num_regions < 1 or num_iterations < 1:
        raise ValueError(f"num_regions and num_iterations must be at least 1. Got {num_regions} and {num_iterations}.")
    if features.dim() != 2 or coords.shape != (len(features), 2):
        raise ValueError(
            "features must be [N, D] and coords [N, 2] with the same N. "
            f"Got {tuple(features.shape)} and {tuple(coords.shape)}."
        )
    N, D = features.shape
    num_rows = block_length(D + 2, features.device)
    # A model under autocast would cluster in half precision.
    with torch.autocast(features.device.type, enabled=False):
        norms = torch.empty(N, device=features.device)
        for block, out in zip(features.split(num_rows), norms.split(num_rows)):
            out.copy_(torch.linalg.vector_norm(block.float(), dim=1))
        coords = coord_weight * coords.float()
        if not (norms.isfinite().all() & coords.isfinite().all()):
            raise ValueError(
                "features and coords must be finite in float32, and so must the lengths of the features. "
                f"Got {int((~norms.isfinite()).sum())} of {N} tokens with other features "
                f"and {int((~coords.isfinite()).any(dim=1).sum())} with other coordinates."
            )
        if num_regions >= N:
            return torch.arange(N, device=features.device)
        norms = norms.clamp_min(1e-12)
        regions = CLUSTERINGS[method](features, norms, coords, num_regions, num_iterations, generator)
    return regions.unique(return_inverse=True)[1]


@torch.no_grad()
def grid_regions(positions: torch.Tensor, grid: tuple[int, int], num_regions: int) -> torch.Tensor:
    """Partition the tokens of a scale into cells of a regular grid: known before the image is encoded, and free.

    The whole scale is cut into g x g cells, g the largest number with g * g <= num_regions; sides of cells differ by
    one token at most. Cells that hold none of `positions` (the letterbox) are no regions.

    Args:
        positions: long[V], row-major on the grid of the scale.
        grid: (height, width) of the scale in tokens, H and W.
        num_regions: regions at most.

    Returns:
        long[V], labels 0..R-1 with every label used, R <= num_regions, cells row by row.

    Raises:
        ValueError: num_regions below 1.
    """
    H, W = grid
    if num_regions < 1:
        raise ValueError(f"num_regions must be at least 1. Got {num_regions}.")
    g = math.isqrt(num_regions)
    rows, columns = positions // W, positions % W
    cells = rows * min(g, H) // H * min(g, W) + columns * min(g, W) // W
    return cells.unique(return_inverse=True)[1]


def _majority(labels):
    """Most frequent label of every row, the smallest of equals: long[N, P] -> long[N]."""
    P = labels.shape[1]
    labels = labels.sort(dim=1).values
    position = torch.arange(P, dtype=torch.int32, device=labels.device)
    same = F.pad(labels[:, 1:] == labels[:, :-1], (1, 0))
    start = position.masked_fill(same, 0).cummax(dim=1).values
    # Labels ascend: of the longest runs, the first is the one of the smallest label.
    longest = (position - start).argmax(dim=1, keepdim=True)
    return labels.gather(1, longest)[:, 0]


def vote_labels(labels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Label of every token from a map of pixel labels, a vote of the pixels of every patch (eq. 15).

    Ties go to the smallest label.

    Args:
        labels: int[H, W], label of every pixel; negative ones are labels like others.
        patch_size: pixels a side of a patch; 1 if the labels are those of tokens already.

    Returns:
        int[H / patch_size, W / patch_size] in the dtype of `labels`.

    Raises:
        ValueError: the map is no matrix or empty, or the patches do not cut it without a remainder.
    """
    if labels.dim() != 2 or 0 in labels.shape or patch_size < 1:
        raise ValueError(
            "labels must be a map [height, width], no side of it 0, and patch_size at least 1. "
            f"Got shape {tuple(labels.shape)} and {patch_size}."
        )
    H, W = labels.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"A label map of {H}x{W} px is not a multiple of the patch of {patch_size} px.")
    votes = []
    for strip in labels.split(patch_size * block_length(patch_size * W, labels.device)):
        patches = strip.unfold(0, patch_size, patch_size).unfold(1, patch_size, patch_size)
        # [rows, W / p, p, p] -> [rows * W / p, p * p]
        votes.append(_majority(patches.reshape(-1, patch_size**2)))
    return torch.cat(votes).view(H // patch_size, W // patch_size)


def vote_regions(labels: torch.Tensor, patch_size: int, *, background: int = 0) -> torch.Tensor:
    """Regions of a scale from a map of pixel labels (eq. 15).

    The votes of `vote_labels`, numbered. A token whose vote is the background becomes a region of its own: the
    background is what no segment covers, not one thing.

    Args:
        labels: int[H, W], label of every pixel; negative ones are labels like others.
        patch_size: pixels a side of a patch; 1 if the labels are those of tokens already.
        background: the label of what belongs to no segment.

    Returns:
        long[N], labels 0..R-1 with every label used: first the segments in the order of their labels, then the
        background tokens in raster order.

    Raises:
        ValueError: as `vote_labels`.
    """
    votes = vote_labels(labels, patch_size).flatten()
    segment = votes != background
    segments = votes[segment].unique()
    return torch.where(segment, torch.searchsorted(segments, votes), len(segments) - 1 + (~segment).cumsum(0))
