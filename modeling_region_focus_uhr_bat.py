# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT region focus: the system of LRS-VQA (arXiv 2503.07588) as a mode, by its paper's Algorithm 1.

A Region Focus Module, a few decoder layers of its own, says which tokens of a level the question looks at. Their tiles of the
next level of a dynamic pyramid are read and encoded in place of this level, and so on, until the image's own resolution
is reached or more than N_max tiles are asked for; there the tokens that the question looks at are kept:

    thumbnail ":" level 1, all of it      question   ->  RFM  ->  a quarter of the tokens  ->  their tiles of level 2
    thumbnail ":" those tiles of level 2  question   ->  RFM  ->  a quarter of the tokens  ->  ...
    thumbnail ":" what was kept           question   ->  decoder

Letters: p tokens a side of a tile after pooling, n tokens of a level with the newlines at the end of their rows, D decoder
width, M tokens of a sequence. A place is row * (W + 1) + column on a level's grid of H rows and W columns, column W a newline.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .budgets_uhr_bat import is_one_budget, split_budgets
from .configuration_uhr_bat import UHRBatConfig
from .image_pyramids_uhr_bat import POOLING, DynamicLevel
from .modeling_layers_uhr_bat import call_reader, last_token_logits
from .modeling_outputs_uhr_bat import TokenMaps, UHRBatDynamicFeatures
from .token_rules_uhr_bat import CompressedImage, CompressionRules


class UHRBatRegionFocusModule(nn.Module):
    """Decoder layers of the decoder's own class. The question's attention is read at the last one: only its norm, queries and
    keys, and of the final norm nothing, are used; they are part of the released checkpoints."""

    def __init__(self, config: UHRBatConfig, decoder: nn.Module):
        super().__init__()
        text, layer = config.text_config, type(decoder.layers[0])
        self.layers = nn.ModuleList(layer(text, layer_idx) for layer_idx in range(len(config.focus.layers)))
        self.norm = type(decoder.norm)(text.hidden_size, eps=text.rms_norm_eps)
        for one in self.layers:
            one.self_attn.register_forward_pre_hook(call_reader, with_kwargs=True)
        last = self.layers[-1]
        for unread in (
            self.norm,
            last.mlp,
            last.post_attention_layernorm,
            last.self_attn.v_proj,
            last.self_attn.o_proj,
        ):
            unread.requires_grad_(False)

    def start_from(self, decoder: nn.Module, layers):
        """Copy the decoder's layers of these numbers, and its final norm."""
        for own, layer_idx in zip(self.layers, layers):
            own.load_state_dict(decoder.layers[layer_idx].state_dict())
        self.norm.load_state_dict(decoder.norm.state_dict())


@dataclass(frozen=True)
class LevelTokens:
    """What is there of a level.

    Attributes:
        level: [`DynamicLevel`].
        tokens: float[n, D], row by row.
        places: long[n], ascending.
    """

    level: DynamicLevel
    tokens: torch.Tensor
    places: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        return self.places // (self.level.grid[1] + 1)

    @property
    def is_newline(self) -> torch.Tensor:
        return self.places % (self.level.grid[1] + 1) == self.level.grid[1]

    @property
    def positions(self) -> torch.Tensor:
        """long[V] of the tokens that are no newlines, row by row over the level's grid."""
        return (self.places - self.rows)[~self.is_newline]  # a newline stands at the end of each row before


def pool_tokens(tiles: torch.Tensor) -> torch.Tensor:
    """float[T, P, D] of whole tiles -> float[T, D, p, p]."""
    side = round(tiles.shape[1] ** 0.5)
    return F.interpolate(
        tiles.transpose(1, 2).unflatten(2, (side, side)),
        size=(side // POOLING,) * 2,
        mode="bilinear",
        align_corners=False,
    )


def next_tiles(places: torch.Tensor, level, finer) -> torch.Tensor:
    """long[T], ascending: the tiles of the next finer level where the middle of some tokens lies, a newline's the last of its
    row."""
    rows, columns = places // (level.grid[1] + 1), places % (level.grid[1] + 1)
    columns = columns.clamp(max=level.grid[1] - 1)
    found = []
    for idx, axis in ((rows, 0), (columns, 1)):
        middle = (2 * idx + 1) * finer.grid[axis] // (2 * level.grid[axis])  # in tokens of the finer level
        per_tile = -(-finer.grid[axis] // finer.tiles[axis])
        found.append((middle // per_tile).clamp(max=finer.tiles[axis] - 1))
    return (found[0] * finer.tiles[1] + found[1]).unique()


class UHRBatRegionFocusMixin:
    """For UHR-BAT's own towers, with a `region_focus` and an `image_newline`: what is done of dynamic pyramids; other images
    are left to the mixins that it comes before."""

    def open_pyramid(self, pyramid):
        """The thumbnail of a [`DynamicPyramid`], encoded, to [`UHRBatDynamicFeatures`]; tiles of its levels are when a
        question looks at them."""
        if pyramid.kind != "dynamic" or self.region_focus is None:
            return super().open_pyramid(pyramid)
        image = UHRBatDynamicFeatures(None, pyramid, self._tile_cache(pyramid))
        return replace(image, thumbnail=self.encode_tiles(image, 0, [0])[0])

    def level_tokens(self, image: UHRBatDynamicFeatures, level_idx: int, tile_idx: list[int]) -> LevelTokens:
        """Some tiles of a level, ascending, encoded and pooled; each row that has any of them ends with a newline, with
        `newline_votes` every row of the level."""
        level = image.pyramid.levels[level_idx - 1]
        (H, W), device = level.grid, image.thumbnail.device
        tiles = self.encode_tiles(image, level_idx, tile_idx)
        pooled = pool_tokens(tiles)
        p, where = pooled.shape[-1], torch.tensor(tile_idx, device=device)
        steps = torch.arange(p, device=device)
        rows = (where // level.tiles[1] * p)[:, None, None] + steps[:, None]
        columns = (where % level.tiles[1] * p)[:, None, None] + steps
        rows, columns = (idx.expand(-1, p, p).flatten() for idx in (rows, columns))
        inside = (rows < H) & (columns < W)
        rows, places = rows[inside], (rows * (W + 1) + columns)[inside]
        tokens = pooled.permute(0, 2, 3, 1).flatten(0, 2)[inside]
        # CODEPATH: checkpoints of LRS-VQA's released code let newlines vote, those that were distilled here do not.
        ends = torch.arange(H, device=device) if self.config.focus.newline_votes else rows.unique()
        places = torch.cat((places, ends * (W + 1) + W))
        tokens = torch.cat((tokens, self.image_newline.to(tokens).expand(len(ends), -1)))
        order = places.argsort()
        return LevelTokens(level, tokens[order], places[order])

    def focus_scores(self, before, after, found: LevelTokens) -> torch.Tensor:
        """float32[n]: how much the last token of the prompt looks at each token of a level, among these, mean over heads.

        Args:
            before, after: float[.., D], the prompt up to the level, thumbnail and separator included, and from it on.
        """
        num_places, places = found.level.num_tokens, found.places
        layers = self.region_focus.layers
        # CODEPATH: LRS-VQA's checkpoints were trained with its own mask ("upstream"), those distilled here without.
        if self.config.focus.mask_mode == "upstream":
            local = before.new_zeros(num_places, before.shape[1]).index_copy(0, places, found.tokens.to(before))
            there = torch.zeros(num_places, dtype=torch.long, device=places.device).index_fill(0, places, 1)
            mask = F.pad(there, (len(before), len(after)), value=1)[None]
            sequence = torch.cat((before, local, after))[None]
            (logits,) = self.read_layers(layers, sequence, last_token_logits, attention_mask=mask)
            logits = logits[:, len(before) : len(before) + num_places].float() + (1 - there)
            return logits.softmax(-1).mean(0)[places]
        position_ids = None
        # CODEPATH: modules distilled here at the first level were trained "additive", those of every level "packed".
        if self.config.focus.mask_mode == "additive":
            # What is not there has left its place: positions are those of the whole level.
            start = torch.arange(len(before), device=places.device)
            stop = len(before) + num_places + torch.arange(len(after), device=places.device)
            position_ids = torch.cat((start, len(before) + places, stop))[None]
        sequence = torch.cat((before, found.tokens.to(before), after))[None]
        (logits,) = self.read_layers(layers, sequence, last_token_logits, position_ids=position_ids)
        return logits[:, len(before) : len(before) + len(places)].float().softmax(-1).mean(0)

    def focus_image(self, before, after, image: UHRBatDynamicFeatures, budget: int | None = None):
        """Algorithm 1 for one image of a prompt.

        Args:
            before, after: float[.., D], the prompt before the image and after it.
            budget: visual tokens that the image may take, thumbnail, separator and newlines included; `alpha_keep` of the last
                level's tokens if None.

        Returns:
            ([float[.., D]] of the thumbnail with the separator and of every level that was looked at; [(float32[V], long[V])]
            importance and positions of the tokens of these levels; [long[N]] slots of all).

        Raises:
            ValueError: a budget that does not hold thumbnail, separator, a token and its newline.
        """
        focus, levels = self.config.focus, image.pyramid.levels[: self.config.focus.max_levels]
        head = image.thumbnail
        if levels:
            separator = torch.tensor([focus.separator_token_id], device=head.device)
            head = torch.cat((head, self.get_input_embeddings()(separator).to(head)))
        room = None if budget is None else budget - len(head)
        if room is not None and room < (2 if levels else 0):
            raise ValueError(
                f"The budget of {budget} visual tokens is too small: the thumbnail and the separator take {len(head)}"
                + (", and a token with its newline 2." if levels else ".")
            )
        looked = self._descend(torch.cat((before, head.to(before))), after, image, levels)
        tokens = [head, *(found.tokens[:0] for found, _ in looked)]
        slots = [torch.full((height * width,), -1, device=head.device) for height, width in image.grids]
        slots[0] = torch.arange(len(image.thumbnail), device=head.device)
        if looked:
            found, scores = looked[-1]
            kept = self._keep(found, self._by_score(found, scores), room)
            tokens[-1] = found.tokens[kept]
            cell = ~found.is_newline[kept]
            where = (found.places - found.rows)[kept[cell]]
            slots[len(looked)][where] = torch.arange(len(kept), device=head.device)[cell]
        maps = [(scores[~found.is_newline], found.positions) for found, scores in looked]
        return tokens, maps, slots

    def _descend(self, before, after, image, levels) -> list[tuple[LevelTokens, torch.Tensor]]:
        """(what is there of a level, float32[n] how much of it is looked at) of every level from the first one to that where
        the descent ends."""
        focus, looked = self.config.focus, []
        tile_idx = list(range(int(np.prod(levels[0].tiles)))) if levels else []
        for level_idx, level in enumerate(levels, 1):
            found = self.level_tokens(image, level_idx, tile_idx)
            scores = self.focus_scores(before, after, found)
            looked.append((found, scores))
            if level_idx == len(levels):
                break
            order = self._by_score(found, scores)
            chosen = order[: max(1, int(focus.alpha_select * len(order)))]
            if focus.newline_votes:
                chosen = torch.cat((chosen, found.is_newline.nonzero()[:, 0]))
            tile_idx = next_tiles(found.places[chosen], level, levels[level_idx]).tolist()
            if focus.n_max is not None and len(tile_idx) > focus.n_max:
                break
        return looked

    def _by_score(self, found, scores) -> torch.Tensor:
        """long[..]: the tokens of a level that vote, those that are looked at most first."""
        # CODEPATH: as above, where the newlines of a level are made.
        voting = torch.ones_like(found.is_newline) if self.config.focus.newline_votes else ~found.is_newline
        return scores.masked_fill(~voting, -1).argsort(descending=True, stable=True)[: int(voting.sum())]

    def _keep(self, found, order, room) -> torch.Tensor:
        """long[n'], ascending: the tokens of a level that the decoder gets, with the newlines of their rows."""
        votes, rows = self.config.focus.newline_votes, found.rows
        number = max(1, int(self.config.focus.alpha_keep * len(order)))
        if room is not None:
            # The k best tokens and their newlines, as many as there is room for.
            if votes:
                ends = int(found.is_newline.sum())
            else:
                first_of_row = np.unique(rows[order].cpu().numpy(), return_index=True)[1]
                ends = torch.zeros_like(order)
                ends[torch.from_numpy(first_of_row).to(order.device)] = 1
                ends = ends.cumsum(0)
            number = int((torch.arange(1, len(order) + 1, device=order.device) + ends <= room).sum())
            if not number:
                raise ValueError(f"The budget leaves {room} visual tokens, but the newlines of the level take {ends}.")
        best = order[:number]
        ends = found.is_newline if votes else found.is_newline & torch.isin(rows, rows[best])
        return torch.cat((best[~found.is_newline[best]], ends.nonzero()[:, 0])).sort().values

    def settle_counts(self, placeholder, image_features, images):
        """As of other images, of prompts that hold one placeholder per image: how many visual tokens there will be is known
        when the question has looked. What an image may spend is int[1], or None."""
        kinds = {image.kind for image in image_features}
        if "dynamic" not in kinds:
            return super().settle_counts(placeholder, image_features, images)
        numbers, budget = placeholder.sum(1).tolist(), images.get("budgets")
        if kinds != {"dynamic"}:
            raise ValueError("Images of a batch are dynamic pyramids, all of them or none.")
        if sum(numbers) != len(image_features):
            raise ValueError(
                f"{sum(numbers)} placeholders came with {len(image_features)} dynamic pyramids: a prompt holds one for each."
            )
        budget = budget.tolist() if isinstance(budget, torch.Tensor) else budget
        if budget is None:
            return numbers, [None] * len(image_features)
        if not is_one_budget(budget):
            raise ValueError(f"The budget of a dynamic pyramid is one number. Got {budget}.")
        return numbers, [share for number in numbers if number for share in split_budgets(budget, ["all"], number)]

    @torch.no_grad()
    def _focus(self, input_ids, inputs_embeds, image, counts) -> CompressedImage:
        place = int(self.find_placeholders(input_ids, inputs_embeds).nonzero()[0, 0])
        before, after = inputs_embeds[:place], inputs_embeds[place + 1 :]
        tokens, maps, slots = self.focus_image(before, after, image, counts and counts[0])
        # The thumbnail is read, not weighed.
        of_thumbnail = torch.zeros(len(slots[0]), device=tokens[0].device), slots[0]
        values, positions = zip(of_thumbnail, *maps)
        return CompressedImage(tokens, TokenMaps(values, positions, image.grids[: len(values)], 0), None, slots)

    def compress_one(self, input_ids, inputs_embeds, image, counts, rules, **looked) -> CompressedImage:
        """As of other images, by Algorithm 1."""
        if image.kind == "dynamic":
            if rules != CompressionRules.of(self.config):
                raise ValueError(
                    "`rules` are those of images that are cut into scales. A dynamic pyramid is pruned by Algorithm 1, whose numbers "
                    "are the configuration's `region_focus`: leave `rules` out."
                )
            return self._focus(input_ids, inputs_embeds, image, counts)
        return super().compress_one(input_ids, inputs_embeds, image, counts, rules, **looked)
