"""A request of OpenAI's chat completions, with what is ours: budgets, how images are read, evidence.

Fields that are not listed are refused: nothing that a client asks for is passed over in silence.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .refusals import Refusal

# Images of one request.
MAX_IMAGES = 16
# Letters of text for every token of the context window: more cannot fit, and are not given to the tokenizer.
LETTERS_PER_TOKEN = 32
# Values of JSON for every token: a part of a message is a few.
VALUES_PER_TOKEN = 16
# Budgets of one request: no model has more scales.
MAX_SCALES = 64
# Numbers that are no counts, as of a raster's values and its places: with these, arithmetic has room.
MAX_NUMBER = 1e30
MAX_COUNT = 2**31 - 1
# Letters of a name, as of a band or a word that stops, and of a coordinate system.
NAME_LETTERS, SYSTEM_LETTERS = 1000, 20_000

Number = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_NUMBER, le=MAX_NUMBER)]
Whole = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
Budget = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Name = Annotated[str, Field(max_length=NAME_LETTERS)]
System = Annotated[str, Field(max_length=SYSTEM_LETTERS)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Text(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # budgets say it here


class Image(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Annotated[Text | Image, Field(discriminator="type")]], Field(fail_fast=True)]


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """Fields are OpenAI's up to `user`; `temperature` is 0 where it is not given: the best token every time."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Name | Annotated[list[Name], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    budgets: Count | Annotated[list[Budget], Field(max_length=MAX_SCALES, fail_fast=True)] | None = None
    bands: Annotated[list[Whole | Name], Field(max_length=3, fail_fast=True)] | None = None
    value_range: (
        Literal["dtype", "percentile"] | Pair | Annotated[list[Pair], Field(max_length=3, fail_fast=True)] | None
    ) = None
    window: Annotated[list[Whole | Number | System], Field(min_length=4, max_length=5, fail_fast=True)] | None = None
    evidence: bool = False

    @property
    def stop_words(self) -> list[str]:
        return [word for word in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if word]

    @property
    def reader_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bands", "value_range", "window")}

    def image_urls(self) -> list[str]:
        """In the order of the text.

        Raises:
            Refusal: more than `MAX_IMAGES`.
        """
        parts = [part for message in self.messages if not isinstance(message.content, str) for part in message.content]
        urls = [part.image_url.url for part in parts if part.type == "image_url"]
        if len(urls) > MAX_IMAGES:
            raise Refusal(f"{len(urls)} images are more than the {MAX_IMAGES} of a request.", param="messages")
        return urls

    def check_length(self, window: int):
        """Raises `Refusal` for more messages, parts or letters than fit into a context window of so many tokens."""
        texts, num_parts = [], len(self.messages)
        for message in self.messages:
            parts = message.content
            num_parts += 0 if isinstance(parts, str) else len(parts)
            texts += [parts] if isinstance(parts, str) else [part.text for part in parts if part.type == "text"]
        # Each is a token at least, that of its line.
        check_count(num_parts, window, "messages and parts")
        check_count(sum(map(len, texts)), LETTERS_PER_TOKEN * window, "letters")

    def prompt(self, processor) -> str:
        """The conversation as text, with one placeholder per image.

        Raises:
            Refusal: text that is longer than any that fits, or that holds the placeholder.
        """
        self.check_length(processor.tokenizer.model_max_length)
        conversation = []
        for message in self.messages:
            content = message.content
            if not isinstance(content, str):
                content = [{"type": "image"} if part.type == "image_url" else part.model_dump() for part in content]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            if any(processor.image_token in text for text in texts):
                raise Refusal(
                    f"The text holds {processor.image_token!r}. Give images as parts of the type `image_url`.",
                    param="messages",
                )
            conversation.append({"role": message.role, "content": content})
        return processor.apply_chat_template(conversation, add_generation_prompt=True)


def check_values(body: bytes, window: int):
    """Raises `Refusal` for a request of more values than any whose text fits: it is not even taken apart.

    Args:
        body: JSON, whose values are one more than its commas. Those of a text count too.
        window: tokens of the context window.
    """
    check_count(body.count(b","), (LETTERS_PER_TOKEN + VALUES_PER_TOKEN) * window, "values")


def check_count(number: int, limit: int, what: str):
    if number > limit:
        raise Refusal(
            f"The request has {number} {what}, of which at most {limit} fit into the context window.",
            param="messages",
            code="context_length_exceeded",
        )
