"""A made-up scene as an image of many thousand pixels a side, painted part by part when it is asked for, never whole.

Units and boxes are those of `layout`. The shapes of a scene are laid down once, in units; a part of the image, or of a
smaller copy of it, is painted from those that reach into it. Objects of a few pixels are in a smaller copy what averaging
leaves of them.
"""

import math
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from ..image_rasters_uhr_bat import ImageSource
from .layout import NATIVE_WIDTHS, WIDTH, Scene, make_scene
from .painting import RENDER_WIDTH, YARD, Painter, draw_land, draw_light, flood, in_light

GRAIN_SIDE = 512  # pixels, after which the grain comes again
# Steps of shadows in units: a pixel of the size at which other scenes are painted.
SHADOW_STEP = round(WIDTH / RENDER_WIDTH)
# An object whose area is a smaller part of a pixel changes it by less than half a grey level.
LEAST_AREA = 1 / 512
# Pixels a side that an object has at least where it is painted to be averaged.
OBJECT_PIXELS = 6


class _Shapes:
    """What a painter draws, kept to be drawn at any size: the part of Pillow's `ImageDraw` that a painter uses."""

    def __init__(self):
        self.shapes = []

    def polygon(self, points, fill):
        self.shapes.append(("polygon", np.asarray(points), fill, 0))

    def line(self, points, fill, width, joint):
        self.shapes.append(("line", np.asarray(points), fill, width))

    def ellipse(self, box, fill):
        self.shapes.append(("ellipse", np.asarray(box).reshape(2, 2), fill, 0))

    @cached_property
    def boxes(self):
        """float[shapes, 4]: (left, top, right, bottom) of every shape."""
        return np.array([
            (*(points.min(0) - width), *(points.max(0) + width)) for _, points, _, width in self.shapes
        ]).reshape(-1, 4)  # fmt: skip

    def draw(self, canvas, unit, corner):
        """Everything that reaches into a canvas, the part at `corner` (x, y) in pixels of an image with `unit` pixels to a
        unit."""
        draw = ImageDraw.Draw(canvas)
        low, high = np.array(corner) / unit, (np.array(corner) + canvas.size) / unit
        inside = (self.boxes[:, :2] < high).all(1) & (self.boxes[:, 2:] > low).all(1)
        for index in inside.nonzero()[0]:
            kind, points, fill, width = self.shapes[index]
            # Pillow cuts the fraction off, which is not rounding down left of the canvas.
            places = [tuple(place) for place in (np.floor(points * unit) - corner).tolist()]
            if kind == "polygon":
                draw.polygon(places, fill=fill)
            elif kind == "line":
                draw.line(places, fill=fill, width=max(1, round(width * unit)), joint="curve")
            else:
                draw.ellipse([*places[0], *places[1]], fill=fill)


class ScenePicture(ImageSource):
    """A scene as an image of `width` pixels, which the processor takes like any other. The same scene and width give the
    same pixels, whatever the parts that are asked for."""

    def __init__(self, scene: Scene, width: int):
        self.scene, self.width, self.height = scene, width, round(width / scene.aspect)
        self.filename = f"scene {scene.seed}"
        rng = np.random.default_rng([scene.seed, 1])
        self._ground, self._sites, self._objects = _Shapes(), _Shapes(), []
        painter = Painter(self._ground, rng, unit=1)
        painter.shadow_step = SHADOW_STEP
        self._shore = 128 + draw_land(painter, scene)
        painter.draw = self._sites
        for site in scene.sites:
            painter.site(site)
        for pad in scene.pads:
            painter.pad(pad)
        for thing in scene.objects:
            painter.draw = _Shapes()
            painter.object(thing)
            self._objects.append((thing, painter.draw))
        self._light = 128 + draw_light(rng, scene)
        self._grain = rng.standard_normal((GRAIN_SIDE, GRAIN_SIDE), np.float32)

    @cached_property
    def _base_width(self):
        """Width of the smallest copy that is painted; those below it are averaged."""
        halvings = max(0, math.floor(math.log2(self.width / RENDER_WIDTH)))
        return math.ceil(self.width / 2**halvings)

    @cached_property
    def _base(self):
        size = self._base_width, math.ceil(self._base_width / self.scene.aspect)
        return Image.fromarray(self._paint((0, 0, *size), size))

    def for_scale(self, side):
        """The image itself, or its copy of a half, a quarter and so on that has `side` pixels or more."""
        halvings = max(0, math.floor(math.log2(max(self.width, self.height) / side)))
        return self if not halvings else _Copy(self, 2**halvings)

    @contextmanager
    def parts(self):
        yield lambda *box: (self.paint(box, (self.width, self.height)), None)

    def paint(self, box, size) -> np.ndarray:
        """uint8[h, w, 3] of a box (top, left, bottom, right) of the copy of a size (width, height)."""
        top, left, bottom, right = box
        if size[0] < self._base_width:
            factor = self._base_width / size[0], self._base.height / size[1]
            edges = [edge * step for edge, step in zip((left, top, right, bottom), factor * 2)]
            return np.asarray(self._base.resize((right - left, bottom - top), Image.BOX, edges))
        return self._paint((left, top, right, bottom), size)

    def _paint(self, box, size):
        left, top, right, bottom = box
        unit, extent = size[0] / WIDTH, (right - left, bottom - top)
        canvas, corner = Image.new("RGB", extent, YARD), (left, top)

        def enlarge(field):
            # The small field has the whole image as its extent: (0, 0) to `size`.
            scale = field.shape[1] / size[0], field.shape[0] / size[1]
            edges = [edge * step for edge, step in zip(box, scale * 2)]
            return Image.fromarray(np.float32(field)).resize(extent, Image.BICUBIC, edges).convert("L")

        self._ground.draw(canvas, unit, corner)
        flood(canvas, enlarge(self._shore))
        self._sites.draw(canvas, unit, corner)
        for thing, shapes in self._objects:
            _put(canvas, thing, shapes, unit, corner)
        rows, columns = np.arange(top, bottom) % GRAIN_SIDE, np.arange(left, right) % GRAIN_SIDE
        grain = self._grain[rows[:, None], columns] * (size[0] / self.width)  # what averaging leaves of it
        return in_light(np.asarray(canvas), enlarge(self._light), grain)


class _Copy(ImageSource):
    """A smaller copy of a scene's picture."""

    def __init__(self, picture, factor):
        self.picture, self.filename = picture, picture.filename
        self.width, self.height = math.ceil(picture.width / factor), math.ceil(picture.height / factor)

    @contextmanager
    def parts(self):
        yield lambda *box: (self.picture.paint(box, (self.width, self.height)), None)


def _put(canvas, thing, shapes, unit, corner):
    """An object on a canvas, as in `_Shapes.draw`: painted in a finer frame and averaged where it is small."""
    size = thing.size * unit
    if size**2 < LEAST_AREA:
        return
    finer = math.ceil(OBJECT_PIXELS / size)
    left, top = shapes.boxes[:, :2].min(0) * unit - corner
    right, bottom = shapes.boxes[:, 2:].max(0) * unit - corner
    box = math.floor(left) - 1, math.floor(top) - 1, math.ceil(right) + 1, math.ceil(bottom) + 1
    if box[0] >= canvas.width or box[1] >= canvas.height or box[2] <= 0 or box[3] <= 0:
        return
    around = canvas.crop(box)
    frame = around.resize((finer * around.width, finer * around.height), Image.NEAREST)
    shapes.draw(frame, unit * finer, finer * np.add(corner, box[:2]))
    canvas.paste(frame.resize(around.size, Image.BOX), box[:2])


def native_scene(seed: int) -> Scene:
    """The scene with native objects of a seed, for an image whose width is drawn too, log-uniformly from NATIVE_WIDTHS."""
    low, high = np.log(NATIVE_WIDTHS)
    return make_scene(seed, width=round(np.exp(np.random.default_rng([seed, 5]).uniform(low, high))))


def picture_of(scene: Scene) -> ScenePicture:
    """The image of a scene with native objects, at the width that these were drawn for."""
    return ScenePicture(scene, scene.width)
