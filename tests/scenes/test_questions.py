"""Questions about made-up scenes: their answers, counted again object by object, and how far one can guess them."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from uhr_bat.scenes.layout import OBJECTS, PAINTS, SITES, make_scene
from uhr_bat.scenes.questions import (
    ABSENT,
    FREQUENCIES,
    KINDS,
    TEMPLATES,
    draw_question,
    make_absent_question,
    make_question,
)

CHANCE = {"colour": 1 / 6, "type": 1 / 4, "yes/no": 1 / 2, "count": 1 / 5, "quadrant": 1 / 4, "comparison": 1 / 2}


@pytest.fixture(scope="module", params=[40, pytest.param(600, marks=pytest.mark.slow)])
def layouts(request):
    return [make_scene(seed) for seed in range(request.param)]


@pytest.fixture(scope="module")
def many_layouts():
    """Enough to compare frequencies."""
    return [make_scene(seed) for seed in range(600)]


@pytest.fixture(scope="module")
def asked(layouts):
    """(scene, question) pairs of all kinds."""
    rng = np.random.default_rng(0)
    pairs = [(scene, make_question(scene, kind, rng=rng)) for scene in layouts for kind in KINDS]
    return [(scene, question) for scene, question in pairs if question is not None]


def parse(question):
    """The words of a question, by the sentence that it was written with."""
    for template in TEMPLATES[question.kind]:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(template))
        if found := re.fullmatch(pattern, question.text):
            return found.groupdict()
    raise AssertionError(question.text)


def things_at(scene, name):
    """Objects whose centre lies in the site of that name: by the place, not by what the layout says."""
    (site,) = (site for site in scene.sites if site.kind == name)
    return [thing for thing in scene.objects if site.contains(thing.centre)]


def answer_again(scene, kind, words):
    things = things_at(scene, words["site"])
    if kind == "colour":
        (thing,) = (thing for thing in things if thing.kind == words["object"])
        return thing.colour
    if kind == "type":
        (thing,) = (thing for thing in things if thing.colour == words["colour"])
        return thing.kind
    if kind == "yes/no":
        wanted = words["thing"].removesuffix(" object")
        return "yes" if any(wanted in (thing.kind, thing.colour) for thing in things) else "no"
    if kind == "count":
        return str(len(things))
    if kind == "quadrant":
        (site,) = (site for site in scene.sites if site.kind == words["site"])
        rows = "lower" if site.centre[1] > scene.height / 2 else "upper"
        return f"{rows} {'right' if site.centre[0] > 5000 else 'left'}"
    other = things_at(scene, words["other"])
    assert len(things) != len(other)
    return words["site"] if len(things) > len(other) else words["other"]


def test_the_same_generator_asks_the_same_questions(layouts):
    rngs = [np.random.default_rng(seed) for seed in (5, 5, 6)]
    first, again, other = ([draw_question(scene, rng) for scene in layouts[:10]] for rng in rngs)
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scene(layouts, asked, kind):
    # An absent object would leave nothing to take the colour or the type of.
    checked = [(scene, question) for scene, question in asked if question.kind == kind]
    assert len(checked) > len(layouts) / 3
    for scene, question in checked:
        assert question.answer == answer_again(scene, kind, parse(question)), question.text


def test_what_has_to_be_seen_is_what_the_answer_takes(asked):
    for scene, question in asked:
        words = parse(question)
        names = [words["site"], *([words["other"]] if "other" in words else [])]
        assert [scene.sites[site].kind for site in question.sites] == names
        things = [thing for name in names for thing in things_at(scene, name)]
        if question.kind == "colour":
            things = [thing for thing in things if thing.kind == words["object"]]
        elif question.kind == "type":
            things = [thing for thing in things if thing.colour == words["colour"]]
        elif question.kind == "yes/no" and question.answer == "yes":
            wanted = words["thing"].removesuffix(" object")
            things = [thing for thing in things if wanted in (thing.kind, thing.colour)]
        elif question.kind == "quadrant":
            things = []
        assert sorted(map(id, question.objects)) == sorted(map(id, things))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_question_says_nothing_about_its_answer(many_layouts, kind):
    """The most frequent answer to each text, fitted on one half of the scenes, is right by chance on the other."""
    rng = np.random.default_rng(1)
    halves = [], []
    for scene in many_layouts:
        for _ in range(4):
            if question := make_question(scene, kind, rng=rng):
                halves[scene.seed % 2].append(question)
    fitted, by_text = Counter(), defaultdict(Counter)
    for question in halves[0]:
        fitted[question.answer] += 1
        by_text[question.text][question.answer] += 1
    right = 0
    for question in halves[1]:
        counts = by_text.get(question.text, fitted)
        right += question.answer == counts.most_common(1)[0][0]
    assert right / len(halves[1]) < CHANCE[kind] + 0.04


@pytest.mark.slow
def test_kinds_are_drawn_by_their_frequencies(many_layouts):
    rng = np.random.default_rng(2)
    kinds = Counter(draw_question(scene, rng).kind for scene in many_layouts for _ in range(4))
    assert set(kinds) == set(KINDS)
    # Not every scene allows every kind, so that the others are drawn a little more often.
    assert all(abs(kinds[kind] / kinds.total() - frequency) < 0.05 for kind, frequency in FREQUENCIES.items())


@pytest.mark.parametrize("kind", ["colour", "type", "yes/no"])
def test_an_empty_site_is_not_asked_about_its_objects(layouts, kind):
    rng = np.random.default_rng(3)
    empty = [(scene, site) for scene in layouts for site, things in enumerate(scene.objects_of) if not things]
    assert len(empty) > len(layouts) / 6
    assert all(make_question(scene, kind, site, rng=rng) is None for scene, site in empty)


def test_what_is_asked_about_and_absent_is_not_there(layouts):
    rng, found = np.random.default_rng(4), Counter()
    for scene in layouts:
        for _ in range(6):
            question = make_absent_question(scene, rng=rng)
            assert question.answer == ABSENT and not question.objects
            kinds = [site.kind for site in scene.sites]
            site = next(one for one in SITES if f"the {one}" in question.text)
            found[bool(question.sites)] += 1
            if not question.sites:
                assert site not in kinds
                continue
            assert kinds.index(site) == question.sites[0]
            (word,) = (word for word in question.words if word in (*OBJECTS, *PAINTS))
            assert not any(word in (thing.kind, thing.colour) for thing in things_at(scene, site))
    assert min(found.values()) > 10
