"""Windows that a question should be looked at in."""

import numpy as np
import pytest
import torch
from uhr_bat.common.windows import best_windows, window_importance
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps, UHRBatCompressionOutput

SIZE, GRIDS = (800, 1600), [(4, 4), (200, 200)]  # tokens of 400 and of 8 px; the square begins 400 px above the image


def kept(fine, coarse=(), regions=True):
    """What was kept of an image: {(row, column) on the finer grid: importance}, and of the coarser."""

    def maps(values, fill):
        grids = zip(values, (coarse, fine), GRIDS)
        tensors = [torch.tensor(of, dtype=torch.long if fill else torch.float32) for of, _, _ in grids]
        places = [torch.tensor([row * width + column for row, column in of], dtype=torch.long)
                  for of, (_, width) in zip((coarse, fine), GRIDS)]  # fmt: skip
        return TokenMaps(tensors, places, GRIDS, fill, flat=bool(fill))

    scores = [[dict(of)[place] for place in of] for of in (dict(coarse), fine)]
    slots = maps([list(range(len(of))) for of in scores], -1)
    return UHRBatCompressionOutput(importance=[maps(scores, 0)], slots=[slots], regions=[[]] if regions else None)


def token(y, x):
    """The finer token that shows a point (y, x) of the image."""
    return ((y + 400) // 8, x // 8)


def holds(box, y, x):
    return box[0] <= y < box[2] and box[1] <= x < box[3]


def test_the_first_window_holds_what_counts_most_and_the_next_what_is_left():
    found = best_windows(kept({token(700, 1500): 4.0, token(690, 1490): 4.0, token(100, 200): 4.0}), SIZE, 256, 5)
    assert len(found) == 2 and holds(found[0].box, 700, 1500) and holds(found[0].box, 690, 1490)
    assert holds(found[1].box, 100, 200)
    assert [round(window.share, 3) for window in found] == [0.667, 0.333]


def test_what_stands_alone_is_in_the_middle_of_its_window():
    ((top, left, bottom, right), share) = best_windows(kept({token(400, 800): 1.0}), SIZE, 256, 1)[0]
    assert bottom - top == right - left == 256 and share == pytest.approx(1)
    assert abs((top + bottom) / 2 - 404) <= 16 and abs((left + right) / 2 - 804) <= 16


@pytest.mark.parametrize("side, shape", [(64, (64, 64)), (1000, (800, 1000)), (5000, SIZE)])
@pytest.mark.parametrize("place", [(0, 0), (799, 1599), (400, 3)])
def test_windows_lie_in_the_image(side, shape, place):
    ((box, _),) = best_windows(kept({token(*place): 1.0}), SIZE, side, 9)
    assert (box[2] - box[0], box[3] - box[1]) == shape and holds((0, 0, *SIZE), *box[:2]) and holds(box, *place)


def test_tokens_larger_than_a_window_count_where_there_are_no_others():
    large = {(1, 3): 9.0}  # (0 to 400, 1200 to 1600) of the image
    ((box, _), *_) = best_windows(kept({token(600, 40): 1.0}, large), SIZE, 128, 1)
    assert holds(box, 600, 40)
    ((box, _), *_) = best_windows(kept({}, large), SIZE, 128, 1)
    assert box[1] >= 1200 and box[2] <= 400


def test_what_has_no_places_has_no_windows():
    with pytest.raises(ValueError, match="Region Focus Module"):
        best_windows(kept({token(0, 0): 1.0}, regions=False), SIZE, 64, 1)


def test_importance_of_a_window_is_that_of_the_finest_token_and_of_small_ones_the_greatest():
    result = kept({token(100, 200): 5.0, token(108, 208): 7.0}, {(1, 0): 1.0})
    fine = window_importance(result, SIZE, (96, 192, 128, 224), (4, 4))
    expected = np.full((4, 4), 1.0)
    expected[0, 1], expected[1, 2] = 5, 7
    assert np.array_equal(fine, expected)
    coarse = window_importance(result, SIZE, (0, 0, 800, 1600), (2, 4))
    assert coarse[0, 0] == 7 and np.isnan(coarse[1]).all() and np.isnan(coarse[0, 1:]).all()
