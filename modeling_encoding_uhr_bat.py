# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT encoding: an image to the tokens of every scale, independent of the question (sections 3.2 and 3.3).

Every tile goes through the vision tower once, up to the feature layer, then through the projector, and each token gets
the embedding of its place and scale.

Axes: I images, S scales, T tiles of an image, P patches of a tile, C width of the tower, N tokens of a scale, V of them
that show the image and not the letterbox, D decoder width. Tokens of a scale stand row by row over its whole grid,
unless "tile by tile" is said.
"""

from dataclasses import replace

import numpy as np
import torch
from transformers.utils import logging

from .geometry_uhr_bat import positions_of, tile_of
from .modeling_outputs_uhr_bat import (
    TileCache,
    UHRBatImageFeatures,
    UHRBatPyramidFeatures,
    accept_region_labels,
    has_images,
)


def first_identical_tile(tiles) -> torch.Tensor:
    """long[T]: for every tile of one colour the first tile of that colour, for any other tile itself.

    Tiles float[T, 3, tile, tile]. Letterbox tiles are all alike, and need the vision tower only once.
    """
    low, high = tiles.flatten(2).aminmax(dim=-1)
    plain = (low == high).all(-1)
    alike = plain[:, None] & plain & (low[:, None] == low).all(-1)
    return torch.where(plain, alike.int().argmax(1), torch.arange(len(tiles), device=tiles.device))


def machine_number(name: str, default: int) -> property:
    """A number of the machine that a model runs on, at least 1, which no checkpoint holds: its base model keeps it."""

    def held_by(model) -> dict:
        return vars(getattr(model, "base_model", model))

    def set_to(model, value):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Got {value}.")
        held_by(model)[f"_{name}"] = value

    return property(lambda model: held_by(model).get(f"_{name}", default), set_to)


class UHRBatEncodingMixin:
    """For a [`VisionLanguageModel`].

    Attributes:
        vision_chunk_size: tiles that go through the vision tower at once: 16 tiles of 577 tokens fill a GPU and keep
            activations small.
        tile_cache_bytes: bytes of encoded tiles that an image keeps for further questions, where tiles are encoded when a
            question looks at them (`max_tiles`): 500 tiles of the 7B model in bfloat16.
    """

    vision_chunk_size = machine_number("vision_chunk_size", 16)
    tile_cache_bytes = machine_number("tile_cache_bytes", 2**31)

    @accept_region_labels
    def encode_image(
        self, pixel_values=None, pixel_attention_mask=None, regions=None, image_pyramids=None
    ) -> list[UHRBatImageFeatures] | list[UHRBatPyramidFeatures]:
        """Every tile through the vision tower once, the projector and the scale embedding (sections 3.2 and 3.3); of a
        pyramid the anchor's, and those of other levels when a question looks at them.

        Args:
            pixel_values, pixel_attention_mask, regions: see [`UHRBatImageInputs`]. A scale without a patch that shows
                the image is left out; the coarsest of the others is the anchor.
            image_pyramids: instead of the three.

        Returns:
            One [`UHRBatImageFeatures`] per image, or [`UHRBatPyramidFeatures`] per pyramid, to be passed to `generate`,
            `compress` or `forward` as `image_features`, with any number of questions.

        Raises:
            ValueError: a shape that does not fit the configuration, or an image that shows nothing.
        """
        if has_images(image_pyramids=image_pyramids):
            for pyramid in image_pyramids:
                self._check_pyramid(pyramid)
            return [self.open_pyramid(pyramid) for pyramid in image_pyramids]
        if not has_images(pixel_values):
            return []
        self._check_image_inputs(pixel_values, pixel_attention_mask, regions)
        no_rows = [None] * len(pixel_values)
        masks = no_rows if pixel_attention_mask is None else pixel_attention_mask
        regions = no_rows if regions is None else regions
        return [self._encode_one(*rows) for rows in zip(pixel_values, masks, regions)]

    def _check_image_inputs(self, pixel_values, pixel_attention_mask, regions):
        scales, side = self.config.scales, self.tile_size
        num_tiles = sum((scale // side) ** 2 for scale in scales)
        expected = [num_tiles, 3, side, side]
        if list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have the shape [images, {', '.join(map(str, expected))}] for the scales "
                f"{scales}. Got {list(pixel_values.shape)}."
            )
        expected = [len(pixel_values), num_tiles * self.patches_per_side**2]
        for name, value in (("pixel_attention_mask", pixel_attention_mask), ("regions", regions)):
            if value is not None and list(value.shape) != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected}: one row per image, one number per patch of the scales "
                    f"{scales}. Got {list(value.shape)}."
                )

    def _encode_one(self, pixel_values, pixel_attention_mask, regions) -> UHRBatImageFeatures:
        scales, times, p = self.config.scales, self.config.scale_embedding_additions, self.patches_per_side
        of_scales = [(scale // self.tile_size * p,) * 2 for scale in scales]
        sizes = [height * width for height, width in of_scales]
        device = pixel_values.device
        if pixel_attention_mask is None:
            pixel_attention_mask = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        positions = [mask.nonzero()[:, 0] for mask in pixel_attention_mask.to(device).split(sizes)]
        if not any(map(len, positions)):
            raise ValueError("`pixel_attention_mask` leaves no patch that shows the image.")

        tokens, anchor_tokens, anchor_positions = [], None, None
        for scale_idx, tiles in enumerate(pixel_values.split([size // p**2 for size in sizes])):
            places, scale = positions[scale_idx], scales[scale_idx]
            if not len(places):
                tokens.append(None)
                continue
            tile_idx, patch_idx = tile_of(places, of_scales[scale_idx][1], p)
            encoded_idx, copy_idx = first_identical_tile(tiles)[tile_idx].unique(return_inverse=True)
            projected = self._project_in_chunks(tiles, encoded_idx, desc=f"Encoding {scale} px")
            projected = projected.flatten(0, 1)[(copy_idx * p**2 + patch_idx).to(projected.device)]
            places = positions[scale_idx] = places.to(projected.device)
            tokens.append(self._add_scale(projected, scale, places, times))
            if anchor_tokens is None:
                # The pass reads the anchor tile by tile, as the tower emits it and the released weights were trained.
                order = (tile_idx * p**2 + patch_idx).argsort().to(projected.device)
                anchor_positions = places[order]
                anchor_tokens = self._add_scale(projected[order], scale, anchor_positions, 1)

        device = anchor_tokens.device
        positions = [places.to(device) for places in positions]
        tokens = [anchor_tokens[:0] if scale is None else scale.to(anchor_tokens) for scale in tokens]
        if regions is not None:
            regions = [one.to(device)[places] for one, places in zip(regions.split(sizes), positions)]
        return UHRBatImageFeatures(anchor_tokens, anchor_positions, tokens, positions, scales, of_scales, regions)

    # ---- Pyramids --------------------------------------------------------------------------------------------------

    def open_pyramid(self, pyramid) -> UHRBatPyramidFeatures:
        """An [`ImagePyramid`], with its anchor encoded."""
        if pyramid.kind != "pyramid":
            raise ValueError(
                "A dynamic pyramid is read by a region focus module: `region_focus` of the configuration is None."
            )
        if pyramid.max_tiles is None:
            raise ValueError(f"{pyramid} does not say how many tiles a question may use: pass `max_tiles`.")
        image = UHRBatPyramidFeatures(None, None, pyramid, self._tile_cache(pyramid))
        tile_idx = torch.from_numpy(np.flatnonzero(pyramid.num_shown(0)))
        projected, positions = self._encode_shown(image, 0, tile_idx)
        tokens = self._add_scale(projected, pyramid.scales[0], positions, 1)
        return replace(image, anchor_tokens=tokens, anchor_positions=positions)

    def _tile_cache(self, pyramid) -> TileCache:
        return TileCache(self.tile_cache_bytes, self.device)

    def _check_pyramid(self, pyramid):
        given, own = (pyramid.tile_size, pyramid.patch_size), (self.tile_size, self.tile_size // self.patches_per_side)
        if given != own:
            raise ValueError(
                f"{pyramid} has tiles of {given[0]} px with patches of {given[1]} px, but the model's have "
                f"{own[0]} and {own[1]} px."
            )

    def encode_level(self, image: UHRBatPyramidFeatures, level_idx: int, tile_idx) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of some tiles of a level, read and encoded unless the image keeps them from an earlier question.

        Args:
            tile_idx: long[T], ascending.

        Returns:
            (float[V, D] as they are clustered and merged, long[V] their positions, ascending): those that show the image.
        """
        projected, positions = self._encode_shown(image, level_idx, tile_idx)
        order = positions.argsort()
        projected, positions = projected[order], positions[order]
        times = self.config.scale_embedding_additions
        return self._add_scale(projected, image.scales[level_idx], positions, times), positions

    def _encode_shown(self, image, level_idx, tile_idx):
        """(float[V, D] without a scale embedding, long[V] their positions) of what shows the image, tile by tile."""
        projected = self.encode_tiles(image, level_idx, tile_idx.tolist())
        p, width = image.pyramid.patches_per_side, image.grids[level_idx][1]
        shown = torch.from_numpy(image.pyramid.shown(level_idx, tile_idx.tolist())).flatten(1).to(projected.device)
        return projected[shown], positions_of(tile_idx.to(projected.device), width, p)[shown]

    def encode_tiles(self, image: UHRBatPyramidFeatures, level_idx: int, tile_idx: list[int]) -> torch.Tensor:
        """float[T, P, D] of some tiles of a level, all their patches, without a scale embedding: read and encoded, or from
        what the image keeps."""
        pyramid = image.pyramid
        found = image.cache.find(level_idx, tile_idx)
        missing = [tile for tile in tile_idx if tile not in found]
        if missing:
            tiles = torch.from_numpy(pyramid.tiles(level_idx, missing)).to(image.cache.device)
            every = torch.arange(len(tiles), device=tiles.device)
            projected = self._project_in_chunks(tiles, every, desc=f"Encoding {pyramid.scales[level_idx]} px")
            found |= dict(zip(missing, projected))
            if not torch.is_grad_enabled():  # what is kept for the next question has no gradient
                # Copies: a row of a tensor would keep the whole of it.
                image.cache.keep(level_idx, {tile: found[tile].clone() for tile in missing})
        if not tile_idx:
            return image.anchor_tokens.new_empty(0, self.patches_per_side**2, self.row_width)
        return torch.stack([found[tile] for tile in tile_idx])

    def without_scale(self, image: UHRBatImageFeatures, scale_idx: int) -> torch.Tensor:
        """float[V, D], `features_of` the tokens of a scale without the embedding of where they lie: what they show."""
        tokens, times = image.tokens[scale_idx], self.config.scale_embedding_additions
        where = self._add_scale(torch.zeros_like(tokens), image.scales[scale_idx], image.positions[scale_idx], times)
        return self.features_of(tokens - where)

    # ---- Parts -----------------------------------------------------------------------------------------------------

    def _project_in_chunks(self, tiles, encoded_idx, desc) -> torch.Tensor:
        """float[T', P, D] of the chosen tiles, through the tower in chunks; only a chunk's activations are held."""
        chunks = encoded_idx.split(self.vision_chunk_size)
        bar = logging.tqdm(chunks, desc=desc, unit="chunk", delay=1, leave=False, disable=self.training)
        return torch.cat([self.project_tiles(tiles[chunk]) for chunk in bar])

    def _add_scale(self, tokens, scale, positions, times) -> torch.Tensor:
        """float[V, D] plus `times` the embedding of their places, in blocks of a chunk of tiles."""
        if times == 0:
            return tokens
        block = self.vision_chunk_size * self.patches_per_side**2
        parts = zip(tokens.split(block), positions.split(block))
        return torch.cat([self.add_scale(rows, scale, places, times) for rows, places in parts])
