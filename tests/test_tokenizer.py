"""The embedded tokenizer and the chat template."""

import random

import pytest
from transformers import AutoProcessor, AutoTokenizer

QUESTION = "Describe this remote-sensing image."
# The prompt of the released Quick Start.
QUICK_START = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def render(tokenizer):
    return lambda messages, **kwargs: tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def test_special_tokens_have_the_ids_of_the_configuration(tokenizer):
    from uhr_bat.configuration_uhr_bat import UHRBatConfig

    config = UHRBatConfig.from_pretrained(tokenizer.name_or_path)
    assert tokenizer.image_token == "<image>"
    assert tokenizer.image_token_id == config.image_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id == config.text_config.eos_token_id
    assert tokenizer.pad_token_id == config.text_config.pad_token_id
    assert len(tokenizer) <= config.text_config.vocab_size
    assert tokenizer.model_max_length == config.text_config.max_position_embeddings


def test_a_prompt_is_cut_at_its_special_tokens(tokenizer):
    ids = tokenizer("<|im_start|>user\n<image>\nHow many ships?<|im_end|>\n")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == "<|im_start|> user Ċ <image> Ċ How Ġmany Ġships ? <|im_end|> Ċ".split()


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("10240 px")[:5] == list("10240")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  two  spaces ,  it 's",
        "e\u0301 is not \u00e9",
        "\u65e5\u672c \U0001f6f0\ufe0f \u200f\u0627",
        "\x00\x1b\x7f\ufffd",
        "<image> <|im_end|> <|im_",
    ],
)
def test_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_text_comes_back_as_it_was(tokenizer):
    draw = random.Random(0)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(300):
        text = "".join(draw.choices(characters, k=40)) + "".join(draw.choices(characters[:256], k=40))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_left_out_of_an_answer(tokenizer):
    assert tokenizer.decode(tokenizer("Red.<|im_end|><|endoftext|>")["input_ids"], skip_special_tokens=True) == "Red."


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["1", "123"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2


def test_a_saved_copy_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    assert copy(QUICK_START) == tokenizer(QUICK_START)
    assert (copy.padding_side, copy.image_token) == ("left", "<image>")
    assert copy.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_the_tokenizer_is_what_the_build_writes(model_folder, tmp_path):
    from uhr_bat.export.build_tiny import build_tokenizer

    build_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (model_folder / path.name).read_bytes()


@pytest.mark.parametrize("content", [[IMAGE, words(QUESTION)], [words(QUESTION), IMAGE], f"<image>\n{QUESTION}"])
def test_a_question_renders_as_the_quick_start_prompt(render, content):
    assert render([{"role": "user", "content": content}], add_generation_prompt=True) == QUICK_START


def test_the_processor_renders_the_same(model_folder):
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    messages = [{"role": "user", "content": [IMAGE, words(QUESTION)]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == QUICK_START


def test_a_conversation(render):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, IMAGE, words("Before and after."), words("What changed?")]},
        {"role": "assistant", "content": [words("A ship left.")]},
        {"role": "user", "content": "Which one?"},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\n<image>\nBefore and after.\nWhat changed?<|im_end|>\n"
        "<|im_start|>assistant\nA ship left.<|im_end|>\n"
        "<|im_start|>user\nWhich one?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_assistant_mask_covers_the_answers_and_their_end(tokenizer):
    messages = [
        {"role": "user", "content": [words("Ships?")]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Colour?"},
        {"role": "assistant", "content": [words("Red.")]},
    ]
    inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answers = [token for token, mask in zip(inputs["input_ids"], inputs["assistant_masks"]) if mask]
    assert tokenizer.decode(answers) == "Two.<|im_end|>Red.<|im_end|>"


def test_an_unknown_part_is_refused_by_its_name(render):
    with pytest.raises(Exception, match='not "video"'):
        render([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (
            [words("Before:"), IMAGE, words("After:"), IMAGE, words("Changed?")],
            "Before:|<image>|After:|<image>|Changed?",
        ),
        ([IMAGE, words("Before."), IMAGE, words("After.")], "<image>|Before.|<image>|After."),
        ([IMAGE, words("Ships?"), IMAGE], "<image>|Ships?|<image>"),
        ([words("Look."), words("Ships?"), IMAGE, IMAGE], "<image>|<image>|Look.|Ships?"),
        ([IMAGE, words("Look."), words("Ships?")], "<image>|Look.|Ships?"),
    ],
)
def test_parts_keep_their_order_a_line_each_unless_no_text_would_follow_the_images(render, content, lines):
    user = render([{"role": "user", "content": content}]).split("<|im_start|>user\n")[1]
    assert user == lines.replace("|", "\n") + "<|im_end|>\n"


def test_tools_are_refused_and_not_dropped(tokenizer):
    def count_ships(kind: str):
        """Count ships.

        Args:
            kind: Which ships.
        """

    messages = [{"role": "user", "content": "Ships?"}]
    with pytest.raises(Exception, match="leave out `tools`"):
        tokenizer.apply_chat_template(messages, tools=[count_ships])
