"""Chat templates of a folder: that of the checkpoint, or the form that its decoder was trained with.

All write a message's parts a line each, as `chat_template.jinja` does, whose first half they share.
"""

from uhr_bat.common.chats import ChatError, added_tokens, end_of_template, render
from uhr_bat.common.loading import ROOT

from .checkpoint_files import CheckpointError

CHATML = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
PARTS = CHATML.partition("{%- if tools")[0]  # the macro `render`
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
# Before a template that takes a message's content for a text, as those of language models do.
FLAT = """{%- set flat = namespace(turns=[]) -%}
{%- for message in messages -%}
{%- set flat.turns = flat.turns + [dict(message, content=render(message['content']))] -%}
{%- endfor -%}
{%- set messages = flat.turns -%}
"""


def _turns(system, user, assistant, prompt) -> str:
    """A template from how it writes a turn of each role, and the end of a prompt."""
    roles = (("system", system), ("user", user), ("assistant", assistant))
    turns = "".join(
        "{%- " + ("el" if idx else "") + f"if message['role'] == '{role}' -%}}\n" + "{{- " + text + " -}}\n"
        for idx, (role, text) in enumerate(roles)
    )
    return (
        PARTS + "{%- for message in messages -%}\n{%- set text = render(message['content']) -%}\n" + turns
        + "{%- endif -%}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n{{- " + prompt + " -}}\n{%- endif -%}\n"
    )  # fmt: skip


def _header(role):
    return f"'<|start_header_id|>{role}<|end_header_id|>\\n\\n'"


VICUNA = _turns("text ~ ' '", "'USER: ' ~ text ~ ' '", "'ASSISTANT: ' ~ text ~ eos_token", "'ASSISTANT:'").replace(
    "{%- for message in messages -%}",
    "{%- if not messages or messages[0]['role'] != 'system' -%}\n{{- "
    + repr(VICUNA_SYSTEM + " ")
    + " -}}\n{%- endif -%}\n"
    "{%- for message in messages -%}",
    1,
)
MISTRAL = _turns("text ~ '\\n\\n'", "'[INST] ' ~ text ~ ' [/INST]'", "' ' ~ text ~ eos_token", "''")
LLAMA_3 = _turns(
    *(f"{_header(role)} ~ text ~ '<|eot_id|>'" for role in ("system", "user", "assistant")), _header("assistant")
)


def form_of(tokenizer, settings: dict) -> tuple[str, str]:
    """(name, template) of the form that a decoder was trained with, by the marks that its tokenizer knows, and by its
    configuration `settings`.

    Raises:
        CheckpointError: no mark is known, and no end.
    """
    if tokenizer is None:
        return "ChatML", CHATML
    tokens = added_tokens(tokenizer)
    if {"<|im_start|>", "<|im_end|>"} <= tokens.keys():
        return "ChatML", CHATML
    if {"<|start_header_id|>", "<|eot_id|>"} <= tokens.keys():
        return "Llama 3", LLAMA_3
    if tokenizer.eos_token is None:
        raise CheckpointError(
            "The checkpoint has no chat template, and its tokenizer neither the marks of ChatML or Llama 3 nor an "
            "`eos_token`, so no answer would end. Name an `eos_token` in its tokenizer_config.json."
        )
    kind = " ".join([settings.get("model_type", ""), *(settings.get("architectures") or [])]).lower()
    return ("Mistral", MISTRAL) if "mistral" in kind else ("Vicuna", VICUNA)


def writes_images(tokenizer, template, image_token) -> bool:
    """Whether a template takes messages in parts: it writes an image's token and the text, and nothing of how they came."""
    probe = "What is here?"
    content = [{"type": "image"}, {"type": "text", "text": probe}]
    try:
        text = render(tokenizer, template, [{"role": "user", "content": content}], ask=True)
    except ChatError:
        return False
    return text.count(image_token) == 1 and probe in text and "'type'" not in text


def chat_template(tokenizer, stated: str | None, settings: dict, image_token: str) -> tuple[str, int | None]:
    """(template, id of the token that it writes behind an answer or None), of a folder whose own template is `stated`.

    Raises:
        CheckpointError: a template that writes no image.
    """
    name, template = ("the checkpoint's", stated) if stated is not None else form_of(tokenizer, settings)
    if tokenizer is None:
        return template, None
    if not writes_images(tokenizer, template, image_token):
        name, template = name + ", given a message's parts as one text", PARTS + FLAT + template
        if not writes_images(tokenizer, template, image_token):
            raise CheckpointError(
                f"The chat template does not write one {image_token!r} for an image of a message, nor takes its parts as one "
                "text. Correct it, or remove it: then the folder gets the form that the tokenizer's marks are for."
            )
    try:
        end = end_of_template(tokenizer, template)
    except ChatError as error:
        print(f"chat template: {name}. It cannot be trained with: {error}")
        return template, None
    written = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
    print(f"chat template: {name}; an answer ends with {written!r}" + ", which it does not write" * (end is None))
    return template, end
