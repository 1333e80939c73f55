"""Regions from Segment Anything (appendix C.2): automatic masks -> one label map -> token labels of every scale.

Two packages make the masks behind one door, `load_segmenter`: `segment-anything` for a checkpoint file (*.pth), and
transformers' `SamModel` for a folder, which needs no torchvision. Neither is imported before it is asked for.

Letters: M masks, H and W height and width in pixels or tokens, N tokens of all scales. Sizes are (height, width), boxes
(left, top, right, bottom) as both packages have them. A mask is a run-length code {"size": (height, width), "counts":
[...]}, column by column, as both packages write it: a thousand masks of a large view do not fit as arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..common.resizing import resize_image
from ..geometry_uhr_bat import letterbox
from ..image_reading_uhr_bat import RasterImage
from ..token_clustering_uhr_bat import vote_labels

BACKGROUND = 0
# SAM sees 1024 px whatever it is given: a finer view only costs memory and time, unless it is cut into crops.
LARGEST_DEFAULT_VIEW = 1344
# Mask scores of one batch of points: 512 MB in float32.
BATCH_ELEMENTS = 2**27
# Width of the image encoder of the published checkpoints.
MODEL_TYPES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}

OTHER_DOOR = "A folder of transformers' SamModel (as facebook/sam-vit-base) needs neither package."


@dataclass(frozen=True)
class MaskSettings:
    """Settings of the automatic mask generator, with SAM's own names and defaults."""

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0


# From masks to labels


def decode_mask(mask: dict) -> np.ndarray:
    """bool[H, W] from a run-length code, which starts with a run of False."""
    height, width = mask["size"]
    values = np.arange(len(mask["counts"])) % 2 == 1
    return np.repeat(values, mask["counts"]).reshape(width, height).T


def label_map(masks: list[dict], size: tuple[int, int]) -> torch.Tensor:
    """Label of every pixel, int32[H, W]: masks are painted from the largest on, so smaller ones lie on top.

    Labels are 1..M in that order, equal areas in the order given; 0 is what no mask covers.

    Raises:
        ValueError: a mask of another size.
    """
    labels = np.full(size, BACKGROUND, np.int32)
    areas = [sum(mask["counts"][1::2]) for mask in masks]
    for label, mask_idx in enumerate(sorted(range(len(masks)), key=lambda idx: -areas[idx]), start=1):
        if tuple(masks[mask_idx]["size"]) != tuple(size):
            raise ValueError(f"Mask {mask_idx} has {tuple(masks[mask_idx]['size'])} pixels, the image {tuple(size)}.")
        labels[decode_mask(masks[mask_idx])] = label
    return torch.from_numpy(labels)


def token_labels(labels: torch.Tensor, scale: int, patch_size: int) -> torch.Tensor:
    """Label of every token of a scale, long[H, W], by the vote of eq. 15; labels stay as they are, 0 = background.

    Args:
        labels: int[V, V], label of every pixel of the letterboxed square at any size, not negative.
        scale: side of the square at this scale, in pixels. The map is brought there by the nearest pixel.
        patch_size: pixels a side of a patch.
    """
    nearest = ((torch.arange(scale) + 0.5) * (len(labels) / scale)).long()
    labels = labels[nearest][:, nearest]
    return vote_labels(labels, patch_size).long()


def region_labels(labels: dict[int, torch.Tensor]) -> torch.Tensor:
    """long[1, N], the model's input `region_labels` of one image, from {scale: long[H, W]}."""
    return torch.cat([labels[scale].flatten() for scale in sorted(labels)])[None]


def default_view(scales: list[int]) -> int:
    """The finest scale that SAM can make use of."""
    return max([scale for scale in scales if scale <= LARGEST_DEFAULT_VIEW], default=min(scales))


def segment_image(
    image: Image.Image | RasterImage, segmenter: Callable, scales: list[int], patch_size: int, view: int | None = None
) -> dict[int, torch.Tensor]:
    """Token labels {scale: long[H, W]} of an RGB image, 0 = background.

    Args:
        image: RGB, of any shape.
        segmenter: uint8[H, W, 3] -> masks, from `load_segmenter`.
        scales: sides of the letterboxed views of the model, in pixels.
        patch_size: pixels a side of a patch.
        view: side of the letterboxed square whose picture is segmented; the letterbox itself is not shown to SAM.
    """
    view = view or default_view(scales)
    side, top, left = letterbox((image.height, image.width))
    # The pixels that show any of the image, as tokens are counted.
    rows, columns = (
        slice(start * view // side, -(-(start + length) * view // side))
        for start, length in ((top, image.height), (left, image.width))
    )
    height, width = rows.stop - rows.start, columns.stop - columns.start
    pixels = np.asarray(resize_image(image, (height, width), reducing_gap=3))
    labels = torch.full((view, view), BACKGROUND, dtype=torch.int32)
    labels[rows, columns] = label_map(segmenter(pixels), pixels.shape[:2])
    return {scale: token_labels(labels, scale, patch_size) for scale in scales}


# The two packages


def points_per_batch(size: tuple[int, int]) -> int:
    """Points whose three masks each, at the size of the image, stay within `BATCH_ELEMENTS`."""
    return max(1, min(64, BATCH_ELEMENTS // (3 * max(size[0] * size[1], 1024**2))))


def keep_best_boxes(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Non-maximum suppression: long[K], best score first, of the boxes that no better one overlaps by more.

    Args:
        boxes: float[M, 4], (left, top, right, bottom).
        scores: float[M]; equal scores in the order given.
        threshold: intersection over union.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].float()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for idx in range(len(boxes)):
        if alive[idx]:
            overlap = torch.minimum(boxes[idx, 2:], boxes[:, 2:]) - torch.maximum(boxes[idx, :2], boxes[:, :2])
            overlap = overlap.clamp(min=0).prod(1)
            worse = overlap > threshold * (areas[idx] + areas - overlap)
            worse[: idx + 1] = False
            alive &= ~worse
    return order[alive]


def segment_anything_masks(sam, pixels: np.ndarray, settings: MaskSettings) -> list[dict]:
    """Masks of uint8[H, W, 3] by a `Sam` of the package segment-anything."""
    generator = import_segment_anything().SamAutomaticMaskGenerator(
        sam,
        points_per_side=settings.points_per_side,
        points_per_batch=points_per_batch(pixels.shape[:2]),
        pred_iou_thresh=settings.pred_iou_thresh,
        stability_score_thresh=settings.stability_score_thresh,
        box_nms_thresh=settings.box_nms_thresh,
        crop_nms_thresh=settings.box_nms_thresh,
        crop_n_layers=settings.crop_n_layers,
        output_mode="uncompressed_rle",
    )
    return [record["segmentation"] for record in generator.generate(pixels)]


@torch.no_grad()
def transformers_masks(model, processor, pixels: np.ndarray, settings: MaskSettings) -> list[dict]:
    """Masks of uint8[H, W, 3] by transformers' `SamModel` and `SamImageProcessorPil`.

    What `pipeline("mask-generation")` does, whose last step needs torchvision.
    """
    boxes, points, crops, point_labels = processor.generate_crop_boxes(
        Image.fromarray(pixels),
        processor.size["longest_edge"],
        crop_n_layers=settings.crop_n_layers,
        points_per_crop=settings.points_per_side,
    )
    found = []
    for crop_idx, crop in enumerate(crops):
        inputs = processor(crop, return_tensors="pt", input_data_format="channels_first")
        sizes = [tuple(inputs[name][0].tolist()) for name in ("original_sizes", "reshaped_input_sizes")]
        embeddings = model.get_image_embeddings(inputs["pixel_values"].to(model.device, model.dtype))
        kept = []
        batch = points_per_batch(sizes[0])
        for start in range(0, points.shape[1], batch):
            prompts = (slice(None), slice(start, start + batch), slice(crop_idx, crop_idx + 1))
            outputs = model(
                image_embeddings=embeddings,
                input_points=points[prompts].to(model.device, model.dtype),
                input_labels=point_labels[prompts].to(model.device),
            )
            (scores_of_pixels,) = processor.post_process_masks(
                outputs.pred_masks.float().cpu(), [sizes[0]], [sizes[1]], binarize=False
            )
            kept.append(
                processor.filter_masks(
                    scores_of_pixels,
                    outputs.iou_scores[0].float().cpu(),
                    pixels.shape[:2],
                    boxes[crop_idx],
                    settings.pred_iou_thresh,
                    settings.stability_score_thresh,
                )
            )
        masks = [mask for batch_masks, _, _ in kept for mask in batch_masks]
        scores, mask_boxes = (torch.cat([part[idx] for part in kept]) for idx in (1, 2))
        best = keep_best_boxes(mask_boxes, scores, settings.box_nms_thresh)
        size = (boxes[crop_idx, 2:] - boxes[crop_idx, :2]).prod()
        found += [(masks[idx], mask_boxes[idx], 1 / size) for idx in best.tolist()]
    if not found:
        return []
    masks, mask_boxes, scores = zip(*found)
    # Between crops, masks of smaller crops are preferred.
    best = keep_best_boxes(torch.stack(mask_boxes), torch.stack(scores), settings.box_nms_thresh)
    return [masks[idx] for idx in best.tolist()]


def import_segment_anything():
    """The package segment-anything.

    Raises:
        ImportError: it or torchvision is missing or does not load; says what to install.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a build for another torch raises RuntimeError
        raise ImportError(
            f"segment-anything needs a torchvision that was built for this torch ({torch.__version__}), but importing "
            f"it fails: {error}. Install both from one index: pip install torch torchvision. {OTHER_DOOR}"
        ) from error
    try:
        import segment_anything
    except ImportError as error:
        raise ImportError(
            f'A SAM checkpoint file needs segment-anything ({error}): pip install "uhr-bat[regions]". {OTHER_DOOR}'
        ) from error
    return segment_anything


def load_segmenter(checkpoint: str | Path, settings: MaskSettings = MaskSettings(), model_type: str | None = None):
    """A function uint8[H, W, 3] -> masks, by the checkpoint that the user names.

    Args:
        checkpoint: a file of segment-anything (sam_vit_b_01ec64.pth), read with weights only, or a folder of
            transformers' `SamModel`.
        settings: of the automatic mask generator.
        model_type: key of `segment_anything.sam_model_registry`; None takes the one of the published checkpoints
            that has the file's width.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: a package is missing; says what to install.
        ValueError: the file is no SAM checkpoint.
    """
    checkpoint = Path(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if checkpoint.is_dir():
        from transformers import SamImageProcessorPil, SamModel

        model = SamModel.from_pretrained(checkpoint, local_files_only=True).to(device).eval()
        processor = SamImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
        return lambda pixels: transformers_masks(model, processor, pixels, settings)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: there is no such SAM checkpoint file or folder.")
    registry = import_segment_anything().sam_model_registry
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or "image_encoder.pos_embed" not in weights:
        raise ValueError(f"{checkpoint} is no checkpoint of segment-anything: it has no image_encoder.pos_embed.")
    width = weights["image_encoder.pos_embed"].shape[-1]
    model_type = model_type or MODEL_TYPES.get(width)
    if model_type not in registry:
        raise ValueError(
            f"{checkpoint}: the image encoder is {width} wide, published ones {sorted(MODEL_TYPES)}. Name its type: "
            f"one of {', '.join(registry)}."
        )
    sam = registry[model_type]()
    sam.load_state_dict(weights)
    sam.to(device).eval()
    return lambda pixels: segment_anything_masks(sam, pixels, settings)
