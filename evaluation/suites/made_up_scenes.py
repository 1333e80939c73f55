"""The project's own made-up scenes, none of which UHR-BAT-Tiny has seen: six kinds of question, objects with boxes."""

import numpy as np

from ...scenes.layout import TEST_SEEDS, WIDTH, make_scene
from ...scenes.painting import RENDER_WIDTH, paint
from ...scenes.questions import KINDS, make_question
from ..samples import Picture, Sample
from ..scoring import Scorer, read_words, same_words
from .suite import Suite


class MadeUpScenes(Suite):
    title = "Made-up scenes"
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

    def load(self, data=None, limit=None):
        """The questions about the test scenes, six a scene or fewer; `limit` takes the first scenes' questions."""
        if data is not None:
            raise ValueError("The made-up scenes are painted when they are asked about: there is no --data to give.")
        samples = []
        for seed in TEST_SEEDS:
            samples += self.samples_of_scene(seed)
            if limit is not None and len(samples) >= limit:
                break
        return samples[:limit]

    def samples_of_scene(self, seed: int) -> list[Sample]:
        scene, rng, samples = make_scene(seed), np.random.default_rng([seed, 3]), []
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
                        boxes=tuple(box_of(thing) for thing in question.objects),
                    )
                )
        return samples

    def open(self, picture):
        return paint(make_scene(picture.source))


def box_of(thing) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in pixels of the painted scene: the square of the object's area around its centre."""
    x, y = thing.centre
    half, scale = thing.size / 2, RENDER_WIDTH / WIDTH
    return tuple(scale * edge for edge in (x - half, y - half, x + half, y + half))
