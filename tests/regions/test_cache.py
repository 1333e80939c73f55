"""The cache of label maps."""

import shutil
from pathlib import Path

import pytest
import torch
from copies import forked
from PIL import Image
from uhr_bat.common.models import ROOT
from uhr_bat.regions import cache, segment
from uhr_bat.regions.segment import MaskSettings
from uhr_bat.scenes import painting

SCALES = [64, 128, 256, 384]
EVERY_MASK_ARGUMENTS = ["--points-per-side", "2", "--pred-iou-thresh", "-100", "--stability-score-thresh", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{name}.png" for name in "ab"]
    for seed, path in enumerate(paths):
        painting.write(path, (120, 40), seed)
    return paths


def run_cache(images, output, sam_folder, *arguments):
    arguments = [*EVERY_MASK_ARGUMENTS, "--view", "64", *arguments]
    return cache.main([*map(str, images), "--output", str(output), "--checkpoint", str(sam_folder), *arguments])


def test_the_cache_holds_the_released_layout():
    labels = {scale: torch.arange((scale // 2) ** 2).view(scale // 2, scale // 2) for scale in (8, 16)}
    layout = cache.to_tiles(labels, patches_per_side=4)
    entry = layout["scales"][16]
    assert entry["tile_coords"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert entry["tile_masks"][1].dtype == torch.int32
    assert torch.equal(entry["tile_masks"][1].long(), labels[16][:4, 4:])


def test_a_cache_is_read_as_it_was_written(images, tmp_path, sam_folder):
    assert run_cache(images[:1], tmp_path, sam_folder) == 0
    read = cache.read_labels(tmp_path / "a.pt")
    segmenter = segment.load_segmenter(sam_folder, MaskSettings(2, -100, 0))
    made = segment.segment_image(Image.open(images[0]), segmenter, SCALES, 8, 64)
    assert all(torch.equal(read[scale], made[scale]) for scale in made)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_whole_files_are_skipped_and_damaged_ones_are_written_again(images, tmp_path, sam_folder, capsys):
    assert run_cache(images, tmp_path, sam_folder) == 0
    stamp = (tmp_path / "a.pt").stat().st_mtime_ns
    whole = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(whole[: len(whole) // 2])
    assert run_cache(images, tmp_path, sam_folder) == 0
    assert "1 written, 1 were there already, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "a.pt").stat().st_mtime_ns == stamp
    assert cache.is_whole(tmp_path / "b.pt", SCALES, 8)
    assert not cache.is_whole(tmp_path / "b.pt", SCALES[:2], 8)
    assert run_cache(images, tmp_path, sam_folder, "--view", "32") == 2
    assert "a.pt holds a run with view 64, but 32 is asked for. Give another --output" in capsys.readouterr().err
    other = shutil.copytree(sam_folder, tmp_path / "sam")
    (other / "preprocessor_config.json").write_text("{}")
    assert run_cache(images, tmp_path, other) == 2 and "holds a run with checkpoint '" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_name_the_bad_image_and_do_the_others(images, tmp_path, sam_folder, capsys, monkeypatch):
    monkeypatch.setattr(cache, "get_context", forked)
    bad = tmp_path / "bad.png"
    bad.write_bytes(images[0].read_bytes()[:200])
    output = tmp_path / "masks"
    assert run_cache([images[0], bad, images[1]], output, sam_folder, "--jobs", "2") == 1
    captured = capsys.readouterr()
    assert "2 written, 0 were there already, 1 failed" in captured.out
    assert f"Error: {bad}: " in captured.err
    assert sorted(path.name for path in output.iterdir()) == ["a.pt", "b.pt"]


def test_a_cache_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"the one before")

    def stop(value, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(OSError, match="disk full"):
        cache.write_whole({}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": ["x/a.png", "y/a.tif"]}, "x/a.png would both be written to a.pt"),
        ({"checkpoint": "nowhere"}, "nowhere: there is no such SAM checkpoint"),
        ({"checkpoint": "."}, "this is no SamModel folder"),
        ({"model": "nowhere"}, "nowhere: this is no model folder"),
    ],
    ids=["names", "checkpoint", "folder", "model"],
)
def test_wrong_arguments_are_told_before_any_work(tmp_path, sam_folder, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    values = {"images": ["a.png"], "checkpoint": str(sam_folder), "model": str(ROOT), **change}
    options = ["--checkpoint", values["checkpoint"], "--model", values["model"], "--output", "masks"]
    assert cache.main([*values["images"], *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()
