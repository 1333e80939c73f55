"""What was kept of every image to answer, as JSON: a token's place in pixels, and on the ground where that is known.

Letters: S scales, N tokens of a scale.
"""

import json

import numpy as np

from ..geo import evidence_frame, geojson_bytes
from ..geometry_uhr_bat import token_box
from .front import EncodedImage, Selection


def evidence_of(selection: Selection, images: list[EncodedImage], scales: list[int]) -> list[dict]:
    """For every image {"image_size": [height, width], "tokens": [...], "geojson": FeatureCollection or None}.

    A token: {"scale": side of its view in pixels, "slot": its place among those of its scale in the prompt, "score":
    how much the question looks at it (eq. 2; the mean where several were merged), "boxes": [[top, left, bottom, right]]
    in pixels, one for each token of the image that went into it}. The GeoJSON is that of `uhr-bat evidence-map`: WGS 84,
    polygons in the order of the tokens.

    Raises:
        ImportError: the image is georeferenced, and what writes polygons is missing; says what to install.
    """
    return [_of_image(selection.compressed, image_idx, image, scales) for image_idx, image in enumerate(images)]


def _of_image(compressed, image_idx, image, scales):
    tokens = []
    for scale, slots, importance in zip(scales, compressed.slots[image_idx], compressed.importance[image_idx]):
        slots, scores = slots.numpy(), importance.double().numpy().ravel()
        positions = np.flatnonzero(slots >= 0)
        positions = positions[np.argsort(slots[positions], kind="stable")]
        boxes = token_box(positions, image.image_size, tuple(importance.shape)).tolist()
        for slot in range(slots.max() + 1):
            mine = np.flatnonzero(slots[positions] == slot)
            tokens.append(
                {
                    "scale": scale,
                    "slot": slot,
                    "score": float(scores[positions[mine]].mean()),
                    "boxes": [boxes[idx] for idx in mine],
                }
            )
    return {
        "image_size": list(image.image_size),
        "tokens": tokens,
        "geojson": _geojson(compressed, image_idx, image, scales),
    }


def _geojson(compressed, image_idx, image, scales):
    place = image.georeference
    if place.crs is None:
        return None
    frame = evidence_frame(
        compressed, image.image_size, scales, transform=place.transform, crs=place.crs, image_idx=image_idx
    )
    return json.loads(geojson_bytes(frame, {}))
