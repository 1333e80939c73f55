"""Image files to measure with: the made-up scene as a picture, a gigapixel as tiled TIFFs. Sizes are (width, height)."""

import struct
from pathlib import Path

import numpy as np
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


def tiled_tiff(folder: Path, size, num_drawn=8, num_overviews=0) -> str:
    """An uncompressed tiled TIFF, which shows `num_drawn` x `num_drawn` tiles of the scene again and again; its path.

    The entries of its index point to the same tiles, so that the file of a gigapixel is 50 MB. Each overview is the mean
    of 2 x 2 pixels of the one before it, on a page of its own.
    """
    path = folder / f"{size[0]}x{size[1]}_{num_overviews}.tif"
    shown = -(-max(size) // TIFF_TILE)
    num_drawn = min(num_drawn, 1 << (shown - 1).bit_length())  # a power of two, as overviews halve it
    drawn = painting.example((num_drawn * TIFF_TILE, num_drawn * TIFF_TILE))
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 8))
        for level in range(num_overviews + 1):
            page_size = [-(-side // 2**level) for side in size]
            reduced = drawn.reduce(2**level)
            if reduced.width < TIFF_TILE:  # one tile shows it several times
                times = TIFF_TILE // reduced.width
                repeated = Image.new("RGB", (TIFF_TILE, TIFF_TILE))
                for place in range(times**2):
                    repeated.paste(reduced, (place % times * reduced.width, place // times * reduced.height))
                reduced = repeated
            _write_page(file, page_size, reduced, is_overview=level > 0, is_last=level == num_overviews)
    return str(path)


def compressed_tiff(folder: Path, side: int) -> str:
    """A square tiled JPEG GeoTIFF with overviews, as archives have them: the scene again and again; its path. rasterio."""
    import rasterio
    from rasterio.enums import Resampling

    path, drawn = folder / f"{side}_jpeg.tif", painting.example((min(side, DRAWN_SIDE), min(side, DRAWN_SIDE)))
    rows = np.asarray(drawn).transpose(2, 0, 1)
    repeated = np.concatenate([rows] * -(-side // rows.shape[2]), axis=2)[:, :, :side]
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"blockxsize": TIFF_TILE, "blockysize": TIFF_TILE, "compress": "jpeg", "photometric": "ycbcr"}
    profile |= {"crs": "EPSG:32650", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 4_400_000)}
    with rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=TIFF_TILE, GDAL_NUM_THREADS="ALL_CPUS"):
        with rasterio.open(path, "w", **profile) as file:
            for top in range(0, side, TIFF_TILE):
                height = min(TIFF_TILE, side - top)
                block = repeated[:, np.arange(top, top + height) % rows.shape[1]]
                file.write(block, window=rasterio.windows.Window(0, top, side, height))
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2**level for level in range(1, 12) if side >> level >= 256], Resampling.average)
    return str(path)


def _write_page(file, size, drawn, is_overview, is_last):
    """A page of a TIFF at the end of a file, and its tiles behind it."""
    num_drawn = drawn.width // TIFF_TILE
    columns, rows = (-(-side // TIFF_TILE) for side in size)
    num_tiles, num_bytes, num_entries = columns * rows, 3 * TIFF_TILE**2, 12
    start = file.tell()
    depths = start + 2 + 12 * num_entries + 4  # what does not fit its entry stands behind them
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
        (254, long, 1, int(is_overview)),
        (256, long, 1, size[0]),
        (257, long, 1, size[1]),
        (258, short, 3, depths),
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 2),  # RGB
        (277, short, 1, 3),
        (284, short, 1, 1),
        (322, long, 1, TIFF_TILE),
        (323, long, 1, TIFF_TILE),
        (324, long, num_tiles, offsets if num_tiles > 1 else places[0]),
        (325, long, num_tiles, lengths if num_tiles > 1 else num_bytes),
    ]
    file.write(struct.pack("<H", num_entries))
    for entry in entries:
        file.write(struct.pack("<HHII", *entry))
    file.write(struct.pack("<I3H", 0 if is_last else pixels + num_bytes * num_drawn**2, 8, 8, 8))
    file.write(struct.pack(f"<{2 * num_tiles}I", *places, *[num_bytes] * num_tiles))
    for top in range(0, drawn.height, TIFF_TILE):
        for left in range(0, drawn.width, TIFF_TILE):
            file.write(drawn.crop((left, top, left + TIFF_TILE, top + TIFF_TILE)).tobytes())
