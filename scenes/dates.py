"""Two dates of a made-up scene: what appeared, went and changed colour, questions about it, and the tokens these need.

The land and the sites stay. Objects change, inside sites and outside. The second picture also has another season, other light
and a shift, none of which anybody asks about. A pair follows from its seed alone. Dates are 0 and 1.

Units and points are those of `layout`. The text of a question says nothing about its answer. Chance is the frequency of the
most frequent answer: 1/4 for "new" and "gone", 1/6 for "was" and "now", 1/2 for "changed" and "which", about
3/5 for the numbers of "more".
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from .evidence import object_tokens, tokens_at
from .layout import (
    FINEST,
    MOST_OBJECTS,
    PAINTS,
    WIDTH,
    Object,
    Scene,
    draw_object,
    draw_places,
    is_outside,
    make_scene,
    place_in_cell,
)
from .painting import GRAIN, fractal, paint
from .questions import single

# Pairs for training have seeds from PAIR_SEED on. Those from 61,000,000 on are held back: nothing here reads them.
PAIR_SEED = 40_000_000
PAIR_VALIDATION_SEEDS, PAIR_TEST_SEEDS = range(50_000_000, 50_001_000), range(60_000_000, 60_001_000)

QUIET = 0.4  # of the sites, and of the objects outside them, 0.8, have no change
GOES, TURNS = 0.25, 0.25  # of the objects of other sites go, and change their colour
COMES = (0.4, 0.4, 0.2)  # how often none, one and two appear in such a site
FEW = 0.08  # of the objects outside: so many go, change their colour and appear
SHIFT = WIDTH / FINEST  # units along each axis at most: a pixel of the finest scale
# Gains of red, green and blue where a place is green; objects have no green.
SEASONS = {"the same": (1.0, 1.0, 1.0), "autumn": (1.25, 0.9, 0.7), "dry": (1.2, 1.05, 0.8), "snow": (1.6, 1.45, 1.9)}
GREEN = 24  # levels by which green exceeds red and blue where all of a gain counts
BRIGHTNESS, HAZE, UNEVEN = (0.85, 1.15), (-8, 12), 0.04

EQUAL = 1 / 4  # of the numbers that "more" asks for are 0

KINDS = ("new", "gone", "was", "now", "more", "changed", "which")
TEMPLATES = {
    "new": ("What is new at the {site}?", "What has appeared at the {site}?"),
    "gone": ("What is gone from the {site}?", "What has left the {site}?"),
    "was": ("What colour was the {object} at the {site}?", "What was the colour of the {object} at the {site}?"),
    "now": ("What colour is the {object} at the {site} now?", "What is the colour of the {object} at the {site} now?"),
    "more": ("How many {word} objects are at the {site} now?", "How many objects {word} are at the {site} now?"),
    "changed": ("Has anything changed at the {site}?", "Is anything different at the {site}?"),
    "which": (
        "Where has something changed, at the {site} or the {other}?",
        "Which has changed, the {site} or the {other}?",
    ),
}


@dataclass(frozen=True)
class Change:
    """An object that appeared (`before` None), went (`after` None) or changed its colour; `site` an index or None."""

    before: Object | None
    after: Object | None

    @property
    def thing(self) -> Object:
        return self.after or self.before

    @property
    def site(self) -> int | None:
        return self.thing.site


@dataclass(frozen=True)
class ScenePair:
    """Two dates of a scene on the ground, and how the second picture is taken.

    Attributes:
        before, after: scenes of one seed: equal land and sites, other objects.
        changes: all of them, outside sites too.
        season: of SEASONS.
        shift: (x, y) in units, by which all that the second picture shows is moved.
    """

    before: Scene
    after: Scene
    changes: tuple[Change, ...]
    season: str
    shift: tuple[float, float]

    @property
    def seed(self) -> int:
        return self.before.seed

    @cached_property
    def shown(self) -> tuple[Scene, Scene]:
        """The scenes as the pictures show them: the second one moved."""
        sites = tuple(replace(site, centre=self.moved(site.centre)) for site in self.after.sites)
        things = tuple(replace(thing, centre=self.moved(thing.centre)) for thing in self.after.objects)
        return self.before, replace(self.after, sites=sites, objects=things)

    def moved(self, point) -> tuple[float, float]:
        """A point on the ground as a point of the second picture."""
        return point[0] + self.shift[0], point[1] + self.shift[1]

    def changes_at(self, site: int) -> list[Change]:
        return [change for change in self.changes if change.site == site]


@dataclass(frozen=True)
class PairQuestion:
    """As `SceneQuestion`, with what has to be seen at each date: objects, and places where one stands at the other date."""

    kind: str
    text: str
    answer: str
    sites: tuple[int, ...]
    objects: tuple[tuple[Object, ...], tuple[Object, ...]]
    words: tuple[str, ...]


def make_pair(seed: int, shift: tuple[float, float] | None = None) -> ScenePair:
    """The pair of a seed. `shift`: another one than it draws, (x, y) in units."""
    scene, rng, changes = make_scene(seed), np.random.default_rng([seed, 7]), []

    def change_some(things, goes, turns):
        for thing in things:
            if (drawn := rng.random()) < goes:
                changes.append(Change(thing, None))
            elif drawn < goes + turns:
                others = [colour for colour in PAINTS if colour != thing.colour]
                changes.append(Change(thing, replace(thing, colour=others[rng.integers(len(others))])))

    for index, site in enumerate(scene.sites):
        if rng.random() < QUIET:
            continue
        things = scene.objects_of[index]
        change_some(things, GOES, TURNS)
        cells = (site.local(np.reshape([thing.centre for thing in things], (-1, 2))) + 1) // (2 / 3)
        taken = {int(row * 3 + column) for column, row in cells}
        free = [cell for cell in rng.permutation(9).tolist() if cell not in taken]
        gone = sum(change.after is None for change in changes if change.site == index)
        comes = min(rng.choice(3, p=COMES), MOST_OBJECTS - len(things) + gone)
        changes += [Change(None, draw_object(rng, place_in_cell(rng, site, cell), index)) for cell in free[:comes]]
    outside = [thing for thing in scene.objects if thing.site is None]
    change_some(outside, FEW, FEW)
    standing = [*scene.objects, *(change.after for change in changes if change.before is None)]
    for place in draw_places(rng, scene.height, round(FEW * len(outside))):
        if is_outside(place, scene.sites, standing):
            changes.append(Change(None, draw_object(rng, place, None)))
            standing.append(changes[-1].after)
    turned = {change.before: change.after for change in changes if change.before}
    objects = [turned.get(thing, thing) for thing in scene.objects]
    objects += [change.after for change in changes if not change.before]
    season = list(SEASONS)[rng.integers(len(SEASONS))]
    drawn = tuple(rng.uniform(-SHIFT, SHIFT, 2).tolist())
    after = replace(scene, objects=tuple(thing for thing in objects if thing))
    return ScenePair(scene, after, tuple(changes), season, drawn if shift is None else shift)


def paint_date(pair: ScenePair, date: int) -> Image.Image:
    """The picture of date 0 or 1, at the size that training and evaluation use."""
    return _later(paint(pair.after), pair) if date else paint(pair.before)


def _later(image, pair) -> Image.Image:
    """A picture in the season and the light of the second date, shifted; what comes in at its edges goes on as they are."""
    rng, size = np.random.default_rng([pair.seed, 8]), image.size
    pixels = np.asarray(image, np.float32)
    green = (pixels[..., 1] - np.maximum(pixels[..., 0], pixels[..., 2])) / GREEN
    gains = np.array(SEASONS[pair.season], np.float32)
    pixels = pixels * (1 + green.clip(0, 1)[..., None] * (gains - 1))
    light = rng.uniform(*BRIGHTNESS) * (1 + UNEVEN * fractal(rng, size, 3, 2))
    pixels = pixels * light[..., None] + rng.uniform(*HAZE)
    pixels += GRAIN * rng.standard_normal(pixels.shape[:2], np.float32)[..., None]
    x, y = (offset * image.width / WIDTH for offset in pair.shift)
    margin = int(np.ceil(max(abs(x), abs(y)))) + 2
    padded = np.pad(pixels.clip(0, 255).round().astype(np.uint8), ((margin,) * 2, (margin,) * 2, (0, 0)), "edge")
    place = (1, 0, margin - x, 0, 1, margin - y)
    return Image.fromarray(padded).transform(size, Image.AFFINE, place, Image.BICUBIC)


def make_question(pair: ScenePair, kind: str, *, rng) -> PairQuestion | None:
    """A question of one of KINDS about a site that allows it; None where none does. `rng` draws what is left open."""
    scenes, sites = (pair.before, pair.after), range(len(pair.before.sites))
    contents = [scene.objects_of for scene in scenes]
    changes = [pair.changes_at(site) for site in sites]
    new, gone = ([[one for one in of if getattr(one, date) is None] for of in changes] for date in ("before", "after"))

    def draw(options):
        return options[rng.integers(len(options))]

    answer = draw(("yes", "no")) if kind == "changed" else None
    more = [len(later) - len(earlier) for earlier, later in zip(*contents)]
    equal = rng.random() < EQUAL
    fits = {
        "new": lambda site: len(new[site]) == 1,
        "gone": lambda site: len(gone[site]) == 1,
        "was": lambda site: single(contents[0][site], "kind"),
        "now": lambda site: single(contents[1][site], "kind"),
        "more": lambda site: (more[site] == 0) == equal,
        "changed": lambda site: bool(changes[site]) == (answer == "yes"),
        "which": lambda site: changes[site] and not all(changes),
    }[kind]
    if not (found := [site for site in sites if fits(site)]):
        return None
    site = draw(found)
    named, words, objects = (site,), {"site": pair.before.sites[site].kind}, (contents[0][site], contents[1][site])
    if kind in ("new", "gone"):
        (change,) = (new if kind == "new" else gone)[site]
        answer, objects = change.thing.kind, ([change.thing],) * 2
    elif kind in ("was", "now"):
        date = KINDS.index(kind) - 2
        thing = draw(single(contents[date][site], "kind"))
        words["object"], answer, objects = thing.kind, thing.colour, ([thing], []) if kind == "was" else ([], [thing])
    elif kind == "more":
        answer, word = str(abs(more[site])), np.sign(more[site]) or draw((1, -1))
        words["word"] = "more" if word > 0 else "fewer"
    elif answer == "yes" or kind == "which":
        objects = ([change.thing for change in changes[site]],) * 2
    if kind == "which":
        answer, other = words["site"], draw([other for other in sites if not changes[other]])
        named = (site, other) if rng.random() < 0.5 else (other, site)
        words = dict(zip(("site", "other"), (pair.before.sites[index].kind for index in named)))
    text = draw(TEMPLATES[kind]).format(**words)
    return PairQuestion(kind, text, answer, named, tuple(map(tuple, objects)), tuple(words.values()))


def questions_of(pair: ScenePair) -> list[PairQuestion]:
    """One of each kind that the pair allows, the same whenever it is asked for."""
    rng = np.random.default_rng([pair.seed, 9])
    return [question for kind in KINDS if (question := make_question(pair, kind, rng=rng))]


def evidence_of_pair(pair: ScenePair, question: PairQuestion, grids) -> list[tuple[int, list[tuple[int, int]]]]:
    """(date, [(scale, position), ...]) for everything that has to be read: the tokens at the two finest scales that show an
    object, or the place where it stands at the other date. It is read if one of its tokens is."""
    found = []
    for date, things in enumerate(question.objects):
        for thing in things:
            seen = replace(thing, centre=pair.moved(thing.centre)) if date else thing
            found.append((date, object_tokens(pair.shown[date], [seen], grids)))
    return found


def changed_tokens(pair: ScenePair, grids) -> list[set[tuple[int, int]]]:
    """{(scale, position), ...} for each date: all tokens that show a part of an object that changed, or of its place."""
    found = []
    for date, scene in enumerate(pair.shown):
        points = []
        for change in pair.changes:
            x, y = pair.moved(change.thing.centre) if date else change.thing.centre
            reach = change.thing.size * np.array((-0.7, 0, 0.7))
            points += [(x + across, y + down) for across in reach for down in reach]
        found.append({(scale, token) for scale, grid in enumerate(grids) for token in tokens_at(scene, points, grid)})
    return found
