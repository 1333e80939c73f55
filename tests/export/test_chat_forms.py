"""The chat template of a folder: the checkpoint's, or the form of its decoder; what is learnt ends where `generate` does."""

import json
import re
import shutil

import pytest
from uhr_bat.common.chats import ChatWriter
from uhr_bat.common.loading import ROOT
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.model_folder import write_code, write_config, write_processing
from uhr_bat.processing_uhr_bat import UHRBatProcessor

MARKS = {"chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "llama": ("<unk>", "<s>", "</s>"),
         "llama 3": ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")}  # fmt: skip
TEXT_ALONE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


@pytest.fixture
def export(tmp_path):
    """(marks of the tokenizer, settings, template, ids of generation_config.json) -> processor and its generation config."""

    def write(marks, settings, template=None, ends=None):
        source, output = tmp_path / "source", tmp_path / "output"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        source.mkdir()
        output.mkdir()
        text = (ROOT / "tokenizer.json").read_text(encoding="utf-8")
        for old, new in zip(MARKS["chatml"], MARKS[marks]):
            text = text.replace(json.dumps(old), json.dumps(new))
        (source / "tokenizer.json").write_text(text, encoding="utf-8")
        names = {"eos_token": MARKS[marks][2], "pad_token": MARKS[marks][0]}
        (source / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names})
        )
        (source / "config.json").write_text(json.dumps(settings))
        if ends is not None:
            (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.5}))
        config = UHRBatConfig.from_pretrained(ROOT)
        write_processing(output, source, config, is_released="text_config" not in settings)
        write_code(output)
        write_config(output, config)
        generation = json.loads((output / "generation_config.json").read_text())
        return UHRBatProcessor.from_pretrained(output), generation

    return write


def learnt(processor):
    ids, answered = ChatWriter(processor).write(CHAT)
    text = processor.tokenizer.decode(ids[: answered.index(True)])
    return text, processor.tokenizer.decode(ids[answered.index(True) :])


@pytest.mark.parametrize(
    "marks, settings, prompt, answer",
    [
        ("chatml", {"model_type": "llava_qwen"}, "What colour?<|im_end|>\n<|im_start|>assistant\n", "red<|im_end|>"),
        ("llama", {"model_type": "llava_llama"}, "USER: <image>\nWhat colour? ASSISTANT:", " red</s>"),
        ("llama", {"architectures": ["LlavaMistralForCausalLM"]}, "[INST] <image>\nWhat colour? [/INST]", " red</s>"),
        ("llama 3", {"model_type": "llava_llama"}, "<|start_header_id|>assistant<|end_header_id|>\n\n", "red<|eot_id|>"),
    ],
)
def test_a_checkpoint_without_a_template_gets_the_form_of_its_decoder(export, marks, settings, prompt, answer):
    processor, generation = export(marks, settings)
    text, said = learnt(processor)
    assert text.endswith(prompt) and said == answer
    assert processor.tokenizer.eos_token_id in generation["eos_token_id"]


def test_a_template_of_its_own_stays_and_its_end_becomes_one_of_generation(export, capsys):
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
    template += "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    processor, generation = export("chatml", {"text_config": {}}, template, ends=2)
    assert processor.chat_template == template and generation == {"eos_token_id": [2, 1022], "temperature": 0.5}
    assert learnt(processor)[1] == "red<|im_end|>" and "an answer ends with '<|im_end|>'" in capsys.readouterr().out
    assert export("chatml", {"text_config": {}}, template, ends=1022)[1]["eos_token_id"] == 1022


def test_a_template_of_text_alone_gets_a_messages_parts_as_one_text(export):
    processor, generation = export("llama", {"text_config": {}}, TEXT_ALONE, ends=[5])
    assert learnt(processor) == ("[user]<image>\nWhat colour?</s>[assistant]", "red</s>")
    assert generation["eos_token_id"] == [5, 1022]


def test_a_template_that_shows_no_image_is_refused(export):
    with pytest.raises(CheckpointError, match=re.escape("does not write one '<image>' for an image")):
        export("chatml", {"text_config": {}}, "{% for m in messages %}{{ m.role }}{% endfor %}")
