"""UHR-BAT processor: images and text to model inputs, one placeholder per image to the budget's visual tokens.

The number of visual tokens is known here, before the model runs: n = sum over scales of min(B_s, tokens of the scale
that show the image) (section 3.3, "Per-scale Budgets").
"""

import numpy as np
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_uhr_bat import PAPER_BUDGETS, refuse_own_folder, split_budgets
from .image_processing_uhr_bat import (
    UHRBatImageProcessor,
    UHRBatImageProcessorKwargs,
    flatten_images,
    shown_patches,
)


class UHRBatImagesKwargs(UHRBatImageProcessorKwargs, total=False):
    """
    budgets (`list[int]`): visual tokens that each scale may spend in one prompt, shared by its images.
    images_per_prompt (`list[int]`): filled in by the processor, which sees text and images together.
    """

    budgets: list[int] | None
    images_per_prompt: list[int] | None


class UHRBatProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: UHRBatImagesKwargs
    _defaults = {"text_kwargs": {"padding": False}}


class UHRBatProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: [`UHRBatImageProcessor`], or CLIP's, which is turned into one.
        tokenizer: a tokenizer that knows `image_token` as one token.
        chat_template: Jinja template of a conversation.
        default_budgets: visual tokens that each scale may spend in one prompt, the paper's if None;
            `processor(..., budgets=...)` for one call.
        image_token: the text that stands for an image.
    """

    valid_processor_kwargs = UHRBatProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        default_budgets=None,
        image_token="<image>",
        **kwargs,
    ):
        # Without trust_remote_code the library reads our own settings into CLIP's class.
        if image_processor is not None and "pixel_attention_mask" not in image_processor.model_input_names:
            image_processor = UHRBatImageProcessor.from_clip(image_processor)
        if default_budgets is not None:
            split_budgets(default_budgets, image_processor.scales)
        self.default_budgets = list(PAPER_BUDGETS if default_budgets is None else default_budgets)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer does not know {image_token!r} as one token: add it as a special token.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images=None, text=None, **kwargs):
        """Model inputs from text with one `image_token` per image, and images in the order of the text.

        Args:
            images: an image, a list, or a list per prompt; PIL images, arrays, paths or URLs.
            text: a prompt or a list of prompts.
            budgets: int[S], visual tokens that each scale may spend in one prompt.

        Returns:
            input_ids, attention_mask: long[B, M], every placeholder repeated once per visual token;
            pixel_values: float[I, T, 3, tile, tile]; pixel_attention_mask: [I, N], 1 where a patch shows the image;
            budgets: long[I, S], exact number of visual tokens per image and scale.

        Raises:
            ValueError: counts of images and placeholders that differ; wrong budgets; a prompt over the context window.
        """
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            kwargs["images_per_prompt"] = self._images_per_prompt(images, prompts, kwargs)
        inputs = super().__call__(images=images, text=text, **kwargs)
        longest = max((len(ids) for ids in inputs.get("input_ids", [])), default=0)
        if longest > self.tokenizer.model_max_length:
            raise ValueError(
                f"A prompt has {longest} tokens with its images, but the context window holds "
                f"{self.tokenizer.model_max_length}. Shorten the text or lower the budgets: nothing is cut silently."
            )
        return inputs

    def _images_per_prompt(self, images, prompts, kwargs) -> list[int]:
        """Images of each prompt: from a list per prompt, else from the placeholders of the text."""
        placeholders = [prompt.count(self.image_token) for prompt in prompts]
        num_images = 0 if images is None else len(flatten_images(images))
        nested = isinstance(images, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in images)
        per_prompt = [len(group) for group in images] if nested and len(images) == len(prompts) else placeholders
        # A placeholder that a user typed is plain text where the template marked it so.
        marked = kwargs.get("sanitize_control_tokens")
        if not marked and (sum(placeholders) != num_images or per_prompt != placeholders):
            raise ValueError(
                f"The total number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"images passed. Found {placeholders} {self.image_token} tokens per prompt and {num_images} images"
                + (f", {per_prompt} per prompt." if nested else ".")
            )
        return per_prompt

    def _process_images(self, images, budgets=None, images_per_prompt=None, **kwargs):
        """Adds the exact number of visual tokens per image and scale to what the image processor returns."""
        inputs = self.image_processor(images, **kwargs)
        shown = np.asarray(inputs["pixel_attention_mask"])
        budgets = self.default_budgets if budgets is None else budgets
        if images_per_prompt is None:
            images_per_prompt = [1] * len(shown)
        counts = self._count_tokens(shown, budgets, images_per_prompt, kwargs.get("scales"))
        inputs["budgets"] = counts
        return inputs, [self.image_token * sum(count) for count in counts]

    def _count_tokens(self, shown, budgets, images_per_prompt, scales=None) -> list[list[int]]:
        """int[I][S], min(share of the budget, patches that show the image), from masks [I, N] of all scales."""
        scales = scales or self.image_processor.scales
        ends = np.cumsum([(scale // self.image_processor.patch_size) ** 2 for scale in scales])[:-1]
        shares = [share for number in images_per_prompt if number for share in split_budgets(budgets, scales, number)]
        if len(shares) != len(shown):
            raise ValueError(
                f"The total number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"images passed. Found {len(shares)} {self.image_token} tokens and {len(shown)} images."
            )
        return [
            [min(budget, int(mask.sum())) for budget, mask in zip(share, np.split(masks, ends))]
            for share, masks in zip(shares, shown)
        ]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the library's, into any folder but the one that the processor was loaded from (`ValueError`)."""
        refuse_own_folder(self.tokenizer.name_or_path, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Visual tokens of images of (height, width) pixels, one image per prompt, without reading them."""
        if image_sizes is None:
            return MultiModalData()
        processor = self.image_processor
        grids = [(scale // processor.patch_size,) * 2 for scale in processor.scales]
        shown = [
            np.concatenate([shown_patches(tuple(size), grid).ravel() | (not processor.mask_padding) for grid in grids])
            for size in image_sizes
        ]
        counts = self._count_tokens(shown, kwargs.get("budgets") or self.default_budgets, [1] * len(shown))
        num_tiles = sum((scale // processor.crop_size["height"]) ** 2 for scale in processor.scales)
        return MultiModalData(
            num_image_tokens=[sum(count) for count in counts], num_image_patches=[num_tiles] * len(counts)
        )

    @property
    def model_input_names(self):
        return [*super().model_input_names, "budgets"]


__all__ = ["UHRBatProcessor"]
