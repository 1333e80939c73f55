"""The question command."""

import pytest
from uhr_bat import cli
from uhr_bat.examples import ask
from uhr_bat.examples.ask import QUESTION, WEIGHTS_NOTE
from uhr_bat.scenes import layout, painting

SIZE = (600, 480)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    painting.write(path, SIZE)
    return path


@pytest.mark.slow
def test_ask_answers_and_accounts_for_tokens_and_seconds(image_path, monkeypatch, capsys):
    monkeypatch.chdir(image_path.parent)
    question = ["How many ships?", "--budgets", "8,16,24,32", "--max-new-tokens", "3"]
    assert cli.main(["ask", image_path.name, *question]) == 0
    printed = capsys.readouterr().out
    assert "600 x 480 px" in printed and WEIGHTS_NOTE in printed
    assert "Question: How many ships?" in printed and "Answer:" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip()]
    # 480 of 600 rows are 51 of 64 px, centred: they touch all 8 rows of patches; at 128 px 14 of 16.
    assert ["64", "px", "8", "x", "8", "64", "8", "8"] in rows
    assert ["128", "px", "16", "x", "16", "224", "16", "16"] in rows
    assert rows[rows.index(["stage", "seconds"]) - 1][-2:] == ["80", "80"]
    stages = [row[0] for row in rows[rows.index(["stage", "seconds"]) + 1 :]]
    assert stages == ["open", "preprocess", "load", "encode", "compress", "generate", "all"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "missing.jpg: there is no such image file."),
        ([__file__], "test_ask.py: not an image"),
        (["--before", "IMAGE"], "--before is earlier than an image, of which there is none"),
        (["IMAGE", "How many?", "--budgets", "1,2"], "2 budgets [1, 2] and 4 scales"),
        (["IMAGE", "How many?", "--budgets", "all"], "invalid budgets value: 'all'"),
        (["IMAGE", "How many?", "--model", "nowhere"], "nowhere: this is no model folder"),
    ],
    ids=["missing", "not an image", "earlier than nothing", "budgets", "numbers", "model"],
)
def test_ask_says_what_is_wrong(image_path, capsys, arguments, message):
    arguments = [str(image_path) if argument == "IMAGE" else argument for argument in arguments]
    try:
        code = ask.main(arguments)
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_scene_is_made_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(painting, "write", lambda: painting.example((60, 48)).save(painting.DEFAULT_PATH))
    asked = []
    monkeypatch.setattr(ask, "ask", lambda args: asked.append((args.image, args.question)))
    assert ask.main([]) == 0
    assert asked == [(str(painting.DEFAULT_PATH), QUESTION)]
    assert (tmp_path / painting.DEFAULT_PATH).exists()


def test_the_default_question_has_an_answer_in_the_default_scene():
    scene = layout.make_scene(0, painting.DEFAULT_SIZE[0] / painting.DEFAULT_SIZE[1])
    runway = [site.kind for site in scene.sites].index("runway")
    planes = [thing.colour for thing in scene.objects_of[runway] if thing.kind == "plane"]
    assert QUESTION == "What colour is the plane at the runway?" and planes == ["white"]
