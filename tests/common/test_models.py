"""`--model`: a folder, or a name on the Hub, of a model or of an adapter, and how a run names it."""

import json
import os
import socket
from argparse import ArgumentParser
from inspect import signature

import pytest
import torch
from hub_cache import REVISION, put
from huggingface_hub import constants
from safetensors.torch import save_file
from uhr_bat import cli, load_model
from uhr_bat.common.measured import told_as_measured
from uhr_bat.common.models import (
    ROOT,
    add_model_argument,
    base_of,
    find_model,
    hub_name,
    model_name,
    stay_offline,
    told,
    with_revision,
)
from uhr_bat.common.runs import Line, lines_of_run
from uhr_bat.hosts.loading import load_host
from uhr_bat.planning.__main__ import planner_of_folder

NAME = "someone/small-model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache, empty, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def unreachable(monkeypatch):
    """A network on which nobody answers."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        yield


# Which model is meant


def test_a_repository_is_the_snapshot_of_the_cache_and_names_its_revision(cache, model_folder):
    snapshot = put(cache, NAME, model_folder)
    folder = find_model(NAME)
    assert folder == snapshot and hub_name(folder) == (NAME, REVISION) and model_name(folder) == NAME
    assert told(folder, {"look": 0.5}) == {"model": NAME, "revision": REVISION, "model_settings": {"look": 0.5}}
    assert find_model(with_revision(told(folder))) == snapshot
    assert told(ROOT, {}) == {"model": str(ROOT), "revision": None, "model_settings": None} and with_revision(
        told(ROOT)
    ) == str(ROOT)
    assert model_name(ROOT) == "UHR-BAT-Tiny"


def test_an_older_revision_is_found_by_its_name(cache, model_folder):
    old = put(cache, NAME, model_folder, "b" * 40)
    new = put(cache, NAME, model_folder)
    assert find_model(NAME) == new and find_model(f"{NAME}@{'b' * 40}") == old
    with pytest.raises(FileNotFoundError, match=f"no repository of this name, revision {'c' * 40} in the Hub's cache"):
        find_model(f"{NAME}@{'c' * 40}")


def test_a_folder_is_taken_before_a_repository_of_its_name(cache, model_folder, tmp_path, monkeypatch):
    put(cache, NAME, model_folder)
    monkeypatch.chdir(tmp_path)
    mine = tmp_path.joinpath(*NAME.split("/"))
    mine.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="there is no config.json in it. It hides the repository of this name"):
        find_model(NAME)
    for path in model_folder.iterdir():
        (mine / path.name).symlink_to(path)
    assert find_model(NAME).resolve() == mine


@pytest.mark.parametrize("name, message", [
    ("nowhere", "nowhere: this is no model folder, and no name of a model on the Hub, as Qwen/Qwen3-VL-8B-Instruct is one"),
    ("some/where/else", "some/where/else: this is no model folder, and no name"),
    ("../gone/model", "../gone/model: this is no model folder, and no name"),
    (str(ROOT / "config.json"), "config.json: this is no model folder, and no name"),
    (str(ROOT / "docs"), "docs: this is no model folder, there is no config.json in it"),
    ("a..b/c--d", "a..b/c--d: is neither a folder nor a name of the Hub"),
])  # fmt: skip
def test_what_is_neither_a_folder_nor_a_name_is_refused_by_name(cache, name, message):
    with pytest.raises((FileNotFoundError, ValueError)) as refused:
        find_model(name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_the_cache_lacks_is_named_in_one_line_without_a_network(cache, model_folder, monkeypatch):
    with pytest.raises(FileNotFoundError) as refused:
        find_model(NAME)
    said = str(refused.value)
    assert said.startswith(f"{NAME}: there is no such folder here, and no repository of this name in the Hub's cache")
    assert str(cache) in said and "HF_HUB_OFFLINE=1" in said and f"hf download {NAME}" in said and "\n" not in said
    put(cache, NAME, model_folder, leave_out=["model.safetensors"])
    find_model(NAME, weights=False)
    for wanted in (find_model, load_model):
        with pytest.raises(
            FileNotFoundError, match=f"{NAME}: model.safetensors is not in the Hub's cache.*HF_HUB_OFFLINE=1"
        ):
            wanted(NAME)


def test_a_missing_shard_is_named_before_anything_is_loaded(cache, model_folder, tmp_path):
    snapshot = put(cache, NAME, model_folder, leave_out=["model.safetensors"])
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (snapshot / weights["a"]).touch()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002.safetensors \(1 of 2 files\) is not in the Hub's"
    ):
        find_model(NAME)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="mine: there are no weights in it, model.safetensors is missing"):
        find_model(mine)


def test_what_is_cached_works_where_nobody_answers_and_the_rest_is_said_in_one_line(cache, model_folder, unreachable):
    with pytest.raises(FileNotFoundError) as refused:
        find_model(NAME)
    said = str(refused.value)
    assert "not" not in said.split(":")[0] and "the Hub cannot be reached (" in said and "\n" not in said
    snapshot = put(cache, NAME, model_folder, leave_out=["model.safetensors"])
    assert find_model(NAME, weights=False) == snapshot
    with pytest.raises(
        FileNotFoundError, match="model.safetensors is not in the Hub's cache .*; the Hub cannot be reached"
    ):
        find_model(NAME)
    (snapshot / "model.safetensors").symlink_to(model_folder / "model.safetensors")
    assert find_model(NAME) == snapshot


def test_offline_is_said_of_commands_that_need_folders_alone(tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": NAME}))
    for places, offline in (((ROOT,), True), ((ROOT, None), True), ((NAME,), False), ((ROOT, "org/data"), False),
                            ((adapter,), False), (("two_dates",), True)):  # fmt: skip
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        stay_offline(*places)
        assert ("HF_HUB_OFFLINE" in os.environ) == offline, places


def test_an_adapter_of_the_package_is_called_by_its_name_and_finds_its_model_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')  # what `../..` would be from here
    monkeypatch.chdir(folder)
    assert find_model("two_dates") == ROOT / "adapters" / "two_dates" and base_of("two_dates").samefile(ROOT)
    (folder / "two_dates").mkdir()  # a folder that is there is taken first
    with pytest.raises(FileNotFoundError, match="two_dates: this is no model folder"):
        find_model("two_dates")


# Every door, by a name on the Hub

DOORS = {
    "ask": ["ask", "{image}", "How many?", "--max-new-tokens", "2"],
    "evidence-map": ["evidence-map", "{image}", "How many?", "--geojson", "{out}/kept.geojson"],
    "plan": ["plan", "{model}", "--image-size", "3000x2000", "--tokens", "100", "--device", "cuda"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_a_command_takes_a_name_on_the_hub_without_a_network(door, cache, model_folder, tmp_path, image, capsys):
    put(cache, NAME, model_folder)
    out = tmp_path / "out"
    out.mkdir()
    arguments = [one.format(image=image, out=out, model=NAME) for one in DOORS[door]]
    assert cli.main([*arguments, *(["--model", NAME] if "{model}" not in DOORS[door] else [])]) == 0
    printed = capsys.readouterr().out
    if door == "plan":
        assert printed.startswith(f"{NAME}, 3,000 x 2,000 px")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    from uhr_bat.scenes import painting

    path = tmp_path_factory.mktemp("image") / "scene.png"
    painting.example((400, 300), 0).save(path)
    return path


@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors", "adapter/uhr_bat_host.json"])
def test_a_run_whose_model_was_replaced_in_its_folder_is_another_run(tmp_path, file):
    """The files are larger than those that are read whole, and one weight of a tensor was changed."""
    (tmp_path / "config.json").write_text('{"model_type": "uhr_bat"}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": ".."}')
    (tmp_path / "adapter" / "uhr_bat_host.json").write_text("{}")
    tensors = {name: torch.zeros(300_000) for name in "abcd"}
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        save_file(tensors, tmp_path / name)
    lines = tmp_path / "lines.jsonl"
    Line(lines, told_as_measured(tmp_path / "adapter")).write({"answer": "of the first"})
    assert lines_of_run(lines, told_as_measured(tmp_path / "adapter")) == [{"answer": "of the first"}]
    if file.endswith("json"):
        (tmp_path / file).write_text('{"selector": "top_k"}')
    else:
        tensors["c"][0] = 1
        save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match="lines.jsonl holds a run with weights '.*', but '.*' is asked for. Give another"):
        lines_of_run(lines, told_as_measured(tmp_path / "adapter"))


@pytest.mark.slow
def test_a_run_goes_on_with_its_revision_alone(cache, model_folder, tmp_path, capsys):
    put(cache, NAME, model_folder)
    out = tmp_path / "run"
    arguments = ["evaluate", "scenes", "--limit", "1", "--max-new-tokens", "1", "--model", NAME, "--output", str(out)]
    assert cli.main(arguments) == 0
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["model"], settings["revision"]) == (NAME, REVISION)
    assert cli.main(arguments) == 0
    capsys.readouterr()
    put(cache, NAME, model_folder, "b" * 40)
    assert cli.main(arguments) == 2
    assert f"holds a run with revision {REVISION!r}, but {'b' * 40!r} is asked for" in capsys.readouterr().err
    arguments[arguments.index(NAME)] = f"{NAME}@{REVISION}"
    assert cli.main(arguments) == 0


# Settings


@pytest.mark.weights
def test_a_setting_is_the_models_and_its_processors(capsys):
    processor, model = load_model(device_map=None, budgets=60, selector="top_k", mask_padding=False)
    assert processor.default_budgets == model.config.budgets == 60 and model.config.selector == "top_k"
    assert processor.image_processor.mask_padding is model.config.mask_padding is False
    with pytest.raises(
        ValueError, match="UHR-BAT has no setting selektor. Its settings are the fields of .*config.json"
    ):
        load_model(device_map=None, selektor="top_k")


@pytest.mark.parametrize("given, message", [
    ("selektor=top_k", "Error: UHR-BAT has no setting selektor."),
    ("selector=best", "`selector` is one of preserve_and_merge, distinct, top_k, uniform"),
    ("num_regions=many", "'num_regions'"),
    ("region_focus={}", "`region_focus` needs `layers`, a list of decoder layers. Got None."),
    ('region_focus={"layers": 3}', "`region_focus` needs `layers`, a list of decoder layers. Got 3."),
    ("coord_weight=NaN", "`coord_weight` is a number that is not negative. Got nan."),
    ("distinctiveness_power=1e999", "`distinctiveness_power` is a number that is not negative. Got inf."),
    ("projector_hidden_act=none", "projector_hidden_act"),
    ("projector_hidden_act=best", "`projector_hidden_act` is no function of the library. Got 'best'."),
    ("vision_config={}", "UHR-BAT has no setting vision_config."),
    ("revision=main", "UHR-BAT has no setting revision."),
])  # fmt: skip
def test_a_wrong_setting_is_refused_before_the_image_is_read(given, message, tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(b"none")
    assert cli.main(["ask", str(tmp_path / "image.png"), "How many?", "--set", given]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and "image.png" not in said


@pytest.mark.weights
def test_weights_of_other_shapes_than_a_setting_asks_for_are_an_error_in_one_line():
    with pytest.raises(ValueError, match="its weights have other shapes than its configuration, with the settings"):
        load_model(device_map=None, scale_embedding_grid=7)


def test_what_loading_takes_beside_settings_is_none_of_them(capsys):
    parser, calls = ArgumentParser(), (load_model, load_host, planner_of_folder)
    add_model_argument(parser)
    taken = {one.name for call in calls for one in signature(call).parameters.values() if one.kind != one.VAR_KEYWORD}
    for name in sorted(taken):
        with pytest.raises(SystemExit):
            parser.parse_args(["--set", f"{name}=x"])
        assert f"argument --set: '{name}' is no setting of a model." in capsys.readouterr().err


def test_values_are_numbers_truths_nothing_or_texts():
    parser = ArgumentParser()
    add_model_argument(parser)
    given = ["look=0.5", "levels=3", "marks=True", "max_tiles=none", "places=levels", "budgets=[1,2]", "levels=4"]
    given += ["region_method=none"]  # the name of a method
    args = parser.parse_args([part for one in given for part in ("--set", one)])
    assert args.set == {
        "look": 0.5, "levels": 4, "marks": True, "max_tiles": None, "places": "levels", "budgets": [1, 2],
        "region_method": "none",
    }  # fmt: skip
    assert parser.parse_args([]).set == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--set", "look"])
