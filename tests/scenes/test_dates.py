"""Two dates of a made-up scene: what changes, the answers, counted again object by object, and the tokens they need."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from uhr_bat.scenes import dates
from uhr_bat.scenes.layout import MOST_OBJECTS, SITE_SIDE

GRIDS = [(8, 8), (16, 16), (32, 32), (48, 48)]


@pytest.fixture(scope="module", params=[30, pytest.param(300, marks=pytest.mark.slow)])
def pairs(request):
    return [dates.make_pair(seed) for seed in range(dates.PAIR_SEED, dates.PAIR_SEED + request.param)]


@pytest.fixture(scope="module")
def asked(pairs):
    """(pair, question) of every kind that a pair allows."""
    rng = np.random.default_rng(0)
    found = [(pair, dates.make_question(pair, kind, rng=rng)) for pair in pairs for kind in dates.KINDS]
    return [(pair, question) for pair, question in found if question is not None]


def things_at(scene, name):
    """By the place, not by what the layout says."""
    (site,) = (site for site in scene.sites if site.kind == name)
    return {thing.centre: thing for thing in scene.objects if site.contains(thing.centre)}


def test_the_changes_are_all_that_differs_on_the_ground(pairs):
    for pair in pairs:
        there = Counter(pair.before.objects)
        there.subtract(change.before for change in pair.changes if change.before)
        there.update(change.after for change in pair.changes if change.after)
        assert +there == Counter(pair.after.objects) and pair.before.sites == pair.after.sites
        for scene in (pair.before, pair.after):
            assert max(map(len, scene.objects_of), default=0) <= MOST_OBJECTS
            places = np.array([thing.centre for thing in scene.objects])
            apart = np.hypot(*np.moveaxis(places[:, None] - places, -1, 0)) + 1e6 * np.eye(len(places))
            assert apart.min() > SITE_SIDE / 5
        assert max(map(abs, pair.shift)) <= dates.SHIFT
    kinds = Counter((change.before is None, change.after is None) for pair in pairs for change in pair.changes)
    assert len(kinds) == 3 and min(kinds.values()) > len(pairs) / 3


def answer_again(pair, kind, words):
    before, after = (things_at(scene, words["site"]) for scene in (pair.before, pair.after))
    if kind in ("new", "gone"):
        earlier, later = (before, after) if kind == "new" else (after, before)
        (place,) = later.keys() - earlier.keys()
        return later[place].kind
    if kind in ("was", "now"):
        (thing,) = (one for one in (before if kind == "was" else after).values() if one.kind == words["object"])
        return thing.colour
    if kind == "more":
        difference = len(after) - len(before)
        assert difference * (1 if words["word"] == "more" else -1) >= 0
        return str(abs(difference))
    if kind == "changed":
        return "no" if before == after else "yes"
    (changed,) = (
        name for name in (words["site"], words["other"]) if things_at(pair.before, name) != things_at(pair.after, name)
    )
    return changed


@pytest.mark.parametrize("kind", dates.KINDS)
def test_answers_follow_from_both_dates(pairs, asked, kind):
    checked = [(pair, question) for pair, question in asked if question.kind == kind]
    assert len(checked) > len(pairs) / 3
    for pair, question in checked:
        patterns = (re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(template)) for template in dates.TEMPLATES[kind])
        (words,) = (found.groupdict() for pattern in patterns if (found := re.fullmatch(pattern, question.text)))
        assert question.answer == answer_again(pair, kind, words), question.text


def test_evidence_lies_where_each_date_shows_it(asked):
    for pair, question in asked:
        evidence = dates.evidence_of_pair(pair, question, GRIDS)
        assert len(evidence) == sum(map(len, question.objects))
        changed = dates.changed_tokens(pair, GRIDS)
        for (date, tokens), thing in zip(evidence, [thing for things in question.objects for thing in things]):
            assert [scale for scale, _ in tokens] == [2, 3]
            x, y = np.add(thing.centre, pair.shift) if date else thing.centre
            top = (10000 - pair.before.height) / 2
            row, column = int((y + top) / 10000 * 48), int(x / 10000 * 48)
            assert tokens[1] == (3, row * 48 + column)
            if question.kind in ("new", "gone", "which"):
                assert set(tokens) <= changed[date]


@pytest.mark.slow
def test_the_second_picture_is_the_first_one_moved_where_nothing_changed():
    pair = dates.make_pair(dates.PAIR_SEED + 3, shift=(10000 / 1152 * 3, 0))  # three pixels to the right
    pair = replace(pair, season="the same", after=pair.before)
    first, second = (np.asarray(image, float) for image in (dates.paint_date(pair, 0), dates.paint_date(pair, 1)))
    moved, stays = (np.corrcoef(first[:, 3 - by : -3 - by].ravel(), second[:, 3:-3].ravel())[0, 1] for by in (3, 0))
    assert moved > 0.99 > stays
