"""Models of the families that are made otherwise: what they answer, and what is refused by name."""

import pytest
import torch
from hosts_tiny import FAMILIES, plain_inputs, save_family, save_unknown
from test_exactness import ONE_TILE, ask, last_logits
from transformers import AutoModelForImageTextToText
from uhr_bat import load_model
from uhr_bat.modeling_outputs_uhr_bat import Places

HALF = ["sliding_attention", "full_attention"] * 2
DECODERS = {
    "a window in every layer": ("llava", {"model_type": "mistral", "sliding_window": 20}),
    "sinks": ("internvl", {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": HALF}),
    "scores that are bent": ("llava", {"model_type": "gemma2", "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}),
    "experts": ("internvl", {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}  # fmt: skip


@pytest.mark.parametrize("what", DECODERS)
def test_a_look_into_another_decoder_is_the_attention_that_eager_returns(what, tmp_path):
    name, text = DECODERS[what]
    folder = save_family(name, tmp_path / "model", text_config=text)
    processor, model = load_model(folder, **ONE_TILE)
    eager = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    ids = ask(processor, 1)[0]["input_ids"][0]
    rows = torch.randn(16, model.row_width, generator=torch.Generator().manual_seed(0))
    places = [Places(torch.arange(16), (4, 4), 0)]
    whole, start, _, inputs = model.prompt_with(
        ids, model.find_placeholders(ids).nonzero()[:, 0].tolist(), rows, places
    )
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    for layer in model.attention:
        expected = attentions[layer][0, :, start + 16 :, start : start + 16].mean((0, 1))
        seen = model.read_attention(ids, rows, places, layer=layer, question_tokens="all")
        assert torch.allclose(seen, expected, atol=1e-6)


def test_a_tower_that_hands_no_layer_to_the_decoder_is_served_too(tmp_path):
    folder = save_family("qwen3_vl", tmp_path / "model", vision_config={"deepstack_visual_indexes": []})
    processor, model = load_model(folder, tile=32, **ONE_TILE)
    many, few = (last_logits(model, **ask(processor, budget)[0]) for budget in (16, 4))
    assert not torch.allclose(many, few, atol=1e-3)


def test_a_class_token_among_a_tiles_rows_is_refused(tmp_path):
    folder = save_family("llava", tmp_path / "model", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="A tile of 56 px has 17 rows: no square grid"):
        load_model(folder)


def test_rows_in_another_order_are_refused_of_a_family_that_is_not_known(tmp_path, monkeypatch):
    from transformers import Qwen2VLModel

    folder, encode = save_unknown(tmp_path / "model"), Qwen2VLModel.get_image_features
    load_model(folder, tile=32)

    def turned(self, *args, **kwargs):
        outputs = encode(self, *args, **kwargs)
        outputs.pooler_output = [rows.flip(0) for rows in outputs.pooler_output]
        return outputs

    monkeypatch.setattr(Qwen2VLModel, "get_image_features", turned)
    with pytest.raises(ValueError, match="'qwen2_vl' could not be taken .*a tile's rows are not its cells"):
        load_model(folder, tile=32)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_a_conversation_goes_on_from_a_cache_of_text_and_not_from_one_with_images(name, loaded, host_folder):
    processor, model = loaded(name, **ONE_TILE)
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    inputs, image = ask(processor, FAMILIES[name]["rows"] ** 2)
    text = processor.tokenizer(["Only text", "And a longer text"], return_tensors="pt", padding=True)

    def go_on(asked):
        done = model.generate(**asked, **settings)
        more = torch.cat((done.sequences, torch.full((len(done.sequences), 3), 60)), dim=1)
        mask = torch.cat((asked["attention_mask"], torch.ones_like(more[:, -5:])), dim=1)
        # The host's last call was another's, about an image.
        model.host.generate(**plain_inputs(name, host_folder(name), inputs["input_ids"], image), max_new_tokens=1)
        return {"input_ids": more, "attention_mask": mask}, done.past_key_values

    whole, cache = go_on(text)
    expected, found = model.generate(**whole, **settings), model.generate(**whole, past_key_values=cache, **settings)
    assert torch.allclose(found.logits[0], expected.logits[0], atol=1e-3)
    whole, cache = go_on({key: inputs[key] for key in inputs if key != "mm_token_type_ids"})
    with pytest.raises(ValueError, match=f"cannot go with images of {name}"):
        model.generate(**whole, past_key_values=cache, **settings)
