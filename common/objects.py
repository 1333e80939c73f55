"""Objects that an answer points to, in pixels of the whole image, whoever named them and however.

`read_objects` reads the forms in which models write boxes and points as text; `objects_of_tokens` takes them from visual tokens.
What makes no sense is refused with its text, nothing is guessed.

| form | of | order, unit |
|---|---|---|
| `{"bbox_2d": [...], "label": ...}`, `{"point_2d": [...]}` | Qwen2.5-VL, Qwen3-VL | x y x y; pixels, thousandths |
| `{"box_2d": [...], "label": ...}` | Gemma, PaliGemma | y x y x, thousandths |
| `<loc0256><loc0128><loc0512><loc0640> ship` | PaliGemma | y x y x, of 1,024 bins |
| `<point x="61.5" y="40.6">`, `<points x1= y1= x2= y2=>` | Molmo, Qwen | x y; percent, or the family's unit |
| `<ref>ship</ref><box>[[...], [...]]</box>` | InternVL | x y x y, thousandths |

Boxes are (left, top, right, bottom) here, points (x, y), sizes (height, width).
"""

import json
import math
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ..geometry_uhr_bat import letterbox, token_box
from ..hosts.pointing import PIXELS, POINTING, family_name, picture_side
from .answers import after_thinking

# Letters of an answer, or of a part of it, in a message; parts that a message names.
SHOWN_LETTERS, SHOWN_PARTS = 200, 10
# Letters of an answer that are read, more than any model writes, and of one object of JSON: what begins like one and is none takes
# no longer than this.
MOST_LETTERS, JSON_LETTERS = 2**20, 2**18
# What no file keeps as it is: control characters, and halves of a letter, which JSON can spell.
NO_LETTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Keys of JSON: whether y comes first, and the unit where the key has one whatever the family.
KEYS = {"bbox_2d": (False, None), "point_2d": (False, None), "box_2d": (True, 1000)}
NAMED_KEY = re.compile(rf"[\"']({'|'.join(KEYS)})[\"']\s*:")
OBJECT = re.compile(r"\{\s*\"")
LOCATIONS = re.compile(r"((?:<loc\d+>\s*)+)(?:<seg\d+>\s*)*([^<;\n]*)")
BINS = 1024
POINTS = re.compile(r"<(points?)\b([^<>]*)>(?:([^<>]*)</\1>)?")
COORDINATE = re.compile(r"\b([xy])(\d*)\s*=\s*[\"']?([^\s\"'/]+)")
BOXES = re.compile(r"(?:<ref>([^<>]*)</ref>\s*)?<box>([^<>]*)</box>")
# Where a tokenizer takes InternVL's tags for control tokens, this is left of them.
BARE_BOXES = re.compile(r"(?:<ref>([^<>]*)</ref>\s*)?(\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*\s*\])")
NUMBERS = re.compile(r"\[([^\[\]]*)\]")
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
PLAIN_BOX = re.compile(rf"[\[(]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])]")


@dataclass(frozen=True)
class ImageObject:
    """An object that was found in an image: a box or a point.

    Attributes:
        label: what the model calls it; "" where it says nothing.
        box: float (left, top, right, bottom) in pixels of the whole image, from its upper left corner; None for a point.
        point: float (x, y), likewise; None for a box.
        score: how sure the model is, 0 to 1; None where it does not say.
        level: index of the scale or level of the visual token that it was read from; None where it was read from text.
        source: the form that it was read from: "bbox_2d", "point_2d", "box_2d", "loc", "point", "box" or "token".
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    score: float | None = None
    level: int | None = None
    source: str = ""

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """The box, or that of no extent around the point."""
        return self.box or self.point * 2

    def moved(self, x: float, y: float) -> "ImageObject":
        """The same, so many pixels further right and down."""
        shift = (x, y) * 2
        return replace(
            self,
            box=self.box and tuple(edge + by for edge, by in zip(self.box, shift)),
            point=self.point and tuple(edge + by for edge, by in zip(self.point, shift)),
        )

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Refused(NamedTuple):
    """A part of an answer that looks like an object and makes no sense.

    Attributes:
        text: that part.
        why: what is wrong with it.
    """

    text: str
    why: str

    def __str__(self):
        return f"{clipped(self.text)!r}: {self.why}"


class Objects(Sequence):
    """The objects of an answer, a sequence of [`ImageObject`], with what was refused.

    Attributes:
        text: of the answer.
        refused: [`Refused`] parts of it.
    """

    def __init__(self, objects: Iterable[ImageObject] = (), text: str = "", refused: Iterable[Refused] = ()):
        self._objects, self.text, self.refused = tuple(objects), text, tuple(refused)

    def __len__(self):
        return len(self._objects)

    def __getitem__(self, idx):
        return self._objects[idx]

    def __repr__(self):
        return f"Objects({list(self._objects)}, refused={list(self.refused)})"

    @property
    def refusals(self) -> list[str]:
        """What was refused, in words: the first of them, and how many there are beyond."""
        rest = len(self.refused) - SHOWN_PARTS
        return [*map(str, self.refused[:SHOWN_PARTS])] + ([f"and {rest:,} more"] if rest > 0 else [])

    @property
    def note(self) -> str:
        """Why there is no object, with the text of the answer; "" where there is one."""
        if self:
            return ""
        if self.refused:
            return f"No object of the answer makes sense: {'; '.join(self.refusals)}."
        return f"The answer holds no box and no point: {clipped(self.text)!r}."

    def record(self) -> dict[str, Any]:
        """As JSON has it: "objects", "refused" and "note"."""
        return {
            "objects": [one.record() for one in self],
            "refused": [one._asdict() for one in self.refused],
            "note": self.note,
        }

    @classmethod
    def of_record(cls, record: dict, text: str = "") -> "Objects":
        """The inverse of `record`."""
        found = [{name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
                 for one in record["objects"]]  # fmt: skip
        return cls([ImageObject(**one) for one in found], text, [Refused(**one) for one in record["refused"]])


def clipped(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} ..."


# ---- Places ----------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """What a model was shown, as one square picture: an image, or a part of it, in its letterbox.

    Attributes:
        image_size: (height, width) of the whole image.
        part: int (left, top, right, bottom) of the image that was shown; None for all of it.
        side: pixels a side of the picture, by which a model counts that is told of pixels; None where it is told of none.
    """

    image_size: tuple[int, int]
    part: tuple[int, int, int, int] | None = None
    side: int | None = None

    @property
    def shown(self) -> tuple[int, int, int, int]:
        return self.part or (0, 0, self.image_size[1], self.image_size[0])

    def place(self, shares: Sequence[float]) -> tuple[float, ...]:
        """x, y, x, y ... in pixels of the whole image, from shares of the picture's side."""
        left, top, right, bottom = self.shown
        side, above, before = letterbox((bottom - top, right - left))
        origin = left - before, top - above
        return tuple(share * side + origin[idx % 2] for idx, share in enumerate(shares))


class _Said(NamedTuple):
    """An object as it was written: `numbers` x before y, in a `unit`, in the part `text` of an answer."""

    place: int
    text: str
    source: str
    label: str
    numbers: Any
    unit: float | None
    score: float | None = None
    fault: str = ""


def read_objects(text: str, model_type: str, picture: Picture) -> Objects:
    """The objects that an answer names, in any of the forms above; in what a model thinks aloud nothing is read.

    Args:
        text: of the answer.
        model_type: of the model that wrote it, which decides the unit of numbers that do not state theirs.
        picture: what the model was shown.
    """
    answer = after_thinking(text)
    found, refused = [], []
    if len(answer) > MOST_LETTERS:
        why = f"an answer is read up to {MOST_LETTERS:,} letters, and this has {len(answer):,}"
        refused.append(_refused(answer[MOST_LETTERS:], why))
        answer = answer[:MOST_LETTERS]
    for said in sorted(_all_said(answer, model_type), key=lambda one: one.place):
        try:
            if said.fault:
                raise ValueError(said.fault)
            shares = _shares(said, model_type, picture)
            found.append(_placed(said, shares, picture))
        except ValueError as error:
            refused.append(_refused(said.text, str(error)))
    return Objects(found, text, refused)


def _refused(text, why) -> Refused:
    return Refused(NO_LETTERS.sub("\ufffd", clipped(text.strip())), why)


def _shares(said, model_type, picture) -> list[float]:
    """Numbers from 0 to 1 of the picture's side. Raises `ValueError` for those that are no box and no point."""
    numbers, unit = _numbers(said.numbers), said.unit
    wanted = 2 if said.source in ("point", "point_2d") else 4
    if len(numbers) != wanted:
        raise ValueError(f"{wanted} numbers make a {'point' if wanted == 2 else 'box'}, and these are {len(numbers)}")
    if unit is None:
        if model_type not in POINTING:
            raise ValueError(f"what numbers count is not known of a model of the type {model_type!r}")
        unit = POINTING[model_type].unit
        unit = picture.side if unit is PIXELS else unit
        if unit is None:
            raise ValueError("its pixels are of one picture, but the model was shown several (`places`)")
    most = unit - 1 if said.source == "loc" else unit
    if wrong := [number for number in numbers if not math.isfinite(number) or not 0 <= number <= most]:
        raise ValueError(f"{wrong[0]:g} is not from 0 to {most:g}")
    for low, high, axis in zip(numbers, numbers[2:], "xy"):
        if not low < high:
            raise ValueError(f"{axis} ends at {high:g} and begins at {low:g}")
    return [number / unit for number in numbers]


def _numbers(values) -> list[float]:
    values = re.sub(r"[()]", " ", values).split(",") if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)):
        raise ValueError("there are no numbers")
    if any(isinstance(value, (bool, list, dict)) or value is None for value in values):
        raise ValueError("these are no numbers")
    try:
        return [float(value) for value in values]
    except (ValueError, OverflowError):
        raise ValueError("these are no numbers") from None


def _placed(said, shares, picture) -> ImageObject:
    """Raises `ValueError` for an object beside the image, in its letterbox."""
    x0, y0, *end = picture.place(shares)
    left, top, right, bottom = picture.shown
    about = {
        "label": NO_LETTERS.sub("\ufffd", " ".join(said.label.split())),
        "score": said.score,
        "source": said.source,
    }
    if not end:
        if not (left <= x0 <= right and top <= y0 <= bottom):
            raise ValueError("it lies beside the image, in the letterbox")
        return ImageObject(point=(x0, y0), **about)
    box = max(x0, left), max(y0, top), min(end[0], right), min(end[1], bottom)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("it lies beside the image, in the letterbox")
    return ImageObject(box=tuple(map(float, box)), **about)


# ---- Forms -----------------------------------------------------------------------------------------------------------


def _all_said(text, model_type) -> Iterator[_Said]:
    read = []  # (start, end) of what is JSON
    yield from _said_in_json(text, read)
    yield from _said_as_locations(text)
    yield from _said_as_points(text)
    for match in _matches(BOXES, text, read):
        yield from _said_as_boxes(match, match.start())
        read.append(match.span())
    if model_type == "internvl":
        for match in _matches(BARE_BOXES, text, read):
            yield from _said_as_boxes(match, match.start())


def _matches(pattern, text, read) -> list:
    """Those that begin in none of the parts that were read, (start, end) each."""
    read = sorted(read)
    ends = [(one, bisect(read, (one.start(), math.inf))) for one in pattern.finditer(text)]
    return [one for one, idx in ends if idx == 0 or one.start() >= read[idx - 1][1]]


def _said_in_json(text, read) -> Iterator[_Said]:
    """Of every object of JSON that is whole, wherever it stands; one that is cut off, or is no JSON, says so."""
    decoder, begin = json.JSONDecoder(), OBJECT.search(text) if NAMED_KEY.search(text) else None
    while begin:
        place = begin.start()
        try:
            value, length = decoder.raw_decode(text[place : place + JSON_LETTERS])
        except (ValueError, RecursionError):
            begin = OBJECT.search(text, place + 1)
            continue
        end = place + length
        read.append((place, end))
        yield from _said_in_value(value, place, text[place:end])
        begin = OBJECT.search(text, end)
    for match in _matches(NAMED_KEY, text, read):
        start = text.rfind("{", max(0, match.start() - SHOWN_LETTERS), match.start())
        start = match.start() if start < 0 else start
        part = text[start : start + SHOWN_LETTERS]
        yield _Said(start, part, match[1], "", (), None, fault="this is no JSON, or it was cut off")


def _said_in_value(value, place, text) -> Iterator[_Said]:
    left = [value]  # no recursion: a model nests as deep as it likes
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from _said_in_object(value, place, text)
            value = list(value.values())
        if isinstance(value, list):
            left += [one for one in reversed(value) if isinstance(one, (dict, list))]


def _said_in_object(value, place, text) -> Iterator[_Said]:
    for key, (turned, unit) in KEYS.items():
        if key in value:
            boxes = value[key]
            nested = isinstance(boxes, list) and boxes and all(isinstance(one, list) for one in boxes)
            label = value.get("label", value.get("name", ""))
            label = label if isinstance(label, str) else ""
            for box in boxes if nested else [boxes]:
                part = (
                    text if len(text) <= SHOWN_LETTERS else f'{{"{key}": {_shown(box)}, "label": "{clipped(label)}"}}'
                )
                if turned and isinstance(box, list) and len(box) == 4:
                    box = [box[1], box[0], box[3], box[2]]
                yield _Said(place, part, key, label, box, unit, _score(value))


def _shown(box) -> str:
    """Numbers as they are written, of a few."""
    is_deep = isinstance(box, dict) or isinstance(box, list) and any(isinstance(one, (dict, list)) for one in box)
    return "..." if is_deep else clipped(json.dumps(box))


def _score(value) -> float | None:
    score = value.get("score", value.get("confidence"))
    known = isinstance(score, (int, float)) and not isinstance(score, bool) and 0 <= score <= 1
    return float(score) if known else None


def _said_as_locations(text) -> Iterator[_Said]:
    for match in LOCATIONS.finditer(text):
        numbers = list(map(int, re.findall(r"<loc(\d{1,9})", match[1])))
        for first in range(0, len(numbers), 4):
            y0, x0, y1, x1 = [*numbers[first : first + 4], *[None] * 4][:4]
            box = (x0, y0, x1, y1) if x1 is not None else numbers[first:]
            yield _Said(match.start(), match[0], "loc", match[2], box, BINS)


def _said_as_points(text) -> Iterator[_Said]:
    for match in POINTS.finditer(text):
        label = match[3] or next(iter(re.findall(r"\balt\s*=\s*[\"']([^\"'<>]*)", match[2])), "")
        pairs = {}
        for axis, number, value in COORDINATE.findall(re.sub(r"\balt\s*=\s*(?:\"[^\"]*\"|'[^']*')", "", match[2])):
            pairs.setdefault(number, {})[axis] = value
        for pair in pairs.values() or [{}]:
            yield _Said(match.start(), match[0], "point", label, [pair[axis] for axis in "xy" if axis in pair], None)


def _said_as_boxes(match, place) -> Iterator[_Said]:
    for numbers in NUMBERS.findall(match[2]) or [match[2]]:
        yield _Said(place, match[0], "box", match[1] or "", numbers, None)


# ---- Of models -------------------------------------------------------------------------------------------------------


class Pointed(NamedTuple):
    """A visual token that a model names as an object.

    Attributes:
        label: what it calls it.
        level: index of its scale or level.
        position: row * width + column on the grid of that level.
        score: how sure the model is, 0 to 1, or None.
    """

    label: str
    level: int
    position: int
    score: float | None = None


def objects_of_tokens(pointed: Iterable[Pointed | tuple], image_size, grids, text: str = "") -> Objects:
    """Objects from the visual tokens that show them, each with the box of its token.

    Args:
        image_size: (height, width) of the image.
        grids: (height, width) in tokens of every level.
    """
    found = []
    for one in map(Pointed._make, pointed):
        top, left, bottom, right = token_box(one.position, image_size, grids[one.level]).tolist()
        box = left, top, right, bottom
        found.append(ImageObject(one.label, box, score=one.score, level=one.level, source="token"))
    return Objects(found, text)


def objects_of(model, text, image_size, grids, *, part=None, pointed: Iterable[Pointed] | None = None) -> Objects:
    """The objects of an answer about one image, by the model that gave it.

    Args:
        model: ours or a host.
        text: of the answer.
        image_size: (height, width) of the whole image.
        grids: (height, width) in tokens of every level that the model was shown.
        part: (left, top, right, bottom) of the image that it was shown; None for all of it.
        pointed: the tokens that the model itself names as objects, on the grids of what it was shown; None for a model that names
            none, whose text is read.
    """
    picture = Picture(image_size, part, picture_side(model, grids))
    if pointed is None:
        return read_objects(text, family_name(model), picture)
    left, top, right, bottom = picture.shown
    found = objects_of_tokens(pointed, (bottom - top, right - left), grids, text)
    return Objects([one.moved(left, top) for one in found], text)


def labelled(objects: Objects, label: str) -> Objects:
    """The same, and whatever has no label of its own has this one."""
    return Objects([one if one.label else replace(one, label=label) for one in objects], objects.text, objects.refused)


# ---- Boxes without a label, and how well they fit --------------------------------------------------------------------


def boxes_said(text: str) -> list[tuple[float, ...]]:
    """float (x0, y0, x1, y1) of every "[x0, y0, x1, y1]" in an answer, as it is written."""
    return [tuple(map(float, found)) for found in PLAIN_BOX.findall(text)]


def overlap(one, other) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def paired_overlap(boxes, said) -> float:
    """Mean IoU of boxes paired one to one, as well as they can be, over the longer of the two lists: a box too many
    costs as much
    as a missing one."""
    from scipy.optimize import linear_sum_assignment

    if not boxes or not said:
        return 0.0
    values = [[overlap(box, other) for other in said] for box in boxes]
    rows, columns = linear_sum_assignment(values, maximize=True)
    return sum(values[row][column] for row, column in zip(rows, columns)) / max(len(boxes), len(said))
