"""UHR-BAT: question-guided, region-faithful compression of ultra-high-resolution images for a vision-language model.

Holds the towers, the projector, the scale embedding (eq. 5), the importance pass (eq. 2), the compression of whole
images out of the functions of `token_compression_uhr_bat.py` (eq. 6-15), and the model that generates.

Axes: I images, S scales, T tiles of an image, P patches of a tile, N tokens of a scale, V of them that show the image
and not the letterbox, B a budget, D decoder width, M text tokens. Tokens of a scale stand row by row over its whole
grid, unless "tile by tile" is said.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv
from transformers.utils import can_return_tuple, logging

from .configuration_uhr_bat import UHRBatConfig, refuse_own_folder, split_budgets
from .released_api_uhr_bat import (
    KeywordsStoppingCriteria,
    load_multiscale_tile_masks,
    split_image_to_multiscale_tiles,
    tokenizer_image_token,
    translate_released_call,
)
from .token_compression_uhr_bat import (
    align_importance,
    cluster_regions,
    grid_regions,
    merge_tokens,
    select_tokens,
    vote_regions,
)


logger = logging.get_logger(__name__)

# Question rows of the importance pass that are scored at once: bounds the scores to heads x 64 x sequence.
QUESTION_BLOCK = 64

# What `generate` turns into visual tokens before the first step; none of it enters the decoding loop.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "region_labels", "image_features", "budgets")


@dataclass
class UHRBatImageFeatures:
    """One encoded image: all that does not depend on the question. Encode once, ask many.

    Attributes:
        anchor_tokens: float[V_1, D], tokens of the anchor scale with the scale embedding added once, tile by tile, as
            the importance pass reads them.
        anchor_positions: long[V_1], place of each anchor token on the anchor grid.
        tokens: float[V_s, D] for every scale, as they are clustered and merged.
        positions: long[V_s] for every scale, place of each token on the grid of its scale, ascending.
        region_labels: long[V_s] for every scale where label maps were handed in (0 = background), else None.
        regions: long[V_s] by (scale index, number of regions): partitions that were computed so far.
    """

    anchor_tokens: torch.Tensor
    anchor_positions: torch.Tensor
    tokens: list[torch.Tensor]
    positions: list[torch.Tensor]
    region_labels: list[torch.Tensor] | None = None
    regions: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def to(self, device, non_blocking=False) -> "UHRBatImageFeatures":
        """The same on another device: thousands of encoded images fit in a CPU's memory, few in a GPU's."""

        def move(value):
            if isinstance(value, list):
                return [move(one) for one in value]
            if isinstance(value, dict):
                return {key: move(one) for key, one in value.items()}
            return None if value is None else value.to(device, non_blocking=non_blocking)

        return UHRBatImageFeatures(**{one.name: move(getattr(self, one.name)) for one in fields(self)})


@dataclass
class UHRBatCompressionOutput(ModelOutput):
    """What `compress` returns: lists over images, and over scales inside.

    Attributes:
        pooler_output: float[n, D] per image, the visual tokens that replace its placeholders: `tokens`, scale after
            scale, the anchor first.
        tokens: float[B_s, D] per image and scale, after the token MLP where the checkpoint has one.
        importance: float[H, W] per image and scale, eq. 2 aligned by eq. 6-7; 0 where only the letterbox is seen.
        regions: long[N] per image and scale, region of each token; -1 where only the letterbox is seen.
        slots: long[N] per image and scale, the place in `tokens` that each token went to, several tokens in one place
            were averaged; -1 for those that were dropped.
        images_per_prompt: number of images in each prompt of the batch.
    """

    pooler_output: list[torch.Tensor] | None = None
    tokens: list[list[torch.Tensor]] | None = None
    importance: list[list[torch.Tensor]] | None = None
    regions: list[list[torch.Tensor]] | None = None
    slots: list[list[torch.Tensor]] | None = None
    images_per_prompt: list[int] | None = None

    @property
    def tokens_per_prompt(self) -> list[int] | None:
        """Visual tokens of each prompt of the batch."""
        if self.images_per_prompt is None:
            return None
        images = iter(self.pooler_output)
        return [sum(len(next(images)) for _ in range(num_images)) for num_images in self.images_per_prompt]


@dataclass
class UHRBatModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: float[n, D] per image, the visual tokens that entered the decoder."""

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class UHRBatCausalLMOutputWithPast(ModelOutput):
    """Output of [`UHRBatForConditionalGeneration`]; `image_hidden_states`: float[n, D] per image."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: list[torch.Tensor] | None = None


@contextmanager
def _hooked(handle):
    """Keep a module hook for the length of a `with` block."""
    try:
        yield
    finally:
        handle.remove()


def question_attention(attention, hidden_states, position_embeddings, question_start) -> torch.Tensor:
    """Eq. 2 over a whole row: mean attention of the question to every position, over heads and question tokens.

    Only the rows of the question are computed, in blocks: no N x N matrix exists, whatever the attention kernel.

    Args:
        attention: a Qwen2 attention module, called while its parameters are in place.
        hidden_states: float[1, M, D], its input.
        position_embeddings: (cos, sin), float[1, M, head] each.
        question_start: first row of the question, which runs to the end.

    Returns:
        float32[M]
    """
    _, M, _ = hidden_states.shape
    shape = (1, M, -1, attention.head_dim)
    cos, sin = position_embeddings
    query = attention.q_proj(hidden_states).view(shape).transpose(1, 2)
    key = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key = repeat_kv(key, attention.num_key_value_groups).transpose(2, 3)

    position = torch.arange(M, device=hidden_states.device)
    total = 0
    for rows in position[question_start:].split(QUESTION_BLOCK):
        scores = query[:, :, rows] @ key * attention.scaling
        scores = scores.masked_fill(position > rows[:, None], float("-inf"))
        total = total + F.softmax(scores, dim=-1, dtype=torch.float32).mean(1).sum((0, 1))
    return total / (M - question_start)


class UHRBatMultiModalProjector(nn.Module):
    """phi of section 3.2: two linear layers with an activation between them; also the form of the token MLP."""

    def __init__(self, in_features: int, out_features: int, activation: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class UHRBatScaleEmbedding(nn.Module):
    """p(s) + q(s) of eq. 5 at chosen places of a scale, in the paper's form or in that of the released weights.

    "factorized": one base table [1, g * g, D], interpolated bilinearly over the whole grid of the scale, plus a learned
    vector per scale. "per_scale": one table per scale with g at most `scale_embedding_grid`, interpolated over the grid
    of one tile and repeated for every tile.
    """

    def __init__(self, config: UHRBatConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.patches_per_side = config.tile_size // config.patch_size
        self.scales = config.scales
        self.grids = config.grids
        self.per_scale = config.scale_embedding_form == "per_scale"
        if self.per_scale:
            sides = [min(height, config.scale_embedding_grid) for height, _ in config.grids]
            self.tables = nn.ParameterDict(
                {str(scale): nn.Parameter(torch.zeros(1, g * g, width)) for scale, g in zip(config.scales, sides)}
            )
        else:
            self.table = nn.Parameter(torch.zeros(1, config.scale_embedding_grid**2, width))
            self.scale_vectors = nn.Parameter(torch.zeros(len(config.scales), width))

    def forward(self, scale_idx: int, positions: torch.Tensor) -> torch.Tensor:
        """float32[V, D] for the places long[V] on the grid of one scale."""
        rows, columns = positions // self.grids[scale_idx][1], positions % self.grids[scale_idx][1]
        if self.per_scale:
            table, extent = self.tables[str(self.scales[scale_idx])], self.patches_per_side
            rows, columns = rows % extent, columns % extent
        else:
            table, extent = self.table, self.grids[scale_idx][0]
        g = round(table.shape[1] ** 0.5)
        # Sampling at the patch centres is F.interpolate(..., align_corners=False), for the wanted places alone.
        # float32: bfloat16 coordinates are too coarse for 288 patches a side.
        centres = (torch.stack((columns, rows), dim=-1).float() + 0.5) * 2 / extent - 1
        embedding = F.grid_sample(
            table.float().view(1, g, g, -1).permute(0, 3, 1, 2),
            centres.view(1, 1, -1, 2),
            padding_mode="border",
            align_corners=False,
        )
        embedding = embedding[0, :, 0].T
        return embedding if self.per_scale else embedding + self.scale_vectors[scale_idx].float()


def tile_of(positions, width, patches_per_side) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major index of the tile, and of the patch inside it, for places long[V] on a grid `width` patches wide."""
    p = patches_per_side
    rows, columns = positions // width, positions % width
    return rows // p * (width // p) + columns // p, rows % p * p + columns % p


def first_identical_tile(tiles) -> torch.Tensor:
    """long[T]: for every tile of one colour the first tile of that colour, for any other tile itself.

    Tiles float[T, 3, tile, tile]. Letterbox tiles are all alike, and need the vision tower only once.
    """
    low, high = tiles.flatten(2).aminmax(dim=-1)
    plain = (low == high).all(-1)
    alike = plain[:, None] & plain & (low[:, None] == low).all(-1)
    return torch.where(plain, alike.int().argmax(1), torch.arange(len(tiles), device=tiles.device))


def count_images(placeholders: list[int], sizes: list[int]) -> list[int]:
    """Number of images in each prompt, from the placeholders of each prompt and the visual tokens of each image.

    A prompt holds either one placeholder per image or as many as its images have visual tokens.

    Raises:
        ValueError: the prompts hold neither.
    """
    if sum(placeholders) == len(sizes):
        return list(placeholders)
    counts, taken = [], 0
    for wanted in placeholders:
        start = taken
        while taken < len(sizes) and sum(sizes[start : taken + 1]) <= wanted:
            taken += 1
        if sum(sizes[start:taken]) != wanted:
            break
        counts.append(taken - start)
    if taken != len(sizes) or len(counts) != len(placeholders):
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {placeholders} per prompt, features: {sizes} per "
            "image."
        )
    return counts


class UHRBatPreTrainedModel(PreTrainedModel):
    config_class = UHRBatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "Qwen2DecoderLayer", "UHRBatScaleEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "image_features", "mm_encoder_outputs"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UHRBatScaleEmbedding):
            for parameter in module.parameters():
                init.normal_(parameter, std=self.config.initializer_range)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the library's, into any folder but the one that the model was loaded from (`ValueError`)."""
        refuse_own_folder(self.config.name_or_path, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class UHRBatModel(UHRBatPreTrainedModel):
    """Vision tower, projector, scale embedding, compression and decoder, without a language modelling head."""

    def __init__(self, config: UHRBatConfig):
        super().__init__(config)
        width, activation = config.text_config.hidden_size, config.projector_hidden_act
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # What follows the feature layer stays in the checkpoint, but nothing reads it: without this, training on
        # several devices waits for its gradients.
        self.vision_tower.post_layernorm.requires_grad_(False)
        self.vision_tower.encoder.layers[self._feature_layer_idx + 1 :].requires_grad_(False)
        self.multi_modal_projector = UHRBatMultiModalProjector(config.vision_config.hidden_size, width, activation)
        self.scale_embedding = UHRBatScaleEmbedding(config)
        self.token_mlp = UHRBatMultiModalProjector(width, width, activation) if config.token_mlp else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @property
    def _feature_layer_idx(self) -> int:
        """Layer of the vision tower whose output is `hidden_states[vision_feature_layer]`."""
        layer = self.config.vision_feature_layer
        return layer - 1 if layer > 0 else self.config.vision_config.num_hidden_layers + layer

    # ---- Images: independent of the question -----------------------------------------------------------------------

    def encode_image(self, pixel_values, pixel_attention_mask=None, region_labels=None) -> list[UHRBatImageFeatures]:
        """Every tile through the vision tower once, the projector and the scale embedding (sections 3.2 and 3.3).

        Args:
            pixel_values: float[I, T, 3, tile, tile], tiles of all scales, ascending scales, row-major.
            pixel_attention_mask: bool or int[I, N], 1 where a patch shows the image and not only the letterbox; the
                patches of all scales, ascending scales, each row by row over its grid. None: all show the image.
            region_labels: long[I, N] in the same order, 0 = background. None: regions are clustered.

        Returns:
            One [`UHRBatImageFeatures`] per image, to be passed to `generate`, `compress` or `forward` as
            `image_features`, with any number of questions.

        Raises:
            ValueError: a shape that does not fit the configuration, or a scale that shows nothing.
        """
        self._check_image_inputs(pixel_values, pixel_attention_mask, region_labels)
        no_rows = [None] * len(pixel_values)
        masks = no_rows if pixel_attention_mask is None else pixel_attention_mask
        labels = no_rows if region_labels is None else region_labels
        return [self._encode_one(*rows) for rows in zip(pixel_values, masks, labels)]

    def _check_image_inputs(self, pixel_values, pixel_attention_mask, region_labels):
        config = self.config
        num_tiles = sum((scale // config.tile_size) ** 2 for scale in config.scales)
        expected = [num_tiles, 3, config.tile_size, config.tile_size]
        if list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have the shape [images, {', '.join(map(str, expected))}] for the scales "
                f"{config.scales}. Got {list(pixel_values.shape)}."
            )
        expected = [len(pixel_values), sum(height * width for height, width in config.grids)]
        for name, value in (("pixel_attention_mask", pixel_attention_mask), ("region_labels", region_labels)):
            if value is not None and list(value.shape) != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected}: one row per image, one number per patch of the scales "
                    f"{config.scales}. Got {list(value.shape)}."
                )

    def _encode_one(self, pixel_values, pixel_attention_mask, region_labels) -> UHRBatImageFeatures:
        config = self.config
        p = config.tile_size // config.patch_size
        sizes = [height * width for height, width in config.grids]
        device = pixel_values.device
        if pixel_attention_mask is None:
            pixel_attention_mask = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        positions = [mask.nonzero()[:, 0] for mask in pixel_attention_mask.to(device).split(sizes)]
        if not all(len(places) for places in positions):
            raise ValueError("`pixel_attention_mask` leaves a scale without a patch that shows the image.")

        tokens, anchor_tokens, anchor_positions = [], None, None
        for scale_idx, tiles in enumerate(pixel_values.split([size // p**2 for size in sizes])):
            places = positions[scale_idx]
            tile_idx, patch_idx = tile_of(places, config.grids[scale_idx][1], p)
            encoded_idx, copy_idx = first_identical_tile(tiles)[tile_idx].unique(return_inverse=True)
            projected = self._project_tiles(tiles, encoded_idx, desc=f"Encoding {config.scales[scale_idx]} px")
            projected = projected.flatten(0, 1)[(copy_idx * p**2 + patch_idx).to(projected.device)]
            places = positions[scale_idx] = places.to(projected.device)
            tokens.append(self._add_scale_embedding(projected, scale_idx, places, config.scale_embedding_additions))
            if scale_idx == 0:
                # The pass reads the anchor tile by tile, as the tower emits it and the released weights were trained.
                order = (tile_idx * p**2 + patch_idx).argsort().to(projected.device)
                anchor_positions = places[order]
                anchor_tokens = self._add_scale_embedding(projected[order], 0, anchor_positions, 1)

        if region_labels is not None:
            region_labels = [
                labels.to(places.device)[places] for labels, places in zip(region_labels.split(sizes), positions)
            ]
        return UHRBatImageFeatures(anchor_tokens, anchor_positions, tokens, positions, region_labels)

    def _project_tiles(self, tiles, encoded_idx, desc) -> torch.Tensor:
        """float[T', P, D] of the chosen tiles, through the tower in chunks; only a chunk's activations are held."""
        chunks = encoded_idx.split(self.config.vision_chunk_size)
        bar = logging.tqdm(chunks, desc=desc, unit="chunk", delay=1, leave=False, disable=self.training)
        return torch.cat([self.multi_modal_projector(self._vision_features(tiles[chunk])) for chunk in bar])

    def _vision_features(self, tiles) -> torch.Tensor:
        """float[T, 3, tile, tile] -> float[T, P, C], patch tokens after `vision_feature_layer`."""
        features = []

        def read_features(layer, args, output):
            features.append(output)
            return output[:1, :1]  # nothing reads what follows the feature layer: one token goes on

        layer = self.vision_tower.encoder.layers[self._feature_layer_idx]
        # A hook, so that the list of all hidden states is never held.
        with _hooked(layer.register_forward_hook(read_features)):
            self.vision_tower(tiles.to(self.vision_tower.dtype))
        return features[0][:, 1:]

    def _add_scale_embedding(self, tokens, scale_idx, positions, times) -> torch.Tensor:
        """float[V, D] plus `times` the embedding of their places, in blocks of a chunk of tiles."""
        if times == 0:
            return tokens
        block = self.config.vision_chunk_size * (self.config.tile_size // self.config.patch_size) ** 2
        blocks = [
            rows + times * self.scale_embedding(scale_idx, places).to(rows)
            for rows, places in zip(tokens.split(block), positions.split(block))
        ]
        return torch.cat(blocks)

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """The uncompressed image: the tower's outputs, and in `pooler_output` float[V, D] per image, all tokens.

        Use `encode_image` for large images: this one holds what the tower returns for all tiles at once.
        """
        I, T = pixel_values.shape[:2]
        outputs = self.vision_tower(pixel_values.flatten(0, 1).to(self.vision_tower.dtype), **kwargs)
        features = self.encode_image(pixel_values, pixel_attention_mask)

        def by_image(states):
            return None if states is None else tuple(state.unflatten(0, (I, T)) for state in states)

        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state.unflatten(0, (I, T)),
            pooler_output=[torch.cat(image.tokens) for image in features],
            hidden_states=by_image(outputs.hidden_states),
            attentions=by_image(outputs.attentions),
        )

    # ---- Images and a question -------------------------------------------------------------------------------------

    def estimate_importance(self, input_ids, anchor_tokens, inputs_embeds=None) -> torch.Tensor:
        """Eq. 2: attention that the question pays to the anchor tokens at `importance_layer`.

        One pass over the text before the image, the anchor tokens and the text after it, through the decoder's own
        layers up to `importance_layer`, where it stops. Differentiable, so that it can be trained.

        Args:
            input_ids: long[M], a prompt with one image, its placeholders in one run.
            anchor_tokens: float[V, D], what stands in for the placeholders.
            inputs_embeds: float[M, D] instead of the embeddings of `input_ids`, which may then be None.

        Returns:
            float32[V], averaged over heads and over the question's tokens: all text after the image, or the last
            token of the sequence (`question_tokens`, and where no text follows the image).

        Raises:
            ValueError: no placeholder, or a batch of prompts.
        """
        if input_ids is not None and input_ids.ndim != 1:
            raise ValueError(f"`input_ids` must be one prompt, long[M]. Got the shape {list(input_ids.shape)}.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        where = self._placeholders(input_ids, inputs_embeds).nonzero()[:, 0].tolist()
        if not where:
            raise ValueError("The prompt holds no image token, so there is nothing to weigh.")
        before, question = inputs_embeds[: where[0]], inputs_embeds[where[-1] + 1 :]
        sequence = torch.cat((before, anchor_tokens.to(before), question))[None]
        start, stop = len(before), len(before) + len(anchor_tokens)
        last = sequence.shape[1] - 1
        question_start = min(stop, last) if self.config.question_tokens == "all" else last

        decoder = self.language_model
        position_ids = torch.arange(sequence.shape[1], device=sequence.device)[None]
        position_embeddings = decoder.rotary_emb(sequence, position_ids)
        causal_mask = create_causal_mask(
            config=decoder.config, inputs_embeds=sequence, attention_mask=None, past_key_values=None
        )
        layers = decoder.layers[: self.config.importance_layer % len(decoder.layers) + 1]
        rows = []

        for layer in layers[:-1]:
            sequence = layer(
                sequence,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
            )

        def read_attention(attention, args):
            hidden_states = layers[-1].input_layernorm(sequence)
            rows.append(question_attention(attention, hidden_states, position_embeddings, question_start))

        # In a hook of the layer, because there its parameters are in place whatever shards or offloads them. What the
        # layer puts out is not needed: it is called with a single row.
        with _hooked(layers[-1].self_attn.register_forward_pre_hook(read_attention)):
            layers[-1](
                sequence[:, :1],
                position_ids=position_ids[:, :1],
                position_embeddings=tuple(part[:, :1] for part in position_embeddings),
            )
        return rows[0][start:stop]

    @torch.compiler.disable
    def compress(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        pixel_attention_mask=None,
        region_labels=None,
        image_features=None,
        budgets=None,
        inputs_embeds=None,
        labels=None,
    ) -> UHRBatCompressionOutput:
        """C of eq. 3: exactly the budgeted number of visual tokens per image, guided by the question (section 3.4).

        Args:
            input_ids: long[B, M], prompts with one placeholder per image or as many as it has visual tokens.
            attention_mask: int[B, M], 0 where a prompt is padded. Padding has no influence.
            pixel_values, pixel_attention_mask, region_labels: as in `encode_image`; or
            image_features: what `encode_image` returned, one per image, in the order of the prompts.
            budgets: long[I, S], exact tokens per image and scale, as the processor counts them; or int[S], the
                budgets of a prompt, shared by its images. None: those of the configuration.
            inputs_embeds: float[B, M, D] instead of `input_ids`.
            labels: long[B, M]. The question ends where the first answer after the image begins (label not -100): the
                selection never sees the answer.

        Raises:
            ValueError: counts of images, placeholders and budgets that do not fit each other.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"`attention_mask` must be [batch, sequence] here. Got {list(attention_mask.shape)}.")
        if image_features is None:
            image_features = self.encode_image(pixel_values, pixel_attention_mask, region_labels)

        real = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask is not None:
            real = attention_mask[:, -inputs_embeds.shape[1] :].to(real.device).bool()
        placeholder = self._placeholders(input_ids, inputs_embeds) & real
        counts = placeholder.sum(1).tolist()
        images_per_prompt, budgets = self._share_budgets(budgets, counts, image_features)

        images = iter(zip(image_features, budgets))
        compressed = []
        for row, num_images in enumerate(images_per_prompt):
            text = real[row] & ~placeholder[row]
            spots = placeholder[row].nonzero()[:, 0]
            group = [next(images) for _ in range(num_images)]
            # A prompt that is not expanded yet holds one placeholder per image.
            sizes = [sum(budget) for _, budget in group] if counts[row] != num_images else [1] * num_images
            for (image, budget), run in zip(group, spots.split(sizes)):
                # Each image has a pass of its own, so the placeholders of the others are left out.
                seen = text.index_fill(0, run, True)
                if labels is not None:
                    answered = (labels[row].to(text.device) != -100).index_fill(0, spots, False)
                    answered[: run[-1] + 1] = False
                    seen = seen & (answered.cumsum(0) == 0)
                with torch.no_grad():
                    ids = None if input_ids is None else input_ids[row][seen]
                    importance = self.estimate_importance(ids, image.anchor_tokens, inputs_embeds[row][seen])
                compressed.append(self._compress_one(image, importance, budget))

        tokens, importance, regions, slots = map(list, zip(*compressed))
        visual_tokens = [torch.cat(scales) for scales in tokens]
        for visual, budget in zip(visual_tokens, budgets):
            if len(visual) != sum(budget):
                raise RuntimeError(f"The compression spent {len(visual)} tokens of a budget of {sum(budget)}.")
        return UHRBatCompressionOutput(visual_tokens, tokens, importance, regions, slots, images_per_prompt)

    def _placeholders(self, input_ids, inputs_embeds) -> torch.Tensor:
        """bool[..., M]: image tokens, from ids or, where there are none, from the embeddings."""
        if input_ids is not None:
            return (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        image_id = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    def _share_budgets(self, budgets, placeholders, image_features) -> tuple[list[int], list[list[int]]]:
        """Images in each prompt, and the exact number of tokens of every image and scale, int[I][S]."""
        scales = self.config.scales
        available = [[len(places) for places in image.positions] for image in image_features]
        if isinstance(budgets, torch.Tensor) and budgets.ndim == 2:
            budgets = budgets.tolist()
            if len(budgets) != len(available) or len(budgets[0]) != len(scales):
                raise ValueError(
                    f"`budgets` must have the shape [{len(available)}, {len(scales)}]: images and scales. Got "
                    f"[{len(budgets)}, {len(budgets[0])}]."
                )
            images_per_prompt = count_images(placeholders, [sum(budget) for budget in budgets])
        else:
            # Without exact numbers a prompt that is already expanded can only be told apart if it has one image.
            unexpanded = sum(placeholders) == len(available)
            images_per_prompt = placeholders if unexpanded else [int(count > 0) for count in placeholders]
            budgets = self.config.budgets if budgets is None else budgets
            shares = [split_budgets(budgets, scales, num_images) for num_images in images_per_prompt if num_images]
            shares = [share for prompt in shares for share in prompt]
            budgets = [[min(*pair) for pair in zip(*rows)] for rows in zip(shares, available)]
            if not unexpanded:
                images_per_prompt = count_images(placeholders, [sum(budget) for budget in budgets])
        if sum(images_per_prompt) != len(available):
            raise ValueError(f"The prompts hold {sum(images_per_prompt)} images, but {len(available)} were passed.")
        for budget, seen in zip(budgets, available):
            for scale, spent, limit in zip(scales, budget, seen):
                if not 1 <= spent <= limit:
                    raise ValueError(
                        f"The budget of scale {scale} px is {spent} tokens, but {limit} tokens of it show the image."
                    )
        return images_per_prompt, budgets

    def _compress_one(self, image, importance, budgets):
        """Tokens, importance, regions and slots of every scale of one image (eq. 6-12), each list[S]."""
        config = self.config
        shown = self._on_grid(torch.ones_like(importance), image.anchor_positions, config.grids[0], fill=0)
        importance = self._on_grid(importance, image.anchor_positions, config.grids[0], fill=0)
        tokens, importances, regions, slots = [], [], [], []
        for scale_idx, (grid, budget) in enumerate(zip(config.grids, budgets)):
            places = image.positions[scale_idx]
            with torch.no_grad():
                # Cells of the anchor that show only the letterbox have no importance: weigh the others alone.
                aligned = align_importance(importance, grid) / align_importance(shown, grid)
                aligned = aligned.flatten()[places]
                region = self._partition(image, scale_idx, budget)
                slot = select_tokens(aligned, region, budget, threshold=config.threshold, coverage=config.coverage)
            merged = merge_tokens(image.tokens[scale_idx], slot, budget)
            tokens.append(merged if self.token_mlp is None else self.token_mlp(merged))
            importances.append(self._on_grid(aligned, places, grid, fill=0))
            regions.append(self._on_grid(region, places, grid, fill=-1).flatten())
            slots.append(self._on_grid(slot, places, grid, fill=-1).flatten())
        return tokens, importances, regions, slots

    @staticmethod
    def _on_grid(values, places, grid, fill) -> torch.Tensor:
        """[V] -> [H, W], `fill` where no value belongs."""
        height, width = grid
        return values.new_full((height * width,), fill).index_copy(0, places, values).view(height, width)

    def _partition(self, image, scale_idx, budget) -> torch.Tensor:
        """long[V]: the one place where a region partition is chosen (eq. 4, appendix C.2); kept with the image."""
        config = self.config
        num_regions = config.num_regions or budget
        if config.coverage:
            num_regions = min(num_regions, budget)
        if (scale_idx, num_regions) not in image.regions:
            tokens, places = image.tokens[scale_idx].detach(), image.positions[scale_idx]
            if image.region_labels is not None:
                regions = vote_regions(image.region_labels[scale_idx][None], patch_size=1)
            elif config.region_method == "none":
                regions = torch.arange(len(places), device=places.device)
            elif config.region_method == "grid":
                regions = grid_regions(places, config.grids[scale_idx], num_regions)
            else:
                coords = self._coords(scale_idx, places)
                regions = cluster_regions(
                    tokens,
                    coords,
                    num_regions,
                    method=config.region_method,
                    coord_weight=config.coord_weight,
                    num_iterations=config.kmeans_iterations,
                )
            image.regions[scale_idx, num_regions] = regions
        return image.regions[scale_idx, num_regions]

    def _coords(self, scale_idx, places) -> torch.Tensor:
        """float32[V, 2], (y, x) of the patch centres in [0, 1], over the scale or, as released, over the tile."""
        height, width = self.config.grids[scale_idx]
        rows, columns = places // width, places % width
        if self.config.coord_frame == "tile":
            height = width = self.config.tile_size // self.config.patch_size
            rows, columns = rows % height, columns % width
        return torch.stack(((rows + 0.5) / height, (columns + 0.5) / width), dim=-1)

    # ---- The decoder -----------------------------------------------------------------------------------------------

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features, tokens_per_prompt=None) -> torch.Tensor:
        """bool[B, M, 1], where visual tokens go; as many places as float[n, D] `image_features` has rows.

        `tokens_per_prompt` int[B]: places after so many in a prompt are image tokens that a model wrote into its own
        answer, and stay text.

        Raises:
            ValueError: the numbers differ; both are named.
        """
        mask = self._placeholders(input_ids, inputs_embeds)
        if tokens_per_prompt is not None:
            mask = mask & (mask.cumsum(1) <= torch.tensor(tokens_per_prompt, device=mask.device)[:, None])
        num_places = int(mask.sum())
        if num_places != len(image_features):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {num_places}, features: {len(image_features)}"
            )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_attention_mask=None,
        region_labels=None,
        image_features=None,
        budgets=None,
        labels=None,
        mm_encoder_outputs=None,
        **kwargs,
    ) -> UHRBatModelOutputWithPast:
        """Text, with visual tokens in place of its image placeholders, through the decoder.

        The image arguments are those of `compress`; `labels` only tells where the question ends.
        `mm_encoder_outputs`: {"image": what `compress` returned} instead, as `generate` passes it on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        compressed = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or image_features is not None:
            if compressed is not None:
                raise ValueError("You cannot specify both images and mm_encoder_outputs at the same time")
            compressed = self.compress(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                pixel_attention_mask=pixel_attention_mask,
                region_labels=region_labels,
                image_features=image_features,
                budgets=budgets,
                inputs_embeds=inputs_embeds,
                labels=labels,
            )
        if compressed is not None:
            visual_tokens = torch.cat(compressed.pooler_output).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, visual_tokens, compressed.tokens_per_prompt)
            inputs_embeds = inputs_embeds.masked_scatter(mask, visual_tokens)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return UHRBatModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if compressed is None else compressed.pooler_output,
        )


class UHRBatForConditionalGeneration(UHRBatPreTrainedModel, GenerationMixin):
    """UHR-BAT with a language modelling head: `generate` answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = True

    def __init__(self, config: UHRBatConfig):
        super().__init__(config)
        self.model = UHRBatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @torch.no_grad()
    def encode_image(self, pixel_values, pixel_attention_mask=None, region_labels=None) -> list[UHRBatImageFeatures]:
        """See [`UHRBatModel.encode_image`]. Without gradients: training goes through `forward`."""
        return self.model.encode_image(pixel_values, pixel_attention_mask, region_labels)

    def estimate_importance(self, input_ids, anchor_tokens, inputs_embeds=None) -> torch.Tensor:
        """See [`UHRBatModel.estimate_importance`]."""
        return self.model.estimate_importance(input_ids, anchor_tokens, inputs_embeds)

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UHRBatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask, return_dict=True, **kwargs)

    @torch.no_grad()
    def compress(self, **inputs) -> UHRBatCompressionOutput:
        """See [`UHRBatModel.compress`]. Without gradients; through `forward`, so that the whole model's hooks fire."""
        return self(**inputs, compress_only=True)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_attention_mask=None,
        region_labels=None,
        image_features=None,
        budgets=None,
        labels=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        compress_only=False,
        **kwargs,
    ) -> UHRBatCausalLMOutputWithPast:
        """Scores of the next token, and the loss where `labels` long[B, M] are given (-100 and images are ignored).

        The image arguments are those of [`UHRBatModel.compress`]. `logits_to_keep`: number of last positions that are
        scored, or their indices; 0 scores all. `compress_only` returns what `compress` does and goes no further.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "region_labels": region_labels,
            "image_features": image_features,
            "budgets": budgets,
            "labels": labels,
        }
        if compress_only:
            return self.model.compress(**inputs)
        outputs = self.model(
            **inputs,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return UHRBatCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    # ---- Generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """Answer: `GenerationMixin.generate`, with the image arguments of [`UHRBatModel.compress`].

        Images are compressed once, before the first step, whatever the number of beams and returned sequences. A prompt
        with one placeholder per image is expanded to the budget first. The released code's call (`inputs`,
        `multiscale_pixels`, ...) is translated to the same arguments.

        A conversation goes on from `past_key_values` with the images of the new turn alone, and either all ids so far
        and the new ones, or the new ones and the attention mask of all.

        Raises:
            ValueError: prompts, images and budgets that do not fit each other, or a prompt over the context window.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        inputs, kwargs = translate_released_call(self.config, inputs, kwargs)
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        if "pixel_values" in images or "image_features" in images:
            attention_mask, inputs_embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
            prompt = inputs if inputs_embeds is None else inputs_embeds
            if attention_mask is None:
                attention_mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            num_cached = self._count_cached(prompt, attention_mask, kwargs.get("past_key_values"))
            visible = attention_mask
            if num_cached:
                # Images of earlier turns are in the cache: only those of this turn are compressed.
                known = self.model._placeholders(inputs, prompt)[:, :num_cached].to(visible.device)
                visible = torch.cat((visible[:, :num_cached].masked_fill(known, 0), visible[:, num_cached:]), dim=1)
            compressed = self.compress(input_ids=inputs, attention_mask=visible, inputs_embeds=inputs_embeds, **images)
            kwargs["mm_encoder_outputs"] = {"image": compressed}
            if inputs_embeds is None:
                inputs, kwargs["attention_mask"] = self._expand_placeholders(
                    inputs, attention_mask, num_cached, compressed
                )
        self._check_prompt(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    @staticmethod
    def _count_cached(prompt, attention_mask, past_key_values) -> int:
        """How many places of a prompt are in the cache. As in the library, a prompt shorter than its mask has none."""
        if past_key_values is None or attention_mask.shape[1] != prompt.shape[1]:
            return 0
        return int(past_key_values.get_seq_length())

    def _expand_placeholders(self, input_ids, attention_mask, num_cached, compressed):
        """One placeholder per image -> one per visual token; prompts padded on the left to one length.

        What the cache holds keeps its places: it is left as it is, and the padding goes in behind it.
        """
        new_ids = input_ids[:, num_cached:]
        num_old = attention_mask.shape[1] - new_ids.shape[1]
        new_mask = attention_mask[:, num_old:]
        placeholder = (new_ids == self.config.image_token_id) & new_mask.bool()
        sizes = [len(tokens) for tokens in compressed.pooler_output]
        if int(placeholder.sum()) == sum(sizes):
            return input_ids, attention_mask
        repeats = torch.ones_like(new_ids).masked_scatter(placeholder, torch.tensor(sizes, device=new_ids.device))
        rows = [
            (ids.repeat_interleave(times), real.repeat_interleave(times))
            for ids, real, times in zip(new_ids, new_mask, repeats)
        ]
        length = max(len(ids) for ids, _ in rows)
        pad = self.generation_config.pad_token_id or 0
        new_ids = torch.stack([F.pad(ids, (length - len(ids), 0), value=pad) for ids, _ in rows])
        new_mask = torch.stack([F.pad(real, (length - len(real), 0)) for _, real in rows])
        return (
            torch.cat((input_ids[:, :num_cached], new_ids), dim=1),
            torch.cat((attention_mask[:, :num_old], new_mask), dim=1),
        )

    def _check_prompt(self, input_ids, kwargs):
        """Raises `ValueError` for image tokens without images, and for a prompt over the context window."""
        if input_ids is None:
            return
        num_places = int((input_ids == self.config.image_token_id).sum())
        # The images of a conversation that goes on are in its cache; embeddings may hold them already.
        held = kwargs.get("past_key_values") is not None or kwargs.get("inputs_embeds") is not None
        if num_places and not held and not kwargs.get("mm_encoder_outputs"):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {num_places} image tokens in the prompts, but "
                "no images were passed."
            )
        window = self.config.text_config.max_position_embeddings
        # Where a conversation goes on with its new ids alone, the mask still covers all of it.
        mask = kwargs.get("attention_mask")
        length = max(input_ids.shape[-1], 0 if mask is None else mask.shape[-1])
        if length >= window:
            raise ValueError(
                f"The prompt has {length} tokens with its images, but the context window holds {window} "
                "and the answer needs room. Shorten the text or lower the budgets: nothing is cut silently."
            )

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, mm_encoder_outputs=None, is_first_iteration=False, **kwargs
    ):
        """Visual tokens go in with the whole prompt: in the first step, or in each one without a cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return model_inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """`prefill_chunk_size` only where the library hands every chunk its images: older releases leave them out."""
        if model_kwargs.get("mm_encoder_outputs") and not hasattr(generation_utils, "_slice_mm_encoder_output"):
            if generation_config.prefill_chunk_size is not None:
                logger.warning_once(
                    "This release of transformers cannot read images in chunks: `prefill_chunk_size` is left out."
                )
                generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams of one prompt share its images as a group: [A, B] becomes [A, B, A, B], not [A, A, B, B]."""
        outputs = model_kwargs.pop("mm_encoder_outputs", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if outputs:
            image = outputs["image"]
            tokens = iter(image.pooler_output)
            groups = [[next(tokens) for _ in range(num_images)] for num_images in image.images_per_prompt]
            expanded = [visual for group in groups for visual in group * expand_size]
            numbers = [num_images for num_images in image.images_per_prompt for _ in range(expand_size)]
            outputs = {"image": UHRBatCompressionOutput(pooler_output=expanded, images_per_prompt=numbers)}
        if outputs is not None:
            model_kwargs["mm_encoder_outputs"] = outputs
        return input_ids, model_kwargs


__all__ = [
    "KeywordsStoppingCriteria",
    "UHRBatForConditionalGeneration",
    "UHRBatModel",
    "UHRBatPreTrainedModel",
    "load_multiscale_tile_masks",
    "split_image_to_multiscale_tiles",
    "tokenizer_image_token",
]
