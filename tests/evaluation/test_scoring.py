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


# ---- What is declared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, letter",
    [
        ("answer: b", "B"), ("option b", "B"), ("I considered (A), but it is wrong. Final answer: B.", "B"),
        ("<think>A or C?</think>B", "B"), ("<think>The answer is C", ""), ("The answer is **B**.", "B"),
        ("Option B is right, option A is wrong.", "B"), ("The answer is not A, it is B", "B"), ("The answer is a farm", "C"),
        ("The answer is A because it is red", "A"), ("A is tempting.\n\nD", "D"), (r"\boxed{C}", "C"),
        ("<answer>d</answer>", "D"), ("Final answer: blue", "B"), ("(E)", ""), ("answer: E", ""),
        ("Answer: B\nExplanation: (A) shows red; (C) a farm.", "B"), ("Not (A) but (D)", "D"), ("C is correct, not A", "C"),
        ("I cannot say", ""), ("\u7b54\u6848\u662fB", "B"),
    ],
)  # fmt: skip
def test_the_letter_that_is_declared_last_is_the_answer(text, letter):
    assert read_letter(sample("A"), text) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("Among the options, A, B and C are wrong. D", "D"), ("(B) white, (A) is not visible", "B"), ("(B), not (A)", "B"),
        ("The answer is not (A)", ""), ("Not (A)", ""), ("Options A and C can be excluded, so D", "D"), ("A: no\nB: yes", "B"),
        ("The answer cannot be A; it must be D.", "D"), ("B\nBecause (A) is wrong", "B"), ("{'answer': 'D'}", "D"), ("\u9009B", "B"),
        ("B. The roof is blue rather than red (A) or green (C).", "B"), ("I choose option B over option C", "B"), ("answer b", "B"),
        ("Step 1: consider A. Step 2: consider D. Conclusion: D", "D"), ("c is correct", "C"), ("\uff08\uff22\uff09", "B"),
        ("A. red\nB. blue\nC. a farm\nD. white\nAnswer: C", "C"), ("(A) is incorrect, (B) is incorrect, so (D)", "D"),
    ],
)  # fmt: skip
def test_a_letter_that_is_said_to_be_wrong_is_not_the_answer(text, letter):
    assert read_letter(sample("A"), text) == letter


@pytest.mark.parametrize(
    "options, text, letter",
    [
        (("route C", "route D", "route A"), "route A", "C"), (("route C", "route D", "route A"), "The best route is route A", "C"),
        (("visible", "not visible"), "(B) not visible", "B"), (("visible", "not visible"), "It is not visible", "B"),
        (("A ship", "A car"), "A car is visible", "B"), (("1", "11", "2"), "There are 2 ships", "C"), (("red", "red"), "red", ""),
        (("Yes", "No"), "No, it is not", "B"),
    ],
)  # fmt: skip
def test_an_option_that_is_quoted_counts_whatever_letters_are_in_it(options, text, letter):
    assert read_letter(sample("A", options), text) == letter


@pytest.mark.parametrize(
    "text, letters",
    [
        ("A, C and D are correct; B is wrong", "ACD"), ("A is correct. C is correct. B is wrong.", "AC"), ("A\nC", "AC"),
        ("The correct options are (A) red and (C) a farm.", "AC"), ("(A), (C); not (B)", "AC"), ("A. red\nC. a farm", "AC"),
    ],
)  # fmt: skip
def test_all_letters_that_are_said_to_be_right_count_where_several_may_be(text, letters):
    assert read_letters(sample("A"), text) == letters


def test_several_letters_are_read_where_they_are_declared():
    assert read_letters(sample("A"), "I considered B. The answers are A and C.") == "AC"
    assert read_letters(sample("A"), "The answer(s) is(are): A C") == "AC"


@pytest.mark.parametrize(
    "text, letter", [("I think it is C", "C"), ("I", "I"), ("The answer is I.", "I"), ("(I)", "I")]
)
def test_i_is_a_letter_only_where_it_is_no_word(text, letter):
    nine = tuple(f"({letter}) option {number}" for number, letter in enumerate("ABCDEFGHI"))
    assert read_letter(sample("A", nine), text) == letter


def test_the_first_version_of_the_rules_reads_as_it_did():
    old = {scorer.name: scorer for suite in SUITES.values() for scorer in suite.scorers if scorer.name.endswith("-1")}
    text = "I considered (A). Final answer: B."
    assert old["mme-realworld/letter-1"].read(sample("B"), text) == "A"
    assert old["xlrs-bench/letters-1"].read(sample("B"), text) == "A"
    assert old["hr-bench/letter-1"].read(sample("B"), "answer: b") == ""


@pytest.mark.parametrize(
    "one, other",
    [
        ("Two ships", "2 ships."), ("a car", "Car"), ("12 metres", "12m"), ("5%", "five percent"), ("tennis-court", "tennis court"),
        ("20 square meters", "20 m\u00b2"), ("There are twenty-one.", "21"), ("1,200", "one thousand two hundred"), ("3.0", "three"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)  # fmt: skip
def test_a_tolerant_rule_knows_numbers_units_and_articles(one, other):
    scorer = next(scorer for scorer in SUITES["vrsbench-vqa"].scorers if scorer.name == "vrsbench-vqa/tolerant-1")
    assert scorer.score(sample(one, ()), other) == 1
    assert scorer.score(sample(one, ()), "four ships") == 0


def test_many_boxes_are_worth_no_more_than_one():
    boxes = ((0, 0, 10, 10), (20, 20, 30, 30))
    two = "[0, 0, 10, 10] [20, 20, 30, 30]"
    many = " ".join(f"[{x}, {y}, {x + 10}, {y + 10}]" for x in range(0, 160, 10) for y in range(0, 160, 10))
    assert worth("tree-bench", 1, "B", two, boxes=boxes) == 1
    assert worth("tree-bench", 1, "B", many, boxes=boxes) == pytest.approx(2 / 256)
    assert worth("tree-bench", 1, "B", "[0, 0, 10, 10] [0, 0, 10, 10]", boxes=boxes) == 0.5


def test_a_long_answer_is_read_as_soon_as_a_short_one():
    long = "the answer is " * 2000 + "(" * 5000 + " " * 5000 + "I " * 2000 + "1" * 5000
    assert read_letter(sample("A"), f"{long}. Answer: b") == "B"
    assert read_letters(sample("A"), f"<think>{long}</think>{long} option c") == "C"


def test_boxes_that_a_run_placed_count_instead_of_those_in_the_text():
    scorer, which = SUITES["tree-bench"].scorers[1], sample("B", boxes=((200, 400, 300, 500),))
    assert scorer.score(which, '{"bbox_2d": [100, 200, 150, 250]}', [[200, 400, 300, 500]]) == 1
    assert scorer.score(which, '{"bbox_2d": [100, 200, 150, 250]}') == 0
