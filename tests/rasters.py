"""Small rasters that tests make, and a server that hands them out."""

import functools
import http.server
import threading
from contextlib import contextmanager

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")


def random_bands(num_bands=3, height=45, width=70, dtype=np.uint8, seed=0):
    """dtype[C, h, w] over the whole range of an integer type."""
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, top, (num_bands, height, width), dtype=dtype)


def write_raster(path, bands, driver="GTiff", mask=None, colours=None, **profile):
    """A raster of bands [C, h, w]; its path as text."""
    num_bands, height, width = bands.shape
    if profile.pop("tiles", False):
        profile |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    size = {"width": width, "height": height, "count": num_bands, "dtype": bands.dtype}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(path, "w", driver=driver, **size, **profile) as file:
            file.write(bands)
            if mask is not None:
                file.write_mask(mask)
            if colours is not None:
                file.colorinterp = [rasterio.enums.ColorInterp[colour] for colour in colours]
    return str(path)


def rgb_of(bands):
    """uint8[h, w, 3] of the first three of uint8 bands."""
    return np.moveaxis(bands[:3], 0, -1)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A folder, in parts where `ranges` says so; `sent` counts the bytes of the answers."""

    def do_GET(self):
        try:
            with open(self.translate_path(self.path), "rb") as file:
                content = file.read()
        except OSError:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            for start in range(0, len(content), 2**12):
                self.wfile.write(content[start : start + 2**12])
                self.server.sent += len(content[start : start + 2**12])
        except OSError:  # whoever asked has seen enough
            pass

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder, ranges=True):
    """A server of a folder for a `with` block, with its `url` and the number of bytes `sent`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))
    server.ranges, server.sent, server.url = ranges, 0, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
