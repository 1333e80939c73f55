"""A made-up scene as an image: sea, coast, fields, roads, towns, its sites and its objects.

    uhr-bat scene [--seed 0] [--size 10000 8000] [--output made_up_scene.jpg]

Units, points and boxes are those of `layout`. The same scene and size give the same pixels.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..common.commands import tells_errors
from ..common.files import whole_files
from ..common.outputs import Output, check_outputs
from .layout import FINEST, PAD_SIDE, PAINTS, SITE_SIDE, WIDTH, Scene, make_scene

DEFAULT_PATH = Path("made_up_scene.jpg")  # in the working folder
DEFAULT_SIZE = (10000, 8000)
# Three pixels for one of the finest scale: the tiles come out of a resize, as those of real images do.
RENDER_WIDTH = 1152

CELL = 72  # units: side of a tree, and of a cell of the smooth noise
FIELDS = [(118, 134, 74), (92, 117, 62), (146, 146, 88), (164, 150, 108), (133, 113, 84), (78, 104, 58)]
ROOFS = [(158, 92, 74), (172, 110, 88), (140, 138, 134), (188, 186, 180), (120, 110, 102), (208, 205, 198)]
CONCRETE, ASPHALT, YARD, TREE, SHADOW = (182, 178, 168), (110, 110, 112), (134, 132, 108), (60, 84, 48), (44, 50, 44)
GRAIN = 2.5  # standard deviation, of 255
PAD = (224, 150, 110)  # of no site, and of no object
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
    """Draws shapes given in units, in the frame that `origin` and `angle` place on the canvas.

    Args:
        draw: Pillow's `ImageDraw`, or what has its polygon, line and ellipse.
        rng: numpy.random.Generator.
        unit: pixels of the canvas.
    """

    def __init__(self, draw, rng, unit):
        self.draw, self.rng, self.unit = draw, rng, unit
        self.origin, self.angle = (0, 0), 0.0
        self.shadow_step = max(1, round(1 / unit))  # a pixel

    def place(self, points, shift=0):
        (x, y), sine, cosine = self.origin, math.sin(self.angle), math.cos(self.angle)
        turned = [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in points]
        return [((a + shift) * self.unit, (b + shift) * self.unit) for a, b in turned]

    def vary(self, colour, spread=12):
        """The colour, or one of a list of colours, a little lighter or darker."""
        colour = colour if isinstance(colour, tuple) else colour[self.rng.integers(len(colour))]
        change = self.rng.normal(0, spread)
        return tuple(min(max(int(channel + change), 0), 255) for channel in colour)

    def polygon(self, points, colour, height=0):
        """A flat shape, or one that throws a shadow as long as it is high."""
        for shift in range(height // self.shadow_step * self.shadow_step, -1, -self.shadow_step):
            self.draw.polygon(self.place(points, shift), fill=SHADOW if shift else colour)

    def box(self, box, colour, inset=0, height=0):
        x, y, width, depth = box
        inset = min(inset, width / 3, depth / 3)
        x, y, width, depth = x + inset, y + inset, width - 2 * inset, depth - 2 * inset
        self.polygon([(x, y), (x + width, y), (x + width, y + depth), (x, y + depth)], colour, height)

    def line(self, points, colour, width):
        self.draw.line(self.place(points), fill=colour, width=max(1, round(width * self.unit)), joint="curve")

    def oval(self, x, y, a, b, colour):
        turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        self.polygon([(x + a * math.cos(turn), y + b * math.sin(turn)) for turn in turns], colour)

    def disc(self, x, y, radius, colour, height=0):
        for shift, fill in (height, SHADOW), (0, colour):
            (a, b), r = self.place([(x, y)], shift)[0], radius * self.unit
            self.draw.ellipse([a - r, b - r, a + r, b + r], fill=fill)

    def fields(self, height):
        self.origin, self.angle = (WIDTH / 2, height / 2), self.rng.uniform(0, math.pi)
        for x, y, width, depth in split(self.rng, (-7500, -7500, 15000, 15000), 620):
            colour = self.vary(FIELDS)
            self.box((x, y, width, depth), colour, inset=8)
            for furrow in np.arange(y + 24, y + depth - 24, 52):
                self.line([(x + 12, furrow), (x + width - 12, furrow)], self.vary(colour, 5), 20)

    def town(self, centre, radius):
        self.origin, self.angle = centre, self.rng.uniform(0, math.pi)
        for x, y, width, depth in split(self.rng, (-radius, -radius, 2 * radius, 2 * radius), 230):
            distance = math.hypot(x + width / 2, y + depth / 2) / radius
            if distance > self.rng.uniform(0.75, 1.05):
                continue
            self.box((x - 9, y - 9, width + 18, depth + 18), ASPHALT)
            self.box((x, y, width, depth), self.vary(YARD), inset=9)
            storeys = 3 if distance > 0.4 else 8
            for lot in split(self.rng, (x + 12, y + 12, width - 24, depth - 24), 44 + 4 * storeys):
                if self.rng.random() < 0.75:
                    self.box(lot, self.vary(ROOFS), inset=self.rng.uniform(6, 12), height=3 * storeys)
                else:
                    self.disc(lot[0] + lot[2] / 2, lot[1] + lot[3] / 2, 13, self.vary(TREE), height=5)

    def road(self, points, width):
        self.origin, self.angle = (0, 0), 0.0
        for colour, wide in ((168, 160, 138), width + 16), (ASPHALT, width), ((200, 200, 192), 3):
            self.line(points, colour, wide)

    def site(self, site):
        self.origin, self.angle = site.centre, site.angle
        half = SITE_SIDE / 2
        {
            "pier": self._pier, "runway": self._runway, "bridge": self._bridge, "tank farm": self._tank_farm,
            "stadium": self._stadium, "quarry": self._quarry, "roundabout": self._roundabout,
            "golf course": self._golf_course,
        }[site.kind]((-half, -half, SITE_SIDE, SITE_SIDE))  # fmt: skip

    def _pier(self, square):
        self.box(square, (28, 92, 120))
        self.box((-700, -700, 1400, 150), CONCRETE)
        for finger in (-420, -60, 300):
            self.box((finger, -700, 110, 1150), CONCRETE, height=10)

    def _runway(self, square):
        self.box(square, (156, 178, 112))
        self.box((-700, -170, 1400, 340), (84, 84, 88))
        for dash in range(-560, 560, 160):
            self.box((dash, -14, 90, 28), (236, 236, 232))
        for bar in range(-130, 131, 52):
            self.box((-680, bar - 12, 90, 24), (236, 236, 232))

    def _bridge(self, square):
        self.box(square, (72, 112, 66))
        self.box((-300, -700, 600, 1400), (92, 140, 158))
        self.box((-700, -90, 1400, 180), (204, 200, 190), height=30)
        self.box((-700, -12, 1400, 24), (120, 120, 122))

    def _tank_farm(self, square):
        self.box(square, (198, 182, 140))
        for edge in (-700, -233, 233, 660):
            self.box((edge, -700, 40, 1400), (136, 112, 80))
            self.box((-700, edge, 1400, 40), (136, 112, 80))

    def _stadium(self, square):
        self.box(square, (146, 146, 150))
        self.oval(0, 0, 680, 560, (214, 212, 208))
        self.oval(0, 0, 560, 430, (170, 92, 70))
        self.oval(0, 0, 460, 330, (66, 158, 70))
        self.box((-6, -320, 12, 640), (232, 236, 230))

    def _quarry(self, square):
        self.box(square, (222, 190, 138))
        for radius, colour in (640, (200, 162, 110)), (480, (176, 136, 90)), (300, (146, 108, 70)), (120, (96, 72, 50)):
            self.disc(0, 0, radius, colour)

    def _roundabout(self, square):
        self.box(square, (176, 172, 92))
        for arm in (-700, -130, 1400, 260), (-130, -700, 260, 1400):
            self.box(arm, (92, 92, 96))
        self.disc(0, 0, 470, (92, 92, 96))
        self.disc(0, 0, 240, (70, 118, 60))

    def _golf_course(self, square):
        self.box(square, (104, 182, 88))
        for x, y, a, b in (-300, -300, 300, 200), (250, 150, 330, 220), (-300, 420, 260, 170):
            self.oval(x, y, a, b, (146, 212, 118))
        for x, y, radius in (-80, -520, 90), (480, -200, 100), (-520, 60, 80), (60, 520, 90), (500, 520, 80):
            self.disc(x, y, radius, (238, 222, 172))

    def pad(self, pad):
        self.origin, self.angle = pad.centre, pad.angle
        self.box((-PAD_SIDE / 2, -PAD_SIDE / 2, PAD_SIDE, PAD_SIDE), self.vary(PAD))

    def object(self, thing):
        """A shape with an area of about size squared, of one colour but for a small dark part."""
        self.origin, self.angle, s = thing.centre, thing.angle, thing.size
        colour, dark = self.vary(PAINTS[thing.colour], 6), (70, 72, 78)
        if thing.kind == "ship":
            self.polygon([(-0.95 * s, -0.3 * s), (0.4 * s, -0.3 * s), (0.95 * s, 0), (0.4 * s, 0.3 * s),
                          (-0.95 * s, 0.3 * s)], colour)  # fmt: skip
            self.box((-0.8 * s, -0.16 * s, 0.28 * s, 0.32 * s), dark)
        elif thing.kind == "car":
            self.box((-0.66 * s, -0.4 * s, 1.32 * s, 0.8 * s), colour)
            self.box((0.1 * s, -0.32 * s, 0.22 * s, 0.64 * s), dark)
        elif thing.kind == "plane":
            self.box((-0.95 * s, -0.16 * s, 1.9 * s, 0.32 * s), colour)
            self.polygon([(0.35 * s, 0), (-0.15 * s, -s), (-0.45 * s, -s), (-0.1 * s, 0), (-0.45 * s, s),
                          (-0.15 * s, s)], colour)  # fmt: skip
            self.box((-0.95 * s, -0.4 * s, 0.24 * s, 0.8 * s), colour)
        else:
            self.disc(0, 0, 0.57 * s, colour)
            self.disc(0, 0, 0.17 * s, dark)


def soft_size(scene) -> tuple[int, int]:
    """(width, height) of what is smooth: it is made small, at any size."""
    return WIDTH // CELL, max(round(scene.height) // CELL, 1)


def draw_land(painter, scene) -> np.ndarray:
    """Fields, trees, towns and roads; float[h, w] of `soft_size`: where the sea lies, below a level that SEA has."""
    rng, soft = painter.rng, soft_size(scene)
    painter.fields(scene.height)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, soft[0]), np.linspace(-0.5, 0.5, soft[1]))
    turn, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.6)
    shore = 900 * (x * math.cos(turn) + y * math.sin(turn) + distance + 0.035 * fractal(rng, soft, 3))
    for row, column in np.argwhere(fractal(rng, soft, 6) > 0.9 + 0.05 * rng.random(soft[::-1])):
        painter.origin = rng.uniform(0, CELL, 2) + (CELL * column, CELL * row)
        painter.disc(0, 0, rng.uniform(18, 34), painter.vary(TREE), height=5)
    edge = min(1000, scene.height / 2)
    for _ in range(rng.integers(3)):
        painter.town(rng.uniform((1000, edge), (9000, scene.height - edge)), rng.uniform(800, 1600))
    for _ in range(rng.integers(1, 4)):
        ends = rng.uniform((0, -0.1), (WIDTH, 1.1 * scene.height), (4, 2))
        ends[[0, 3], rng.integers(2)] = -400, 1.1 * WIDTH
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 3 * ends[0] + 3 * t * (1 - t) ** 2 * ends[1] + 3 * t**2 * (1 - t) * ends[2] + t**3 * ends[3]
        painter.road([tuple(point) for point in curve], 44)
    return shore


def flood(canvas, levels):
    """The sea and its shore over the land, from the grey levels of `draw_land`."""
    stops, colours = zip(*SEA)
    bands = [levels.point(np.interp(range(256), stops, band).astype(int).tolist()) for band in zip(*colours)]
    canvas.paste(Image.merge("RGB", bands), mask=levels.point(lambda level: 255 * (level < 138)))


def draw_light(rng, scene) -> np.ndarray:
    """float[h, w] of `soft_size`: uneven light."""
    return 9 * fractal(rng, soft_size(scene), 12, 5)


def in_light(pixels, light, grain) -> np.ndarray:
    """uint8[h, w, 3] of pixels under uneven light [h, w], in haze, with grain float[h, w]."""
    lit = pixels * (np.asarray(light, np.float32) / 145)[..., None]
    lit += 12 + GRAIN * grain[..., None]
    return lit.clip(0, 255).astype(np.uint8)


def render(scene: Scene, size=DEFAULT_SIZE) -> Image.Image:
    """The scene as an RGB image; the same scene and size give the same pixels."""
    rng = np.random.default_rng([scene.seed, 1])

    def enlarge(field):
        return Image.fromarray(np.float32(128 + field)).resize(size, Image.BICUBIC).convert("L")

    canvas = Image.new("RGB", size, YARD)
    painter = Painter(ImageDraw.Draw(canvas), rng, canvas.width / WIDTH)
    flood(canvas, enlarge(draw_land(painter, scene)))
    for site in scene.sites:
        painter.site(site)
    for thing in scene.objects:
        painter.object(thing)

    light = enlarge(draw_light(rng, scene))
    for top in range(0, size[1], 512):  # uneven light, haze and grain; at once they would take a gigabyte
        band = (0, top, size[0], min(top + 512, size[1]))
        pixels = np.asarray(canvas.crop(band))
        pixels = in_light(pixels, light.crop(band), rng.standard_normal(pixels.shape[:2], np.float32))
        canvas.paste(Image.fromarray(pixels), band)
    return canvas


def paint(scene: Scene) -> Image.Image:
    """The image of a scene at the size that training and evaluation use."""
    return render(scene, (RENDER_WIDTH, round(RENDER_WIDTH / scene.aspect)))


def add_specks(image: Image.Image, number: int, rng):
    """Decoys: bright specks of the size of the smallest objects, anywhere on the image, in the colours of paints."""
    side = max(1, round(2 * image.width / FINEST))
    draw, bright = ImageDraw.Draw(image), [PAINTS[name] for name in ("red", "yellow", "blue", "white")]
    for x, y, colour in zip(*(rng.uniform(0, length, number) for length in image.size), rng.integers(4, size=number)):
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=bright[colour])


def example(size=DEFAULT_SIZE, seed: int = 0) -> Image.Image:
    """The scene of a seed in the proportions of a size, (width, height) in pixels."""
    return render(make_scene(seed, size[0] / size[1]), size)


def write(path: Path = DEFAULT_PATH, size=DEFAULT_SIZE, seed: int = 0):
    """Write the scene whole or not at all; the format is that of the file's suffix."""
    with whole_files(path.parent) as built:
        example(size, seed).save(built / path.name, quality=82)


@tells_errors
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="uhr-bat scene", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--size", type=int, nargs=2, default=DEFAULT_SIZE, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_outputs((), Output("--output", args.output, tuple(Image.registered_extensions())))
    write(args.output, tuple(args.size), args.seed)
    print(f"{args.output}: {args.size[0]:,} x {args.size[1]:,} px, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    raise SystemExit(main())
