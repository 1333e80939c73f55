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
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .geometry_uhr_bat import positions_of, tile_of
from .image_pyramids_uhr_bat import is_dynamic
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


class UHRBatEncodingMixin:
    """For a model with a `vision_tower`, a `multi_modal_projector`, a `scale_embedding` and text embeddings."""

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
            return [
                self.open_dynamic(pyramid) if is_dynamic(pyramid) else self._open_pyramid(pyramid)
                for pyramid in image_pyramids
            ]
        if not has_images(pixel_values):
            return []
        self._check_image_inputs(pixel_values, pixel_attention_mask, regions)
        no_rows = [None] * len(pixel_values)
        masks = no_rows if pixel_attention_mask is None else pixel_attention_mask
        regions = no_rows if regions is None else regions
        return [self._encode_one(*rows) for rows in zip(pixel_values, masks, regions)]

    def _check_image_inputs(self, pixel_values, pixel_attention_mask, regions):
        config = self.config
        num_tiles = sum((scale // config.tile_size) ** 2 for scale in config.scales)
        expected = [num_tiles, 3, config.tile_size, config.tile_size]
        if list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have the shape [images, {', '.join(map(str, expected))}] for the scales "
                f"{config.scales}. Got {list(pixel_values.shape)}."
            )
        expected = [len(pixel_values), sum(height * width for height, width in config.grids)]
        for name, value in (("pixel_attention_mask", pixel_attention_mask), ("regions", regions)):
            if value is not None and list(value.shape) != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected}: one row per image, one number per patch of the scales "
                    f"{config.scales}. Got {list(value.shape)}."
                )

    def _encode_one(self, pixel_values, pixel_attention_mask, regions) -> UHRBatImageFeatures:
        config = self.config
        p = config.tile_size // config.patch_size
        sizes = [height * width for height, width in config.grids]
        device = pixel_values.device
        if pixel_attention_mask is None:
            pixel_attention_mask = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        positions = [mask.nonzero()[:, 0] for mask in pixel_attention_mask.to(device).split(sizes)]
        if not any(map(len, positions)):
            raise ValueError("`pixel_attention_mask` leaves no patch that shows the image.")

        tokens, anchor_tokens, anchor_positions = [], None, None
        for scale_idx, tiles in enumerate(pixel_values.split([size // p**2 for size in sizes])):
            places = positions[scale_idx]
            if not len(places):
                tokens.append(self.get_input_embeddings().weight.new_empty(0, config.text_config.hidden_size))
                continue
            tile_idx, patch_idx = tile_of(places, config.grids[scale_idx][1], p)
            encoded_idx, copy_idx = first_identical_tile(tiles)[tile_idx].unique(return_inverse=True)
            scale = config.scales[scale_idx]
            projected = self._project_tiles(tiles, encoded_idx, desc=f"Encoding {scale} px")
            projected = projected.flatten(0, 1)[(copy_idx * p**2 + patch_idx).to(projected.device)]
            places = positions[scale_idx] = places.to(projected.device)
            tokens.append(self._add_scale_embedding(projected, scale, places, config.scale_embedding_additions))
            if anchor_tokens is None:
                # The pass reads the anchor tile by tile, as the tower emits it and the released weights were trained.
                order = (tile_idx * p**2 + patch_idx).argsort().to(projected.device)
                anchor_positions = places[order]
                anchor_tokens = self._add_scale_embedding(projected[order], scale, anchor_positions, 1)

        device = anchor_tokens.device
        positions = [places.to(device) for places in positions]
        tokens = [scale.to(anchor_tokens) for scale in tokens]
        if regions is not None:
            regions = [one.to(device)[places] for one, places in zip(regions.split(sizes), positions)]
        return UHRBatImageFeatures(
            anchor_tokens, anchor_positions, tokens, positions, config.scales, config.grids, regions
        )

    # ---- Pyramids --------------------------------------------------------------------------------------------------

    def _open_pyramid(self, pyramid) -> UHRBatPyramidFeatures:
        if pyramid.max_tiles is None:
            raise ValueError(f"{pyramid} does not say how many tiles a question may use: pass `max_tiles`.")
        tiles = (pyramid.tile_size, pyramid.patch_size)
        if tiles != (self.config.tile_size, self.config.patch_size):
            raise ValueError(
                f"{pyramid} has tiles of {tiles[0]} px with patches of {tiles[1]} px, but the model's have "
                f"{self.config.tile_size} and {self.config.patch_size} px."
            )
        cache = TileCache(self.config.tile_cache_bytes, self.device)
        image = UHRBatPyramidFeatures(None, None, pyramid, cache)
        tile_idx = torch.from_numpy(np.flatnonzero(pyramid.num_shown(0)))
        projected, positions = self._encode_shown(image, 0, tile_idx)
        tokens = self._add_scale_embedding(projected, pyramid.scales[0], positions, 1)
        return replace(image, anchor_tokens=tokens, anchor_positions=positions)

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
        return self._add_scale_embedding(projected, image.scales[level_idx], positions, times), positions

    def _encode_shown(self, image, level_idx, tile_idx):
        """(float[V, D] without a scale embedding, long[V] their positions) of what shows the image, tile by tile."""
        projected = self.encode_tiles(image, level_idx, tile_idx.tolist())
        p, width = image.pyramid.patches_per_side, image.grids[level_idx][1]
        shown = torch.from_numpy(image.pyramid.shown(level_idx, tile_idx.tolist())).flatten(1).to(projected.device)
        return projected[shown], positions_of(tile_idx.to(projected.device), width, p)[shown]

    def encode_tiles(self, image: UHRBatPyramidFeatures, level_idx: int, tile_idx: list[int]) -> torch.Tensor:
        """float[T, P, D] of some tiles of a level, all their patches, without a scale embedding: read and encoded, or from
        what the image keeps."""
        pyramid, p = image.pyramid, image.pyramid.tile_size // image.pyramid.patch_size
        found = image.cache.find(level_idx, tile_idx)
        missing = [tile for tile in tile_idx if tile not in found]
        if missing:
            tiles = torch.from_numpy(pyramid.tiles(level_idx, missing)).to(image.cache.device)
            every = torch.arange(len(tiles), device=tiles.device)
            projected = self._project_tiles(tiles, every, desc=f"Encoding {pyramid.scales[level_idx]} px")
            found |= dict(zip(missing, projected))
            if not torch.is_grad_enabled():  # what is kept for the next question has no gradient
                # Copies: a row of a tensor would keep the whole of it.
                image.cache.keep(level_idx, {tile: found[tile].clone() for tile in missing})
        if not tile_idx:
            return self.get_input_embeddings().weight.new_empty(0, p * p, self.config.text_config.hidden_size)
        return torch.stack([found[tile] for tile in tile_idx])

    # ---- Parts -----------------------------------------------------------------------------------------------------

    def _project_tiles(self, tiles, encoded_idx, desc) -> torch.Tensor:
        """float[T', P, D] of the chosen tiles, through the tower in chunks; only a chunk's activations are held."""
        chunks = encoded_idx.split(self.config.vision_chunk_size)
        bar = logging.tqdm(chunks, desc=desc, unit="chunk", delay=1, leave=False, disable=self.training)
        return torch.cat([self.multi_modal_projector(self.vision_tower(tiles[chunk])) for chunk in bar])

    def _add_scale_embedding(self, tokens, scale, positions, times) -> torch.Tensor:
        """float[V, D] plus `times` the embedding of their places, in blocks of a chunk of tiles."""
        if times == 0:
            return tokens
        block = self.config.vision_chunk_size * (self.config.tile_size // self.config.patch_size) ** 2
        blocks = [
            rows + times * self.scale_embedding(scale, places).to(rows)
            for rows, places in zip(tokens.split(block), positions.split(block))
        ]
        return torch.cat(blocks)

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """The uncompressed image: the tower's outputs, and in `pooler_output` float[V, D] per image, all tokens.

        Use `encode_image` for large images: this one holds what the tower returns for all tiles at once.
        """
        I, T = pixel_values.shape[:2]
        tower = self.vision_tower.vision_model  # all of it, to its last layer
        outputs = tower(pixel_values.flatten(0, 1).to(tower.dtype), **kwargs)
        features = self.encode_image(pixel_values, pixel_attention_mask)

        def by_image(states):
            return None if states is None else tuple(state.unflatten(0, (I, T)) for state in states)

        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state.unflatten(0, (I, T)),
            pooler_output=[torch.cat(image.tokens) for image in features],
            hidden_states=by_image(outputs.hidden_states),
            attentions=by_image(outputs.attentions),
        )
