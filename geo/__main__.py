"""Ask about an image, and write what was kept to answer as GIS software reads it.

    uhr-bat evidence-map IMAGE "QUESTION" [--geojson out.geojson] [--geopackage out.gpkg [--layer evidence]]
        [--raster attention.tif] [--page out.html] [--before EARLIER [--changes changes.geojson]] [--budgets 16,24,40,66]
        [--model MODEL] [--max-new-tokens 64]

Polygons of the kept and merged tokens go into a GeoJSON (WGS 84, RFC 7946) and a GeoPackage (the CRS of the image), the
importance into a GeoTIFF over the image, and all of it into a page that opens offline. A plain image has pixel
coordinates. With an earlier image of the same place, polygons of what changed since go into a file of their own.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from ..budgets_uhr_bat import split_budgets
from ..common.commands import add_before_argument, add_question_arguments, tells_errors
from ..common.extras import require
from ..common.files import edited_alone, whole_outputs
from ..common.images import image_options, tile_options
from ..common.loading import WEIGHTS_NOTE, check_image, load_model, load_processor
from ..common.models import find_model, is_tiny, stay_offline
from ..common.outputs import Output, check_outputs
from ..image_registration_uhr_bat import open_dates
from . import Georeference, check_vectors, evidence_frame, write_page, write_raster, write_vectors
from .changes import changes_frame
from .styles import style_path, write_style
from .writing import GEOJSON, GEOPACKAGE, LAYER, check_layer, shown_importance

ENDINGS = {
    "geojson": GEOJSON,
    "geopackage": (GEOPACKAGE,),
    "raster": (".tif", ".tiff"),
    "page": (".html", ".htm"),
    "changes": GEOJSON,
}


def check_whole(pyramids):
    """Raises `ValueError` where tiles of a level may be left out: what nobody read would be missing among the changes."""
    sizes = [sum(map(pyramid.num_tiles, range(len(pyramid.scales)))) for pyramid in pyramids]
    if pyramids and pyramids[0].max_tiles < (least := len(sizes) * max(sizes)):
        raise ValueError(
            f"--changes are of all that both images show, whose tiles are {least:,}: --max-tiles must be at least that. "
            f"Got {pyramids[0].max_tiles:,}."
        )


def draw(args):
    """Ask, write the files that were asked for, and print their names."""
    from ..common import asking
    from ..modeling_outputs_uhr_bat import check_letterboxes

    print("Reading ...", file=sys.stderr, flush=True)
    processor = load_processor(args.model, args.set)
    read = partial(processor.image_processor.open_image, **image_options(args))
    images, dates = open_dates(read, args.image, args.before)
    image, number = images[-1], len(images) - 1
    georeference = Georeference.of(image, args.image)
    if args.geojson:
        check_vectors(args.geojson, georeference.crs)
    if args.changes:
        check_vectors(args.changes, georeference.crs)
    options = {"max_image_pixels": args.max_image_pixels, **tile_options(args)}
    image_inputs = processor.image_processor(images, return_tensors="pt", **options)
    check_letterboxes(image_inputs)
    if args.changes:
        check_whole(image_inputs.get("image_pyramids") or ())
    if args.budgets is not None and not args.native:
        split_budgets(args.budgets, processor.image_processor.scales)
    print("Loading ...", file=sys.stderr, flush=True)
    processor, model = load_model(args.model, **args.set)
    print("Answering ...", file=sys.stderr, flush=True)
    options = {"dates": dates, "max_tiles": args.max_tiles, "budgets": args.budgets}
    options["max_new_tokens"] = args.max_new_tokens
    said = asking.ask_opened(processor, model, image, image_inputs, args.question, **options)
    compressed, answer = said.compressed, asking.printable(said.text)

    about = {"image": Path(args.image).name, "question": args.question, "answer": answer}
    if is_tiny(args.model):
        about["note"] = WEIGHTS_NOTE
    if args.before is not None:
        about["before"] = Path(args.before).name
    seen, which = ((image.height, image.width), compressed.scales[number]), {"image_idx": number}
    place = {"transform": georeference.transform, "crs": georeference.crs}
    frame = evidence_frame(compressed, *seen, **place, **which)
    pixel_frame = evidence_frame(compressed, *seen, **which)
    finest = compressed.importance[number][-1], compressed.regions[number][-1]
    writers = {
        args.geojson: lambda path: write_vectors(frame, path, about, georeference.words),
        args.geopackage: lambda path: write_vectors(
            frame, path, about, georeference.words, args.layer, onto=args.geopackage
        ),
        args.raster: lambda path: write_raster(path, compressed, *seen, about, georeference, **which),
        args.raster and style_path(args.raster): lambda path: write_style(
            path, shown_importance(*finest), len(compressed.importance[number])
        ),
        args.page: lambda path: write_page(
            path, compressed, pixel_frame, image, seen[1], about, georeference, objects=said.objects, **which
        ),
        args.changes: lambda path: write_vectors(
            changes_frame(compressed, seen[0], **place, **which), path, about, georeference.words, "changes"
        ),
    }
    writers.pop(None, None)
    with edited_alone(args.geopackage) as check, whole_outputs(writers) as built:
        for path, write in writers.items():
            write(built[path])
        check()
    print(f"Question: {args.question}\nAnswer: {answer}")
    if "note" in about:
        print(about["note"])
    if georeference.crs is None:
        print(f"Coordinates in the files are {georeference.words}.")
    for path in writers:
        print(path)


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence-map", description=__doc__.splitlines()[0])
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--geojson", type=Path, metavar="FILE", help="polygons in WGS 84, as RFC 7946 has it")
    parser.add_argument("--geopackage", type=Path, metavar="FILE", help="the same polygons in the CRS of the image")
    parser.add_argument(
        "--layer", default=LAYER, metavar="NAME", help=f"of the GeoPackage; its other ones stay (default: {LAYER})"
    )
    parser.add_argument(
        "--raster",
        type=Path,
        metavar="FILE",
        help="importance as a GeoTIFF, a band for every scale, with a style for QGIS",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="an HTML page with a map that opens offline")
    add_before_argument(parser)
    parser.add_argument(
        "--changes", type=Path, metavar="FILE", help="polygons of what changed since --before, in WGS 84"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    add_question_arguments(parser)
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_image(args.image)
    if args.before is not None:
        check_image(args.before)
    elif args.changes:
        raise ValueError("--changes are those since an earlier image: give it as --before.")
    args.model = find_model(args.model)
    outputs = [Output(f"--{name}", getattr(args, name), endings) for name, endings in ENDINGS.items()]
    if all(output.path is None for output in outputs):
        raise ValueError("Nothing to write: give --geojson, --geopackage, --raster, --page or --changes a file.")
    require("geo", "rasterio", "geopandas", "pyogrio")
    style = args.raster and style_path(args.raster)
    check_outputs((args.image, args.before, args.model, args.area), *outputs, Output("--raster", style))
    if args.geopackage:
        check_layer(args.geopackage, args.layer)
    draw(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
