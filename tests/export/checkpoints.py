"""A released checkpoint, made here, and what the tests of the export ask of files."""

import json
import os
import re
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from uhr_bat.common.loading import ROOT
from uhr_bat.configuration_uhr_bat import UHRBatConfig


VISION = "model.vision_tower.vision_tower.vision_model."
WIDTH, ROWS = 32, 1024


def released_config(**changes):
    return {
        "model_type": "llava_qwen",
        "vocab_size": ROWS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "eos_token_id": 1022,
        "pad_token_id": None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "multiscale_target_sizes": [28, 56],
        "multiscale_base_attention_size": 28,
        "enable_scale_pos_residual": True,
        "tokenizer_model_max_length": 300,
        **changes,
    }


def released_tensors(seed=0):
    """Every tensor of the layout by hand: tiles of 28 px in patches of 14, two scales of 2 x 2 and 4 x 4 patches."""
    shapes = {"model.embed_tokens.weight": [ROWS, WIDTH], "model.norm.weight": [WIDTH], "lm_head.weight": [ROWS, WIDTH]}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, rows in (("q_proj", WIDTH), ("k_proj", 16), ("v_proj", 16)):
            shapes[f"{layer}self_attn.{name}.weight"] = [rows, WIDTH]
            shapes[f"{layer}self_attn.{name}.bias"] = [rows]
        shapes[f"{layer}self_attn.o_proj.weight"] = [WIDTH, WIDTH]
        shapes |= {f"{layer}mlp.{name}_proj.weight": [48, WIDTH] for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = [WIDTH, 48]
        shapes |= {f"{layer}{name}_layernorm.weight": [WIDTH] for name in ("input", "post_attention")}
    shapes[f"{VISION}embeddings.class_embedding"] = [16]
    shapes[f"{VISION}embeddings.patch_embedding.weight"] = [16, 3, 14, 14]
    shapes[f"{VISION}embeddings.position_embedding.weight"] = [5, 16]
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{VISION}{name}.{kind}": [16] for kind in ("weight", "bias")}
    for layer in (f"{VISION}encoder.layers.{idx}." for idx in range(3)):
        linears = [(f"self_attn.{name}_proj", 16, 16) for name in ("q", "k", "v", "out")]
        for name, rows, columns in [*linears, ("mlp.fc1", 24, 16), ("mlp.fc2", 16, 24)]:
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = [rows, columns], [rows]
        shapes |= {f"{layer}layer_norm{n}.{kind}": [16] for n in (1, 2) for kind in ("weight", "bias")}
    for name, columns in (("mm_projector.0", 16), ("mm_projector.2", WIDTH)):
        shapes[f"model.{name}.weight"], shapes[f"model.{name}.bias"] = [WIDTH, columns], [WIDTH]
    for name in ("multiscale_token_mlp.0", "multiscale_token_mlp.2"):
        shapes[f"model.{name}.weight"], shapes[f"model.{name}.bias"] = [WIDTH, WIDTH], [WIDTH]
    shapes |= {"model.scale_pos_residuals.28": [1, 4, WIDTH], "model.scale_pos_residuals.56": [1, 16, WIDTH]}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def name_here(name):
    """The issue's table, written once more."""
    for there, here in [
        (VISION, "model.vision_tower.vision_model."),
        ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        ("model.scale_pos_residuals", "model.scale_embedding.tables"),
        ("model.multiscale_token_mlp.0", "model.token_mlp.linear_1"),
        ("model.multiscale_token_mlp.2", "model.token_mlp.linear_2"),
    ]:
        name = name.replace(there, here)
    return re.sub(r"^model\.(embed_tokens|layers|norm)", r"model.language_model.\1", name)


def write_released(folder, tensors=None, config=None, how="safetensors", tokenizer=True):
    """A checkpoint folder. `how`: the kind of its weight files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = released_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config or released_config()))
    if tokenizer:
        write_tokenizer_without_image(folder)
    names = list(tensors)
    parts = [names] if "shards" not in how else [names[0::3], names[1::3], names[2::3]]
    kind, stem = ("safetensors", "model") if "safetensors" in how else ("bin", "pytorch_model")
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{kind}" if len(parts) == 1 else f"{stem}-{number:05}-of-{len(parts):05}.{kind}"
        part = {name: tensors[name] for name in part}
        weight_map |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="old" not in how)
    if "index" in how:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_tokenizer_without_image(folder):
    """UHR-BAT-Tiny's, less its last entry: 1023 of them, as in a checkpoint that never heard of "<image>"."""
    tokenizer = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_token_mlp_copy(tensors):
    copies = {name.removeprefix("model."): value for name, value in tensors.items() if "multiscale_token_mlp" in name}
    return tensors | {name: value.clone() for name, value in copies.items()}


def weights_of(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def load_clean(folder, **kwargs):
    """The model through an Auto class; a loading report that names any tensor is a failure."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **{"dtype": "auto", **kwargs}
    )
    assert not any(report.values()), report
    return model.eval()


def in_new_process(code, tmp_path, *arguments):
    """Run Python in a process of its own, without a network and without any remote code that was cached before."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_json(path, other):
    """Whether two files say the same. Releases differ in how many defaults they write into a config.json."""
    if path.name == "config.json":
        settings = [UHRBatConfig.from_pretrained(folder).to_dict() for folder in (path.parent, other.parent)]
    else:
        settings = [json.loads(file.read_text()) for file in (path, other)]
    for values in settings:
        for key in ("transformers_version", "_name_or_path"):
            values.pop(key, None)
    return settings[0] == settings[1]


def nothing_was_made(output):
    return not output.exists() and not list(output.parent.glob(f"{output.name}*"))
