"""What was kept of every image to answer, and the objects that the answer points to, as JSON: places in pixels, and on the ground
where that is known.

Letters: S scales, N tokens of a scale.
"""

import numpy as np

from ..common.asking import answer_objects
from ..geo import evidence_frame, object_members, on_ground, visual_tokens
from ..geometry_uhr_bat import token_box
from .front import EncodedImage, Selection


def evidence_members(selection: Selection, images: list[EncodedImage]) -> list[dict]:
    """For every image {"image_size": [height, width], "tokens": [...], "geojson": FeatureCollection or None,
    "geojson_error": why there is none of a georeferenced image, or None}.

    A token: {"scale": side of its view in pixels, "slot": its place among those of its scale in the prompt, "score":
    how much the question looks at it (eq. 2; the mean where several were merged), "boxes": [[top, left, bottom, right]]
    in pixels, one for each token of the image that went into it}. The GeoJSON is that of `uhr-bat evidence-map`: WGS 84,
    polygons in the order of the tokens. It never fails: by then the answer is there, and is worth more.
    """
    return [_of_image(selection.compressed, image_idx, image) for image_idx, image in enumerate(images)]


def _of_image(compressed, image_idx, image):
    scales, tokens = compressed.scales[image_idx], []
    for scale, (grid, positions, slots, scores, _) in zip(scales, visual_tokens(compressed, image_idx)):
        boxes = token_box(positions, image.image_size, grid).tolist()
        for slot in np.unique(slots).tolist():
            first, stop = np.searchsorted(slots, (slot, slot + 1))
            score = float(scores[first:stop].mean())
            tokens.append({"scale": scale, "slot": slot, "score": score, "boxes": boxes[first:stop]})
    collection, error = _geojson(compressed, image_idx, image, scales)
    return {"image_size": list(image.image_size), "tokens": tokens, "geojson": collection, "geojson_error": error}


def _geojson(compressed, image_idx, image, scales):
    def frame_on(transform, crs):
        return evidence_frame(compressed, image.image_size, scales, transform=transform, crs=crs, image_idx=image_idx)

    return on_ground(image.georeference, image.image_size, frame_on)


def answered_objects(model, text: str, selection: Selection, image: EncodedImage) -> dict:
    """What `object_members` says of the objects of an answer."""
    return object_members(
        answer_objects(model, text, selection.compressed, image.image_size), image.image_size, image.georeference
    )
