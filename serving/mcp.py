"""A server of tools for agents (Model Context Protocol): open, ask, objects, look, where and plan for images of any size.

uhr-bat mcp [MODEL] [--allow-local-files FOLDER] [--transport http --port 8000]
"""

import argparse
import asyncio
import base64
import functools
import json
import logging
import sys
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..common.commands import tells_errors
from ..common.extras import require
from ..common.loading import WEIGHTS_NOTE
from ..common.models import is_tiny
from ..image_raster_files_uhr_bat import reason
from .refusals import Refusal, clip
from .serve import add_arguments, check, listen, make_service, who_may_ask

logger = logging.getLogger(__name__)

PATH = "/mcp"
# Seconds after which long work is told of again.
TICK = 5
SAYS = (
    "Questions about images of up to 100,000 pixels a side, such as satellite scenes, without guessing crops. Ask `where` for "
    "the windows that a question should be looked at in, `look` at them, and `ask` for the model's own answer with the places "
    "that it was read from. `open` and `plan` say what it costs. Boxes and windows are [top, left, bottom, right] in pixels of "
    "the whole image; sizes are [height, width]."
)

# Tiles that a question may look at where nobody says how many: what UHR-BAT-Tiny was measured with.
TILES = 128
# Longest side in pixels of a picture, unless another is asked for: the least of those that were measured with which three looks
# suffice (docs/agents.md). Then the least and the greatest.
SIDE, LEAST_SIDE, MOST_SIDE = 1536, 16, 4096
# Windows and places that are told at most, and places unless another number is asked for.
MOST_WINDOWS, MOST_EVIDENCE, EVIDENCE = 50, 10_000, 20
# Most pixels a side of an image that is planned for, and the greatest count.
PLANNED_SIDE, MOST = 1_000_000, 2**31 - 1

# What the tools take. Agents read the descriptions; the server checks values once more as those of any request. Nothing here may
# import torch: an agent waits for the list of tools.
Number = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=PLANNED_SIDE)]
Source = Annotated[str, Field(description="A path in the server's folder, an https: URL or a data: URL.")]
Question = Annotated[str, Field(description="What is asked about the image.")]
Tokens = Annotated[Count, Field(description="Visual tokens that the answer is read from.")]
Tiles = Annotated[
    Number,
    Field(ge=0, le=MOST, description="Tiles that are encoded where the question looks, down to the image's own pixels. More "
    "find more and take longer. 0: all tiles of the model's own scales, and no finer ones."),
]  # fmt: skip
Side = Annotated[
    Number,
    Field(ge=LEAST_SIDE, le=MOST_SIDE, description="Longest side of a picture in pixels: as large as you can see."),
]
Box = Annotated[
    list[Number],
    Field(min_length=4, max_length=4, fail_fast=True, description="[top, left, bottom, right] in pixels."),
]
Bands = Annotated[list[int | str], Field(max_length=3, fail_fast=True)]
Range = Annotated[list[float], Field(max_length=2, fail_fast=True)]


class Reading(BaseModel):
    """How a raster is read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bands: Annotated[Bands | None, Field(description="Three bands or one, by number or name.")] = None
    value_range: Annotated[str | Range | None, Field(description="[black, white], 'dtype' or 'percentile'.")] = None
    nodata: Annotated[float | None, Field(description="A value that is no part of the image.")] = None
    page: Annotated[int | None, Field(description="Of a TIFF, from 1.")] = None


def told_reading(reading: Reading | None) -> dict:
    return {} if reading is None else reading.model_dump(exclude_none=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uhr-bat mcp", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--transport", choices=("stdio", "http"), default="stdio",
        help="stdio: whoever starts the server speaks with it alone; http: at --host and --port (default: stdio)",
    )  # fmt: skip
    return parser


class Loading:
    """The tools, whose model is loaded once on a thread while the server answers already: agents give up servers that begin
    slowly."""

    def __init__(self, args):
        self._args, self._task = args, None
        self.max_calls = args.max_requests

    def start(self):
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(asyncio.to_thread(make_tools, self._args))
            self._task.add_done_callback(self._tell)

    def _tell(self, task):
        if not task.cancelled() and task.exception() is not None:
            print(f"Error: {task.exception()}", file=sys.stderr, flush=True)

    async def __call__(self):
        self.start()
        try:
            return await asyncio.shield(self._task)
        except Exception as error:
            raise ValueError(f"The model could not be loaded: {reason(error)}") from error

    async def close(self):
        if self._task is not None and self._task.done() and self._task.exception() is None:
            await self._task.result().engine.close()


class Loaded:
    """Tools that are there already."""

    def __init__(self, tools):
        self._tools = tools
        self.max_calls = tools.engine.max_requests

    def start(self):
        pass

    async def __call__(self):
        return self._tools

    async def close(self):
        await self._tools.engine.close()


def make_tools(args):
    """The `Tools` of the options."""
    service = make_service(args)
    from .mcp_tools import Tools

    return Tools(service)


class Answered:
    """A transport's messages, less what is none, which the package passes over in silence: that is answered by the error that
    JSON-RPC 2.0 has for it, of no id.

    Args:
        messages: the package's stream of messages and errors.
        answers: its stream of answers.
    """

    def __init__(self, messages, answers):
        self.messages, self.answers = messages, answers

    def __getattr__(self, name):
        return getattr(self.messages, name)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while isinstance(item := await anext(self.messages), Exception):
            if told := _no_message(item):
                await self.answers.send(told)
        return item

    async def __aenter__(self):
        await self.messages.__aenter__()
        return self

    async def __aexit__(self, *error):
        return await self.messages.__aexit__(*error)


def _no_message(error):
    """The answer to a line that could not be read; None to an empty one."""
    from mcp.shared.message import SessionMessage
    from mcp.types import INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError

    faults = error.errors(include_url=False) if isinstance(error, ValidationError) else []
    is_json = bool(faults) and all(one["type"] != "json_invalid" for one in faults)
    if not is_json and faults and not str(faults[0]["input"]).strip():
        return None
    code, why = (
        (INVALID_REQUEST, "a line is no JSON-RPC 2.0 message") if is_json else (PARSE_ERROR, "a line is no JSON")
    )
    about = ErrorData(code=code, message=f"{why}: {clip(faults[0]['msg'] if faults else reason(error))}")
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=None, error=about))


def make_server(ready, note: str = ""):
    """The `MCPServer` with the tools.

    Args:
        ready: `Loading` or `Loaded`.
        note: what is to be known of the model.
    """
    require("mcp", "mcp")
    from mcp.server.mcpserver import Context, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.server.stdio import stdio_server
    from mcp.types import CallToolResult, ImageContent, TextContent, ToolAnnotations

    @asynccontextmanager
    async def lifespan(server):
        ready.start()
        try:
            yield
        finally:
            await ready.close()

    class Server(MCPServer):
        async def run_stdio_async(self):
            """As the package's, but a line that is no message has an answer."""
            inner = self._lowlevel_server
            async with stdio_server() as (messages, answers):
                await inner.run(Answered(messages, answers), answers, inner.create_initialization_options())

        async def call_tool(self, name, arguments, context=None):
            """As the package calls a tool; what is wrong with a call is one short sentence, and nothing in it is passed over."""
            known = {tool.name: list(tool.input_schema["properties"]) for tool in await self.list_tools()}
            if name not in known:
                raise ToolError(f"There is no tool {name[:100]!r}. There are {', '.join(known)}.")
            if others := [one for one in arguments if one not in known[name]]:
                raise ToolError(f"{name} has no argument {others[0][:100]!r}. It has {', '.join(known[name])}.")
            try:
                return await super().call_tool(name, arguments, context)
            except ToolError as error:
                cause = error.__cause__
                if isinstance(cause, ValidationError):
                    # It imports torch: on the loop all others would wait, for a model that is being loaded too.
                    chat = await asyncio.to_thread(import_module, ".chat", __package__)
                    raise ToolError(chat.fault(arguments, cause, "The arguments").message) from None
                raise (cause if isinstance(cause, ToolError) else error)

    server = Server("uhr-bat", instructions=f"{SAYS} {note}".strip(), log_level="WARNING", lifespan=lifespan)

    calls = 0

    def tool(call):
        """Lists a tool, which gets the tools and a step where it names a context; whatever it raises is a sentence. Of calls whose
        client went without a word each is one that is worked on."""

        @functools.wraps(call)
        async def told(context, **arguments):
            nonlocal calls
            if calls >= ready.max_calls:
                raise ToolError(f"{calls} calls are being worked on, which is the most of this server. Try again.")
            calls += 1
            try:
                return await call(context, **arguments)
            except MemoryError:
                raise ToolError("This takes more memory than the server has.") from None
            except (Refusal, OSError, ValueError, ImportError) as error:
                raise ToolError(clip(" ".join(str(error).split()) or reason(error))) from error
            except Exception as error:
                logger.exception("A tool failed.")
                raise ToolError("The server failed; its log says why.") from error
            finally:
                calls -= 1

        hints = ToolAnnotations(read_only_hint=True, idempotent_hint=True, destructive_hint=False)
        server.add_tool(told, annotations=hints, structured_output=False)
        return call

    async def begin(context):
        """(the tools, a step: it waits for work, and tells whoever called how far it is; work that nobody waits for any more is
        left)."""
        done = 0

        async def step(message, work):
            nonlocal done
            task, seconds = asyncio.ensure_future(work), 0
            try:
                await context.report_progress(done, message=message)
                while not (await asyncio.wait({task}, timeout=TICK))[0]:
                    seconds += TICK
                    await context.report_progress(done + seconds / (seconds + 60), message=f"{message}, {seconds} s")
            finally:
                task.cancel()  # of what is done, nothing
            done += 1
            return task.result()

        return await step("loading the model", ready()), step

    def result(facts: dict, *content):
        text = TextContent(type="text", text=json.dumps(facts, ensure_ascii=False, separators=(",", ":")))
        return CallToolResult(content=[*content, text], structured_content=facts)

    @tool
    async def open(
        context: Context, image: Source, max_tiles: Tiles = TILES, reading: Reading | None = None
    ) -> CallToolResult:
        """Size of an image in pixels, its coordinate system, its levels, and what a question about it costs. Nothing is encoded."""
        tools, step = await begin(context)
        return result(await tools.open(step, image, max_tiles=max_tiles, reading=told_reading(reading)))

    @tool
    async def ask(
        context: Context,
        image: Source,
        question: Question,
        before: Annotated[
            Source | None, Field(description="An earlier image of the same place: what differs is kept.")
        ] = None,
        window: Annotated[Box | None, Field(description="Only this part of a raster, in pixels.")] = None,
        budgets: Tokens | None = None,
        max_tiles: Tiles = TILES,
        max_tokens: Annotated[Count | None, Field(description="Of the answer.")] = None,
        evidence: Annotated[Number, Field(ge=0, le=MOST_EVIDENCE, description="Places that are told.")] = EVIDENCE,
        reading: Reading | None = None,
    ) -> CallToolResult:
        """The model's answer to a question about an image, or about what changed since `before`, its `confidence` of 0 to 1 (the
        probability of its tokens, not calibrated), and the places of the image that it was read from, the most important first: boxes in pixels with a score, and GeoJSON where the image lies on the ground."""
        tools, step = await begin(context)
        said = await tools.ask(
            step, image, question, before=before, window=window, budgets=budgets, max_tiles=max_tiles, max_tokens=max_tokens,
            evidence=evidence, reading=told_reading(reading),
        )  # fmt: skip
        return result(said)

    @tool
    async def objects(
        context: Context,
        image: Source,
        question: Question,
        budgets: Tokens | None = None,
        max_tiles: Tiles = TILES,
        max_tokens: Annotated[Count | None, Field(description="Of the answer.")] = None,
        reading: Reading | None = None,
    ) -> CallToolResult:
        """The objects that the model's answer points to: boxes [top, left, bottom, right] or points [row, column] in pixels, with
        their geometry in degrees (`ground`) where the image lies on the ground. Models that write no boxes or points find none, and `note` says so."""
        tools, step = await begin(context)
        found = await tools.objects(
            step, image, question, budgets=budgets, max_tiles=max_tiles, max_tokens=max_tokens,
            reading=told_reading(reading),
        )  # fmt: skip
        return result(found)

    @tool
    async def where(
        context: Context,
        image: Source,
        question: Question,
        number: Annotated[Number, Field(ge=1, le=MOST_WINDOWS, description="Most windows.")] = 3,
        side: Side = SIDE,
        max_tiles: Tiles = TILES,
        reading: Reading | None = None,
    ) -> CallToolResult:
        """The windows of an image that a question should be looked at in, the best first, each as large as a picture of `look` at
        full resolution. `share`: of all that the question looks at, how much lies in the window and in none before it."""
        tools, step = await begin(context)
        found = await tools.where(
            step, image, question, number=number, side=side, max_tiles=max_tiles, reading=told_reading(reading)
        )
        return result(found)

    @tool
    async def look(
        context: Context,
        image: Source,
        window: Annotated[Box | None, Field(description="None: the whole image.")] = None,
        question: Annotated[str, Field(description="Draws in yellow where this question looks.")] = "",
        side: Side = SIDE,
        max_tiles: Tiles = TILES,
        reading: Reading | None = None,
    ) -> CallToolResult:
        """A picture of a window of an image, or of all of it, at the resolution that fits `side`."""
        tools, step = await begin(context)
        content, shown = await tools.look(
            step, image, window, question, side=side, max_tiles=max_tiles, reading=told_reading(reading)
        )
        data = base64.b64encode(content).decode()
        return result(shown, ImageContent(type="image", data=data, mime_type="image/jpeg"))

    @tool
    async def plan(
        context: Context,
        height: Pixels,
        width: Pixels,
        budgets: Annotated[
            Count | str | None,
            Field(description='Visual tokens, or a limit as "24GiB" or "5s" that the largest budgets stay below.'),
        ] = None,
        max_tiles: Tiles = TILES,
    ) -> CallToolResult:
        """What a question about an image of a size costs: visual tokens, tiles, FLOPs, memory."""
        tools, step = await begin(context)
        return result(await tools.plan(step, (height, width), budgets, max_tiles))

    return server


def build(args):
    """The application (ASGI) of the options."""
    from .app import behind_doors, most_bytes

    tools = make_tools(args)
    require("mcp", "mcp")
    from mcp.server.transport_security import TransportSecuritySettings

    app = make_server(Loaded(tools), note_of(args)).streamable_http_app(
        streamable_http_path=PATH,
        max_request_body_size=most_bytes(tools.service),
        # The server's own doors know its names.
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    # There is a place for the request that cancels a call, however many calls there are.
    return behind_doors(app, tools.service, 2 * args.max_requests, **who_may_ask(args), locked=PATH)


def note_of(args) -> str:
    return WEIGHTS_NOTE if is_tiny(args.model) else ""


@tells_errors
def main(arguments=None) -> int:
    args = parser().parse_args(arguments)
    check(args)
    require("mcp", "mcp")
    if args.transport == "http":
        return listen(args, build, PATH)
    make_server(Loading(args), note_of(args)).run("stdio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
