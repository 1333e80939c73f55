"""UHR-BAT: question-guided, region-faithful compression of ultra-high-resolution images for a vision-language model.

Holds the towers and what happens between them: images are encoded once (sections 3.2 and 3.3), the question weighs the
anchor (eq. 2), every scale is compressed by the functions of `token_compression_uhr_bat.py` (eq. 6-15), and the decoder
reads the visual tokens.

Axes: I images, S scales, T tiles of an image, P patches of a tile, N tokens of a scale, V of them that show the image
and not the letterbox, B a budget, D decoder width, M text tokens. Tokens of a scale stand row by row over its whole
grid, unless "tile by tile" is said.
"""

from itertools import groupby

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple, logging, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg

from .budgets_uhr_bat import settle_counts
from .compression_uhr_bat import CompressionRules, compress_image
from .configuration_uhr_bat import UHRBatConfig, refuse_own_folder
from .generation_uhr_bat import UHRBatGenerationMixin
from .layers_uhr_bat import UHRBatMultiModalProjector, UHRBatScaleEmbedding, call_reader, question_attention
from .outputs_uhr_bat import (
    CACHE,
    IMAGE_INPUTS,
    UHRBatCausalLMOutputWithPast,
    UHRBatCompressionOutput,
    UHRBatImageFeatures,
    UHRBatImageInputs,
    UHRBatModelOutputWithPast,
    has_images,
)
from .released_api_uhr_bat import (
    RELEASED_ARGUMENTS,
    KeywordsStoppingCriteria,
    load_multiscale_tile_masks,
    split_image_to_multiscale_tiles,
    tokenizer_image_token,
    translate_released_call,
)

# The library takes every argument of `forward` with "label" in its name for a label, so `region_labels` had to go.
accept_region_labels = deprecate_kwarg("region_labels", new_name="regions", version="6.0.0")


def accept_nested_tower(module, state_dict, prefix, *args):
    """Pre-hook of `load_state_dict`: files of older releases nest the vision tower one level deeper."""
    nested, flat = prefix + "vision_tower.vision_model.", prefix + "vision_tower."
    for name in [name for name in state_dict if name.startswith(nested)]:
        state_dict[flat + name.removeprefix(nested)] = state_dict.pop(name)


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


class UHRBatPreTrainedModel(PreTrainedModel):
    config_class = UHRBatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "Qwen2DecoderLayer", "UHRBatScaleEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "cache", "image_features", "mm_encoder_outputs"]
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

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As the library's. What no forward pass reads stays frozen: loading makes new parameters, which are not."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        model.base_model.freeze_unread_layers()
        return loaded

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        """As the library's, into any folder but the one that the model was loaded from (`ValueError`).

        Weights are saved under the names that they have in memory, so that whatever reads the file by itself (resuming,
        `load_state_dict`, accelerate's loaders) finds each of them.
        """
        refuse_own_folder(self.config.name_or_path, save_directory)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class UHRBatModel(UHRBatPreTrainedModel):
    """Vision tower, projector, scale embedding, compression and decoder, without a language modelling head."""

    def __init__(self, config: UHRBatConfig):
        super().__init__(config)
        width, activation = config.text_config.hidden_size, config.projector_hidden_act
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = UHRBatMultiModalProjector(config.vision_config.hidden_size, width, activation)
        self.scale_embedding = UHRBatScaleEmbedding(config)
        self.token_mlp = UHRBatMultiModalProjector(width, width, activation) if config.token_mlp else None
        self.language_model = AutoModel.from_config(config.text_config)
        for layer in self.language_model.layers:
            layer.self_attn.register_forward_pre_hook(call_reader, with_kwargs=True)
        self.register_load_state_dict_pre_hook(accept_nested_tower)
        self.post_init()
        self.freeze_unread_layers()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @property
    def _feature_layer_idx(self) -> int:
        """Layer of the vision tower whose output is `hidden_states[vision_feature_layer]`."""
        layer = self.config.vision_feature_layer
        return layer - 1 if layer > 0 else self.config.vision_config.num_hidden_layers + layer

    @property
    def _unread_layers(self) -> list[nn.Module]:
        """Modules of the tower behind the feature layer: part of the checkpoint, but no token comes through them."""
        return [*self.vision_tower.encoder.layers[self._feature_layer_idx + 1 :], self.vision_tower.post_layernorm]

    def freeze_unread_layers(self):
        """Without this, training on several devices waits for gradients that never come."""
        for module in self._unread_layers:
            module.requires_grad_(False)

    # ---- Images: independent of the question -----------------------------------------------------------------------

    @accept_region_labels
    def encode_image(self, pixel_values, pixel_attention_mask=None, regions=None) -> list[UHRBatImageFeatures]:
        """Every tile through the vision tower once, the projector and the scale embedding (sections 3.2 and 3.3).

        Args:
            pixel_values, pixel_attention_mask, regions: see [`UHRBatImageInputs`]. A scale without a patch that shows
                the image is left out; the coarsest of the others is the anchor.

        Returns:
            One [`UHRBatImageFeatures`] per image, to be passed to `generate`, `compress` or `forward` as
            `image_features`, with any number of questions.

        Raises:
            ValueError: a shape that does not fit the configuration, or an image that shows nothing.
        """
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
            projected = self._project_tiles(tiles, encoded_idx, desc=f"Encoding {config.scales[scale_idx]} px")
            projected = projected.flatten(0, 1)[(copy_idx * p**2 + patch_idx).to(projected.device)]
            places = positions[scale_idx] = places.to(projected.device)
            tokens.append(self._add_scale_embedding(projected, scale_idx, places, config.scale_embedding_additions))
            if anchor_tokens is None:
                # The pass reads the anchor tile by tile, as the tower emits it and the released weights were trained.
                order = (tile_idx * p**2 + patch_idx).argsort().to(projected.device)
                anchor_positions = places[order]
                anchor_tokens = self._add_scale_embedding(projected[order], scale_idx, anchor_positions, 1)

        device = anchor_tokens.device
        positions = [places.to(device) for places in positions]
        tokens = [scale.to(anchor_tokens) for scale in tokens]
        if regions is not None:
            regions = [one.to(device)[places] for one, places in zip(regions.split(sizes), positions)]
        return UHRBatImageFeatures(anchor_tokens, anchor_positions, tokens, positions, regions)

    def _project_tiles(self, tiles, encoded_idx, desc) -> torch.Tensor:
        """float[T', P, D] of the chosen tiles, through the tower in chunks; only a chunk's activations are held."""
        chunks = encoded_idx.split(self.config.vision_chunk_size)
        bar = logging.tqdm(chunks, desc=desc, unit="chunk", delay=1, leave=False, disable=self.training)
        return torch.cat([self.multi_modal_projector(self._vision_features(tiles[chunk])) for chunk in bar])

    def _vision_features(self, tiles) -> torch.Tensor:
        """float[T, 3, tile, tile] -> float[T, P, C], patch tokens after `vision_feature_layer`.

        The tower's own layers, one after the other: the list of all hidden states is never held, and what follows the
        feature layer never runs.
        """
        tower = self.vision_tower
        hidden_states = tower.pre_layrnorm(tower.embeddings(tiles.to(tower.dtype)))
        for layer in tower.encoder.layers[: self._feature_layer_idx + 1]:
            hidden_states = layer(hidden_states, attention_mask=None)
        features = hidden_states[:, 1:]
        unread = self._unread_layers
        if self.training and any(parameter.requires_grad for layer in unread for parameter in layer.parameters()):
            # Somebody trains what no token comes through, as LoRA on "all-linear" does. Training on several devices
            # waits for a gradient of each parameter: one token goes on, for gradients of 0.
            *layers, norm = unread
            token = hidden_states[:1, :1]
            for layer in layers:
                token = layer(token, attention_mask=None)
            features = features + 0 * norm(token).sum()
        return features

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
        where = self.find_placeholders(input_ids, inputs_embeds).nonzero()[:, 0].tolist()
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
        # By position: the names of these arguments differ between releases.
        causal_mask = create_causal_mask(decoder.config, sequence, None, None)
        layers = decoder.layers[: self.config.importance_layer % len(decoder.layers) + 1]
        for layer in layers[:-1]:
            sequence = layer(
                sequence,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
            )

        rows = []

        def read_attention(attention):
            hidden_states = layers[-1].input_layernorm(sequence)
            rows.append(question_attention(attention, hidden_states, position_embeddings, question_start))

        # The layer calls the reader when its weights are in place (see `call_reader`). What it puts out is not needed:
        # it is called with a single row.
        layers[-1](
            sequence[:, :1],
            position_ids=position_ids[:, :1],
            position_embeddings=tuple(part[:, :1] for part in position_embeddings),
            read_attention=read_attention,
        )
        return rows[0][start:stop]

    @torch.compiler.disable
    @accept_region_labels
    def compress(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        answer_mask=None,
        rules=None,
        **images: Unpack[UHRBatImageInputs],
    ) -> UHRBatCompressionOutput:
        """C of eq. 3: exactly the budgeted number of visual tokens per image, guided by the question (section 3.4).

        Args:
            input_ids: long[B, M], prompts with one placeholder per image or as many as it has visual tokens.
            attention_mask: int[B, M], 0 where a prompt is padded. Padding has no influence.
            inputs_embeds: float[B, M, D] instead of `input_ids`.
            answer_mask: bool[B, M], True where a token is part of an answer. The question of an image ends where the
                first answer after it begins: the selection never sees the answer.
            rules: other values for fields of [`CompressionRules`] than those of the configuration, for this call.
            images: see [`UHRBatImageInputs`].

        Raises:
            ValueError: counts of images, placeholders and budgets that do not fit each other.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"`attention_mask` must be [batch, sequence] here. Got {list(attention_mask.shape)}.")
        rules = CompressionRules.of(self.config, rules)
        image_features = images.get("image_features")
        if image_features is None:
            encoded = ("pixel_values", "pixel_attention_mask", "regions")
            image_features = self.encode_image(**{name: images.get(name) for name in encoded})

        visible = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask is not None:
            visible = attention_mask[:, -inputs_embeds.shape[1] :].to(visible.device).bool()
        placeholder = self.find_placeholders(input_ids, inputs_embeds) & visible
        images_per_prompt, token_counts = self._settle_counts(placeholder, image_features, images)

        of_images = iter(zip(image_features, token_counts))
        compressed = []
        for row, num_images in enumerate(images_per_prompt):
            text = visible[row] & ~placeholder[row]
            spots = placeholder[row].nonzero()[:, 0]
            group = [next(of_images) for _ in range(num_images)]
            # A prompt that is not expanded yet holds one placeholder per image.
            sizes = [1] * num_images if len(spots) == num_images else [sum(counts) for _, counts in group]
            for (image, counts), run in zip(group, spots.split(sizes)):
                # Importance is estimated per image, on the prompt without the other images.
                seen = text.index_fill(0, run, True)
                if answer_mask is not None:
                    answered = answer_mask[row].to(text.device).index_fill(0, spots, False)
                    answered[: run[-1] + 1] = False
                    seen = seen & (answered.cumsum(0) == 0)
                with torch.no_grad():
                    ids = None if input_ids is None else input_ids[row][seen]
                    importance = self.estimate_importance(ids, image.anchor_tokens, inputs_embeds[row][seen])
                one = compress_image(image, importance, counts, self.config, rules)
                tokens = one.tokens if self.token_mlp is None else [self.token_mlp(scale) for scale in one.tokens]
                compressed.append(one._replace(tokens=tokens))

        tokens, importance, regions, slots = map(list, zip(*compressed)) if compressed else ([], [], [], [])
        visual_tokens = [torch.cat(scales) for scales in tokens]
        return UHRBatCompressionOutput(visual_tokens, tokens, importance, regions, slots, images_per_prompt)

    def find_placeholders(self, input_ids, inputs_embeds) -> torch.Tensor:
        """bool[..., M]: image tokens, from ids or, where there are none, from the embeddings."""
        if input_ids is not None:
            return (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        image_id = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    def _settle_counts(self, placeholder, image_features, images) -> tuple[list[int], list[list[int]]]:
        """`images_per_prompt` and `token_counts` of a batch as lists (see `settle_counts`)."""
        names = ("budgets", "token_counts", "images_per_prompt")
        budgets, token_counts, images_per_prompt = (
            value.tolist() if isinstance(value, torch.Tensor) else value for value in map(images.get, names)
        )
        if budgets is not None and len(budgets) and isinstance(budgets[0], (list, tuple)):  # the old name of the counts
            budgets, token_counts = None, budgets
        runs = [
            [len(list(run)) for is_image, run in groupby(row) if is_image] for row in placeholder.tolist()
        ]
        return settle_counts(
            budgets,
            token_counts,
            images_per_prompt,
            runs,
            self.config.scales,
            self.config.budgets,
            [image.available for image in image_features],
        )

    # ---- The decoder -----------------------------------------------------------------------------------------------

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features, tokens_per_prompt=None) -> torch.Tensor:
        """bool[B, M, 1], where visual tokens go; as many places as float[n, D] `image_features` has rows.

        Only the first `tokens_per_prompt` int[B] image tokens of a prompt are replaced; any later one was generated.

        Raises:
            ValueError: the numbers differ; both are named.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        if tokens_per_prompt is not None:
            mask = mask & (mask.cumsum(1) <= torch.tensor(tokens_per_prompt, device=mask.device)[:, None])
        num_placeholders = mask.sum()
        torch_compilable_check(
            num_placeholders == len(image_features),
            lambda: (
                f"Image features and image tokens do not match, tokens: {int(num_placeholders)}, features: "
                f"{len(image_features)}"
            ),
        )
        return mask.unsqueeze(-1)

    @can_return_tuple
    @accept_region_labels
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        mm_encoder_outputs=None,
        answer_mask=None,
        cache=None,
        **kwargs: Unpack[UHRBatImageInputs],
    ) -> UHRBatModelOutputWithPast:
        """Text, with visual tokens in place of its image placeholders, through the decoder.

        Args:
            input_ids, attention_mask, inputs_embeds, answer_mask: as in `compress`.
            mm_encoder_outputs: {"image": what `compress` returned} instead of images, as `generate` passes it on.
            cache, past_key_values: keys and values of what was read before, under either name.
            kwargs: images, see [`UHRBatImageInputs`]; the rest goes to the decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        compressed = (mm_encoder_outputs or {}).get("image")
        if has_images(images.get("pixel_values"), images.get("image_features")):
            if compressed is not None:
                raise ValueError("You cannot specify both images and mm_encoder_outputs at the same time")
            compressed = self.compress(input_ids, attention_mask, inputs_embeds, answer_mask, **images)
        if compressed is not None:
            visual_tokens = torch.cat(compressed.pooler_output).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, visual_tokens, compressed.tokens_per_prompt)
            inputs_embeds = inputs_embeds.masked_scatter(mask, visual_tokens)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        return UHRBatModelOutputWithPast(**outputs, image_outputs=compressed)


class UHRBatForConditionalGeneration(UHRBatPreTrainedModel, UHRBatGenerationMixin):
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
    @accept_region_labels
    def encode_image(self, pixel_values, pixel_attention_mask=None, regions=None) -> list[UHRBatImageFeatures]:
        """See [`UHRBatModel.encode_image`]. Without gradients: training goes through `forward`."""
        return self.model.encode_image(pixel_values, pixel_attention_mask, regions)

    def estimate_importance(self, input_ids, anchor_tokens, inputs_embeds=None) -> torch.Tensor:
        """See [`UHRBatModel.estimate_importance`]."""
        return self.model.estimate_importance(input_ids, anchor_tokens, inputs_embeds)

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UHRBatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask, return_dict=True, **kwargs)

    @torch.no_grad()
    def compress(self, rules=None, **inputs) -> UHRBatCompressionOutput:
        """See [`UHRBatModel.compress`]. Without gradients; through `forward`, so that the whole model's hooks fire."""
        return self(**inputs, compress_only=True, rules=rules)

    @can_return_tuple
    @accept_region_labels
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_attention_mask=None,
        regions=None,
        image_features=None,
        budgets=None,
        labels=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        compress_only=False,
        token_counts=None,
        images_per_prompt=None,
        answer_mask=None,
        cache=None,
        **kwargs,
    ) -> UHRBatCausalLMOutputWithPast:
        """Scores of the next token, and the loss where `labels` long[B, M] are given (-100 and images are ignored).

        The arguments are those of [`UHRBatModel.forward`], and:

        Args:
            labels: long[B, M]. Where they are not -100, there is an answer, which the selection never sees.
            logits_to_keep: number of last positions that are scored, or their indices; 0 scores all.
            compress_only: return what `compress` does, and go no further. FSDP, DeepSpeed and offloading have weights in
                place only during a call of the whole model, so `compress` is such a call.

        The released code's call (`multiscale_pixels`, ...) is translated, its one placeholder per image expanded.
        """
        if answer_mask is None and labels is not None:
            answer_mask = labels != -100
        images = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "regions": regions,
            "image_features": image_features,
            "budgets": budgets,
            "token_counts": token_counts,
            "images_per_prompt": images_per_prompt,
        }
        if compress_only:
            rules = kwargs.pop("rules", None)
            return self.model.compress(input_ids, attention_mask, inputs_embeds, answer_mask, rules, **images)
        if kwargs.keys() & set(RELEASED_ARGUMENTS):
            input_ids, kwargs = translate_released_call(self.config, input_ids, kwargs)
            images |= {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            if has_images(images["pixel_values"]):
                if attention_mask is None:
                    attention_mask = torch.ones_like(input_ids)
                compressed = self.model.compress(input_ids, attention_mask, answer_mask=answer_mask, **images)
                images, mm_encoder_outputs = {}, {"image": compressed}
                input_ids, attention_mask, labels = self.expand_placeholders(
                    input_ids, attention_mask, compressed, labels=labels
                )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            answer_mask=answer_mask,
            cache=past_key_values if cache is None else cache,
            **images,
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = [
    "KeywordsStoppingCriteria",
    "UHRBatForConditionalGeneration",
    "UHRBatModel",
    "UHRBatPreTrainedModel",
    "load_multiscale_tile_masks",
    "split_image_to_multiscale_tiles",
    "tokenizer_image_token",
]
