"""A page to open an image, ask about it and see what the answer was read from.

    uhr-bat demo [MODEL] [--host 127.0.0.1] [--port 7860] [--allow-local-files FOLDER]
        [--max-new-tokens 64] [--share]

Works without the internet. Users of other machines may drop images, and name public https: addresses; paths only below
the folder that is allowed.
"""

import argparse
import html
import math
import os
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from ..common import images
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.images import is_file_name
from ..common.loading import WEIGHTS_NOTE, check_image, load_model
from ..common.models import add_model_argument, find_model, is_tiny, stay_offline
from ..scenes import painting

PORT = 7860
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
# Encoded images and selections that are kept.
CACHE_BYTES = 4 * 2**30
# Threads that encode and compress at a time.
WORKERS = 2
# Questions that wait at a time, one of which is decoded.
MAX_WAITING = 64
# Of an image file that is dropped, or fetched for a user of another machine.
MAX_FILE_BYTES = 2 * 2**30
# Pixels of the largest image of a user of another machine, as of the server's.
MAX_PIXELS = 2**28
# Where the map and its pictures are served, below the page.
SHOWN = "shown"
QUESTION = "What colour is the plane at the runway?"
# How the options of a raster are written.
READING = {
    "bands": ("Bands", images.bands, "4,3,2 or red,nir,blue"),
    "value_range": ("Value range", images.value_range, "0,2047, dtype or percentile"),
    "window": ("Window", images.window, "top,left,bottom,right in pixels"),
    "page": ("Page of a TIFF", int, "2"),
    "tiles": ("Look closer: tiles of a question", images.tiles, "60, or 128 native, down to the image's own pixels"),
}
STYLE = """
#map iframe { width: 100%; height: max(30rem, calc(100dvh - 17.5rem)); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); background: #14181d; display: block; }
#map .empty { height: max(16rem, calc(100dvh - 9rem)); display: grid; place-content: center; padding: 1rem; margin: 0;
  text-align: center; border: 2px dashed var(--border-color-primary); border-radius: var(--radius-lg); }
#status p, #answer p { margin: .2rem 0; overflow-wrap: anywhere; }
#answer .text { font-size: 1.5rem; font-weight: 650; white-space: pre-wrap; }
#answer a { display: inline-block; padding: .35rem 1rem .35rem 0; text-decoration: underline; }
.error { border-left: 4px solid #c62828; padding-left: .6rem; font-weight: 600; }
@media (max-width: 760px) { #map iframe { height: 44rem; max-height: 95dvh; } #map .empty { height: 10rem; } }
"""


# ---- Texts -----------------------------------------------------------------------------------------------------------


def tell(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def tell_error(error: Exception) -> str:
    from .refusals import clip

    return f'<p role="alert" class="error">{html.escape(clip(str(error) or type(error).__name__))}</p>'


def tell_image(image) -> str:
    """What is said of an image that was opened."""
    height, width = image.size
    crs = f", {image.georeference.crs}" if image.georeference.crs else ""
    encoded = f"It was encoded before, in {image.seconds:.2f} s." if image.encoded_before else (
        f"Encoded in {image.seconds:.2f} s, once for all questions."
    )  # fmt: skip
    return tell(f"{image.title}: {width:,} × {height:,} px{crs}. {encoded}")


def tell_answer(name: str, answer, note: str) -> str:
    """The answer, what it cost, and what can be had of it."""
    from ..common.asking import printable

    choosing, decoding = answer.seconds
    cost = (
        f"About {html.escape(answer.image.title)}. Answered in {choosing + decoding:.2f} s from {answer.num_tokens:,} of "
        f"{sum(answer.image.encoded.features.available):,} visual tokens: {choosing:.2f} s to choose them, "
        f"{decoding:.2f} s to read them. The image was not encoded again."
    )
    files = {"GeoJSON of the kept tokens": "kept.geojson", "PNG of what was kept": "kept.png"}
    if answer.objects:
        files[f"GeoJSON of the objects ({len(answer.objects):,})"] = "objects.geojson"
    refused = "".join(f"<p>Refused: {html.escape(printable(one))}</p>" for one in answer.objects.refusals)
    links = [f'<a href="{SHOWN}/{name}/{file}" download>{text}</a>' for text, file in files.items()]
    return (
        f'<div role="status"><p class="text">{html.escape(answer.text or "(no answer)")}</p>'
        f"{refused}<p>{cost} {html.escape(note)}</p></div><p>{' '.join(links)}</p>"
    )


def show(name: str) -> str:
    """The map of an image or an answer."""
    return f'<iframe src="{SHOWN}/{name}.html" title="Map of the image and of the tokens that were kept"></iframe>'


NOTHING = '<p class="empty">Drop an image, give a path or an address, or take a made-up scene.</p>'


# ---- What users name -------------------------------------------------------------------------------------------------


def read_options(**texts: str | None) -> dict:
    """The options of a raster as `read_image` takes them, from what was typed; what was not is left out.

    Raises:
        ValueError: an option is written in another way.
    """
    options = {}
    for name, text in texts.items():
        label, parse, example = READING[name]
        if text and text.strip():  # a field that was never shown has None
            try:
                options[name] = parse(text.strip())
            except ValueError as error:
                raise ValueError(f"{label} is written as {example}. Got {text!r}.") from error
    return options


def read_budget(value, most: int) -> int:
    """Visual tokens, from what a slider or its field of a number has.

    Raises:
        ValueError: there is no number, or none of 1 to `most`.
    """
    if not isinstance(value, (int, float)) or not 1 <= value <= most:
        given = "nothing" if value in (None, "") else repr(value)
        raise ValueError(f"The budget is a number of visual tokens from 1 to {most:,}. Got {given}.")
    return int(value)


def name_image(text: str, rules):
    """The image that somebody names.

    Args:
        text: a path of this machine, a URL or a name of GDAL's.
        rules: `SourceRules` for somebody at another machine; None for whoever sits at this one, and may open anything.

    Raises:
        FileNotFoundError: there is no such file.
        Refusal: somebody at another machine may not open it.
    """
    import asyncio

    from .front import ImageFile

    if not text.strip():
        raise ValueError("There is no path or address.")
    if rules is not None:
        return asyncio.run(rules.read(text.strip()))
    if not is_file_name(text.strip()):
        # What lies elsewhere may have changed since it was last opened: it is encoded anew.
        return ImageFile(urlsplit(text).path.rpartition("/")[2] or text, text.strip(), secrets.token_hex())
    path = Path(text.strip()).expanduser()
    check_image(str(path))
    return ImageFile.of_file(path)


def receive_image(path: str, rules):
    """The image that somebody dropped, as `name_image`: of a stranger's, nothing that it names is opened."""
    from dataclasses import replace

    from .front import ImageFile

    if rules is None:
        return ImageFile.of_file(Path(path))
    return replace(rules, folder=Path(path).parent.resolve()).open_path(path)


# ---- The page --------------------------------------------------------------------------------------------------------


class Actions:
    """What the page does where something is opened or asked. Each returns what changes.

    Args:
        desk, rules, note: see `build_page`.
    """

    def __init__(self, desk, rules, note):
        from .refusals import Refusal
        from .showing import Gone

        self.desk, self.rules, self.note = desk, rules, note
        self.limits = {"max_image_pixels": MAX_PIXELS} if rules is not None else {}
        self.failures = (OSError, ValueError, ImportError, MemoryError, RuntimeError, Refusal, Gone)

    def open_image(self, seat, name_source, texts):
        """Status, map, budget and answer, and an empty place to drop."""
        import gradio as gr

        desk, options = self.desk, dict(zip(READING, texts))
        try:
            name = seat.open(lambda: desk.open(name_source(), **read_options(**options), **self.limits))
            if name is None:
                return [gr.skip()] * 5
            usual, most = desk.budget_range(name)
            slider = gr.update(maximum=most, value=usual, interactive=True)
            return tell_image(desk.images.get(name)), show(name), slider, "", None
        except self.failures as error:  # the image before stays
            return tell_error(error), gr.skip(), gr.skip(), gr.skip(), None

    def open_path(self, seat, text, *texts):
        return self.open_image(seat, lambda: name_image(text or "", self.rules), texts)

    def open_upload(self, seat, path, *texts):
        return self.open_image(seat, lambda: receive_image(path, self.rules), texts)

    def open_scene(self, seat, question):
        def made_up_scene():
            if not painting.DEFAULT_PATH.exists():
                painting.write()
            return name_image(str(painting.DEFAULT_PATH), None)

        return *self.open_image(seat, made_up_scene, ()), question or QUESTION

    def ask(self, seat, question, num_tokens):
        """Answer and map."""
        import gradio as gr

        desk, seen = self.desk, seat.image_name

        def answer_about(name):
            if name is None:
                raise ValueError("There is no image yet: open one, then ask.")
            usual, most = desk.budget_range(name)
            # A budget that was chosen for another image says nothing.
            return desk.ask(name, question or "", read_budget(num_tokens, most) if name == seen else usual)

        try:
            answer_name = seat.ask(answer_about)
            if answer_name is None:
                return gr.skip(), gr.skip()
            return tell_answer(answer_name, desk.answers.get(answer_name), self.note), show(answer_name)
        except self.failures as error:
            return tell_error(error), gr.skip()

    def ask_again(self, seat, *args):
        """With another budget, once there was a question."""
        import gradio as gr

        return self.ask(seat, *args) if seat.has_asked else (gr.skip(), gr.skip())


def lay_out(num_tokens: int) -> SimpleNamespace:
    """The parts of the page, by name, where they stand. `num_tokens`: the budget before an image is opened."""
    import gradio as gr

    from .showing import Seat

    class Budget(gr.Slider):
        """A slider that leaves it to the page to say what is wrong with its number."""

        is_template = True  # it is drawn as what it is made of

        def preprocess(self, payload):
            return payload

    parts = SimpleNamespace()
    gr.Markdown("# UHR-BAT\nAsk about a large image, and see which of its tokens the answer was read from.")
    parts.seat = gr.State(Seat())
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            parts.upload = gr.File(label="Image: drop it here, or click to choose", height=160)
            parts.path = gr.Textbox(label="Or its path or address", placeholder="/data/scene.tif, https://...")
            with gr.Row():
                parts.open_button = gr.Button("Open", scale=2, min_width=80)
                parts.scene_button = gr.Button("Made-up scene", scale=3, min_width=150)
            with gr.Accordion("How a raster is read", open=False):
                parts.reading = [
                    gr.Textbox(label=label, placeholder=example, info="Before it is opened; empty: as the file says")
                    for label, _, example in READING.values()
                ]
            parts.status = gr.HTML(elem_id="status")
            parts.question = gr.Textbox(label="Question", placeholder=QUESTION, lines=1, max_lines=1, submit_btn=False)
            parts.ask_button = gr.Button("Ask", variant="primary")
            parts.budget = Budget(1, num_tokens, num_tokens, step=1, label="Budget (visual tokens)", interactive=True)
        with gr.Column(scale=3, min_width=320):
            parts.answer = gr.HTML(elem_id="answer")
            parts.shown = gr.HTML(NOTHING, elem_id="map")
    return parts


def build_page(desk, rules, note: str):
    """The page as gradio's Blocks: its parts, and which action follows what users do with them.

    Args:
        desk: `Desk`.
        rules: see `name_image`.
        note: about the weights, "" for none.
    """
    import gradio as gr

    actions, usual = Actions(desk, rules, note), desk.config.budgets
    with gr.Blocks(title="UHR-BAT", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        parts = lay_out(usual if isinstance(usual, int) else sum(usual))
        private = {"api_visibility": "private"}
        on_open = [parts.status, parts.shown, parts.budget, parts.answer, parts.upload]
        parts.upload.upload(actions.open_upload, [parts.seat, parts.upload, *parts.reading], on_open, **private)
        named = [parts.seat, parts.path, *parts.reading]
        gr.on([parts.open_button.click, parts.path.submit], actions.open_path, named, on_open, **private)
        scene = [parts.seat, parts.question]
        parts.scene_button.click(actions.open_scene, scene, [*on_open, parts.question], **private)
        # A question may wait for an image that is being opened, and holds up nobody else's.
        asking = {"concurrency_limit": MAX_WAITING, "concurrency_id": "ask"} | private
        about, told = [parts.seat, parts.question, parts.budget], [parts.answer, parts.shown]
        gr.on([parts.ask_button.click, parts.question.submit], actions.ask, about, told, **asking)
        again = {"trigger_mode": "always_last", "show_progress": "hidden"} | asking
        parts.budget.input(actions.ask_again, about, told, **again)
    return page


def routes(desk) -> list:
    """What the map asks for: itself, its pictures and the files of an answer."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response
    from starlette.routing import Route

    from .showing import Gone

    def part(request):
        *box, side = (
            int(number) for name in ("box", "side") for number in request.query_params.get(name, "").split(",")
        )
        if len(box) != 4:
            raise ValueError(f"A box has 4 numbers. Got {len(box)}.")
        return desk.detail(request.path_params["name"], tuple(box), side)

    def of_name(make):
        return lambda request: make(request.path_params["name"])

    def page(name):
        return desk.page(name, "{}").encode()

    def route(path, make, kind):
        async def answer(request):
            try:
                content = await run_in_threadpool(make, request)
            except Gone as error:
                return Response(str(error), 404)
            except (OSError, ValueError, ImportError) as error:
                return Response(str(error), 400)
            # Nothing changes under a name. It is one user's.
            return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=86400"})

        return Route(f"/{SHOWN}/{{name}}{path}", answer)

    return [
        route("/overview.jpg", of_name(desk.overview), "image/jpeg"),
        route("/detail.jpg", part, "image/jpeg"),
        route("/kept.geojson", of_name(desk.geojson), "application/geo+json"),
        route("/kept.png", of_name(desk.kept_png), "image/png"),
        route("/objects.geojson", of_name(desk.objects_geojson), "application/geo+json"),
        route(".html", of_name(page), "text/html"),
    ]


def serve(
    model: Path, host=THIS_MACHINE[0], port=PORT, folder=None, max_new_tokens=64, share=False, wait=True, changes=None
):
    """Loads the model and serves the page.

    Args:
        model, folder, max_new_tokens: see `main`.
        host, port: where the page is served.
        share: by gradio's tunnel too, which needs the internet.
        wait: until the page is stopped; False returns at once.
        changes: other values for settings of the model.

    Returns:
        gradio's Blocks, which `close()` stops.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    require("demo", "gradio", "geopandas", "pyogrio", "matplotlib")
    import gradio as gr

    from .cache import ContentCache
    from .front import Front, fingerprint
    from .ports import bracketed, take_port
    from .showing import Desk
    from .sources import SourceRules

    for taken in take_port(host, port):  # gradio takes it anew: only whether it can is asked here
        port = taken.getsockname()[1]
        taken.close()
    processor, loaded = load_model(model, **(changes or {}))
    note = WEIGHTS_NOTE if is_tiny(model) else ""
    desk = Desk(Front(processor, loaded, fingerprint(model), ContentCache(CACHE_BYTES), WORKERS), max_new_tokens, note)
    strangers = share or host not in THIS_MACHINE
    rules = SourceRules(MAX_FILE_BYTES, folder and folder.resolve()) if strangers else None
    page = build_page(desk, rules, note)
    # Letters of the reader's own machine: gradio's are fetched from elsewhere. A blue on which white is read.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
    page.launch(
        server_name=bracketed(host),
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        quiet=True,
        ssr_mode=False,
        max_file_size=MAX_FILE_BYTES,
        theme=theme,
        css=STYLE,
        app_kwargs={"routes": routes(desk)},
    )
    print(f"The page is at {page.share_url or page.local_url}", flush=True)
    if wait:
        page.block_thread()
    return page


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uhr-bat demo", description=__doc__.splitlines()[0])
    add_model_argument(parser, "model")
    parser.add_argument(
        "--host", default=THIS_MACHINE[0], help="0.0.0.0 for users of other machines (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"0 for one that is free (default: {PORT})")
    parser.add_argument(
        "--allow-local-files", type=Path, metavar="FOLDER",
        help="users of other machines may name paths below it (default: no paths)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--share", action="store_true", help="a public address by gradio's tunnel, from the internet")
    return parser


@tells_errors
def main(arguments=None) -> int:
    args = parser().parse_args(arguments)
    stay_offline(args.model)
    check_range(args, 1, math.inf, "max_new_tokens")
    check_range(args, 0, 65535, "port")
    args.model = find_model(args.model)
    folder = args.allow_local_files
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder.")
    serve(args.model, args.host, args.port, folder, args.max_new_tokens, args.share, changes=args.set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
