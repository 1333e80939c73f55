"""Adapters: the live one, the reloaded one and the merged model answer alike, or the merge is refused."""

import json
import shutil

import pytest
import torch
from checkpoints import nothing_was_made
from huggingface_hub import constants
from own_data import make_model_folder
from safetensors.torch import load_file, save_file
from uhr_bat.common.loading import keep_settings, load_config, load_model, save_model
from uhr_bat.export import convert_checkpoint
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.export.merging import notes_of
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.planning.__main__ import planner_of_folder

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 60)[None]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved as tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora of the head": {"target_modules": ["q_proj", "lm_head"]},
    "dora of the embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "parts before the decoder": {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["multi_modal_projector"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied or not -> folder of a random model. Tests only read it."""
    folder = tmp_path_factory.mktemp("bases")
    processor, model = load_model(make_model_folder(folder / "made"), device_map=None)
    for tied in (True, False):
        config = model.config.__class__.from_dict(model.config.to_dict())
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        torch.manual_seed(0)
        save_model(UHRBatForConditionalGeneration(config), processor, folder / str(tied))
    return {tied: folder / str(tied) for tied in (True, False)}


def make_adapter(base, folder, seed=1, **settings):
    """Logits of a random adapter, live, and its folder, as peft writes it."""
    _, model = load_model(base, device_map=None)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "up_proj"], **settings}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return logits(model), folder


@torch.no_grad()
def logits(model):
    """Of a text, and those of an image of one pixel value."""
    model = model.eval()
    inner = getattr(model, "get_base_model", lambda: model)().model
    tokens = inner.multi_modal_projector(inner.vision_tower(torch.full((1, 3, 32, 32), 0.3)))
    return torch.cat((model(input_ids=IDS).logits.flatten(), tokens.flatten()))


# The others know nothing of embeddings and head.
UNTIED = [kind for kind in KINDS if "head" in kind or "saved" in kind or "embeddings" in kind]


@pytest.mark.parametrize(
    "kind, tied", [(kind, True) for kind in KINDS] + [pytest.param(kind, False, marks=pytest.mark.slow) for kind in UNTIED]
)
def test_live_reloaded_and_merged_answer_alike(kind, tied, bases, tmp_path):
    live, adapter = make_adapter(bases[tied], tmp_path / "adapter", **KINDS[kind])
    reloaded = logits(load_model(adapter, device_map=None)[1])
    torch.testing.assert_close(reloaded, live, rtol=0, atol=0)
    assert (logits(load_model(bases[tied], device_map=None)[1]) - live).abs().max() > 1e-3
    merged, report = UHRBatForConditionalGeneration.from_pretrained(
        convert(bases[tied], tmp_path / "merged", merge_adapter=adapter), output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_several_adapters_are_merged_as_they_answer_together(bases, tmp_path):
    _, first = make_adapter(bases[True], tmp_path / "first", 1)
    _, second = make_adapter(bases[True], tmp_path / "second", 2, use_rslora=True, target_modules=["down_proj", "q_proj"])
    _, model = load_model(bases[True], device_map=None)
    model = peft.PeftModel.from_pretrained(model, first, "first")
    model.load_adapter(second, "second")
    model.base_model.set_adapter(["first", "second"])
    wanted = logits(model)
    output = convert(bases[True], tmp_path / "merged", merge_adapter=[first, second])
    torch.testing.assert_close(logits(load_model(output, device_map=None)[1]), wanted, rtol=1e-4, atol=1e-5)


def test_a_merge_that_would_answer_otherwise_is_refused(bases, tmp_path, monkeypatch):
    _, adapter = make_adapter(bases[True], tmp_path / "adapter")
    merge = peft.tuners.lora.layer.Linear.merge

    def forgets(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().weight.data *= 1.5

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "merge", forgets)
    with pytest.raises(CheckpointError, match="outputs are off by .* Use the adapter without a merge"):
        convert(bases[True], tmp_path / "merged", merge_adapter=adapter)
    assert nothing_was_made(tmp_path / "merged")


def test_settings_that_an_adapter_was_trained_with_are_asked_planned_saved_again_and_merged(bases, tmp_path):
    scales = load_model(bases[True], device_map=None)[1].config.scales
    trained = {"selector": "top_k", "anchor_share": 0.25, "budgets": 9, "scales": [scales[0], 3 * scales[-1]]}
    processor, model = load_model(bases[True], device_map=None, **trained)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_model(keep_settings(adapted, trained), processor, tmp_path / "adapter")
    load_model(tmp_path / "adapter", device_map=None)[1].save_pretrained(tmp_path / "again")
    processor.default_budgets = trained["budgets"] = [2, 6]
    processor.save_pretrained(tmp_path / "adapter")
    convert(bases[True], tmp_path / "merged", merge_adapter=tmp_path / "adapter")
    for folder, budgets in (("again", 9), ("adapter", [2, 6]), ("merged", [2, 6])):
        processor, model = load_model(tmp_path / folder, device_map=None)
        for config in (model.config, planner_of_folder(tmp_path / folder, "cpu").config):
            assert {name: getattr(config, name) for name in trained} == trained | {"budgets": budgets}
        assert (processor.default_budgets, processor.image_processor.scales) == (budgets, trained["scales"])
    config = load_config(tmp_path / "adapter", selector="uniform")
    assert (config.selector, config.anchor_share) == ("uniform", 0.25)
    (tmp_path / "adapter" / "uhr_bat_host.json").write_text('{"levels": 3}')
    with pytest.raises(ValueError, match="uhr_bat_host.json: these are no settings .*UHR-BAT has no setting levels"):
        load_model(tmp_path / "adapter", device_map=None)


def test_what_is_wrong_with_adapters_is_said_before_weights_are_read(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint, "Checkpoint", lambda folder: pytest.fail("weights were looked at"))
    _, adapter = make_adapter(bases[True], tmp_path / "adapter")
    other = shutil.copytree(adapter, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="names an adapter twice, whose changes would count twice"):
        convert(bases[True], tmp_path / "merged", merge_adapter=[adapter, other])
    (other / "uhr_bat_host.json").write_text('{"selector": "top_k"}')
    assert notes_of(bases[True], [adapter]) == []
    foreign, settings = notes_of(bases[False], [adapter, other])[1:]
    assert f"names '{bases[True]}' as its model, and is merged into {bases[False]}" in foreign
    assert settings == f"settings of the adapters differ: those of the last, {other}, are kept"
    weights = (other / "adapter_model.safetensors").read_bytes()
    (other / "adapter_model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(CheckpointError, match="copy/adapter_model.safetensors: these are no whole weights"):
        convert(bases[True], tmp_path / "merged", merge_adapter=[adapter, other], dry_run=True)
    (other / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="copy/adapter_config.json: not a JSON file"):
        convert(str(other), tmp_path / "merged", merge_adapter=True)


# The adapter's folder as a model


def test_an_adapter_is_loaded_saved_and_loaded_again(bases, tmp_path):
    live, adapter = make_adapter(bases[True], tmp_path / "adapter", modules_to_save=["lm_head"])
    processor, model = load_model(adapter, device_map=None)
    assert type(model) is UHRBatForConditionalGeneration and not model.training
    save_model(model, processor, tmp_path / "again")
    assert not list((tmp_path / "again").glob("model*.safetensors"))
    torch.testing.assert_close(logits(load_model(tmp_path / "again", device_map=None)[1]), live, rtol=0, atol=0)


def test_a_base_is_found_from_the_adapters_own_folder_or_named_where_it_is_not(bases, tmp_path, monkeypatch):
    live, adapter = make_adapter(bases[True], tmp_path / "run" / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def name_base(name):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(bases[True], tmp_path / "base")
    name_base("../../base")
    torch.testing.assert_close(logits(load_model(adapter, device_map=None)[1]), live, rtol=0, atol=0)
    for name, error, message in (
        ("gone/away", FileNotFoundError, "an adapter of 'gone/away'.*`base_model_name_or_path`"),
        (None, ValueError, "names no base model"),
        (str(adapter), ValueError, "is an adapter of the adapter"),
    ):
        name_base(name)
        with pytest.raises(error, match=message):
            load_model(adapter, device_map=None)
    with pytest.raises(ValueError, match=f"holds several adapters. Name one: {adapter}"):
        load_model(adapter.parent, device_map=None)


def test_an_adapter_that_lacks_a_part_is_refused_wherever_it_is_loaded(bases, tmp_path):
    _, adapter = make_adapter(bases[True], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter: the adapter does not fit .*missing adapter keys"):
        load_model(adapter, device_map=None)
    with pytest.raises(CheckpointError, match="cannot be merged.*missing adapter keys"):
        convert(bases[True], tmp_path / "merged", merge_adapter=adapter)


@pytest.mark.slow
def test_model_and_adapter_are_found_in_the_hubs_cache_without_a_network(bases, tmp_path, monkeypatch):
    live, adapter = make_adapter(bases[True], tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "me/base"}))
    for name, folder in (("base", bases[True]), ("lora", adapter)):
        repository = tmp_path / "hub" / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in (adapter, "me/lora"):
        torch.testing.assert_close(logits(load_model(name, device_map=None)[1]), live, rtol=0, atol=1e-6)
