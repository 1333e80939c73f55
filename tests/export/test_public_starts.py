"""The forms in which models of the LLaVA family are published: exported, asked, trained, exported again."""

import pytest
import torch
from checkpoints import load_clean
from PIL import Image
from starts import FORMS, IMAGE, NUM_TOKENS, TILE, answer_of, make_start, write_form
from transformers import AutoProcessor
from uhr_bat.export.convert_checkpoint import convert


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


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if not form.endswith("-hf")])
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
