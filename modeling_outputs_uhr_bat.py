# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT outputs: what an encoded image is, what the compression returns by name, and what the models return.

Axes: I images, S scales, N tokens of a scale, V of them that show the image and not the letterbox, D decoder width,
B prompts.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypedDict

import torch
import torch.utils._pytree as pytree
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from .budgets_uhr_bat import first_with_tokens

# What the library calls the cache of keys and values, as a field and as an argument: `past_key_values` up to 5.23,
# `cache` from 5.24 on.
CACHE = next(one.name for one in fields(BaseModelOutputWithPast) if one.name in ("cache", "past_key_values"))


def accept_past_key_values(version):
    """Decorator of a call that takes `cache`: from 5.24 on, the cache's former name warns that it will be gone in this
    version, as the library's own models do."""
    if CACHE != "cache":
        return lambda call: call
    return deprecate_kwarg("past_key_values", new_name="cache", version=version)


class Places(NamedTuple):
    """Where rows of one level lie.

    Attributes:
        positions: long[V], row * width + column on the level's grid, in the order of the rows.
        grid: (height, width) of the level in rows.
        level: index of the scale or level, 0 = the coarsest.
    """

    positions: torch.Tensor
    grid: tuple[int, int]
    level: int


class KeptPlaces(NamedTuple):
    """Where the visual tokens of one level lie.

    Attributes:
        points: float32[B_s, 2], (row, column) on the level's grid, in the order of the visual tokens: whole numbers where a
            token stands for itself, the mean of the places that were merged into it otherwise.
        grid, level: as in [`Places`].
    """

    points: torch.Tensor
    grid: tuple[int, int]
    level: int


@dataclass
class UHRBatImageFeatures:
    """One encoded image: all that does not depend on the question. Encode once, ask many.

    Attributes:
        kind: "whole". All that is encoded says by this name what it is.
        anchor_tokens: float[V_1, D], tokens of the anchor, the coarsest scale that shows the image, with the scale
            embedding added once, tile by tile, as the importance pass reads them.
        anchor_positions: long[V_1], place of each anchor token on the anchor grid.
        tokens: float[V_s, D] for every scale, as they are clustered and merged.
        positions: long[V_s] for every scale, place of each token on the grid of its scale, ascending.
        scales: sides of the views in pixels: those of the configuration, or levels of the image's own.
        grids: (height, width) in tokens of every scale.
        regions: long[V_s] for every scale where regions were handed in (0 = background), else None.
        partitions: long[V_s] by (scale index, number of regions): partitions that were computed so far; and by "dates" what the
            image was last compared with, and how it differs.
    """

    anchor_tokens: torch.Tensor
    anchor_positions: torch.Tensor
    tokens: list[torch.Tensor]
    positions: list[torch.Tensor]
    scales: list[int]
    grids: list[tuple[int, int]]
    regions: list[torch.Tensor] | None = None
    partitions: dict = field(default_factory=dict)

    kind = "whole"

    def places(self, scale_idx: int) -> Places:
        """Where the `tokens` of a scale lie."""
        return Places(self.positions[scale_idx], self.grids[scale_idx], scale_idx)

    @property
    def anchor_places(self) -> Places:
        """Where the `anchor_tokens` lie."""
        return Places(self.anchor_positions, self.grids[self.anchor_idx], self.anchor_idx)

    @property
    def anchor_idx(self) -> int:
        """Index of the anchor: the coarsest scale that shows anything of the image."""
        return first_with_tokens(list(map(len, self.positions)))

    @property
    def available(self) -> list[int]:
        """int[S], tokens of every scale that show the image."""
        return [len(positions) for positions in self.positions]

    def to(self, device, non_blocking=False) -> "UHRBatImageFeatures":
        """The same on another device: thousands of encoded images fit in a CPU's memory, few in a GPU's."""
        return replace(self, **_moved(self, device, non_blocking))


def _moved(image, device, non_blocking) -> dict:
    """The fields of an encoded image, their tensors on another device."""
    values = {one.name: getattr(image, one.name) for one in fields(image)}
    return pytree.tree_map_only(torch.Tensor, lambda one: one.to(device, non_blocking=non_blocking), values)


class TileCache:
    """Encoded tiles of one image for a device, kept there or on another, the least recently used of which go where they take
    more than `limit` bytes. Threads share it."""

    def __init__(self, limit: int, device, kept_on=None):
        self.limit, self.device, self.kept_on, self.size = limit, device, kept_on or device, 0
        self._tiles, self._lock = OrderedDict(), threading.Lock()

    def __reduce__(self):
        """Tiles stay where they are: what is copied, or sent to another process, has an empty cache of its own."""
        return TileCache, (self.limit, self.device, self.kept_on)

    def find(self, level_idx: int, tile_idx: list[int]) -> dict[int, torch.Tensor]:
        """{tile: float[P, D]} of those tiles of a level that are there."""
        with self._lock:
            found = {tile: self._tiles[level_idx, tile] for tile in tile_idx if (level_idx, tile) in self._tiles}
            for tile in found:
                self._tiles.move_to_end((level_idx, tile))
        return {tile: tokens.to(self.device) for tile, tokens in found.items()}

    def keep(self, level_idx: int, tiles: dict[int, torch.Tensor]):
        """Add tiles {tile: float[P, D]} of a level."""
        with self._lock:
            for tile, tokens in tiles.items():
                if (level_idx, tile) not in self._tiles:
                    self._tiles[level_idx, tile] = tokens.to(self.kept_on)
                    self.size += tokens.nbytes
            while self.size > self.limit and self._tiles:
                self.size -= self._tiles.popitem(last=False)[1].nbytes

    def __len__(self):
        return len(self._tiles)


class _Levels:
    """Of an image that is encoded level by level, as its `pyramid` has them."""

    @property
    def scales(self) -> list[int]:
        """Sides of the levels in pixels, the longer one where they are no squares."""
        return self.pyramid.scales

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of every level."""
        return self.pyramid.grids

    def to(self, device, non_blocking=False):
        """The same on another device, with an empty cache of its own."""
        cache = type(self.cache)(self.cache.limit, device)
        return replace(self, **_moved(self, device, non_blocking) | {"cache": cache})


@dataclass
class UHRBatPyramidFeatures(_Levels):
    """An image that is encoded as far as no question is needed: its anchor. The tiles of finer levels are read and encoded
    when a question looks at them, and kept for the next one. Ask any number of questions, from several threads too.

    Attributes:
        kind: "pyramid".
        anchor_tokens, anchor_positions: as in [`UHRBatImageFeatures`].
        pyramid: the [`ImagePyramid`], with the number of tiles that a question may use.
        cache: tiles that were encoded so far, before the scale embedding.
    """

    anchor_tokens: torch.Tensor
    anchor_positions: torch.Tensor
    pyramid: Any
    cache: TileCache

    kind = "pyramid"
    anchor_idx = 0
    anchor_places = UHRBatImageFeatures.anchor_places

    @property
    def available(self) -> list[int]:
        """int[S], tokens of every level that there will be at least, whichever tiles a question looks at."""
        return self.pyramid.available

    def with_max_tiles(self, max_tiles: int) -> "UHRBatPyramidFeatures":
        """The same encoded image, and the same cache, for questions that may use another number of tiles."""
        return replace(self, pyramid=self.pyramid.with_max_tiles(max_tiles))


@dataclass
class UHRBatDynamicFeatures(_Levels):
    """An image as the region focus module descends it: its thumbnail is encoded, tiles of its levels are when a question
    looks at them, and kept for the next one. Threads may share it.

    Attributes:
        kind: "dynamic".
        thumbnail: float[P, D].
        pyramid: the [`DynamicPyramid`].
        cache: tiles that were encoded so far.
        partitions: of no region, as those of other images.
    """

    thumbnail: torch.Tensor
    pyramid: Any
    cache: TileCache
    partitions: dict = field(default_factory=dict)

    kind = "dynamic"


class UHRBatImageInputs(TypedDict, total=False):
    """The arguments that bring the images of a batch of prompts into the model; the one list of them.

    Attributes:
        pixel_values: float[I, T, 3, tile, tile], tiles of all scales, ascending scales, row-major.
        pixel_attention_mask: bool or int[I, N], 1 where a patch shows the image and not only the letterbox; the patches
            of all scales, ascending scales, each row by row over its grid. None: all show the image.
        regions: long[I, N] in the same order, the region of each token, 0 = background. None: tokens are clustered.
        image_pyramids: list of I [`ImagePyramid`], whose tiles are read and encoded where the question looks, instead of
            the three above.
        image_features: list of I [`UHRBatImageFeatures`] or [`UHRBatPyramidFeatures`], what `encode_image` returned,
            instead of the four above.
        budgets: int[S], visual tokens that each scale may spend in one prompt, shared by its images. None: those of the
            configuration. (A tensor of two dimensions is `token_counts` under its old name.)
        token_counts: long[I, S], exact visual tokens per image and scale, as the processor counts them.
        images_per_prompt: long[B], as the processor counts them.
        registration: list of B affine maps float[2, 3] from the first of a prompt's two images to the second, which show one
            place at two dates (`register`); of prompts without images anything. None: images have nothing to do with each other.
    """

    pixel_values: torch.Tensor | None
    pixel_attention_mask: torch.Tensor | None
    regions: torch.Tensor | None
    image_pyramids: list | None
    image_features: list[UHRBatImageFeatures | UHRBatPyramidFeatures] | None
    budgets: list[int] | torch.Tensor | None
    token_counts: torch.Tensor | None
    images_per_prompt: torch.Tensor | None
    registration: list | None


IMAGE_INPUTS = tuple(UHRBatImageInputs.__annotations__)
# The library takes every argument of `forward` with "label" in its name for a label, so `region_labels` had to go.
accept_region_labels = deprecate_kwarg("region_labels", new_name="regions", version="6.0.0")


def has_images(pixel_values=None, image_pyramids=None, image_features=None, **others) -> bool:
    """Whether a batch brings an image, by the names of [`UHRBatImageInputs`]: an empty list or tensor of images is a batch
    of text."""
    return any(images is not None and len(images) > 0 for images in (pixel_values, image_pyramids, image_features))


def on_grid(values, positions, grid, fill) -> torch.Tensor:
    """[V] -> [H, W], `fill` where no value belongs."""
    height, width = grid
    return values.new_full((height * width,), fill).index_copy(0, positions, values).view(height, width)


class TokenMaps(Sequence):
    """Numbers of the tokens of every scale on its whole grid, each map made when it is asked for: at an image's own
    resolution a grid has millions of cells, few of which have a token.

    Args:
        values: [V_s] for every scale.
        positions: long[V_s] for every scale, their places on the grid.
        grids: (height, width) of every scale.
        fill: where there is no token.
        flat: whether a map is [N], not [H, W].
    """

    def __init__(self, values, positions, grids, fill, flat=False):
        self.values, self.positions, self.grids = list(values), list(positions), list(grids)
        self.fill, self.flat = fill, flat

    def __len__(self):
        return len(self.values)

    def __getitem__(self, scale_idx):
        if isinstance(scale_idx, slice):
            return [self[idx] for idx in range(*scale_idx.indices(len(self)))]
        made = on_grid(self.values[scale_idx], self.positions[scale_idx], self.grids[scale_idx], self.fill)
        return made.flatten() if self.flat else made

    def present(self, scale_idx) -> torch.Tensor:
        """bool[H, W]: where a scale has a token. Elsewhere lies the letterbox, or a tile that no question looked at."""
        positions = self.positions[scale_idx]
        return on_grid(torch.ones_like(positions, dtype=torch.bool), positions, self.grids[scale_idx], False)

    def __repr__(self):
        return f"TokenMaps(grids {self.grids})"


# What `torch.export` and `torch.compile` take apart.
pytree.register_pytree_node(
    TokenMaps,
    lambda maps: ([maps.values, maps.positions], (maps.grids, maps.fill, maps.flat)),
    lambda parts, rest: TokenMaps(*parts, *rest),
    flatten_with_keys_fn=lambda maps: (
        [(pytree.GetAttrKey(name), getattr(maps, name)) for name in ("values", "positions")],
        (maps.grids, maps.fill, maps.flat),
    ),
)


NO_LETTERBOX = (
    "What a Region Focus Module keeps (`dynamic_pyramid`) lies on levels without a letterbox, which cannot be drawn or mapped. "
    "Read the image without `dynamic_pyramid`."
)


def check_letterboxes(image_inputs):
    """Raises `ValueError` for what the image processor made of images for a Region Focus Module, before anything is asked:
    what that keeps cannot be drawn (`UHRBatCompressionOutput.check_letterbox`)."""
    if any(pyramid.kind == "dynamic" for pyramid in image_inputs.get("image_pyramids") or ()):
        raise ValueError(NO_LETTERBOX)


@dataclass
class UHRBatCompressionOutput(ModelOutput):
    """What `compress` returns: lists over images, and over scales inside ([`TokenMaps`] where entries are whole grids).

    Attributes:
        pooler_output: float[n, D] per image, the visual tokens that replace its placeholders: `tokens`, scale after
            scale, the anchor first.
        tokens: float[B_s, D] per image and scale, after the token MLP where the checkpoint has one.
        importance: float[H, W] per image and scale, eq. 2 aligned by eq. 6-7; 0 where only the letterbox is seen.
        regions: long[N] per image and scale, region of each token; -1 where only the letterbox is seen.
        slots: long[N] per image and scale, the place in `tokens` that each token went to, several tokens in one place
            were averaged; -1 for those that were dropped.
        images_per_prompt: number of images in each prompt of the batch.
        scales: sides of the views in pixels, per image.
        differences: float[H, W] per image and scale, how much each token differs from the other date, 1 on average; None
            where there are no two dates.
        pointed: float[n] per image once the decoder has read its prompt, by a model with a `pointer`: the probability that a
            visual token shows an object that the question asks about, one token for each object, 0 elsewhere. None for an
            image that the pointer does not look at: of a prompt with several, of two dates, of a dynamic pyramid.
        hidden_states, attentions: None. The library's image outputs have these names; here the states of the vision
            tower are never held for all tiles at once, unless `get_image_features` is called.
    """

    pooler_output: list[torch.Tensor] | None = None
    tokens: list[list[torch.Tensor]] | None = None
    importance: list[Sequence[torch.Tensor]] | None = None
    regions: list[Sequence[torch.Tensor]] | None = None
    slots: list[Sequence[torch.Tensor]] | None = None
    images_per_prompt: list[int] | None = None
    scales: list[list[int]] | None = None
    differences: list[Sequence[torch.Tensor]] | None = None
    pointed: list[torch.Tensor | None] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    def check_letterbox(self):
        """Raises `ValueError` for images without a letterboxed view: pictures and maps would put their tokens elsewhere."""
        if self.regions is None:
            raise ValueError(NO_LETTERBOX)

    def places(self, image_idx: int) -> list[KeptPlaces]:
        """Where the visual tokens of an image lie, level by level, in the order of `pooler_output`.

        Raises:
            ValueError: what a Region Focus Module keeps, which has no grid (`check_letterbox`).
        """
        self.check_letterbox()
        maps, found = self.slots[image_idx], []
        for level, (slots, positions, grid) in enumerate(zip(maps.values, maps.positions, maps.grids)):
            slots, positions, device = slots.cpu(), positions.cpu(), slots.device  # not every device has float64
            kept = slots >= 0
            counts = slots[kept].bincount()
            axes = (positions // grid[1], positions % grid[1])
            sums = [slots[kept].bincount(axis[kept].double()) for axis in axes]
            found.append(KeptPlaces((torch.stack(sums, dim=1) / counts[:, None]).float().to(device), grid, level))
        return found

    @property
    def tokens_per_prompt(self) -> list[int] | None:
        """Visual tokens of each prompt of the batch."""
        if self.images_per_prompt is None:
            return None
        images = iter(self.pooler_output)
        return [sum(len(next(images)) for _ in range(num_images)) for num_images in self.images_per_prompt]


class _WithImageHiddenStates:
    @property
    def image_hidden_states(self) -> list[torch.Tensor] | None:
        """float[n, D] per image, the visual tokens that entered the decoder."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class UHRBatModelOutputWithPast(_WithImageHiddenStates, BaseModelOutputWithPast):
    """Output of [`UHRBatModel`]; `image_outputs`: what `compress` returned for the images of the batch."""

    image_outputs: UHRBatCompressionOutput | None = None


@dataclass
class UHRBatCausalLMOutputWithPast(_WithImageHiddenStates, CausalLMOutputWithPast):
    """Output of [`UHRBatForConditionalGeneration`]; `image_outputs`: what `compress` returned."""

    image_outputs: UHRBatCompressionOutput | None = None
