"""A host by itself: the picture goes through the model's own image processor, the answer comes from its own `generate`.

What UHR-BAT adds is the number of visual tokens that the picture is brought down to, in the way that its family has for that.

Letters: B questions about a picture, N visual tokens of it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import torch
from transformers import PreTrainedModel

from ..common import asking
from ..common.loading import host_settings
from ..common.models import base_of, with_weights
from ..common.resizing import resize_image
from ..planning.flops import FlopMeter

PLAIN, OWN = "plain", "plain, as it comes"
AT_ONCE = 16384  # visual tokens that are answered from together
LARGEST = 4096  # px a side of the picture that is handed over, which general models bring down themselves
MOST_TILES = 12  # a side, of families that have tiles of their own
# What makes an image processor cut tiles of its own accord, where the whole processor of its family says so.
OWN_TILES = ("image_grid_pinpoints", "crop_to_patches")


class OtherSettings:
    """The same host with other settings: (processor, model) by what differs from the run's. Its weights are there once."""

    def __init__(self, folder, pair, changes):
        self.folder, self.pair, self.changes, self.made = folder, pair, changes, {}

    def __call__(self, settings: dict):
        from ..hosts.loading import load_host

        key = repr(sorted(settings.items()))
        if key not in self.made:
            base, host = base_of(self.folder), self.pair[1].host
            measured = host_settings(self.folder, base)
            folder = with_weights(base or self.folder)
            self.made[key] = load_host(folder, None, None, None, measured, lambda _: host, **self.changes | settings)
        return self.made[key]


@contextmanager
def without_adapter(host):
    """The host as it was before an adapter of peft was put onto it."""
    # Layers, and parts that were trained whole; a model of the library has a method of this name, too.
    adapted = [
        one for one in host.modules() if hasattr(one, "enable_adapters") and not isinstance(one, PreTrainedModel)
    ]
    for one in adapted:
        one.enable_adapters(False)
    try:
        yield
    finally:
        for one in adapted:
            one.enable_adapters(True)


def own_tiles(image_processor) -> bool:
    """Whether a family cuts tiles of its own accord, so that its plain call is tiling as LLaVA-NeXT does it."""
    return any(getattr(image_processor, name, None) is not None for name in OWN_TILES)


class PlainHost:
    """What a host answers by itself."""

    def __init__(self, processor, model):
        self.processor, self.model, self.host = processor, model, model.host
        self.image_processor, self.whole = model.reader.image_processor, model.reader.options
        self.cell = model.tile_size // model.patches_per_side
        self.taken = {
            call: set(inspect.signature(getattr(self.host, call)).parameters)
            for call in ("forward", "get_image_features")
        }
        self.most = (model.context_window or 2**30) // 2  # visual tokens, as budgets have it
        self.numbers = {}

    def ways(self, size: tuple[int, int], num_tokens: int | None) -> Iterator[tuple[tuple[int, int], dict]]:
        """(height, width) of the picture that is handed over and options of the image processor's call, from fine to coarse;
        None for what the model does of its own accord."""
        reader, cell = self.image_processor, self.cell
        fixed = {name: self.whole[name] for name in ("patch_size",) if name in self.whole}
        if getattr(reader, "do_image_splitting", None) is not None:
            yield size, self.whole  # words between its tiles are written by its whole processor alone
        elif num_tokens is None and dict(reader.size or {}).get("longest_edge", 0) > self.most * cell**2 and not fixed:
            yield from self.ways(size, self.most)
        elif num_tokens is None:
            yield size, fixed | ({"crop_to_patches": True} if hasattr(reader, "crop_to_patches") else {})
        elif hasattr(reader, "temporal_patch_size"):  # its `size` counts pixels
            yield size, {"size": {"shortest_edge": cell**2, "longest_edge": num_tokens * cell**2}}
        elif fixed:  # any side
            for rows in range(num_tokens, 0, -1):
                yield size, fixed | {"size": {"longest_edge": rows * cell}}
        elif hasattr(reader, "max_soft_tokens"):
            numbers = [number for number in (1120, 560, 280, 140) if number <= num_tokens]
            yield from ((size, {"max_soft_tokens": number}) for number in (*numbers, 70))
        elif hasattr(reader, "crop_to_patches"):
            most = min(MOST_TILES, num_tokens // self.model.patches_per_side**2)
            yield from ((size, {"crop_to_patches": True, "max_patches": n}) for n in range(most, 1, -1))
            yield size, self.whole
        elif own_tiles(reader):  # as many as a picture of its size needs
            most = (num_tokens * max(size) / min(size)) ** 0.5 / self.model.patches_per_side
            sides = range(min(MOST_TILES, ceil(most)) or 1, 0, -1)
            yield from ((self._within(size, tiles * self.model.tile_size), {}) for tiles in sides)
        else:
            yield size, {}

    @staticmethod
    def _within(size, side):
        share = min(1, side / max(size))
        return tuple(max(1, round(share * length)) for length in size)

    def encode(self, image, size, options) -> dict:
        """What the host's `forward` takes of the picture."""
        picture = resize_image(image, size)
        inputs = self.image_processor(images=[picture], return_tensors="pt", **options)
        return {name: value.to(self.model.device) for name, value in inputs.items() if torch.is_tensor(value)}

    def number_of(self, size, options, pixels) -> int:
        """N, as the host's own encoder says."""
        key = size, repr(options)
        if key not in self.numbers:
            given = {name: pixels[name] for name in pixels if name in self.taken["get_image_features"]}
            rows = self.host.get_image_features(**given, return_dict=True).pooler_output
            self.numbers[key] = sum(one.shape[:-1].numel() for one in rows)
        return self.numbers[key]

    def view(self, image, num_tokens: int | None = None) -> tuple[dict, int]:
        """(what `forward` takes of the picture, N): the finest that has at most `num_tokens`, else the coarsest there is. None:
        what the model does of its own accord, in half of its context window."""
        size = self._within((image.height, image.width), LARGEST)
        for shown, options in self.ways(size, num_tokens):
            known = self.numbers.get((shown, repr(options)))
            if num_tokens is not None and known is not None and known > num_tokens:
                continue
            pixels = self.encode(image, shown, options)
            if num_tokens is None or self.number_of(shown, options, pixels) <= num_tokens:
                break
        else:
            pixels = self.encode(image, shown, options)
        number = self.number_of(shown, options, pixels)
        return self.view(image, self.most) if num_tokens is None and number > self.most else (pixels, number)

    def ask(self, pixels: dict, number: int, questions: list[str], **generation) -> list[str]:
        """Answers to B questions about the picture of `view`."""
        token, end = self.processor.image_token, self.processor.prompts.row_end
        run = token * number
        if end:
            rows = int(pixels["image_sizes"][0][0]) // self.cell
            run = end.join([token * (number // rows)] * rows)
        texts = [asking.prompt_text(self.processor, question).replace(token, run, 1) for question in questions]
        special = self.processor.adds_special_tokens(texts[0])
        inputs = self.processor.tokenizer(texts, add_special_tokens=special, padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(self.model.device) for name in asking.PROMPT}
        is_image = inputs["input_ids"] == self.model.image_token_id
        inputs |= {name: is_image.long() for name in self.model.type_names}
        for name in set(pixels) & self.taken["forward"]:
            inputs[name] = pixels[name].repeat(len(texts), *[1] * (pixels[name].ndim - 1))
        with without_adapter(self.host):
            ids = self.host.generate(**inputs, do_sample=False, **generation)
        return asking.answer_texts(self.processor, ids[:, inputs["input_ids"].shape[1] :])


def plain_records(plain, views, suite, rows, asked, count=False) -> list[dict]:
    """Records of the rows whose view is `PLAIN`, as `rows.records_of` has them: with as many visual tokens as the row spends,
    or, `(PLAIN, OWN)`, as the model comes. Evidence is kept where there are as many as the second finest scale has.

    Args:
        plain: [`PlainHost`]. views: [`rows.Views`] of the image.
        asked: (sample, question, what its records repeat, its boxes) of each question.
    """
    records, limit = [], suite.max_new_tokens
    for row in rows:
        available = views.available
        pixels, number = plain.view(views.image, None if OWN in row.view else sum(row.counts(available)))
        questions = [question for _, question, *_ in asked]
        size, texts = max(1, AT_ONCE // number), []
        for start in range(0, len(questions), size):
            texts += plain.ask(pixels, number, questions[start : start + size], max_new_tokens=limit)
        fine = number >= sum(available[-2:-1] or available)
        for (sample, _, about, boxes), text in zip(asked, texts):
            own = {"tokens": number, "kept": fine if boxes else None, "seconds": {}, "answer": text}
            record = {"row": row.name, "x": row.x, "line": row.line, **about, **own}
            records.append(record | {"right": suite.scorers[0].score(sample, text)})
        if count:
            with FlopMeter() as meter:
                plain.ask(pixels, number, questions[:1], max_new_tokens=limit, min_new_tokens=limit)
            records[-len(asked)]["flops"] = meter.get_total_flops()
    return records


__all__ = ["OWN", "PLAIN", "OtherSettings", "PlainHost", "own_tiles", "plain_records"]
