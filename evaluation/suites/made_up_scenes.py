"""The project's own made-up scenes, none of which UHR-BAT-Tiny has seen: six kinds of question, objects with boxes."""

from functools import partial

import numpy as np

from ...scenes import dates
from ...scenes.layout import TEST_SEEDS, WIDTH, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import RENDER_WIDTH, add_specks, paint
from ...scenes.questions import KINDS, make_question
from ..samples import Picture, Sample
from ..scoring import Scorer, read_words, same_words
from .suite import Suite


def paint_specks(scene):
    """A scene with 700 bright specks, of the size of the smallest objects, anywhere."""
    image = paint(scene)
    add_specks(image, 700, np.random.default_rng([scene.seed, 4]))
    return image


# Title, how a scene of a seed is laid out, and how it becomes an image.
FORMS = {
    "scenes": ("Made-up scenes", make_scene, paint),
    "scenes-native": ("Made-up scenes with objects of a few native pixels", native_scene, picture_of),
    "scenes-crowded": ("Crowded made-up scenes", partial(make_scene, objects_outside=(100, 160)), paint),
    "scenes-specks": ("Made-up scenes with specks", make_scene, paint_specks),
}


class MadeUpScenes(Suite):
    prompts = {"scenes/plain-1": lambda sample: sample.question}
    scorers = (
        Scorer(
            "scenes/words-1",
            "Equal words without case and final stop.",
            read_words,
            same_words,
        ),
    )
    max_new_tokens = 6

    def __init__(self, name):
        super().__init__(name)
        self.title, self.lay_out, self.show = FORMS[name]

    seeds = TEST_SEEDS

    def load(self, data=None, limit=None):
        """The questions about the test scenes, one of a kind or none; `limit` takes the first scenes' questions."""
        if data is not None:
            raise ValueError("The made-up scenes are painted when they are asked about: there is no --data to give.")
        samples = []
        for seed in self.seeds:
            samples += self.samples_of_seed(seed)
            if limit is not None and len(samples) >= limit:
                break
        return samples[:limit]

    def samples_of_seed(self, seed: int) -> list[Sample]:
        scene, rng, samples = self.lay_out(seed), np.random.default_rng([seed, 3]), []
        for kind in KINDS:
            question = make_question(scene, kind, rng=rng)
            if question is not None:
                samples.append(
                    Sample(
                        id=f"{seed}/{kind}",
                        pictures=(Picture(str(seed), seed),),
                        question=question.text,
                        answer=question.answer,
                        task=kind,
                        boxes=tuple(box_of(thing, scene.width or RENDER_WIDTH) for thing in question.objects),
                    )
                )
        return samples

    def open(self, picture):
        return self.show(self.lay_out(picture.source))


class MadeUpDates(MadeUpScenes):
    """Two dates of a scene: objects appear, go and change their colour, and season, light and a shift change too."""

    prompts = {"scenes-dates/plain-1": lambda sample: sample.question}
    seeds = dates.PAIR_TEST_SEEDS
    two_dates = True

    def __init__(self, name="scenes-dates"):
        Suite.__init__(self, name)
        self.title = "Two dates of made-up scenes"

    def samples_of_seed(self, seed):
        pictures = tuple(Picture(f"{seed}/{date}", (seed, date)) for date in (0, 1))
        return [
            Sample(f"{seed}/{question.kind}", pictures, question.text, question.answer, task=question.kind)
            for question in dates.questions_of(dates.make_pair(seed))
        ]

    def open(self, picture):
        seed, date = picture.source
        return dates.paint_date(dates.make_pair(seed), date)


def box_of(thing, width) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in pixels of an image of this width: the square of the object's area around its centre."""
    x, y = thing.centre
    half, scale = thing.size / 2, width / WIDTH
    return tuple(scale * edge for edge in (x - half, y - half, x + half, y + half))
