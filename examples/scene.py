"""A made-up satellite image, so that a first question needs no download: fields, a town, the sea, ships at a pier.

    python -m examples.scene [--output examples/scene.jpg] [--size 10000 8000] [--seed 0]

The same size and seed give the same pixels. Lengths are in units of 1/10000 of the width: a pixel of the default size,
about half a metre on the ground. Sizes are (width, height), points (x, y), boxes (x, y, width, height), as in Pillow.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DEFAULT_PATH = Path(__file__).with_name("scene.jpg")
DEFAULT_SIZE = (10000, 8000)
FIELDS = [(118, 134, 74), (92, 117, 62), (146, 146, 88), (164, 150, 108), (133, 113, 84), (78, 104, 58)]
ROOFS = [(158, 92, 74), (172, 110, 88), (140, 138, 134), (188, 186, 180), (120, 110, 102), (208, 205, 198)]
PAINTS = [(200, 52, 44), (236, 236, 232), (44, 84, 168), (232, 190, 56), (52, 130, 84), (228, 120, 44)]
CONCRETE, ASPHALT, YARD, TREE, SHADOW = (182, 178, 168), (110, 110, 112), (134, 132, 108), (60, 84, 48), (44, 50, 44)
SEA = [(0, (16, 46, 76)), (90, (30, 78, 104)), (122, (74, 134, 134)), (126, (196, 208, 200)), (132, (206, 190, 150))]


def fractal(rng, size, cells, octaves=5):
    """float32[height, width]: smooth noise around 0 whose widest bumps are 1/cells of the width."""
    total = 0
    for columns in (cells * 2**octave for octave in range(octaves)):
        grid = rng.standard_normal((columns * size[1] // size[0] + 2, columns + 2), np.float32)
        total = total + np.asarray(Image.fromarray(grid).resize(size, Image.BICUBIC)) * (cells / columns)
    return total


def split(rng, box, smallest):
    """Cut a box across its longer side, again and again, down to parts of about the smallest length."""
    x, y, width, height = box
    part = rng.uniform(0.35, 0.65)
    if max(width, height) < smallest * rng.uniform(1.4, 2.6):
        return [box]
    if width > height:
        halves = (x, y, width * part, height), (x + width * part, y, width * (1 - part), height)
    else:
        halves = (x, y, width, height * part), (x, y + height * part, width, height * (1 - part))
    return [leaf for half in halves for leaf in split(rng, half, smallest)]


class Painter:
    """Draws shapes given in units, in the frame that `origin` and `angle` place on the canvas."""

    def __init__(self, canvas, rng):
        self.draw, self.rng, self.unit = ImageDraw.Draw(canvas), rng, canvas.width / DEFAULT_SIZE[0]
        self.origin, self.angle = (0, 0), 0.0

    def place(self, points, shift=0):
        (x, y), sine, cosine = self.origin, math.sin(self.angle), math.cos(self.angle)
        turned = [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in points]
        return [((a + shift) * self.unit, (b + shift) * self.unit) for a, b in turned]

    def vary(self, colour, spread=12):
        """The colour, or one of a list of colours, a little lighter or darker."""
        colour = colour if isinstance(colour, tuple) else colour[self.rng.integers(len(colour))]
        return tuple(int(channel) for channel in np.clip(np.add(colour, self.rng.normal(0, spread)), 0, 255))

    def polygon(self, points, colour, height=0):
        """A flat shape, or one that throws a shadow as long as it is high."""
        for shift in range(height, -1, -1):
            self.draw.polygon(self.place(points, shift), fill=SHADOW if shift else colour)

    def box(self, box, colour, inset=0, height=0):
        x, y, dx, dy = np.add(box, np.multiply(min(inset, box[2] / 3, box[3] / 3), (1, 1, -2, -2)))
        self.polygon([(x, y), (x + dx, y), (x + dx, y + dy), (x, y + dy)], colour, height)

    def line(self, points, colour, width):
        self.draw.line(self.place(points), fill=colour, width=max(1, round(width * self.unit)), joint="curve")

    def disc(self, x, y, radius, colour, height):
        for shift, fill in (height, SHADOW), (0, colour):
            (a, b), r = self.place([(x, y)], shift)[0], radius * self.unit
            self.draw.ellipse([a - r, b - r, a + r, b + r], fill=fill)

    def fields(self, centre):
        self.origin, self.angle = centre, 0.32
        for x, y, width, height in split(self.rng, (-7500, -7500, 15000, 15000), 480):
            colour = self.vary(FIELDS)
            self.box((x, y, width, height), colour, inset=7)
            for furrow in np.arange(y + 20, y + height - 20, 22):
                self.line([(x + 12, furrow), (x + width - 12, furrow)], self.vary(colour, 4), 8)

    def town(self, centre, radius):
        self.origin, self.angle = centre, 0.12
        for x, y, width, height in split(self.rng, (-radius, -radius, 2 * radius, 2 * radius), 230):
            distance = math.hypot(x + width / 2, y + height / 2) / radius
            if distance > self.rng.uniform(0.75, 1.05):
                continue
            self.box((x - 9, y - 9, width + 18, height + 18), ASPHALT)
            self.box((x, y, width, height), self.vary(YARD), inset=9)
            storeys = 3 if distance > 0.4 else 10
            for lot in split(self.rng, (x + 12, y + 12, width - 24, height - 24), 36 + 4 * storeys):
                if self.rng.random() < 0.75:
                    self.box(lot, self.vary(ROOFS), inset=self.rng.uniform(6, 12), height=3 * storeys)
                else:
                    self.disc(lot[0] + lot[2] / 2, lot[1] + lot[3] / 2, 11, self.vary(TREE), height=5)

    def road(self, points, width):
        self.origin, self.angle = (0, 0), 0.0
        for colour, wide in ((168, 160, 138), width + 16), (ASPHALT, width), ((200, 200, 192), 2):
            self.line(points, colour, wide)

    def harbour(self, x, y):
        """A pier into the sea with ships on both sides; on the shore sheds, containers and tanks."""
        self.origin, self.angle = (x, y), 0.0
        self.box((-1300, -22, 1300, 44), CONCRETE, height=8)
        self.box((-60, -700, 520, 1400), CONCRETE)
        for row in range(4):
            self.box((290, -660 + 160 * row, 150, 130), self.vary(ROOFS), height=14)
            for column, slot in np.ndindex(3, 9):
                self.box((-20 + 90 * column, -640 + 150 * row + 14 * slot, 60, 12), self.vary(PAINTS), height=3)
                self.disc(60 + 150 * column, 160 + 150 * row, 55, (222, 222, 216), height=16)
        for berth, half in enumerate(self.rng.uniform(24, 48, 8)):
            side = half / 4
            self.origin = (x - 1100 + 110 * berth, y + (-30 - side if berth % 2 else 30 + side))
            hull = [(-half, -side), (half / 2, -side), (half, 0), (half / 2, side), (-half, side)]
            self.polygon(hull, PAINTS[berth % len(PAINTS)], height=6)
            self.box((-0.7 * half, -side / 2, half / 2, side), (238, 238, 234))  # the bridge


def render(size=DEFAULT_SIZE, seed=0):
    """The scene as an RGB image."""
    rng, bottom = np.random.default_rng(seed), DEFAULT_SIZE[0] * size[1] / size[0]
    small = (max(size[0] // 12, 8), max(size[1] // 12, 8))  # what is smooth is made at a twelfth of the size

    def enlarge(field):
        return Image.fromarray(np.float32(128 + field)).resize(size, Image.BICUBIC).convert("L")

    x, y = np.meshgrid(np.linspace(0, 1, small[0]), np.linspace(0, 1, small[1]))
    shore = 900 * (x - 0.3 - 0.16 * (y - 0.5) + 0.035 * fractal(rng, small, 3))

    canvas = Image.new("RGB", size, YARD)
    painter, town, pier = Painter(canvas, rng), (6400, 0.5 * bottom), 0.56
    painter.fields(town)
    for row, column in np.argwhere(fractal(rng, small, 6) > 0.9 + 0.05 * rng.random(small[::-1])):
        painter.origin = rng.uniform(-6, 6, 2) + (12 / painter.unit * column, 12 / painter.unit * row)
        painter.disc(0, 0, rng.uniform(8, 16), painter.vary(TREE), height=5)
    painter.town(town, 0.24 * min(bottom, DEFAULT_SIZE[0]))
    painter.road([(6200 + 2600 * math.sin(2.2 * t - 0.6), bottom * t) for t in np.linspace(-0.02, 1.02, 40)], 44)

    levels, (stops, colours) = enlarge(shore), zip(*SEA)
    bands = [levels.point(np.interp(range(256), stops, band).astype(int).tolist()) for band in zip(*colours)]
    canvas.paste(Image.merge("RGB", bands), mask=levels.point(lambda level: 255 * (level < 138)))
    coast = 10000 * np.argmax(shore[int(pier * small[1])] > 0) / small[0]
    painter.road([(coast + 300, pier * bottom), ((coast + town[0]) / 2, 0.55 * bottom), town], 30)
    painter.harbour(coast, pier * bottom)

    light = enlarge(9 * fractal(rng, small, 12, 7))
    for top in range(0, size[1], 512):  # uneven light, haze and grain; at once they would take a gigabyte
        band = (0, top, size[0], min(top + 512, size[1]))
        pixels = np.asarray(canvas.crop(band)) * (np.asarray(light.crop(band), np.float32) / 150)[..., None]
        pixels += 18 + 2.5 * rng.standard_normal(pixels.shape[:2], np.float32)[..., None]
        canvas.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), band)
    return canvas


def write(path=DEFAULT_PATH, size=DEFAULT_SIZE, seed=0):
    """Write the scene whole or not at all; the format is that of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        render(size, seed).save(Path(folder, path.name), quality=82)
        os.replace(Path(folder, path.name), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--size", type=int, nargs=2, default=DEFAULT_SIZE, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output, tuple(args.size), args.seed)
    print(f"{args.output}: {args.size[0]:,} x {args.size[1]:,} px, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
