"""Answers in the form of a JSON schema: which tokens may come next, by llguidance.

Both backends take the same schemas: vLLM is told to use the same library.
"""

import json
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..common.extras import require

# Letters of a schema as JSON.
SCHEMA_LETTERS = 50_000


class FormError(ValueError):
    """No answer keeps to a schema, or none goes on from what was said of it."""


class Forms:
    """Makes the forms of answers. Safe to share among threads.

    Args:
        tokenizer: fast, of transformers.
        end_ids: tokens that end an answer.
        size: of the vocabulary that the model tells apart.
    """

    def __init__(self, tokenizer, end_ids, size: int):
        self.tokenizer, self.end_ids, self.size = tokenizer, sorted(end_ids), size

    @cached_property
    def tokens(self):
        """What llguidance knows of the tokenizer."""
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=self.end_ids)

    def make(self, schema: str) -> "Form":
        """The form of an answer that keeps to a schema, JSON.

        Raises:
            FormError: it is none, or llguidance does not know how to keep to it.
            ImportError: llguidance is missing; says what to install.
        """
        if len(schema) > SCHEMA_LETTERS:
            raise FormError(f"The schema has {len(schema)} letters, more than the {SCHEMA_LETTERS} of one.")
        require("structured", "llguidance")
        return Form(self.tokens, schema)


class Form:
    """The form of one answer, on its way; see `Forms.make`."""

    def __init__(self, tokens, schema: str):
        from llguidance import LLMatcher

        # Without line breaks and blanks, which a model may put in for ever.
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        self._size, self._matcher = tokens.vocab_size, LLMatcher(tokens, grammar, log_level=0)
        self.allowed()  # whether there is a first token

    def _check(self):
        if self._matcher.is_error():
            why = (self._matcher.get_error() or "it says nothing more").splitlines()[0]
            raise FormError(f"No answer of this schema can be made: {why}.")

    def allowed(self) -> torch.Tensor:
        """bool[V], tokens that may come next. Raises `FormError` where there is none, or they are too much to tell."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        return torch.from_numpy(bits[: self._size].astype(bool))

    def take(self, token: int):
        """The token that came next."""
        self._matcher.consume_token(token)


def schema_text(response_format) -> str | None:
    """JSON of the schema that a request's `response_format` asks for; None where it asks for none."""
    if response_format is None or response_format.type == "text":
        return None
    schema: Any = {"type": "object"} if response_format.type == "json_object" else response_format.json_schema.content
    return json.dumps(schema, ensure_ascii=False)
