"""Evidence of native objects: one scene through all rows, and what a summary says of records."""

import numpy as np
import pytest
from uhr_bat.common.loading import load_model
from uhr_bat.evaluation import native
from uhr_bat.scenes.layout import make_scene


def record(method, fraction, right, pixels=3.0, scene=0):
    return {
        "scene": scene, "width": 6000, "kind": "colour", "method": method, "fraction": fraction, "tokens": 10, "right": right,
        "kept": None if method == native.FULL else True, "pixels": pixels, "fixed": None if pixels is None else pixels / 16,
    }  # fmt: skip


def test_differences_are_paired_and_told_by_the_size_of_the_object():
    records = []
    for scene, (before, after, pixels) in enumerate([(False, True, 2.5), (False, True, 5.0), (True, True, None)]):
        records += [record(native.FULL, 1.0, before, pixels, scene), record(native.ZOOM, 0.04, after, pixels, scene)]
    full, zoomed = native.summarise(records)["rows"]
    assert full["all"]["accuracy"][0] == pytest.approx(1 / 3) and zoomed["all"]["accuracy"][0] == 1
    assert zoomed["with an object"]["questions"] == 2 and zoomed["with an object"]["difference"][0] == 1
    assert zoomed["pixels 2-3"]["questions"] == 1 and zoomed["fixed 0.25-0.5"]["questions"] == 1


@pytest.mark.slow
def test_one_scene_is_asked_in_every_row_from_as_many_tokens():
    processor, model = load_model(device_map=None)
    scene = make_scene(11, 1.0, width=1600)
    focus = load_model(device_map=None, region_focus={"layers": [0, 2]})
    records = native.ask_scene(model, processor, scene, (0.04,), native.ROWS, 60, np.random.default_rng(0), focus)
    methods = {one["method"] for one in records}
    assert methods == {native.FULL, native.FOCUS, *native.ROWS}
    assert {one["tokens"] for one in records if one["method"] in native.ROWS} == {146}
    assert all(17 < one["tokens"] <= 146 for one in records if one["method"] == native.FOCUS)
    result = native.summarise(records) | {
        "about": {"questions": 1, "scenes": 1, "command": "", "tiles": 60, "fractions": (0.04,)}
    }
    assert native.ZOOM in native.report(result)
