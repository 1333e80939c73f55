"""Models made otherwise, settings, and what cannot be: each by load_model, from folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from hosts_tiny import FAMILIES, MROPE, save_family, save_unknown
from images import raises, random_image
from uhr_bat import load_model
from uhr_bat.common.asking import prompt_text
from uhr_bat.common.loading import host_settings, load_processor
from uhr_bat.hosts import loading
from uhr_bat.hosts.places import coordinates, order_of
from uhr_bat.hosts.prompts import find_prompts
from uhr_bat.modeling_outputs_uhr_bat import KeptPlaces

SMALL = {"levels": 2, "refinement": 8}


def ask(processor, size=(60, 90), budget=9, **options):
    text = prompt_text(processor, "How many ships?")
    return processor(text=text, images=random_image(*size), budgets=budget, return_tensors="pt", **options)


def changed(name, **text):
    """Small settings of a family's own."""
    return {"tile": FAMILIES[name]["settings"]["tile"]} if "settings" in FAMILIES[name] else {}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gemma4", {"text_config": {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
                                    "num_kv_shared_layers": 0, "use_bidirectional_attention": "vision"}}),
        ("qwen3_vl", {"text_config": {"num_hidden_layers": 1}, "tie_word_embeddings": True,
                      "vision_config": {"depth": 2, "deepstack_visual_indexes": [1]}}),
        ("gemma3", {"text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2,
                                    "attn_logit_softcapping": 5.0}}),
        ("internvl", {"text_config": {"num_hidden_layers": 5, "num_key_value_heads": 4}, "tie_word_embeddings": False}),
        ("llava", {"text_config": {"max_position_embeddings": 300}, "vision_config": {"num_hidden_layers": 3}}),
    ],
)  # fmt: skip
def test_other_depths_tied_heads_and_small_windows_load_and_answer(name, changes, tmp_path):
    # Loading compares everything kept with the plain call, and a look with eager attention.
    processor, model = load_model(save_family(name, tmp_path / name, seed=3, **changes), **changed(name))
    inputs = ask(processor)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert processor.default_budgets <= model.context_window // 2


def test_a_family_that_is_not_in_the_table_is_tried_and_taken(tmp_path):
    folder = save_unknown(tmp_path / "model")
    processor, model = load_model(folder, tile=32)
    assert model.mrope and processor.prompts.marker == "<|image_pad|>"
    assert model.generate(**ask(processor), max_new_tokens=2).shape[0] == 1


def test_what_cannot_be_a_host_is_refused_with_what_it_lacks(tmp_path, host_folder):
    def folder(name, **config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        return tmp_path / name

    with pytest.raises(ValueError, match="'llava_next' cannot be asked: .*pinpoints.*LLaVA-OneVision can"):
        load_model(folder("next", model_type="llava_next"))
    with pytest.raises(ValueError, match="code is its repository's own.*-hf, as OpenGVLab/InternVL3-8B-hf"):
        load_model(
            folder(
                "code", model_type="internvl_chat", auto_map={"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
            )
        )
    with pytest.raises(
        ValueError,
        match="type 'gpt2' could not be taken .it answers no questions about images.. Known families: gemma4",
    ):
        load_model(folder("text", model_type="gpt2"))
    for changes, message in (
        ({"tile": 50}, "`tile` is a multiple of 8 px with this model. Got 50."),
        ({"look": 0.0}, "`look` is a share of the decoder's depth, above 0 and at most 1. Got 0.0."),
        ({"places": "circle"}, "`places` is one of grid, levels, rectangle. Got 'circle'."),
        ({"levels": 0}, "`levels` must be at least 1. Got 0."),
        ({"tile": 32, "marks": True}, "`marks` is of models without M-RoPE, and qwen3_vl is none. It has `places`."),
    ):
        with raises(ValueError, message):
            load_model(host_folder("qwen3_vl"), **changes)
    with pytest.raises(ValueError, match="A host has no setting bird. It has anchor, budgets"):
        load_model(host_folder("qwen3_vl"), bird=1)
    with pytest.raises(ValueError, match="`tile` is 56 px with this model, whose tower has one size. Got 64."):
        load_model(host_folder("gemma3"), tile=64)
    with pytest.raises(ValueError, match="`places` is of models with M-RoPE, and gemma3 is none. It has `marks`."):
        load_model(host_folder("gemma3"), places="levels")
    with pytest.raises(ValueError, match="Layer 0 cannot be looked at: those with full attention are 1, 3."):
        load_model(host_folder("gemma3"), importance_layer=0)
    with pytest.raises(ValueError, match="Layer 5 cannot be looked at"):  # of four
        load_model(host_folder("gemma3"), importance_layer=5)


def test_a_release_before_5_18_is_refused_by_name(host_folder, monkeypatch):
    monkeypatch.setattr(loading.transformers, "__version__", "5.17.0")
    with pytest.raises(ImportError, match="need transformers 5.18 or newer.*Got 5.17.0."):
        load_model(host_folder("llava"))


def test_a_model_that_answers_otherwise_than_the_library_fails_the_self_test(host_folder, monkeypatch):
    from uhr_bat.hosts import modeling

    monkeypatch.setattr(modeling, "order_of", lambda places, tile_rows: torch.arange(len(places[0].points)).flip(0))
    with pytest.raises(ValueError, match="self-test of llava failed: an image of one tile that is kept whole differs"):
        load_model(host_folder("llava"))
    load_model(host_folder("llava"), check=False)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_chunks_and_caches_that_the_library_reads_wrongly_are_refused(name, loaded):
    processor, model = loaded(name)
    inputs = ask(processor)
    with pytest.raises(ValueError, match=f"cannot go with images of {name}"):
        model.generate(**inputs, max_new_tokens=1, cache=transformers.DynamicCache(config=model.host.config))
    if name == "gemma3":
        with pytest.raises(ValueError, match="`prefill_chunk_size` cannot go with images of gemma3"):
            model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=8)


# Half precision, other devices, four bits, adapters


@pytest.mark.parametrize(
    "name, dtype", [("gemma4", torch.bfloat16), ("qwen3_vl", torch.float16), ("smolvlm", torch.bfloat16)]
)
def test_half_precision_answers(name, dtype, host_folder):
    processor, model = load_model(host_folder(name), dtype=dtype, **SMALL, **changed(name))
    assert model.dtype == dtype and model.compress(**ask(processor)).pooler_output[0].dtype == dtype
    assert model.generate(**ask(processor), max_new_tokens=2).shape[0] == 1


@pytest.mark.slow
def test_four_bits_on_a_cpu_answer(tmp_path):
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]},
    }
    vision = {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    folder = save_family("qwen3_vl", tmp_path, text_config=text, vision_config=vision)
    quantized = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    processor, model = load_model(folder, quantization_config=quantized, tile=32, **SMALL)
    assert model.generate(**ask(processor), max_new_tokens=2).shape[0] == 1


def test_weights_that_are_elsewhere_between_calls_answer_the_same(host_folder):
    processor, model = load_model(host_folder("llava"), device_map={"": "cpu"}, **SMALL)
    inputs = ask(processor)
    expected, answer = model.compress(**inputs).pooler_output[0], model.generate(**inputs, max_new_tokens=2)
    cpu_offload(model.host, execution_device="cpu")
    for _ in range(2):
        assert torch.equal(model.compress(**inputs).pooler_output[0], expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=2), answer)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_an_adapter_is_trained_on_compressed_prompts_and_loaded_with_its_host(name, host_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    processor, model = load_model(host_folder(name), **SMALL, **changed(name))
    inputs = ask(processor)
    plain = model(**inputs).logits[0, -1]
    adapter = get_peft_model(
        model.host, LoraConfig(target_modules=r".*language_model.*[qv]_proj", init_lora_weights=False)
    )
    model.train()
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model(**inputs, labels=labels).loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 16 and all(one.grad is not None and one.grad.any() for one in trained)
    model.eval()
    adapter.save_pretrained(tmp_path)
    live = model(**inputs).logits[0, -1]
    _, again = load_model(tmp_path, **SMALL, **changed(name))
    assert torch.equal(again(**inputs).logits[0, -1], live) and not torch.allclose(live, plain, atol=1e-3)


def test_what_a_host_saves_is_what_the_library_saves(host_folder, tmp_path):
    from transformers import AutoModelForImageTextToText

    _, model = load_model(host_folder("gemma4"))
    model.save_pretrained(tmp_path / "ours")
    AutoModelForImageTextToText.from_pretrained(host_folder("gemma4")).save_pretrained(tmp_path / "theirs")
    for path in sorted((tmp_path / "theirs").iterdir()):
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "ours").iterdir())) == len(list((tmp_path / "theirs").iterdir()))


@pytest.mark.slow
def test_no_attribute_of_transformers_is_changed(host_folder):
    code = (
        f"""
import sys, torch, transformers
sys.path[:0] = {[path for path in sys.path if path]}
from transformers.models.qwen3_vl import modeling_qwen3_vl, processing_qwen3_vl, image_processing_pil_qwen2_vl
""".replace("qwen3_vl, processing_qwen3_vl, image_processing_pil_qwen2_vl", "qwen3_vl")
        + f"""
from transformers.models.llama import modeling_llama
from transformers.generation import utils
import transformers.modeling_utils, transformers.masking_utils, transformers.processing_utils

def attributes():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "transformers":
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__.startswith("transformers"):
                    for inner, one in list(vars(value).items()):
                        found[name, key, inner] = id(one)
    return found

before = attributes()
from uhr_bat import load_model
from PIL import Image
for folder in {[str(host_folder(name)) for name in ("qwen3_vl", "llava")]}:
    processor, model = load_model(folder, levels=1, max_tiles=None)
    text = processor.image_token + "?"
    inputs = processor(text=text, images=Image.new("RGB", (64, 64), "red"), budgets=4, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=1)
after = attributes()
volatile = ("__doc__", "__abstractmethods__", "_abc_impl", "_checkpoint_conversion_mapping_cache")
print([key for key in before if key in after and after[key] != before[key] and key[-1] not in volatile])
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


# Prompts and places


@pytest.mark.parametrize("family", ["gemma4", "gemma3", "qwen3_vl", "internvl", "llava"])  # others need more packages
def test_words_around_an_image_are_those_that_the_familys_own_processor_writes(family, loaded, host_folder):
    processor, model = loaded(family)
    stated = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
    }  # as LLaVA's processor_config.json has them
    try:
        transformers.models.auto.processing_auto.processor_class_from_name(FAMILIES[family]["class"] + "Processor")
    except ModuleNotFoundError:
        pytest.skip("this release has the processor with torchvision alone")
    found = find_prompts(model.host.config, model.reader, processor.tokenizer, stated)
    spelt = processor.prompts
    assert (spelt.before, spelt.after) == (found.before, found.after)
    assert (spelt.marker or processor.image_token) == found.marker


def test_what_a_message_spells_is_no_image(loaded):
    processor, _ = loaded("gemma3")
    content = [{"type": "image"}, {"type": "text", "text": "<start_of_image> and <image_soft_token>?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    ids = processor(text=text, images=random_image(60, 60), budgets=5, return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 5 and text.startswith("<bos>") and (ids == 1).sum() == 1
    written = processor.decode(ids)
    assert written.count("\n\n<start_of_image><image_soft_token>") == 1 and "<start_of_image> and" in written


def test_a_coarse_row_lies_between_the_rows_of_the_finest_level_that_it_covers():
    coarse = KeptPlaces(torch.tensor([[0.0, 1.0]], dtype=torch.float64), (2, 2), 0)
    fine = KeptPlaces(torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64), (4, 4), 1)
    places = [coarse, fine]
    order = order_of(places, None)
    assert order.tolist() == [0, 2, 1]
    found, extent = coordinates(places, order, "grid", None)
    assert found.tolist() == [[0, 0.5, 2.5], [0, 0, 2], [0, 3, 0]] and extent == 4
    found, extent = coordinates(places, order, "grid", 2)  # the model's own largest side
    assert found.tolist() == [[0, 0, 1], [0, -0.25, 0.75], [0, 1.25, -0.25]] and extent == 2
    found, extent = coordinates(places, order, "levels", None)
    assert found.tolist() == [[0, 0, 1], [2, 2, 4], [2, 5, 2]] and extent == 6
    found, extent = coordinates(places, order, "rectangle", None)
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]] and extent == 2


@pytest.mark.parametrize("places", ["grid", "levels", "rectangle"])
def test_every_rule_of_places_answers_alike_in_a_batch_and_alone(places, host_folder):
    from test_calls import batch_of, questions

    processor, model = load_model(
        host_folder("qwen3_5" if places == "levels" else "qwen2_5_vl"), tile=32, places=places, **SMALL
    )
    alone = questions(processor, random_image(60, 90), (5, 9))
    settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = model.generate(**batch_of(processor, alone), **settings)
    for row, one in enumerate(alone):
        assert torch.allclose(both.logits[0][row], model.generate(**one, **settings).logits[0][0], atol=1e-4)


def test_marks_say_of_each_tile_which_it_is_and_are_not_returned(host_folder):
    processor, model = load_model(host_folder("llava"), marks=True, **SMALL)
    inputs = ask(processor, budget=12)
    made = model.visual_inputs(inputs["input_ids"], inputs["attention_mask"], model.compress(**inputs))
    written = processor.decode(made["input_ids"][0])
    assert "level 1, row 1, column 1: <image>" in written and "level 2, row " in written
    assert (made["input_ids"] == processor.image_token_id).sum() == 12
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 3
    # The prompt is the one that says so, and other than the one without.
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[1] == made["input_ids"].shape[1]


def test_measured_settings_of_the_user_are_taken_and_flags_go_over_them(host_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "uhr_bat").mkdir()
    folder = host_folder("llava")
    (tmp_path / "uhr_bat/hosts.json").write_text(json.dumps({str(folder): {"look": 1.0, "levels": 3}}))
    _, model = load_model(folder, check=False)
    assert model.config.importance_layer == 3 and model.config.scales == [56, 112, 224]
    _, model = load_model(folder, check=False, levels=1)
    assert model.config.importance_layer == 3 and model.config.scales == [56]


@pytest.mark.parametrize(
    "trained, later, wanted",
    [
        ({"anchor_share": 0.2, "selector": "top_k"}, {}, {"anchor_share": 0.2, "selector": "top_k"}),
        ({}, {}, {"anchor_share": 0.5}),
        ({"anchor_share": 0.2}, {"anchor_share": 0}, {"anchor_share": 0}),
        ({"scales": [64, 192], "importance_layer": 1}, {}, {"scales": [64, 192], "importance_layer": 1}),
        (
            {"scales": [64, 192], "importance_layer": 1},
            {"levels": 1, "look": 1},
            {"scales": [32], "importance_layer": 3},
        ),
    ],
)
def test_what_was_trained_by_some_rules_is_asked_by_them(host_folder, tmp_path, trained, later, wanted):
    folder = host_folder("qwen3_vl")
    load_processor(folder, changed("qwen3_vl") | trained).save_pretrained(tmp_path)
    config = loading.check_settings(folder, host_settings(tmp_path), **later)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.anchor_share_by_default == ("anchor_share" not in later)
    stated = json.loads((tmp_path / "uhr_bat_host.json").read_text())
    del stated["anchor_share"]  # as of an earlier release, by which no part of a budget was the anchor's
    (tmp_path / "uhr_bat_host.json").write_text(json.dumps(stated))
    assert loading.check_settings(folder, host_settings(tmp_path)).anchor_share == 0


@pytest.mark.parametrize("normalized", [False, True])
def test_messages_spell_no_control_token_in_one_part_or_in_two(host_folder, tmp_path, normalized):
    for name in ("gemma3", "qwen3_vl"):
        folder = shutil.copytree(host_folder(name), tmp_path / name)
        path = folder / "tokenizer.json"
        stated = json.loads(path.read_text())
        stated["added_tokens"] = [token | {"normalized": normalized} for token in stated["added_tokens"]]
        path.write_text(json.dumps(stated))
        processor = load_processor(folder)

        def ids(*texts):
            content = [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}])
            return processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]

        control = processor.tokenizer.added_tokens_decoder
        for token in (one.content for one in control.values()):
            for texts in ([token], [token[:3], token[3:]], ["a " + token[:-1] + " ", token[-1]], ["<", token[1:]]):
                assert sum(one in control for one in ids(*texts)) == sum(one in control for one in ids("How many?"))
                assert "".join(texts) in processor.tokenizer.decode(ids(*texts))
