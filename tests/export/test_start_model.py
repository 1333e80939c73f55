"""A model of the LLaVA family as a start: the first answers are its own, and what cannot be a start is refused.

Small random models, saved by transformers itself, stand for those of the Hub. The oracle is the start model.
"""

import json

import numpy as np
import pytest
import torch
from checkpoints import VISION, load_clean, nothing_was_made, released_config, released_tensors, write_released
from PIL import Image
from safetensors.torch import load_file, save_file
from starts import DECODERS as decoders
from starts import IMAGE, NUM_TOKENS, PATCH, SIZES, TILE
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)
from uhr_bat.common.loading import ROOT
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert, main

TOWER = {**SIZES, "hidden_size": 16, "image_size": TILE, "patch_size": PATCH}
TOWERS = {"clip": CLIPVisionConfig(**TOWER), "siglip": SiglipVisionConfig(**TOWER)}
DECODERS = {name: make() for name, make in decoders.items()}
SETTINGS = {"image_token_index": IMAGE, "projector_hidden_act": "gelu"}
CHAT = "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
STARTS = {
    "clip-qwen2": (LlavaForConditionalGeneration, LlavaConfig, "clip", "qwen2", {}),
    "clip-llama": (LlavaForConditionalGeneration, LlavaConfig, "clip", "llama", {"multimodal_projector_bias": False}),
    "clip-qwen3": (LlavaForConditionalGeneration, LlavaConfig, "clip", "qwen3", {"vision_feature_layer": -1}),
    "siglip-qwen2": (LlavaForConditionalGeneration, LlavaConfig, "siglip", "qwen2",
                     {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}),
    "siglip-qwen3": (LlavaForConditionalGeneration, LlavaConfig, "siglip", "qwen3",
                     {"vision_feature_select_strategy": "full"}),
}  # fmt: skip


def start_model(name, tied=False):
    """One of `STARTS`, random but of a size that tells images and questions apart."""
    model_class, config_class, tower, decoder, changes = STARTS[name]
    torch.manual_seed(0)
    text = DECODERS[decoder].to_dict() | {"tie_word_embeddings": tied}
    config = config_class(
        vision_config=TOWERS[tower].to_dict(), text_config=text, tie_word_embeddings=tied, **SETTINGS, **changes
    )
    model = model_class(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def write_start(folder, model):
    """Its folder: weights, a tokenizer with "<image>", an image processor's file, a chat template."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    mean = {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "image_processor_type": "SiglipImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(mean))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def question_and_image():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (TILE, TILE, 3), generator=generator, dtype=torch.uint8)
    return "What is here?", Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("name", STARTS)
def test_the_first_answer_is_the_start_models(name, tmp_path):
    start = start_model(name)
    output = convert(
        start=write_start(tmp_path / "start", start), output=tmp_path / "out", scales=[TILE], budgets=[NUM_TOKENS]
    )
    model, processor = load_clean(output), AutoProcessor.from_pretrained(output, trust_remote_code=True)
    question, image = question_and_image()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert processor.decode(inputs["input_ids"][0]).replace(" ", "").startswith("<image>" * NUM_TOKENS)
    pixels = (torch.from_numpy(np.array(image)) / 255 - 0.5) / 0.4
    with torch.no_grad():
        expected = start(input_ids=inputs["input_ids"], pixel_values=pixels.permute(2, 0, 1)[None]).logits
        found = model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        blank = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert (blank - expected).abs().max() > 0.01  # so the image is seen


@pytest.mark.parametrize("name", STARTS)
def test_the_importance_is_the_decoders_own_attention(name, tmp_path):
    output = convert(
        start=write_start(tmp_path / "start", start_model(name)), output=tmp_path / "out", scales=[TILE, 2 * TILE]
    )
    model = load_clean(output)
    model.set_attn_implementation("eager")
    ids = torch.tensor([5, 6, IMAGE, 7, 8, 9])
    anchor = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    embeds = model.get_input_embeddings()(ids)
    sequence = torch.cat((embeds[:2], anchor, embeds[3:]))[None]
    with torch.no_grad():
        for layer in range(3):
            attention = model.model.language_model(inputs_embeds=sequence, output_attentions=True).attentions[layer]
            found = model.model.estimate_importance(ids, anchor, layer=layer)
            torch.testing.assert_close(found, attention[0, :, 8:, 2:8].mean((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_defaults_are_the_papers_and_new_parts_are_nothing(tied, tmp_path, capsys):
    start = write_start(tmp_path / "start", start_model("siglip-qwen2", tied))
    main(["--start", str(start), "--output", str(tmp_path / "out")])
    model = load_clean(tmp_path / "out")
    assert model.config.scales == [2 * TILE, 4 * TILE, 8 * TILE, 12 * TILE] and model.config.selector == "distinct"
    assert model.config.tie_word_embeddings is tied and sum(model.config.budgets) < 512
    assert not any(parameter.any() for parameter in model.model.scale_embedding.parameters())
    printed, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "new, zero at the start: model.scale_embedding.table" in printed
    assert "This model is a start" in card and "SigLIP, 3 layers" in card
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_std"] == [0.4] * 3


def test_files_of_older_releases_and_extra_parts_are_read(tmp_path):
    start = write_start(tmp_path / "start", start_model("clip-llama"))
    old = {}
    for name, tensor in load_file(start / "model.safetensors").items():
        for here, there in (
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            if name.startswith(here):
                name = there + name.removeprefix(here).removeprefix("vision_model.")
        old[name] = tensor
    old["image_newline"] = torch.ones(32)
    first = load_clean(convert(start=start, output=tmp_path / "a", scales=[TILE], budgets=4)).state_dict()
    save_file(old, start / "model.safetensors", metadata={"format": "pt"})
    again = load_clean(convert(start=start, output=tmp_path / "b", scales=[TILE], budgets=4)).state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("model_class", "config_class", "tower"),
    [
        (LlavaNextForConditionalGeneration, LlavaNextConfig, "clip"),
        (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, "siglip"),
    ],
)
def test_their_successors_are_starts_too(model_class, config_class, tower, tmp_path, capsys):
    config = config_class(
        vision_config=TOWERS[tower].to_dict(), text_config=DECODERS["qwen2"].to_dict(), image_grid_pinpoints=[[64, 64]],
        video_token_index=1021 if tower == "siglip" else None, **SETTINGS,
    )  # fmt: skip
    start = model_class(config).eval()
    output = convert(start=write_start(tmp_path / "start", start), output=tmp_path / "out", scales=[TILE], budgets=[16])
    assert "image_newline" in capsys.readouterr().out
    model = load_clean(output)
    pixels = torch.randn(1, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = start.model.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        expected = start.model.multi_modal_projector(states[:, states.shape[1] - NUM_TOKENS :])
        found = model.encode_image(pixels[None])[0].tokens[0]
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beside", [False, True])
def test_longva_without_our_parts_is_a_start(beside, tmp_path):
    tensors = {name: tensor for name, tensor in released_tensors().items() if "scale" not in name}
    config = released_config()
    for name in [name for name in config if name.startswith("multiscale")] + ["enable_scale_pos_residual"]:
        del config[name]
    arguments = {}
    if beside:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 1}
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
        names = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
        tower.load_state_dict(
            {names[name.removeprefix(VISION)]: tensor for name, tensor in tensors.items() if VISION in name}
        )
        tower.save_pretrained(tmp_path / "tower")
        tensors = {name: tensor for name, tensor in tensors.items() if VISION not in name}
        arguments["vision_tower"] = tmp_path / "tower"
    start = write_released(tmp_path / "start", tensors, config)
    model = load_clean(convert(start=start, output=tmp_path / "out", scales=[28, 56], budgets=[2, 4], **arguments))
    assert (
        model.config.question_tokens == "all" and model.config.mask_padding
    )  # the paper's settings, not the release's
    assert model.config.scale_embedding_form == "factorized" and model.model.token_mlp is None
    weights = model.state_dict()
    assert torch.equal(weights["model.language_model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    tower = weights["model.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"]
    assert torch.equal(tower, released_tensors()[f"{VISION}encoder.layers.2.mlp.fc1.weight"])


def lrs_vqa_tensors():
    """LRS-VQA's layout: projector and region focus module under one name, a newline, none of UHR-BAT's parts."""
    released = {name: tensor for name, tensor in released_tensors().items() if "scale" not in name}
    tensors = {
        name.replace("mm_projector.", "mm_projector.mlp_projector."): tensor for name, tensor in released.items()
    }
    for name, tensor in released_tensors(seed=1).items():
        if name.startswith(("model.layers.", "model.norm.")):
            tensors[name.replace("model.", "model.mm_projector.token_pruner.", 1)] = tensor
    return tensors | {"model.image_newline": torch.linspace(0, 1, 32)}


def lrs_vqa_config(**changes):
    plain = {name: value for name, value in released_config().items() if "scale" not in name}
    return plain | {"mm_projector_type": "mlp2x_gelu_after_distillpruner", "llm_layer_list": [1]} | changes


@torch.no_grad()
def test_lrs_vqas_checkpoint_is_a_start_that_looks_with_its_own_module(tmp_path):
    tensors = lrs_vqa_tensors()
    start = write_released(tmp_path / "start", tensors, lrs_vqa_config())
    output = convert(start=start, output=tmp_path / "out", scales=[28, 56], budgets=[2, 4])
    model, processor = load_clean(output), AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert model.config.region_focus == {"layers": [0, 1], "n_max": 80, "separator_token_id": 25}
    weights = model.state_dict()
    for there, here in (
        ("model.mm_projector.token_pruner.", "model.region_focus."),
        ("model.mm_projector.mlp_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.mlp_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.image_newline", "model.image_newline"),
    ):
        named = [name for name in tensors if name.startswith(there)]
        assert named and all(torch.equal(weights[name.replace(there, here)], tensors[name]) for name in named)
    inputs = processor(
        text="<image> What is here?", images=Image.effect_noise((200, 160), 60).convert("RGB"), dynamic_pyramid=True,
        return_tensors="pt",
    )  # fmt: skip
    seen = model.compress(**inputs)
    assert len(seen.tokens[0]) == 4 and len(seen.tokens[0][-1])  # a thumbnail and three levels
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"llm_layer_list": [1, 1]}, "has layers 0, 1, but `llm_layer_list`"),
        ({"mm_projector_type": "mlp2x_gelu"}, "'mlp2x_gelu', but there is a token pruner"),
    ],
)
def test_a_module_that_its_config_does_not_describe_is_refused(changes, message, tmp_path):
    start = write_released(tmp_path / "start", lrs_vqa_tensors(), lrs_vqa_config(**changes))
    with pytest.raises(CheckpointError, match=message):
        convert(start=start, output=tmp_path / "out", scales=[28, 56], budgets=[2, 4])
    assert nothing_was_made(tmp_path / "out")


def test_what_cannot_be_a_start_is_refused_by_name(tmp_path):
    start = write_start(tmp_path / "start", start_model("clip-qwen2"))
    path = start / "config.json"
    settings = json.loads(path.read_text())
    for changes, message in (
        ({"text_config": {"model_type": "gemma"}}, "'gemma'"),
        ({"vision_config": {**settings["vision_config"], "model_type": "siglip2_vision_model"}}, "fixed resolution"),
        (
            {"vision_config": {**settings["vision_config"], "patch_size": 40}},
            "32 px is smaller than its patch of 40 px",
        ),
        ({"vision_feature_layer": [-2, -3]}, "only one layer"),
        ({"model_type": "blip-2"}, "'blip-2'"),
        ({"text_config": {**settings["text_config"], "num_hidden_layers": 4}}, r"`num_hidden_layers` \(4\)"),
        ({"text_config": {**settings["text_config"], "intermediate_size": 50}}, r"\[48, 32\].* asks for \[50, 32\]"),
    ):
        path.write_text(json.dumps(settings | changes))
        with pytest.raises(CheckpointError, match=message):
            convert(start=start, output=tmp_path / "out")
    assert nothing_was_made(tmp_path / "out")
    with pytest.raises(CheckpointError, match="for --start"):
        convert(checkpoint=start, output=tmp_path / "out", scales=[32])
