"""Pictures that a plain model is trained with: whole scenes at several zooms, parts of them, and parts of images with objects
of a few native pixels, at these pixels; and the questions that a picture answers.

Scenes are painted once, into files. Boxes are (left, top, right, bottom) and points (x, y), in units of a scene (`layout`).
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ...common.files import whole_files
from ...scenes.layout import ASPECTS, FINEST, OBJECTS, PAINTS, SITE_SIDE, WIDTH, Object, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import Painter, paint
from ...scenes.questions import SceneQuestion, draw_question
from .plain_models import CELL, LONGEST, TILE

PLAIN_SEED = 2_000_000  # of the first scene; those with native objects have seeds of their own
KINDS = {"ordinary": 0, "native": 200_000}
STORED = 768  # px, the width at which scenes are kept: twice the finest scale of UHR-BAT-Tiny
WINDOW = 256  # px, the side of a part of a scene with native objects, at its own pixels
WINDOWS = 4  # of such a scene
LEAST_SEEN = 1.0  # px of a picture that an object must have to be named by a head
LEAST_ASKED = 2.0  # px of a picture that an object must have to be asked about
RESOLVED = 5.0  # px from which the towers' heads name 94 % of the types
STREWN_APART = (13, 40)  # px between objects that are strewn over a picture, for the tower
LARGEST_STREWN = 20.0  # px
# Shares of whole scenes, parts of images with native objects, parts of scenes, pictures with a grid of tiles of them, and wholes
# with a part of them. Few objects can be told apart in a whole scene that is pressed into 160 px.
SHARES = {"qwen3_vl": (0.4, 0.15, 0.3, 0, 0.15), "gemma3": (0.1, 0.1, 0.25, 0.45, 0.1)}
FINER = 4  # times as fine as the picture, where they are painted


# ---- Pictures --------------------------------------------------------------------------------------------------------


def scene_of(kind, number, first=PLAIN_SEED):
    seed = first + KINDS[kind] + number
    return native_scene(seed) if kind == "native" else make_scene(seed)


def native_window(scene, picture, rng, side: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in pixels of a scene's picture: a square part around an object of a site, or a site."""
    around = [thing.centre for thing in scene.objects if thing.site is not None] or [scene.sites[0].centre]
    centre = np.array(around[rng.integers(len(around))]) * picture.width / WIDTH
    left, top = (centre - rng.uniform(0.2, 0.8, 2) * side).round().astype(int)
    left, top = np.clip((left, top), 0, (picture.width - side, picture.height - side))
    return top, left, top + side, left + side


def _paint(kind, number, folder, first=PLAIN_SEED):
    scene = scene_of(kind, number, first)
    if kind == "native":  # at the image's own pixels
        picture, rng, parts = picture_of(scene), np.random.default_rng([scene.seed, 8]), []
        for _ in range(WINDOWS):
            box = native_window(scene, picture, rng, WINDOW)
            parts.append((picture.paint(box, (picture.width, picture.height)), box[1::-1]))
        arrays = {"pixels": np.stack([part for part, _ in parts]), "corners": np.array([at for _, at in parts])}
    else:
        small = paint(scene).resize((STORED, round(STORED / scene.aspect)), Image.LANCZOS)
        arrays = {"pixels": np.asarray(small)}
    with whole_files(folder) as built:
        for name, array in arrays.items():
            np.save(built / f"{kind}_{number}_{name}.npy", array)


def paint_scenes(folder: Path, counts: dict[str, int], workers: int, first=PLAIN_SEED):
    """The scenes of each kind, from the first seed on, as files of pixels; those that are there are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(kind, number) for kind, count in counts.items() for number in range(count)
               if not (folder / f"{kind}_{number}_pixels.npy").exists()]  # fmt: skip
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [pool.submit(_paint, kind, number, folder, first) for kind, number in missing]
        for job in tqdm(jobs, desc="Painting scenes", unit="scene", disable=not jobs):
            job.result()


class View:
    """A part of a scene as a picture of some pixels.

    Args:
        box: (left, top, right, bottom) in units of the scene.
        size: (width, height) in pixels.
    """

    def __init__(self, scene, box, size):
        self.scene, self.box, self.size = scene, np.array(box, float), size

    def place(self, points) -> np.ndarray:
        """float[..., 2] in units -> (x, y) in pixels of the picture."""
        return (np.asarray(points, float) - self.box[:2]) * self.pixel_of_unit

    @property
    def pixel_of_unit(self):
        """float[2]: of x and y, which differ where a picture is pressed into a square."""
        return self.size / (self.box[2:] - self.box[:2])

    def holds(self, points, margin=0.0):
        at = self.place(np.asarray(points, float).reshape(-1, 2))
        return bool(((at >= margin) & (at <= np.subtract(self.size, margin))).all())

    @cached_property
    def sites(self):
        """Indices of the sites that lie in the picture whole."""
        half = SITE_SIDE / 2 * 0.92
        return [index for index, site in enumerate(self.scene.sites)
                if self.holds(site.placed([(-half, -half), (-half, half), (half, -half), (half, half)]))]  # fmt: skip

    @property
    def crowd(self) -> int:
        """How many objects it shows."""
        places = self.place(np.reshape([thing.centre for thing in self.scene.objects], (-1, 2)))
        return int(((places >= 0) & (places < self.size)).all(1).sum())

    def shows(self, question, least=LEAST_ASKED) -> bool:
        """Whether the picture holds all that a question needs, at so many pixels."""
        if any(thing.size * self.pixel_of_unit.min() < least for thing in question.objects):
            return False
        if question.kind in ("colour", "type"):
            return self.holds([thing.centre for thing in question.objects], margin=2)
        return set(question.sites) <= set(self.sites)

    def questions(self, number, rng, whole, least=LEAST_ASKED):
        """Up to so many different questions that the picture answers."""
        found = {}
        for _ in range(3 * number):
            question = draw_question(self.scene, rng)
            if (whole or question.kind != "quadrant") and self.shows(question, least):
                found.setdefault(question.text, question)
            if len(found) == number:
                break
        return list(found.values())


def strewn(view, picture, rng, smallest):
    """The view of a scene with objects of `smallest` px and more strewn all over it, one in every second visual token, and its
    picture."""
    apart = np.exp(rng.uniform(*np.log(STREWN_APART)))
    cells = np.stack(np.meshgrid(*(np.arange(apart / 2, side, apart) for side in view.size)), -1).reshape(-1, 2)
    at = cells + rng.uniform(-0.2, 0.2, cells.shape) * apart
    sizes = np.exp(rng.uniform(*np.log((smallest, LARGEST_STREWN)), len(at))).clip(max=apart / 2)
    there = view.place(np.reshape([thing.centre for thing in view.scene.objects], (-1, 2)))
    free = (np.abs(at[:, None] - there).max(-1) > apart).all(1) & (rng.random(len(at)) < 0.8)
    canvas = picture.resize(np.multiply(view.size, FINER).tolist(), Image.NEAREST)
    unit = view.pixel_of_unit[0]
    painter, made = Painter(ImageDraw.Draw(canvas), rng, unit * FINER), []
    for place, size in zip(at[free] / unit, sizes[free] / unit):
        kind, colour = OBJECTS[rng.integers(len(OBJECTS))], list(PAINTS)[rng.integers(len(PAINTS))]
        thing = Object(kind, colour, tuple(place), rng.uniform(0, 2 * np.pi), size, None)
        painter.object(thing)
        made.append(replace(thing, centre=tuple(place + view.box[:2])))
    scene = replace(view.scene, objects=(*view.scene.objects, *made))
    return View(scene, view.box, view.size), canvas.reduce(FINER)


def lists(view, number, rng) -> list[SceneQuestion]:
    """What is at some of the sites of a picture, in words, object by object in reading order: as captions, they say more than an
    answer does of what a picture shows, and are learnt from first."""
    found = []
    for site in rng.permutation(view.sites)[:number]:
        things = view.scene.objects_of[site]
        if any(thing.size * view.pixel_of_unit.min() < LEAST_ASKED for thing in things):
            continue
        things = sorted(things, key=lambda thing: tuple(view.place(thing.centre)[::-1] // CELL))
        words = ", ".join(f"{thing.colour} {thing.kind}" for thing in things) or "no objects"
        text = f"List the objects at the {view.scene.sites[site].kind}."
        found.append(SceneQuestion("list", text, words, (int(site),), tuple(things), ()))
    return found


class Pictures:
    """The painted scenes, and views of them."""

    def __init__(self, folder: Path, counts: dict[str, int], first=PLAIN_SEED):
        self.folder, self.counts, self.first, self.scenes = folder, counts, first, {}
        self.by_aspect = {aspect: [] for aspect in ASPECTS}
        for number in range(counts.get("ordinary", 0)):
            self.by_aspect[self.scene("ordinary", number).aspect].append(number)
        self.aspects = [aspect for aspect in ASPECTS if self.by_aspect[aspect]]

    def draw_aspect(self, rng) -> float:
        """One of those that whole scenes have."""
        return self.aspects[rng.integers(len(self.aspects))]

    def scene(self, kind, number):
        if (kind, number) not in self.scenes:
            self.scenes[kind, number] = scene_of(kind, number, self.first)
        return self.scenes[kind, number]

    def read(self, kind, number, name="pixels"):
        return np.load(self.folder / f"{kind}_{number}_{name}.npy", mmap_mode="r")

    def picture(self, kind, number, view) -> Image.Image:
        pixels = self.read(kind, number)
        scale = STORED / WIDTH
        box = view.box * scale
        left, top = np.floor(box[:2]).astype(int).clip(0)
        right, bottom = np.minimum(np.ceil(box[2:]).astype(int), pixels.shape[1::-1])
        part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
        inside = (box - (left, top, left, top)).clip(0, (*part.size, *part.size))
        return part.resize(view.size, Image.BICUBIC, tuple(inside))

    def crop(self, kind, rng, size, zooms, numbers=None):
        """A part of a scene, one of some, around a site, at a zoom of the finest scale."""
        while True:
            number = int(rng.integers(self.counts[kind]) if numbers is None else numbers[rng.integers(len(numbers))])
            scene = self.scene(kind, number)
            if not scene.sites:
                continue
            zoom = np.exp(rng.uniform(*np.log(zooms)))
            extent = np.array(size) / zoom * WIDTH / FINEST
            extent /= max(1, *(extent / (WIDTH, scene.height)))  # no larger than the scene
            site = scene.sites[rng.integers(len(scene.sites))]
            room = np.maximum(extent - SITE_SIDE * 1.3, 0) / 2 if rng.random() < 0.8 else extent / 3
            corner = np.array(site.centre) + rng.uniform(-room, room) - extent / 2
            corner = corner.clip(0, np.array((WIDTH, scene.height)) - extent)
            view = View(scene, (*corner, *(corner + extent)), size)
            view.number = number
            return view, self.picture(kind, number, view)

    def whole(self, rng, aspect, size, number=None):
        number = self.by_aspect[aspect][rng.integers(len(self.by_aspect[aspect]))] if number is None else number
        scene = self.scene("ordinary", number)
        view = View(scene, (0, 0, WIDTH, scene.height), size)
        return view, self.picture("ordinary", number, view)

    def native(self, rng, size):
        """A part of a part of a scene with native objects, at its own pixels or half of them."""
        number, part = int(rng.integers(self.counts["native"])), rng.integers(WINDOWS)
        scene = self.scene("native", number)
        corner = self.read("native", number, "corners")[part]
        extent = np.minimum(np.array(size) * (1 if rng.random() < 0.7 else 2), WINDOW)
        offset = rng.integers(0, WINDOW - extent + 1)
        left, top = offset
        pixels = np.ascontiguousarray(self.read("native", number)[part, top : top + extent[1], left : left + extent[0]])
        unit = WIDTH / scene.width
        start = (corner + offset) * unit
        view = View(scene, (*start, *(start + extent * unit)), size)
        return view, Image.fromarray(pixels).resize(size, Image.BICUBIC)


def draw_views(pictures, form, rng, number, close=False):
    """(pictures of each prompt, view that its questions are about, whether that is whole): of one kind and one size.

    Args:
        close: parts of scenes that are hardly larger than a site.
    """
    draw, tile = rng.random(), (TILE, TILE) if form == "gemma3" else None
    whole, native, part, tiled = np.cumsum(SHARES[form])[:4]
    is_whole = draw < whole and not close
    if close:
        side = TILE if tile else int(rng.choice([64, 80, 96, 128]))
        zooms = (1.6, 3.0) if tile else (side / 64, min(side / 56, 2.2))
        made = [pictures.crop("ordinary", rng, (side, side), zooms) for _ in range(number)]
    elif is_whole:
        aspect = pictures.draw_aspect(rng)
        # Mostly such in which objects can be seen.
        sides = np.array([96, 128, 160, 192, 256, 320, 384, 448, LONGEST])
        side = int(rng.choice(sides, p=np.array([1, 1, 1, 2, 3, 4, 6, 4, 4]) / 26))
        size = tile or (side, max(round(side / aspect / CELL) * CELL, CELL))
        made = [pictures.whole(rng, aspect, size) for _ in range(number)]
    elif draw < native:
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192], 2))
        made = [pictures.native(rng, size) for _ in range(number)]
    elif draw < part:
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192, 224, 256, 288], 2))
        made = [pictures.crop("ordinary", rng, size, (0.6, 2.0)) for _ in range(number)]
    elif draw < tiled:  # as pan and scan
        is_whole, aspect, grid = rng.random() < 0.5, pictures.draw_aspect(rng), int(rng.choice([2, 3], p=[0.6, 0.4]))
        size, made = (grid * TILE, grid * TILE), []
        for _ in range(max(1, number // 2)):
            if is_whole:
                view, picture = pictures.whole(rng, aspect, size)
            else:
                view, picture = pictures.crop("ordinary", rng, size, (0.6, 1.6))
            boxes = [(x, y, x + TILE, y + TILE) for y in range(0, size[1], TILE) for x in range(0, size[0], TILE)]
            made.append((view, (picture.resize(tile, Image.BICUBIC), *map(picture.crop, boxes))))
    else:  # the whole picture, and a part of it
        aspect, side = pictures.draw_aspect(rng), int(rng.choice([96, 128, 192]))
        first = tile or (side, max(round(side / aspect / CELL) * CELL, CELL))
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192], 2))
        made = []
        for _ in range(number):
            view, picture = pictures.crop("ordinary", rng, size, (0.8, 2.0), pictures.by_aspect[aspect])
            made.append((view, (pictures.whole(rng, aspect, first, view.number)[1], picture)))
    rng = np.random.default_rng(0)
    kept = [(picture, view) for view, picture in made if view.questions(1, rng, is_whole)]
    return [one if isinstance(one, tuple) else (one,) for one, _ in kept], [view for _, view in kept], is_whole
