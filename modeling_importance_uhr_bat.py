# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT importance: what the question looks at (section 3.2, eq. 2 and 6-7), by whatever [`VisionLanguageModel`] reads it.

Axes: M text tokens, V tokens of a scale that show the image, S scales, D decoder width.
"""

import torch

from .geometry_uhr_bat import positions_of, tile_of
from .image_pyramids_uhr_bat import best_tiles, overlapping_tiles
from .modeling_outputs_uhr_bat import Places, UHRBatImageFeatures
from .modeling_seam_uhr_bat import VisionLanguageModel
from .token_rules_uhr_bat import look_up

FIRST_SUPERSEDED = 2  # level; those before it show where a question looks


class UHRBatImportanceMixin:
    """For a [`VisionLanguageModel`] with `encode_level`."""

    def estimate_importance(
        self: VisionLanguageModel,
        input_ids,
        anchor_tokens,
        inputs_embeds=None,
        *,
        layer=None,
        question_tokens=None,
        places=None,
    ) -> torch.Tensor:
        """Eq. 2: attention that the question pays to the anchor tokens at the importance layer, averaged over heads and over
        the question's tokens: all text after the image, or the last token of the sequence (`question_tokens`, and where no
        text follows the image). Differentiable, so that it can be trained.

        Args:
            input_ids, inputs_embeds, layer, question_tokens: as in [`VisionLanguageModel.read_attention`].
            anchor_tokens: float[V, D], what stands in for the placeholders.
            places: [`Places`] of the tokens, for models that look at where they lie (`anchor_places`).

        Returns:
            float32[V]

        Raises:
            ValueError: no placeholder, or a batch of prompts.
        """
        if input_ids is not None and input_ids.ndim != 1:
            raise ValueError(f"`input_ids` must be one prompt, long[M]. Got the shape {list(input_ids.shape)}.")
        places = None if places is None else [places]
        return self.read_attention(
            input_ids, anchor_tokens, places, inputs_embeds, layer=layer, question_tokens=question_tokens
        )

    def refine_importance(self, input_ids, image, anchor_importance, rules, inputs_embeds=None) -> list[torch.Tensor]:
        """Importance of every scale, refined from scale to scale by the question's attention to its own tokens.

        The anchor shows where to look, not what is there: an object of a few pixels is a part of one of its cells. For
        every finer scale in turn the map so far is looked up on its grid (eq. 6-7), its `refinement` most important
        tokens go through the decoder in place of the image, and what the question pays to them is added:
        map = norm(attention + prior), with prior and attention of sum 1. The finest scale is read by the last token
        alone, which asks for the answer; the others by all of the question.

        Args:
            input_ids, inputs_embeds: as in `estimate_importance`.
            image: the encoded image.
            anchor_importance: float32[V_1].
            rules: without a `refinement` every scale is looked up from the anchor.

        Returns:
            list[S] of float32[V_s]. With a refinement these are densities, 1 on average: scales can be compared.
        """
        return self.look_closer(input_ids, image, anchor_importance, rules, inputs_embeds)[1]

    def look_closer(
        self, input_ids, image, anchor_importance, rules, inputs_embeds=None, *, grad=False
    ) -> tuple[UHRBatImageFeatures, list[torch.Tensor]]:
        """The tokens that a question has to choose from, and the importance of each (`refine_importance`).

        Of an image that is encoded whole these are all of it. Of a pyramid, what is important at a level decides which
        tiles of the next one are read and encoded (`image_pyramids_uhr_bat.py`); the deeper levels, more than the configuration
        has scales, are refined as its finest scale is.

        Args:
            image: [`UHRBatImageFeatures`] or [`UHRBatPyramidFeatures`]; the rest as in `refine_importance`.
            grad: whether tokens that are encoded here have gradients, though the importance may have none.

        Returns:
            (the encoded image as far as this question looks at it, list[S] of float32[V_s]).
        """
        grids, anchor_idx = image.grids, image.anchor_idx
        zooms = image.kind == "pyramid"
        values, positions = anchor_importance, image.anchor_positions
        ascending = positions.argsort()
        values, positions = values[ascending], positions[ascending]
        if zooms:
            tile_idx = tile_of(positions, grids[0][1], image.pyramid.patches_per_side)[0].unique()
            covered = tile_idx, grids[0]
            with torch.set_grad_enabled(grad or torch.is_grad_enabled()):
                levels = [self.encode_level(image, 0, tile_idx)]
        else:
            levels = list(zip(image.tokens, image.positions))
        maps = [values.new_zeros(len(places)) for _, places in levels[:anchor_idx]]
        maps.append(values / values.mean() if rules.refinement else values)
        source_idx = anchor_idx
        for scale_idx in range(anchor_idx + 1, len(grids)):
            if zooms:
                tile_idx = self._choose_tiles(image, scale_idx, covered, values, positions, source_idx)
                if len(tile_idx):  # a level may get none, where there are few in all
                    covered = tile_idx, grids[scale_idx]
                with torch.set_grad_enabled(grad or torch.is_grad_enabled()):
                    levels.append(self.encode_level(image, scale_idx, tile_idx))
            tokens, places = levels[scale_idx]
            prior = look_up(values, positions, grids[source_idx], places, grids[scale_idx])
            if zooms:  # tiles that were taken to make up the number may lie where nothing is known
                prior = prior.nan_to_num(0)
            if rules.refinement and len(places):
                # Deeper levels than the configuration has scales are read as its finest one.
                step = min(scale_idx, len(rules.refinement)) - 1
                last = step == len(rules.refinement) - 1
                prior = torch.where(prior.sum() > 0, prior, 1.0)  # all tiles may lie where nothing is known
                prior = prior / prior.sum()
                n = min(rules.refinement[step], len(places))
                chosen = prior.argsort(descending=True, stable=True)[:n].sort().values
                attention = self.read_attention(
                    input_ids,
                    tokens[chosen],
                    [Places(places[chosen], grids[scale_idx], scale_idx)],
                    inputs_embeds,
                    layer=rules.refinement_layers[step] if rules.refinement_layers else None,
                    question_tokens="last" if last else None,
                )
                prior = prior.index_add(0, chosen, attention / attention.sum())
                values, positions, source_idx = prior / prior.sum(), places, scale_idx
                prior = values * len(places)
            maps.append(prior)
        if zooms:
            tokens, positions = map(list, zip(*levels))
            # CODEPATH: UHR-BAT-Tiny has a weight, released weights have none. Of the configuration's own scales all tokens compete
            # alike, whether all tiles are encoded or some.
            if rules.superseded_weight != 1 and list(image.scales) != list(self.config.scales):
                maps = weigh_superseded(maps, positions, grids, image.pyramid.patches_per_side, rules.superseded_weight)
            image = UHRBatImageFeatures(
                image.anchor_tokens, image.anchor_positions, tokens, positions, image.scales, image.grids
            )
        return image, maps

    def _choose_tiles(self, image, level_idx, covered, values, positions, source_idx) -> torch.Tensor:
        """long[T], ascending: tiles of a level that the question looks at, among those that lie on the tiles `covered`,
        (long[T], grid), of a level before, by their importance `values` at `positions` of level `source_idx`."""
        pyramid, p = image.pyramid, image.pyramid.patches_per_side
        grid, number = image.grids[level_idx], pyramid.num_chosen[level_idx]
        tile_idx, coarser_grid = covered
        candidates = overlapping_tiles(tile_idx, coarser_grid[1] // p, grid[1] // p)
        is_shown = pyramid.num_shown(level_idx, candidates.cpu().numpy()) > 0
        candidates = candidates[torch.from_numpy(is_shown).to(candidates.device)]
        places = positions_of(candidates, grid[1], p)
        found = look_up(values.detach(), positions, image.grids[source_idx], places.flatten(), grid)
        scores = found.view(places.shape).nan_to_num(0).sum(1)
        num_shown = pyramid.num_shown(level_idx) if len(candidates) < number else None
        return best_tiles(scores, candidates, number, num_shown)


def weigh_superseded(maps, positions, grids, patches_per_side, weight) -> list[torch.Tensor]:
    """The importance float[V_s] of every level, times `weight` from the third one on where a tile of the next level is encoded: what
    that tile shows of a place, this level shows worse."""
    weighed = list(maps)
    for idx in range(FIRST_SUPERSEDED, len(grids) - 1):
        (height, width), (finer_height, finer_width) = grids[idx], grids[idx + 1]
        tiles = tile_of(positions[idx + 1], finer_width, patches_per_side)[0]
        rows = (2 * (positions[idx] // width) + 1) * finer_height // (2 * height)
        columns = (2 * (positions[idx] % width) + 1) * finer_width // (2 * width)
        own = tile_of(rows * finer_width + columns, finer_width, patches_per_side)[0]
        weighed[idx] = torch.where(torch.isin(own, tiles), weight * maps[idx], maps[idx])
    return weighed
