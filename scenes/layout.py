"""What is in a made-up satellite scene: sites, and objects of few pixels.

A scene is laid out once, from a seed, and can be painted at any size (`painting`). Sites (a pier, a stadium, ...) are
large enough to be seen at the anchor scale. Objects (ships, cars, planes, tanks) are a few pixels large at the finest
scale, stand inside and outside the sites, and their type and colour are drawn without regard to where they stand: a ship
can lie on a runway, because otherwise the question would give the answer away.

Lengths are in units of 1/10000 of the width: a pixel of the default size. Points are (x, y), sizes (width, height) and
boxes (x, y, width, height), as in Pillow.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

WIDTH = 10000  # units
ASPECTS = (1.0, 1.25, 4 / 3)  # width / height
FINEST = 384  # px, the finest scale of UHR-BAT-Tiny: sizes of objects are given in its pixels

SITES = ("pier", "runway", "bridge", "tank farm", "stadium", "quarry", "roundabout", "golf course")
OBJECTS = ("ship", "car", "plane", "tank")
PAINTS = {
    "red": (208, 42, 38), "yellow": (242, 208, 44), "blue": (44, 88, 222), "white": (246, 246, 244),
    "black": (20, 20, 24), "purple": (158, 48, 178),
}  # fmt: skip
# The tower is trained on scenes from seed 0 on, the decoder from FINETUNING_SEED on, nothing on the other two.
FINETUNING_SEED = 1_000_000
VALIDATION_SEEDS, TEST_SEEDS = range(10_000_000, 10_001_000), range(20_000_000, 20_001_000)
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
SITE_SIDE = 1400  # units: 54 px of the finest scale, 9 of the anchor
SITES_PER_SCENE = (3, 5)
MOST_OBJECTS = 4  # in one site
OBJECTS_OUTSIDE = (20, 40)
# Side of a square of the object's area, in pixels of the finest scale, and how often each range is drawn.
OBJECT_SIZES = {(1.5, 2.5): 0.1, (2.5, 4.5): 0.3, (4.5, 8.0): 0.6}
# The same of scenes with native objects, in pixels of the image itself.
NATIVE_SIZES = {(2.0, 3.0): 0.15, (3.0, 4.5): 0.25, (4.5, 8.0): 0.6}
NATIVE_WIDTHS = (4000, 16000)  # px, of images with such objects
# Native objects stand on pads, as cars in a car park do: what can be seen of them from afar. As many in every site,
# whatever stands on them, so that pads give no answer away.
PAD_SIDE = 70  # units: 2.7 px of the finest scale
PADS_PER_SITE, EMPTY_PADS_OUTSIDE = 5, 10


@dataclass(frozen=True)
class Site:
    """A square of SITE_SIDE units around `centre`, turned by `angle` (radians)."""

    kind: str
    centre: tuple[float, float]
    angle: float

    def local(self, points) -> np.ndarray:
        """float[..., 2] of the scene -> the same points in the frame of the site, -1 to 1 inside it."""
        offset = np.asarray(points, float) - self.centre
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        turned = np.stack(
            (offset[..., 0] * cosine + offset[..., 1] * sine, offset[..., 1] * cosine - offset[..., 0] * sine), axis=-1
        )
        return turned / (SITE_SIDE / 2)

    def placed(self, points) -> np.ndarray:
        """float[..., 2] in units along the sides of the site, from its centre -> the same points in the scene."""
        x, y = np.moveaxis(np.asarray(points, float), -1, 0)
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        return np.stack((self.centre[0] + x * cosine - y * sine, self.centre[1] + x * sine + y * cosine), axis=-1)

    def contains(self, points) -> np.ndarray:
        """bool[...] for float[..., 2]."""
        return (np.abs(self.local(points)) <= 1).all(-1)


@dataclass(frozen=True)
class Object:
    """A ship, car, plane or tank; `size` is the side of a square of its area in units, `site` an index or None."""

    kind: str
    colour: str
    centre: tuple[float, float]
    angle: float
    size: float
    site: int | None


@dataclass(frozen=True)
class Pad:
    """A light square of PAD_SIDE units around `centre`, turned by `angle` (radians), with one object on it or none."""

    centre: tuple[float, float]
    angle: float


@dataclass(frozen=True)
class Scene:
    """`width`: pixels of the image whose own pixels the sizes of objects are drawn in; None: those of the finest scale."""

    seed: int
    aspect: float
    sites: tuple[Site, ...]
    objects: tuple[Object, ...]
    pads: tuple[Pad, ...] = ()
    width: int | None = None

    @property
    def height(self) -> float:
        return WIDTH / self.aspect

    @cached_property
    def objects_of(self) -> list[list[Object]]:
        """Objects of every site."""
        return [[thing for thing in self.objects if thing.site == index] for index in range(len(self.sites))]

    def quadrant(self, site: Site) -> str:
        x, y = site.centre
        return QUADRANTS[2 * (y > self.height / 2) + (x > WIDTH / 2)]

    def to_square(self, points) -> np.ndarray:
        """float[..., 2] of the scene -> (row, column) in [0, 1] of the letterboxed square that the model sees."""
        points = np.asarray(points, float)
        top = (WIDTH - self.height) / 2
        return np.stack(((points[..., 1] + top) / WIDTH, points[..., 0] / WIDTH), axis=-1)


def draw_object(rng, centre, site: int | None, sizes=OBJECT_SIZES, pixels: int = FINEST) -> Object:
    """An object at a place. `sizes`: how often each range is drawn, in pixels of an image of `pixels` px."""
    ranges = list(sizes)
    low, high = ranges[rng.choice(len(ranges), p=list(sizes.values()))]
    return Object(
        OBJECTS[rng.integers(len(OBJECTS))], list(PAINTS)[rng.integers(len(PAINTS))], tuple(map(float, centre)),
        rng.uniform(0, 2 * math.pi), rng.uniform(low, high) * WIDTH / pixels, site,
    )  # fmt: skip


def place_in_cell(rng, site: Site, cell: int) -> np.ndarray:
    """A point near the middle of one of the 3 x 3 cells of a site: objects of different cells never touch."""
    row, column = divmod(cell, 3)
    return site.placed(((column, row) + rng.uniform(0.4, 0.6, 2)) * SITE_SIDE / 3 - SITE_SIDE / 2)


def draw_places(rng, height: float, number: int) -> np.ndarray:
    """float[number, 2]: points of a scene, off its edges."""
    edge = min(200, height / 2)
    return rng.uniform((200, edge), (WIDTH - 200, height - edge), (number, 2))


def is_outside(place, sites, things) -> bool:
    """Whether an object may stand at a place: away from all sites and from the objects that stand already."""
    far = all(math.dist(place, site.centre) > SITE_SIDE for site in sites)
    return far and all(math.dist(place, thing.centre) > SITE_SIDE / 3 for thing in things)


def make_scene(
    seed: int,
    aspect: float | None = None,
    objects_outside: tuple[int, int] = OBJECTS_OUTSIDE,
    width: int | None = None,
) -> Scene:
    """Lay out a scene: sites apart from each other and inside one quadrant each, objects inside and outside them.

    Args:
        objects_outside: fewest and most objects that stand in no site; fewer where there is no room.
        width: of an image in pixels: objects then are 2 to 8 of these large, whatever the width, and stand on pads.
    """
    sizes, pixels = (OBJECT_SIZES, FINEST) if width is None else (NATIVE_SIZES, width)
    rng = np.random.default_rng(seed)
    aspect = ASPECTS[rng.integers(len(ASPECTS))] if aspect is None else aspect
    height, radius = WIDTH / aspect, SITE_SIDE * 0.6
    wanted, tries = rng.integers(SITES_PER_SCENE[0], SITES_PER_SCENE[1] + 1), 0
    centres = []
    if height < 4 * radius:
        wanted = 0  # a strip: no quadrant has room
    while len(centres) < wanted:
        if (tries := tries + 1) % 200 == 0:
            centres, wanted = [], wanted - 1  # what stood already left no room for the next one
        x, y = rng.uniform((radius, radius), (WIDTH - radius, height - radius))
        on_axis = min(abs(x - WIDTH / 2), abs(y - height / 2)) < radius
        if not on_axis and all(math.dist((x, y), other) > 2.4 * radius for other in centres):
            centres.append((x, y))
    kinds = rng.permutation(len(SITES))
    sites = tuple(
        Site(SITES[kind], centre, math.pi / 2 * rng.integers(4) + rng.uniform(-0.25, 0.25))
        for kind, centre in zip(kinds, centres)
    )

    def draw(centre, site):
        return draw_object(rng, centre, site, sizes, pixels)

    objects = []
    for index, site in enumerate(sites):
        cells = rng.permutation(9)[: rng.integers(MOST_OBJECTS + 1)]
        objects += [draw(place_in_cell(rng, site, cell), index) for cell in cells]
    most = len(objects) + rng.integers(objects_outside[0], objects_outside[1] + 1)
    for place in draw_places(rng, height, 4 * most):
        if len(objects) < most and is_outside(place, sites, objects):
            objects.append(draw(place, None))
    if width is None:
        return Scene(seed, aspect, sites, tuple(objects))
    return Scene(seed, aspect, sites, *_put_on_pads(rng, height, sites, objects), width)


def _put_on_pads(rng, height, sites, objects) -> tuple[tuple[Object, ...], tuple[Pad, ...]]:
    """The objects, moved off the middle of the pads on which they stand now, and all pads, empty ones among them."""

    def pad(centre):
        return Pad(tuple(map(float, centre)), rng.uniform(0, math.pi))

    def is_free(place, reach):
        return all(math.dist(place, other.centre) > reach for other in pads)

    pads = [pad(thing.centre) for thing in objects]
    for index, site in enumerate(sites):
        missing = PADS_PER_SITE - sum(thing.site == index for thing in objects)
        while missing:
            place = site.placed((rng.integers(3, size=2) + rng.uniform(0.4, 0.6, 2)) * SITE_SIDE / 3 - SITE_SIDE / 2)
            if is_free(place, SITE_SIDE / 6):
                pads.append(pad(place))
                missing -= 1
    for place in rng.uniform((200, 200), (WIDTH - 200, height - 200), (EMPTY_PADS_OUTSIDE, 2)):
        if is_free(place, SITE_SIDE / 3) and all(math.dist(place, site.centre) > SITE_SIDE for site in sites):
            pads.append(pad(place))
    moved = []
    for thing in objects:
        room = max(PAD_SIDE / 2 - thing.size, 0)
        moved.append(replace(thing, centre=tuple(map(float, rng.uniform(-room, room, 2) + thing.centre))))
    return tuple(moved), tuple(pads)
