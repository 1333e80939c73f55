"""Pictures of what the model looked at and what it kept, drawn from the result of `model.compress(...)` alone.

A picture is a page of panels, an RGB image of a given width, from a result and the PIL image that the model saw (it is
brought to the size of a panel first): `attention_picture` (figure 8 of the paper), `regions_picture` (6), `kept_picture`,
`budgets_picture` (9 and 10) and `tsne_picture` (7); and `objects_picture`, of an answer's boxes and points.

Letters: V tokens of a scale that show the image and not the letterbox, D their width.
"""

import numpy as np
from PIL import Image

from ..common.extras import require
from ..geometry_uhr_bat import token_box
from .drawing import (
    ATTENTION_COLOURS,
    MERGED_BRIGHTNESS,
    MERGED_TINT,
    PALETTE,
    count_slots,
    draw_attention,
    draw_kept,
    draw_regions,
    screen_image,
)

# Pixels of a page's width: a screen's. Pages of another width are this one, larger or smaller.
WIDTH = 1400
DPI = 100
MARKERS = "os^DvP*X"
OTHERS = "#BBBBBB"
# The brightest colour of the attention is this percentile: a single peak would leave the rest black.
ATTENTION_PERCENTILE = 99
# Tokens that are embedded by t-SNE: more take minutes and make one blot.
TSNE_TOKENS = 1500
# Panels are at most so much longer than wide, or wider than long.
MAX_ASPECT = 2.5
# Side of the enlarged view of the attention, in parts of the image's longer side.
ENLARGED = 1 / 6
# Tokens narrower than this many pixels of a panel are dots: an inset, of so large a part of the panel, shows some tokens larger.
DOT, INSET, INSET_TOKENS = 6, 0.42, 12
# Objects that are shown larger, each in a part of the image so many times as long, and of so many pixels at least; a mark of an
# object is no smaller than the last of a panel's pixels.
MAGNIFIED, AROUND, LEAST_SHOWN, LEAST_MARK = 5, 4, 48, 9
MARK = "#FF2BD6"
# Letters of an object's label in a title.
LABEL_LETTERS = 60


class Page:
    """A figure of `rows` x `columns` panels in the shape of an image, `WIDTH` pixels wide.

    `footer`: pixels that are free below; `lines`: of a panel's title.
    """

    def __init__(self, rows, columns, image, title, *, footer=0, lines=1):
        from matplotlib.figure import Figure

        # Room in pixels: beside the panels, above each for its title, and above all for the page's.
        gap, above, head = 14, 12 + 17 * lines, 20 + 22 * (title.count("\n") + 1)
        panel_width = (WIDTH - (columns + 1) * gap) / columns
        # A strip would leave no room for its own title.
        panel_height = panel_width * min(max(image.height / image.width, 1 / MAX_ASPECT), MAX_ASPECT)
        height = head + rows * (panel_height + above) + footer + gap
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.figure.text(gap / WIDTH, 1 - 14 / height, title, fontsize=13, weight="bold", va="top")
        self.axes = np.empty((rows, columns), object)
        for row, column in np.ndindex(rows, columns):
            left = gap + column * (panel_width + gap)
            bottom = height - head - (row + 1) * (panel_height + above)
            box = left / WIDTH, bottom / height, panel_width / WIDTH, panel_height / height
            self.axes[row, column] = self.figure.add_axes(box)
            self.axes[row, column].set_axis_off()
        self.panel_width = round(panel_width)
        self.height = height

    def show(self, row, column, image, title, weight="normal"):
        axes = self.axes[row, column]
        axes.imshow(image, interpolation="antialiased")
        axes.set_anchor("NW")
        # A letter is about 0.62 of its size wide, 0.7 in bold: no title runs into the next panel.
        longest = max(map(len, title.split("\n"))) * (0.7 if weight == "bold" else 0.62)
        size = min(10.5, self.panel_width / longest * 72 / DPI)
        axes.set_title(title, fontsize=size, loc="left", pad=5, weight=weight)
        return axes

    def render(self, width) -> Image.Image:
        return render(self.figure, width)


def render(figure, width) -> Image.Image:
    """A matplotlib figure as an RGB image, so many pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a question about $5 and $6 is no formula
        text.set_parse_math(False)
    # matplotlib cuts the product of inches and dots per inch to an integer.
    figure.set_dpi((width + 0.01) / figure.get_figwidth())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _head(title, question):
    import textwrap

    lines = textwrap.wrap(f"“{question}”", 130) if question else []
    return "\n".join([title, *lines])


def _grid(compressed, image_idx, scale_idx):
    return tuple(compressed.importance[image_idx][scale_idx].shape)


def _present(compressed, image_idx, scale_idx):
    """bool[H, W]: tokens of a scale that there are, whether or not the scale spends any."""
    return _numpy(compressed.importance[image_idx].present(scale_idx))


def _numpy(tensor):
    return tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()


def _name(compressed, image_idx, scale_idx):
    height, width = _grid(compressed, image_idx, scale_idx)
    return f"Scale {scale_idx + 1}: {height} × {width} tokens"


def attention_picture(compressed, image, question="", *, image_idx=0, width=WIDTH) -> Image.Image:
    """Where the question looks: the image, the attention at the anchor and aligned at every finer scale, and enlarged
    the surroundings of the token that gets most."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    compressed.check_letterbox()
    num_scales = len(compressed.importance[image_idx])
    columns = min(3, num_scales + 2)
    rows = -(-(num_scales + 2) // columns)
    page = Page(rows, columns, image, _head("Where the question looks", question), footer=84)
    small = screen_image(image, page.panel_width * 2)

    maps, seen = [], []
    for scale_idx in range(num_scales):
        importance = _numpy(compressed.importance[image_idx][scale_idx])
        shown = _present(compressed, image_idx, scale_idx)
        maps.append(np.where(shown, importance / importance[shown].mean(), 0) if shown.any() else importance)
        seen.append(maps[-1][shown])
    everything = np.concatenate(seen)
    low, high = everything.min(), np.percentile(everything, ATTENTION_PERCENTILE)
    finest = max(scale_idx for scale_idx, values in enumerate(seen) if len(values))

    # A window of the small image around the middle of the token that gets most at the finest scale that has tokens.
    size = image.height, image.width
    box = token_box(maps[finest].argmax(), size, maps[finest].shape).reshape(2, 2)
    window = min(round(ENLARGED * max(small.size)), *small.size)
    top, left = (
        int(np.clip(middle * small_length / length - window / 2, 0, small_length - window))
        for middle, small_length, length in zip(box.mean(axis=0), (small.height, small.width), size)
    )

    places = iter(np.ndindex(rows, columns))
    axes = page.show(*next(places), small, "Image, and the part that is enlarged")
    axes.add_patch(Rectangle((left, top), window, window, fill=False, edgecolor="white", linewidth=3.2))
    axes.add_patch(Rectangle((left, top), window, window, fill=False, edgecolor="#D55E00", linewidth=1.6))
    for scale_idx, importance in enumerate(maps):
        note = "measured (anchor)" if scale_idx == 0 else "aligned" if len(seen[scale_idx]) else "not looked at"
        drawn = draw_attention(small, importance, low, high, image_size=size)
        page.show(*next(places), drawn, f"{_name(compressed, image_idx, scale_idx)}, {note}")
    factor = image.width / small.width
    box = [round(factor * value) for value in (top, left, top + window, left + window)]
    box = box[0], box[1], min(box[2], image.height), min(box[3], image.width)
    page.show(*next(places), screen_image(image, page.panel_width, box), "Enlarged: around the strongest token")

    bar = page.figure.add_axes((14 / WIDTH, 46 / page.height, 0.45, 16 / page.height))
    mappable = ScalarMappable(Normalize(low, high), colormaps[ATTENTION_COLOURS])
    page.figure.colorbar(mappable, cax=bar, orientation="horizontal", extend="max")
    bar.set_xlabel("attention of the question, as a multiple of the mean of the scale (1 = mean)", fontsize=10)
    bar.tick_params(labelsize=9.5)
    return page.render(width)


def regions_picture(compressed, image, *, image_idx=0, width=WIDTH) -> Image.Image:
    """The partition of every scale into regions, beside the image."""
    compressed.check_letterbox()
    num_scales = len(compressed.regions[image_idx])
    columns = min(3, num_scales + 1)
    rows = -(-(num_scales + 1) // columns)
    page = Page(rows, columns, image, "Regions: tokens that are compressed together", footer=34)
    small = screen_image(image, page.panel_width)
    places = iter(np.ndindex(rows, columns))
    page.show(*next(places), small, "Image")
    for scale_idx in range(num_scales):
        regions, grid = _numpy(compressed.regions[image_idx][scale_idx]), _grid(compressed, image_idx, scale_idx)
        sizes = np.bincount(regions[regions >= 0])
        text = f"{_name(compressed, image_idx, scale_idx)}, {(sizes > 0).sum()} regions"
        drawn = draw_regions(small, regions, grid, (image.height, image.width))
        page.show(*next(places), drawn, text)
    page.figure.text(
        14 / WIDTH, 14 / page.height,
        "The eight colours repeat; white lines part the regions where tokens are large enough. Grey without lines: "
        "every token is a region of its own.",
        fontsize=10,
    )  # fmt: skip
    return page.render(width)


def _counts(slots):
    """Text: tokens with a slot of their own, merged ones and the slots these take."""
    slots = np.asarray(slots)
    sharing = count_slots(slots)
    own, merged = int((sharing == 1).sum()), int((sharing > 1).sum())
    num_slots = len(np.unique(slots[slots >= 0])) - own
    return f"{own:,} kept, " + (f"{merged:,} merged into {num_slots:,}" if merged else "none merged")


def _legend(page):
    from matplotlib.patches import Patch

    tint = tuple(MERGED_BRIGHTNESS * (0.5 * 140 + 0.5 * np.array(MERGED_TINT)) / 255)
    handles = [
        Patch(facecolor="#E8E4D0", edgecolor="black", label="kept (image colours): a visual token of its own"),
        Patch(facecolor=tint, edgecolor="black", label="merged (violet): averaged with others of its region"),
        Patch(facecolor="#101010", edgecolor="black", label="dropped (dark)"),
    ]
    page.figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=10, frameon=False)


def kept_picture(compressed, image, question="", *, image_idx=0, width=WIDTH) -> Image.Image:
    """What the model was given of every scale: kept, merged and dropped tokens, beside the image."""
    compressed.check_letterbox()
    slots_of_scales = [_numpy(slots) for slots in compressed.slots[image_idx]]
    columns = min(3, len(slots_of_scales) + 1)
    rows = -(-(len(slots_of_scales) + 1) // columns)
    spent = sum(len(np.unique(slots[slots >= 0])) for slots in slots_of_scales)
    seen = sum(int(_present(compressed, image_idx, scale_idx).sum()) for scale_idx in range(len(slots_of_scales)))
    title = f"What was kept: {spent:,} visual tokens of {seen:,}"
    page = Page(rows, columns, image, _head(title, question), footer=40, lines=2)
    small = screen_image(image, page.panel_width)
    places = iter(np.ndindex(rows, columns))
    page.show(*next(places), small, "Image")
    for scale_idx, slots in enumerate(slots_of_scales):
        text = f"{_name(compressed, image_idx, scale_idx)}\n{_counts(slots)}"
        grid, size = _grid(compressed, image_idx, scale_idx), (image.height, image.width)
        axes = page.show(*next(places), draw_kept(small, slots, grid, size), text)
        if (slots >= 0).any() and max(small.size) / max(grid) < DOT:
            importance = _numpy(compressed.importance[image_idx][scale_idx]).ravel()
            _show_larger(page, axes, image, small, slots, grid, np.where(slots >= 0, importance, -np.inf).argmax())
    _legend(page)
    return page.render(width)


def _show_larger(page, axes, image, small, slots, grid, position):
    """An inset on a panel of `small`, which is the whole image: the tokens around the one at a position, so large that they are
    no dots, and on the panel the place that it shows."""
    size, tokens = (image.height, image.width), min(INSET_TOKENS, max(grid))
    middle = token_box(position, size, grid).reshape(2, 2).mean(0)
    side = max(1, round(max(size) * tokens / max(grid)))
    box = _part_around(size, middle, side)
    picture = screen_image(image, side, box)
    scale = max(1, round(page.panel_width * INSET / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    left, top, right, bottom = _mark(axes, small.width / image.width, (box[1], box[0], box[3], box[2]))
    corner = 0.0 if (left + right) / 2 > small.width / 2 else 1 - INSET
    inset = axes.inset_axes((corner, 0.0 if (top + bottom) / 2 < small.height / 2 else 1 - INSET, INSET, INSET))
    inset.imshow(draw_kept(picture, slots, grid, size, box), interpolation="nearest")
    inset.set_xticks([])
    inset.set_yticks([])
    for spine in inset.spines.values():
        spine.set(color=MARK, linewidth=1.6)


def _part_around(size, middle, side) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a square of `side` pixels around a point (row, column), as far as an image has it."""
    lows = [int(np.clip(point - side / 2, 0, max(0, length - side))) for point, length in zip(middle, size)]
    return *lows, *(min(low + side, length) for low, length in zip(lows, size))


def _mark(axes, factor, edges, least=LEAST_MARK):
    """Draws (left, top, right, bottom) in pixels of an image on a panel that shows it `factor` times as large, and no smaller
    than `least`; its edges on the panel."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (factor * edge for edge in edges)
    grow = [max(0, least - length) / 2 for length in (right - left, bottom - top)]
    left, top, right, bottom = left - grow[0], top - grow[1], right + grow[0], bottom + grow[1]
    for colour, linewidth in (("white", 3.0), (MARK, 1.5)):
        box = (left - 0.5, top - 0.5), right - left, bottom - top
        axes.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=linewidth))
    return left, top, right, bottom


def objects_picture(objects, image, question="", *, width=WIDTH) -> Image.Image:
    """The boxes and points of an answer on the image, none smaller than can be seen, and beside it the first of them larger.

    Args:
        objects: a sequence of [`ImageObject`] in pixels of the image.
    """
    chosen = list(objects)[:MAGNIFIED]
    columns = min(3, len(chosen) + 1)
    rows = -(-(len(chosen) + 1) // columns)
    page = Page(rows, columns, image, _head(f"Objects of the answer: {len(objects):,}", question))
    small, size = screen_image(image, page.panel_width), (image.height, image.width)
    places = iter(np.ndindex(rows, columns))
    axes = page.show(*next(places), small, "Image")
    for number, one in enumerate(objects, 1):
        edges = _mark(axes, small.width / image.width, one.edges)
        if number <= len(chosen) and len(objects) > 1:
            axes.annotate(
                str(number), edges[:2], (0, 2), textcoords="offset points", color="white", fontsize=9, weight="bold"
            )
    for number, one in enumerate(chosen, 1):
        left, top, right, bottom = one.edges
        side = max(LEAST_SHOWN, round(AROUND * max(right - left, bottom - top)))
        box = _part_around(size, ((top + bottom) / 2, (left + right) / 2), side)
        part = screen_image(image, page.panel_width, box)
        label = one.label if len(one.label) <= LABEL_LETTERS else f"{one.label[:LABEL_LETTERS]} ..."
        words = [label or "object"] + ([] if one.score is None else [f"{100 * one.score:.0f} %"])
        words += [] if one.box is None else [f"{right - left:.0f} × {bottom - top:.0f} px"]
        panel = page.show(*next(places), part, f"{number}: {', '.join(words)}")
        shift = (box[1], box[0]) * 2
        edges = [edge - by for edge, by in zip(one.edges, shift)]
        _mark(panel, part.width / (box[3] - box[1]), edges, LEAST_MARK * part.width / page.panel_width)
    return page.render(width)


def budgets_picture(
    results: dict, image, question="", *, title="What was kept at several budgets", image_idx=0, width=WIDTH
) -> Image.Image:
    """Several budgets side by side: a column for every {name: result}, a row for every scale."""
    first = next(iter(results.values()))
    first.check_letterbox()
    num_scales = len(first.slots[image_idx])
    page = Page(num_scales, len(results) + 1, image, _head(title, question), footer=40, lines=2)
    small = screen_image(image, page.panel_width)
    for scale_idx in range(num_scales):
        page.show(scale_idx, 0, small, _name(first, image_idx, scale_idx), weight="bold")
        for column, (name, compressed) in enumerate(results.items(), start=1):
            slots = _numpy(compressed.slots[image_idx][scale_idx])
            drawn = draw_kept(small, slots, _grid(compressed, image_idx, scale_idx), (image.height, image.width))
            page.show(scale_idx, column, drawn, f"{name}\n{_counts(slots)}")
    _legend(page)
    return page.render(width)


def tsne_picture(compressed, tokens, *, image_idx=0, scale_idx=-1, width=WIDTH) -> Image.Image:
    """The tokens of a scale in two dimensions (t-SNE), coloured by region: do regions hold alike tokens?

    Args:
        tokens: float[V, D], the tokens of that scale before compression:
            `encode_image(...)[image_idx].tokens[scale_idx]`.

    Raises:
        ValueError: as many tokens as the result has regions of are needed, and at least 5.
        ImportError: a package is missing; says what to install.
    """
    require("pictures", "matplotlib", "sklearn")
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    compressed.check_letterbox()
    scale_idx %= len(compressed.regions[image_idx])
    regions = _numpy(compressed.regions[image_idx][scale_idx])
    regions = regions[regions >= 0]
    if len(tokens) != len(regions) or len(tokens) < 5:
        raise ValueError(f"t-SNE needs the {len(regions)} tokens of the scale, at least 5. Got {len(tokens)}.")
    tokens = _numpy(tokens)
    chosen = np.sort(np.random.default_rng(0).permutation(len(tokens))[:TSNE_TOKENS])
    num_tokens = len(tokens)
    tokens, regions = tokens[chosen], regions[chosen]
    # As they are clustered: only the direction counts.
    tokens = tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(1e-12)
    points = TSNE(perplexity=min(30, (len(tokens) - 1) / 3), init="pca", random_state=0).fit_transform(tokens)

    figure = Figure(figsize=(WIDTH / DPI, 0.62 * WIDTH / DPI), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    largest = np.argsort(-np.bincount(regions), kind="stable")[: len(PALETTE)]
    others = ~np.isin(regions, largest)
    axes.scatter(*points[others].T, s=9, color=OTHERS, linewidths=0, label=f"all other regions ({others.sum()} tokens)")
    for region, colour, marker in zip(largest, PALETTE, MARKERS):
        members = regions == region
        label = f"region {region} ({members.sum()} tokens)"
        axes.scatter(
            *points[members].T, s=34, color=colour, marker=marker, edgecolors="black", linewidths=0.4, label=label
        )
    axes.set_title(
        f"t-SNE of {len(tokens):,} of the {num_tokens:,} tokens of scale {scale_idx + 1}, "
        f"the {len(largest)} largest of {len(np.unique(regions))} regions in colour",
        fontsize=13, weight="bold", loc="left",
    )  # fmt: skip
    axes.set_xlabel("near in the picture = alike for the model; the axes have no unit", fontsize=10.5)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.legend(loc="outside right upper", fontsize=10.5, frameon=False)
    return render(figure, width)
