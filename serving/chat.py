"""A request of OpenAI's chat completions, with what is ours: budgets, how images are read, evidence, objects.

What a client asks for and is not there is refused by its name, nothing is passed over in silence; what asks for nothing
(`frequency_penalty` 0, `tools` []), as many clients always send, is taken.
"""

from codecs import BOM_UTF8
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from ..image_raster_files_uhr_bat import reason
from ..planning.planner import FREE, parse_limit
from .refusals import LETTERS_PER_TOKEN, Refusal, check_count, clip
from .refusals import NAME_LETTERS as PLACE_LETTERS

# Images of one request.
MAX_IMAGES = 16
# Values of JSON for every token: a part of a message is a few.
VALUES_PER_TOKEN = 16
# Fields of an object: the longest has some fifty.
MAX_FIELDS = 200
# Budgets of one request: no model has more scales.
MAX_SCALES = 64
# Numbers that are no counts, as of a raster's values and its places: with these, arithmetic has room.
MAX_NUMBER = 1e30
MAX_COUNT = 2**31 - 1
# Letters of a name, as of a band or a word that stops, and of a coordinate system.
NAME_LETTERS, SYSTEM_LETTERS = 1000, 20_000

# Fields, and the words by which errors of reading and compressing name them.
NAMED = {
    "budgets": ("budget", "limit is memory", "would fit", "seconds are not"),
    "max_tiles": ("tiles",),
    "native": ("native",),
    "bands": ("band",),
    "value_range": ("range of values",),
    "window": ("window", "bounds"),
    "nodata": ("nodata",),
    "page": ("page",),
    "dates": ("the two dates",),
}


Number = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_NUMBER, le=MAX_NUMBER)]
Value = Annotated[float, Field(allow_inf_nan=False)]  # as -3.4028235e38 of many rasters
Whole = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
Budget = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Name = Annotated[str, Field(max_length=NAME_LETTERS)]
Limit = Annotated[str, Field(max_length=NAME_LETTERS)]  # "24GiB", "5s"
System = Annotated[str, Field(max_length=SYSTEM_LETTERS)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2, fail_fast=True)]


class _Strict(BaseModel):
    """An object of a request, less the fields that ask for nothing: null, unless the field must be there; of fields that
    are not there, what is empty, what `nothing` says, and what only labels a request (`labels`)."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    nothing: ClassVar[dict[str, tuple]] = {}
    labels: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def without_nothing(cls, value):
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise PydanticCustomError("fields", f"{len(value)} fields are more than the {MAX_FIELDS} of an object")
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        return {name: one for name, one in value.items() if not cls._asks_nothing(name, one, fields)}

    @classmethod
    def _asks_nothing(cls, name, value, fields):
        if name in fields:
            return value is None and not fields[name].is_required()
        if name in cls.labels:
            return value is None or isinstance(value, (str, dict))
        return value is None or value == [] or value == {} or value in cls.nothing.get(name, ())


class Text(_Strict):
    labels = frozenset({"cache_control"})

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # budgets say it here


class Image(_Strict):
    labels = frozenset({"cache_control"})

    type: Literal["image_url"]
    image_url: ImageUrl


def kind_of_part(part):
    """Which of the two models a part is of, by its `type`."""
    name = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{name}>" if isinstance(name, str) else None


Part = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Image, Tag("<image_url>")],
    Discriminator(
        kind_of_part,
        custom_error_type="part",
        custom_error_message="A part is an object whose `type` is 'text' or 'image_url'",
    ),
]


class Message(_Strict):
    labels = frozenset({"cache_control", "name"})

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    @property
    def texts(self) -> list[str]:
        content = self.content
        return [content] if isinstance(content, str) else [part.text for part in content if part.type == "text"]


class StreamOptions(_Strict):
    nothing = {"include_obfuscation": (False,)}

    include_usage: bool = False


class JsonSchema(_Strict):
    name: Name | None = None
    description: str | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # an answer keeps to its schema in any case


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_its_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` belongs to the type 'json_schema', and to no other")
        return self


class ChatRequest(_Strict):
    """Fields are OpenAI's up to `user`; `temperature` is 0 where it is not given: the best token every time."""

    # Fields that are not there, and the values by which clients say that they do not ask for it: defaults of OpenAI's API,
    # of vLLM's and of llama.cpp's.
    nothing = {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "parallel_tool_calls": (False, True),
        "presence_penalty": (0,),
        "priority": (0,),
        "reasoning_effort": ("none",),
        "repetition_penalty": (1,),
        "service_tier": ("auto", "default"),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "top_k": (0, -1),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
    }
    labels = frozenset({"metadata", "prompt_cache_key", "safety_identifier"})

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Name | Annotated[list[Name], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    budgets: Count | Limit | Annotated[list[Budget], Field(max_length=MAX_SCALES, fail_fast=True)] | None = None
    max_tiles: Count | None = None
    native: bool | None = None
    bands: Annotated[list[Whole | Name], Field(max_length=3, fail_fast=True)] | None = None
    value_range: (
        Literal["dtype", "percentile"] | Pair | Annotated[list[Pair], Field(max_length=3, fail_fast=True)] | None
    ) = None
    window: Annotated[list[Whole | Number | System], Field(min_length=4, max_length=5, fail_fast=True)] | None = None
    nodata: Value | Annotated[list[Value], Field(min_length=2, max_length=2, fail_fast=True)] | None = None
    page: Count | None = None
    dates: bool = False
    evidence: bool = False
    objects: bool = False

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with every token; None where nothing of it was asked for.

        Raises:
            Refusal: they are asked for without `logprobs`.
        """
        if self.top_logprobs and not self.logprobs:
            raise Refusal("`top_logprobs` are told with `logprobs` true alone.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def stop_words(self) -> list[str]:
        return [word for word in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if word]

    @property
    def reader_options(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("bands", "value_range", "window", "nodata", "page", "max_tiles", "native")
        }

    def refusal(self, error: Exception) -> Refusal:
        """What reading and compressing raised, as a refusal that names the field that is meant: the one that the error names."""
        text = str(error)
        if "context window" in text:
            return Refusal(text, param="messages", code="context_length_exceeded")
        named = [name for name in NAMED if f"`{name}" in text]
        named.sort(key=lambda name: text.index(f"`{name}"))
        named += [
            name
            for name, words in NAMED.items()
            if getattr(self, name) is not None and any(word in text.lower() for word in words)
        ]
        return Refusal(text, param=(named or ["messages"])[0], code="invalid_request")

    def check_limit(self, num_images: int):
        """Raises `Refusal` for budgets that are a limit and cannot be kept to, before an image is read."""
        if not isinstance(self.budgets, str):
            return
        try:
            if self.budgets.strip().lower() != FREE:
                parse_limit(self.budgets)
            if num_images > 1:
                raise ValueError(f"`budgets={self.budgets!r}` is the limit of one image. Got {num_images} images.")
        except ValueError as error:
            raise Refusal(str(error), param="budgets", code="invalid_request") from error

    def image_urls(self) -> list[str]:
        """In the order of the text.

        Raises:
            Refusal: more than `MAX_IMAGES`; `dates` of other than two; `objects` of several that are no dates, or of none.
        """
        parts = [part for message in self.messages if not isinstance(message.content, str) for part in message.content]
        urls = [part.image_url.url for part in parts if part.type == "image_url"]
        if len(urls) > MAX_IMAGES:
            raise Refusal(f"{len(urls)} images are more than the {MAX_IMAGES} of a request.", param="messages")
        if self.dates and len(urls) != 2:
            raise Refusal(
                f"`dates` compares 2 images of one place, the earlier one first. Got {len(urls)} in all messages.",
                param="dates",
                code="invalid_request",
            )
        if self.objects and len(urls) != 1 and not self.dates:
            raise Refusal(
                f"`objects` lie in one image, and no answer says in which of several. Got {len(urls)} images.",
                param="objects",
                code="invalid_request",
            )
        return urls

    def check_length(self, window: int):
        """Raises `Refusal` for more messages, parts or letters than fit into a context window of so many tokens."""
        num_parts, texts = len(self.messages), []
        for message in self.messages:
            num_parts += 0 if isinstance(message.content, str) else len(message.content)
            texts += message.texts
        # Each is a token at least, that of its line.
        check_count(num_parts, window, "messages and parts")
        check_count(sum(map(len, texts)), LETTERS_PER_TOKEN * window, "letters")

    def prompt(self, processor, window: int) -> str:
        """The conversation as text, with one placeholder per image; those that it spells, and other control tokens,
        are text.

        Raises:
            Refusal: text that is longer than any that fits the context window, or that the chat template does not write.
        """
        self.check_length(window)
        conversation = []
        for message in self.messages:
            content = message.content
            if not isinstance(content, str):
                content = [{"type": "image"} if part.type == "image_url" else part.model_dump() for part in content]
            # Of OpenAI's two names for who stands above the user, models learned the older one.
            role = "system" if message.role == "developer" else message.role
            conversation.append({"role": role, "content": content})
        if not self.goes_on():
            return written(processor, conversation, add_generation_prompt=True)
        # The template writes the message with its end, which is what stands behind this mark.
        mark = uuid4().hex
        conversation[-1]["content"] = "\n".join(self.messages[-1].texts) + mark
        return written(processor, conversation).partition(mark)[0]

    def goes_on(self) -> bool:
        """Whether the answer goes on with the last message, which is the assistant's: unless `continue_final_message`
        says that it does not.

        Raises:
            Refusal: it shall, and cannot.
        """
        last, wanted = self.messages[-1], self.continue_final_message
        if wanted and last.role != "assistant":
            raise Refusal(
                f"The last message is of the role {last.role!r}, and only one of 'assistant' can be continued.",
                param="continue_final_message",
            )
        goes_on = last.role == "assistant" if wanted is None else wanted
        if self.add_generation_prompt is False and not goes_on:
            raise Refusal(
                "Without a generation prompt there is nothing that answers: leave it out, or continue a last message of the "
                "role 'assistant' (`continue_final_message`).",
                param="add_generation_prompt",
            )
        if self.add_generation_prompt and wanted:
            raise Refusal(
                "`add_generation_prompt` begins a new message where `continue_final_message` goes on with the last one: "
                "ask for one of them.",
                param="add_generation_prompt",
            )
        if goes_on and not isinstance(last.content, str) and len(last.texts) < len(last.content):
            raise Refusal("A message that is to be continued holds text alone.", param="messages")
        return goes_on


def written(processor, conversation: list[dict], **options) -> str:
    """A conversation as its chat template writes it. Templates differ in whether they know a message's text by itself or as
    a part, and leave out what they do not know: that all is written is tried with a mark in each text's place.

    Raises:
        Refusal: the template refuses it, or leaves out a part of it.
    """
    faults, options = [], options | {"sanitize_control_tokens": True}
    for shape in (lambda content: content, _as_parts, _as_text):
        messages = [message | {"content": shape(message["content"])} for message in conversation]
        mark, roles = uuid4().hex, []

        def marked(text, role):
            if not text.strip():
                return text
            roles.append(role)
            return f"{mark}-{len(roles) - 1}-"

        probe = []
        for message in messages:
            content, role = message["content"], message["role"]
            if isinstance(content, str):
                content = marked(content, role)
            else:
                content = [part | {"text": marked(part["text"], role)} if "text" in part else part for part in content]
            probe.append({"role": role, "content": content})
        try:
            text = processor.apply_chat_template(probe, **options)
            lost = [role for idx, role in enumerate(roles) if f"{mark}-{idx}-" not in text]
            if not lost and text.count(processor.image_token) == _count_images(messages):
                return processor.apply_chat_template(messages, **options)
            faults.append(f"leaves out a message of the role {lost[0]!r}" if lost else "leaves out images")
        except Exception as error:  # templates raise what they like
            faults.append(f"refuses these messages ({reason(error)})")
    told = ", ".join(repr(message["role"]) for message in conversation[:8])
    raise Refusal(
        f"The chat template of this model {faults[0]}. Their roles are {told}: some models know no 'system', and turns of "
        "'user' and 'assistant' by turns alone.",
        param="messages",
        code="invalid_request",
    )


def _as_parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_text(content):
    is_text = not isinstance(content, str) and all(part["type"] == "text" for part in content)
    return "\n".join(part["text"] for part in content) if is_text else content


def _count_images(messages) -> int:
    return sum(part["type"] == "image" for message in messages for part in _as_parts(message["content"]))


def check_values(body: bytes, window: int):
    """Raises `Refusal` for a request of more values than any whose text fits: it is not even taken apart.

    Args:
        body: JSON, whose values are one more than its commas. Those of a text count too.
        window: tokens of the context window.
    """
    check_count(body.count(b","), (LETTERS_PER_TOKEN + VALUES_PER_TOKEN) * window, "values")


# What is wrong with a request

# Errors of a union that say only that a value is of another one of its types.
OTHER_TYPE = frozenset(
    {"string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type", "model_type", "literal_error"}
)


def read_request(body: bytes, window: int) -> ChatRequest:
    """The request that a body holds.

    Args:
        window: see `check_values`.

    Raises:
        Refusal: the first thing that is wrong with it, by the name of its field.
    """
    check_values(body, window)
    try:
        data = from_json(body.removeprefix(BOM_UTF8))
    except ValueError as error:
        raise Refusal(f"The request is no JSON: {error}.", code="invalid_json") from None
    return checked_request(data)


def checked_request(data) -> ChatRequest:
    """The request of some values. Raises `Refusal` as `read_request` does."""
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise fault(data, error) from None


def fault(data, error: ValidationError, whole="The request") -> Refusal:
    """The first thing that is wrong with values that a model refused; `whole` is what they are called together."""
    place, why = first_fault(data, error.errors(include_url=False, include_input=False, include_context=False))
    return Refusal(f"{clip(place, PLACE_LETTERS) or whole}: {why}.", param=place or None)


def first_fault(data, errors: list[dict]) -> tuple[str, str]:
    """(place of a value in the request, as messages.0.content; what is wrong with it).

    Every type of a union tells its own error. The one that got furthest into the value is of the type that was meant.
    """
    places = [_place(data, error) for error in errors]
    first = places[0][:2]  # a field, and of a list its entry
    deepest = max((place for place in places if all(token == other for token, other in zip(place, first))), key=len)
    here = [error for error, place in zip(errors, places) if place == deepest]
    told = [error for error in here if error["type"] not in OTHER_TYPE][:1] or here
    words = list(dict.fromkeys(_words(error, deepest) for error in told))
    return ".".join(map(str, deepest)), "; or: ".join(words)


def _place(data, error) -> tuple:
    """Names and numbers that lead to a value: of an error's place those that are of the request, and no type's."""
    *names, last = error["loc"] or (None,)
    place = []
    for name in names:
        if isinstance(data, dict) and name in data or isinstance(data, list) and isinstance(name, int):
            data = data[name]
            place.append(name)
    if isinstance(data, dict):
        is_there = last in data or error["type"] in ("missing", "extra_forbidden")
    else:
        is_there = isinstance(data, list) and isinstance(last, int)
    return (*place, last) if is_there else tuple(place)


def _words(error, place):
    name = place[-1] if place else None
    if error["type"] == "model_type":
        return "Input should be an object"
    if error["type"] != "extra_forbidden":
        return error["msg"]
    taken = ChatRequest.nothing.get(name, ()) if len(place) == 1 else ()
    only = f", and takes only what asks for nothing: {', '.join(map(repr, taken))}" if taken else ""
    return f"This server has no such field{only}"
