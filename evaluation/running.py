"""Asking a model every question of a suite: one line of JSON an answer, on as many processes as there are.

An image is encoded once for all of its questions; the next ones are read and cut while the model works. Every question
is asked three times: with its image, with a blank one, and as text alone. A run that was killed goes on where it was, a
failed image is a line that says so.

Images go round the processes in their order, so that the same lines come out of one process and of many.
"""

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..budgets_uhr_bat import is_one_budget
from ..common.asking import answers, encode
from ..common.files import whole_files, write_json
from ..common.objects import POINTING, family_name, objects_of
from ..common.runs import Line, check_same_settings, whole_lines
from ..image_processing_uhr_bat import part_reading
from ..image_raster_files_uhr_bat import reason
from ..image_registration_uhr_bat import check_dates, open_dates
from .asked import asked, check_asked
from .reducers import find_selector
from .samples import Sample
from .suites import Suite

IMAGE, BLANK, TEXT = "image", "blank image", "text only"
VIEWS = (IMAGE, BLANK, TEXT)
SETTINGS, PREDICTIONS = "settings.json", "predictions.jsonl"


@dataclass(frozen=True)
class Settings:
    """All that decides what is answered; the same for a whole run.

    Attributes:
        suite, data, model: name, file or folder or id, and folder or repository.
        prompt: name of the prompt.
        budgets: int[S] or one number, visual tokens.
        selector: name of the rule that chooses them.
        seed: of everything that draws.
        max_new_tokens: of an answer.
        limit: of samples, None for all.
        max_tiles, native: see [`UHRBatImageProcessor`].
        versions: of what computed.
        weights: digest of the model folder.
        revision: of the model's repository, None for a folder.
        model_settings: other values for settings of the model.
        image: options of reading that were given, as `bands`.
        batch_size: questions that are answered together.
        dates: True where the two pictures of every sample are compared as two dates of one place.
    """

    suite: str
    data: str | None
    model: str
    prompt: str
    budgets: list[int] | int
    selector: str
    seed: int
    max_new_tokens: int
    limit: int | None
    versions: dict[str, str]
    max_tiles: int | None = None
    native: bool | None = None
    revision: str | None = None
    model_settings: dict | None = None
    weights: str | None = None
    image: dict | None = None
    batch_size: int = 1
    dates: bool | None = None

    @property
    def of_a_line(self) -> dict:
        """What every line repeats, so that it can be read by itself."""
        said = {name: getattr(self, name) for name in ("prompt", "budgets", "selector", "seed", "versions")}
        said |= {"image_options": self.image} if self.image else {}
        return said | ({"dates": True} if self.dates else {}) | self.tiles

    @property
    def tiles(self) -> dict:
        """How much of an image is encoded, where that is not all of it."""
        return {} if self.max_tiles is None else {"max_tiles": self.max_tiles, "native": self.native}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import transformers

    try:
        own = version("uhr-bat")
    except PackageNotFoundError:
        own = "a clone"
    return {
        "uhr_bat": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def process_state():
    """Which of how many processes this is, started by `accelerate launch` or `torchrun`."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


# ---- Answers ---------------------------------------------------------------------------------------------------------


def looking_closer(budgets, default, max_tiles, native) -> tuple[dict, list[int] | int | None]:
    """The image processor's options and the budgets of a model that encodes an image where the question looks: levels
    of an image's own share one budget, so that several become their sum.

    Args:
        budgets: that were given, or None for the model's `default`.
        max_tiles: that may be encoded for a question, or None for all of every scale; numbers as texts, too.
        native: whether levels go down to the image's own pixels; "True" and "false", too.

    Raises:
        ValueError: `native` without `max_tiles`, less than one tile, or something else than a truth value.
    """
    if isinstance(native, str):
        if native.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"native is True or False. Got {native!r}.")
        native = native.lower() in ("true", "1")
    if max_tiles is None:
        if native:
            raise ValueError(
                "native levels are encoded where the question looks, so many tiles: give max_tiles with it."
            )
        return {}, budgets
    if int(max_tiles) < 1:
        raise ValueError(f"max_tiles must be at least 1. Got {max_tiles}.")
    if native and budgets is None and not is_one_budget(default):
        budgets = sum(default)
    return {"max_tiles": int(max_tiles), "native": bool(native) or None}, budgets


# ---- Images ----------------------------------------------------------------------------------------------------------


class Cut(Dataset):
    """The images of every group of samples, read and cut into tiles, with what `open_dates` found of two dates and None of other
    images; or the reason why that failed. `options`: of the image processor."""

    def __init__(self, suite: Suite, image_processor, groups: list[list[Sample]], options=None):
        self.suite, self.image_processor, self.groups, self.options = suite, image_processor, groups, options or {}

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        pictures, options, dates = self.groups[index][0].pictures, self.options, None
        if not pictures:
            return None
        try:
            images = [self.suite.open(picture) for picture in pictures]
            if self.suite.two_dates:
                check_dates([len(images)])
                reading, options = part_reading(options)
                images, dates = open_dates(partial(self.image_processor.open_image, **reading), images[1], images[0])
            return self.image_processor(images, return_tensors="pt", **options), dates
        except Exception as error:  # an image can fail in any way; the other ones are still to come
            return reason(error)


def groups_of(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples by their images, in the order in which these come first."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample.picture_keys, []).append(sample)
    return list(groups.values())


def blank_image(config, pad_color) -> Image.Image:
    """A square of the letterbox's colour, which takes as many tokens as a square image."""
    return Image.new("RGB", (config.scales[-1],) * 2, tuple(pad_color))


# ---- The run ---------------------------------------------------------------------------------------------------------


def read_predictions(folder: Path) -> dict[tuple[str, str], dict]:
    """{(sample, view): line} of all files of a run; a last line that was torn by a killed process is left out."""
    found = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for record in whole_lines(path):
            if not {"id", "view", "answer", "error"} <= set(record):
                raise ValueError(f"{path}: {str(record)[:80]} is no line of a run. Give another --output.")
            key = record["id"], record["view"]
            if key not in found or found[key]["error"] is not None:  # it may have been asked again
                found[key] = record
    return found


def check_settings(folder: Path, settings: Settings):
    """Raises `ValueError` where the folder holds a run with other settings, and names them."""
    path = folder / SETTINGS
    if path.is_file():
        check_same_settings(folder, json.loads(path.read_text(encoding="utf-8")), asdict(settings))


def units_of(groups: list[list[Sample]], batch_size: int) -> list[list[list[Sample]]]:
    """Consecutive groups with a batch of questions at least: what one process asks, however many there are."""
    units, size = [], batch_size
    for group in groups:
        if size >= batch_size:
            units.append([])
            size = 0
        units[-1].append(group)
        size += len(group)
    return units


def ask_unit(model, processor, suite, unit, cuts, blank, done, settings) -> Iterator[dict]:
    """The lines of the questions about the images of a unit that are not `done` yet.

    Batches are the same ones whatever is done: an answer does not depend on where a run was stopped. `cuts`: what `Cut`
    made of every group.
    """
    ask, size = suite.prompts[settings.prompt], settings.batch_size
    jobs = [(at, sample) for at, group in enumerate(unit) for sample in group]
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def waits(batch, view):
        return any((sample.id, view) not in done for _, sample in batch)

    needed = {at for batch in batches if waits(batch, IMAGE) for at, _ in batch}
    features, dates, failed = {}, {}, {}
    for at in sorted(needed):
        try:
            if isinstance(cuts[at], str):
                failed[at] = cuts[at]
            elif cuts[at] is None:  # a question without an image
                features[at] = []
            else:
                inputs, dates[at] = cuts[at]
                features[at] = encode(model, inputs)
        except Exception as error:
            failed[at] = reason(error)
    for batch in batches:
        for view in VIEWS:
            if not waits(batch, view):
                continue
            shown = {
                IMAGE: lambda at, sample: features.get(at),
                BLANK: lambda at, sample: blank * len(sample.pictures),
                TEXT: lambda at, sample: [],
            }[view]
            compared = dates if view == IMAGE else {}
            questions = [(ask(sample), shown(at, sample), compared.get(at)) for at, sample in batch]
            found = answers_or_errors(model, processor, questions, settings)
            for (at, sample), (said, error, spent) in zip(batch, found):
                if (sample.id, view) not in done:
                    error = failed.get(at, error) if view == IMAGE else error
                    line = {"suite": suite.name, "id": sample.id, "view": view, "images": list(sample.picture_keys)}
                    line |= {"asked": asked(sample), "answer": said, "error": error, "visual_tokens": spent}
                    if suite.points and view == IMAGE and said:
                        line |= placed_boxes(model, processor, suite, sample, said, features[at], settings)
                    yield line | settings.of_a_line


def placed_boxes(model, processor, suite, sample, said, features, settings) -> dict:
    """{"boxes": [[left, top, right, bottom], ...]} in pixels of the picture, of all boxes that a model of another family wrote in
    its own form; {} where it wrote none, or was shown several pictures."""
    if len(features) != 1 or family_name(model) not in POINTING:
        return {}
    image = processor.image_processor.process_image(suite.open(sample.pictures[0]), **(settings.image or {}))
    found = objects_of(model, said, (image.height, image.width), features[0].grids)
    boxes = [list(one.box) for one in found if one.box]
    return {"boxes": boxes} if boxes else {}


def answers_or_errors(model, processor, questions, settings) -> list[tuple[str | None, str | None, int]]:
    """(answer, error, visual tokens) of every (text, features of its images, what `open_dates` found of them); features None: it
    is not asked. Of questions with images all are about two dates, or none.

    Questions that fail together are asked one by one: one that is too long fails alone.
    """
    found = [(None, None, 0)] * len(questions)

    def ask(numbers):
        try:
            texts, features, dates = zip(*(questions[number] for number in numbers))
            said = answers(
                model, processor, list(texts), list(features), budgets=settings.budgets, max_tiles=settings.max_tiles,
                rules={"selector": find_selector(settings.selector)}, max_new_tokens=settings.max_new_tokens,
                dates=None if None in dates else [one for of_question in dates for one in of_question],
            )  # fmt: skip
            for number, (text, spent) in zip(numbers, said):
                found[number] = text, None, spent
        except Exception as error:
            if len(numbers) == 1:
                found[numbers[0]] = None, reason(error), 0
            else:
                for number in numbers:
                    ask([number])

    there = [number for number, (_, features, _) in enumerate(questions) if features is not None]
    for with_images in (True, False):
        if numbers := [number for number in there if bool(questions[number][1]) == with_images]:
            ask(numbers)
    return found


def run(
    model, processor, suite: Suite, samples: list[Sample], settings: Settings, folder: Path, workers=1, retry=False
):
    """Asks what is not answered yet, and writes predictions.jsonl in the order of the samples.

    Args:
        folder: of the run; a run with the same settings that lies there is gone on with.
        workers: processes beside the model's that read and cut images.
        retry: whether samples that failed are asked again.

    Returns:
        {(sample, view): line}, on every process.

    Raises:
        ValueError: the folder holds a run with other settings, or answers to other questions or about other pictures.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import set_seed

    state = process_state()
    set_seed(settings.seed)
    check_settings(folder, settings)
    # Processes on other machines see other folders: what any of them has is done.
    lines = dict(gather_object(list(read_predictions(folder).items())))
    check_asked(folder, samples, lines)
    folder.mkdir(parents=True, exist_ok=True)  # on every machine
    if state.is_main_process:
        with whole_files(folder) as built:
            write_json(built / SETTINGS, asdict(settings))
    state.wait_for_everyone()
    if retry:
        lines = {key: line for key, line in lines.items() if line["error"] is None}
    done = set(lines)

    def num_waiting(unit):
        return sum((sample.id, view) not in done for group in unit for sample in group for view in VIEWS)

    units = units_of(groups_of(samples), settings.batch_size)
    mine = [unit for unit in units[state.process_index :: state.num_processes] if num_waiting(unit)]
    written = {}
    if mine:
        image_processor = processor.image_processor
        blank = blank_image(model.config, image_processor.pad_color)
        blank = encode(model, image_processor(blank, return_tensors="pt"))
        if settings.tiles:
            workers = 0  # tiles are read when a question looks at them, by the process that asks
        groups, options = [group for unit in mine for group in unit], settings.tiles | (settings.image or {})
        cut = Cut(suite, image_processor, groups, options)
        loader = DataLoader(cut, batch_size=None, num_workers=workers, prefetch_factor=1 if workers else None)
        file = Line(folder / f"predictions-{state.process_index}.jsonl")
        number, quiet = sum(map(num_waiting, mine)), not state.is_local_main_process
        with tqdm(total=number, desc=f"Asking {suite.name}", unit="answer", disable=quiet) as bar:
            cuts = iter(loader)
            for unit in mine:
                shown = [next(cuts) for _ in unit]
                for line in ask_unit(model, processor, suite, unit, shown, blank, done, settings):
                    file.write(line)
                    written[line["id"], line["view"]] = line
                    bar.update()
    lines |= dict(gather_object(list(written.items())))
    if state.is_main_process:
        merge(folder, samples, lines)
    state.wait_for_everyone()
    return lines


def merge(folder: Path, samples, lines):
    """predictions.jsonl whole, in the order of the samples; then the files of the processes go."""
    with whole_files(folder) as built:
        with open(built / PREDICTIONS, "w", encoding="utf-8") as file:
            for sample in samples:
                for view in VIEWS:
                    file.write(json.dumps(lines[sample.id, view], ensure_ascii=False) + "\n")
    for path in folder.glob("predictions-*.jsonl"):
        path.unlink()
