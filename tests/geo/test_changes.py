"""Polygons of what changed between two dates."""

import numpy as np
import pytest
import torch
from made_up import ROTATED, compression
from uhr_bat.geo import changes_frame, write_vectors
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps

GRID = (6, 6)


def compared(values):
    result = compression((24, 24))
    finest = torch.ones(GRID)
    for (row, column), value in values.items():
        finest[row, column] = value
    positions = torch.arange(36)
    result.differences = [None, TokenMaps([finest.flatten()], [positions], [GRID], fill=0)]
    return result


def test_tokens_that_share_an_edge_are_one_region_and_the_greatest_comes_first(tmp_path):
    out = compared({(0, 0): 10.0, (0, 1): 14.0, (1, 2): 12.0, (4, 4): 40.0, (5, 5): 7.9})
    frame = changes_frame(out, (24, 24))
    assert frame["tokens"].tolist() == [1, 2, 1] and frame["rank"].tolist() == [1, 2, 3]
    assert frame["score"].tolist() == [40, 14, 12] and frame["mean"].tolist() == [40, 12, 12]
    assert [polygon.bounds for polygon in frame.geometry] == [(16, 16, 20, 20), (0, 0, 8, 4), (8, 4, 12, 8)]
    placed = changes_frame(out, (24, 24), transform=ROTATED, crs="EPSG:32654")
    assert placed.geometry.area.tolist() == pytest.approx([64, 128, 64])
    write_vectors(placed, tmp_path / "changes.geojson", {"question": "What is new?"})
    assert '"rank": 3' in (tmp_path / "changes.geojson").read_text()


def test_nothing_changed_is_a_file_without_polygons_and_one_image_has_no_changes(tmp_path):
    frame = changes_frame(compared({}), (24, 24))
    assert len(frame) == 0
    write_vectors(frame, tmp_path / "changes.geojson", {}, "pixels")
    with pytest.raises(ValueError, match="not compared as two dates"):
        changes_frame(compression((24, 24)), (24, 24))
    assert np.isfinite(changes_frame(compared({(0, 0): 9.0}), (24, 24)).geometry.area).all()
