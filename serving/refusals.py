"""What a request may not do, as OpenAI's servers say it."""


class Refusal(Exception):
    """A request that is not answered, and why.

    Attributes:
        message: for whoever asked; what was given, what is allowed, what to do.
        status: of HTTP, 4xx.
        param: field of the request that is meant.
        code: one word for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict:
        """The JSON of the answer, which OpenAI's clients know."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
