"""Plans of models of other families: what they say is what counters count while the model answers."""

import copy
import re

import pytest
import torch
import transformers
from hosts_tiny import FAMILIES, tokenizer_of
from images import random_image
from uhr_bat import plan, planner_of
from uhr_bat.benchmarks.meters import FlopMeter
from uhr_bat.common import asking
from uhr_bat.planning import __main__ as command
from uhr_bat.planning.counting import Shapes

LIGHT = ("qwen3_vl", "qwen3_5", "smolvlm")
FAMILY = [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
SIZE = (200, 200)


def compressed(processor, model, **options):
    """(ids and mask of a prompt, what it keeps, what a plan is told of it)."""
    text = asking.prompt_text(processor, "How many ships are at the pier?")
    inputs = processor(text=text, images=random_image(*SIZE), return_tensors="pt", **options)
    with torch.no_grad():
        kept = model.compress(**inputs)
    ids = inputs["input_ids"][0]
    shown = (ids == model.image_token_id).nonzero()[:, 0]
    told = {"text_before": int(shown[0]), "text_after": len(ids) - 1 - int(shown[-1]), "num_answer_tokens": 5}
    return {name: inputs[name] for name in asking.PROMPT}, kept, told


@pytest.mark.parametrize("name", FAMILY)
def test_flops_are_those_that_torchs_counter_counts(name, loaded):
    processor, model = loaded(name)
    with FlopMeter() as before:
        prompt, kept, told = compressed(processor, model, budgets=90, max_tiles=7)
    with FlopMeter() as meter:
        asking.generate(model, prompt, kept, max_new_tokens=5, min_new_tokens=5)
    flops = plan(model, SIZE, 90, max_tiles=7, **told).flops
    assert flops["prefill"] + flops["answer"] == meter.get_total_flops()
    # The k-means ends early where nothing changes any more.
    over = flops["encode"] + flops["importance"] + flops["refinement"] + flops["regions"] - before.get_total_flops()
    assert 0 <= over <= flops["regions"]


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_memory_is_that_of_the_tensors_that_are_alive(name, loaded):
    processor, model = loaded(name)
    prompt, kept, told = compressed(processor, model, budgets=100, max_tiles=7)
    with Shapes() as shapes, torch.no_grad():
        model.host(**prompt, **model.visual_inputs(*prompt.values(), kept), use_cache=False, logits_to_keep=1)
    memory = plan(model, SIZE, 100, max_tiles=7, **told).memory
    assert memory["prefill"]["prefill"] + memory["selection"]["visual tokens"] == pytest.approx(shapes.peak, rel=0.15)
    assert memory["prefill"]["weights"] == sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    width = model.config.text_config.num_key_value_heads * model.config.text_config.head_dim
    layers = model.config.text_config.num_hidden_layers
    assert memory["prefill"]["KV cache"] == 2 * 4 * layers * width * prompt["input_ids"].shape[1]


def folder_of(path, name, config, image_processor):
    """A model folder without weights."""
    config.dtype = "bfloat16"
    config.quantization_config = {"quant_method": "fp8"}  # as of weights that a plan does not read
    config.save_pretrained(path)
    tokenizer_of(FAMILIES[name]).save_pretrained(path)
    image_processor.save_pretrained(path)
    return path


ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN3_VL_8B = {
    "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": ROPE},
    "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
    "image_token_id": 300,
}  # fmt: skip
GEMMA_3_27B = {
    "text_config": {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
                    "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "vocab_size": 262208},
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                      "image_size": 896, "patch_size": 14, "model_type": "siglip_vision_model", "vision_use_head": False},
    "mm_tokens_per_image": 256, "image_token_index": 300,
}  # fmt: skip


def test_a_model_of_real_size_is_planned_by_its_configuration_alone(tmp_path, capsys, monkeypatch):
    config, images = transformers.Qwen3VLConfig(**QWEN3_VL_8B), transformers.Qwen2VLImageProcessorPil(patch_size=16)
    folder = folder_of(tmp_path / "qwen3-vl-8b", "qwen3_vl", config, images)
    planner = copy.deepcopy(command.planner_of_folder(folder, "cuda"))
    monkeypatch.setattr(command, "planner_of_folder", lambda *args: planner)

    def printed(size, *limit):
        code = command.main(["--model", str(folder), "--image-size", size, "--device", "cuda", *limit])
        return code, "".join(capsys.readouterr())

    code, text = printed("8500x8500", "--memory", "20GiB")
    assert code == 0 and "qwen3-vl-8b, 8,500 x 8,500 px, bfloat16 on cuda" in text and "32 tiles pass the tower" in text
    assert "weights 16.33 GiB" in text and "Seconds are not predicted for models of other families" in text
    assert "Weights are counted as if they were not quantised." in text
    code, text = printed("8500x8500", "--memory", "4GiB")
    assert code == 2 and "of which weights 16.33 GiB" in text and "weights in 4 bits, about" in text
    code, text = printed("40000x40000")
    assert code == 2 and "over the limit of" in text

    # A limit is used to the last token.
    most = planner.plan((8500, 8500), "18GiB")
    assert most.peak_bytes <= 18 * 2**30 < planner.plan((8500, 8500), most.budgets + 1).peak_bytes
    # A decoder's linear layers, and keys and values of 36 layers in bfloat16.
    least, more = (planner.plan((8500, 8500), number) for number in (1000, 1001))
    per_token = 2 * 36 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288)
    assert per_token < more.flops["prefill"] - least.flops["prefill"] < 1.1 * per_token
    assert more.memory["prefill"]["KV cache"] - least.memory["prefill"]["KV cache"] == 2 * 2 * 36 * 8 * 128


@pytest.mark.slow
def test_sliding_layers_cache_no_more_than_their_window(tmp_path):
    images = transformers.Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    folder = folder_of(tmp_path / "gemma-3-27b", "gemma3", transformers.Gemma3Config(**GEMMA_3_27B), images)
    planner = command.planner_of_folder(folder, "cuda")
    caches = [planner.plan((8500, 8500), number).memory["prefill"]["KV cache"] for number in (500, 600, 2000, 2100)]
    kinds = transformers.Gemma3Config(**GEMMA_3_27B).text_config.layer_types
    assert caches[1] - caches[0] == 100 * 62 * 2 * 2 * 16 * 128
    assert caches[3] - caches[2] == 100 * kinds.count("full_attention") * 2 * 2 * 16 * 128


def test_a_loaded_model_answers_as_before_after_it_was_planned(loaded):
    processor, model = loaded("smolvlm")
    prompt, kept, told = compressed(processor, model, budgets=50, max_tiles=7)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3}
    before = asking.generate(model, prompt, kept, **settings)
    planner = planner_of(model)
    assert torch.equal(asking.generate(model, prompt, kept, **settings), before)
    assert planner.is_loaded and planner.plan(SIZE, "24GiB").budgets > 50
    with pytest.raises(ValueError, match="Seconds are not predicted for models of other families.*Got 5s"):
        planner.plan(SIZE, "5s")
    with pytest.raises(ValueError, match=re.escape("stay below 1KiB")):
        planner.plan(SIZE, "1KiB")
