"""What a request may not do, as OpenAI's servers say it."""

# Letters of text for every token of the context window: more cannot fit, and are not given to the tokenizer.
LETTERS_PER_TOKEN = 32
# Letters of an error, and of the name of a field in it: what was given is shown, a giant of it not repeated.
MESSAGE_LETTERS, NAME_LETTERS = 1000, 100


def clip(text: str, letters: int = MESSAGE_LETTERS) -> str:
    """The text, its middle left out where it is longer."""
    half = (letters - 5) // 2
    return text if len(text) <= letters else f"{text[:half]} ... {text[-half:]}"


class Refusal(Exception):
    """A request that is not answered, and why.

    Attributes:
        message: for whoever asked; what was given, what is allowed, what to do.
        status: of HTTP, 4xx.
        param: field of the request that is meant.
        code: one word for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        self.message, self.param = clip(message), param and clip(param, NAME_LETTERS)
        super().__init__(self.message)
        self.status, self.code = status, code

    def body(self) -> dict:
        """The JSON of the answer, which OpenAI's clients know."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def check_count(number: int, limit: int, what: str, whose="The request"):
    """Raises `Refusal` for more of something than fits into the context window."""
    if number > limit:
        raise Refusal(
            f"{whose} has {number} {what}, of which at most {limit} fit into the context window.",
            param="messages",
            code="context_length_exceeded",
        )
