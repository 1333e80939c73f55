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


Number = Annotated[float, Field(allow_inf_nan=False)]


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
    content: str | list[Annotated[Text | Image, Field(discriminator="type")]]


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """Fields are OpenAI's up to `user`; `temperature` is 0 where it is not given: the best token every time."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    budgets: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]] | None = None
    bands: Annotated[list[int | str], Field(max_length=3)] | None = None
    value_range: Literal["dtype", "percentile"] | list[Number] | list[list[Number]] | None = None
    window: Annotated[list[int | Number | str], Field(min_length=4, max_length=5)] | None = None
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

    def prompt(self, processor) -> str:
        """The conversation as text, with one placeholder per image.

        Raises:
            Refusal: text that is longer than any that fits, or that holds the placeholder.
        """
        num_letters, conversation = 0, []
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
            num_letters += sum(map(len, texts))
            conversation.append({"role": message.role, "content": content})
        limit = LETTERS_PER_TOKEN * processor.tokenizer.model_max_length
        if num_letters > limit:
            raise Refusal(
                f"The text has {num_letters} letters, of which at most {limit} fit into the context window.",
                param="messages",
                code="context_length_exceeded",
            )
        return processor.apply_chat_template(conversation, add_generation_prompt=True)
