"""What is learnt of a chat, by templates of the forms that start models bring: the answer, and an end of `generate`."""

import json
import shutil

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken
from uhr_bat.common.chats import ChatError, ChatWriter, end_of_template
from uhr_bat.common.loading import ROOT
from uhr_bat.processing_uhr_bat import UHRBatProcessor

PARTS = "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
TAGS = PARTS.replace("{{ c.text }}", "{% generation %}{{ c.text }}{% endgeneration %}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMS = {
    "no tags": (CHATML, "red<|im_end|>"),
    "tags around the text": (CHATML.replace(PARTS, TAGS), "red<|im_end|>"),
    "OneVision, a blank before the line break": (
        CHATML.replace("{{ m.role }}\n", "{{ m.role }} \n"), "red<|im_end|>"),
    "Vicuna, no end": (
        "{% for m in messages %}{{ m.role | upper }}: " + PARTS + " {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " red</s>"),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + PARTS + "<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "red<|eot_id|>"),
    "Gemma, which cuts blanks off": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text | trim }}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "red<end_of_turn>"),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] " + PARTS + " [/INST]{% else %} " + PARTS
        + "</s>{% endif %}{% endfor %}", " red</s>"),
    "an answer that begins with thoughts": (
        CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"),
        "<think>\n\n</think>\n\nred<|im_end|>"),
}  # fmt: skip
MORE = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]


def chat(*texts):
    turns = [{"role": ("user", "assistant")[idx % 2], "content": [{"type": "text", "text": text}]}
             for idx, text in enumerate(texts)]  # fmt: skip
    turns[0]["content"].insert(0, {"type": "image", "text": None})
    return turns


@pytest.fixture(scope="module")
def make_processor(tmp_path_factory):
    """(template, tokens at which `generate` ends) -> a processor that is loaded from a folder."""
    plain = UHRBatProcessor.from_pretrained(ROOT)

    def make(template, *ends, bos=None):
        folder = tmp_path_factory.mktemp("processor")
        for name in ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json"):
            shutil.copyfile(ROOT / name, folder / name)
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = type(plain.tokenizer).from_pretrained(folder)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in MORE], special_tokens=True)
        if bos:
            tokenizer.bos_token = bos
        tokenizer.save_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids(list(ends))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return UHRBatProcessor.from_pretrained(folder)

    return make


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_learnt_with_its_end_after_the_prompt_of_generation(form, make_processor):
    template, wanted = FORMS[form]
    end = wanted.removeprefix(wanted[: wanted.index("red") + 3])
    processor = make_processor(template, end, bos="<s>" if "bos_token" in template else None)
    messages = chat("How many?", "three", "What colour?", "red")
    ids, learnt = ChatWriter(processor).write(messages)
    prompt = ids[: learnt.index(True)]
    text = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert all(learnt[len(prompt) :]) and processor.tokenizer.decode(ids[len(prompt) :]) == wanted
    assert prompt == ChatWriter(processor).prompt(messages[:-1])
    inputs = processor(text=text, images=Image.new("RGB", (8, 8)))["input_ids"][0]
    image = inputs.index(processor.image_token_id)
    assert prompt == [*inputs[:image], *inputs[image + inputs.count(processor.image_token_id) - 1 :]]
    ids, learnt = ChatWriter(processor).write(messages, every=True)
    said = processor.tokenizer.decode([one for one, is_learnt in zip(ids, learnt) if is_learnt])
    assert said == wanted.replace("red", "three") + wanted


def test_the_end_is_one_that_generation_stops_at(make_processor):
    messages = chat("What colour?", "red")
    for ends, wanted in ((["<|im_end|>"], "red<|im_end|>"), (["</s>"], "red</s>"), (["</s>", "<|im_end|>"], "red<|im_end|>")):
        processor = make_processor(CHATML, *ends)
        ids, learnt = ChatWriter(processor).write(messages)
        assert processor.tokenizer.decode(ids[learnt.index(True) :]) == wanted
    with pytest.raises(ChatError, match="No token ends an answer"):
        ChatWriter(processor, ends=[2])  # a letter
    assert end_of_template(processor.tokenizer, CHATML) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_template(processor.tokenizer, FORMS["Vicuna, no end"][0]) is None


@pytest.mark.parametrize(
    "template, told",
    [
        ("{% for m in messages if m.role == 'user' %}" + PARTS + "{% endfor %}", "writes no answer"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"), "does not end a prompt with it"),
        (CHATML.replace("%}<|im_start|>assistant", "%}Say:"), "ends a prompt with"),
        ("{{ raise_exception('no images') }}", "refuses it .*no images"),
    ],
)
def test_a_template_that_says_nothing_certain_about_answers_is_refused(template, told, make_processor):
    with pytest.raises(ChatError, match=told):
        ChatWriter(make_processor(template, "<|im_end|>")).write(chat("What colour?", "red"))


def test_a_chat_without_an_answer_is_refused(make_processor):
    writer = ChatWriter(make_processor(CHATML, "<|im_end|>"))
    with pytest.raises(ChatError, match="the last turn is no answer"):
        writer.write(chat("What colour?"))
    with pytest.raises(ChatError, match="the answer has no text"):
        writer.write(chat("What colour?", " "))


def test_an_answer_that_holds_an_end_is_refused_and_a_question_may_hold_anything(make_processor):
    writer = ChatWriter(make_processor(CHATML, "<|im_end|>", "</s>"))
    for said in ("red</s>", "red <|im_end|> blue"):
        with pytest.raises(ChatError, match=r"the answer 'red.*' holds '.*', at which answers end: leave it out"):
            writer.write(chat("What colour?", said))
        with pytest.raises(ChatError, match="at which answers end"):
            writer.write(chat("What colour?", said, "And?", "blue"), every=True)
    odd = chat("What </s> \uf8ff?", "\uf8ff", "\uf8ff?", "\uf8ff red {% if %}")
    shown = writer.show(odd, every=True)
    assert ">>>\uf8ff<|im_end|><<<" in shown and ">>>\uf8ff red {% if %}<|im_end|><<<" in shown


def test_a_tokenizer_that_ends_every_prompt_is_refused(make_processor):
    processor = make_processor(CHATML, "<|im_end|>")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    special = [("<|im_end|>", end)]
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=special)
    with pytest.raises(ChatError, match="ends every prompt with '<|im_end|>'.*`add_eos_token`"):
        ChatWriter(processor).write(chat("What colour?", "red"))
