# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT generation: what `generate` does before the library's own: prompts, caches, beams.

Images are compressed once, before the first step, and the prompt is expanded to their visual tokens. The library then
gets them as `mm_encoder_outputs`, its own name for images that are encoded already.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.utils import logging

from .modeling_outputs_uhr_bat import (
    CACHE,
    IMAGE_INPUTS,
    UHRBatCompressionOutput,
    accept_past_key_values,
    accept_region_labels,
    has_images,
)

logger = logging.get_logger(__name__)


class UHRBatGenerationMixin(GenerationMixin):
    """The library's mixin for a [`VisionLanguageModel`] with `compress` and `find_placeholders`, and the library's
    `generation_config`."""

    @accept_past_key_values("6.0.0")
    @accept_region_labels
    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """Answer: `GenerationMixin.generate`, with the images of [`UHRBatImageInputs`].

        Images are compressed once, before the first step, whatever the number of beams and returned sequences. A prompt
        with one placeholder per image is expanded to the budget first. `rules` are those of `compress`.

        A conversation goes on from `cache` (or `past_key_values`, its name up to 5.23) with the images of the new turn
        alone, and either all ids so far and the new ones, or the new ones and the attention mask of all.

        Raises:
            ValueError: prompts, images and budgets that do not fit each other, a prompt over the context window, or `rules`
                without images.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if "cache" in kwargs:
            kwargs[CACHE] = kwargs.pop("cache")
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        rules = kwargs.pop("rules", None)
        if rules is not None and not has_images(**images):
            raise ValueError(
                "`rules` choose among the tokens of images, but no images were passed that are not compressed yet."
            )
        if has_images(**images):
            attention_mask, inputs_embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
            prompt = inputs if inputs_embeds is None else inputs_embeds
            if attention_mask is None:
                attention_mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            num_cached = self._count_cached(prompt, attention_mask, kwargs.get(CACHE))
            visible = attention_mask
            if num_cached:
                # Images of earlier turns are in the cache: only those of this turn are compressed.
                known = self.find_placeholders(inputs, prompt)[:, :num_cached].to(visible.device)
                visible = torch.cat((visible[:, :num_cached].masked_fill(known, 0), visible[:, num_cached:]), dim=1)
            prompt = {"input_ids": inputs, "attention_mask": visible, "inputs_embeds": inputs_embeds}
            compressed = self.compress(**prompt, rules=rules, **images)
            if inputs_embeds is None:
                inputs, attention_mask, _ = self.expand_placeholders(
                    inputs, attention_mask, compressed, num_cached=num_cached
                )
                kwargs["attention_mask"] = attention_mask
            kwargs |= self.visual_inputs(inputs, attention_mask, compressed)
        self._check_prompt(inputs, kwargs, has_images(**images))
        return super().generate(inputs, *args, **kwargs)

    @staticmethod
    def _count_cached(prompt, attention_mask, cache) -> int:
        """How many tokens of a prompt are in the cache. As in the library, a prompt shorter than its mask has none."""
        if cache is None or attention_mask.shape[1] != prompt.shape[1]:
            return 0
        return int(cache.get_seq_length())

    def expand_placeholders(self, input_ids, attention_mask, compressed, *, labels=None, num_cached=0):
        """One placeholder per image -> one per visual token; prompts padded on the left to one length.

        Args:
            input_ids, attention_mask: long[B, M]; a prompt that is expanded already comes back as it is.
            compressed: what `compress` returned for these prompts.
            labels: long[B, M] or None. An image has no label (-100).
            num_cached: tokens of the prompts that a cache holds. They are not padded; padding is inserted after them.

        Returns:
            (input_ids, attention_mask, labels) of the new length.
        """
        new_ids = input_ids[:, num_cached:]
        num_old = attention_mask.shape[1] - new_ids.shape[1]
        new_mask = attention_mask[:, num_old:]
        placeholder = (new_ids == self.image_token_id) & new_mask.bool()
        sizes = [len(tokens) for tokens in compressed.pooler_output]
        if int(placeholder.sum()) == sum(sizes):
            return input_ids, attention_mask, labels
        repeats = torch.ones_like(new_ids).masked_scatter(placeholder, torch.tensor(sizes, device=new_ids.device))

        def expand(rows, fill):
            rows = [row.repeat_interleave(times) for row, times in zip(rows, repeats)]
            length = max(map(len, rows))
            return torch.stack([F.pad(row, (length - len(row), 0), value=fill) for row in rows])

        if labels is not None:
            labels = expand(labels.masked_fill(placeholder, -100), -100)
        return (
            torch.cat((input_ids[:, :num_cached], expand(new_ids, self.generation_config.pad_token_id or 0)), dim=1),
            torch.cat((attention_mask[:, :num_old], expand(new_mask, 0)), dim=1),
            labels,
        )

    def _check_prompt(self, input_ids, kwargs, held):
        """Raises `ValueError` for image tokens without images, and for a prompt over the context window."""
        if input_ids is None:
            return
        num_placeholders = int((input_ids == self.image_token_id).sum())
        # The images of a conversation that goes on are in its cache; embeddings may hold them already.
        held |= any(kwargs.get(name) is not None for name in (CACHE, "inputs_embeds", "mm_encoder_outputs"))
        if num_placeholders and not held:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {num_placeholders} image tokens in the "
                "prompts, but no images were passed."
            )
        window = self.context_window
        # Where a conversation goes on with its new ids alone, the mask still covers all of it.
        mask = kwargs.get("attention_mask")
        length = max(input_ids.shape[-1], 0 if mask is None else mask.shape[-1])
        if window is not None and length >= window:
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
            again = mm_encoder_outputs is not None and not is_first_iteration
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs | {"told": True} if again else mm_encoder_outputs
            if mm_encoder_outputs and "prompt_length" in mm_encoder_outputs:
                place = torch.arange(input_ids.shape[1], device=input_ids.device)
                model_inputs["answer_mask"] = (place >= mm_encoder_outputs["prompt_length"]).expand_as(input_ids)
        return model_inputs

    def _assisted_decoding(self, input_ids, *args, mm_encoder_outputs=None, **kwargs):
        """The prompt is read with tokens that may follow it: a pointer is told where it ends."""
        if mm_encoder_outputs and self.model.pointer is not None:
            mm_encoder_outputs = mm_encoder_outputs | {"prompt_length": input_ids.shape[1]}
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """`prefill_chunk_size` only where the library hands every chunk its images, which older releases leave out, and where no
        pointer looks at all of the prompt at once."""
        outputs = model_kwargs.get("mm_encoder_outputs")
        sliced = hasattr(generation_utils, "_slice_mm_encoder_output")
        if outputs and (self.model.pointer is not None or not sliced):
            if generation_config.prefill_chunk_size is not None:
                reader = "A model with a `pointer`" if sliced else "This release of transformers"
                logger.warning_once(f"{reader} cannot read images in chunks: `prefill_chunk_size` is left out.")
                generation_config.prefill_chunk_size = None
        output = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if isinstance(outputs, _Copies):
            outputs.tell_pointed()
        return output

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams of one prompt share its images as a group: [A, B] becomes [A, B, A, B], not [A, A, B, B]."""
        outputs = model_kwargs.pop("mm_encoder_outputs", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if outputs and expand_size > 1:
            image = outputs["image"]
            every = {"pooler_output": image.pooler_output, "tokens": image.tokens, "slots": image.slots}
            every |= {"scales": image.scales, "regions": image.regions, "differences": image.differences}
            expanded = {name: _in_groups(one, image.images_per_prompt, expand_size) for name, one in every.items()}
            numbers = [num_images for num_images in image.images_per_prompt for _ in range(expand_size)]
            outputs = _Copies(image, UHRBatCompressionOutput(**expanded, images_per_prompt=numbers), expand_size)
        if outputs is not None:
            model_kwargs["mm_encoder_outputs"] = outputs
        return input_ids, model_kwargs


class _Copies(dict):
    """`mm_encoder_outputs` of so many copies of every prompt of a batch, and what `compress` returned for the prompts themselves,
    where the caller looks for what was pointed to."""

    def __init__(self, compressed, expanded, times):
        super().__init__(image=expanded)
        self.compressed, self.times = compressed, times

    def tell_pointed(self):
        if self["image"].pointed is not None:
            copies = iter(self["image"].pointed)
            groups = [
                [next(copies) for _ in range(num_images * self.times)][:num_images]
                for num_images in self.compressed.images_per_prompt
            ]
            self.compressed.pointed = [one for group in groups for one in group]


def _in_groups(of_images, images_per_prompt, times):
    """What every image of some prompts has, as of so many copies of each prompt; None stays."""
    if of_images is None:
        return None
    images = iter(of_images)
    groups = [[next(images) for _ in range(num_images)] for num_images in images_per_prompt]
    return [one for group in groups for one in group * times]
