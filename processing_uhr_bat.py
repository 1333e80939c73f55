# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT processor: images and text to model inputs, one placeholder per image to the budget's visual tokens.

The number of visual tokens is known here, before the model runs: n = sum over scales of min(B_s, tokens of the scale
that show the image) (section 3.3, "Per-scale Budgets").

Letters: B prompts, I images, S scales, T tiles and N patches of all scales, M text tokens.
"""

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
from tokenizers import normalizers, pre_tokenizers
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .budgets_uhr_bat import count_tokens, equal_shares, is_one_budget, split_budgets
from .configuration_uhr_bat import PAPER_BUDGETS, UHRBatConfig, refuse_own_folder
from .geometry_uhr_bat import grids, shown_patches
from .image_processing_uhr_bat import UHRBatImageProcessor, UHRBatImageProcessorKwargs, part_reading
from .image_pyramids_uhr_bat import ImagePyramid, UnreadImage
from .image_reading_uhr_bat import ENCODED, flatten_images, kind_of
from .image_registration_uhr_bat import check_dates, check_registration, open_dates

# Behind every letter of a control token that a message spells: the tokenizer then finds none, and its normalizer drops
# the mark. Unicode keeps this code point for programs; no text has it.
MARK = "\ufdd0"

# What says where on the Hub a file lies.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# What the library passes of its own to any processor.
LIBRARY_OPTIONS = ("videos", "audio", "common_kwargs", "load_audio_from_video")


class UHRBatImagesKwargs(UHRBatImageProcessorKwargs, total=False):
    """
    budgets (`list[int]`, `int` or `str`): visual tokens that each scale, or all scales together, may spend in one
        prompt, shared by its images; or a limit, "24GiB" or "5s".
    images_per_prompt (`list[int]`): filled in by the processor, which sees text and images together.
    dates (`bool` or `list`): whether the two images of every prompt show one place at two dates.
    """

    budgets: list[int] | int | str | None
    images_per_prompt: list[int] | None
    dates: bool | list | None


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
    skip_tensor_conversion = [
        *ProcessorMixin.skip_tensor_conversion, "image_features", "image_pyramids", "registration",
    ]  # fmt: skip

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
        budgets = PAPER_BUDGETS if default_budgets is None else default_budgets
        self.default_budgets = budgets if is_one_budget(budgets) else list(budgets)
        self.planner = None  # a model's, for budgets that are limits: `uhr_bat.planner_of(model)`
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer does not know {image_token!r} as one token: add it as a special token.")
        if tokenizer.pad_token_id is None:  # batches need one
            tokenizer.pad_token = tokenizer.eos_token
        _drop_marks(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        image_features: list | None = None,
        **kwargs: Unpack[UHRBatProcessorKwargs],
    ):
        """Model inputs from text with one `image_token` per image, and images in the order of the text.

        Args:
            images: an image, a list, or a list per prompt; PIL images, arrays, paths or URLs. Lists without an image
                are a batch of text.
            text: a prompt or a list of prompts.
            image_features: what `model.encode_image` returned, one per image, instead of images: the prompt is expanded
                as theirs would be, and the features are handed on to the model. They may repeat, as the same image does
                that is asked about in several prompts.
            budgets: int[S], visual tokens that each scale may spend in one prompt; one number for all scales together. Or
                a limit, "24GiB" of memory or "5s" from the tiles to the answer, for the largest budgets that stay below
                it: of one image, and once `processor.planner = uhr_bat.planner_of(model)` has said what the model takes.
            max_tiles: tiles that may go through the vision tower for one prompt, shared by its images: tiles of finer
                scales are then read and encoded where the question looks. With `native` the scales are levels down to
                the image's own resolution; a list of default budgets then counts as their sum.
            dynamic_pyramid: read the images as LRS-VQA's system does, where the model has a `region_focus`: how many visual
                tokens there are is then known when the model has looked, and every prompt keeps one placeholder per image.
                One number of `budgets` is the most that a prompt may spend.
            dates: True where the two images of every prompt show one place, the earlier date first: what differs between them is
                then kept before what does not. They are registered by their geotransforms, or by their pixels. Of
                `image_features`, which do not say where they lie, a list with what `register` returned for each prompt.

        Returns:
            input_ids, attention_mask: long[B, M], every placeholder repeated once per visual token;
            pixel_values: float[I, T, 3, tile, tile]; pixel_attention_mask: [I, N], 1 where a patch shows the image; or
            image_features, as they came; or with `max_tiles` image_pyramids: list[I] of [`ImagePyramid`];
            token_counts: long[I, S], exact number of visual tokens per image and scale; [I, 1] for one budget;
            images_per_prompt: long[B].

        Raises:
            TypeError: text that is no text, or an argument that there is not.
            ValueError: counts of images and placeholders that differ; wrong budgets; a prompt over the context window.
        """
        self._check_names(kwargs)
        prompts = [text] if isinstance(text, str) else text
        if prompts is not None and not (
            isinstance(prompts, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompts)
        ):
            raise TypeError(
                f"`text` must be a string or a list of strings. Got {type(text).__name__}. Pass images as `images=` "
                "and prompts as `text=`."
            )
        if image_features is not None:
            if images is not None:
                raise ValueError("You cannot specify both images and image_features at the same time.")
            images = list(image_features)
        elif images is not None and not flatten_images(images):
            images = None
        if prompts is not None:
            kwargs["images_per_prompt"] = self._images_per_prompt(images, prompts)
            stated = "add_special_tokens" in (kwargs.get("text_kwargs") or {})
            if prompts and not stated and not self.adds_special_tokens(prompts[0]):
                kwargs.setdefault("add_special_tokens", False)
        inputs = super().__call__(images=images, text=text, **kwargs)
        longest = max((len(ids) for ids in inputs.get("input_ids", [])), default=0)
        if longest > self.tokenizer.model_max_length:
            raise ValueError(
                f"A prompt has {longest} tokens with its images, but the context window holds "
                f"{self.tokenizer.model_max_length}. Shorten the text or lower the budgets: nothing is cut silently."
            )
        return inputs

    def _check_names(self, kwargs):
        """Raises `TypeError` for an argument that there is not, which the library would warn of and leave out."""
        kinds = self.valid_processor_kwargs.__annotations__
        known = {*LIBRARY_OPTIONS, *kinds}
        known.update(name for kind in kinds.values() for name in getattr(kind, "__annotations__", ()))
        if unknown := sorted(kwargs.keys() - known):
            near = get_close_matches(unknown[0], sorted(known), n=1)
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}"
                + (f": did you mean {near[0]!r}?" if near else ".")
            )

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer puts its first token before a prompt: not where the chat template wrote it."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def apply_chat_template(self, conversation, *args, sanitize_control_tokens: bool | None = None, **kwargs):
        """As the library's, but control tokens come from the template alone: in what messages say, `<|im_end|>` and
        `<image>` are text, with the tokenizers of the `tokenizers` library.

        Args:
            sanitize_control_tokens: False lets messages spell control tokens. None, the default, lets them spell the
                placeholder where they have no part of the type "image" and are not tokenized here: images may be given
                beside the text.

        Returns:
            As the library's. In text, control tokens that messages spell are marked (`MARK`); tokenizer and processor
            drop the marks.
        """
        if sanitize_control_tokens is not False:
            chats = getattr(conversation, "messages", conversation)
            batched = len(chats) > 0 and (isinstance(chats[0], (list, tuple)) or hasattr(chats[0], "messages"))
            keeps_placeholders = sanitize_control_tokens is None and not kwargs.get("tokenize")
            marked = [
                self._mark_control_tokens(getattr(chat, "messages", chat), keeps_placeholders)
                for chat in (chats if batched else [chats])
            ]
            conversation = marked if batched else marked[0]
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _mark_control_tokens(self, messages, keeps_placeholders):
        """The messages with marks in the control tokens that they spell."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens.add(self.image_token)
        messages = [_as_dict(message) for message in messages]
        parts = [_as_dict(part) for message in messages for part in message.get("content") or []]
        parts = [part for part in parts if isinstance(part, dict)]
        if keeps_placeholders and all(part.get("type") == "text" for part in parts):
            tokens.remove(self.image_token)
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        # A text may end where the next part goes on with a token; no word begins one.
        begins = {token[:stop] for token in tokens if not token[0].isalnum() for stop in range(1, len(token))}

        def mark(value):
            value = _as_dict(value)
            if isinstance(value, str):
                text = value.rstrip()
                begun = (start for start in range(-min(len(text), max(map(len, tokens), default=0)), 0))
                start = len(text) + next((start for start in begun if text[start:] in begins), 0)
                value = value[:start] + _marked(text[start:]) + value[len(text) :]
                return pattern.sub(lambda token: _marked(token[0]), value)
            if isinstance(value, (list, tuple)):
                return [mark(one) for one in value]
            if isinstance(value, dict) and value.get("type", "text") == "text":
                return {name: mark(one) for name, one in value.items()}
            return value

        return mark(messages)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the library's. The configuration is read here: to find the tokenizer's class, the library would load it as
        remote code, and ask on a terminal whether to trust it."""
        if "config" not in kwargs and not kwargs.get("trust_remote_code"):
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            # Whether the model's rules are still there, the model says.
            options |= {"selector": "uniform", "region_method": "none"}
            try:
                kwargs["config"] = UHRBatConfig.from_pretrained(pretrained_model_name_or_path, **options)
            except OSError:  # a folder of processor files alone
                pass
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def prepare_inputs_layout(self, images=None, **kwargs):
        """As the library's, but images are left to the image processor, which is told how to read them."""
        _, *rest = super().prepare_inputs_layout(images=None, **kwargs)
        return images, *rest

    def validate_inputs(self, images=None, text=None, **kwargs):
        """The library's error for a call without anything; the counts were checked in `_images_per_prompt`."""
        if images is None and text is None:
            super().validate_inputs(**kwargs)

    def _images_per_prompt(self, images, prompts) -> list[int]:
        """int[B], images of each prompt: from a list per prompt, else from the placeholders of the text."""
        placeholders = [prompt.count(self.image_token) for prompt in prompts]
        num_images = 0 if images is None else len(flatten_images(images))
        nested = isinstance(images, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in images)
        per_prompt = [len(group) for group in images] if nested and len(images) == len(prompts) else placeholders
        if sum(placeholders) != num_images or per_prompt != placeholders:
            raise ValueError(
                f"The total number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"images passed. Found {placeholders} {self.image_token} tokens per prompt and {num_images} images"
                + (f", {per_prompt} per prompt." if nested else ".")
            )
        return per_prompt

    def _process_images(self, images, budgets=None, images_per_prompt=None, dates=None, **kwargs):
        """Adds the exact number of visual tokens per image and scale to what the image processor returns."""
        images, dates = flatten_images(images), None if dates is False else dates
        if dates is not None:
            images, registration = self._register(images, images_per_prompt, dates, kwargs)
        scales = kwargs.get("scales") or self.image_processor.scales
        if images_per_prompt is None:
            images_per_prompt = [1] * len(images)
        kinds = set(map(kind_of, images))
        dynamic = kwargs.get("dynamic_pyramid")
        dynamic = self.image_processor.dynamic_pyramid if dynamic is None else dynamic
        if "dynamic" in kinds or dynamic and not kinds <= set(ENCODED):
            if dates is not None:
                raise ValueError("`dates` are compared scale by scale: leave `dynamic_pyramid` out.")
            return self._process_dynamic(images, budgets, images_per_prompt, kwargs)
        if kinds <= set(ENCODED):
            images = _share_tiles(images, kwargs.get("max_tiles"), images_per_prompt)
            inputs, available = {"image_features": images}, [image.available for image in images]
        else:
            inputs = self.image_processor(images, **kwargs)
            if "image_pyramids" in inputs:
                max_tiles = kwargs.get("max_tiles") or self.image_processor.max_tiles
                images = _share_tiles(inputs["image_pyramids"], max_tiles, images_per_prompt)
                inputs, available = {"image_pyramids": images}, [image.available for image in images]
            else:
                available = self.count_shown(inputs["pixel_attention_mask"], scales)
        if isinstance(budgets, str):
            budgets = self._budgets_within(budgets, available, inputs)
        own_levels = "pixel_values" not in inputs and any(list(image.scales) != list(scales) for image in images)
        if budgets is None:
            budgets = self.default_budgets
            if own_levels and not is_one_budget(budgets):
                budgets = sum(budgets)
        if own_levels and not is_one_budget(budgets):
            raise ValueError(
                f"`budgets` {list(budgets)} are for the scales {list(scales)}, but images have levels of their own "
                "(`native`): give one number for all levels."
            )
        counts = count_tokens(budgets, scales, images_per_prompt, available)
        inputs["token_counts"], inputs["images_per_prompt"] = np.array(counts), np.array(images_per_prompt)
        if dates is not None:
            inputs["registration"] = registration
        return inputs, [self.image_token * sum(count) for count in counts]

    def _register(self, images, images_per_prompt, dates, kwargs) -> tuple[list, list]:
        """The images, opened, and for every prompt the map from its first to its second; what says how they are read is taken
        out of `kwargs`."""
        numbers = [len(images)] if images_per_prompt is None else images_per_prompt
        if dates is not True:
            check_registration(dates, numbers)
            return images, list(dates)
        check_dates(numbers)
        if set(map(kind_of, images)) & set(ENCODED):
            raise ValueError(
                "Encoded images do not say where they lie: pass `dates=[register(earlier, later), ...]`, one for each prompt."
            )
        reading, cutting = part_reading(kwargs)
        for name in kwargs.keys() - cutting.keys():
            del kwargs[name]
        read = partial(self.image_processor.open_image, **reading)
        left, opened, registration = iter(images), [], []
        for number in numbers:
            pair, found = open_dates(read, before=next(left), image=next(left)) if number else ([], [None])
            opened += pair
            registration += found
        return opened, registration

    def _budgets_within(self, limit, available, inputs) -> list[int] | int:
        """The largest budgets that stay below a limit, of one image that is cut or encoded."""
        if self.planner is None:
            raise ValueError(
                f"`budgets={limit!r}` needs the numbers of a model: set `processor.planner = uhr_bat.planner_of(model)` first."
            )
        if len(available) != 1:
            raise ValueError(f"`budgets={limit!r}` is the limit of one image. Got {len(available)} images.")
        if "image_pyramids" in inputs or kind_of(inputs.get("image_features", [None])[0]) == "pyramid":
            raise ValueError(
                f"`budgets={limit!r}` is for images whose tiles are all encoded. With `max_tiles`, ask "
                "`uhr_bat.plan(model, image_size, limit, max_tiles=...)` and pass its `budgets`."
            )
        mask = inputs.get("pixel_attention_mask")
        return self.planner.budgets_within(limit, available[0], None if mask is None else np.asarray(mask)[0])

    def _process_dynamic(self, images, budgets, images_per_prompt, kwargs):
        """Dynamic pyramids, whose visual tokens are counted when the model has looked: the text keeps a placeholder each."""
        if set(map(kind_of, images)) <= set(ENCODED):
            inputs = {"image_features": images}
        else:
            inputs = {**self.image_processor(images, **kwargs)}
        if budgets is not None and not is_one_budget(budgets):
            raise ValueError(
                f"The budget of a dynamic pyramid is one number for all of its levels. Got {list(budgets)}."
            )
        if budgets is not None:
            inputs["budgets"] = np.array(budgets)
        inputs["images_per_prompt"] = np.array(images_per_prompt)
        return inputs, [self.image_token] * len(images)

    def count_shown(self, pixel_attention_mask, scales=None) -> list[list[int]]:
        """int[I][S], tokens of every scale that show the image, from masks [I, N] of all scales."""
        masks, scales = np.asarray(pixel_attention_mask), scales or self.image_processor.scales
        ends = np.cumsum([(scale // self.image_processor.patch_size) ** 2 for scale in scales])[:-1]
        return [[int(mask.sum()) for mask in np.split(row, ends)] for row in masks]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the library's, into any folder but the one that the processor was loaded from (`ValueError`)."""
        refuse_own_folder(self.tokenizer.name_or_path, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, images_per_prompt=None, **kwargs) -> MultiModalData:
        """Visual tokens of images of (height, width) pixels, without reading them.

        The images of one prompt share its budget: each image is taken to be alone in its prompt, unless
        `images_per_prompt` int[B] says otherwise.
        """
        if image_sizes is None:
            return MultiModalData()
        processor, tile_size = self.image_processor, self.image_processor.crop_size["height"]
        if images_per_prompt is None:
            images_per_prompt = [1] * len(image_sizes)
        budgets, max_tiles = kwargs.get("budgets") or self.default_budgets, kwargs.get("max_tiles")
        if max_tiles is None:
            available = [
                [
                    int(shown_patches(tuple(size), grid).sum()) if processor.mask_padding else grid[0] * grid[1]
                    for grid in grids(processor.scales, processor.patch_size)
                ]
                for size in image_sizes
            ]
            num_tiles = [sum((scale // tile_size) ** 2 for scale in processor.scales)] * len(image_sizes)
        else:
            scales, native = processor.scales, kwargs.get("native")
            pyramids = [
                ImagePyramid(
                    UnreadImage(*size), None if native else scales, anchor=scales[0], tile_size=tile_size,
                    patch_size=processor.patch_size, mask_padding=processor.mask_padding, max_tiles=max_tiles,
                )
                for size in image_sizes
            ]  # fmt: skip
            pyramids = _share_tiles(pyramids, max_tiles, images_per_prompt)
            available, num_tiles = zip(*((one.available, sum(one.num_chosen)) for one in pyramids))
            budgets = sum(budgets) if native and not is_one_budget(budgets) else budgets
        counts = count_tokens(budgets, processor.scales, images_per_prompt, available)
        return MultiModalData(num_image_tokens=[sum(count) for count in counts], num_image_patches=list(num_tiles))

    @property
    def model_input_names(self):
        return [*super().model_input_names, "token_counts", "images_per_prompt"]


def _as_dict(value):
    """A message, or a part of one, as a dictionary where it is an object; anything else as it is."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value


def _marked(text: str) -> str:
    return "".join(letter + MARK for letter in text)


def _drop_marks(tokenizer):
    """Has the tokenizer drop `MARK`, if it does not yet and is one that can."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (backend.normalizer is not None and not backend.normalizer.normalize_str(MARK)):
        return
    if any(token.normalized and token.special for token in tokenizer.added_tokens_decoder.values()):
        # Such tokens are found in what the normalizer made: marks have to stay until then.
        kept = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        if not kept or kept[0].pre_tokenize_str(MARK):
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(MARK, "removed"), *kept])
        return
    kept = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Replace(MARK, ""), *kept])


def _share_tiles(images, max_tiles, images_per_prompt):
    """Pyramids, or what they were encoded to, each with its share of the tiles of its prompt; images that are encoded whole
    as they are."""
    if max_tiles is None:
        return images
    numbers = [number for number in images_per_prompt if number]
    shares = [share for number in numbers for share in equal_shares(max_tiles, number)]
    try:
        return [
            image.with_max_tiles(share) if image.kind == "pyramid" else image for image, share in zip(images, shares)
        ]
    except ValueError as error:
        if max(numbers) == 1:
            raise
        raise ValueError(
            f"{error} The {max_tiles} tiles of a prompt are shared by its {max(numbers)} images."
        ) from None


__all__ = ["UHRBatProcessor"]
