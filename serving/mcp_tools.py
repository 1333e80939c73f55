"""What agents may do with large images: the tools of `uhr-bat mcp`, without the protocol that brings them.

Every tool takes an image by its source (`sources.py`) and answers in pixels of the whole image. Nothing is held between calls but
what the server's cache holds: an image is encoded once, a question is compressed once. Sizes are (height, width), boxes (top,
left, bottom, right).
"""

import functools
import io
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.asking import check_letters, confidence_of
from ..common.windows import best_windows, window_importance
from ..geo import Georeference, overview_jpeg
from ..geo.georeference import crs_name
from ..geo.pages import JPEG_QUALITY
from ..geo.styles import ATTENTION_COLOUR, shown_range
from ..geometry_uhr_bat import pyramid_scales
from ..pictures.drawing import parse_colour, screen_image
from .app import Service
from .chat import checked_request
from .evidence import answered_objects, evidence_members
from .refusals import Refusal

# How opaque the colour is where a question looks most.
OPACITY = 0.6
# Pixels of a picture a side in which the colour is one: tokens of an image's own pixels would be dots.
CELL = 8

# Waits for a piece of work and tells how far it is.
Step = Callable[[str, Awaitable], Awaitable[Any]]


def without_folder(tool):
    """A tool whose errors name images as whoever called did: where the server's folder lies is nobody's affair."""

    @functools.wraps(tool)
    async def told(self, *args, **kwargs):
        try:
            return await tool(self, *args, **kwargs)
        except (Refusal, OSError, ValueError) as error:
            folder = self.service.sources.folder
            if folder in (None, Path("/")) or str(folder) not in str(error):
                raise
            # The folder itself, and no path that only begins or ends like it.
            place = rf"(?<![\w.-]){re.escape(str(folder))}(?:/|(?![\w.-]))"
            raise Refusal(re.sub(place, lambda found: "" if found[0].endswith("/") else ".", str(error))) from error

    return told


class Tools:
    """The tools, each a call with a `step`, by which it waits.

    Args:
        service: of the server.

    Every tool raises `Refusal`, `ValueError`, `OSError` or `ImportError` with a sentence for whoever called it. `max_tiles` 0 asks
    for all tiles of the model's own scales, else so many are encoded where the question looks, down to the image's own pixels.
    `reading` has `bands`, `value_range`, `nodata` and `page`, as a request of the server.
    """

    def __init__(self, service: Service):
        self.service, self.engine, self.front = service, service.engine, service.engine.front

    @without_folder
    async def open(self, step: Step, image: str, *, max_tiles: int, reading: dict | None = None) -> dict:
        """Size, place on the ground, levels and costs of an image, of which nothing is encoded."""
        picture, config = await self._picture(step, image, reading), self.front.model.config
        size = picture.height, picture.width
        place = Georeference.of(picture)
        found = await step("planning", self.engine.call(self._plan, size, None, max_tiles))
        sides = pyramid_scales(max(size), config.scales[0], config.tile_size)
        return {
            "image_size": list(size),
            "crs": None if place.crs is None else crs_name(place.crs),
            "transform": None if place.transform is None else list(place.transform)[:6],
            "model_scales": list(config.scales),
            "levels": [
                {"side": side, "tiles_read": tiles, "tokens": tokens}
                for side, tiles, tokens in zip(sides, found.question.tiles, found.question.available)
            ],
            "cost": told_plan(found),
        }

    @without_folder
    async def plan(self, step: Step, size: tuple[int, int], budgets, max_tiles: int) -> dict:
        """What a question about an image of a size costs; with a limit as "24GiB" or "5s", the budgets that stay below it."""
        found = await step("planning", self.engine.call(self._plan, size, budgets, max_tiles))
        return {"image_size": list(size), "cost": told_plan(found)}

    @without_folder
    async def ask(
        self, step: Step, image: str, question: str, *, max_tiles: int, evidence: int, before=None, window=None, budgets=None,
        max_tokens=None, reading: dict | None = None,
    ) -> dict:  # fmt: skip
        """The answer to a question, and where it was read: the kept tokens as boxes in pixels of the whole image and, where that
        lies on the ground, as GeoJSON. `before`: an earlier image that it is compared with, of whose tokens none are told but their
        number. `window`: the part of a raster that was read."""
        fields = {
            "before": before,
            "budgets": budgets,
            "max_completion_tokens": max_tokens,
            "window": window,
            "logprobs": True,
        }
        asked = await self._asked(step, image, question, max_tiles, reading, **fields)
        pieces = await step("answering", said(asked))
        work = self.engine.call(evidence_members, asked.selection, asked.images)
        members = await step("writing the evidence", work)
        kept = members[-1]
        return {
            "answer": "".join(piece.text for piece in pieces),
            "confidence": round(confidence_of([one.logprob for piece in pieces for one in piece.tokens]), 4),
            "complete": asked.finish_reason != "length",
            "window": list(window or (0, 0, *kept["image_size"])),
            "visual_tokens": sum(len(one["tokens"]) for one in members),
            **best_evidence(kept, evidence, tuple(window[:2]) if window else (0, 0)),
        }

    @without_folder
    async def objects(
        self, step: Step, image: str, question: str, *, max_tiles: int, budgets=None, max_tokens=None, reading: dict | None = None
    ) -> dict:  # fmt: skip
        """The objects that an answer points to: boxes (top, left, bottom, right) or points (row, column), and each on the ground."""
        fields = {"budgets": budgets, "max_completion_tokens": max_tokens}
        asked = await self._asked(step, image, question, max_tiles, reading, **fields)
        answer = "".join(piece.text for piece in await step("answering", said(asked)))
        model, (encoded,) = self.front.model, asked.images
        work = self.engine.call(answered_objects, model, answer, asked.selection, encoded)
        found = await step("placing objects", work)
        return {"answer": answer, **found, "objects": [rows_first(one) for one in found["objects"]]}

    @without_folder
    async def where(
        self, step: Step, image: str, question: str, *, number: int, side: int, max_tiles: int, reading: dict | None = None
    ) -> dict:  # fmt: skip
        """The windows that a question should be looked at in, the best first."""
        asked = await self._asked(step, image, question, max_tiles, reading)
        size = asked.images[0].image_size
        work = self.engine.call(best_windows, asked.selection.compressed, size, side, number)
        windows = await step("placing windows", work)
        return {
            "image_size": list(size),
            "windows": [{"window": list(one.box), "share": round(one.share, 4)} for one in windows],
        }

    @without_folder
    async def look(
        self, step: Step, image: str, window=None, question: str = "", *, side: int, max_tiles: int, reading: dict | None = None
    ) -> tuple[bytes, dict]:  # fmt: skip
        """(JPEG of a window, or of all, as large as `side` allows; what it shows), with the importance of a question on it."""
        picture = await self._picture(step, image, reading)
        size = picture.height, picture.width
        box = check_box(window or (0, 0, *size), size)
        shown = {"image_size": list(size), "window": list(box)}
        if not question:
            content = await step("drawing", self.engine.call(overview_jpeg, picture, side, box))
        else:
            asked = await self._asked(step, image, question, max_tiles, reading)
            work = self.engine.call(drawn_jpeg, picture, side, box, asked.selection.compressed)
            content = await step("drawing", work)
        height, width = Image.open(io.BytesIO(content)).size[::-1]
        factor = max(height, width) / max(box[2] - box[0], box[3] - box[1])
        shown |= {"picture_size": [height, width], "picture_pixels_per_pixel": round(factor, 4)}
        return content, shown | {"full_resolution": factor >= 1}

    # By the server's own ways

    async def _picture(self, step, image, reading):
        request = self._request(image, "?", 0, reading)  # which checks how the image is read

        async def opened():
            options = request.reader_options | {"max_image_pixels": self.service.max_image_pixels}
            source = await self.service.sources.read(*request.image_urls())
            return await self.engine.call(self.front.open, source, **options)

        return await step("reading the image", opened())

    async def _asked(self, step, image, question, max_tiles, reading, **fields):
        """A question whose image is encoded and compressed, by the server's own way of a request."""
        if not question.strip():
            raise ValueError("There is no question.")
        check_letters(question)
        request = self._request(image, question.strip(), max_tiles, reading, **fields)
        return await step("encoding and choosing", self.service.ask(request))

    def _request(self, image, question, max_tiles, reading, before=None, **fields):
        """As a client of the server would send it."""
        named = [image] if before is None else [before, image]
        urls = [place_of(one, self.service.sources.folder) for one in named]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.append({"type": "text", "text": question})
        if before is not None:
            fields["dates"] = True
        fields |= reading or {}
        if max_tiles:
            fields |= {"max_tiles": max_tiles, "native": True}
        fields = {name: value for name, value in fields.items() if value is not None}
        return checked_request({"model": self.service.name, "messages": [{"role": "user", "content": parts}], **fields})

    def _plan(self, size, budgets, max_tiles):
        seconds = isinstance(budgets, str) and budgets.strip().lower().endswith("s")
        closer = {"max_tiles": max_tiles, "native": True} if max_tiles else {}
        most = self.service.max_image_pixels
        return self.front.processor.planner.plan(size, budgets, **closer, seconds=seconds, max_image_pixels=most)


def place_of(image: str, folder: Path | None) -> str:
    """An image's source; a name without more is one in the server's folder. Raises `ValueError` where there is none."""
    image = image.strip()
    if not image:
        raise ValueError("There is no image.")
    named = (
        folder is None or image.startswith("/") or image.partition(":")[0].lower() in ("data", "http", "https", "file")
    )
    return image if named else str(folder / image)


def check_box(box, size) -> tuple[int, int, int, int]:
    """A box that is a part of an image of (height, width) pixels. Raises `ValueError` with both."""
    (top, left, bottom, right), (height, width) = box, size
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"The window {[top, left, bottom, right]} (top, left, bottom, right) is no part of the image of {height} x {width} "
            "pixels (height x width)."
        )
    return top, left, bottom, right


def drawn_jpeg(picture, side: int, box, compressed) -> bytes:
    """A JPEG as of `overview_jpeg`, the more coloured where the question looks more."""
    shown = screen_image(picture, side, box)
    cells = tuple(-(-length // CELL) for length in (shown.height, shown.width))
    importance = window_importance(compressed, (picture.height, picture.width), box, cells)
    everywhere = np.concatenate([values.cpu().double().numpy().ravel() for values in compressed.importance[0].values])
    low, high = shown_range(everywhere)
    strength = OPACITY * ((np.nan_to_num(importance, nan=low) - low) / (high - low)).clip(0, 1)
    mask = Image.fromarray(np.rint(255 * strength).astype(np.uint8)).resize(shown.size, Image.Resampling.NEAREST)
    shown.paste(tuple(int(part) for part in parse_colour(ATTENTION_COLOUR)), (0, 0), mask)
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def best_evidence(kept: dict, number: int, corner: tuple[int, int]) -> dict:
    """Of the evidence of an image the tokens with the highest scores, and their polygons; boxes from the corner (top, left) of
    the whole image."""
    best = sorted(range(len(kept["tokens"])), key=lambda idx: -kept["tokens"][idx]["score"])[:number]
    tokens = [
        {
            "boxes": [[round(edge + start, 2) for edge, start in zip(box, corner * 2)] for box in token["boxes"]],
            "score": token["score"],
            "scale": token["scale"],
        }
        for token in (kept["tokens"][idx] for idx in best)
    ]
    collection = kept["geojson"]
    if collection is not None:
        collection = collection | {"features": [collection["features"][idx] for idx in best]}
    return {"evidence": tokens, "geojson": collection, "geojson_error": kept["geojson_error"]}


async def said(asked) -> list:
    """The parts of an answer."""
    async with aclosing(asked.pieces()) as pieces:
        return [piece async for piece in pieces]


def rows_first(found: dict) -> dict:
    """An object with its places as the other tools tell them: rows before columns."""
    box, point = found["box"], found["point"]
    return found | {"box": box and [box[1], box[0], box[3], box[2]], "point": point and [point[1], point[0]]}


def told_plan(plan) -> dict:
    """A plan as numbers: visual tokens, tiles, FLOPs, bytes; seconds where they were predicted."""
    question = plan.question
    return {
        "budgets": plan.budgets,
        "visual_tokens": sum(question.counts),
        "tokens_there_are": sum(question.available),
        "tiles": sum(question.tiles),
        "flops": sum(plan.flops.values()),
        "peak_memory_bytes": plan.peak_bytes,
        "peak_memory_stage": plan.peak_stage,
        "seconds": plan.total_seconds if plan.seconds else None,
        "note": plan.note,
    }
