"""From a question to the text of its answer, for many at once: the front on threads, the decoder beside it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from functools import partial
from typing import NamedTuple

from tokenizers.decoders import DecodeStream

from .decoding import Decoder, Sampling, decode_from
from .front import Front, Selection, has_left
from .refusals import Refusal
from .structure import Forms


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        text: what came since the last piece.
        tokens: that it comes from, with those of letters whose bytes did not all come, less the one that ends the answer.
        num_tokens: of the answer so far.
        finish_reason: "stop" or "length" with the last piece, else None.
    """

    text: str
    tokens: list[int]
    num_tokens: int
    finish_reason: str | None = None


class Engine:
    """Front and decoder, shared by all requests of one event loop.

    Args:
        front, decoder: of the same model.
        max_requests: that are worked on at a time; each may wait on a thread for what another one computes.
        forms: of answers that keep to a schema.
    """

    def __init__(self, front: Front, decoder: Decoder, max_requests: int, forms: Forms | None = None):
        self.front, self.decoder, self.max_requests, self.forms = front, decoder, max_requests, forms
        self.window = front.model.config.text_config.max_position_embeddings
        self._threads = ThreadPoolExecutor(max_requests, thread_name_prefix="front")

    async def encode(self, source, **options):
        """See `Front.encode`."""
        return await self.call(self.front.encode, source, **options)

    async def register(self, earlier, later, **options) -> list:
        """See `Front.register`."""
        return await self.call(self.front.register, earlier, later, **options)

    async def select(self, prompt, images, budgets=None, max_tiles=None, dates=None) -> Selection:
        """See `Front.select`."""
        return await self.call(self.front.select, prompt, images, budgets, max_tiles, dates)

    async def call(self, function, *args, **kwargs):
        """What a function returns on a thread, which is told where the caller goes meanwhile (`has_left`)."""
        left, context = threading.Event(), copy_context()
        context.run(has_left.set, left.is_set)
        work = partial(context.run, function, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            left.set()

    async def check_schema(self, schema: str):
        """Raises what `Forms.make` raises, before anything is done for the answer."""
        await self.call(self.forms.make, schema)

    def check_room(self, selection: Selection, max_new_tokens: int, param="messages"):
        """Raises `Refusal`, with the field that is meant, where prompt and answer are more than the context window holds."""
        num_tokens = selection.num_tokens
        if num_tokens + max_new_tokens > self.window:
            raise Refusal(
                f"The prompt has {num_tokens} tokens with its images and the answer may have {max_new_tokens}, but the "
                f"context window holds {self.window}. Shorten the text, lower the budgets or `max_tokens`.",
                param=param,
                code="context_length_exceeded",
            )

    async def answer(self, selection: Selection, sampling: Sampling, stop: Sequence[str] = ()) -> AsyncIterator[Piece]:
        """The answer as it comes; its texts together are what `decode` of the processor gives for all of its tokens, up
        to the first of the words `stop`. Closing the iterator ends the work."""
        tokenizer = self.front.processor.tokenizer
        stream, ids, text, sent = DecodeStream(skip_special_tokens=True), [], "", 0
        left = []  # tokens that were not handed on, with the place in the text where each begins

        def taken(end):
            """Tokens that begin before a place."""
            number = next((idx for idx, (place, _) in enumerate(left) if place >= end), len(left))
            tokens, left[:number] = [token for _, token in left[:number]], []
            return tokens

        held = max(map(len, stop), default=1) - 1  # letters that may be the beginning of such a word
        async with aclosing(self._decode(selection, sampling)) as tokens:
            async for new in tokens:
                for token in new:
                    if token not in self.decoder.end_ids:
                        left.append((len(text), token))
                        text += stream.step(tokenizer.backend_tokenizer, int(token)) or ""
                ids += new
                found = find_stop(text, stop, sent)
                if found is not None:
                    yield Piece(text[sent:found], taken(found), len(ids), "stop")
                    return
                if len(text) - held > sent:
                    yield Piece(text[sent : len(text) - held], taken(len(text) - held), len(ids))
                    sent = len(text) - held
        # What is left of a letter whose bytes did not all come.
        said = ids[:-1] if ids and ids[-1] in self.decoder.end_ids else ids
        text += tokenizer.decode(list(map(int, said)), skip_special_tokens=True)[len(text) :]
        found = find_stop(text, stop, sent)
        reason = "stop" if found is not None or ids and ids[-1] in self.decoder.end_ids else "length"
        yield Piece(text[sent:found], taken(len(text) + 1 if found is None else found), len(ids), reason)

    def _decode(self, selection, sampling):
        """The tokens of the answer, as of `Decoder`."""
        # An answer that keeps to a schema begins with a sign of the schema, not with what a pointer tells.
        if selection.first_logits is None or sampling.schema:
            return self.decoder.decode(selection.prompt or selection.embeds, sampling)
        embed = self.front.model.get_input_embeddings()
        return decode_from(self.decoder, selection.embeds, selection.first_logits, embed, sampling)

    async def close(self):
        await self.decoder.close()
        self._threads.shutdown(cancel_futures=True)


def find_stop(text: str, stop: Sequence[str], sent: int) -> int | None:
    """Where the first of the words begins, behind what was sent; None if there is none."""
    found = [place for word in stop if (place := text.find(word, sent)) >= 0]
    return min(found, default=None)
