"""The two sides of every comparison: how a question runs through either of them, the models, and processes.

"Ours" is the model of this repository, called as a user would call it, but one stage at a time; "straightforward" is
[`benchmarks.straightforward`], with the same weights. What a stage takes is read from a meter when it ends: a clock, a
counter of FLOPs, a counter of synchronisations.
"""

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context

import torch
from transformers.generation import BaseStreamer
from transformers.utils import logging

from ..common import asking
from ..common.loading import ROOT
from ..configuration_uhr_bat import UHRBatConfig
from ..image_processing_uhr_bat import UHRBatImageProcessor
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ..modeling_uhr_bat import UHRBatForConditionalGeneration
from ..planning.costs import ANSWER_TOKENS, TEXT_AFTER, TEXT_BEFORE
from ..token_rules_uhr_bat import CompressionRules, compress_image, partition
from .straightforward import Straightforward

STAGES = ("read", "preprocess", "encode", "importance", "regions", "selection", "prefill", "answer")


# Models


def scaled_config() -> UHRBatConfig:
    """The paper's tiles, tokens and budgets (228, 131,328 and 3000), with towers of 4 layers that are 256 wide."""
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 256}
    # The vocabulary of Qwen2-7B by the width: 152,064 * 256 / 3584 = 10,862.
    return UHRBatConfig(vision_config=vision, **_decoder(256, vocab_size=10_862))


def quick_config() -> UHRBatConfig:
    """The paper's 228 tiles, 2 x 2 patches each, with towers that a test can run."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    return UHRBatConfig(
        vision_config=vision,
        **_decoder(32, vocab_size=256),
        scales=[56, 112, 224, 336],
        budgets=[8, 16, 32, 96],
        num_regions=12,
        kmeans_iterations=2,
        scale_embedding_grid=4,
    )


def _decoder(width, vocab_size) -> dict:
    """A decoder of 4 layers whose random weights spread the attention, so that questions choose different tokens."""
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": vocab_size, "initializer_range": 1.5 / width**0.5}
    text |= {"eos_token_id": None}  # every answer is as long as it may be
    return {"text_config": text, "image_token_index": vocab_size - 1, "initializer_range": 1.5 / width**0.5}


CONFIGS = {"scaled": scaled_config, "quick": quick_config}


def build_model(config: UHRBatConfig, seed: int = 0) -> UHRBatForConditionalGeneration:
    """Random seeded weights."""
    torch.manual_seed(seed)
    return UHRBatForConditionalGeneration(config).eval()


def model_on(device, quick):
    """Random weights of the 7B geometry in bfloat16, or of the quick one in float32, with answers of full length."""
    config = quick_config() if quick else UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    config.text_config.eos_token_id = None
    torch.set_default_dtype(torch.float32 if quick else torch.bfloat16)
    try:
        with device:
            return build_model(config)
    finally:
        torch.set_default_dtype(torch.float32)


def prompt_ids(config: UHRBatConfig, seed: int = 0) -> torch.Tensor:
    """long[1, M]: random text with one placeholder for the image."""
    text = torch.randint(config.image_token_id, (TEXT_BEFORE + TEXT_AFTER,), generator=torch.manual_seed(seed))
    return torch.cat((text[:TEXT_BEFORE], torch.tensor([config.image_token_id]), text[TEXT_BEFORE:]))[None]


# One question


class Meter:
    """What `read()` grew by in every stage; call it with the name of the stage that has just ended."""

    def __init__(self, read):
        self.read, self.stages = read, dict.fromkeys(STAGES, 0)
        self.last = read()

    def __call__(self, stage):
        now = self.read()
        self.stages[stage] += now - self.last
        self.last = now


class _Marks(BaseStreamer):
    """A streamer that tells a meter when `generate` has read the prompt, and when it is done."""

    def __init__(self, mark):
        self.mark, self.num_puts = mark, 0

    def put(self, ids):
        self.num_puts += 1
        if self.num_puts == 2:  # the first call brings the prompt
            self.mark("prefill")

    def end(self):
        self.mark("answer")


def image_processor(config: UHRBatConfig) -> UHRBatImageProcessor:
    """Ours, of a model's geometry; it reads every pixel, so that both sides see the same."""
    tile = {"height": config.tile_size, "width": config.tile_size}
    return UHRBatImageProcessor(
        crop_size=tile,
        scales=config.scales,
        patch_size=config.patch_size,
        mask_padding=config.mask_padding,
        overviews="off",
    )


class Ours:
    """The stages of one question about one image."""

    def __init__(self, model):
        self.model, self.processor = model, image_processor(model.config)

    def read(self, path):
        return self.processor.process_image(path)

    def preprocess(self, image):
        return self.processor(image, return_tensors="pt")

    def encode(self, inputs):
        return asking.encode(self.model, inputs)[0]

    def importance(self, features, input_ids) -> torch.Tensor:
        return self.model.estimate_importance(input_ids[0], features.anchor_tokens)

    def regions(self, features) -> list[torch.Tensor]:
        """long[V] for every scale; clustered once per image, where they stay."""
        rules, counts = CompressionRules.of(self.model.config), enumerate(self._counts(features))
        return [partition(features, scale_idx, count, self.model, rules) for scale_idx, count in counts]

    def select(self, features, importance, regions) -> list[torch.Tensor]:
        """float[n, D] for every scale. `regions` are with the image already."""
        rules = CompressionRules.of(self.model.config)
        of_scales = self.model.model.refine_importance(None, features, importance, rules)
        return compress_image(features, of_scales, self._counts(features), self.model, rules).tokens

    def _counts(self, features) -> list[int]:
        return [min(pair) for pair in zip(self.model.config.budgets, features.available)]

    def answer(self, input_ids, visual_tokens, num_tokens, mark) -> list[int]:
        """Greedy ids; `mark` is told the end of the prefill and that of the answer."""
        visual_tokens = torch.cat(visual_tokens)
        ids = asking.expand_placeholder(input_ids[0], self.model.config.image_token_id, len(visual_tokens))[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        compressed = UHRBatCompressionOutput(pooler_output=[visual_tokens], images_per_prompt=[1])
        options = {"max_new_tokens": num_tokens, "streamer": _Marks(mark)}
        return asking.generate(self.model, inputs, compressed, **options)[0].tolist()


SIDES = {"ours": Ours, "straightforward": Straightforward}


@torch.no_grad()
def ask(side, path, input_ids, mark, num_tokens=ANSWER_TOKENS, partition=None) -> dict:
    """One question about one image file.

    Args:
        side: one of `SIDES`.
        input_ids: long[1, M], with one placeholder.
        mark: told the name of every stage when it ends, a [`Meter`].
        num_tokens: tokens of the answer.
        partition: long[V] for every scale, regions to select by in place of the side's own. They are clustered all the
            same. k-means makes a rounding error grow from iteration to iteration, so two implementations part at the
            border of two regions, and what follows can only be compared on one partition.

    Returns:
        {"regions": the side's own, "visual_tokens": [float[n, D]] of every scale, "answer": ids}
    """
    image = side.read(path)
    mark("read")
    inputs = side.preprocess(image)
    del image
    mark("preprocess")
    features = side.encode(inputs)
    del inputs
    mark("encode")
    importance = side.importance(features, input_ids)
    mark("importance")
    regions = side.regions(features)
    mark("regions")
    visual_tokens = side.select(features, importance, partition or regions)
    mark("selection")
    answer = side.answer(input_ids, visual_tokens, num_tokens, mark)
    return {"regions": regions, "visual_tokens": visual_tokens, "answer": answer}


# Processes


@cache
def side_of(name: str, geometry: str):
    """A side with its model, once per process."""
    return SIDES[name](build_model(CONFIGS[geometry]()))


def one_thread():
    """One thread, no progress bars of the library: what every process of a measurement starts with. Threads that wait
    for each other on a busy machine spin, and then the measure is of that."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def one_process() -> ProcessPoolExecutor:
    """A process that works when it is asked to; its memory is its own, and a side in it is built once."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=one_thread)


@contextmanager
def process_pair():
    """{side: executor of one process}: each side's memory is its own, and they run when they are asked to."""
    with one_process() as ours, one_process() as straightforward_side:
        yield {"ours": ours, "straightforward": straightforward_side}
