"""A chat as a chat template writes it: the prompt that `generate` gets, what it should say, and the token that ends it.

Templates say nothing reliable about answers: some mark them (`{% generation %}`), some mark their text without the
token that ends it, most mark nothing, some write no such token. So a template is asked: it renders the chat up to an
answer, with the answer, and with a mark in its place.
"""

from itertools import groupby
from operator import itemgetter

from transformers import GenerationConfig

from ..image_raster_files_uhr_bat import reason

MARK = "\ue0f1\uf1e0"  # stands in an answer's place; of a private range, two that no font has side by side


class ChatError(ValueError):
    """A chat that its template does not write, or that has nothing to learn from."""


def as_parts(message) -> list[dict]:
    """The parts of a message, whose content may be a text."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def answered_turns(messages) -> list[int]:
    """Indices of the assistant's turns that have a user's before them."""
    asked = next((idx for idx, turn in enumerate(messages) if turn["role"] == "user"), len(messages))
    return [idx for idx, turn in enumerate(messages) if turn["role"] == "assistant" and idx > asked]


def ending_ids(tokenizer) -> list[int]:
    """Ids that end an answer: those of the `generation_config.json` beside a tokenizer, else the tokenizer's own, which
    comes first in either case."""
    own, ends = tokenizer.eos_token_id, []
    if tokenizer.name_or_path:
        try:
            ends = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
        except (OSError, ValueError):  # there is none
            pass
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if own is not None and (own in ends or not ends):
        ends = [own, *ends]
    return list(dict.fromkeys(ends))


def added_tokens(tokenizer) -> dict[str, int]:
    """Tokens that a tokenizer finds as a whole in any text, as those that end an answer, and their ids."""
    return {token.content: idx for idx, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def render(tokenizer, template, messages, ask=False) -> str:
    """The text of a chat; with `ask` that of a prompt. Raises `ChatError` where the template refuses the chat."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:  # templates raise what they like, by Jinja or by Python
        raise ChatError(f"the chat template refuses it ({reason(error)})") from error


def _marked(messages, idx):
    """The chat with the mark in place of a turn's text."""
    content = MARK if isinstance(messages[idx]["content"], str) else [{"type": "text", "text": MARK}]
    return [*messages[:idx], {**messages[idx], "content": content}, *messages[idx + 1 :]]


def after_answer(tokenizer, template, messages) -> tuple[str, str]:
    """What a template writes (before, behind) the last turn, an assistant's, of a chat."""
    head, mark, rest = render(tokenizer, template, _marked(messages, len(messages) - 1)).rpartition(MARK)
    if not mark:
        raise ChatError("the chat template writes no answer")
    return head, rest


def end_of_template(tokenizer, template) -> int | None:
    """Id of the token of its own that a template writes behind an answer; None where there is none."""
    chat = [{"role": role, "content": [{"type": "text", "text": "?"}]} for role in ("user", "assistant")]
    _, rest = after_answer(tokenizer, template, chat)
    found = {rest.find(token): idx for token, idx in added_tokens(tokenizer).items() if token in rest}
    return found[min(found)] if found else None


class ChatWriter:
    """Chats as ids, and which of them are answers. The prompt of an answer is `generate`'s, token by token; an answer goes
    on to a token that ends one in `generate`, which is added where the template has none.

    Args:
        processor: [`UHRBatProcessor`].
        ends: ids that end an answer in `generate`; those of the processor's folder if None.
    """

    def __init__(self, processor, ends: list[int] | None = None):
        self.processor, self.tokenizer, self.template = processor, processor.tokenizer, processor.chat_template
        self.ends = ending_ids(processor.tokenizer) if ends is None else list(ends)
        tokens = {idx: token for token, idx in added_tokens(self.tokenizer).items()}
        self._ends = [tokens[end] for end in self.ends if end in tokens]
        if not self._ends:
            raise ChatError(
                f"No token ends an answer: `eos_token_id` of `generation_config.json` is {self.ends}, which the "
                "tokenizer does not know as tokens of their own. Known are "
                f"{', '.join(tokens.values()) or 'none'}: name one there."
            )

    def prompt(self, messages) -> list[int]:
        """Ids of what `generate` gets to answer a chat."""
        return self._encode(render(self.tokenizer, self.template, messages, ask=True))

    def write(self, messages, every: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a chat up to the end of its last answer, and which of them are learnt: the last turn; with `every` all of
        the assistant's that have a user's before them.

        Raises:
            ChatError: a chat that the template refuses, whose last turn is no answer, or an answer without text or end.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ChatError("the last turn is no answer")
        ids, learnt, text = [], [], ""
        behind = None  # what the template wrote behind the answer before, and how much of it is in the text
        answers = answered_turns(messages) if every else []
        for idx in answers or [len(messages) - 1]:
            prompt = render(self.tokenizer, self.template, messages[:idx], ask=True)
            said, rest = self._answer(messages[: idx + 1], prompt)
            if behind is not None:
                before_idx, rest_before, written = behind
                marked = render(self.tokenizer, self.template, _marked(messages[:idx], before_idx), ask=True)
                prompt = marked.rpartition(MARK)[2]
                prompt = prompt[len(written) :] if prompt.startswith(written) else prompt.removeprefix(rest_before)
            end = self._end(rest)
            if inside := [token for token in self._ends if token in said]:
                raise ChatError(f"the answer {said[:80]!r} holds {inside[0]!r}, at which answers end: leave it out")
            for piece, is_answer in ((prompt, False), (said + end, True)):
                new = self._append(ids, text, piece)
                text, ids, learnt = text + piece, ids + new, learnt + [is_answer] * len(new)
            if ids[-1] not in self.ends or len(new) < 2:
                raise ChatError(f"the answer {said!r} is written without text or the token {end!r} that ends it")
            behind = idx, rest, end
        return ids, learnt

    def show(self, messages, every: bool = False) -> str:
        """The text of a chat, what is learnt between >>> and <<<."""
        runs = groupby(zip(*self.write(messages, every)), key=itemgetter(1))
        texts = [(is_learnt, self.tokenizer.decode([token for token, _ in run])) for is_learnt, run in runs]
        return "".join(f">>>{text}<<<" if is_learnt else text for is_learnt, text in texts)

    def _answer(self, messages, prompt) -> tuple[str, str]:
        """What is to be said to the prompt, and what the template writes behind it."""
        head, rest = after_answer(self.tokenizer, self.template, messages)
        whole = render(self.tokenizer, self.template, messages)
        if whole.startswith(prompt) and whole.endswith(rest) and len(prompt) + len(rest) <= len(whole):
            said = whole[len(prompt) : len(whole) - len(rest)]
            extra = head[len(prompt) :]
            if any(token.special and token.content in extra for token in self.tokenizer.added_tokens_decoder.values()):
                raise ChatError(
                    f"the chat template writes {extra!r} before an answer, but does not end a prompt with it "
                    "(`add_generation_prompt`)"
                )
        elif whole.startswith(head) and whole.endswith(rest) and _same_words(head, prompt):
            said = whole[len(head) : len(whole) - len(rest)]  # a blank at the end of the prompt more or less
        else:
            raise ChatError(
                f"the chat template ends a prompt with {prompt[-40:]!r}, but an answer follows {head[-40:]!r}"
            )
        if not said.strip():
            raise ChatError("the answer has no text")
        return said, rest

    def _end(self, rest) -> str:
        """What a template wrote behind an answer, up to the first token that ends it; the first of these tokens where there
        is none."""
        found = [(rest.find(token), token) for token in self._ends if token in rest]
        if found:
            start, token = min(found)
            return rest[:start] + token
        return self._ends[0]

    def _encode(self, text) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self.processor.adds_special_tokens(text)).input_ids

    def _append(self, ids, text, more) -> list[int]:
        """Ids of a text that follows another one, whose ids stay as they are."""
        if not ids:
            ids = self._encode(more)
            if ids[-1:] != self.tokenizer(more, add_special_tokens=False).input_ids[-1:]:
                raise ChatError(
                    f"the tokenizer ends every prompt with {self.tokenizer.convert_ids_to_tokens(ids[-1])!r}: set `add_eos_token` "
                    "to false in its tokenizer_config.json"
                )
            return ids
        together = self._encode(text + more)
        if together[: len(ids)] == ids:
            return together[len(ids) :]
        return self.tokenizer(more, add_special_tokens=False).input_ids


def _same_words(head, prompt) -> bool:
    """Whether a prompt is a text, or goes on with it, but for blanks."""
    return "".join(prompt.split()).startswith("".join(head.split()))
