# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT compression of a batch: which image belongs to which question, what each may spend, and each compressed by what
its question looks at (section 3.4).

Axes: I images, S scales, B prompts, M text tokens, D decoder width.
"""

from itertools import groupby

import torch
from transformers.processing_utils import Unpack
from transformers.utils import logging

from .budgets_uhr_bat import settle_counts
from .image_registration_uhr_bat import check_registration
from .modeling_outputs_uhr_bat import TokenMaps, UHRBatCompressionOutput, UHRBatImageInputs, accept_region_labels
from .token_dates_uhr_bat import beside, difference, weigh_dates
from .token_rules_uhr_bat import CompressedImage, CompressionRules, compress_image, tell_idle_share

logger = logging.get_logger(__name__)


class UHRBatCompressionMixin:
    """For a [`VisionLanguageModel`] with `encode_image` and `look_closer`. Prompts that come as embeddings alone need its
    `get_input_embeddings()`, too."""

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
            rules: other values for fields of [`CompressionRules`], for this call; `selector` may be a function.
            images: see [`UHRBatImageInputs`].

        Raises:
            ValueError: counts of images, placeholders and budgets that do not fit each other.
        """
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"`attention_mask` must be [batch, sequence] here. Got {list(attention_mask.shape)}.")
        if answer_mask is None and self.training and torch.is_grad_enabled():
            logger.warning_once(
                "Training without `labels` and without `answer_mask`: answers in the text are seen by the selection of the "
                "visual tokens. Pass `answer_mask`, bool[B, M], True where a token is part of an answer."
            )
        counts = images.get("token_counts")
        tell_idle_share(self.config, images.get("budgets") if counts is None else counts, rules)
        rules = CompressionRules.of(self.config, rules)
        image_features = images.get("image_features")
        if image_features is None:
            encoded = ("pixel_values", "pixel_attention_mask", "regions", "image_pyramids")
            image_features = self.encode_image(**{name: images.get(name) for name in encoded})

        visible = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        if attention_mask is not None:
            visible = attention_mask[:, -prompt.shape[1] :].to(visible.device).bool()
        placeholder = self.find_placeholders(input_ids, inputs_embeds) & visible
        images_per_prompt, token_counts = self.settle_counts(placeholder, image_features, images)

        of_images, compressed, differences = iter(zip(image_features, token_counts)), [], None
        registration = images.get("registration")
        if registration is not None:
            registration = [one.tolist() if isinstance(one, torch.Tensor) else one for one in registration]
            check_registration(registration, images_per_prompt)
            if any(image.kind == "dynamic" for image in image_features):
                raise ValueError(
                    "Two dates are compared scale by scale, which a dynamic pyramid has not: leave `dynamic_pyramid` out."
                )
            differences = []
        for row, num_images in enumerate(images_per_prompt):
            text = visible[row] & ~placeholder[row]
            spots = placeholder[row].nonzero()[:, 0]
            group = [next(of_images) for _ in range(num_images)]
            # A prompt that is not expanded yet holds one placeholder per image.
            sizes = [1] * num_images if len(spots) == num_images else [sum(counts) for _, counts in group]
            asked = []
            for (image, counts), run in zip(group, spots.split(sizes)):
                seen = _seen(text, spots, run, None if answer_mask is None else answer_mask[row])
                with torch.no_grad():
                    ids, embeds = (None if one is None else one[row][seen] for one in (input_ids, inputs_embeds))
                asked.append((ids, embeds, image, counts))
            looked, found = [None] * num_images, [None] * num_images
            if registration is not None and num_images and registration[row] is not False:
                looked, found = self.look_at_dates(asked, registration[row], rules)
            if differences is not None:
                differences += found
            compressed += [self.compress_one(*one, rules, looked=seen) for one, seen in zip(asked, looked)]

        tokens, importance, regions, slots = map(list, zip(*compressed)) if compressed else ([], [], [], [])
        visual_tokens = [torch.cat(scales) for scales in tokens]
        scales = [list(image.scales) for image in image_features]
        regions = None if None in regions else regions  # a region focus module has none
        return UHRBatCompressionOutput(
            visual_tokens, tokens, importance, regions, slots, images_per_prompt, scales, differences
        )

    def look(self, input_ids, inputs_embeds, image, rules) -> tuple:
        """What one image of one prompt has to choose from, and the importance of each; the arguments are those of
        `compress_one`, what is returned that of `look_closer`."""
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            importance = self.read_attention(input_ids, image.anchor_tokens, [image.anchor_places], inputs_embeds)
            return self.look_closer(input_ids, image, importance, rules, inputs_embeds, grad=grad)

    def look_at_dates(self, asked, registration, rules) -> tuple[list, list[TokenMaps]]:
        """`look` at both images of a prompt, which show one place, each weighed by how much it differs from the other
        (`token_dates_uhr_bat.py`).

        Args:
            asked: for each the first four arguments of `compress_one`.
            registration: float[2, 3], from the first image to the second, see `register`.

        Returns:
            (for each what `look` returns, for each the differences of its tokens).
        """
        looked = [self.look(ids, embeds, image, rules) for ids, embeds, image, _ in asked]
        return self.weigh_looked(looked, registration)

    @torch.no_grad()
    def weigh_looked(self, looked, registration) -> tuple[list, list[TokenMaps]]:
        """The second half of `look_at_dates`; `looked`: for each date what `look` returns."""
        (earlier, _), (later, _) = looked
        differences, weighed = self.differences_of(earlier, later, registration), [(earlier, []), (later, [])]
        for date, idx, at, places, others in beside((earlier, later), registration):
            own, other_maps = looked[date][1][idx], looked[1 - date][1]
            weighed[date][1].append(weigh_dates(own, differences[date][idx], places, other_maps[at], *others))
        images = zip(differences, (earlier, later))
        return weighed, [TokenMaps(of_scales, image.positions, image.grids, fill=0) for of_scales, image in images]

    @torch.no_grad()
    def differences_of(self, earlier, later, registration) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """float32[V_s] of every scale of either date, see `difference`. No question has a part in them: the later image keeps them,
        among its `partitions`, until it is compared with another one."""
        kept = later.partitions.get("dates")
        if kept is not None and kept[0] is earlier.tokens and kept[1] == registration:
            return kept[2]
        images = earlier, later
        plain = [[self.without_scale(image, idx) for idx in range(len(image.grids))] for image in images]
        found = ([], [])
        for date, idx, at, places, others in beside(images, registration):
            found[date].append(difference(plain[date][idx], places, plain[1 - date][at], *others))
        later.partitions["dates"] = earlier.tokens, registration, found
        return found

    def compress_one(self, input_ids, inputs_embeds, image, counts, rules, *, looked=None) -> CompressedImage:
        """One image of one prompt.

        Args:
            input_ids, inputs_embeds: long[M], float[M, D] or None: what the image is weighed by, its own placeholders and
                the text, without padding, other images and answers.
            image: an encoded image.
            counts: int[S], visual tokens of every scale, or int[1], of all of them.
            rules: [`CompressionRules`].
            looked: what `look` returned for it, if it was called.
        """
        image, importance = self.look(input_ids, inputs_embeds, image, rules) if looked is None else looked
        return compress_image(image, importance, counts, self, rules)

    def find_placeholders(self, input_ids, inputs_embeds=None) -> torch.Tensor:
        """bool[..., M]: image tokens, from ids or, where there are none, from the embeddings."""
        if input_ids is not None:
            return (input_ids == self.image_token_id).to((input_ids if inputs_embeds is None else inputs_embeds).device)
        image_id = torch.full((), self.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    def settle_counts(self, placeholder, image_features, images) -> tuple[list[int], list[list[int]]]:
        """`images_per_prompt` and `token_counts` of a batch as lists (see `settle_counts`)."""
        names = ("budgets", "token_counts", "images_per_prompt")
        budgets, token_counts, images_per_prompt = (
            value.tolist() if isinstance(value, torch.Tensor) else value for value in map(images.get, names)
        )
        if isinstance(budgets, list) and budgets and isinstance(budgets[0], list):  # the old name of the counts
            budgets, token_counts = None, budgets
        runs = [[len(list(run)) for is_image, run in groupby(row) if is_image] for row in placeholder.tolist()]
        limits = self.config.scales, self.config.budgets, [image.available for image in image_features]
        return settle_counts(budgets, token_counts, images_per_prompt, runs, *limits)


def _seen(text, spots, run, answer_mask) -> torch.Tensor:
    """bool[M]: what an image's importance is estimated on: its prompt `text` bool[M] and its own places `run`, of all `spots`
    of images, without the other images, and up to the first answer after it."""
    seen = text.index_fill(0, run, True)
    if answer_mask is not None:
        answered = answer_mask.to(text.device).index_fill(0, spots, False)
        answered[: run[-1] + 1] = False
        seen = seen & (answered.cumsum(0) == 0)
    return seen
