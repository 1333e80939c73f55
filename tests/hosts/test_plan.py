"""Plans of models of other families: what they say is what torch's counter counts while the model answers."""

import json
import pickle

import pytest
import torch
import transformers
from hosts_tiny import FAMILIES, config_of, tokenizer_of
from images import random_image
from uhr_bat import plan, planner_of
from uhr_bat.benchmarks.meters import FlopMeter
from uhr_bat.common import asking
from uhr_bat.planning import __main__ as command
from uhr_bat.planning.counting import Shapes

LIGHT = ("gemma3", "qwen3_vl", "qwen3_5", "smolvlm")
SIZE = (200, 200)


def counted(processor, model, **options):
    """([FLOPs from the tiles to the selection, FLOPs of the answer], what a plan is told of the prompt)."""
    text = asking.prompt_text(processor, "How many ships are at the pier?")
    inputs = processor(text=text, images=random_image(*SIZE), return_tensors="pt", **options)
    meters = FlopMeter(), FlopMeter()
    with meters[0], torch.no_grad():
        compressed = model.compress(**inputs)
    with meters[1], torch.no_grad():
        prompt = {name: inputs[name] for name in asking.PROMPT}
        asking.generate(model, prompt, compressed, max_new_tokens=5, min_new_tokens=5)
    shown = (inputs["input_ids"][0] == model.image_token_id).nonzero()[:, 0]
    after = inputs["input_ids"].shape[1] - 1 - int(shown[-1])
    told = {"text_before": int(shown[0]), "text_after": after, "num_answer_tokens": 5}
    return [meter.get_total_flops() for meter in meters], told


@pytest.mark.parametrize(
    "name", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_flops_are_those_of_torchs_counter(name, loaded):
    processor, model = loaded(name)
    (seen, answered), told = counted(processor, model, budgets=90, max_tiles=7)
    flops = plan(model, SIZE, 90, max_tiles=7, **told).flops
    assert flops["prefill"] + flops["answer"] == answered
    # The k-means ends early where nothing changes any more.
    assert 0 <= sum(flops.values()) - seen - answered <= flops["regions"]
