"""SAM regions: masks of both packages, and the labels that are made of them."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from small import GRIDS, prompt, random_pixels, small_model
from uhr_bat.regions import segment
from uhr_bat.regions.segment import MaskSettings
from uhr_bat.scenes import painting
from uhr_bat.token_clustering_uhr_bat import vote_regions

# A random model's masks are all bad: nothing is filtered out by their quality.
EVERY_MASK = MaskSettings(points_per_side=3, pred_iou_thresh=-100, stability_score_thresh=0)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_neither_package_is_imported_unasked():
    import subprocess

    code = (
        "import sys, uhr_bat.regions.segment, uhr_bat.regions.cache; "
        "assert not {'segment_anything', 'torchvision', 'transformers.models.sam.modeling_sam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
