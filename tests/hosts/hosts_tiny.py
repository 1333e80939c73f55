"""Small random models of the library's own classes, one of each family, saved with tokenizer, template and image processor."""

import inspect
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 400, "max_position_embeddings": 8192,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 4, "out_hidden_size": 32,
    "initializer_range": 0.2, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
TURN = "{{% for m in messages %}}{{{{ '<turn>' + m.role }}}}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for p in m.content %}}{{% if p.type == 'image' %}}{{{{ {marker!r} }}}}{{% else %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}{{{{ '</turn>' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<turn>assistant' }}}}{{% endif %}}"  # noqa: E501
QWEN = {"image_token": "<|image_pad|>", "marker": "<|vision_start|><|image_pad|><|vision_end|>",
        "others": ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}  # fmt: skip


def _qwen(text, vision, processor):
    return {
        "text_config": {**TEXT, "rope_parameters": MROPE, **text},
        "vision_config": {**QWEN_VISION, **vision},
        "processor": ("Qwen2VLImageProcessorPil", processor),
        **QWEN,
    }


# Per family: the configuration, the image processor, and the tokens of its prompts.
FAMILIES = {
    "gemma4": {
        "class": "Gemma4",
        "text_config": {
            **TEXT, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 2048,
            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 400, "global_head_dim": 16,
        },
        "vision_config": {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 3,
                          "position_embedding_size": 64},
        "processor": ("Gemma4ImageProcessorPil", {"patch_size": 2, "max_soft_tokens": 70}),
        "image_token": "<|image|>", "marker": "<|image|>", "tokenizer": {"boi_token": "<|image>", "eoi_token": "<image|>"},
        "others": ["<|video|>", "<|audio|>"], "bos": True, "tile": 48, "rows": 8,
    },
    "gemma3": {
        "class": "Gemma3",
        "text_config": {**TEXT, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 2048,
                        "query_pre_attn_scalar": 8},
        "vision_config": {**VISION, "image_size": 56, "patch_size": 7, "model_type": "siglip_vision_model"},
        "config": {"mm_tokens_per_image": 16},
        "processor": ("Gemma3ImageProcessorPil", {"size": {"height": 56, "width": 56}}),
        "image_token": "<image_soft_token>", "marker": "<start_of_image>",
        "tokenizer": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}, "bos": True, "tile": 56, "rows": 4,
    },
    "qwen2_5_vl": {
        "class": "Qwen2_5_VL",
        **_qwen({"num_hidden_layers": 4, "rope_parameters": {**MROPE, "mrope_interleaved": False}},
                {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}, {"patch_size": 4}), "tile": 32, "rows": 4, "settings": {"tile": 32},
    },
    "qwen3_vl": {
        "class": "Qwen3VL",
        **_qwen({}, {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}, {"patch_size": 4}),
        "tile": 32, "rows": 4, "settings": {"tile": 32},
    },
    "qwen3_5": {
        "class": "Qwen3_5",
        **_qwen({"layer_types": ["linear_attention", "full_attention"] * 2, "linear_key_head_dim": 8,
                 "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                 "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
                {"patch_size": 4, "num_position_embeddings": 64}, {"patch_size": 4}), "tile": 32, "rows": 4, "settings": {"tile": 32},
    },
    "internvl": {
        "class": "InternVL",
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [7, 7]},
        "config": {"image_seq_length": 16},
        "processor": ("GotOcr2ImageProcessorPil", {"size": {"height": 56, "width": 56}}),
        "image_token": "<IMG_CONTEXT>", "marker": "<IMG_CONTEXT>",
        "tokenizer": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                      "video_token": "<video>"},
        "tile": 56, "rows": 4,
    },
    "llava": {
        "class": "Llava",
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "image_size": 56, "patch_size": 14, "model_type": "clip_vision_model"},
        "processor": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
        "image_token": "<image>", "marker": "<image>\n", "bos": True, "tile": 56, "rows": 4,
    },
    "llava_onevision": {
        "class": "LlavaOnevision",
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": 60, "patch_size": 14, "model_type": "siglip_vision_model",
                          "vision_use_head": False},
        "config": {"image_grid_pinpoints": [[60, 60], [60, 120], [120, 60], [120, 120]]},
        "processor": ("LlavaOnevisionImageProcessorPil",
                      {"size": {"height": 60, "width": 60}, "image_grid_pinpoints": [[60, 60], [60, 120], [120, 120]]}),
        "image_token": "<image>", "marker": "<image>\n", "others": ["<video>"], "tile": 56, "rows": 4,
    },
    "smolvlm": {
        "class": "SmolVLM",
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "image_size": 64, "patch_size": 8},
        "processor": ("SmolVLMImageProcessorPil", {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}),
        "image_token": "<image>", "marker": "<image>",
        "tokenizer": {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
                      "end_of_utterance_token": "<end_of_utterance>"},
        "tile": 64, "rows": 4,
    },
    "mistral3": {
        "class": "Mistral3",
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**VISION, "image_size": 256, "patch_size": 4, "head_dim": 8, "model_type": "pixtral",
                          "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        "processor": ("PixtralImageProcessorPil", {"size": {"longest_edge": 256}, "patch_size": {"height": 4, "width": 4}}),
        "image_token": "[IMG]", "marker": "[IMG]", "others": ["[IMG_BREAK]", "[IMG_END]"], "bos": True, "tile": 32, "rows": 4, "settings": {"tile": 32},
    },
}  # fmt: skip


def tokenizer_of(family: dict) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens of the family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>", "<turn>", "</turn>"]
    made = Tokenizer(models.BPE({letter: 10 + idx for idx, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend = json.loads(made.to_str())
    backend["model"]["vocab"] |= {token: idx for idx, token in enumerate(special)}
    names = [family["image_token"], *family.get("others", []), *family.get("tokenizer", {}).values()]
    for idx, token in enumerate(dict.fromkeys(names)):
        backend["model"]["vocab"][token] = 300 + idx
    named = {"image_token": family["image_token"], **family.get("tokenizer", {})}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        extra_special_tokens=named, model_max_length=8192,
    )  # fmt: skip
    made.add_tokens([token for token in dict.fromkeys([*special, *names])], special_tokens=True)
    return made


def config_of(name: str, **changes):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    ids = {f"{one}_token_id": tokenizer.convert_tokens_to_ids(family["image_token"]) for one in ("image",)}
    ids["image_token_index"] = ids["image_token_id"]
    if name.startswith("qwen"):
        ids |= {f"{one}_token_id": tokenizer.convert_tokens_to_ids(f"<|{other}|>") for one, other in (
            ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    if name == "gemma4":
        ids |= {"video_token_id": tokenizer.convert_tokens_to_ids("<|video|>"),
                "audio_token_id": tokenizer.convert_tokens_to_ids("<|audio|>")}  # fmt: skip
    kind = getattr(transformers, f"{family['class']}Config")
    known = set(kind.__dataclass_fields__) | set(getattr(kind, "attribute_map", {}))
    text, vision = ({**family[part], **changes.get(part, {})} for part in ("text_config", "vision_config"))
    rest = {key: value for key, value in changes.items() if key not in ("text_config", "vision_config")}
    return kind(text_config=text, vision_config=vision, **{key: ids[key] for key in ids if key in known},
                **family.get("config", {}), **rest)  # fmt: skip


def save_family(name: str, folder: Path, seed=0, **changes) -> Path:
    """A model folder as the Hub has them."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family['class']}ForConditionalGeneration")(config_of(name, **changes)).eval()
    for parameter_name, parameter in model.named_parameters():  # newlines and the like begin as zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.save_pretrained(folder)
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = ("{{ bos_token }}" if family.get("bos") else "") + TURN.format(marker=family["marker"])
    tokenizer.save_pretrained(folder)
    kind, settings = family["processor"]
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    return folder


def save_unknown(folder: Path) -> Path:
    """A model of a family that the table does not have."""
    family = {**FAMILIES["qwen2_5_vl"], "class": "Qwen2VL"}
    family["vision_config"] = {
        "embed_dim": 32,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    FAMILIES["qwen2_vl"] = family
    try:
        return save_family("qwen2_vl", folder)
    finally:
        del FAMILIES["qwen2_vl"]


# What keeps a tile whole, as the library's own image processors have it.
WHOLE = {
    "gemma3": {"do_pan_and_scan": False},
    "internvl": {"crop_to_patches": False},
    "llava_onevision": {"size": {"height": 56, "width": 56}},
    "smolvlm": {"do_image_splitting": False, "size": {"longest_edge": 64}},
    "mistral3": {"size": {"longest_edge": 32}, "patch_size": {"height": 8, "width": 8}},
    **{name: {"size": {"shortest_edge": 32**2, "longest_edge": 32**2}} for name in FAMILIES if name.startswith("qwen")},
}


def plain_inputs(name, folder, input_ids, image, kept=None) -> dict:
    """Arguments of the library's own `forward` for a prompt long[1, M] with the image of one tile, the rows but `kept`
    bool[P] out of sight."""
    family = FAMILIES[name]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = dict(processor(images=[image], return_tensors="pt", **WHOLE.get(name, {})))
    token = config_of(name).image_token_id
    spots = (input_ids[0] == token).nonzero()[:, 0]
    seen = torch.ones(len(spots), dtype=torch.bool) if kept is None else kept
    if name == "llava_onevision":  # as one of two images: one newline behind its rows
        pixels["batch_num_images"] = torch.tensor([2])
        end = int(spots[-1]) + 1
        input_ids = torch.cat((input_ids[:, :end], torch.tensor([[token]]), input_ids[:, end:]), dim=1)
        spots, seen = torch.cat((spots, torch.tensor([end]))), torch.cat((seen, torch.tensor([False])))
    mask = torch.ones_like(input_ids)
    mask[0, spots] = seen.long()
    types = (input_ids == token).long()
    made = {"input_ids": input_ids, "attention_mask": mask}
    if name == "gemma3":
        made["token_type_ids"] = types
    elif name == "gemma4" or name.startswith("qwen"):
        made["mm_token_type_ids"] = types
    if not bool(mask.all()):
        if name.startswith("qwen"):
            # Places of the whole image, whatever is seen of it.
            made["position_ids"] = mrope_places(input_ids, types, family["rows"])
        else:
            made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    taken = inspect.signature(
        getattr(transformers, f"{family['class']}ForConditionalGeneration").forward
    ).parameters  # fmt: skip
    return made | {key: value for key, value in pixels.items() if key in taken}


def mrope_places(input_ids, types, rows) -> torch.Tensor:
    """[4, 1, M] of a prompt with one whole image, written out."""
    found, at, idx = [], 0, 0
    for is_image in types[0].tolist():
        if is_image:
            found.append([at, at + idx // rows, at + idx % rows])
            idx += 1
            at += rows if idx == rows * rows else 0
        else:
            found.append([at] * 3)
            at += 1
    number = torch.arange(len(found))[:, None]
    return torch.cat((number, torch.tensor(found)), dim=1).T[:, None]
