# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT: question-guided, region-faithful compression of ultra-high-resolution images for a vision-language model.

Holds the towers and what happens between them: images are encoded once (sections 3.2 and 3.3), the question weighs the
anchor (eq. 2), every scale is compressed by the functions of `token_compression_uhr_bat.py` (eq. 6-15), and the decoder
reads the visual tokens.

Axes: I images, S scales, T tiles of an image, P patches of a tile, N tokens of a scale, V of them that show the image
and not the letterbox, B a budget, D decoder width, M text tokens. Tokens of a scale stand row by row over its whole
grid, unless "tile by tile" is said.
"""

import warnings
from importlib import import_module
from itertools import accumulate

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple, torch_compilable_check

from .configuration_uhr_bat import UHRBatConfig, refuse_own_folder
from .modeling_compression_uhr_bat import UHRBatCompressionMixin
from .modeling_encoding_uhr_bat import UHRBatEncodingMixin
from .modeling_generation_uhr_bat import UHRBatGenerationMixin
from .modeling_importance_uhr_bat import UHRBatImportanceMixin
from .modeling_layers_uhr_bat import (
    UHRBatMultiModalProjector,
    UHRBatScaleEmbedding,
    UHRBatTowersMixin,
    UHRBatVisionTower,
    call_reader,
)
from .modeling_outputs_uhr_bat import (
    CACHE,
    IMAGE_INPUTS,
    UHRBatCausalLMOutputWithPast,
    UHRBatCompressionOutput,
    UHRBatImageFeatures,
    UHRBatImageInputs,
    UHRBatModelOutputWithPast,
    UHRBatPyramidFeatures,
    accept_past_key_values,
    accept_region_labels,
    has_images,
)
from .modeling_pointing_uhr_bat import UHRBatPointer, UHRBatPointingMixin, is_pointed_at, pointed_tokens
from .modeling_region_focus_uhr_bat import UHRBatRegionFocusMixin, UHRBatRegionFocusModule
from .pipeline_uhr_bat import UHRBatPipeline  # saved beside the model, which names it
from .released_api_uhr_bat import (
    RELEASED_ARGUMENTS,
    KeywordsStoppingCriteria,
    load_multiscale_tile_masks,
    split_image_to_multiscale_tiles,
    tokenizer_image_token,
    translate_released_call,
)


class UHRBatPreTrainedModel(PreTrainedModel):
    config_class = UHRBatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UHRBatScaleEmbedding", "UHRBatPointer"]  # the towers bring their own
    _keep_in_fp32_modules = ["pointer", "model.pointer"]  # which quantisation leaves alone, too
    _skip_keys_device_placement = ["past_key_values", "cache", "image_features", "mm_encoder_outputs"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # What a [`VisionLanguageModel`] says of itself.
    tile_size = property(lambda self: self.config.tile_size)
    patches_per_side = property(lambda self: self.config.tile_size // self.config.patch_size)
    image_token_id = property(lambda self: self.config.image_token_id)
    row_width = property(lambda self: self.config.text_config.hidden_size)
    context_window = property(lambda self: self.config.text_config.max_position_embeddings)

    def features_of(self, rows):
        """All of float[V, D]."""
        return rows

    def visual_inputs(self, input_ids, attention_mask, compressed) -> dict:
        """The library's own name for images that are encoded already."""
        return {"mm_encoder_outputs": {"image": compressed}}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # The library passes over modules of outside code that own no parameters, so the scale embedding's tables are found
        # where they are owned.
        if isinstance(module, (UHRBatScaleEmbedding, nn.ParameterDict)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, UHRBatModel) and module.image_newline is not None:
            init.zeros_(module.image_newline)

    def initialize_weights(self):
        """As the library's, the towers first: inside of outside code it would pass over those of their modules that own no
        parameters, and so leave CLIP's without their own initialisation."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not isinstance(module, UHRBatPreTrainedModel):
                module.initialize_weights()
        super().initialize_weights()

    def post_init(self):
        super().post_init()
        # What shards a model looks for each of these classes in it, and a tower names those of its text side, too.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As the library's. What no forward pass reads stays frozen, and so does a pointer, which no answer trains: loading makes
        new parameters, which are not."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        model.base_model.vision_tower.freeze_unread_layers()
        if model.base_model.pointer is not None:
            model.base_model.pointer.requires_grad_(False)
        return loaded

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        """As the library's, into any folder but the one that the model was loaded from (`ValueError`).

        Weights are saved under the names that they have in memory, so that whatever reads the file by itself (resuming,
        `load_state_dict`, accelerate's loaders) finds each of them.
        """
        refuse_own_folder(self.config.name_or_path, save_directory)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class UHRBatModel(
    UHRBatRegionFocusMixin,
    UHRBatPointingMixin,
    UHRBatTowersMixin,
    UHRBatEncodingMixin,
    UHRBatImportanceMixin,
    UHRBatCompressionMixin,
    UHRBatPreTrainedModel,
):
    """Vision tower, projector, scale embedding, compression and decoder, without a language modelling head: a
    [`VisionLanguageModel`]."""

    def __init__(self, config: UHRBatConfig):
        super().__init__(config)
        width, activation = config.text_config.hidden_size, config.projector_hidden_act
        self.vision_tower = UHRBatVisionTower(config)
        self.multi_modal_projector = UHRBatMultiModalProjector(config.vision_config.hidden_size, width, activation)
        self.scale_embedding = UHRBatScaleEmbedding(config)
        # CODEPATH: released weights have the MLP after the selection, UHR-BAT-Tiny has none.
        self.token_mlp = UHRBatMultiModalProjector(width, width, activation) if config.token_mlp else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.region_focus = self.image_newline = None
        # CODEPATH: LRS-VQA's checkpoints, and what was distilled like them, have the module; the others have none.
        if config.region_focus is not None:
            self.region_focus = UHRBatRegionFocusModule(config, self.language_model)
            self.image_newline = nn.Parameter(torch.zeros(width))
        # CODEPATH: UHR-BAT-Tiny points to what it counts, released weights do not.
        self.pointer = None if config.pointer is None else UHRBatPointer(config).requires_grad_(False)
        for layer in self.language_model.layers:
            layer.self_attn.register_forward_pre_hook(call_reader, with_kwargs=True)
        self.post_init()

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
    @accept_past_key_values("5.40.0")
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
        rules=None,
        **kwargs: Unpack[UHRBatImageInputs],
    ) -> UHRBatModelOutputWithPast:
        """Text, with visual tokens in place of its image placeholders, through the decoder.

        Args:
            input_ids, attention_mask, inputs_embeds, answer_mask, rules: as in `compress`.
            mm_encoder_outputs: {"image": what `compress` returned} instead of images, as `generate` passes it on; with "told"
                where a part of the answer is read again, in which nothing is pointed to.
            cache, past_key_values: keys and values of what was read before, under either name.
            kwargs: images, see [`UHRBatImageInputs`]; the rest goes to the decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        compressed = (mm_encoder_outputs or {}).get("image")
        if has_images(**images):
            if compressed is not None:
                raise ValueError("You cannot specify both images and mm_encoder_outputs at the same time")
            compressed = self.compress(input_ids, attention_mask, inputs_embeds, answer_mask, rules, **images)
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
        if self.pointer is not None and is_pointed_at(compressed) and not (mm_encoder_outputs or {}).get("told"):
            outputs.last_hidden_state = self.point_and_tell(
                compressed, mask[..., 0], attention_mask, answer_mask, inputs_embeds, outputs.last_hidden_state
            )
        return UHRBatModelOutputWithPast(**outputs, image_outputs=compressed)


class UHRBatForConditionalGeneration(UHRBatPreTrainedModel, UHRBatGenerationMixin):
    """UHR-BAT with a language modelling head: `generate` answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = True
    # The machine's, not the checkpoint's: `model.vision_chunk_size = 4`.
    vision_chunk_size = UHRBatModel.vision_chunk_size
    tile_cache_bytes = UHRBatModel.tile_cache_bytes

    def __init__(self, config: UHRBatConfig):
        super().__init__(config)
        self.model = UHRBatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def planner(self, device=None):
        """Moved to `uhr_bat.planner_of(model)`; goes with the next release."""
        warnings.warn("`model.planner()` is `uhr_bat.planner_of(model)` now.", FutureWarning, stacklevel=2)
        return import_module("uhr_bat.planning").planner_of(self, device)

    def plan(self, image_size, budgets=None, **options):
        """Moved to `uhr_bat.plan(model, image_size)`; goes with the next release."""
        warnings.warn("`model.plan(...)` is `uhr_bat.plan(model, ...)` now.", FutureWarning, stacklevel=2)
        return import_module("uhr_bat.planning").plan(self, image_size, budgets, **options)

    @torch.no_grad()
    @accept_region_labels
    def encode_image(
        self, pixel_values=None, pixel_attention_mask=None, regions=None, image_pyramids=None
    ) -> list[UHRBatImageFeatures] | list[UHRBatPyramidFeatures]:
        """See [`UHRBatModel.encode_image`]. Without gradients: training goes through `forward`."""
        return self.model.encode_image(pixel_values, pixel_attention_mask, regions, image_pyramids)

    def estimate_importance(self, input_ids, anchor_tokens, inputs_embeds=None, **options) -> torch.Tensor:
        """See [`UHRBatModel.estimate_importance`]."""
        return self.model.estimate_importance(input_ids, anchor_tokens, inputs_embeds, **options)

    def find_placeholders(self, input_ids, inputs_embeds=None) -> torch.Tensor:
        """See [`UHRBatModel.find_placeholders`]."""
        return self.model.find_placeholders(input_ids, inputs_embeds)

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UHRBatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask, return_dict=True, **kwargs)

    @torch.no_grad()
    def compress(self, rules=None, **inputs) -> UHRBatCompressionOutput:
        """See [`UHRBatModel.compress`]. Without gradients; through `forward`, so that the whole model's hooks fire."""
        return self(**inputs, compress_only=True, rules=rules)

    def point(self, ids, compressed) -> list:
        """What the answers to prompts point to.

        Args:
            ids: the answers, equally many to every prompt; what a prompt is pointed to does not depend on them.
            compressed: what `compress` returned for the prompts, after they were read.

        Returns:
            for every answer a list of (label "", level, position on its grid, probability), or None where nothing was looked for.
        """
        ends = accumulate(compressed.images_per_prompt)
        found = [
            pointed_tokens(compressed, end - 1) if number else None
            for end, number in zip(ends, compressed.images_per_prompt)
        ]
        named = [None if one is None else [("", *token) for token in one] for one in found]
        return [one for one in named for _ in range(len(ids) // max(1, len(named)))]

    def generate(self, inputs=None, *args, **kwargs):
        """As of [`UHRBatGenerationMixin`]; the released code's call (`inputs`, `multiscale_pixels`, ...) is translated to it."""
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        inputs, kwargs = translate_released_call(self.config, inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    @can_return_tuple
    @accept_past_key_values("5.40.0")
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
        image_pyramids=None,
        **kwargs,
    ) -> UHRBatCausalLMOutputWithPast:
        """Scores of the next token, and the loss where `labels` long[B, M] are given (-100 and images are ignored).

        The arguments are those of [`UHRBatModel.forward`], and:

        Args:
            labels: long[B, M]. Where they are not -100, there is an answer, which the selection never sees.
            logits_to_keep: number of last positions that are scored, or their indices; 0 scores all.
            compress_only: return what `compress` does, and go no further. FSDP, DeepSpeed and offloading have weights
                in place only during a call of the whole model, so `compress` is such a call.

        The released code's call (`multiscale_pixels`, ...) is translated, its one placeholder per image expanded.
        """
        if answer_mask is None and labels is not None:
            answer_mask = labels != -100
        images = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "regions": regions,
            "image_pyramids": image_pyramids,
            "image_features": image_features,
            "budgets": budgets,
            "token_counts": token_counts,
            "images_per_prompt": images_per_prompt,
            "registration": kwargs.pop("registration", None),
        }
        if compress_only:
            rules = kwargs.pop("rules", None)
            if kwargs:
                raise TypeError(f"`compress` has no argument {min(kwargs)!r}.")
            return self.model.compress(input_ids, attention_mask, inputs_embeds, answer_mask, rules, **images)
        if kwargs.keys() & set(RELEASED_ARGUMENTS):
            input_ids, kwargs = translate_released_call(self.config, input_ids, kwargs)
            images |= {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            if has_images(images["pixel_values"]):
                if attention_mask is None:
                    attention_mask = torch.ones_like(input_ids)
                compressed = self.model.compress(input_ids, attention_mask, answer_mask=answer_mask, **images)
                images, mm_encoder_outputs = {}, {"image": compressed}
                if answer_mask is not None:
                    *_, answered = self.expand_placeholders(
                        input_ids, attention_mask, compressed, labels=answer_mask.long()
                    )
                    answer_mask = answered == 1
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
    "UHRBatPipeline",
    "UHRBatPreTrainedModel",
    "load_multiscale_tile_masks",
    "split_image_to_multiscale_tiles",
    "tokenizer_image_token",
]
