"""The forms in which models of the LLaVA family are published: exported, asked, trained, exported again."""

import json

import pytest
import torch
from checkpoints import load_clean, nothing_was_made
from PIL import Image
from safetensors.torch import load_file, save_file
from starts import FORMS, IMAGE, NUM_TOKENS, TILE, answer_of, make_start, write_form
from transformers import AutoProcessor
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export import convert_checkpoint
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert

TOWER = "model.vision_tower.vision_tower.vision_model."


def heads(form):
    """Of the tower, which the original layout does not record."""
    return {} if FORMS[form][-1] is None else {"vision_heads": 4}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_the_first_answer_are_the_start_models(form, tmp_path):
    start = make_start(form)
    folder = write_form(tmp_path / "start", form, start)
    output = convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[NUM_TOKENS], **heads(form))
    model, processor = load_clean(output), AutoProcessor.from_pretrained(output, trust_remote_code=True)
    side = start.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[IMAGE] * NUM_TOKENS, 7, 8, 9]])
    expected, tokens = answer_of(start, ids, pixels)
    tile = pixels[:, None, :, :TILE, :TILE]
    assert torch.equal(model.encode_image(tile)[0].tokens[0], tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, pixel_values=tile).logits, expected, rtol=1e-4, atol=1e-4)
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (50, 40), "red")},
                                         {"type": "text", "text": "What colour?"}]}]  # fmt: skip
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    mean = {"clip_vision_model": 0.48145466, "siglip_vision_model": 0.5}[model.config.vision_config.model_type]
    assert processor.image_processor.image_mean[0] == mean


# Every tower and decoder there is, and both layouts; what a form is made into is asked above.
@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["llava-onevision-qwen2-hf", "llava-onevision-qwen2-ov", "llava-v1.6-mistral", "geochat"]
)
def test_a_start_is_trained_for_two_steps_and_exported_again(form, tmp_path):
    pytest.importorskip("datasets")
    from own_data import make_rows, write_rows
    from uhr_bat.training import sft
    from uhr_bat.training.options import read_options

    start = convert(start=write_form(tmp_path / "start", form), output=tmp_path / "a", scales=[32, 64], budgets=[4, 8])
    rows = write_rows(tmp_path / "train.json", make_rows(tmp_path, 4))
    trainer = sft.train(*read_options([
        "--model_name_or_path", str(start), "--train_data", str(rows), "--output_dir", str(tmp_path / "run"),
        "--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1",
        "--learning_rate", "1e-3", "--save_strategy", "no",
    ]))  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < float(loss) < 100 for loss in losses)
    again = load_clean(convert(tmp_path / "run", tmp_path / "b"))
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.state_dict().items())
    before = load_clean(start).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.items())
    assert again.config.text_config.model_type == load_clean(start).config.text_config.model_type


@pytest.mark.parametrize("whole", [False, True])
def test_siglips_tower_is_read_under_other_names_and_whole(whole, tmp_path):
    """Other releases leave out a level of the names; other code keeps what stands behind the layer that is read."""
    form, start = "llava-onevision-qwen2-ov", make_start("llava-onevision-qwen2-ov")
    folder = write_form(tmp_path / "start", form, start)
    tensors = load_file(folder / "model.safetensors")
    if whole:
        tensors[TOWER + "head.probe"] = torch.ones(1, 1, 16)
    else:
        tensors = {name.replace(TOWER, "model.vision_tower.vision_tower."): one for name, one in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    output = convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[NUM_TOKENS], vision_heads=4)
    pixels = torch.randn(1, 3, TILE + 2, TILE + 2, generator=torch.Generator().manual_seed(0))
    start.config.vision_feature_layer = -2 if whole else -1
    _, tokens = answer_of(start, torch.tensor([[5, *[IMAGE] * NUM_TOKENS, 7]]), pixels)
    assert torch.equal(load_clean(output).encode_image(pixels[:, None, :, :TILE, :TILE])[0].tokens[0], tokens)


# What a start may lack or have too much of


def test_a_table_of_llama_without_a_free_row_gets_rows_for_the_image_token(tmp_path):
    start = make_start("geochat")
    start.resize_token_embeddings(IMAGE)  # the tokenizer's 1023 entries fill the table
    folder = write_form(tmp_path / "start", "geochat", start)
    output = convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[4], vision_heads=4)
    model = load_clean(output)
    assert model.config.image_token_index == IMAGE and model.config.text_config.vocab_size == 1024
    for name, table in (("model.language_model.embed_tokens.weight", start.model.language_model.embed_tokens.weight),
                        ("lm_head.weight", start.lm_head.weight)):  # fmt: skip
        grown = model.state_dict()[name]
        assert torch.equal(grown[:IMAGE], table)
        torch.testing.assert_close(grown[IMAGE], table.mean(0))


def test_mistrals_window_bounds_the_context_window(tmp_path, capsys):
    folder = write_form(tmp_path / "start", "llava-v1.6-mistral-hf")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["sliding_window"] = 128
    (folder / "config.json").write_text(json.dumps(settings))
    output = convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[4])
    config = UHRBatConfig.from_pretrained(output)
    assert config.text_config.max_position_embeddings == 128 and config.text_config.model_type == "llama"
    assert "context window: 128 tokens of 512, its sliding window" in capsys.readouterr().out


def edit(folder, name, **changes):
    path = folder / name
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_a_start_without_a_padding_token_gets_its_end_token(tmp_path, capsys):
    folder = write_form(tmp_path / "start", "llava-interleave-qwen-hf")
    edit(folder, "tokenizer_config.json", pad_token=None)
    output = convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[4])
    assert "its end token '<|im_end|>' is it" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    inputs = processor(text=["<image>a", "<image>a b c d"], images=[[Image.new("RGB", (9, 9))]] * 2, padding=True,
                       return_tensors="pt")  # fmt: skip
    assert processor.tokenizer.pad_token == "<|im_end|>" and inputs["attention_mask"].sum(1).diff().item() > 0
    edit(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(CheckpointError, match="neither a padding token.*`pad_token`"):
        convert(start=folder, output=tmp_path / "no", scales=[TILE], budgets=[4])


def longer_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 1024, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_image_token(folder):
    tokenizer = (folder / "tokenizer.json").read_text().replace('"<image>"', '"<picture>"')
    (folder / "tokenizer.json").write_text(tokenizer)


def qformer(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.qformer.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_projector(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "projector" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (longer_tokenizer, r"ids up to 1024 \('<extra>'\), but the embedding table has 1024 rows.*embeddings\(1025\)"),
        (other_image_token, r"makes \[1024\] of '<image>'. It must be \[1023\]"),
        (qformer, r"(?s)'model.qformer.weight' is unknown.*A resampler, Q-Former or"),
        (no_projector, "has no projector"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_shard_is_written(damage, message, tmp_path, monkeypatch):
    folder = write_form(tmp_path / "start", "llava-interleave-qwen-hf")
    damage(folder)
    monkeypatch.setattr(convert_checkpoint, "write_weights", lambda *args: pytest.fail("weights were written"))
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=message):
            convert(start=folder, output=tmp_path / "out", scales=[TILE], budgets=[4], dry_run=dry_run)
    assert nothing_was_made(tmp_path / "out")
