"""Every command with a model of another family: by its folder, and by its name on the Hub, without a network."""

import io
import json
import shutil

import pytest
from hub_cache import REVISION, put
from huggingface_hub import constants
from images import random_image
from uhr_bat import cli, load_model
from uhr_bat.common.loading import load_processor
from uhr_bat.serving import batch

SMALL = ["--set", "levels=2", "--set", "refinement=16"]


@pytest.fixture
def on_hub(host_folder, tmp_path, monkeypatch):
    """family -> its name on the Hub, whose cache has it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def name(family, folder=None):
        put(tmp_path / "hub", f"org/{family}", folder or host_folder(family))
        return f"org/{family}"

    return name


@pytest.fixture
def image(tmp_path):
    random_image(150, 200).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def run(*arguments) -> int:
    return cli.main([str(one) for one in arguments])


def test_a_processor_is_known_before_the_weights_and_is_the_models(family, host_folder, loaded):
    processor, _ = loaded(family, levels=2)
    settings = {key: value for key, value in (("tile", processor.image_processor.crop_size["height"]), ("levels", 2))}
    first = load_processor(host_folder(family), settings)
    assert first.image_processor.to_dict() == processor.image_processor.to_dict()
    assert (first.chat_template, first.default_budgets) == (processor.chat_template, processor.default_budgets)


@pytest.mark.parametrize("settings, message", [
    (["--set", "bogus=1"], "A host has no setting bogus. It has anchor, budgets,"),
    (["--set", "look=2"], "`look` is a share of the decoder's depth, above 0 and at most 1. Got 2"),
    (["--set", "levels=many"], "`levels` is no str. Got 'many'"),
    (["--set", "places=circle"], "`places` is one of grid, levels, rectangle. Got 'circle'"),
    (["--set", "selector=best"], "`selector` is one of preserve_and_merge, distinct, top_k, uniform"),
    (["--set", "importance_layer=9"], "Layer 9 cannot be looked at: those with full attention are 0, 1, 2, 3."),
    (["--set", "num_regions=many"], "num_regions"),
    (["--set", "coord_weight=NaN"], "`coord_weight` is a number that is not negative. Got nan."),
    (["--set", "scales=[]"], "`scales` is empty"),
    (["--set", "scales=none"], "`scales` are sides of levels in pixels, as [448, 896]. Got None."),
    (["--set", "levels=40"], "`levels` must be at most 12. Got 40."),
    (["--set", "anchor=99"], "The coarsest level has 156816 rows, but the context window holds 8192 tokens"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_in_one_line_before_weights_are_read(
    host_folder, image, capsys, settings, message
):
    assert run("ask", image, "How many?", "--model", host_folder("internvl"), *settings) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and "Loading weights" not in said


@pytest.mark.slow
def test_ask_and_evidence_map_spend_the_budget(host_folder, on_hub, image, tmp_path, capsys):
    for model in (host_folder("gemma3"), on_hub("qwen3_vl")):
        options = ["--model", model, "--budgets", "20", "--max-new-tokens", "2", *SMALL]
        assert run("ask", image, "How many ships?", *options) == 0
        printed = capsys.readouterr().out
        rows = [line.split() for line in printed.splitlines()]
        assert next(row for row in rows if row[:1] == ["all"])[-2:] == ["20", "20"] and "Answer: " in printed
        assert run("evidence-map", image, "How many?", *options, "--geojson", tmp_path / "kept.geojson") == 0
        assert len(json.loads((tmp_path / "kept.geojson").read_text())["features"]) == 20


@pytest.mark.slow
def test_pictures_are_drawn_of_the_tiles_that_were_looked_at(on_hub, image, tmp_path):
    model = on_hub("smolvlm")
    options = ["--output", tmp_path / "out", "--width", "600", "--model", model, *SMALL]
    assert run("pictures", image, "How many?", "--budgets", "12", *options) == 0
    drawn = [path.stem for path in sorted((tmp_path / "out").iterdir())]
    assert drawn == ["attention", "budgets", "kept", "pruning", "regions"]


def test_a_plan_counts_the_configuration_alone(on_hub, capsys):
    options = ["--image-size", "3000x2000", "--tokens", "20", "--device", "cuda", "--set", "levels=2"]
    assert run("plan", on_hub("internvl"), *options) == 0
    assert capsys.readouterr().out.startswith("org/internvl, 3,000 x 2,000 px")


@pytest.mark.slow
def test_a_run_names_model_revision_and_settings_and_is_compared_with_another_models(
    host_folder, on_hub, tmp_path, capsys
):
    runs = tmp_path / "a", tmp_path / "b"
    model = on_hub("internvl")
    ask = ["evaluate", "scenes", "--limit", "1", "--max-new-tokens", "2", *SMALL, "--budgets", "16"]
    assert run(*ask, "--model", model, "--output", runs[0]) == 0
    settings = json.loads((runs[0] / "settings.json").read_text())
    told = {name: settings[name] for name in ("model", "revision", "model_settings")}
    assert told == {"model": "org/internvl", "revision": REVISION, "model_settings": {"levels": 2, "refinement": 16}}
    assert (
        f"Model org/internvl@{REVISION} (levels=2, refinement=16), 16 visual tokens"
        in (runs[0] / "figures.md").read_text()
    )
    capsys.readouterr()
    assert run(*ask, "--model", model, "--output", runs[0], "--set", "levels=3") == 2
    assert "holds a run with model_settings {'levels': 2" in capsys.readouterr().err
    assert run(*ask, "--model", host_folder("llava"), "--output", runs[1], "--max-tiles", "3", "--native") == 0
    capsys.readouterr()
    assert run("compare", *runs) == 0
    printed = capsys.readouterr().out
    assert f"org/internvl@{REVISION}" in printed and str(host_folder("llava")) in printed


@pytest.mark.slow
@pytest.mark.parametrize("act", ["recall", "partitions"])
def test_evidence_is_measured(act, on_hub, host_folder, tmp_path, capsys):
    arguments = {
        "recall": ["scenes", "--limit", "1", "--fractions", "0.1", "--methods", "distinct", "uniform"],
        "partitions": ["--size", "150", "100", "--questions", "1", "--methods", "grid", "--factors", "1", "--clusters"],
    }[act]
    model = on_hub("llava_onevision") if act != "partitions" else host_folder("internvl")
    out = tmp_path / "out"
    done = run("evidence", act, *arguments, "--model", model, "--output", out, *SMALL)
    assert done == 0, capsys.readouterr().err
    (path,) = out.glob("*.md")
    assert act == "partitions" or f"org/llava_onevision@{REVISION}" in path.read_text()


@pytest.mark.slow
def test_a_worker_of_a_batch_loads_it_by_name_and_revision(on_hub, image):
    settings = {"model": on_hub("mistral3"), "revision": REVISION, "model_settings": {"levels": 2, "tile": 32}}
    worker = batch.Worker({**settings, "budgets": 12, "max_new_tokens": 2, "reading": {"max_tiles": 3}}, 2, None)
    rows = [{"question": "How many ships?"}]
    worker.answer_all(image, rows)
    assert rows[0]["visual_tokens"] == 12 and isinstance(rows[0]["answer"], str)


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_of_a_model_on_the_hub(host_folder, on_hub, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base, ids = on_hub("internvl"), torch.arange(20, 40)[None]
    model = AutoModelForImageTextToText.from_pretrained(host_folder("internvl"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = on_hub("lora", tmp_path / "adapter")
    expected = adapted.eval()(input_ids=ids).logits
    for place in (adapter, tmp_path / "adapter"):
        _, loaded = load_model(place, device_map=None)
        torch.testing.assert_close(loaded.host(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_weights_in_pickles_and_weights_that_lack_a_tensor_are_refused(host_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(host_folder("llava"), tmp_path / "llava")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "q_proj" not in name or "layers.1." not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack 3 tensors of the model, as model\..*layers\.1\..*q_proj"):
        load_model(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="Pickles as pytorch_model.bin may run code and are not opened"):
        load_model(folder)


def test_a_class_that_a_folder_brings_along_is_never_asked_about(host_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    folder = shutil.copytree(host_folder("internvl"), tmp_path / "internvl")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
    path = folder / "preprocessor_config.json"
    own = {"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, message", [
    ({"model_type": None}, "`model_type` is a text. Got None"),
    ({"text_config": "x"}, "this model cannot be read"),
    ({"image_token_id": 99999}, "this model cannot be read"),
])  # fmt: skip
def test_a_configuration_that_is_none_is_refused_in_one_line(host_folder, tmp_path, capsys, image, change, message):
    folder = shutil.copytree(host_folder("internvl"), tmp_path / "internvl")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert run("ask", image, "How many?", "--model", folder) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages.__class__.__mro__ }}", "{% if %}"])
def test_a_chat_template_that_fails_is_told_in_one_line(host_folder, tmp_path, capsys, image, template):
    folder = shutil.copytree(host_folder("internvl"), tmp_path / "internvl")
    (folder / "chat_template.jinja").write_text(template)
    assert run("ask", image, "How many?", "--model", folder, *SMALL) == 2
    assert "The chat template of this model refuses these messages (" in capsys.readouterr().err
