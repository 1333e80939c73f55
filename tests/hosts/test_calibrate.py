"""`uhr-bat calibrate`: the layer that looks at what is asked about, found on made-up scenes and kept for loading."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from hosts_tiny import save_family
from hub_cache import REVISION, put
from huggingface_hub import constants
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from uhr_bat import cli, load_model
from uhr_bat.common.asking import encode, write_prompt
from uhr_bat.common.measured import keep_measured, measured_settings
from uhr_bat.evaluation import calibrate
from uhr_bat.scenes.layout import SITE_SIDE, VALIDATION_SEEDS, WIDTH, make_scene

TILE = ["--set", "tile=128"]
LAYER = 2


def paint(scene):
    """White squares where sites are, on black."""
    scale = 256 / WIDTH
    image = Image.new("RGB", (256, round(scene.height * scale)))
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * SITE_SIDE / 2
    for site in scene.sites:
        ImageDraw.Draw(image).polygon([tuple(scale * point) for point in site.placed(corners)], fill="white")
    return image


@torch.no_grad()
def make_look(folder, layer):
    """Changes one layer of a random model, so that every token there looks at what is white."""
    processor, model = load_model(folder, tile=128, check=False)
    attention, inputs, shown = model.attention_of(layer), [], []
    hook = attention.k_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for seed in VALIDATION_SEEDS[:3]:
        (image,) = encode(model, processor.image_processor(paint(make_scene(seed)), max_tiles=9, return_tensors="pt"))
        ids = write_prompt(processor, "How many?")["input_ids"][0]
        model.read_attention(ids, image.anchor_tokens, [image.anchor_places], layer=max(model.attention))
        start = int((ids == model.image_token_id).nonzero())
        inputs[-1] = inputs[-1][start : start + len(image.anchor_tokens)]
        (question, *_) = calibrate._questions(make_scene(seed))
        everything = question.__class__(**{**vars(question), "sites": tuple(range(len(make_scene(seed).sites)))})
        shown.append(torch.from_numpy(calibrate.targets_of(make_scene(seed), everything, image)["sites"]).float())
    hook.remove()
    rows, wanted = torch.cat(inputs), torch.cat(shown)
    rows = torch.cat((rows, torch.ones(len(rows), 1)), dim=1)
    weights = torch.linalg.lstsq(rows.T @ rows + 0.1 * torch.eye(rows.shape[1]), rows.T @ wanted).solution[:-1]
    # The pair of the slowest rotation: places hardly change it.
    query, key = (part.weight.view(-1, 8, part.weight.shape[1]) for part in (attention.q_proj, attention.k_proj))
    query.zero_(), key.zero_(), attention.q_proj.bias.zero_(), attention.k_proj.bias.zero_()
    attention.q_proj.bias.view(-1, 8)[:, 3] = 10 * 8**0.5
    key[:, 3] = weights
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    """A folder of a random model whose layer `LAYER` looks at white sites."""
    return make_look(save_family("qwen2_5_vl", tmp_path_factory.mktemp("looking") / "model"), LAYER)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The user's file of measured settings, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "paint", paint)
    return tmp_path / "cache/uhr_bat/hosts.json"


def run(*arguments) -> int:
    return cli.main(["calibrate", *map(str, arguments)])


def test_the_layer_that_looks_is_found_kept_and_loaded(looking, kept, tmp_path, capsys):
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"org/other": {"look": 0.5}}))
    assert run("--model", looking, "--scenes", 5, "--output", tmp_path / "out", *TILE) == 0
    printed = capsys.readouterr()
    assert f"By attention: layer {LAYER}, with " in printed.out
    assert "Looking" in printed.err
    result = json.loads((tmp_path / "out/calibrate.json").read_text())
    sites = [{form: row[form]["sites"] for form in calibrate.FORMS} for row in result["layers"]]
    assert result["picked"]["attention"]["sure"] > 0.9 and len(sites[0]["attention"]["groups"]["recall"]) == 2
    times = [of_layer["attention"]["times"] for of_layer in sites]
    assert times[LAYER] > 2 * max(times[:LAYER] + times[LAYER + 1 :])
    # It looks at all sites, whatever is asked, which cancels.
    assert sites[LAYER]["relative attention"]["times"] == pytest.approx(1, abs=0.1)
    assert result["picked"]["relative attention"]["layer"] != LAYER
    assert f"| {LAYER} | " in (tmp_path / "out/calibrate.md").read_text() and (tmp_path / "out/calibrate.png").is_file()
    found = json.loads(kept.read_text())
    assert found["org/other"] == {"look": 0.5}
    measured = {"measured_on": "qwen2_5_vl, 4 layers of 32"}
    assert found[str(looking)] == {"look": pytest.approx(2 / 3), "relative_attention": False, **measured}
    assert load_model(looking, check=False)[1].config.importance_layer == LAYER


def test_a_model_that_looks_nowhere_keeps_its_defaults(host_folder, kept, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "paint", lambda scene: Image.new("RGB", paint(scene).size, "gray"))
    keep_measured(host_folder("internvl"), {"look": 0.5})
    before = kept.read_bytes()
    assert run("--model", host_folder("internvl"), "--scenes", 4) == 0
    printed = capsys.readouterr().out
    assert "By attention: no layer looks at the sites more than" in printed
    assert "Nothing is kept. What was kept before stays: look 0.5." in printed and kept.read_bytes() == before


def test_the_best_of_many_layers_that_look_anywhere_is_not_taken_for_one_that_looks():
    rng, taken = np.random.default_rng(5), 0
    for _ in range(5):
        scenes, chance = np.repeat(np.arange(20), 6), {"share": 0.1, "recall": 0.1}
        drawn = {key: rng.normal(0.1, 0.1, (120, 36, 2, 2)) for key in product(calibrate.FORMS, calibrate.TARGETS)}
        found = {"layers": list(range(36)), "scenes": scenes, "figures": drawn}
        picked = calibrate.summarise(found | {"chance": dict.fromkeys(calibrate.TARGETS, [chance])})["picked"]
        taken += picked["attention"]["looks"]
    assert taken <= 1


@pytest.mark.parametrize("num_scenes, least, most, text", [
    (2, 0.4, 0.6, r"% of the resampled sets of 2 scenes"), (40, 1, 1, r"100.0 [91.2, 100.0] % of the resampled sets of 40 scenes"),
])  # fmt: skip
def test_how_sure_a_layer_is_says_how_few_the_scenes_are(num_scenes, least, most, text):
    """Layer 1 is the best by far in every scene."""
    figures = np.full((6 * num_scenes, 3, 2, 2), 0.2)
    figures[:, 1] = 0.9
    chance = dict.fromkeys(calibrate.TARGETS, [{"share": 0.1, "recall": 0.1}])
    found = {"layers": [0, 1, 2], "scenes": np.repeat(np.arange(num_scenes), 6), "chance": chance}
    found["figures"] = dict.fromkeys(product(calibrate.FORMS, calibrate.TARGETS), figures)
    picked = calibrate.summarise(found)["picked"]["attention"]
    assert picked["layer"] == 1 and least <= picked["sure"] <= most and text in calibrate.tell(picked, num_scenes)


def test_attention_that_is_no_number_is_an_error_and_no_figure(loaded, kept, monkeypatch):
    processor, model = loaded("internvl")
    monkeypatch.setattr(model, "looks", lambda prompts, *_: [torch.ones(2, 2, 16), torch.full((2, 2, 16), torch.nan)])
    with pytest.raises(ValueError, match="The attention of layer 1 holds what is no number, in torch.float32"):
        calibrate.measure(processor, model, VALIDATION_SEEDS[:1])


def test_what_was_measured_on_another_model_in_the_same_folder_is_not_taken(host_folder, kept):
    folder = host_folder("internvl")
    keep_measured(folder, {"look": 0.5}, "qwen3_vl, 28 layers of 2048")
    with pytest.warns(
        UserWarning, match="measured on another model .qwen3_vl, 28 layers of 2048, now internvl, 4 layers"
    ):
        assert measured_settings(folder) == {}
    keep_measured(folder, {"relative_attention": True}, "internvl, 4 layers of 32")
    assert measured_settings(folder) == {"relative_attention": True}


def test_what_was_measured_is_found_where_the_weights_were_copied_and_not_where_others_were_put(host_folder, kept, tmp_path):
    copied, form = shutil.copytree(host_folder("internvl"), tmp_path / "copied"), "internvl, 4 layers of 32"
    keep_measured(host_folder("internvl"), {"look": 0.5}, form)
    assert measured_settings(copied) == {"look": 0.5}
    keep_measured(copied, {"look": 1.0}, form)
    assert (measured_settings(copied), measured_settings(host_folder("internvl"))) == ({"look": 1.0}, {"look": 0.5})
    weights = load_file(copied / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, copied / "model.safetensors")
    with pytest.warns(UserWarning, match="for .*copied was measured on another model .*, weights .*, now weights "):
        assert measured_settings(copied) == {}


@pytest.mark.slow
def test_of_our_own_model_the_layer_that_was_trained_is_found_and_nothing_is_kept(kept, monkeypatch, capsys):
    monkeypatch.undo()
    assert run("--scenes", 6) == 0
    printed = capsys.readouterr().out
    assert (
        "By attention: layer 1, with " in printed
        and "Nothing is kept: `importance_layer` of config.json is 1." in printed
    )
    assert run("--scenes", 6, "--set", "importance_layer=3") == 0
    assert "`importance_layer` of config.json is 3: write 1 there" in capsys.readouterr().out


def test_a_run_that_is_ended_keeps_what_was_there(looking, kept, monkeypatch):
    keep_measured(looking, {"look": 0.1})
    before = kept.read_bytes()
    calls, looks = [], calibrate.looks_of

    def ended(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return looks(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "looks_of", ended)
        assert run("--model", looking, "--scenes", 4, *TILE) == 130
    monkeypatch.setattr("uhr_bat.common.measured.write_json", lambda path, value: path.write_text("{") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep_measured(looking, {"look": 0.9})
    assert kept.read_bytes() == before and [path.name for path in kept.parent.iterdir()] == ["hosts.json"]


def test_many_at_once_lose_nothing_of_each_other(kept):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keep_measured(f"/models/{number % 10}", {"look": 0.5, "levels": 3}), range(40)))
    assert len(json.loads(kept.read_text())) == 10


def test_a_revision_of_a_repository_is_measured_apart(looking, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put(tmp_path / "hub", "org/model", looking)
    assert run("--model", f"org/model@{REVISION}", "--scenes", 4, *TILE) == 0
    assert list(json.loads(kept.read_text())) == [f"org/model@{REVISION}"]
    assert load_model("org/model", check=False)[1].config.importance_layer == LAYER
    snapshot = tmp_path / "hub/models--org--model/snapshots"
    assert measured_settings(snapshot / REVISION)["look"] == pytest.approx(2 / 3)
    assert measured_settings(snapshot / ("9" * 40)) == {}


@pytest.mark.parametrize("text, why", [
    ("{", "JSONDecodeError"), ("[1]", "AttributeError"), ('{"weights": []}', "AttributeError"), ('{"org/model": {"loook": 1}}', "org/model has no setting loook"),
    ('{"org/model": {"look": 7}}', "above 0 and at most 1. Got 7"), ('{"org/model": 3}', "TypeError"),
])  # fmt: skip
def test_a_broken_file_of_settings_is_refused_by_name_and_left_as_it_is(text, why, host_folder, kept, capsys):
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    assert run("--model", host_folder("internvl")) == 2
    said = capsys.readouterr().err
    assert f"{kept}: these are no measured settings" in said and why in said and "Looking" not in said
    with pytest.raises(ValueError, match=re.escape(f"{kept}: these are no measured settings")):
        load_model(host_folder("internvl"), check=False)
    assert kept.read_text() == text


@pytest.mark.parametrize("arguments, message", [
    (["--model", "org/nothing"], "org/nothing: there is no such folder here"),
    (["--scenes", "1"], "--scenes must be at least 2"),
    (["--model", "{internvl}", "--set", "lok=1"], "A host has no setting lok"),
    (["--set", "importance_source=region_focus", "--set", 'region_focus={"layers": [0, 1]}'], "Pass --set importance_source=decoder"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_the_work(arguments, message, host_folder, kept, capsys):
    assert run(*(part.replace("{internvl}", str(host_folder("internvl"))) for part in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and "Looking" not in said and not kept.exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(host_folder, kept, capsys):
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    kept.chmod(0o444)
    assert run("--model", host_folder("internvl")) == 2
    said = capsys.readouterr().err
    assert (
        f"{kept}: the file of measured settings would write over a file that is protected" in said
        and "Looking" not in said
    )
