"""The released checkpoint's names and settings, and what they are called here."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    ROWS,
    VISION,
    WIDTH,
    load_clean,
    name_here,
    nothing_was_made,
    released_config,
    released_tensors,
    weights_of,
    with_token_mlp_copy,
    write_released,
)
from uhr_bat.common.loading import ROOT
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export import convert_checkpoint
from uhr_bat.export.checkpoint_files import Checkpoint, CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.export.released_layout import looks_untrained


# Names and numbers


def test_every_tensor_arrives_under_its_new_name(exported):
    tensors = released_tensors()
    written = weights_of(exported)
    assert written.keys() == {name_here(name) for name in tensors}
    assert all(torch.equal(written[name_here(name)], tensor) for name, tensor in tensors.items())


def test_the_configuration_states_the_released_settings(exported):
    config = UHRBatConfig.from_pretrained(exported)
    found = {name: getattr(config, name) for name in vars(UHRBatConfig()) if hasattr(config, name)}
    assert (
        found
        | {
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
        }
        == found
    )
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


# Copies, leftovers, gaps


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


def test_a_tower_without_its_embeddings_is_refused(tmp_path):
    tensors = released_tensors()
    del tensors[f"{VISION}embeddings.position_embedding.weight"]
    with pytest.raises(CheckpointError, match="position_embedding.weight' is missing"):
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model")


# Scale tables that were never trained


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
