"""Objects in the words of a model: the forms that the makers' own examples show, in pixels of the whole image."""

import math

import pytest
from uhr_bat.common.objects import ImageObject, Objects, Picture, Pointed, objects_of_tokens, read_objects

SQUARE = Picture((2000, 2000), side=1000)  # a unit of a thousandth is 2 px of it


def boxes(text, model_type="qwen3_vl", picture=SQUARE):
    found = read_objects(text, model_type, picture)
    assert not found.refused, found.refused
    return [(one.label, *map(round, one.edges)) for one in found]


SHIP = [("ship", 200, 400, 600, 800)]


@pytest.mark.parametrize("model_type, text", [
    ("qwen3_vl", '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "ship"}\n]\n```'),
    ("qwen3_5", '{"bbox_2d": [100, 200, 300, 400], "label": "ship"} is the only one that I see.'),
    ("qwen2_5_vl", '```json\n[{"bbox_2d": [100, 200, 300, 400], "label": "ship"}]\n```'),  # pixels of 1000
    ("gemma3", 'Here it is:\n```json\n[{"box_2d": [200, 100, 400, 300], "label": "ship"}]\n```\nAnything else?'),
    ("gemma4", '[{"box_2d": [200, 100, 400, 300], "label": "ship"},]'),
    ("llava", '{"objects": [{"label": "ship", "box_2d": [200, 100, 400, 300]}]}'),
    ("internvl", "<ref>ship</ref><box>[[100, 200, 300, 400]]</box>"),
    ("internvl", "<ref>ship</ref>[[100, 200, 300, 400]]"),
    ("qwen3_vl", '<think>[{"bbox_2d": [1, 2, 3, 4]}]</think>{"bbox_2d": [100, 200, 300, 400], "label": "ship"}'),
])  # fmt: skip
def test_a_box_is_read_in_every_familys_form_and_unit(model_type, text):
    assert boxes(text, model_type) == SHIP


def test_locations_are_bins_of_1024_y_before_x_and_several_share_a_line():
    text = "<loc0256><loc0128><loc0512><loc0384> ship ; <loc0000><loc0000><loc0512><loc1023> pier"
    found = boxes(text, "paligemma", Picture((1024, 1024)))
    assert found == [("ship", 128, 256, 384, 512), ("pier", 0, 0, 1023, 512)]
    assert boxes("<loc0001><loc0002><loc0003><loc0004>", "paligemma", Picture((1024, 1024))) == [("", 2, 1, 4, 3)]


@pytest.mark.parametrize("model_type, text", [
    ("molmo", ' <point x="10.0" y="20" alt="ship">ship</point>'),
    ("molmo", '<points x1="10.0" y1="20.0" x2="30.5" y2="40.0" alt="ship">ship</points>'),
    ("qwen3_vl", '<points x1="100" y1="200" alt="a ship">ship</points>'),
    ("qwen2_5_vl", '{"point_2d": [100, 200], "label": "ship"}'),
    ("qwen3_vl", '```json\n[{"point_2d": [100, 200], "label": "ship"}]\n```'),
])  # fmt: skip
def test_a_point_is_read_in_every_form_and_unit(model_type, text):
    found = read_objects(text, model_type, SQUARE)
    assert found[0].label == "ship" and found[0].box is None and found[0].point == (200, 400) and not found.refused
    assert [one.point for one in found[1:]] == [(610, 800)] * text.count("x2=")


def test_several_objects_keep_their_order_and_scores():
    text = '[{"bbox_2d": [[0, 0, 5, 5], [5, 5, 10, 10]], "label": "car"}, {"bbox_2d": [1, 1, 2, 2], "score": 0.5}]'
    found = read_objects(text, "qwen3_vl", SQUARE)
    assert [one.label for one in found] == ["car", "car", ""] and [one.score for one in found] == [None, None, 0.5]


@pytest.mark.parametrize("text, why", [
    ('{"bbox_2d": [300, 200, 100, 400], "label": "ship"}', "x ends at 100 and begins at 300"),
    ('{"box_2d": [400, 100, 200, 300]}', "y ends at 200 and begins at 400"),
    ('{"bbox_2d": [100, 200, 100, 400]}', "x ends at 100 and begins at 100"),
    ('{"bbox_2d": [0, 0, 1001, 4]}', "1001 is not from 0 to 1000"),
    ('{"bbox_2d": [-1, 0, 1, 4]}', "-1 is not from 0 to 1000"),
    ('{"bbox_2d": [NaN, 0, 1, 4]}', "nan is not from 0 to 1000"),
    ('{"bbox_2d": [0, 0, Infinity, 4]}', "inf is not"),
    ('{"bbox_2d": [0, 0, 4]}', "4 numbers make a box, and these are 3"),
    ('{"bbox_2d": "here"}', "no numbers"),
    ('{"bbox_2d": [true, 0, 1, 4]}', "no numbers"),
    ('{"bbox_2d": null}', "there are no numbers"),
    ('{"point_2d": [1, 2, 3]}', "2 numbers make a point, and these are 3"),
    ('[{"bbox_2d": [100, 200, 3', "no JSON, or it was cut off"),
    ("{'bbox_2d': [1, 2, 3, 4]}", "no JSON, or it was cut off"),
    ("<loc0001><loc0002><loc0003> ship", "4 numbers make a box, and these are 3"),
    ("<loc0001><loc0002><loc1024><loc0004> ship", "1024 is not from 0 to 1023"),
    ('<point x="12"/>', "2 numbers make a point, and these are 1"),
    ('<points coords="1 1 12 34">ship</points>', "2 numbers make a point, and these are 0"),
    ("<box>somewhere</box>", "no numbers"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_text(text, why):
    found = read_objects(f'Well: {text} and {{"bbox_2d": [1, 2, 3, 4]}}', "qwen3_vl", SQUARE)
    (refused,) = found.refused
    assert why in refused.why and refused.text and refused.text in f"{text} and" + found.text
    assert [one.edges for one in found] == [(2, 4, 6, 8)]
    alone = read_objects(text, "qwen3_vl", SQUARE)
    assert not alone and why in alone.note


def test_a_box_is_found_however_deep_it_lies_in_json():
    text = '{"a": [[{"b": [{"c": [[], [{"bbox_2d": [100, 200, 300, 400], "label": "ship"}]]}]}]]}'
    assert boxes(text) == boxes('{"a":' * 300 + text[6:-1] + "}" * 300) == SHIP


def test_a_label_is_one_line_of_letters_that_every_file_keeps():
    text = r'{"bbox_2d": [100, 200, 300, 400], "label": " a\n\t big \ud83d\u0000ship "} {"bbox_2d": [9, 9, 1, 1], "label": "\ud83d"}'
    found = read_objects(
        text + " " * 99 + r'{"box_2d": ["\ud83d"], "label": "\ud83d", "a": "' + "b" * 300 + '"}', "qwen3_vl", SQUARE
    )
    assert [one.label for one in found] == ["a big \ufffd\ufffdship"]
    assert len(found.refused) == 2 and str(found.record()).encode()


@pytest.mark.parametrize("text", [
    "<points " + " ".join(f'x{idx}="1001" y{idx}="1"' for idx in range(300)) + ">ship</points>",
    "<loc1024>" * 400 + " ship",
    f"<box>[{', '.join(['[1, 1, 1001, 2]'] * 300)}]</box>",
    f'{{"bbox_2d": [{", ".join(["[1, 1, 1001, 2]"] * 300)}], "label": "{"ship" * 300}"}}',
])  # fmt: skip
def test_what_is_refused_of_a_long_list_is_told_in_short(text):
    found = read_objects(text, "internvl", SQUARE)
    assert not found and len(found.refused) >= 100 and max(len(one.text) for one in found.refused) < 700


def test_of_an_endless_answer_the_beginning_is_read_and_the_rest_is_refused():
    box = '{"bbox_2d": [1, 2, 3, 4]} '
    found = read_objects(box + "{" * 2**20 + box, "qwen3_vl", SQUARE)
    assert len(found) == 1 and "up to 1,048,576 letters, and this has 1,048,627" in found.refused[0].why


def test_a_family_whose_unit_nobody_knows_is_refused():
    (refused,) = read_objects('{"bbox_2d": [1, 2, 3, 4]}', "llava", SQUARE).refused
    assert refused.why == "what numbers count is not known of a model of the type 'llava'"
    (refused,) = read_objects('{"bbox_2d": [1, 2, 3, 4]}', "qwen2_5_vl", Picture((9, 9))).refused
    assert "its pixels are of one picture" in refused.why


@pytest.mark.parametrize("text", ["There are three ships.", "[]", "", "I see none [1, 2, 3, 4]."])
def test_an_answer_without_an_object_says_so_with_its_text(text):
    found = read_objects(text, "internvl", SQUARE)
    assert list(found) == [] and found.note == f"The answer holds no box and no point: {text!r}."


def test_the_letterbox_is_taken_away_and_what_lies_in_it_alone_is_refused():
    wide = Picture((500, 1000))  # 250 px above and below
    text = '{"bbox_2d": [0, 250, 1000, 750]} {"bbox_2d": [100, 200, 200, 500]} {"bbox_2d": [0, 0, 9, 249]} {"point_2d": [5, 5]}'
    found = read_objects(text, "qwen3_vl", wide)
    assert [one.edges for one in found] == [(0, 0, 1000, 500), (100, 0, 200, 250)]
    assert [one.why for one in found.refused] == ["it lies beside the image, in the letterbox"] * 2


def test_a_part_of_the_image_lies_where_it_was_cut():
    part = Picture((5000, 9000), (8000, 1000, 8400, 1200))  # 400 x 200 px, 100 px above and below
    found = read_objects('{"bbox_2d": [500, 250, 1000, 750]}', "qwen3_vl", part)
    assert found[0].box == (8200, 1000, 8400, 1200)


def test_a_visual_token_is_an_object_with_its_own_box_at_any_level():
    grids = [(2, 2), (1000, 1000)]
    found = objects_of_tokens([Pointed("ship", 1, 1000 * 999, 0.9), Pointed("pier", 0, 3)], (16000, 16000), grids, "2")
    assert found[0] == ImageObject("ship", (0, 15984, 16, 16000), None, 0.9, 1, "token")
    assert found[1].box == (8000, 8000, 16000, 16000) and found.text == "2"


def test_objects_are_the_same_as_json():
    found = read_objects('{"bbox_2d": [1, 2, 3, 4]} {"point_2d": [1, 2]} {"bbox_2d": []}', "qwen3_vl", SQUARE)
    again = Objects.of_record(found.record(), found.text)
    assert list(again) == list(found) and again.refused == found.refused and not math.isnan(again[0].box[0])


def test_a_message_names_the_first_of_many_that_were_refused():
    found = read_objects('{"bbox_2d": [9, 9, 1, 1]} ' * 25, "qwen3_vl", SQUARE)
    assert len(found.refused) == 25 and found.note.count("x ends at 1") == 10 and "and 15 more" in found.note
