"""Small random models in the forms in which the LLaVA family is published, made by transformers' own classes."""

import json
import re

import torch
from checkpoints import write_released
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from uhr_bat.common.loading import ROOT

IMAGE, TILE, PATCH = 1023, 32, 8
NUM_TOKENS = (TILE // PATCH) ** 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1022,
        "pad_token_id": 1020, "bos_token_id": None, "initializer_range": 0.3}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# SigLIP so400m has 384 px in patches of 14: 6 px are left over, here 2 of 34.
TOWERS = {
    "clip": lambda: CLIPVisionConfig(**{**SIZES, "hidden_size": 16}, image_size=TILE, patch_size=PATCH),
    "siglip": lambda: SiglipVisionConfig(**{**SIZES, "hidden_size": 16}, image_size=TILE + 2, patch_size=PATCH),
}
DECODERS = {
    "qwen2": lambda: Qwen2Config(**TEXT),
    "qwen3": lambda: Qwen3Config(**TEXT, head_dim=12),
    "llama": lambda: LlamaConfig(**TEXT, **ROPE),
    "mistral": lambda: MistralConfig(**TEXT, **ROPE, head_dim=12, sliding_window=None),
}
LIBRARY = {"llava": (LlavaForConditionalGeneration, LlavaConfig),
           "next": (LlavaNextForConditionalGeneration, LlavaNextConfig),
           "onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig)}  # fmt: skip
SIGLIP = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
# Published form -> (class of the library, tower, decoder, other fields, fields of the original layout if it is that one)
FORMS = {
    "llava-onevision-qwen2-hf": ("onevision", "siglip", "qwen2", {"video_token_index": 1021, **SIGLIP}, None),
    "llava-interleave-qwen-hf": ("llava", "siglip", "qwen2", SIGLIP, None),
    "llava-v1.6-mistral-hf": ("next", "clip", "mistral", {}, None),
    "llava-onevision-qwen2-ov": ("onevision", "siglip", "qwen2", {"video_token_index": 1021, **SIGLIP},
                                 {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"],
                                  "mm_vision_tower": "google/siglip-so400m-patch14-384"}),
    "llava-v1.6-mistral": ("next", "clip", "mistral", {},
                           {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}),
    "geochat": ("llava", "clip", "llama", {},
                {"model_type": "geochat", "architectures": ["GeoChatLlamaForCausalLM"]}),
    "llava-v1": ("llava", "clip", "llama", {}, {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}),
    "llava-without-architectures": ("llava", "clip", "llama", {}, {"model_type": "llava"}),
}  # fmt: skip
IM = "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n" + IM + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "vicuna": "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}" + IM + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
}  # fmt: skip


def make_start(form):
    """The model of the library; its weights are of a size that tells images and questions apart."""
    kind, tower, decoder, changes, _ = FORMS[form]
    model_class, config_class = LIBRARY[kind]
    torch.manual_seed(0)
    if kind != "llava":
        changes = {"image_grid_pinpoints": [[64, 64]], **changes}
    config = config_class(
        vision_config=TOWERS[tower]().to_dict(), text_config=DECODERS[decoder]().to_dict(), image_token_index=IMAGE,
        projector_hidden_act="gelu", tie_word_embeddings=False, **changes,
    )  # fmt: skip
    model = model_class(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def write_form(folder, form, model=None):
    """The folder of a published form. A tokenizer of Llama has no marks of ChatML."""
    model = model or make_start(form)
    *_, tower, decoder, _, original = FORMS[form]
    if original is None:
        model.save_pretrained(folder)
        template = TEMPLATES["chatml" if "qwen" in decoder else "vicuna"]
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if tower == "siglip" else {}
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "X", **settings}))
    else:
        write_released(folder, original_tensors(model), original_config(model, original), tokenizer=False)
    write_tokenizer(folder, "chatml" if "qwen" in decoder else "vicuna", image=original is None)
    return folder


def original_config(model, changes):
    """The flat config.json of the code that the family was trained with."""
    text = model.config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "eos_token_id",
             "sliding_window")  # fmt: skip
    flat = {name: text[name] for name in names if text.get(name) is not None}
    return flat | {"rope_theta": text["rope_parameters"]["rope_theta"], "mm_vision_select_layer": -2,
                   "mm_projector_type": "mlp2x_gelu", "tie_word_embeddings": False, **changes}  # fmt: skip


def original_tensors(model):
    """Its names. SigLIP's last layer and its pooling are cut off there, whatever the config says."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if re.match(r"model\.vision_tower\.(vision_model\.)?head\.", name):
            continue
        for here, there in (
            (r"model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
            (r"model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
            (r"model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
            (r"model\.language_model\.", "model."),
        ):
            name, found = re.subn("^" + here, there, name)
            if found:
                break
        tensors[name] = tensor.clone()
    return tensors


def write_tokenizer(folder, kind, image=True):
    """UHR-BAT-Tiny's, with ChatML's marks or Llama's."""
    names = {"<|endoftext|>": "<unk>", "<|im_start|>": "<s>", "<|im_end|>": "</s>"} if kind == "vicuna" else {}
    tokenizer = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token | {"content": names.get(token["content"], token["content"])} for token in tokenizer["added_tokens"]]
    tokenizer["added_tokens"] = [token for token in added if image or token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    end, pad = names.get("<|im_end|>", "<|im_end|>"), names.get("<|endoftext|>", "<|endoftext|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@torch.no_grad()
def answer_of(model, ids, pixels):
    """Logits of the start model where one image of one tile is read, without tiles beside it and marks between them."""
    parts, config = model.model, model.config
    states = parts.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    tokens = parts.multi_modal_projector(states[:, states.shape[1] - NUM_TOKENS :])[0]
    embeds = parts.language_model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = tokens
    return model.lm_head(parts.language_model(inputs_embeds=embeds).last_hidden_state), tokens
