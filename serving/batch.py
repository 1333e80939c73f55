"""Ask a thousand images, on one machine or a cluster.

    uhr-bat batch --images DIR|LIST|ITEMS.json --questions FILE --output results.parquet|.csv|.jsonl [--model DIR] [--address ADDRESS]
        [--workers N] [--gpus 1] [--asset NAME] [--budgets 16,24,40,66] [--max-tiles 128 --native] [--max-new-tokens 64]
        [--batch-size 8] [--objects out.geojson]

Every image is read and encoded once for all its questions. Answers are kept as they come, and the same command goes on
where it was stopped; what failed is a row that says so, and is asked again by the next run. The results are written
whole at the end.
"""

import argparse
import csv
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..common.budgets import budgets
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import whole_files
from ..common.images import OPTIONS, add_image_arguments, add_tile_arguments, image_options, tile_options
from ..common.loading import load_model
from ..common.measured import told_as_measured
from ..common.models import add_model_argument, find_model, stay_offline, with_revision
from ..common.objects import Objects
from ..common.outputs import Output, check_outputs
from ..common.runs import Line, alone, check_same_settings, lines_of_run, whole_lines
from ..geo import Answered, Georeference, check_objects, object_members, write_joined
from ..geo.objects import OBJECT_FILES
from ..image_raster_files_uhr_bat import reason
from ..image_registration_uhr_bat import open_dates
from .batch_inputs import BatchImage, plan, read_images, read_questions

# Entry of the results' metadata that says what they were asked with.
SETTINGS = b"uhr_bat"
# Images that a worker has at hand: one is read and cut while the model works on the other.
AT_ONCE = 2
# Without a GPU: cores of a worker, whose matrix products use all of them.
CORES_PER_WORKER = 4
COLUMNS = {
    "image": "string",
    "item": "string",
    "before": "string",
    "question": "string",
    "answer": "string",
    "objects": "string",
    "error": "string",
    "visual_tokens": "int64",
    "seconds": "float64",
    "encoding_seconds": "float64",
    "model": "string",
}
# Of a row, what each of its objects is written with.
JOINED = ("image", "item", "question", "answer")
# Seconds for a cluster to answer, before that is said.
ANSWER_SECONDS = 5
# An image is given up when the processes that had it died so often, as they do where there is too little memory for it.
MAX_ATTEMPTS = 3
# Seconds before an image is begun again: what a neighbour answered reaches Ray first.
PAUSE = 1
LOST = "The processes that had this image died: there may be too little memory for it."


# ---- Answers ---------------------------------------------------------------------------------------------------------


class Attempts:
    """How often each image (source, item, before) was begun; it outlives the workers, which Ray starts again, with what they had, for ever."""

    def __init__(self):
        self.numbers = {}

    def number(self, image: tuple[str, str, str]) -> int:
        return self.numbers.get(image, 0)

    def begin(self, image: tuple[str, str, str]) -> int:
        self.numbers[image] = self.number(image) + 1
        return self.numbers[image]


class Worker:
    """One model, which is handed image after image with its questions. Two threads call it at a time: one reads and cuts
    its image while the other one's is answered.

    Args:
        settings: what `told` tells of the model, `budgets`, `max_new_tokens`, `reading`, the options of the image processor, and
            perhaps `objects`, whether rows have those of their answers.
        batch_size: questions that are answered at once.
        attempts: handle of the `Attempts` of all workers.
    """

    def __init__(self, settings: dict, batch_size: int, attempts):
        self.settings, self.batch_size, self.attempts = settings, batch_size, attempts
        self.processor, self.model = load_model(with_revision(settings), **(settings.get("model_settings") or {}))
        self.at_work = threading.RLock()

    def __call__(self, row: dict) -> list[dict]:
        """The rows of the results (`COLUMNS`) of {"image", "item", "before", "questions"}."""
        import ray

        rows = [{"question": question} for question in row["questions"]]
        about = {name: row.get(name, "") for name in ("image", "item", "before")}
        image = tuple(about.values())
        begun = ray.get(self.attempts.number.remote(image))
        # What was begun before may have ended its process, and would end its neighbour's work again.
        with self.at_work if begun else nullcontext():
            time.sleep(PAUSE if begun else 0)
            try:
                if ray.get(self.attempts.begin.remote(image)) > MAX_ATTEMPTS:
                    raise MemoryError(LOST)
                self.answer_all(row["image"], rows, about["before"] or None)
            except Exception as error:  # an image can fail in any way; the other ones are still to come
                rows = [{"question": question, "error": reason(error)} for question in row["questions"]]
        about["model"] = with_revision(self.settings)
        return [dict.fromkeys(COLUMNS) | about | answer for answer in rows]

    def answer_all(self, image, rows, before=None):
        from ..common import asking

        images, dates = open_dates(self.open, image, before)
        opened, inputs = images[-1], self.cut(images)
        place = Georeference.of(opened, image) if self.settings.get("objects") else None
        with self.at_work:
            start = time.perf_counter()
            features = asking.encode(self.model, inputs)
            rows[0]["encoding_seconds"] = time.perf_counter() - start
            for first in range(0, len(rows), self.batch_size):
                size = opened.height, opened.width
                self.answer(rows[first : first + self.batch_size], features, size, place, dates)

    def open(self, image):
        return self.processor.image_processor.open_image(image, **self.reading(OPTIONS))

    def cut(self, opened):
        options = self.reading(("max_image_pixels", "max_tiles", "native"))
        return self.processor.image_processor(opened, **options, return_tensors="pt")

    def reading(self, names) -> dict:
        reading = self.settings["reading"]
        return {name: reading[name] for name in names if reading.get(name) is not None}

    def answer(self, rows, features, image_size, place=None, dates=None):
        """Adds the answers to rows with questions about the same encoded image, or two `dates` of `open_dates`, with their objects
        where there is a `place`."""
        from ..common import asking

        start = time.perf_counter()
        options = {name: self.settings[name] for name in ("budgets", "max_new_tokens")}
        options |= {"dates": dates and dates * len(rows), **self.reading(("max_tiles",))}
        questions = [row["question"] for row in rows]
        try:
            ids, compressed = asking.generated(self.model, self.processor, questions, [features] * len(rows), **options)
            texts, objects = asking.answer_texts(self.processor, ids), [None] * len(rows)
            if place is not None:
                sizes = [image_size] * len(rows)
                found = asking.objects_of_answers(self.model, texts, compressed, sizes, ids=ids)
                objects = [_kept(one, image_size, place) for one in found]
        except Exception as error:
            if len(rows) == 1:
                rows[0]["error"] = reason(error)
            else:  # by itself, a question fails alone
                for row in rows:
                    self.answer([row], features, image_size, place, dates)
            return
        seconds = (time.perf_counter() - start) / len(rows)
        for row, text, of_answer, spent in zip(rows, texts, objects, compressed.tokens_per_prompt):
            row |= {"answer": text, "objects": of_answer, "visual_tokens": spent, "seconds": seconds}


def _kept(objects, image_size, place) -> str:
    """JSON of a row's objects: those of `object_members`, and from which transform and CRS they have their ground."""
    record = object_members(objects, image_size, place)
    record["transform"] = None if place.transform is None else list(place.transform)[:6]
    return json.dumps(record | {"crs": place.crs and place.crs.to_wkt()}, ensure_ascii=False)


def share_machines(workers: int | None, gpus: float | None, resources: dict) -> dict:
    """How many workers there are, and the cores and GPUs of each, from what Ray says it has.

    Args:
        workers: None for one per GPU, else one per `CORES_PER_WORKER` cores.
        gpus: of a worker, 0.5 for two on one; None for 1 where there are any.

    Raises:
        ValueError: more is asked for than there is.
    """
    cores, there = int(resources.get("CPU", 1)), resources.get("GPU", 0)
    gpus = min(1, there) if gpus is None else gpus
    if workers is None:
        workers = int(there / gpus) if gpus else max(1, cores // CORES_PER_WORKER)
    if not 1 <= workers <= cores or workers * gpus > there:
        raise ValueError(
            f"{workers} workers of a core or more and {gpus:g} GPUs each do not fit {cores} cores and {there:g} GPUs. Give "
            f"other --workers or --gpus."
        )
    return {"workers": workers, "num_cpus": cores // workers if not gpus else 1, "num_gpus": gpus}


def check_address(address: str | None):
    """Raises `ValueError` or `OSError` for an address of a cluster that is none, or at which nobody answers; what "auto" means is
    known to Ray alone."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"--address is HOST:PORT of a Ray cluster, or auto. Got {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise OSError(f"--address {address}: nobody answers there within {ANSWER_SECONDS} s ({error}).") from error


@contextmanager
def telling_of_the_wait(address: str | None):
    """Around a connection to a cluster: says that it is waited for, and how long already."""
    done = threading.Event()

    def tell():
        start = time.monotonic()
        while not done.wait(ANSWER_SECONDS):
            waited = time.monotonic() - start
            print(
                f"Waiting for Ray at {address or 'this machine'}, {waited:.0f} s so far.", file=sys.stderr, flush=True
            )

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def ask(work: list[tuple[BatchImage, list[str]]], settings: dict, batch_size=8, workers=None, gpus=None, address=None):
    """Rows of the results as they come, in any order, from workers on all machines of a Ray cluster.

    Args:
        work: images with their questions.
        settings, batch_size: see `Worker`.
        workers, gpus: see `share_machines`.
        address: of a cluster's head, "auto" for the one that this machine belongs to; None for this machine alone.

    Raises:
        OSError: nobody answers at the address, or the workers failed.
    """
    import ray

    check_address(address)
    with telling_of_the_wait(address):
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        share = share_machines(workers, gpus, ray.cluster_resources())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        attempts = ray.remote(num_cpus=0)(Attempts).remote()
        rows = [
            {"image": image.source, "item": image.item, "before": image.before, "questions": questions}
            for image, questions in work
        ]
        # A block is an image: what a worker loses, and what is handed out, is one image.
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
            Worker,
            fn_constructor_args=(settings, batch_size, attempts),
            compute=ray.data.ActorPoolStrategy(
                size=share.pop("workers"),
                max_tasks_in_flight_per_actor=AT_ONCE,
                max_concurrent_calls_per_actor=AT_ONCE,
                enable_true_multi_threading=True,
            ),
            **share,
        )
        yield from answered.iter_rows()
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray's workers failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()


# ---- Results ---------------------------------------------------------------------------------------------------------


def read_results(path: Path, settings: dict) -> list[dict]:
    """Rows that an earlier run left in its results, or in its lines where it was stopped; the newest of equals is last.

    Raises:
        ValueError: it was asked with other settings.
    """
    rows = []
    if path.is_file():
        kept, rows = READERS[path.suffix.lower()](path)
        check_same_settings(path, kept, settings)
    rows += lines_of_run(lines_path(path), settings)
    # Results that were written before there were two dates have no `before`.
    return [row | {"before": row.get("before") or ""} for row in rows]


def _read_parquet(path):
    """(settings, rows) of results."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return json.loads((table.schema.metadata or {}).get(SETTINGS, b"{}")), table.to_pylist()


def _read_csv(path):
    csv.field_size_limit(sys.maxsize)  # objects of one answer
    with open(path, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = []
    for of_row in found:
        row = {name: of_row.get(name) or None for name in COLUMNS}
        for name, kind in COLUMNS.items():
            if row[name] is not None and kind != "string":
                row[name] = float(row[name]) if kind == "float64" else int(row[name])
        # A row without an error has an answer, and every row an item: an empty one is none of them left out.
        rows.append(row | {"item": row["item"] or ""} | ({} if row["error"] else {"answer": row["answer"] or ""}))
    return _read_settings(path), rows


def _read_jsonl(path):
    return _read_settings(path), list(whole_lines(path))


def _read_settings(path):
    settings = settings_path(path)
    return json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}


READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}


def settings_path(path: Path) -> Path:
    """Of the settings of results in a format that has no place for them."""
    return path.with_name(f"{path.name}.settings.json")


def lines_path(path: Path) -> Path:
    """Of the answers of a run that goes on: a line of settings, then a line a row."""
    return path.with_name(f"{path.name}.lines.jsonl")


def write_results(path: Path, rows: list[dict], settings: dict):
    """The results, in the format of the path's ending, whole or not at all."""
    with whole_files(path.parent) as built:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            metadata = {SETTINGS: json.dumps(settings).encode()}
            schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()], metadata)
            pq.write_table(pa.Table.from_pylist(rows, schema), built / path.name)
            return
        with open(built / path.name, "w", encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (built / settings_path(path).name).write_text(json.dumps(settings), encoding="utf-8")


def write_all_objects(path: Path, rows: list[dict], about: dict[str, str]) -> tuple[int, list[tuple[str, str]]]:
    """The objects of all rows as one file (`write_joined`): how many there are, and (image, why) of those whose place on the ground
    leads nowhere."""
    import rasterio
    from affine import Affine

    answers, lost = [], {}
    for row in rows:
        if not row["objects"]:
            continue  # it failed
        record = json.loads(row["objects"])
        ground = [one.pop("ground") for one in record["objects"]]
        transform = None if record["transform"] is None else Affine(*record["transform"])
        place = Georeference(transform, None if record["crs"] is None else rasterio.CRS.from_wkt(record["crs"]))
        if record["ground_error"]:
            lost[row["image"]] = record["ground_error"]
        columns = {name: row[name] or "" for name in JOINED}
        found = Objects.of_record(record, row["answer"] or "")
        answers.append(Answered(columns, found, place, None if None in ground else ground))
    write_joined(answers or [Answered(dict.fromkeys(JOINED, ""), Objects(), Georeference(), None)], path, about)
    return sum(len(one.objects) for one in answers), list(lost.items())


def _key(row: dict) -> tuple[str, str, str, str]:
    """What a row answers."""
    return row["image"], row["item"] or "", row["before"] or "", row["question"]


def run(work: list[tuple[BatchImage, list[str]]], output: Path, settings: dict, **options) -> list[dict]:
    """Asks what is not answered yet, and writes the results in the order of the work; the rows.

    Args:
        work: images with their questions.
        output: file of results. What an earlier run with the same settings left there stays.
        settings, options: see `ask`.
    """
    with alone(lines_path(output)):
        return _run_alone(work, output, settings, options)


def _run_alone(work, output, settings, options):
    from tqdm import tqdm

    found = {_key(row): row for row in read_results(output, settings)}
    done = {key for key, row in found.items() if row["error"] is None}
    order = [(image.source, image.item, image.before, question) for image, questions in work for question in questions]
    left = [
        (image, [question for question in questions if (image.source, image.item, image.before, question) not in done])
        for image, questions in work
    ]
    left = [(image, questions) for image, questions in left if questions]
    if left:
        lines = None
        with tqdm(total=sum(len(questions) for _, questions in left), desc="Asking", unit="answer") as bar:
            for row in ask(left, settings, **options):
                if lines is None:  # nothing is left of a run without an answer
                    lines = Line(lines_path(output), settings)
                lines.write(row)
                found[_key(row)] = row
                bar.update()
    rows = [found[key] for key in dict.fromkeys([*order, *found])]
    write_results(output, rows, settings)
    lines_path(output).unlink(missing_ok=True)
    return rows


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat batch", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH",
        help="a folder, a text file with a path or URL a line, or a STAC item collection (.json)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="FILE",
        help=".txt, .json, .jsonl or .csv: of all images, or each with the name of its image",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="results: .parquet, .csv or .jsonl")
    parser.add_argument(
        "--objects", type=Path, metavar="FILE", help="boxes and points of all answers: .geojson, .gpkg or .csv"
    )
    parser.add_argument("--asset", metavar="NAME", help="of every STAC item (default: visual, else the first raster)")
    add_model_argument(parser)
    parser.add_argument(
        "--budgets", type=budgets, help="visual tokens per scale, as 16,24,40,66, or of all scales, as 146"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="questions answered at once (default: 8)"
    )
    parser.add_argument("--address", help="of a Ray cluster, or auto (default: this machine alone)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help=f"models (default: one per GPU, else per {CORES_PER_WORKER} cores)"
    )
    parser.add_argument("--gpus", type=float, metavar="G", help="of a worker, as 0.5 (default: 1 where there are any)")
    add_image_arguments(parser)
    add_tile_arguments(parser)
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers nothing
    check_range(args, 1, math.inf, "batch_size", "max_new_tokens", "workers")
    check_range(args, 0, math.inf, "gpus")
    check_address(args.address)
    args.model = find_model(args.model)
    outputs = (
        Output("--output", args.output, tuple(READERS)),
        Output("--output", lines_path(args.output)),
        Output("--output", settings_path(args.output)),
        Output("--objects", args.objects, OBJECT_FILES),
    )
    check_outputs((args.images, args.questions, args.model, args.area), *outputs)
    require("batch", "ray.data")
    if args.objects:
        require("geo", "rasterio", "geopandas", "pyogrio")
        check_objects(args.objects, columns=JOINED)
    settings = {
        **told_as_measured(args.model.resolve(), args.set),
        "budgets": args.budgets,
        "max_new_tokens": args.max_new_tokens,
        "reading": image_options(args) | tile_options(args),
        **({"objects": True} if args.objects else {}),
    }
    work = plan(read_images(args.images, args.asset), read_questions(args.questions), args.questions)
    check_outputs([source for image, _ in work for source in (image.source, image.before) if source], *outputs)
    options = {name: getattr(args, name) for name in ("batch_size", "workers", "gpus", "address")}
    rows = run(work, args.output, settings, **options)
    failed = [row for row in rows if row["error"] is not None]
    print(f"{len(rows) - len(failed):,} answers about {len({row['image'] for row in rows}):,} images: {args.output}")
    if args.objects:
        about = {"answers": f"{len(rows) - len(failed):,}", "model": with_revision(settings)}
        number, lost = write_all_objects(args.objects, rows, about)
        print(f"{number:,} objects: {args.objects}")
        if lost:
            print(f"{len(lost):,} images have no place on the ground, as {lost[0][0]}: {lost[0][1]}", file=sys.stderr)
    if failed:
        print(f"{len(failed):,} failed, as {failed[0]['image']}: {failed[0]['error']}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
