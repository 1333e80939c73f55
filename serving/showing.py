"""Images that are looked at, and the questions about them: what a page shows, without the page.

An image is encoded when it is opened, and kept for its questions. Whatever is handed out has a name that nobody can guess,
so users of one server do not see each other's images.
"""

import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from ..budgets_uhr_bat import budgets_of_total, is_one_budget
from ..common import asking
from ..common.objects import Objects
from ..geo import Georeference, Served, evidence_frame, geojson_bytes, objects_frame, overview_jpeg, page_html
from ..geo.pages import PAGE_SIDE
from ..image_processing_uhr_bat import part_reading
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput
from .decoding import FirstToken
from .front import EncodedImage, Front, ImageFile
from .refusals import LETTERS_PER_TOKEN, check_count

# Opened images that are kept, 800 MB each at most (what is larger is read from its file), and answers about them.
MAX_IMAGES, MAX_ANSWERS = 4, 64
# Tokens of the context window that are left for the text of a question.
TEXT_TOKENS = 512
# Longest side in pixels of a part of an image that is handed out: a screen's.
DETAIL_SIDE = 4096


class Gone(LookupError):
    """Nothing is kept under a name, or no longer."""


class Recent:
    """The last values that were put or asked for, by names that are made up for them. Safe to share among threads."""

    def __init__(self, max_values: int):
        self.max_values, self._values, self._lock = max_values, OrderedDict(), threading.Lock()

    def put(self, value) -> str:
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._values[name] = value
            while len(self._values) > self.max_values:
                self._values.popitem(last=False)
        return name

    def get(self, name: str):
        """Raises `Gone` for what was never put or is no longer kept."""
        with self._lock:
            if name not in self._values:
                raise Gone("The image is no longer held: open it again.")
            self._values.move_to_end(name)
            return self._values[name]


class Seat:
    """What one user of a page has before them: the image that was opened last. What was begun about another one is dropped,
    and so is what an earlier question comes to. Safe to share among threads.

    Attributes:
        image_name: of the image that is shown; None before the first.
        has_asked: whether an answer about it was shown.
    """

    def __init__(self):
        self.image_name, self.has_asked = None, False
        self._changed = threading.Condition()
        self._begun = self._shown = self._asked = 0  # openings, the one that is shown, questions
        self._opening = 0  # at present

    def __deepcopy__(self, memo):
        return Seat()  # of the next user

    def open(self, make: Callable[[], str]) -> str | None:
        """Shows the image whose name `make()` returns; None where one that was opened later is shown already."""
        name = None
        with self._changed:
            self._begun += 1
            mine = self._begun
            self._opening += 1
        try:
            name = make()
        finally:
            with self._changed:
                self._opening -= 1
                is_shown = name is not None and mine > self._shown
                if is_shown:
                    self._shown, self.image_name, self.has_asked = mine, name, False
                self._changed.notify_all()
        return name if is_shown else None

    def ask(self, make: Callable[[str | None], Any]):
        """What `make(image_name)` returns or raises; None where another image is shown since, or another question was asked.
        An image that is being opened is waited for: the question is about that."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.wait_for(lambda: not self._opening)
            name = self.image_name
        answer = error = None
        try:
            answer = make(name)
        except Exception as raised:
            error = raised
        with self._changed:
            self._changed.wait_for(lambda: not self._opening)
            if name != self.image_name or mine != self._asked:
                return None
            self.has_asked = error is None
        if error is not None:
            raise error
        return answer


@dataclass(frozen=True)
class OpenImage:
    """An image that was opened and encoded.

    Attributes:
        title: its name.
        picture: what `read_image` gave.
        overview: JPEG of all of it.
        georeference: where it lies.
        encoded: for the model.
        seconds: that the encoding took, now or when it was done.
        encoded_before: whether it was done for an earlier opening of the same file.
        max_tiles: that a question may look at; None for all.
    """

    title: str
    picture: Any
    overview: bytes
    georeference: Georeference
    encoded: EncodedImage
    seconds: float
    encoded_before: bool
    max_tiles: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.encoded.image_size


@dataclass(frozen=True)
class ShownAnswer:
    """An answer, and what it was read from.

    Attributes:
        image_name: of the `OpenImage`, which the answer keeps.
        num_tokens: visual tokens.
        seconds: of the compression and the decoder.
        objects: that it points to.
    """

    image_name: str
    image: OpenImage
    question: str
    text: str
    num_tokens: int
    compressed: UHRBatCompressionOutput
    seconds: tuple[float, float]
    objects: Objects

    @property
    def about(self) -> dict[str, str]:
        return {"image": self.image.title, "question": self.question, "answer": self.text}


class Desk:
    """What users of a page have before them. Safe to share among threads.

    Args:
        front: processor, model and cache.
        max_new_tokens: of an answer.
        note: stands beside every answer that is written to a file; "" for none.
    """

    def __init__(self, front: Front, max_new_tokens: int = 64, note: str = ""):
        self.front, self.max_new_tokens, self.note = front, max_new_tokens, note
        self.images, self.answers = Recent(MAX_IMAGES), Recent(MAX_ANSWERS)
        self._decoding = threading.Lock()
        self._seconds = {}  # of every encoding, by the key of the encoded image

    @property
    def config(self):
        return self.front.model.config

    def open(self, source: ImageFile, tiles: tuple[int, bool] | None = None, **options) -> str:
        """Opens and encodes an image; the name under which it is kept.

        Args:
            tiles: `max_tiles` and `native` of the processor, of an image that questions look closer at; None for all tiles.
            options: `bands`, `value_range`, `window`, `page`, `max_image_pixels`, as of `read_image`.

        Raises:
            What `read_image` raises.
        """
        options = {name: value for name, value in options.items() if value is not None}
        picture = self.front.processor.image_processor.process_image(source.content, **options)
        _, cutting = part_reading(options)
        # The front is handed the opened image: it is read and checked once. How it was read is part of what names it.
        opened = ImageFile(source.name, picture, f"{source.key} {sorted(options.items())}")
        start = time.perf_counter()
        max_tiles, native = tiles or (None, None)
        encoded = self.front.encode(opened, max_tiles, native, **cutting)
        if max_tiles is not None:  # it may have been encoded for another number
            encoded = replace(encoded, features=encoded.features.with_max_tiles(max_tiles))
        seconds = time.perf_counter() - start
        before = encoded.key in self._seconds
        seconds = self._seconds.setdefault(encoded.key, seconds)
        return self.images.put(
            OpenImage(
                source.name,
                picture,
                overview_jpeg(picture),
                Georeference.of(picture),
                encoded,
                seconds,
                before,
                max_tiles,
            )
        )

    def budget_range(self, image_name: str) -> tuple[int, int]:
        """(visual tokens that the model spends on an image by itself, most that it can)."""
        available, budgets = self.spending(image_name)
        if is_one_budget(budgets):
            usual, most = min(budgets, sum(available)), sum(available)
        else:
            usual = sum(map(min, budgets, available))
            most = sum(number for budget, number in zip(budgets, available) if budget)
        return usual, max(usual, min(most, self.front.window - TEXT_TOKENS))

    def spending(self, image_name: str) -> tuple[list[int], list[int] | int]:
        """Tokens that there are of every scale of an image, and the budgets of the model: one for levels that are the image's
        own."""
        features, budgets = self.images.get(image_name).encoded.features, self.config.budgets
        if features.scales != self.config.scales and not is_one_budget(budgets):
            budgets = sum(budgets)
        return features.available, budgets

    def share(self, image_name: str, num_tokens: int) -> list[int] | int:
        """Budgets whose sum is `num_tokens`, in the proportions of the model's own."""
        available, budgets = self.spending(image_name)
        return budgets_of_total(num_tokens, budgets, available)

    @torch.inference_mode()
    def ask(self, image_name: str, question: str, num_tokens: int) -> str:
        """Asks about an image that is open; the name under which the answer is kept.

        Raises:
            Gone: the image is no longer kept.
            ValueError, Refusal: no question, or one that does not fit the context window.
        """
        image, processor, model = self.images.get(image_name), self.front.processor, self.front.model
        if not question.strip():
            raise ValueError("There is no question.")
        check_count(len(question), LETTERS_PER_TOKEN * self.front.window, "letters", "The question")
        start = time.perf_counter()
        budgets = self.share(image_name, num_tokens)
        selection = self.front.select(
            asking.user_prompt(processor, question.strip()), [image.encoded], budgets, image.max_tiles
        )
        compressed_at = time.perf_counter()
        with self._decoding:
            prompt, whole = selection.prompt, None
            read = (selection.embeds if prompt is None else prompt.ids)[None].to(model.device)
            mask = torch.ones(read.shape[:2], dtype=torch.long, device=model.device)
            inputs = {"inputs_embeds" if prompt is None else "input_ids": read, "attention_mask": mask}
            if prompt is not None:
                rows = [tokens.to(model.device) for tokens in prompt.compressed.pooler_output]
                whole = replace(prompt.compressed, pooler_output=rows)
            first = [] if selection.first_logits is None else [FirstToken(selection.first_logits)]
            options = {"max_new_tokens": self.max_new_tokens, "logits_processor": LogitsProcessorList(first)}
            ids = asking.generate(model, inputs, whole, **options)
        (text,) = asking.answer_texts(processor, ids)
        objects = asking.answer_objects(model, text, selection.compressed, image.size, ids=ids)
        seconds = compressed_at - start, time.perf_counter() - compressed_at
        spent = sum(int(slots.max()) + 1 for slots in selection.compressed.slots[0])
        about = image_name, image, question.strip(), asking.printable(text)
        return self.answers.put(ShownAnswer(*about, spent, selection.compressed, seconds, objects))

    # What is drawn. Each takes a name, and raises `Gone` where nothing is kept under it.

    def page(self, name: str, address: str) -> str:
        """The map with an answer, or with an image before any question.

        Args:
            name: of an answer or an image.
            address: from the map to the folder of an image's `overview.jpg` and `detail.jpg`, with its name as {}.
        """
        answer = None
        try:
            answer = self.answers.get(name)
            image_name, image = answer.image_name, answer.image
        except Gone:
            image_name, image = name, self.images.get(name)
        height, width = image.size
        place = address.format(image_name)
        overview_width = round(width * min(1, PAGE_SIDE / max(height, width)))
        served = Served(f"{place}/overview.jpg", overview_width, f"{place}/detail.jpg")
        scales = image.encoded.features.scales
        seen, georeference = (image.picture, scales), image.georeference
        if answer is None:
            return page_html(None, None, *seen, {"image": image.title}, georeference, served=served)
        frame = evidence_frame(answer.compressed, image.size, scales)
        drawn = {"served": served, "objects": answer.objects}
        return page_html(answer.compressed, frame, *seen, answer.about, georeference, **drawn)

    def overview(self, image_name: str) -> bytes:
        """A JPEG of the whole image."""
        return self.images.get(image_name).overview

    def detail(self, image_name: str, box: tuple[int, int, int, int], side: int) -> bytes:
        """A JPEG of a box (top, left, bottom, right) in pixels, with the longer side at most `side` pixels.

        Raises:
            ValueError: the box is no part of the image.
        """
        picture = self.images.get(image_name).picture
        top, left, bottom, right = box
        if not (0 <= top < bottom <= picture.height and 0 <= left < right <= picture.width) or side < 1:
            raise ValueError(f"{list(box)} in {side} px is no part of {picture.height} x {picture.width} pixels.")
        return overview_jpeg(picture, min(side, DETAIL_SIDE), box)

    def geojson(self, name: str) -> bytes:
        """What was kept to answer, as `uhr-bat evidence-map` writes it."""
        answer = self.answers.get(name)
        place = answer.image.georeference
        about = answer.about | ({"note": self.note} if self.note else {})
        frame = evidence_frame(
            answer.compressed,
            answer.image.size,
            answer.compressed.scales[0],
            transform=place.transform,
            crs=place.crs,
        )
        return geojson_bytes(frame, about, place.words)

    def objects_geojson(self, name: str) -> bytes:
        """The objects of an answer, as `uhr-bat ask --objects` writes them."""
        answer = self.answers.get(name)
        place = answer.image.georeference
        frame = objects_frame(answer.objects, transform=place.transform, crs=place.crs)
        return geojson_bytes(frame, answer.about, place.words)

    def kept_png(self, name: str) -> bytes:
        """What was kept to answer, as `uhr-bat pictures` draws it."""
        from ..common.extras import require

        require("pictures", "matplotlib")
        from ..pictures import kept_picture

        answer = self.answers.get(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kept.png")
            kept_picture(answer.compressed, answer.image.picture, answer.question).save(path)
            return path.read_bytes()
