"""SAM regions, their cache and the partitions."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import GRIDS, prompt, random_pixels, small_model
from uhr_bat.clustering_uhr_bat import vote_regions

from uhr_bat.evaluation import partitions
from uhr_bat.regions import cache, segment
from uhr_bat.regions.segment import MaskSettings
from uhr_bat.scenes import layout, painting


SCALES = [64, 128, 256, 384]
# A random model's masks are all bad: nothing is filtered out by their quality.
EVERY_MASK = MaskSettings(points_per_side=3, pred_iou_thresh=-100, stability_score_thresh=0)
EVERY_MASK_ARGUMENTS = ["--points-per-side", "2", "--pred-iou-thresh", "-100", "--stability-score-thresh", "0"]


def encode(mask):
    """Run-length code of bool[H, W], column by column, pixel after pixel."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def rectangle(size, top, left, bottom, right):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return encode(mask)


# From masks to labels


@pytest.mark.parametrize("first", [False, True])
def test_a_run_length_code_is_decoded(first):
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    mask[0, 0] = first
    assert (segment.decode_mask(encode(mask)) == mask).all()


def test_smaller_masks_lie_on_top():
    size = (6, 8)
    masks = [rectangle(size, 1, 1, 3, 3), rectangle(size, 0, 0, 6, 4), rectangle(size, 2, 2, 5, 6)]
    labels = segment.label_map(masks, size)
    expected = np.zeros(size, int)
    expected[0:6, 0:4] = 1  # 24 pixels
    expected[2:5, 2:6] = 2  # 12
    expected[1:3, 1:3] = 3  # 4
    assert (labels.numpy() == expected).all()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"Mask 0 has \(6, 8\) pixels, the image \(6, 9\)"):
        segment.label_map([rectangle((6, 8), 0, 0, 1, 1)], (6, 9))


@pytest.mark.parametrize("view", [6, 12, 30])
def test_token_labels_are_the_majority_of_the_nearest_pixels(view):
    scale, patch = 12, 3
    labels = torch.randint(0, 5, (view, view), generator=torch.Generator().manual_seed(view), dtype=torch.int32)
    labels[labels == 3] = 0  # a label that wins nowhere
    found = segment.token_labels(labels, scale, patch)
    for row, column in np.ndindex(4, 4):
        votes = [
            int(labels[int((y + 0.5) * view / scale), int((x + 0.5) * view / scale)])
            for y in range(row * patch, row * patch + patch)
            for x in range(column * patch, column * patch + patch)
        ]
        assert found[row, column] == max(sorted(set(votes)), key=votes.count)


def test_token_labels_make_the_regions_of_the_pixel_vote():
    labels = torch.randint(0, 3, (28, 28), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    labels = labels.repeat_interleave(2, 1)
    tokens = segment.token_labels(labels, 56, 14)
    assert torch.equal(vote_regions(tokens, 1), vote_regions(labels, 14))


def test_a_segmented_image_has_labels_at_every_scale_and_none_in_the_letterbox():
    seen = []

    def segmenter(pixels):
        seen.append(pixels)
        return [rectangle(pixels.shape[:2], 0, 0, pixels.shape[0], pixels.shape[1] // 2)]

    image = Image.new("RGB", (80, 40), (10, 200, 30))
    labels = segment.segment_image(image, segmenter, [8, 16], patch_size=2, view=16)
    # The letterbox is not shown to SAM.
    assert seen[0].shape == (8, 16, 3) and (seen[0] == (10, 200, 30)).all()
    expected = torch.zeros(8, 8, dtype=torch.long)
    expected[2:6, :4] = 1
    assert torch.equal(labels[16], expected)
    assert torch.equal(labels[8], expected[::2, ::2])


@pytest.mark.parametrize("scales, view", [((64, 128, 256, 384), 384), ((672, 1344, 2688, 4032), 1344), ((2688,), 2688)])
def test_sam_is_shown_the_finest_view_that_it_can_use(scales, view):
    assert segment.default_view(scales) == view


def test_label_maps_become_the_regions_of_the_model():
    model = small_model()
    labels = {}
    for scale, (height, width) in zip(model.config.scales, GRIDS):
        labels[scale] = torch.zeros(height, width, dtype=torch.long)
        labels[scale][:, : width // 2] = 1
    features = model.encode_image(random_pixels(), region_labels=segment.region_labels(labels))
    out = model.compress(input_ids=prompt(5, "image", 7, num_tokens=1), image_features=features)
    for regions, (height, width) in zip(out.regions[0], GRIDS):
        # The segment, and every background token.
        assert int(regions.max()) == height * (width - width // 2)
        assert (regions.view(height, width)[:, : width // 2] == 0).all()


def test_boxes_are_suppressed_as_a_plain_loop_does():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, generator=generator)
    boxes = torch.cat((corner, corner + 0.05 + torch.rand(40, 2, generator=generator)), 1)
    scores = torch.rand(40, generator=generator).round(decimals=1)  # with ties
    kept = []
    for idx in sorted(range(40), key=lambda idx: -float(scores[idx])):
        overlaps = []
        for other in kept:
            low, high = torch.maximum(boxes[idx, :2], boxes[other, :2]), torch.minimum(boxes[idx, 2:], boxes[other, 2:])
            both = (high - low).clamp(min=0).prod()
            areas = [(boxes[which, 2:] - boxes[which, :2]).prod() for which in (idx, other)]
            overlaps.append(both / (sum(areas) - both))
        if all(overlap <= 0.5 for overlap in overlaps):
            kept.append(idx)
    assert 5 < len(kept) < 35
    assert segment.keep_best_boxes(boxes, scores, 0.5).tolist() == kept
    assert segment.keep_best_boxes(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


# SAM itself, small and random


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    """transformers' SAM: the real classes, with a view of 64 pixels."""
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64,
            "patch_size": 8, "output_channels": 16, "num_pos_feats": 8, "global_attn_indexes": [1], "window_size": 4,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    model = SamModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # wide enough that points and pixels matter
    model.save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def nms(boxes, scores, iou_threshold):
    return segment.keep_best_boxes(boxes, scores, iou_threshold)


@pytest.fixture
def segment_anything(monkeypatch):
    """The real package. Where torchvision does not load, the four functions that it uses of it are made here."""
    if importlib.util.find_spec("segment_anything") is None:
        pytest.skip("segment-anything is not installed")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "segment_anything")]:
            monkeypatch.delitem(sys.modules, name)
        functions = {
            "torchvision.ops.boxes": {
                "box_area": lambda boxes: (boxes[:, 2:] - boxes[:, :2]).prod(1),
                # One category, as the package calls it.
                "batched_nms": lambda boxes, scores, categories, iou_threshold: nms(boxes, scores, iou_threshold),
            },
            "torchvision.transforms.functional": {
                "to_pil_image": Image.fromarray,
                "resize": lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
            },
        }
        for name in ("torchvision", "torchvision.ops", "torchvision.transforms", *functions):
            module = types.ModuleType(name)
            module.__path__ = []
            vars(module).update(functions.get(name, {}))
            monkeypatch.setitem(sys.modules, name, module)
    import segment_anything

    yield segment_anything
    if not hasattr(sys.modules["torchvision"], "__version__"):
        for name in [name for name in sys.modules if name.split(".")[0] == "segment_anything"]:
            del sys.modules[name]


def small_sam():
    """`Sam` of segment-anything with a view of 64 pixels."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16, use_rel_pos=True,
            window_size=4, global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=16, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_chans=4
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=16, iou_head_hidden_dim=16,
            transformer=TwoWayTransformer(depth=2, embedding_dim=16, num_heads=2, mlp_dim=32),
        ),
    )  # fmt: skip
    for parameter in sam.parameters():
        parameter.data.mul_(2)
    return sam.eval()


@pytest.fixture(params=["folder", "file"])
def checkpoint(request, tmp_path, monkeypatch):
    """(checkpoint, model type) of both packages."""
    if request.param == "folder":
        return request.getfixturevalue("sam_folder"), None
    package = request.getfixturevalue("segment_anything")
    monkeypatch.setitem(package.sam_model_registry, "small", small_sam)
    torch.save(small_sam().state_dict(), tmp_path / "sam_small.pth")
    return tmp_path / "sam_small.pth", "small"


def pixels(height=40, width=64):
    return np.asarray(painting.example((width, height)))


def test_both_packages_make_masks_of_the_size_of_the_image(checkpoint):
    segmenter = segment.load_segmenter(checkpoint[0], EVERY_MASK, checkpoint[1])
    masks = segmenter(pixels())
    assert masks
    assert all(tuple(mask["size"]) == (40, 64) and sum(mask["counts"]) == 40 * 64 for mask in masks)
    labels = segment.label_map(masks, (40, 64))
    assert labels.max() > 0
    # The same image gives the same masks.
    assert torch.equal(labels, segment.label_map(segmenter(pixels()), (40, 64)))


def test_both_packages_cut_crops(checkpoint):
    settings = MaskSettings(2, -100, 0, box_nms_thresh=1, crop_n_layers=1)
    masks = segment.load_segmenter(checkpoint[0], settings, checkpoint[1])(pixels())
    fewer = segment.load_segmenter(checkpoint[0], MaskSettings(2, -100, 0, box_nms_thresh=1), checkpoint[1])(pixels())
    # Masks near the edge of a crop are left out: here that can be all of them.
    assert len(masks) >= len(fewer) > 0
    assert all(sum(mask["counts"]) == 40 * 64 for mask in masks)


def test_no_mask_is_good_enough(checkpoint):
    segmenter = segment.load_segmenter(checkpoint[0], MaskSettings(2, 100.0), checkpoint[1])
    assert segmenter(pixels()) == []
    labels = segment.segment_image(Image.fromarray(pixels()), segmenter, [16], 4)
    assert (labels[16] == 0).all()


def test_a_mask_of_transformers_is_the_models_own(sam_folder):
    """The run-length code of one point is what the model predicts there."""
    from transformers import SamImageProcessorPil, SamModel

    settings = MaskSettings(1, -100, 0, box_nms_thresh=1)
    found = segment.load_segmenter(sam_folder, settings)(pixels(64, 64))
    model, processor = SamModel.from_pretrained(sam_folder), SamImageProcessorPil.from_pretrained(sam_folder)
    inputs = processor(Image.fromarray(pixels(64, 64)), return_tensors="pt")
    with torch.no_grad():
        out = model(inputs["pixel_values"], input_points=torch.tensor([[[[32.0, 32.0]]]]))
    scores = torch.nn.functional.interpolate(out.pred_masks[0], (64, 64), mode="bilinear", align_corners=False)
    expected = {mask.numpy().tobytes() for mask in scores[0] > 0}
    assert {np.ascontiguousarray(segment.decode_mask(mask)).tobytes() for mask in found} == expected


def test_a_checkpoint_of_an_unknown_width_needs_its_type(segment_anything, tmp_path):
    torch.save(small_sam().state_dict(), tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"is 32 wide, published ones \[768, 1024, 1280\].*vit_b"):
        segment.load_segmenter(tmp_path / "sam.pth")


def test_another_file_is_no_checkpoint(segment_anything, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is no checkpoint of segment-anything"):
        segment.load_segmenter(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "reason",
    [ModuleNotFoundError("No module named 'torchvision'"), RuntimeError("operator torchvision::nms does not exist")],
)
def test_without_torchvision_the_error_says_what_to_install(tmp_path, monkeypatch, reason):
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise reason

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    (tmp_path / "sam.pth").write_bytes(b"")
    with pytest.raises(ImportError) as caught:
        segment.load_segmenter(tmp_path / "sam.pth")
    assert str(reason) in str(caught.value)
    assert "pip install torch torchvision" in str(caught.value)
    assert "SamModel" in str(caught.value)


def test_without_segment_anything_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    (tmp_path / "sam.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r'needs segment-anything.*pip install "uhr-bat\[regions\]"'):
        segment.load_segmenter(tmp_path / "sam.pth")


def test_neither_package_is_imported_unasked():
    import subprocess

    code = (
        "import sys, uhr_bat.regions.segment, uhr_bat.regions.cache; "
        "assert not {'segment_anything', 'torchvision', 'transformers.models.sam.modeling_sam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The cache


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


def test_two_processes_name_the_bad_image_and_do_the_others(images, tmp_path, sam_folder, capsys):
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
    values = {"images": ["a.png"], "checkpoint": str(sam_folder), "model": str(cache.ROOT), **change}
    options = ["--checkpoint", values["checkpoint"], "--model", values["model"], "--output", "masks"]
    assert cache.main([*values["images"], *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


# The partitions


def test_planted_ships_are_where_they_are_said_to_be():
    image, colours = Image.new("RGB", (500, 400)), list(layout.PAINTS.values())
    places = partitions.plant_ships(image, 12, seed=3)
    pixels = np.asarray(image)
    assert len(places) == 12
    for ship, (row, column) in enumerate(places):
        assert tuple(pixels[int(row), int(column)]) == colours[ship % len(colours)]
    # And nothing else is painted: a ship is at most 96 of 10,000 units long.
    rows, columns = np.nonzero(pixels.any(-1))
    distance = np.hypot(rows[:, None] - places[:, 0], columns[:, None] - places[:, 1]).min(1)
    assert distance.max() <= 48 * 500 / 10000 + 1.5


def test_too_many_ships_are_refused():
    with pytest.raises(ValueError, match="of 60 ships find a place"):
        partitions.plant_ships(Image.new("RGB", (500, 25)), 60)


def test_the_token_of_a_place_is_the_cell_of_the_letterboxed_square_around_it():
    places = np.array([[0.0, 0.0], [39.5, 99.5], [20.0, 50.0]])
    # 40 x 100 pixels in a square of 100: 30 rows of letterbox above.
    assert partitions.tokens_of_pixels(places, (40, 100), (10, 10)).tolist() == [30, 69, 55]


def test_ships_are_counted_as_kept_averaged_or_dropped():
    slots = torch.tensor([0, 1, 1, -1, 2, -1])
    assert partitions.fractions_of_ships(slots, torch.tensor([0, 4, 1, 3])) == (0.5, 0.25)
    assert partitions.fractions_of_ships(slots, torch.tensor([3, 5])) == (0.0, 0.0)


def test_the_comparison_of_partitions_writes_tables_and_a_plot(tmp_path, sam_folder, capsys):
    arguments = [
        "--output", str(tmp_path), "--size", "900", "150", "--ships", "10", "--questions", "1", "--factors", "1", "2",
        "--methods", "kmeans", "none", "--clusters", "10", "50", "--checkpoint", str(sam_folder), "--view", "64",
    ]  # fmt: skip
    assert partitions.main([*arguments, *EVERY_MASK_ARGUMENTS]) == 0
    result = json.loads((tmp_path / "partitions.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["factor"]) for row in result["methods"]] == [
        (name, factor) for name in ("kmeans", "none", "sam") for factor in (1, 2)
    ]
    assert [row["k"] for row in result["clusters"]] == [10, 50]
    assert [max(row["regions"]) for row in result["clusters"]] == [10, 50]
    for row in result["methods"]:
        spent = [min(row["factor"] * budget, seen) for budget, seen in zip((16, 24, 40, 66), result["tokens_seen"])]
        assert row["budgets"] == spent and row["tokens"] == sum(spent)
        if row["method"] == "none":
            assert row["regions"] == result["tokens_seen"] and row["merged"] == [0, 0]
    text = (tmp_path / "partitions.md").read_text(encoding="utf-8")
    assert "| sam |" in text and text in capsys.readouterr().out
    with Image.open(tmp_path / "partitions.png") as picture:
        assert picture.width == 1400
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (900, 150)


def test_the_comparison_of_partitions_refuses_two_sources_of_masks(tmp_path, capsys):
    assert partitions.main(["--output", str(tmp_path / "out"), "--masks", "a.pt", "--checkpoint", "b"]) == 2
    assert "--masks and --checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
