"""What answers are worth: prefixes, several letters, quoted options, nothing; and what published scorers make of it."""

import importlib.util
import random
import sys
from types import SimpleNamespace

import pytest
import small_wordnet
from uhr_bat.evaluation.samples import Sample, option_lines
from uhr_bat.evaluation.scoring import read_letter, read_letters
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.evaluation.suites.tree_bench import overlap

COLOURS = ("(A) red", "(B) blue", "(C) a farm", "(D) white")


def sample(answer, options=COLOURS, **fields):
    return Sample("1", (), "q", answer, options, **fields)


def worth(suite, scorer, answer, text, **fields):
    return SUITES[suite].scorers[scorer].score(sample(answer, **fields), text)


@pytest.mark.parametrize(
    "text, letters",
    [
        ("B", "B"), ("(B)", "B"), ("b", "B"), ("B.", "B"), ("B. Blue", "B"), ("A. Farm Land", "A"), ("C) a farm", "C"),
        ("The answer is C", "C"), ("The correct option is D", "D"), ("Best answer: (A)", "A"), ("Answer: B", "B"),
        ("A C", "AC"), ("A, C", "AC"), ("a, c", "AC"), ("AC", "AC"), ("A and C", "AC"), ("(A) red, (C) a farm", "AC"),
        ("C, A", "AC"), ("blue", "B"), ("Blue.", "B"), ("It is a farm.", "C"), ("A farm", "C"), ("A is correct.", "A"),
        ("", ""), ("I cannot tell", ""), ("Red or blue", ""),
    ],
)  # fmt: skip
def test_letters_that_stand_alone_are_read_and_else_the_option_that_is_quoted(text, letters):
    assert read_letters(sample("A"), text) == letters


@pytest.mark.parametrize(
    "options, texts",
    [
        (["(A) red", "(B) blue"], ["red", "blue"]), (["A. red", "B. blue"], ["red", "blue"]),
        (["red", "blue"], ["red", "blue"]), (["N. of it", "S. of it"], ["N. of it", "S. of it"]),
        (["A. Smith", "the pier"], ["A. Smith", "the pier"]),
    ],
)  # fmt: skip
def test_options_lose_their_letters_where_these_are_letters(options, texts):
    assert option_lines(options) == dict(zip("AB", texts))


def test_of_several_letters_the_first_one_is_the_answer_where_there_is_one():
    assert read_letter(sample("A"), "C, not A") == "C"


def test_several_answers_are_compared_as_a_set_and_half_of_them_is_wrong():
    assert worth("xlrs-bench", 0, "AC", "C A") == 1
    assert worth("xlrs-bench", 0, "AC", "A") == 0
    assert worth("xlrs-bench", 0, "A", "A C") == 0


def test_published_scorers_keep_their_mistakes_and_say_so():
    # XLRS-Bench in lmms-eval: any letter of a verbose answer; the released evaluator the same, and crashes are right.
    assert [worth("xlrs-bench", scorer, "B", "B. Blue") for scorer in range(3)] == [1, 0, 0]
    assert [worth("xlrs-bench", scorer, "C", "The answer is C") for scorer in range(3)] == [1, 1, 0]
    assert [worth("xlrs-bench", scorer, "D", "The correct option is D") for scorer in range(3)] == [1, 0, 0]
    assert [worth("xlrs-bench", scorer, "B", None) for scorer in range(3)] == [0, 0, 1]
    # MME-RealWorld: the first capital anywhere, and nothing is in every option.
    assert [worth("mme-realworld-rs", scorer, "B", "Answer: B") for scorer in range(3)] == [1, 0, 0]
    assert [worth("mme-realworld-rs", scorer, "A", "") for scorer in range(3)] == [0, 1, 1]
    assert [worth("mme-realworld-rs", scorer, "B", "blue") for scorer in range(3)] == [1, 1, 0]
    assert [worth("mme-realworld-rs", scorer, "C", "Best option: C") for scorer in range(3)] == [1, 0, 1]
    for suite in SUITES.values():
        assert all("as published" in scorer.name for scorer in suite.scorers if scorer.failed)


def test_published_scorers_are_lmms_evals_own(monkeypatch):
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install --no-deps lmms-eval")
    tasks = importlib.util.find_spec("lmms_eval").submodule_search_locations[0] + "/tasks"
    silent = SimpleNamespace(info=print, disable=print, enable=print)
    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=silent))

    def load(path):
        spec = importlib.util.spec_from_file_location("scorer", f"{tasks}/{path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.extract_characters_regex

    xlrs, mme, rng = load("xlrs/mcq_utils.py"), load("mme_realworld/utils.py"), random.Random(0)
    ours = SUITES["xlrs-bench"].scorers[1], SUITES["mme-realworld-rs"].scorers[2]
    words = (
        "The best answer is",
        "The correct option is",
        "A",
        "(C)",
        "(d)",
        "blue",
        "e",
        ".",
        "Farm Land",
        "Answer: B",
    )
    for _ in range(2000):
        text = rng.choice([" ", ""]).join(rng.choice(words) for _ in range(rng.randrange(6)))
        assert set(ours[0].read(sample("A"), text)) == set(xlrs(text)), text
        assert ours[1].read(sample("A"), text) == mme(text), text


@pytest.mark.parametrize(
    "answer, text, ours, published",
    [("B", "B", 1, 1), ("B", "b.", 1, 0), ("B", "The car", 0, 0), ("C", "it is a farm", 1, 1), ("A", "A or B", 1, 0)],
)
def test_hr_bench_without_its_judge(answer, text, ours, published):
    assert [worth("hr-bench", scorer, answer, text) for scorer in range(2)] == [ours, published]


def test_tree_bench_measures_boxes_beside_the_letter():
    boxes = ((0, 0, 10, 10), (20, 20, 30, 30))
    text = "I see [0, 0, 10, 5] and [100, 100, 110, 110]: B"
    assert worth("tree-bench", 0, "B", text) == 1
    assert worth("tree-bench", 1, "B", text, boxes=boxes) == pytest.approx(0.25)  # 0.5 of the first, none of the second
    assert worth("tree-bench", 1, "B", "B", boxes=boxes) == 0
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)


def test_conversations_compare_words_or_letters():
    assert worth("conversations", 0, "A ship.", "a  ship") == 1
    assert worth("conversations", 0, "B", "(B) blue") == 1
    assert worth("conversations", 0, "a ship", "ship") == 0


# ---- WordNet ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    nltk = pytest.importorskip("nltk")
    folder = tmp_path_factory.mktemp("nltk_data")
    small_wordnet.write(folder)
    nltk.data.path.insert(0, str(folder))
    SUITES["lrs-vqa"].scorers[0].prepare()


@pytest.mark.parametrize(
    "answer, text, with_wordnet, exact",
    [
        ("car", "Car", 1, 1), ("car", "automobile", 1, 0), ("2", "two", 1, 0), ("2", " 2 ", 1, 1),
        ("car", "ship", 0, 0),
        ("ship", "ships", 1, 0), ("tennis court", "Tennis court", 1, 1), ("tennis court", "court", 0, 0),
        ("ship", "ship.", 0, 0), ("ship", "", 0, 0), ("ship", None, 0, 0), ("tennis court", "tennis_court", 0, 0),
    ],
)  # fmt: skip
def test_lrs_vqa_knows_synonyms_as_wordnet_does(wordnet, answer, text, with_wordnet, exact):
    assert [worth("lrs-vqa", scorer, answer, text) for scorer in range(2)] == [with_wordnet, exact]


def test_a_synset_in_common_is_a_path_similarity_over_four_fifths(wordnet):
    from nltk.corpus import wordnet as reader
    from uhr_bat.evaluation.scoring import share_a_synset

    words = ("car", "automobile", "ship", "ships", "two", "2", "area", "nothing")
    for one in words:
        for other in words:
            pairs = ((a, b) for a in reader.synsets(one) for b in reader.synsets(other))
            assert share_a_synset(one, other) == any((a.path_similarity(b) or 0) > 0.8 for a, b in pairs)
