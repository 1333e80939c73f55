"""The server's HTTP: OpenAI's chat completions, its list of models, health and metrics."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .chat import ChatRequest, read_request
from .decoding import Sampling
from .doors import Doors, Named
from .engine import Engine, Piece
from .evidence import answered_objects, evidence_members
from .limits import Limits
from .metrics import Metrics
from .refusals import LETTERS_PER_TOKEN, Refusal
from .sources import SourceRules
from .structure import FormError, schema_text

logger = logging.getLogger(__name__)

# What is sent to nobody: the client went.
GONE = Response(status_code=499)
FAILED = Refusal("The server failed; its log says why.", 500)
# Tokens of an answer where a request does not say how many.
DEFAULT_TOKENS = 256
# A request's bytes beside those of an image, in base64.
TEXT_BYTES = 2**20
# Of a letter in JSON: two escapes of six letters.
LETTER_BYTES = 12
# Of an answer in parts: proxies hand each part on as it comes, and keep none.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _Stream(StreamingResponse):
    """Events whose source is closed as soon as the client goes, not when memory is cleared."""

    async def stream_response(self, send):
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


class _Asked:
    """A request that was checked and whose images are compressed: what is left is to decode. `text`: of the answer so far."""

    def __init__(self, engine, request, images, selection, sampling):
        self.engine, self.request, self.images, self.selection = engine, request, images, selection
        self.sampling = sampling
        self.num_tokens, self.finish_reason, self.text = 0, None, ""

    async def pieces(self) -> AsyncIterator[Piece]:
        """Parts of the answer; `num_tokens` and `finish_reason` are known at its end."""
        answer = self.engine.answer(self.selection, self.sampling, self.request.stop_words)
        begins = not self.request.goes_on()  # the blank before a first word is none of an answer
        async with aclosing(answer) as pieces:
            try:
                async for piece in pieces:
                    if begins:
                        piece = piece._replace(text=piece.text.lstrip())
                        begins = not piece.text
                    self.num_tokens, self.finish_reason = piece.num_tokens, piece.finish_reason
                    self.text += piece.text
                    if piece.text or piece.tokens:
                        yield piece
            except FormError as error:  # some schemas are found too much on the way alone
                raise no_form(error) from error

    async def members(self) -> dict:
        """{"evidence": ..., "objects": ...}, of which there is what was asked for."""
        found, request = {}, self.request
        if request.evidence:
            found["evidence"] = await asyncio.to_thread(evidence_members, self.selection, self.images)
        if request.objects:
            # What the answer goes on with may have begun a box.
            text = "".join(request.messages[-1].texts if request.goes_on() else []) + self.text
            read = answered_objects, self.engine.front.model, text, self.selection, self.images[-1]
            found["objects"] = await asyncio.to_thread(*read)
        return found

    def logprobs(self, pieces: list[Piece]) -> dict | None:
        """The member `logprobs` of a choice, of its tokens in some parts."""
        if self.sampling.top_logprobs is None:
            return None
        decode = self.engine.front.processor.tokenizer.decode

        def entry(token, logprob):
            text = decode([token])
            # Letters whose bytes are in several tokens have none of their own in this one.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        tokens = [token for piece in pieces for token in piece.tokens]
        content = [
            {**entry(int(token), token.logprob), "top_logprobs": [entry(*pair) for pair in token.top.items()]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    @property
    def usage(self) -> dict:
        prompt, answer = self.selection.num_tokens, self.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Service:
    """What the routes call.

    Args:
        engine: front and decoder.
        name: of the model, as requests name it.
        sources: what images a request may name.
        max_image_pixels: of the largest image.
    """

    def __init__(self, engine: Engine, name: str, sources: SourceRules, max_image_pixels: int):
        self.engine, self.name, self.sources, self.max_image_pixels = engine, name, sources, max_image_pixels
        self.metrics = Metrics(engine)
        self.started = int(time.time())

    async def parse(self, body: bytes) -> ChatRequest:
        request = await asyncio.to_thread(read_request, body, self.engine.window)
        self.check_name(request.model)
        return request

    def check_name(self, name):
        if name != self.name:
            raise Refusal(
                f"There is no model {name[:100]!r} here. This is {self.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def ask(self, request: ChatRequest) -> _Asked:
        """All that can refuse a request happens here, before its answer begins.

        Raises:
            Refusal: what of it cannot be done, and why.
        """
        engine, processor = self.engine, self.engine.front.processor
        top_logprobs, schema = request.told_logprobs, schema_text(request.response_format)
        if schema is not None:
            try:
                await engine.check_schema(schema)
            except (ValueError, ImportError) as error:
                raise no_form(error) from error
        urls = request.image_urls()
        request.check_limit(len(urls))
        prompt = await asyncio.to_thread(request.prompt, processor, engine.window)
        try:
            # Of a prompt that is too long no image is read.
            num_tokens = len(await asyncio.to_thread(processor.tokenizer.encode, prompt))
            if num_tokens >= engine.window:
                raise Refusal(
                    f"The text alone has {num_tokens} tokens, but the context window holds {engine.window}.",
                    param="messages",
                    code="context_length_exceeded",
                )
            engine.front.check_limit(request.budgets, request.max_tiles)
            options = request.reader_options | {"max_image_pixels": self.max_image_pixels}
            images, pair, dates = [], [], None
            if request.dates:
                pair = [await self.sources.read(url) for url in urls]
                dates = await engine.register(*pair, **options | {"max_tiles": None, "native": None})
            for idx, url in enumerate(urls):
                source = pair[idx] if pair else await self.sources.read(url)
                images.append(await engine.encode(source, **options))
            selection = await engine.select(prompt, images, request.budgets, request.max_tiles, dates)
        except MemoryError:
            raise Refusal("An image takes more memory than the server has.", 413, code="image_too_large") from None
        except (OSError, ValueError, ImportError) as error:
            raise request.refusal(error) from error
        wanted = request.max_completion_tokens or request.max_tokens
        room = engine.window - selection.num_tokens
        sampling = Sampling(
            max_new_tokens=wanted or max(1, min(DEFAULT_TOKENS, room)),
            temperature=request.temperature or 0.0,
            top_p=request.top_p or 1.0,
            seed=request.seed if request.seed is None else request.seed % 2**63,  # vLLM's -1 is none at all
            top_logprobs=top_logprobs,
            schema=schema,
        )
        given = [name for name in ("max_completion_tokens", "max_tokens") if getattr(request, name)]
        engine.check_room(selection, sampling.max_new_tokens, *given[:1])
        return _Asked(engine, request, images, selection, sampling)

    @asynccontextmanager
    async def watched(self):
        """Counts a request's seconds, and a client that goes before its end; yields what is to be called when its first piece
        is there."""
        begun = time.perf_counter()
        self.metrics.active.inc()
        first = []

        def came():
            if not first:
                first.append(True)
                self.metrics.first_seconds.observe(time.perf_counter() - begun)

        try:
            yield came
            self.metrics.seconds.observe(time.perf_counter() - begun)
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.requests.labels(str(GONE.status_code)).inc()
            raise
        finally:
            self.metrics.active.dec()

    def count(self, asked):
        self.metrics.requests.labels("200").inc()
        self.metrics.tokens.labels("prompt").inc(asked.selection.num_tokens)
        self.metrics.tokens.labels("answer").inc(asked.num_tokens)

    async def whole(self, request: ChatRequest) -> dict:
        """The answer in one piece."""
        async with self.watched() as came:
            asked, pieces = await self.ask(request), []
            async for piece in asked.pieces():
                came()
                pieces.append(piece)
            members = await asked.members()
        self.count(asked)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": asked.logprobs(pieces),
            "finish_reason": asked.finish_reason,
        }
        return {**self.heading("chat.completion"), "choices": [choice], "usage": asked.usage, **members}

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        """The answer as server-sent events. Whatever refuses the request does so before the first of them."""
        heading = self.heading("chat.completion.chunk")

        def event(delta, finish_reason=None, logprobs=None, **fields):
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
            return sse({**heading, "choices": [choice], **fields})

        async with self.watched() as came:
            asked = await self.ask(request)
            yield event({"role": "assistant", "content": ""})
            async with aclosing(asked.pieces()) as pieces:
                async for piece in pieces:
                    came()
                    yield event({"content": piece.text}, logprobs=asked.logprobs([piece]))
            yield event({}, asked.finish_reason, **await asked.members())
        self.count(asked)
        if request.stream_options and request.stream_options.include_usage:
            yield sse({**heading, "choices": [], "usage": asked.usage})
        yield "data: [DONE]\n\n"

    def heading(self, kind) -> dict:
        return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}


def no_form(error: Exception) -> Refusal:
    """What a schema that cannot be kept to raised, as a refusal."""
    return Refusal(str(error), param="response_format", code="invalid_request")


def sse(value) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def after(first: str, events: AsyncIterator[str], on_failure) -> AsyncIterator[str]:
    """Events behind the first one; an error becomes the last of them, and its status is told by a call."""
    async with aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except Refusal as refusal:
            on_failure(refusal.status)
            yield sse(refusal.body())
        except Exception:
            logger.exception("An answer failed on its way.")
            on_failure(FAILED.status)
            yield sse(FAILED.body())


async def unless_gone(request: Request, work):
    """What `work` returns; it is cancelled where the client goes, and then None is returned."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def make_app(
    service: Service,
    max_requests: int,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    access_log=False,
):
    """The application (ASGI); it closes the engine when the server stops.

    Args:
        service: what it calls.
        max_requests: see `Limits`.
        keys, hosts: see `Doors`.
        origins: of pages in browsers that may ask, "*" for all (CORS).
        access_log: see `Named`.
    """
    engine, metrics = service.engine, service.metrics

    @asynccontextmanager
    async def lifespan(app):
        yield
        await engine.close()

    def count(status):
        metrics.requests.labels(str(status)).inc()

    app = FastAPI(title="UHR-BAT", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(Refusal)
    async def refuse(request, refusal):
        count(refusal.status)
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(HTTPException)
    async def no_such_route(request, error):
        return JSONResponse(Refusal(str(error.detail), error.status_code).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request, error):
        count(FAILED.status)
        return JSONResponse(FAILED.body(), 500)

    schema = {"application/json": {"schema": ChatRequest.model_json_schema()}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": {"content": schema, "required": True}})
    async def chat(request: Request):
        asked_for = await service.parse(await request.body())
        if asked_for.stream:
            events = service.stream(asked_for)
            first = await unless_gone(request, anext(events))
            if first is None:
                return GONE
            events = after(first, events, count)
            return _Stream(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        answer = await unless_gone(request, service.whole(asked_for))
        return GONE if answer is None else JSONResponse(answer)

    model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "uhr-bat"}
    read = {"methods": ["GET", "HEAD"]}

    @app.api_route("/v1/models", **read)
    async def models():
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{name:path}", **read)
    async def one_model(name: str):
        service.check_name(name)
        return model

    @app.api_route("/health", **read)
    async def health():
        alive = engine.decoder.is_alive
        return JSONResponse({"status": "ok" if alive else "the decoder has stopped"}, 200 if alive else 503)

    @app.api_route("/metrics", **read)
    async def page():
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return behind_doors(app, service, max_requests, keys, hosts, origins, access_log, on_refusal=count)


def behind_doors(
    app,
    service,
    max_requests,
    keys=(),
    hosts=None,
    origins=(),
    access_log=False,
    locked="/v1",
    on_refusal=lambda status: None,
):
    """An application with the server's limits and doors around it, and around its own errors too, which `add_middleware` is
    not. See `make_app`, and `locked` in `Doors`."""
    max_bytes = most_bytes(service)
    text_bytes = service.engine.window * LETTERS_PER_TOKEN * LETTER_BYTES + TEXT_BYTES
    limited = Limits(app, max_bytes, max_requests, min(max_bytes, text_bytes), on_refusal=on_refusal)
    doors = Doors(limited, keys, hosts, locked, origins)
    if origins:
        doors = CORSMiddleware(
            doors, origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=("x-request-id",)
        )
    return Named(doors, access_log)


def most_bytes(service) -> int:
    """Of a request's body: an image in base64, and text."""
    return service.sources.max_bytes * 4 // 3 + TEXT_BYTES
