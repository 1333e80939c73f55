"""Questions about a made-up scene whose answers follow from its layout, and only from it.

Answers are balanced: by the way scenes are laid out and questions are drawn, the text of a question says nothing about
its answer. Chance is the frequency of the most frequent answer: 1/6 for colours, 1/4 for types and quadrants, 1/5 for
counts, 1/2 for yes/no and comparisons.
"""

from dataclasses import dataclass

from .layout import OBJECTS, PAINTS, SITES, Object, Scene

# How often each kind is drawn for training: those more often that are learnt last.
FREQUENCIES = {"colour": 0.175, "type": 0.2, "yes/no": 0.175, "count": 0.25, "quadrant": 0.05, "comparison": 0.15}
KINDS = tuple(FREQUENCIES)
ABSENT = "none"  # the answer to a question about what a scene has not
TEMPLATES = {
    "colour": ("What colour is the {object} at the {site}?", "What is the colour of the {object} at the {site}?"),
    "type": ("What is the {colour} object at the {site}?", "What type of object is {colour} at the {site}?"),
    "yes/no": ("Is there a {thing} at the {site}?", "Can you see a {thing} at the {site}?"),
    "count": ("How many objects are at the {site}?", "Count the objects at the {site}."),
    "quadrant": ("In which quadrant is the {site}?", "Where is the {site}?"),
    "comparison": (
        "Which has more objects, the {site} or the {other}?",
        "Are more objects at the {site} or the {other}?",
    ),
}


@dataclass(frozen=True)
class SceneQuestion:
    """`sites`: indices of the sites it names. `objects`: those that have to be seen for the answer. `words`: what it
    asks about, as it stands in the text."""

    kind: str
    text: str
    answer: str
    sites: tuple[int, ...]
    objects: tuple[Object, ...]
    words: tuple[str, ...]


def single(things, name):
    """Objects that are alone in their site with what `name` ("kind" or "colour") says of them."""
    values = [getattr(thing, name) for thing in things]
    return [thing for thing, value in zip(things, values) if values.count(value) == 1]


def make_question(scene: Scene, kind: str, site: int | None = None, *, rng) -> SceneQuestion | None:
    """A question of one kind about a site, or about any that allows it; None where none does.

    Args:
        scene: what is asked about.
        kind: one of KINDS.
        site: index of the site.
        rng: numpy.random.Generator, draws the site, the wording and what is left open.
    """
    contents = scene.objects_of
    fits = {
        "colour": lambda index: single(contents[index], "kind"),
        "type": lambda index: single(contents[index], "colour"),
        # Asked about empty sites too, "no" would be the more frequent answer.
        "yes/no": lambda index: contents[index],
        "count": lambda index: True,
        "quadrant": lambda index: True,
        "comparison": lambda index: any(len(other) != len(contents[index]) for other in contents),
    }[kind]
    sites = [index for index in range(len(contents)) if site in (None, index) and fits(index)]
    if not sites:
        return None
    site = sites[rng.integers(len(sites))]
    words, named, things = {"site": scene.sites[site].kind}, (site,), tuple(contents[site])

    def draw(options):
        return options[rng.integers(len(options))]

    if kind == "colour":
        thing = draw(single(things, "kind"))
        words["object"], answer, things = thing.kind, thing.colour, (thing,)
    elif kind == "type":
        thing = draw(single(things, "colour"))
        words["colour"], answer, things = thing.colour, thing.kind, (thing,)
    elif kind == "yes/no":
        name, options = draw([("kind", OBJECTS), ("colour", tuple(PAINTS))])
        present = {getattr(thing, name) for thing in things}
        answer = draw(["yes", "no"])
        options = [option for option in options if (option in present) == (answer == "yes")]
        if not options:
            return None  # all four types are there
        value = draw(options)
        words["thing"] = value if name == "kind" else f"{value} object"
        if answer == "yes":
            things = tuple(thing for thing in things if getattr(thing, name) == value)
    elif kind == "count":
        answer = str(len(things))
    elif kind == "quadrant":
        answer, things = scene.quadrant(scene.sites[site]), ()
    else:
        other = draw([index for index in range(len(contents)) if len(contents[index]) != len(things)])
        named, things = (site, other), things + tuple(contents[other])
        answer = scene.sites[max(named, key=lambda index: len(contents[index]))].kind
        words["other"] = scene.sites[other].kind
    return SceneQuestion(kind, draw(TEMPLATES[kind]).format(**words), answer, named, things, tuple(words.values()))


def make_absent_question(scene: Scene, *, rng) -> SceneQuestion:
    """A question about a site that the scene has not, or about an object that its site has not: its answer is ABSENT, and it
    needs no token. Arguments as of `make_question`."""

    def draw(options):
        return options[rng.integers(len(options))]

    kinds = [site.kind for site in scene.sites]
    missing = [kind for kind in SITES if kind not in kinds]
    kind = draw(("colour", "type", "count"))
    sites, words = (), {"site": draw(missing), "object": draw(OBJECTS), "colour": draw(list(PAINTS))}
    if scene.sites and kind != "count" and rng.random() < 0.5:
        sites = (int(rng.integers(len(scene.sites))),)
        things = scene.objects_of[sites[0]]
        words["site"] = kinds[sites[0]]
        for name, value, options in (("object", "kind", OBJECTS), ("colour", "colour", tuple(PAINTS))):
            words[name] = draw([one for one in options if one not in {getattr(thing, value) for thing in things}] or [None])
        if words["object"] is None:  # all four types are there
            kind = "type"
    template = draw(TEMPLATES[kind])
    words = {name: word for name, word in words.items() if f"{{{name}}}" in template}
    return SceneQuestion("absent", template.format(**words), ABSENT, sites, (), tuple(words.values()))


def draw_question(scene: Scene, rng) -> SceneQuestion:
    """A question about a scene, of a kind drawn by FREQUENCIES among those that it allows."""
    order = rng.choice(KINDS, len(KINDS), replace=False, p=list(FREQUENCIES.values()))
    drawn = (make_question(scene, kind, rng=rng) for kind in order)
    return next(question for question in drawn if question is not None)
