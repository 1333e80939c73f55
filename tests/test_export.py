"""Trained weights to a model folder: names, numbers, files, memory, interruptions, hostile input, and the way back."""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import HfApi, metadata_load
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import prompt, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export import convert_checkpoint, model_folder
from uhr_bat.export.checkpoint_files import Checkpoint, CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.export.released_layout import looks_untrained
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.regions.cache import read_labels


REFERENCE = ROOT / "tests" / "reference" / "released_layout"
CODE = sorted(path.name for path in ROOT.glob("*_uhr_bat.py"))
VISION = "model.vision_tower.vision_tower.vision_model."
WIDTH, ROWS = 32, 1024


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """All here is small or waits for the disk, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A released checkpoint, made here


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


@pytest.fixture
def released(tmp_path):
    return write_released(tmp_path / "released")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The released checkpoint above, converted. Tests only read it."""
    folder = tmp_path_factory.mktemp("export")
    return convert(write_released(folder / "released"), folder / "model")


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


# The reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(model through an Auto class, its remote module, the folder) of the converted reference."""
    folder = convert(REFERENCE, tmp_path_factory.mktemp("reference") / "model", max_shard_size="1MB")
    model = load_clean(folder)
    return model, importlib.import_module(model.__class__.__module__), folder


@pytest.fixture(scope="module")
def reference_call(reference):
    """The prompt and the released call of the reference, without label maps."""
    _, module, folder = reference
    image = Image.open(REFERENCE / "image.png")
    processor = UHRBatImageProcessor.from_pretrained(folder)
    scales = [672, 1344]
    tiles = module.split_image_to_multiscale_tiles(image, processor, target_sizes=scales, tile_size=336)
    call = {
        "multiscale_pixels": [tiles],
        "multiscale_masks": [{}],
        "multiscale_topk": [40, 90],
        "multiscale_target_sizes": scales,
        "image_sizes": [image.size],
        "modalities": ["image"],
    }
    return torch.tensor([[5, 6, 7, -200, 8, 9, 10, 11, 12, 13]]), call, np.load(REFERENCE / "expected.npz")


def test_the_tiles_are_the_references(reference_call):
    _, call, expected = reference_call
    for scale, entry in call["multiscale_pixels"][0].items():
        tiles = entry["tiles"]
        sums = [tiles.double().sum().item(), tiles.double().abs().sum().item()]
        np.testing.assert_allclose(sums, expected[f"tiles_{scale}_checksum"], rtol=1e-6)


@pytest.mark.parametrize("masks", ["topk", "sam"])
def test_importance_tokens_and_scores_are_the_references(reference, reference_call, masks):
    model, module, _ = reference
    prompt_ids, call, expected = reference_call
    inputs = {
        "input_ids": prompt_ids.masked_fill(prompt_ids == -200, model.config.image_token_index),
        "pixel_values": torch.cat([entry["tiles"] for entry in call["multiscale_pixels"][0].values()])[None],
        "budgets": [40, 90],
    }
    if masks == "sam":
        entry = torch.load(REFERENCE / "mask.pt", weights_only=True)
        loaded = module.load_multiscale_tile_masks(entry, scales=[672, 1344], tile_size=336, patch_size=14)
        call = {**call, "multiscale_masks": [loaded]}
        labels = read_labels(REFERENCE / "mask.pt")
        inputs["regions"] = torch.cat([labels[scale].flatten() for scale in (672, 1344)])[None]
    out = model.compress(**inputs)
    for scale_idx, scale in enumerate((672, 1344)):
        side = scale // 336
        importance = out.importance[0][scale_idx].view(side, 24, side, 24).transpose(1, 2).reshape(-1, 24, 24)
        np.testing.assert_allclose(importance, expected[f"importance_{scale}"], atol=1e-6)
    np.testing.assert_allclose(out.pooler_output[0].detach(), expected[f"{masks}_tokens"], atol=1e-3)
    answer = model.generate(
        inputs=prompt_ids, **call, do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    np.testing.assert_allclose(torch.cat(answer.scores), expected[f"{masks}_scores"], atol=1e-3)
    assert answer.sequences[0, -6:].tolist() == expected[f"{masks}_answer"].tolist()


# Names, numbers and files of a released checkpoint


def test_every_tensor_arrives_under_its_new_name(exported):
    tensors = released_tensors()
    written = weights_of(exported)
    assert written.keys() == {name_here(name) for name in tensors}
    assert all(torch.equal(written[name_here(name)], tensor) for name, tensor in tensors.items())


def test_the_model_loads_with_these_weights(exported):
    weights, loaded = weights_of(exported), load_clean(exported).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_the_folder_is_complete(exported):
    assert {path.name for path in exported.iterdir()} == {
        *CODE, "LICENSE", "README.md", "config.json", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    }  # fmt: skip
    weights = exported / "model.safetensors"
    assert safe_open(weights, "pt").metadata() == {"format": "pt"}
    assert oct(weights.stat().st_mode)[-3:] == "644"


def test_the_configuration_states_the_released_settings(exported):
    config = UHRBatConfig.from_pretrained(exported)
    found = {name: getattr(config, name) for name in vars(UHRBatConfig()) if hasattr(config, name)}
    assert found | {
        "scales": [28, 56],
        "budgets": [4, 16],
        "importance_layer": -1,
        "question_tokens": "last",
        "region_method": "none",
        "num_regions": None,
        "kmeans_iterations": 10,
        "coord_weight": 0.05,
        "coord_frame": "tile",
        "threshold": "gt",
        "coverage": False,
        "scale_embedding_form": "per_scale",
        "scale_embedding_grid": 64,
        "scale_embedding_additions": 2,
        "token_mlp": True,
        "mask_padding": False,
        "vision_feature_layer": -2,
    } == found
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    vision = config.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (16, 24, 3)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (28, 14, 1)
    written = json.loads((exported / "config.json").read_text())
    assert written["auto_map"] == json.loads((ROOT / "config.json").read_text())["auto_map"]
    assert written["architectures"] == ["UHRBatForConditionalGeneration"] and written["dtype"] == "float32"
    assert json.loads((exported / "preprocessor_config.json").read_text())["mask_padding"] is False


@pytest.mark.parametrize(
    "released_field, field, value",
    [
        ({"enable_scale_pos_residual": False}, "scale_embedding_additions", 0),
        ({"enable_scale_pos_residual": None}, "scale_embedding_additions", 0),
        ({"kmeans_num_clusters": 50}, "num_regions", 50),
        ({"kmeans_max_iters": 4}, "kmeans_iterations", 4),
        ({"kmeans_coord_scale": 0.2}, "coord_weight", 0.2),
        ({"mm_vision_select_layer": -1}, "vision_feature_layer", -1),
        ({"scale_residual_base": 4}, "scale_embedding_grid", 4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_of_the_released_config_are_carried_over(tmp_path, released_field, field, value):
    folder = write_released(tmp_path / "released", config=released_config(**released_field), tokenizer=False)
    checkpoint = Checkpoint(folder)
    config, _, _ = convert_checkpoint.read_config(folder, checkpoint.tensors)
    assert getattr(config, field) == value


def test_a_released_config_with_nothing_but_sizes_has_the_released_defaults():
    tensors = {name: SimpleNamespace(shape=tensor.shape, path=None) for name, tensor in released_tensors().items()}
    sizes = {name: released_config()[name] for name in convert_checkpoint.released_layout.TEXT_SIZES}
    settings = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
    config, _ = convert_checkpoint.released_layout.make_config(sizes | settings, tensors | {
        f"{VISION}embeddings.patch_embedding.weight": SimpleNamespace(shape=(1024, 3, 14, 14), path=None),
        f"{VISION}embeddings.position_embedding.weight": SimpleNamespace(shape=(577, 1024), path=None),
    })  # fmt: skip
    assert config.scales == [672, 1344, 2688, 4032] and config.budgets == [80, 320, 600, 2000]
    assert config.scale_embedding_grid == 64 and config.scale_embedding_additions == 0
    assert config.image_token_index == ROWS - 1 and config.tile_size == 336
    assert config.vision_config.num_attention_heads == 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type.*linear"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"multiscale_base_attention_size": 56}, "multiscale_base_attention_size.*56"),
        ({"multiscale_target_sizes": [28, 50]}, "50"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"vocab_size": None}, "vocab_size"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_released_config_that_cannot_be_reproduced_is_refused(tmp_path, change, message):
    folder = write_released(tmp_path / "released", config=released_config(**change))
    with pytest.raises(CheckpointError, match=message) as error:
        convert(folder, tmp_path / "model")
    assert "config.json" in str(error.value) and nothing_was_made(tmp_path / "model")


def test_another_models_checkpoint_is_refused(tmp_path):
    folder = write_released(tmp_path / "released", config={"model_type": "bert"})
    with pytest.raises(CheckpointError, match="bert"):
        convert(folder, tmp_path / "model")


@pytest.mark.parametrize("heads, chosen", [(None, "1 attention heads of width 16"), (4, "4 attention heads, as asked")])
def test_the_number_of_vision_heads_is_stated(released, tmp_path, capsys, heads, chosen):
    convert(released, tmp_path / "model", vision_heads=heads)
    assert re.search(chosen, capsys.readouterr().out)
    assert UHRBatConfig.from_pretrained(tmp_path / "model").vision_config.num_attention_heads == (heads or 1)


def test_vision_heads_that_do_not_divide_the_width_are_refused(released, tmp_path):
    with pytest.raises(CheckpointError, match="16 wide, which 5"):
        convert(released, tmp_path / "model", vision_heads=5)


@pytest.mark.parametrize(
    "how", ["safetensors shards index", "safetensors shards", "bin", "bin shards index", "bin shards", "bin old"]
)
def test_every_kind_of_weight_file_gives_the_same_weights(tmp_path, exported, how):
    output = convert(write_released(tmp_path / "released", how=how, tokenizer=False), tmp_path / "model")
    expected, written = weights_of(exported), weights_of(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_shards_of_the_output_have_an_index_and_the_size_asked_for(released, tmp_path):
    output = convert(released, tmp_path / "model", max_shard_size="50KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and not (output / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in released_tensors().values())
    for shard in shards:
        tensors = load_file(output / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
    load_clean(output)


def test_a_shard_size_that_is_none_is_refused(released, tmp_path):
    with pytest.raises(CheckpointError, match="--max-shard-size big"):
        convert(released, tmp_path / "model", max_shard_size="big")


def test_weights_can_be_cast(released, tmp_path, exported):
    output = convert(released, tmp_path / "model", dtype="bfloat16")
    expected = weights_of(exported)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in weights_of(output).items())
    assert load_clean(output).dtype == torch.bfloat16


def test_without_a_cast_every_tensor_keeps_its_type(tmp_path):
    tensors = {name: value if "norm" in name else value.bfloat16() for name, value in released_tensors().items()}
    output = convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    assert {name: value.dtype for name, value in weights_of(output).items()} == {
        name_here(name): value.dtype for name, value in tensors.items()
    }
    assert UHRBatConfig.from_pretrained(output).dtype in ("bfloat16", torch.bfloat16)


def test_a_cast_that_overflows_is_refused(tmp_path):
    tensors = released_tensors()
    tensors["model.norm.weight"][0] = 1e6
    with pytest.raises(CheckpointError, match="model.safetensors.*'model.norm.weight'.*float16"):
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model", dtype="float16")
    assert nothing_was_made(tmp_path / "model")


# Copies, leftovers, gaps


def with_token_mlp_copy(tensors):
    copies = {name.removeprefix("model."): value for name, value in tensors.items() if "multiscale_token_mlp" in name}
    return tensors | {name: value.clone() for name, value in copies.items()}


def test_a_second_copy_of_the_token_mlp_is_left_out(tmp_path):
    folder = write_released(tmp_path / "released", with_token_mlp_copy(released_tensors()))
    output = convert(folder, tmp_path / "model")
    assert weights_of(output).keys() == {name_here(name) for name in released_tensors()}


def test_a_second_copy_that_differs_is_refused(tmp_path):
    tensors = with_token_mlp_copy(released_tensors())
    tensors["multiscale_token_mlp.2.bias"][0] += 1
    folder = write_released(tmp_path / "released", tensors, how="safetensors shards index")
    with pytest.raises(CheckpointError, match="differs") as error:
        convert(folder, tmp_path / "model")
    assert re.search(r"model-0000\d-of-00003.safetensors.*'(model\.)?multiscale_token_mlp.2.bias'", str(error.value))


def test_the_only_copy_of_the_token_mlp_is_used(tmp_path):
    tensors = with_token_mlp_copy(released_tensors())
    bias = tensors["multiscale_token_mlp.0.bias"]
    tensors = {name: value for name, value in tensors.items() if not name.startswith("model.multiscale_token_mlp")}
    output = convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    assert torch.equal(weights_of(output)["model.token_mlp.linear_1.bias"], bias)


def test_a_checkpoint_without_a_token_mlp_gives_a_model_without_one(tmp_path):
    tensors = {name: value for name, value in released_tensors().items() if "token_mlp" not in name}
    output = convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    assert load_clean(output).model.token_mlp is None


def test_what_the_released_code_never_uses_is_dropped_and_reported(tmp_path, capsys):
    leftovers = {
        "model.text_to_vision_proj.weight": torch.ones(4, 4),
        "text_to_vision_proj.bias": torch.ones(4),
        "model.tile_pos_residuals.28_0": torch.ones(1, 4, WIDTH),
        f"{VISION}embeddings.position_ids": torch.arange(5)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    output = convert(write_released(tmp_path / "released", released_tensors() | leftovers), tmp_path / "model")
    report = capsys.readouterr().out
    assert all(name in report for name in leftovers)
    assert weights_of(output).keys() == {name_here(name) for name in released_tensors()}


def test_unknown_missing_and_misshapen_tensors_are_all_named_at_once(tmp_path):
    tensors = released_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.scale_pos_residuals.56"]
    tensors["model.image_newline"] = torch.ones(WIDTH)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, WIDTH)
    tensors["model.language_model.norm.weight"] = torch.ones(WIDTH)
    tensors["model.mm_projector.2.weight"] = torch.ones(WIDTH, WIDTH + 1)
    tensors["model.mm_projector.2.bias"] = torch.ones(WIDTH, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    message, file = str(error.value), re.escape(str(tmp_path / "released" / "model.safetensors"))
    for name in ("model.image_newline", "model.layers.2.mlp.up_proj.weight", "model.language_model.norm.weight"):
        assert re.search(rf"{file}: tensor '{re.escape(name)}' is unknown", message)
    for name in ("model.language_model.layers.1.mlp.up_proj.weight", "model.scale_embedding.tables.56"):
        assert f"missing: '{name}'" in message
    assert re.search(rf"{file}: tensor 'model.mm_projector.2.weight' has the shape \[32, 33\].*\[32, 32\]", message)
    assert re.search(rf"{file}: tensor 'model.mm_projector.2.bias' is of type torch.int64", message)
    assert "in 7 points" in message and nothing_was_made(tmp_path / "model")


def test_a_tower_without_its_embeddings_is_refused(tmp_path):
    tensors = released_tensors()
    del tensors[f"{VISION}embeddings.position_embedding.weight"]
    with pytest.raises(CheckpointError, match="position_embedding.weight' is missing"):
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model")


@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_tied_head_may_be_absent_or_equal(tmp_path, head):
    tensors = released_tensors()
    embeddings = tensors["model.embed_tokens.weight"]
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head != "different":
        tensors["lm_head.weight"] = embeddings.clone()
    if head == "alone":
        del tensors["model.embed_tokens.weight"]
    folder = write_released(tmp_path / "released", tensors, released_config(tie_word_embeddings=True))
    if head == "different":
        with pytest.raises(CheckpointError, match="embed_tokens.weight' differs from 'lm_head.weight'"):
            convert(folder, tmp_path / "model")
        return
    model = load_clean(convert(folder, tmp_path / "model"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embeddings)


def smooth(side, width):
    ramp = torch.linspace(-1, 1, side)
    table = ramp[:, None, None] * torch.randn(width) + ramp[:, None] * torch.randn(width)
    return (table / table.std() / width**0.5).view(1, side * side, width)


def test_scale_tables_that_are_still_noise_are_told_from_trained_ones():
    torch.manual_seed(0)
    noise = torch.randn(1, 48 * 48, 64) / 8
    assert looks_untrained(noise)
    assert looks_untrained(noise.bfloat16())
    assert not looks_untrained(smooth(48, 64))
    assert not looks_untrained(noise * 1.5)
    assert not looks_untrained(noise + smooth(48, 64) * 0.5)
    assert not looks_untrained(torch.zeros(1, 16, 64))
    assert not looks_untrained(torch.randn(1, 1, 64) / 8)


def test_never_trained_scale_tables_are_reported_and_in_the_card(tmp_path, capsys):
    tensors = released_tensors()
    torch.manual_seed(0)
    tensors["model.scale_pos_residuals.28"] = torch.randn(1, 4, WIDTH) / WIDTH**0.5
    tensors["model.scale_pos_residuals.56"] = smooth(4, WIDTH)
    output = convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    report = capsys.readouterr().out
    assert "never trained" in report and "scale_pos_residuals.28" in report and "scale_pos_residuals.56" not in report
    assert "never trained" in (output / "README.md").read_text()


# Tokenizer and processors


def test_the_tokenizer_gets_an_image_token(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    image = UHRBatConfig.from_pretrained(exported).image_token_index
    assert image == 1023
    ids = tokenizer("a<image>\nb").input_ids
    assert ids.count(image) == 1 and tokenizer.decode(ids) == "a<image>\nb"
    assert tokenizer.model_max_length == 300 and tokenizer.padding_side == "left"
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left" and settings["model_max_length"] == 300
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"do_sample": False, "eos_token_id": [1022], "pad_token_id": 1022}


def test_the_cards_quick_start_answers(exported, tmp_path):
    Image.new("RGB", (60, 40), (10, 120, 30)).save(tmp_path / "image.jpg")
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)[1]
    code = code.replace('"."', repr(str(exported))).replace("max_new_tokens=256", "max_new_tokens=3")
    assert in_new_process(code, tmp_path).endswith("\n")


def test_the_exported_processor_and_model_agree(exported):
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    model = load_clean(exported)
    inputs = processor(text="<image>What?", images=Image.new("RGB", (60, 40)), return_tensors="pt")
    assert inputs["token_counts"].tolist() == [[4, 16]]
    assert model(**inputs).logits.isfinite().all()


def test_a_tokenizer_of_qwens_own_files_works_too(tmp_path):
    folder = write_released(tmp_path / "released", tokenizer=False)
    tokenizer = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 123, "chat_template": "{{ 'not this one' }}"}
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in tokenizer["added_tokens"]
        if token["content"] != "<image>"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {k: v for k, v in released_config().items() if k != "tokenizer_model_max_length"}
    (folder / "config.json").write_text(json.dumps(config))
    output = convert(folder, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert processor.tokenizer("<image>").input_ids == [1023]
    assert processor.tokenizer.model_max_length == 123
    assert "not this one" not in processor.chat_template


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path, capsys):
    output = convert(write_released(tmp_path / "released", tokenizer=False), tmp_path / "model")
    assert "tokenizer: none" in capsys.readouterr().out
    assert UHRBatConfig.from_pretrained(output).image_token_index == ROWS - 1
    assert not list(output.glob("tokenizer*")) and "held no tokenizer" in (output / "README.md").read_text()
    load_clean(output)


def test_code_that_a_tokenizer_names_does_not_get_into_the_folder(released, tmp_path):
    settings = json.loads((released / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "someone/else--tokenizer.Tokenizer"]}
    (released / "tokenizer_config.json").write_text(json.dumps(settings))
    output = convert(released, tmp_path / "model")
    assert "someone" not in (output / "tokenizer_config.json").read_text()


def test_an_image_token_without_a_row_is_refused(tmp_path):
    tensors = released_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:1023].clone()
    folder = write_released(tmp_path / "released", tensors, released_config(vocab_size=1023))
    with pytest.raises(CheckpointError, match=r"\[1023\].*below 1023"):
        convert(folder, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_a_broken_tokenizer_is_refused(released, tmp_path):
    (released / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_the_image_processors_numbers_are_kept(released, tmp_path):
    (released / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0],
        "crop_size": {"height": 999, "width": 999}, "size": {"shortest_edge": 999},
    }))  # fmt: skip
    processor = UHRBatImageProcessor.from_pretrained(convert(released, tmp_path / "model"))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.crop_size["height"] == 28 and processor.scales == [28, 56] and not processor.mask_padding


# The model card


def test_the_card_has_its_front_matter_and_its_sections(exported):
    data = metadata_load(exported / "README.md")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == "unknown" and data["base_model"] == ["openai/clip-vit-large-patch14-336"]
    assert "remote-sensing" in data["tags"]
    text = (exported / "README.md").read_text(encoding="utf-8")
    for section in ("Quick start", "Budgets", "Results", "Limits", "Citation"):
        assert f"\n## {section}\n" in text
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.S)  # a field that nothing filled in
    assert "| threshold (eq. 9) | importance ≥ mean | importance > mean | importance > mean |" in text


def test_licence_and_base_model_are_taken_from_the_checkpoints_card_or_the_command(released, tmp_path):
    (released / "README.md").write_text("---\nlicense: mit\nbase_model: some/model\n---\n# Card\n")
    data = metadata_load(convert(released, tmp_path / "a") / "README.md")
    assert (data["license"], data["base_model"]) == ("mit", ["some/model"])
    data = metadata_load(convert(released, tmp_path / "b", license="apache-2.0", base_model="other/one") / "README.md")
    assert (data["license"], data["base_model"]) == ("apache-2.0", ["other/one"])


# Hostile input


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("how", ["zip", "old", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    folder = write_released(tmp_path / "released", how="bin")
    tensors = {"model.norm.weight": torch.ones(2), "model.embed_tokens.weight": Bomb()}
    if how == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"released/pytorch_model.bin: refused") as error:
        convert(folder, tmp_path / "model")
    if how != "old":
        assert re.search(r"(posix|nt).system in entry 'model.embed_tokens.weight'", str(error.value))
    assert not (tmp_path / "exploded").exists() and nothing_was_made(tmp_path / "model")


def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path):
    folder = write_released(tmp_path / "released", how="bin")
    for content, message in [([1, 2], "a list"), ({"model.norm.weight": {"a": 1}}, "'model.norm.weight' is a dict")]:
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{message}"):
            convert(folder, tmp_path / "model")


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_truncated_safetensors_shard_is_refused(tmp_path, kept):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: .*truncated") as error:
        convert(folder, tmp_path / "model")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(f"'{name}'" in str(error.value) for name, file in names.items() if file == shard.name)


def test_a_truncated_pytorch_shard_is_refused(tmp_path):
    folder = write_released(tmp_path / "released", how="bin shards index")
    shard = folder / "pytorch_model-00003-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:20_000])
    first = list(released_tensors())[2]
    with pytest.raises(CheckpointError, match=rf"pytorch_model-00003-of-00003.bin: .*truncated.*'{first}'"):
        convert(folder, tmp_path / "model")


OUTSIDE = ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..\\x.bin", "..", "", "x.py", 5]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, shard):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json.*'lm_head.weight'.*not the name of a weight file"):
        convert(folder, tmp_path / "model")


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="index.json: puts tensor '.*'model-00003-of-00003.safetensors', but"):
        convert(folder, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        convert(folder, tmp_path / "model")


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.nowhere"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors: the index.*model.nowhere"):
        convert(folder, tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[1]", '{"weight_map": []}'])
def test_a_broken_index_is_refused(released, tmp_path, content):
    (released / "model.safetensors").unlink()
    (released / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
        convert(released, tmp_path / "model")


def test_folders_without_weights_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        convert(tmp_path / "empty", tmp_path / "model")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--merge-adapter"):
        convert(tmp_path / "empty", tmp_path / "model")
    (tmp_path / "parts" / "global_step2").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="consolidate"):
        convert(tmp_path / "parts", tmp_path / "model")


# Whole or not at all


def test_an_output_that_is_there_is_left_alone(released, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(released, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    load_clean(convert(released, output))


@pytest.mark.parametrize("step", ["write_weights", "check_weights", "write_model_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(released, tmp_path, monkeypatch, step, error):
    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    original = getattr(convert_checkpoint, step)
    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, step, interrupted)
        with pytest.raises(error):
            convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")
    load_clean(convert(released, tmp_path / "model"))


def test_a_run_that_is_killed_leaves_a_folder_that_does_not_load_and_is_removed_by_the_next(released, tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from export import convert_checkpoint as c\n"
        "c.check_weights = lambda *args: os.kill(os.getpid(), 9)\n"
        "c.convert(*sys.argv[2:])"
    )
    output = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", code, ROOT, released, output], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    left = tmp_path / "model.incomplete"
    assert not output.exists() and (left / "model.safetensors").exists() and not (left / "config.json").exists()
    load_clean(convert(released, output))
    assert not left.exists()


def test_a_shard_that_was_not_written_as_it_is_is_noticed(released, tmp_path, monkeypatch):
    def damage(tensors, path, **kwargs):
        tensors["model.language_model.norm.weight"][0] += 1
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(convert_checkpoint, "save_file", damage)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.language_model.norm.weight'"):
        convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_a_full_disk_is_noticed_before_anything_is_written(released, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="10 bytes are free"):
        convert(released, tmp_path / "model")


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    tensors = with_token_mlp_copy(released_tensors()) | {"model.text_to_vision_proj.weight": torch.ones(2)}
    folder = write_released(tmp_path / "released", tensors)
    convert(folder, tmp_path / "there" / "model", dtype="bfloat16", dry_run=True)
    assert not (tmp_path / "there").exists()
    lines = capsys.readouterr().out.splitlines()
    for pattern in [
        r"cast to bfloat16 +float32 +\[1024, 32\] +model.embed_tokens.weight +model.language_model.embed_tokens.weight",
        r"same as model.multiscale_token_mlp.0.bias +float32 +\[32\] +multiscale_token_mlp.0.bias +-",
        r"drop +float32 +\[2\] +model.text_to_vision_proj.weight +-",
    ]:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


# The command line, the Hub


@pytest.mark.parametrize("command", [["export/convert_checkpoint.py"], ["-m", "export.convert_checkpoint"]])
def test_the_command_runs_in_a_clone_that_is_not_installed(released, tmp_path, command):
    # Whatever the clone is called, and whatever `uhr_bat` is installed: the code is that of the clone.
    clone = tmp_path / "UHR-BAT"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "model.safetensors", "tests", "build"))
    (tmp_path / "installed" / "uhr_bat").mkdir(parents=True)
    (tmp_path / "installed" / "uhr_bat" / "__init__.py").write_text("raise ImportError('the installed one')")
    path = os.pathsep.join(filter(None, [str(tmp_path / "installed"), os.environ.get("PYTHONPATH")]))

    def run(checkpoint):
        arguments = [*command, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "model")]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=clone, env=environment)

    done = run(released)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and "Writing: 100%" in done.stderr and "Checking: 100%" in done.stderr
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    refused = run(tmp_path / "empty")  # raised in one file and caught in another: one class of error
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


def test_a_checkpoint_of_the_hub_is_fetched_without_code(released, tmp_path, monkeypatch):
    calls = []

    def fetch(repository, **kwargs):
        calls.append((repository, kwargs))
        return str(released)

    monkeypatch.setattr(convert_checkpoint, "snapshot_download", fetch)
    output = convert("someone/some-model", tmp_path / "model")
    assert [repository for repository, _ in calls] == ["someone/some-model"]
    assert not [pattern for _, kwargs in calls for pattern in kwargs["allow_patterns"] if "py" in pattern]
    assert metadata_load(output / "README.md")["base_model"] == ["someone/some-model"]


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no/where: neither a folder nor a repository"):
        convert("no/where", tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    """Uploads instead of a network: a list of (repository, {path in the repository: bytes})."""
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        uploads.append((repo_id, files))

    def create_commit(self, repo_id, operations, **kwargs):
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        uploads.append((repo_id, files))
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        module = importlib.import_module(module)
        for name, stand_in in (("create_repo", lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)),
                               ("create_commit", lambda **kwargs: create_commit(None, **kwargs))):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return uploads


def test_the_finished_folder_is_pushed_whole(released, tmp_path, hub):
    output = convert(released, tmp_path / "model", push_to_hub="someone/UHR-BAT")
    ((repository, files),) = hub
    assert repository == "someone/UHR-BAT"
    assert files == {path.name: path.read_bytes() for path in output.iterdir()}
    assert b'model_id = "someone/UHR-BAT"' in files["README.md"]


def test_a_push_that_fails_leaves_the_folder(released, tmp_path, hub, monkeypatch):
    def refuse(self, **kwargs):
        raise OSError("no token")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(CheckpointError, match="complete, but could not be pushed.*no token"):
        convert(released, tmp_path / "model", push_to_hub="someone/UHR-BAT")
    load_clean(tmp_path / "model")


# Checkpoints of this project's own


def question():
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": prompt(7, "image", 11, 12), "pixel_values": torch.randn(1, 14, 3, 8, 8, generator=generator)}


LOGITS_OF_A_FOLDER = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, inputs, wanted = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)
assert not any(report.values()), report
with torch.no_grad():
    logits = model.eval()(**torch.load(inputs, weights_only=True)).logits
torch.testing.assert_close(logits, torch.load(wanted, weights_only=True), rtol=0, atol=1e-5)
print("equal")
"""


def train_two_steps(model, folder):
    """Two steps of the library's Trainer, with images; the folder of its checkpoint."""
    generator = torch.Generator().manual_seed(1)
    ids = prompt(7, "image", 11, 12, 20, 21)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100)
    data = [
        {"input_ids": ids[0], "labels": labels[0], "pixel_values": torch.randn(14, 3, 8, 8, generator=generator)}
        for _ in range(2)
    ]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[], save_steps=2,
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return folder / "checkpoint-2"


def assert_same_logits(model, folder, tmp_path):
    """The folder's model, in a new process without a network, gives the logits of `model`."""
    with torch.no_grad():
        wanted = model.eval()(**question()).logits
    torch.save(question(), tmp_path / "inputs.pt")
    torch.save(wanted, tmp_path / "wanted.pt")
    printed = in_new_process(LOGITS_OF_A_FOLDER, tmp_path, folder, tmp_path / "inputs.pt", tmp_path / "wanted.pt")
    assert printed.strip() == "equal"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model after two steps, checkpoint that the Trainer wrote, weights before)."""
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, train_two_steps(model, tmp_path_factory.mktemp("training")), before


def test_a_fine_tuned_copy_goes_round(trained, tmp_path):
    model, checkpoint, before = trained
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    output = convert(checkpoint, tmp_path / "model", max_shard_size="20KB")
    assert_same_logits(model, output, tmp_path)
    config = UHRBatConfig.from_pretrained(output)
    assert (config.threshold, config.scale_embedding_form, config.budgets) == ("ge", "factorized", [2, 5, 7])


@pytest.mark.parametrize("flat", [False, True])
def test_consolidated_weights_of_several_processes_go_round(trained, tmp_path, flat):
    """FSDP and ZeRO leave the same names in `pytorch_model.bin`; some hold the vision tower one level higher."""
    model, checkpoint, _ = trained
    folder = tmp_path / "consolidated"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = model.state_dict()
    if flat:
        weights = {name.replace("vision_tower.vision_model.", "vision_tower."): one for name, one in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    exported = load_clean(convert(folder, tmp_path / "model"))
    assert torch.equal(exported(**question()).logits, model.eval()(**question()).logits)


def test_an_own_checkpoint_is_held_to_its_configuration(trained, tmp_path):
    _, checkpoint, _ = trained
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.scale_embedding.table"
    save_file({**weights, name: weights[name][:, :2].contiguous(), "more": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.scale_embedding.table' has the shape") as error:
        convert(folder, tmp_path / "model")
    assert "model.safetensors: tensor 'more' is unknown" in str(error.value)
    with pytest.raises(CheckpointError, match="--vision-heads"):
        convert(checkpoint, tmp_path / "model", vision_heads=2)


def test_the_exported_copy_can_be_pushed_by_the_library(trained, tmp_path, hub):
    output = convert(trained[1], tmp_path / "model")
    model = load_clean(output)
    model.push_to_hub("someone/tuned")
    files = {name for _, uploaded in hub for name in uploaded}
    assert files >= {"config.json", "model.safetensors", "modeling_uhr_bat.py", "configuration_uhr_bat.py"}
    assert {repository for repository, _ in hub} == {"someone/tuned"}


def test_uhr_bat_tiny_exports_to_an_equal_copy(model_folder, tmp_path):
    output = convert(model_folder, tmp_path / "model")
    expected, written = weights_of(model_folder), weights_of(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert {path.name for path in output.iterdir()} >= {path.name for path in model_folder.iterdir()}
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"):
        assert same_json(output / name, model_folder / name), name
    assert (output / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()
    assert (output / "chat_template.jinja").read_bytes() == (model_folder / "chat_template.jinja").read_bytes()
    model, processor = load_clean(output), AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert processor.image_token_id == model.config.image_token_index
    assert processor.default_budgets == model.config.budgets


def test_a_tokenizer_with_another_image_token_is_refused(model_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 5}))
    with pytest.raises(CheckpointError, match=r"\[1023\].*\[5\]"):
        convert(folder, tmp_path / "model")


# LoRA


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(merged model, base checkpoint, adapter folder) after two steps with LoRA."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    small_model().save_pretrained(folder / "base")
    model = UHRBatForConditionalGeneration.from_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(model, settings)
    adapter = train_two_steps(model, folder / "training")
    return model.merge_and_unload(), folder / "base", adapter


def test_an_adapter_is_merged_and_goes_round(adapted, tmp_path):
    merged, base, adapter = adapted
    output = convert(base, tmp_path / "model", merge_adapter=adapter)
    weights, original = weights_of(output), load_file(base / "model.safetensors")
    changed = [name for name in original if not torch.equal(original[name], weights[name])]
    assert any("q_proj" in name for name in changed) and any("multi_modal_projector" in name for name in changed)
    assert_same_logits(merged, output, tmp_path)


def test_an_adapter_names_its_base_model(adapted, tmp_path):
    merged, base, adapter = adapted
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    exported = load_clean(convert(adapter, tmp_path / "model", merge_adapter=True))
    torch.testing.assert_close(exported(**question()).logits, merged.eval()(**question()).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_is_damaged_or_incomplete_is_refused(adapted, tmp_path):
    _, base, adapter = adapted
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.raises(CheckpointError, match="adapter: cannot be merged"):
        convert(base, tmp_path / "model", merge_adapter=folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter: cannot be merged.*missing adapter keys"):
        convert(base, tmp_path / "model", merge_adapter=folder)
    assert nothing_was_made(tmp_path / "model")


def test_an_adapter_that_names_no_base_model_asks_for_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no base model"):
        convert(tmp_path, tmp_path / "model", merge_adapter=True)


def test_merging_without_peft_says_what_to_install(trained, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r'pip install "uhr-bat\[train\]"'):
        convert(trained[1], tmp_path / "model", merge_adapter=tmp_path / "adapter")
    assert nothing_was_made(tmp_path / "model")


# Memory


MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
from export.convert_checkpoint import main
main(sys.argv[2:])
# The peak of this program alone; what getrusage tells includes the process that started it.
print("peak", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def large_tensors(num_layers):
    """(released name, shape) of a decoder 1024 wide, 30 MB a layer in bfloat16, beside the small tower."""
    width, wide = 1024, 4096
    for name, tensor in released_tensors().items():
        shape = [width if size == WIDTH else size for size in tensor.shape]
        if not name.startswith("model.layers."):
            yield name, list(tensor.shape) if name.startswith(VISION) else shape
    for layer in (f"model.layers.{idx}." for idx in range(num_layers)):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{layer}self_attn.{name}.weight", [width, width]
            yield f"{layer}self_attn.{name}.bias", [width]
        yield f"{layer}self_attn.o_proj.weight", [width, width]
        yield f"{layer}mlp.gate_proj.weight", [wide, width]
        yield f"{layer}mlp.up_proj.weight", [wide, width]
        yield f"{layer}mlp.down_proj.weight", [width, wide]
        yield from ((f"{layer}{name}_layernorm.weight", [width]) for name in ("input", "post_attention"))


def write_large(folder, num_bytes, shard_bytes, kind):
    folder.mkdir()
    noise = torch.randn(2**23).bfloat16()
    generator = torch.Generator().manual_seed(0)
    weight_map, shard, size, number, total = {}, {}, 0, 0, 0
    num_layers = num_bytes // (2 * (4 * 1024**2 + 3 * 4096 * 1024))

    def write():
        file = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{number:05}.{kind}"
        weight_map.update(dict.fromkeys(shard, file))
        (save_file if kind == "safetensors" else torch.save)(shard, folder / file)

    for name, shape in large_tensors(num_layers):
        start = int(torch.randint(2**21, (), generator=generator))
        shard[name] = noise[start : start + torch.Size(shape).numel()].view(shape).clone()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size > shard_bytes:
            write()
            shard, size, number = {}, 0, number + 1
    write()
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": num_layers, "num_key_value_heads": 4}
    config = released_config(**sizes)
    (folder / "config.json").write_text(json.dumps(config))
    return total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind, sharded, dtype", [("safetensors", True, "auto"), ("bin", False, "float16")])
def test_memory_holds_two_shards_and_no_more(tmp_path, kind, sharded, dtype):
    shard = 100_000_000
    total = write_large(tmp_path / "released", 1_000_000_000, shard if sharded else 2e9, kind)
    assert total > 0.95e9
    arguments = ["--checkpoint", tmp_path / "released", "--output", tmp_path / "model", "--max-shard-size", "100MB"]
    printed = in_new_process(MEASURED, tmp_path, ROOT, *arguments, "--dtype", dtype)
    peak = int(printed.split()[-1]) * 1024
    shutil.rmtree(tmp_path / "released"), shutil.rmtree(tmp_path / "model")
    assert peak < 2 * shard + 1e9, f"{peak:,} bytes"


# The 7B folder


def test_the_7b_folder_is_what_is_written_for_it(tmp_path):
    model_folder.write_7b(tmp_path)
    kept = ROOT / "export" / "uhr_bat_7b"
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for path in kept.iterdir():
        assert same_json(path, tmp_path / path.name), path.name


def test_the_7b_folder_holds_the_papers_numbers_and_makes_a_model(tmp_path):
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (28, 3584, 152064)
    assert (text.num_attention_heads, text.num_key_value_heads, text.intermediate_size) == (28, 4, 18944)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size, vision.patch_size) == (24, 1024, 336, 14)
    assert config.scales == [672, 1344, 2688, 4032] and config.budgets == [80, 320, 600, 2000]
    assert (config.num_regions, config.threshold, config.question_tokens) == (600, "ge", "all")
    assert (config.scale_embedding_form, config.token_mlp) == ("factorized", False)
    model = convert_checkpoint.meta_model(config)
    assert 7.9e9 < sum(parameter.numel() for parameter in model.parameters()) < 8e9


def test_the_7b_folder_loads_with_the_code_beside_it(tmp_path):
    shutil.copytree(ROOT / "export" / "uhr_bat_7b", tmp_path / "model")
    model_folder.write_code(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "UHRBatForConditionalGeneration" and model.lm_head.weight.shape == (152064, 3584)
    processor = UHRBatImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.scales == config.scales and processor.crop_size["height"] == 336
