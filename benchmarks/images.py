"""Image files to measure with: the made-up scene as a picture, a gigapixel as tiled TIFFs. Sizes are (width, height)."""

import struct
from pathlib import Path

from PIL import Image

from ..scenes import painting

# The scene is drawn at this side at most, and beside itself beyond it.
DRAWN_SIDE = 8500
TIFF_TILE = 512


def photograph(folder: Path, size, suffix="jpg") -> str:
    """The made-up scene as a JPEG or PNG; its path."""
    path = folder / f"{size[0]}x{size[1]}.{suffix}"
    if not path.exists():
        drawn = painting.example(tuple(min(DRAWN_SIDE, side) for side in size))
        image = Image.new("RGB", size)
        for left in range(0, size[0], drawn.width):
            for top in range(0, size[1], drawn.height):
                image.paste(drawn, (left, top))
        image.save(path, **{"jpg": {"quality": 90}, "png": {"compress_level": 1}}[suffix])
    return str(path)


def tiled_tiff(folder: Path, size, num_drawn=8) -> str:
    """An uncompressed tiled TIFF, which shows `num_drawn` x `num_drawn` tiles of the scene again and again; its path.

    The entries of its index point to the same tiles, so that the file of a gigapixel is 50 MB.
    """
    path = folder / f"{size[0]}x{size[1]}.tif"
    drawn = painting.example((num_drawn * TIFF_TILE, num_drawn * TIFF_TILE))
    columns, rows = (-(-side // TIFF_TILE) for side in size)
    num_tiles, num_bytes, num_entries = columns * rows, 3 * TIFF_TILE**2, 11
    depths = 8 + 2 + 12 * num_entries + 4  # what does not fit its entry stands behind them
    offsets = depths + 6
    lengths = offsets + 4 * num_tiles
    pixels = lengths + 4 * num_tiles
    places = [
        pixels + num_bytes * (row % num_drawn * num_drawn + column % num_drawn)
        for row in range(rows)
        for column in range(columns)
    ]
    short, long = 3, 4
    entries = [
        (256, long, 1, size[0]),
        (257, long, 1, size[1]),
        (258, short, 3, depths),
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 2),  # RGB
        (277, short, 1, 3),
        (284, short, 1, 1),
        (322, long, 1, TIFF_TILE),
        (323, long, 1, TIFF_TILE),
        (324, long, num_tiles, offsets),
        (325, long, num_tiles, lengths),
    ]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHIH", b"II", 42, 8, num_entries))
        for entry in entries:
            file.write(struct.pack("<HHII", *entry))
        file.write(struct.pack("<I3H", 0, 8, 8, 8))
        file.write(struct.pack(f"<{2 * num_tiles}I", *places, *[num_bytes] * num_tiles))
        for top in range(0, drawn.height, TIFF_TILE):
            for left in range(0, drawn.width, TIFF_TILE):
                file.write(drawn.crop((left, top, left + TIFF_TILE, top + TIFF_TILE)).tobytes())
    return str(path)


def pyramid(folder: Path, size, num_drawn=8) -> str:
    """A tiled, compressed TIFF with overviews down to one tile, which shows `num_drawn` x `num_drawn` tiles of the scene
    again and again; its path."""
    import numpy as np
    import rasterio

    path = folder / f"{size[0]}x{size[1]}_pyramid.tif"
    drawn = np.moveaxis(np.asarray(painting.example((num_drawn * TIFF_TILE, num_drawn * TIFF_TILE))), -1, 0)
    profile = {
        "driver": "GTiff",
        "width": size[0],
        "height": size[1],
        "count": 3,
        "dtype": "uint8",
        "photometric": "RGB",
    }
    profile |= {"tiled": True, "blockxsize": TIFF_TILE, "blockysize": TIFF_TILE, "interleave": "pixel"}
    profile |= {"compress": "deflate", "zlevel": 1, "transform": rasterio.transform.from_origin(0, 0, 1, 1)}
    with rasterio.open(path, "w", **profile) as file:
        rows = np.tile(drawn, -(-size[0] // drawn.shape[2]))[..., : size[0]]
        for top in range(0, size[1], drawn.shape[1]):
            bottom = min(top + drawn.shape[1], size[1])
            file.write(rows[:, : bottom - top], window=((top, bottom), (0, size[0])))
        factors = [2**level for level in range(1, 10) if max(size) > TIFF_TILE * 2 ** (level - 1)]
        file.build_overviews(factors, rasterio.enums.Resampling.average)
    return str(path)
