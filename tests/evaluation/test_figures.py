"""Means, intervals and comparisons of a run."""

import numpy as np
import pytest
from uhr_bat.evaluation import figures
from uhr_bat.evaluation.running import BLANK, IMAGE, TEXT, VIEWS
from uhr_bat.evaluation.samples import Picture, Sample
from uhr_bat.evaluation.suites import SUITES

SUITE = SUITES["xlrs-bench"]


def samples(number=6):
    """Two questions an image, three of the first task to one of the second."""
    return [
        Sample(
            str(n), (Picture(str(n // 2), n),), "q", "A", ("(A) x", "(B) y"), task="one" if n % 4 else "two",
            groups={"category and l2-category": f"{n % 3}"}, section="Reasoning" if n < 2 else "Perception",
        )
        for n in range(number)
    ]  # fmt: skip


def lines(asked, answers, **others):
    answers = {IMAGE: answers, BLANK: others.get("blank", "B" * len(asked)), TEXT: others.get("text", "A" * len(asked))}
    return {
        (one.id, view): {"id": one.id, "view": view, "answer": said, "error": None if said else "OSError: no such file"}
        for view in VIEWS
        for one, said in zip(asked, (None if letter == "-" else letter for letter in answers[view]))
    }


def test_micro_and_macro_are_told_apart():
    found = figures.means(np.array([1.0, 1, 1, 0]), ["a", "a", "a", "b"], ["1", "2", "3", "4"])
    assert (found["micro"].mean, found["macro"].mean) == (0.75, 0.5)
    assert (found["groups"]["a"].mean, found["groups"]["b"].mean) == (1, 0)


def test_intervals_are_those_of_images_drawn_anew():
    """Against a plain loop over images; two questions about one image stand or fall together."""
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(40), 2)
    values = np.repeat(rng.random(40) < 0.5, 2).astype(float)
    found = figures.means(values, ["a"] * 80, images)
    drawn = [np.mean([values[2 * image] for image in rng.integers(40, size=40)]) for _ in range(2000)]
    assert found["micro"][1:] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.03)
    alone = figures.means(values, ["a"] * 80, np.arange(80))
    widths = [of["micro"].high - of["micro"].low for of in (found, alone)]
    assert widths[0] > 1.2 * widths[1]


def test_failures_and_refusals_count_as_wrong_and_are_named():
    asked = samples()
    result = figures.evaluate(SUITE, asked, lines(asked, ["A", "-", "none", "A", " ", "A"]), SUITE.scorers[:1])
    row = result["scores"][0]
    assert (row["view"], row["samples"], row["micro"].mean) == (IMAGE, 6, 0.5)
    assert [(one["id"], one["view"]) for one in result["errors"]] == [("1", IMAGE)]
    text = figures.report(SUITE, result, settings())
    assert "- 1, image: OSError: no such file" in text and "- 2: 'none'" in text


def settings():
    return {"model": "m", "budgets": [1, 2], "selector": "s", "prompt": "p", "seed": 0, "limit": None}


def test_controls_stand_beside_the_score_and_differences_are_paired():
    asked = samples()
    result = figures.evaluate(SUITE, asked, lines(asked, "AAAAAB"), SUITE.scorers[:1])
    of_view = {row["view"]: row for row in result["scores"] if row["section"] == "all" and row["average"] == "macro"}
    assert [of_view[view]["micro"].mean for view in VIEWS] == [pytest.approx(5 / 6), 0, 1]
    assert of_view[IMAGE]["minus_text"].mean == pytest.approx(-1 / 6)
    assert of_view[IMAGE]["minus_blank"].mean == pytest.approx(5 / 6)


def test_parts_of_a_suite_have_figures_of_their_own_and_the_papers_are_marked():
    asked = samples()
    result = figures.evaluate(SUITE, asked, lines(asked, "AABBBB"), SUITE.scorers[:1])
    of_section = {row["section"]: row["micro"].mean for row in result["scores"] if row["view"] == IMAGE}
    assert of_section == {"all": pytest.approx(1 / 3), "Perception": 0, "Reasoning": 1}
    text = figures.report(SUITE, result, settings())
    assert "| UHR-BAT 7B | the paper's | 44 | lite, micro" in text and "they were not measured here" in text
    assert "| m | this run | 33.3 [" in text and "| micro, all, 6 samples |" in text


def test_two_runs_are_compared_sample_by_sample():
    asked = samples()
    one, other = lines(asked, "AAAABB"), lines(asked, "BAAAAB")
    row = figures.compare(SUITE, asked, one, other, SUITE.scorers[:1])[0]
    assert [figure.mean for figure in row["micro"]] == [pytest.approx(4 / 6), pytest.approx(4 / 6), pytest.approx(0)]
    assert (row["only_first_right"], row["only_second_right"]) == (1, 1)


def test_intervals_beside_the_bootstrap_hold_where_all_is_right_and_of_one_image():
    """Wilson's numbers for 1 of 1, 10 of 10 and 5 of 10 (Newcombe 1998); an image is a trial, however many questions it has."""
    for values, images, low, high in (
        ([1], ["a"], 0.2065, 1), ([1] * 10, range(10), 0.7225, 1), ([1, 0] * 5, range(10), 0.2366, 0.7634),
        ([1, 1], ["a", "a"], 0.2065, 1),
    ):  # fmt: skip
        found = figures.wilson_means(np.array(values, float), ["t"] * len(values), list(images))
        assert found["micro"][1:] == pytest.approx((low, high), abs=1e-4) == found["macro"][1:]
    asked = samples(2)
    result = figures.evaluate(SUITE, asked, lines(asked, "AA"), SUITE.scorers[:1])
    assert result["scores"][0]["micro"] == (1, 1, 1) and result["scores"][0]["wilson"]["micro"][1] == pytest.approx(
        0.2065, abs=1e-4
    )
    assert "100.0 [20.7, 100.0]" in figures.report(SUITE, result, settings())
    (row, *_) = figures.compare(SUITE, asked, lines(asked, "AA"), lines(asked, "AA"), SUITE.scorers[:1])
    assert row["wilson_difference"] == pytest.approx((0, -0.7935, 0.7935), abs=1e-4)
