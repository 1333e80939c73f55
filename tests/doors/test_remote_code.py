"""Every door of the distribution, as users open it: Auto classes on a copy of the root's files, and no network.

Runs on every supported release of transformers.
"""

import dataclasses
import importlib
import json
import os
import socket

import pytest
import torch
import transformers
from asking import (
    GENERATION,
    PROMPT,
    answer,
    assert_all_differ,
    chat,
    data_uri,
    first_scores,
    load,
    needs_auto_image_processor,
    picture,
    tokenize,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from uhr_bat.configuration_uhr_bat import UHRBatConfig


MODEL_DOORS = [
    (AutoModelForCausalLM, "UHRBatForConditionalGeneration"),
    (AutoModelForImageTextToText, "UHRBatForConditionalGeneration"),
    (AutoModelForMultimodalLM, "UHRBatForConditionalGeneration"),
    (AutoModel, "UHRBatModel"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"The network was asked for {args[1:]}.")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model(model_folder):
    return load(AutoModelForImageTextToText, model_folder)


@pytest.fixture(scope="module")
def processor(model_folder):
    return AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def files(model_folder):
    """The JSON files of the distribution by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in model_folder.glob("*.json")}


def assert_same_inputs(inputs, others):
    assert inputs.keys() == others.keys()
    for name, value in inputs.items():
        assert torch.equal(value, others[name]), name


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_every_key_of_the_configuration_file_is_a_field(files):
    fields = {field.name for field in dataclasses.fields(UHRBatConfig)}
    assert files["config"].keys() - fields == {"auto_map", "model_type"}


def test_every_class_of_the_auto_maps_is_in_the_file_that_it_names(files):
    for name in ("config", "preprocessor_config", "processor_config"):
        for door, reference in files[name]["auto_map"].items():
            module, cls = reference.split(".")
            assert hasattr(transformers, door)
            assert hasattr(importlib.import_module(f"uhr_bat.{module}"), cls)
    doors = {"AutoConfig", *(auto_class.__name__ for auto_class, _ in MODEL_DOORS)}
    assert files["config"]["auto_map"].keys() == doors


def test_scales_budgets_tile_and_patch_are_the_same_in_every_file(files):
    config, image, processor = files["config"], files["preprocessor_config"], files["processor_config"]
    tile = config["vision_config"]["image_size"]
    assert image["scales"] == config["scales"]
    assert image["patch_size"] == config["vision_config"]["patch_size"]
    assert image["crop_size"] == {"height": tile, "width": tile}
    assert image["size"] == {"shortest_edge": tile}
    assert processor["default_budgets"] == config["budgets"]
    assert "image_processor" not in processor
    assert image["mask_padding"] == config["mask_padding"]


def test_token_ids_and_the_context_window_are_the_same_in_every_file(model, processor):
    config, tokenizer, generation = model.config, processor.tokenizer, model.generation_config
    assert processor.image_token_id == config.image_token_id == config.image_token_index
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert tokenizer.model_max_length == config.text_config.max_position_embeddings
    assert len(tokenizer) <= config.text_config.vocab_size
    assert tokenizer.eos_token_id in generation.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"


def test_answers_are_greedy_unless_asked_for_otherwise(model, files):
    assert model.generation_config.do_sample is False
    for name, value in files["generation_config"].items():
        assert getattr(model.generation_config, name) == value, name


# ---- Doors ----------------------------------------------------------------------------------------------------------


def test_config_door(model_folder, files):
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=True)
    assert type(config).__name__ == "UHRBatConfig"
    assert config.model_type == "uhr_bat"
    assert config.scales == files["config"]["scales"]
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.get_text_config().model_type == "qwen2"


@pytest.mark.parametrize(("auto_class", "name"), MODEL_DOORS, ids=[door.__name__ for door, _ in MODEL_DOORS])
def test_model_door(model_folder, auto_class, name):
    model = load(auto_class, model_folder)
    assert type(model).__name__ == name
    assert type(model.config).__name__ == "UHRBatConfig"
    assert not model.training and model.dtype == torch.float32

    def sums(tensors):  # names of the vision tower's parameters differ between releases
        return sorted((tuple(tensor.shape), tensor.double().sum().item()) for tensor in tensors)

    weights = load_file(model_folder / "model.safetensors")
    if name == "UHRBatModel":
        weights = {name: weight for name, weight in weights.items() if name.startswith("model.")}
    assert sums(model.parameters()) == sums(weights.values())


def test_a_model_is_made_from_a_configuration(model_folder):
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "UHRBatForConditionalGeneration"


def test_processor_door(processor):
    assert type(processor).__name__ == "UHRBatProcessor"
    assert type(processor.image_processor).__name__ == "UHRBatImageProcessor"


@needs_auto_image_processor
def test_image_processor_door(model_folder, processor):
    image_processor = AutoImageProcessor.from_pretrained(model_folder, trust_remote_code=True)
    assert type(image_processor).__name__ == "UHRBatImageProcessor"
    assert image_processor.to_dict() == processor.image_processor.to_dict()


@needs_auto_image_processor
def test_image_processor_door_without_trust_is_clips_at_the_tile_size(model_folder, files):
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    assert type(image_processor).__name__.startswith("CLIPImageProcessor")
    tile = files["config"]["vision_config"]["image_size"]
    assert image_processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, tile, tile)


@pytest.mark.parametrize("trust", [{"trust_remote_code": True}, {}], ids=["trusted", "not trusted"])
def test_tokenizer_door(model_folder, processor, monkeypatch, trust):
    with open(os.devnull, encoding="utf-8") as nobody:  # at a terminal the library would ask, and wait
        monkeypatch.setattr("sys.stdin", nobody)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, **trust)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    text = PROMPT.format("How many ships?")
    assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM, AutoProcessor])
def test_code_runs_only_where_it_is_trusted(model_folder, auto_class):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto_class.from_pretrained(model_folder, trust_remote_code=False)


def test_the_helpers_of_the_model_card_are_in_the_models_module(model):
    module = importlib.import_module(type(model).__module__)
    helpers = ["tokenizer_image_token", "split_image_to_multiscale_tiles", "load_multiscale_tile_masks"]
    for name in [*helpers, "KeywordsStoppingCriteria"]:
        assert callable(getattr(module, name))


# ---- Clients --------------------------------------------------------------------------------------------------------


def test_an_evaluators_client_gets_an_answer(model, processor):
    prompt = PROMPT.format("How many ships are there?")
    inputs = processor(text=[prompt], images=[[picture()]], return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, **GENERATION)
    (text,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str) and text.strip()


def test_the_image_and_the_question_change_what_is_said(model, processor):
    chats = [chat(picture(seed), question=question) for seed in (0, 1) for question in ("How many ships?", "Describe.")]
    assert_all_differ([first_scores(model, tokenize(processor, messages)) for messages in chats])


@pytest.mark.parametrize("form", ["path", "path as url", "file url", "data uri", "base64", "PIL"])
def test_a_chat_takes_an_image_in_any_form(processor, tmp_path, form):
    path = tmp_path / "scene.png"
    picture().save(path)
    part = {
        "path": {"path": str(path)},
        "path as url": {"url": str(path)},
        "file url": {"url": path.as_uri()},
        "data uri": {"url": data_uri(picture())},
        "base64": {"base64": data_uri(picture()).partition(",")[2]},
        "PIL": {"image": picture()},
    }[form]
    messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "How many?"}]}]
    expected = processor(
        text=[processor.apply_chat_template(messages, add_generation_prompt=True)],
        images=[[picture()]],
        return_tensors="pt",
    )
    assert_same_inputs(tokenize(processor, messages), expected)


def test_a_chat_with_two_images_shares_the_budget_and_answers(model, processor):
    inputs = tokenize(processor, chat(picture(0), picture(1), question="Which shows more ships?"))
    assert len(inputs["pixel_values"]) == len(inputs["token_counts"]) == 2
    assert inputs["token_counts"].sum(0).tolist() == model.config.budgets
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(model.config.budgets)
    assert answer(model, inputs).shape == (1, 6)
    swapped = tokenize(processor, chat(picture(1), picture(0), question="Which shows more ships?"))
    assert_all_differ([first_scores(model, inputs), first_scores(model, swapped)])


def test_a_chat_of_several_turns_keeps_its_image_and_its_text(model, processor):
    messages = [
        *chat(picture(), question="How many ships are there?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": "And how many planes?"}]},
    ]
    inputs = tokenize(processor, messages)
    assert len(inputs["pixel_values"]) == 1
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(model.config.budgets)
    text = processor.decode(inputs["input_ids"][0]).replace("<image>", "")
    assert text.index("How many ships") < text.index("Three.") < text.index("And how many planes?")
    assert answer(model, inputs).shape == (1, 6)


def test_a_chat_without_an_image_answers(model, processor):
    inputs = tokenize(processor, chat(question="Hello"))
    assert "pixel_values" not in inputs
    assert answer(model, inputs).shape == (1, 6)


# ---- Ways of loading ------------------------------------------------------------------------------------------------


def test_half_precision_loads_and_answers(model_folder, processor):
    model = load(AutoModelForImageTextToText, model_folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert answer(model, tokenize(processor, chat(picture()))).shape == (1, 6)


@pytest.mark.parametrize("settings", [{"device_map": "auto"}, {"dtype": "auto"}])
def test_ways_of_loading_do_not_change_the_answer(model_folder, model, processor, settings):
    inputs = tokenize(processor, chat(picture()))
    other = load(AutoModelForImageTextToText, model_folder, **settings)
    assert torch.equal(answer(other, inputs), answer(model, inputs))


def test_any_attention_implementation_finds_the_same_importance(model_folder, model, processor):
    eager = load(AutoModelForImageTextToText, model_folder, attn_implementation="eager")
    inputs = tokenize(processor, chat(picture()))
    with torch.no_grad():
        (expected,), (found,) = model.compress(**inputs).importance, eager.compress(**inputs).importance
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # refined importance is 1 on average


def test_modules_that_are_offloaded_to_disk_give_the_same_logits(model_folder, model, processor, tmp_path):
    on_disk = ["vision_tower", "multi_modal_projector", "scale_embedding", "pointer", "language_model.layers"]
    in_memory = ["language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb"]
    device_map = {f"model.{name}": "disk" for name in on_disk} | {f"model.{name}": "cpu" for name in in_memory}
    offloaded = load(
        AutoModelForImageTextToText,
        model_folder,
        device_map={**device_map, "lm_head": "cpu"},
        offload_folder=tmp_path,
    )
    assert offloaded.model.vision_tower.device.type == "meta"
    inputs = tokenize(processor, chat(picture()))
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
