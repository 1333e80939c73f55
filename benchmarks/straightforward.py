"""The method as the paper's released code structures it, without any care for time and memory: the yardstick.

Every tile goes through the vision tower once for the importance pass and once more for the selection, all tiles of a
scale at once and with all hidden states kept; the importance pass runs every decoder layer and keeps the whole
attention of each; clusters and regions are loops with a boolean mask each; every tile has an image-processor call of
its own; the whole prompt is scored, not its last position. The weights, the rules and, up to ties, the results are
those of the model that it is given, for the paper's settings: k-means over the whole scale, no coverage, no token MLP.

Axes: T tiles of a scale, V tokens of a scale that show the image, D decoder width, R regions, M text tokens. Tokens
stand row by row over the grid of their scale, unless "tile by tile" is said.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..geometry_uhr_bat import PAD_COLOR, shown_patches


def cluster(features, coords, num_regions, num_iterations, coord_weight) -> torch.Tensor:
    """k-means of eq. 13-14 from the same tokens as ours: long[V] from float[V, D] and float[V, 2]."""
    embedding = torch.cat([F.normalize(features.float(), dim=1), coord_weight * coords.float()], dim=1)
    if num_regions >= len(embedding):
        return torch.arange(len(embedding), device=embedding.device)
    drawn = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(0))[:num_regions]
    centres = embedding[drawn.to(embedding.device)]
    regions = torch.cdist(embedding, centres).argmin(dim=1)
    for _ in range(num_iterations - 1):
        for region in range(num_regions):
            mask = regions == region
            if mask.any():
                centres[region] = embedding[mask].mean(dim=0)
        previous, regions = regions, torch.cdist(embedding, centres).argmin(dim=1)
        if torch.equal(previous, regions):
            break
    return regions


def select(tokens, importance, regions, budget, threshold) -> torch.Tensor:
    """Eq. 8-12, a loop over regions: float[n, D] visual tokens from float[V, D], float[V] and long[V]."""
    importance = importance.double()
    members, means, preserved = [], [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for region in regions.unique().tolist():
        mask = regions == region
        values = importance[mask]
        mean = values.mean().clamp(values.min(), values.max())
        preserved[mask] = values >= mean if threshold == "ge" else values > mean
        members.append(mask.nonzero()[:, 0])
        means.append(mean)
    order = torch.stack(means).argsort(descending=True, stable=True).tolist()

    # Too few candidates: the most important redundant tokens, but for the least important one of each region.
    spare = ~preserved
    for places in members:
        least = places[importance[places].argsort(descending=True, stable=True)[-1]]
        spare[least] = False
    num_candidates = int(preserved.sum()) + sum(int((~preserved[places]).any()) for places in members)
    by_importance = importance.argsort(descending=True, stable=True)
    preserved[by_importance[spare[by_importance]][: max(0, budget - num_candidates)]] = True

    chosen = []
    for region in order:
        places = members[region]
        places = places[importance[places].argsort(descending=True, stable=True)]
        chosen.append(tokens[places[preserved[places]]])
        redundant = places[~preserved[places]]
        if len(redundant):
            chosen.append(tokens[redundant].float().mean(dim=0, keepdim=True).to(tokens.dtype))
    return torch.cat(chosen)[:budget]


class Straightforward:
    """The stages of one question about one image, with the interface of [`benchmarks.sides.Ours`]."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        tile = {"height": model.config.tile_size, "width": model.config.tile_size}
        self.tile_processor = CLIPImageProcessorPil(size={"shortest_edge": tile["height"]}, crop_size=tile)
        # A gigapixel is over Pillow's limit, which can only be lifted for the whole process.
        Image.MAX_IMAGE_PIXELS = None

    def read(self, path):
        return Image.open(path).convert("RGB")

    def preprocess(self, image):
        """[float32[T, 3, tile, tile]] and the places long[V] of the tokens that show the image, for every scale."""
        width, height = image.size
        side, tile = max(width, height), self.config.tile_size
        square = image
        if width != height:
            square = Image.new("RGB", (side, side), PAD_COLOR)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
        tiles, places = [], []
        for scale, grid in zip(self.config.scales, self.config.grids):
            view = square.resize((scale, scale), Image.Resampling.BICUBIC)
            boxes = [(x, y, x + tile, y + tile) for y in range(0, scale, tile) for x in range(0, scale, tile)]
            calls = [self.tile_processor(view.crop(box), return_tensors="pt")["pixel_values"][0] for box in boxes]
            tiles.append(torch.stack(calls))
            shown = torch.from_numpy(shown_patches((height, width), grid)).flatten()
            places.append((shown if self.config.mask_padding else torch.ones_like(shown)).nonzero()[:, 0])
        return tiles, places

    def _encode(self, tiles) -> list[torch.Tensor]:
        """[float[T, patches, D]] of every scale, tile by tile."""
        encoded, base = [], self.model.model
        for scale_tiles in tiles:
            tower, scale_tiles = base.vision_tower.vision_model, scale_tiles.to(self.model.device, self.model.dtype)
            states = tower(scale_tiles, output_hidden_states=True)
            features = states.hidden_states[self.config.vision_feature_layer][:, 1:]
            encoded.append(base.multi_modal_projector(features))
        return encoded

    def encode(self, inputs):
        """(anchor tokens float[V_1, D] tile by tile, their places, tokens float[V, D] and places of every scale)."""
        tiles, places = inputs
        places = [where.to(self.model.device) for where in places]
        scale_embedding, p = self.model.model.scale_embedding, self.config.tile_size // self.config.patch_size
        # The importance pass encodes every tile and reads those of the anchor ...
        anchor = self._encode(tiles)[0].flatten(0, 1)
        height, width = self.config.grids[0]
        by_tile = torch.arange(height * width, device=anchor.device).view(height // p, p, width // p, p)
        by_tile = by_tile.transpose(1, 2).flatten()
        shown = torch.isin(by_tile, places[0])
        anchor, anchor_places = anchor[shown], by_tile[shown]
        anchor = anchor + scale_embedding(self.config.scales[0], anchor_places).to(anchor)
        # ... and the selection encodes them once more.
        tokens = []
        for scale_idx, (scale, encoded) in enumerate(zip(self.config.scales, self._encode(tiles))):
            height, width = self.config.grids[scale_idx]
            raster = encoded.view(height // p, width // p, p, p, -1).transpose(1, 2).reshape(height * width, -1)
            raster = raster[places[scale_idx]]
            for _ in range(self.config.scale_embedding_additions):
                raster = raster + scale_embedding(scale, places[scale_idx]).to(raster)
            tokens.append(raster)
        return anchor, anchor_places, tokens, places

    def _prompt(self, input_ids, image_tokens) -> tuple[torch.Tensor, int, int]:
        """float[1, M + n, D] with the image in place of its one placeholder; where it starts and stops."""
        start = (input_ids[0] == self.config.image_token_id).nonzero()[0].item()
        embeds = self.model.get_input_embeddings()(input_ids[0])
        sequence = torch.cat((embeds[:start], image_tokens.to(embeds), embeds[start + 1 :]))
        return sequence[None], start, start + len(image_tokens)

    def importance(self, features, input_ids) -> torch.Tensor:
        """Eq. 2, float32[h, w] over the grid of the anchor; 0 where only the letterbox is seen."""
        anchor, anchor_places, *_ = features
        sequence, start, stop = self._prompt(input_ids, anchor)
        decoder = self.model.model.language_model
        kernel = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")  # the only one that returns its attention
        out = decoder(inputs_embeds=sequence, output_attentions=True, output_hidden_states=True, use_cache=False)
        decoder.set_attn_implementation(kernel)
        last = sequence.shape[1] - 1
        question_start = min(stop, last) if self.config.question_tokens == "all" else last
        rows = out.attentions[self.config.importance_layer][0, :, question_start:, start:stop]
        height, width = self.config.grids[0]
        weights = rows.float().mean((0, 1))
        return weights.new_zeros(height * width).index_copy(0, anchor_places, weights).view(height, width)

    def regions(self, features) -> list[torch.Tensor]:
        """Eq. 13-14, long[V] for every scale."""
        regions, (*_, tokens, places) = [], features
        for (height, width), budget, scale_tokens, where in zip(self.config.grids, self.config.budgets, tokens, places):
            coords = torch.stack(((where // width + 0.5) / height, (where % width + 0.5) / width), dim=1)
            num_regions = self.config.num_regions or budget
            labels = cluster(scale_tokens, coords, num_regions, self.config.kmeans_iterations, self.config.coord_weight)
            regions.append(labels.unique(return_inverse=True)[1])
        return regions

    def select(self, features, importance, regions) -> list[torch.Tensor]:
        """Eq. 6-12, float[n, D] for every scale."""
        _, anchor_places, tokens, places = features
        shown = torch.zeros_like(importance).flatten().index_fill(0, anchor_places, 1).view_as(importance)
        visual = []
        for grid, budget, scale_tokens, where, region in zip(
            self.config.grids, self.config.budgets, tokens, places, regions
        ):
            aligned = [
                F.interpolate(map_.double()[None, None], grid, mode="bilinear", align_corners=False).float()
                for map_ in (importance, shown)
            ]
            weights = (aligned[0] / aligned[1]).flatten()[where]
            visual.append(select(scale_tokens, weights, region, min(budget, len(where)), self.config.threshold))
        return visual

    def answer(self, input_ids, visual_tokens, num_tokens, mark) -> list[int]:
        """Greedy ids; `mark` is told the end of the prefill and that of the answer."""
        decoder, ids = self.model.model.language_model, []
        sequence, *_ = self._prompt(input_ids, torch.cat(visual_tokens))
        out = decoder(inputs_embeds=sequence, output_hidden_states=True, use_cache=True)
        for step in range(num_tokens):
            scores = self.model.lm_head(out.last_hidden_state)  # at every position of what went in
            ids.append(scores[0, -1].argmax().item())
            if step == 0:
                mark("prefill")
            if step < num_tokens - 1:
                token = torch.tensor([ids[-1:]], device=sequence.device)
                out = decoder(input_ids=token, past_key_values=out.past_key_values, output_hidden_states=True)
        mark("answer")
        return ids
