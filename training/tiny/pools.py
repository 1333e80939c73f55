"""Scenes as pools of encoded tiles, one file each: what the decoder learns from where an image has far too many tiles.

Of a scene with native objects a pool has every tile of the coarse levels, and of each finer one those that show what a
question may need (objects, pads and ground of the sites), what else stands around, and others. Of an ordinary scene it
has all tiles. Files are painted and encoded by processes of one thread; those that are there are not made again.

Letters: T tiles of a pool, P patches of a tile, D decoder width, L levels, V tokens.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ...common.files import whole_files
from ...common.loading import load_model
from ...geometry_uhr_bat import grids, positions_of, tile_of
from ...scenes.evidence import points_of_tokens, tokens_at
from ...scenes.layout import PAD_SIDE, SITE_SIDE, WIDTH, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import paint

WHOLE = 64  # tiles of a level that is kept whole
EVERY_TILE = 10**9  # as `max_tiles`: nobody asks, so nothing is chosen


def tiles_of_points(scene, points, grid, patches_per_side) -> list[int]:
    """The tiles of a level, in the order of the points that they show; each once."""
    positions = np.array(tokens_at(scene, points, grid), int)
    return list(dict.fromkeys(tile_of(positions, grid[1], patches_per_side)[0].tolist()))


def choose_pool(scene, pyramid, level_idx, num_tiles, rng) -> np.ndarray:
    """long[T], ascending: the tiles of a level that a pool has."""
    shown = pyramid.num_shown(level_idx) > 0
    if shown.sum() <= max(WHOLE, num_tiles):
        return np.flatnonzero(shown)
    grid, p = pyramid.grids[level_idx], pyramid.patches_per_side

    def shuffled(points, spread, copies):
        """Points around some others, `copies` for each of them, in any order."""
        points = np.repeat(np.asarray(points, float).reshape(-1, 2), copies, axis=0)
        points += rng.uniform(-spread, spread, points.shape)
        inside = (points > 0).all(1) & (points < (WIDTH, scene.height)).all(1)
        return rng.permutation(points[inside]).tolist()

    in_sites = [thing.centre for thing in scene.objects if thing.site is not None]
    around = [thing.centre for thing in scene.objects if thing.site is None]
    pads = [pad.centre for pad in scene.pads]
    sites = [site.centre for site in scene.sites]
    needed = tiles_of_points(scene, in_sites, grid, p)
    others = [
        tiles_of_points(scene, points, grid, p)
        for points in (
            shuffled(pads, PAD_SIDE / 2, 3),
            shuffled(sites, SITE_SIDE / 2, 12),
            shuffled(in_sites, PAD_SIDE, 2),
            shuffled(around, 0, 1),
        )
    ]
    # One of each kind in turn, until there are enough.
    mixed = [
        tile for group in zip(*(kind + [None] * num_tiles for kind in others)) for tile in group if tile is not None
    ]
    chosen = [tile for tile in dict.fromkeys(needed + mixed) if shown[tile]]
    return np.sort(chosen[: max(num_tiles, len(needed))])


@torch.inference_mode()
def encode_pool(model, image_processor, scene, num_tiles) -> dict[str, torch.Tensor]:
    """{tokens: bfloat16[T, P, D] without scale embedding, shown: bool[T, P], level, tile: long[T], scales: long[L]}."""
    image, native = (paint(scene), False) if scene.width is None else (picture_of(scene), True)
    pyramids = image_processor(image, max_tiles=EVERY_TILE, native=native)
    (features,) = model.encode_image(**pyramids)
    pyramid, rng, parts = features.pyramid, np.random.default_rng([scene.seed, 6]), []
    for level_idx in range(len(pyramid.scales)):
        tiles = choose_pool(scene, pyramid, level_idx, num_tiles if native else EVERY_TILE, rng)
        tokens = model.model.encode_tiles(features, level_idx, tiles.tolist()).bfloat16()
        shown = torch.from_numpy(pyramid.shown(level_idx, tiles)).flatten(1)
        parts.append((tokens, shown, torch.full((len(tiles),), level_idx), torch.from_numpy(tiles)))
    named = dict(zip(("tokens", "shown", "level", "tile"), map(torch.cat, zip(*parts))))
    return named | {"scales": torch.tensor(pyramid.scales)}


class PooledScene:
    """A scene and which of its tokens a pool has, by their index in one tensor of the tokens of all pools.

    Args:
        start: index of the pool's first token.
    """

    def __init__(self, scene, pool, start, patch_size):
        self.scene, self.scales = scene, pool["scales"].tolist()
        self.grids = grids(self.scales, patch_size)
        p = round(pool["tokens"].shape[1] ** 0.5)
        self.indices, self.positions, self.tiles = [], [], []
        for level_idx, grid in enumerate(self.grids):
            rows = (pool["level"] == level_idx).nonzero()[:, 0]
            shown = pool["shown"][rows].flatten()
            positions = positions_of(pool["tile"][rows], grid[1], p).flatten()
            indices = (start + rows[:, None] * p * p + torch.arange(p * p)).flatten()
            self.indices.append(indices[shown].numpy())
            self.positions.append(positions[shown].numpy())
            self.tiles.append(rows.repeat_interleave(p * p)[shown].numpy())
        self.inside = [self._sites_of(level_idx) for level_idx in range(len(self.grids))]

    def _sites_of(self, level_idx):
        """long[V]: the site in which the centre of each token lies, -1 for none."""
        points = points_of_tokens(self.scene, self.grids[level_idx], self.positions[level_idx])
        sites = np.full(len(points), -1)
        for index, site in enumerate(self.scene.sites):
            sites[site.contains(points)] = index
        return sites

    def find(self, level_idx, points) -> np.ndarray:
        """long[found]: places among the pool's tokens of a level of those that show points; what it lacks is left out."""
        wanted = tokens_at(self.scene, points, self.grids[level_idx])
        return np.flatnonzero(np.isin(self.positions[level_idx], wanted))


_worker = {}


def _start_worker(folder):
    torch.set_num_threads(1)
    _worker["processor"], _worker["model"] = load_model(folder, torch.float32, device_map=None)


def _make(seed, native, num_tiles, folder):
    scene = native_scene(seed) if native else make_scene(seed)
    pool = encode_pool(_worker["model"], _worker["processor"].image_processor, scene, num_tiles)
    with whole_files(folder) as built:
        save_file(pool, built / f"{seed}.safetensors")


def make_pools(
    model_folder: Path, seeds, native: bool, num_tiles: int, folder: Path, workers: int, seconds: float | None = None
) -> dict[int, dict]:
    """{seed: pool} of some scenes, read from their files, which are made where they are missing.

    Args:
        native: whether the scenes have native objects.
        num_tiles: tiles of each level beyond the coarse ones.
        seconds: after which no further file is begun; what is there then is what comes back.
    """
    stop = None if seconds is None else time.monotonic() + seconds
    missing = [seed for seed in seeds if not (folder / f"{seed}.safetensors").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        make = partial(_make, native=native, num_tiles=num_tiles, folder=folder)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (model_folder,)) as pool:
            jobs = [pool.submit(make, seed) for seed in missing]
            for job in tqdm(jobs, desc=f"Making {folder.name}", unit="scene"):
                if stop is not None and time.monotonic() > stop:
                    pool.shutdown(wait=True, cancel_futures=True)
                    break
                job.result()
    paths = {seed: folder / f"{seed}.safetensors" for seed in seeds}
    return {seed: load_file(path) for seed, path in paths.items() if path.exists()}
