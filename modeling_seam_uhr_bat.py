# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT seam: what the method asks of a model, and all that it asks.

Encoding, importance and compression are mixins, written against this Protocol: whatever class has its members, and inherits
them, is asked as UHR-BAT is. [`UHRBatModel`] is one.

Axes: T tiles, P rows of a tile, V rows of a level that show the image, W width of a row, M text tokens, B prompts.
"""

from typing import Any, Protocol

import torch

from .modeling_outputs_uhr_bat import Places, UHRBatCompressionOutput


class VisionLanguageModel(Protocol):
    """A model that makes rows of tiles, looks at them with a question, and answers from chosen ones.

    A row is what the decoder reads in place of one image token. Rows of a tile stand row by row, p a side.

    Gradients go through all members where they are enabled; `look_closer` and the selection look without.

    Attributes:
        config: of which the mixins read: the fields of [`CompressionRules`], `scales`, `budgets` and
            `scale_embedding_additions`, the `times` of `add_scale` for rows that are clustered, merged and answered from (the
            anchor, when it is looked at, gets it once). A `region_focus` other than None needs [`UHRBatRegionFocusMixin`].
        device: where rows are made and kept, of every `torch` module of the library.
        training: whether it is trained, likewise.
        tile_size: pixels a side of a tile.
        patches_per_side: p, of which a tile's rows are p * p, each of `tile_size // p` pixels a side.
        image_token_id: of the placeholder in `input_ids`.
        row_width: W.
        context_window: tokens that a prompt and its answer may have, None for any number. `generate` alone asks for it.
    """

    config: Any
    device: torch.device
    training: bool
    tile_size: int
    patches_per_side: int
    image_token_id: int
    row_width: int
    context_window: int | None

    def project_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode: float[T, 3, tile, tile], as the image processor made them, -> float[T, P, W], tower and projector.

        Each tile by itself: what else is in the call, at most `vision_chunk_size` tiles, changes nothing.
        """

    def add_scale(self, rows: torch.Tensor, scale: int, positions: torch.Tensor, times: int) -> torch.Tensor:
        """float[V, W] rows plus `times` what tells their place and scale (eq. 5); the rows as they are, of a model that has
        no such embedding.

        Args:
            scale: side of the level in pixels.
            positions: long[V], places of the rows on its grid.
        """

    def features_of(self, rows: torch.Tensor) -> torch.Tensor:
        """float[V, D], the part of rows float[V, W] by which tokens are alike, for regions and distinctiveness: all of it, or
        the first columns where others are for deeper layers."""

    def read_attention(
        self,
        input_ids: torch.Tensor | None,
        rows: torch.Tensor,
        places: list[Places] | None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        layer: int | None = None,
        question_tokens: str | None = None,
    ) -> torch.Tensor:
        """Look: float32[V], what the question pays to each of some rows (eq. 2), not negative, in any unit.

        Args:
            input_ids: long[M], a prompt with one image, whose placeholders stand in one run, of any length.
            rows: float[V, W], what stands in for the placeholders. Of the anchor tile by tile, of others ascending.
            places: where the rows lie, level after level in the order of the rows; None where nobody knows.
            inputs_embeds: float[M, D] instead of the embeddings of `input_ids`, which may then be None.
            layer: of the decoder, at which it is read; None for the model's own.
            question_tokens: "all" text after the image or the "last" token; None for the model's own.

        Raises:
            ValueError: no placeholder.
        """

    def visual_inputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, compressed: UHRBatCompressionOutput
    ) -> dict[str, Any]:
        """Answer: the arguments of the library's `generate` beside `input_ids` and `attention_mask`, made anew by each call.

        Args:
            input_ids, attention_mask: long[B, M], with one placeholder for every visual token.
            compressed: rows that were chosen (`pooler_output`, images in the order of the prompts) and where they lie
                (`places`).
        """
