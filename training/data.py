"""Training data: conversations about images, read by `datasets` and checked before the first step.

A row of the data is one of

    {"image": "a.tif" or ["a.tif", "b.tif"], "conversations": [{"from": "human", "value": "<image>\\nHow many ships?"},
                                                              {"from": "gpt", "value": "Three."}]}
    {"image": ..., "messages": [{"role": "user", "content": "<image>\\nHow many ships?"}, ...]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.tif"}, {"type": "text", "text": "..."}]}, ...]}
    {"image": ..., "question": "How many ships?", "answer": "Three."}
    {"image": ..., "query": ..., "response": ...}    {"image": ..., "instruction": ..., "input": ..., "output": ...}
    {"image_paths": ["images/a.png"], "conversations": ...}    {"file_name": "images/a.png", "prompt": ..., "answer": ...}

and `image` may be missing (`images` is the same). The last two are UHR-BAT-SFT-10K's: lists may be JSON in a text, and
its images lie below the file's folder or in `images` there.
Beside them may stand `system`, `history` (pairs of question and answer before a plain question), and how the row's images
are read: `bands`, `window`, `value_range` of rasters, `budgets` of visual tokens; `dates`, whether its two images show one place,
the earlier one first: they are then compared before tokens are chosen, as `uhr-bat ask --before` compares them.
Every answered question of a conversation is a sample of its own, so that
its selection is the one that `generate` makes. A sample, which the collator takes, is

    messages   turns as chat templates take them: role, and content as parts of the types "image" and "text"
    images     a path, or the bytes of a file, for each part of the type "image"
    answers    "last": the last turn is learnt; "all": every turn of the assistant's
    regions    paths of their label maps (`uhr-bat regions`), where there are any
    options    how its images are read, in JSON: `bands`, `window`, `value_range`, `budgets`, `dates`, those that the row has
    length     tokens of the sample with its visual tokens, at most
    name       file and row, for messages
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from transformers.utils import logging

from ..budgets_uhr_bat import count_tokens, is_one_budget
from ..common.budgets import scale_budgets
from ..common.chats import ChatError, ChatWriter, answered_turns, as_parts
from ..common.data_tables import leave_files_closed
from ..common.extras import require
from ..common.images import is_file_name
from ..image_raster_files_uhr_bat import is_raster
from ..image_registration_uhr_bat import check_dates, open_dates
from ..regions.cache import name_output
from .collator import as_image, read_own
from .rows import COLUMNS, LINES, read_rows

logger = logging.get_logger(__name__)

# Of an image in the data, LLaVA's, whatever the model calls its own.
PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# A plain question, by the name of its column, and the name of its answer's: ours, ms-swift's, Alpaca's.
PLAIN = {"question": "answer", "query": "response", "instruction": "output"}
PATH_COLUMNS = ("image_paths", "file_name")  # of UHR-BAT-SFT-10K, whose plain questions are `prompt`, too
IMAGE_KEYS = ("path", "url", "image")  # of a part of the type "image", as transformers' chat templates take them
TEXT_FILES = (".json", *LINES, ".csv", ".tsv")
ROWS_VERSION = 2  # of what `read_rows` makes of a file: goes up with it, as results are kept
MOST_TIMES = 20  # that a sample is taken


def _are_numbers(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) in (int, float) for number in value)


def _is_range(value) -> bool:
    return _are_numbers(value) and len(value) == 2 and value[0] < value[1] and all(map(math.isfinite, value))


# What a row may say of its images, and whether that can be it; a file decides the rest when it is read.
ROW_OPTIONS = {
    "bands": lambda value: (
        isinstance(value, int) or isinstance(value, list) and all(isinstance(band, (int, str)) for band in value)
    ),
    "window": lambda value: (
        isinstance(value, list)
        and (
            len(value) == 4
            and _are_numbers(value)
            or len(value) == 5
            and _are_numbers(value[:4])
            or len(value) == 2
            and all(_are_numbers(span) and len(span) == 2 for span in value)
        )
    ),
    "value_range": lambda value: (
        value in ("dtype", "percentile") or _is_range(value) or isinstance(value, list) and all(map(_is_range, value))
    ),
    "budgets": lambda value: (
        type(value) is int
        and value > 0
        or _are_numbers(value)
        and all(isinstance(count, int) and count >= 0 for count in value)
    ),
    "dates": lambda value: isinstance(value, bool),
}
NAMED = 5  # bad samples of each kind that a message names


class BadSample(ValueError):
    """What is wrong with a sample: its kind, and what is to be seen in this one."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


# ---- A row ----------------------------------------------------------------------------------------------------------


def split_text(text: str) -> list[dict]:
    """Parts of a turn: "<image>\\nHow many?" -> [{"type": "image"}, {"type": "text", "text": "How many?"}].

    Around an image, line breaks are the chat template's. Text without an image stays as it is.
    """
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    parts = []
    for piece in text.split(PLACEHOLDER):
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        parts += [{"type": "image", "text": None}]
    return parts[:-1]  # one image between two pieces


def as_text(value) -> str:
    """A text of a row; a number as its digits, 3.0, which tables make of 3, too. Raises `BadSample`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(int(value) if float(value).is_integer() else value)
    if not isinstance(value, str):
        raise BadSample("with a turn that is no text", f"{value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSample("with text that is no UTF-8", repr(value[error.start : error.start + 20])) from error
    return value


def as_list(value, name) -> list:
    """What a row lists in a column, as JSON too; None is an empty list. Raises `BadSample`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if value is None or isinstance(value, list):
        return value or []
    raise BadSample(f"whose `{name}` is no list", repr(value)[:60])


def read_parts(content) -> tuple[str, list]:
    """(text with placeholders, images) of what a turn says: a text, or parts, of which images may name their file."""
    if not isinstance(content, list):
        return content, []
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(PLACEHOLDER)
            images += [part[name] for name in IMAGE_KEYS if part.get(name) is not None][:1]
        elif kind == "text":
            texts.append(as_text(part.get("text")))
        else:
            raise BadSample("with a part that is no text and no image", repr(part)[:60])
    return "\n".join(texts), images


def find_key(row: dict, *names):
    """The first of some names under which a row holds something."""
    return next((name for name in names if row.get(name) is not None), None)


def talk_of(row: dict) -> str | None:
    """The column of a row's conversation; None where a plain question stands there, whose conversation may be empty."""
    column = find_key(row, "conversations", "messages")
    plain = column and row[column] in ([], "", "[]") and find_key(row, *PLAIN, "prompt")
    return None if plain else column


def read_turns(row: dict) -> tuple[list[tuple[str, str]], list]:
    """([(role, text) of each turn], the images that turns name themselves). Raises `BadSample`."""
    column, asked = talk_of(row), find_key(row, *PLAIN)
    if find_key(row, *PATH_COLUMNS) and row.get("prompt") is not None:
        asked = "prompt"
    turns, images = [], []
    if column:
        for turn in as_list(row[column], column):
            if not isinstance(turn, dict):
                raise BadSample("with a turn that is no object", f"{str(turn)[:60]!r} is none of the kind {{...}}")
            said, named = read_parts(turn.get("value", turn.get("content")))
            turns.append((turn.get("from", turn.get("role")), said))
            images += named
    elif asked:
        for pair in as_list(row.get("history"), "history"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadSample("whose `history` is not of pairs", repr(pair)[:60])
            turns += zip(("user", "assistant"), pair)
        more = as_text(row["input"]) if asked == "instruction" and row.get("input") is not None else ""
        turns.append(("user", "\n".join(filter(str.strip, (as_text(row[asked]), more)))))
        answer = row.get(PLAIN.get(asked, "answer"))
        turns.append(("assistant", "" if answer is None else answer))
    else:
        wanted = ", ".join(f"`{name}`" for name in ("conversations", "messages", *PLAIN))
        raise BadSample(f"without one of {wanted}", f"columns: {', '.join(map(str, row))}")
    found = []
    for role, said in turns:
        if not isinstance(role, str) or role not in ROLES:
            raise BadSample("with an unknown role", f"{role!r} is none of {', '.join(ROLES)}")
        found.append((ROLES[role], as_text(said)))
    if row.get("system") not in (None, ""):
        if any(role == "system" for role, _ in found):
            raise BadSample("with two system texts", "one in `system`, one among the turns")
        found.insert(0, ("system", as_text(row["system"])))
    return found, images


def read_images(row: dict, named=()) -> list[dict]:
    """[{"path": ..., "bytes": ...}] of a row whose images are paths, or files in the table, or named by its turns.

    Raises:
        BadSample: an image that is neither, or images in both places.
    """
    column, paths = find_key(row, "image", "images"), [] if named else paths_of(row)
    images = row[column] if column else paths
    if column == "image" and row.get("images") not in (None, "", [], images, [images]):
        raise BadSample("with images in two columns", "`image` and `images` differ")
    if column == "image" and len(paths) > 1 and not isinstance(images, list):
        raise BadSample("with images in two columns", f"1 in `image` and {len(paths)} in `image_paths`")
    images = [image for image in (images if isinstance(images, list) else [images]) if image not in (None, "")]
    if named and images not in ([], named):
        raise BadSample("with images in turns and in a column", f"{len(named)} and {len(images)}")
    found = []
    for image in named or images:
        if isinstance(image, (str, int, float)) and not isinstance(image, bool):
            image = {"path": as_text(image), "bytes": None, "within": not column and not named}
        if not isinstance(image, dict) or image.get("path") is None and image.get("bytes") is None:
            raise BadSample("whose image is no path and no file", repr(image)[:60])
        found.append(image)
    return found


def paths_of(row: dict) -> list[str]:
    """The names of a row's images in the form of UHR-BAT-SFT-10K; where nothing else shows them, none leads out of the data.

    Raises:
        BadSample: one does, or a row of this form has none.
    """
    if not any(name in row for name in PATH_COLUMNS):
        return []
    found = []
    for name in PATH_COLUMNS:
        value = row.get(name)
        several = isinstance(value, list) or isinstance(value, str) and value.lstrip().startswith("[")
        found = found or [path for path in (as_list(value, name) if several else [value]) if path not in (None, "")]
    if find_key(row, "image", "images"):
        return found
    if not found:
        raise BadSample("without an image", "`image_paths` and `file_name` are empty")
    names = [str(PurePosixPath(as_text(path).replace("\\", "/").strip())) for path in found]
    for name in names:
        if not is_file_name(name) or "://" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise BadSample(
                "whose image lies outside of the data", f"{name[:200]!r} is no path below the file's folder"
            )
    return names


def read_options(row: dict, budgets) -> str:
    """`options` of a sample, of a row that may say how its images are read. Raises `BadSample`."""
    options = {name: as_numbers(row[name]) for name in ROW_OPTIONS if row.get(name) not in (None, "", [])}
    if str(options.get("dates")).lower() in ("true", "false"):  # of tables, too, where everything is text
        options["dates"] = str(options["dates"]).lower() == "true"
    for name, fits in ROW_OPTIONS.items():
        if name in options and not fits(options[name]):
            raise BadSample(f"whose `{name}` cannot be read", f"{json.dumps(options[name])}")
    if "budgets" in options and is_one_budget(options["budgets"]) != is_one_budget(budgets):
        raise BadSample(
            "with budgets of another kind",
            f"{options['budgets']}, but the run has {budgets}: one number, or one per scale",
        )
    if options.get("dates") is False:
        del options["dates"]
    return json.dumps(options) if options else ""


def as_numbers(value):
    """What a row lists, digits in it as numbers: ["3", "2"] -> [3, 2]."""
    if isinstance(value, (list, tuple)):
        return [as_numbers(part) for part in value]
    if isinstance(value, str):
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                pass
    return value


def to_messages(turns, num_images: int, is_plain: bool) -> list[dict]:
    """The turns of a row as messages. Where no turn of a plain row says where its images go, they go first.

    Raises:
        BadSample: no answer, or other numbers of images and of placeholders.
    """
    if not turns or turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise BadSample("without an answer at the end", turns[-1][0] if turns else "no turns")
    placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    if not placeholders and is_plain:
        first = next(idx for idx, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", PLACEHOLDER * num_images + turns[first][1])
        placeholders = num_images
    if placeholders != num_images:
        raise BadSample(f"with other numbers of {PLACEHOLDER} and of images", f"{placeholders} and {num_images}")
    if any(PLACEHOLDER in text for role, text in turns if role != "user"):
        raise BadSample(f"with {PLACEHOLDER} in a turn that is not the user's")
    for number, (role, text) in enumerate(turns, 1):
        if not text.strip():
            raise BadSample("with an empty turn", f"turn {number}, {role}")
    return [{"role": role, "content": split_text(text)} for role, text in turns]


def split_answers(sample: dict) -> list[dict]:
    """A sample for each answered question of a chat: the turns up to its answer, and the images that these show.

    "What?" "Red." "Where?" "Here."  ->  "What?" "Red."  and  "What?" "Red." "Where?" "Here."
    """
    messages, found = sample["messages"], []
    answered = answered_turns(messages) or [len(messages) - 1]
    for number, idx in enumerate(answered, 1):
        turns = messages[: idx + 1]
        num_images = sum(part["type"] == "image" for turn in turns for part in as_parts(turn))
        cut = {name: sample[name][:num_images] for name in ("images", "regions")}
        name = sample["name"] + f", answer {number}" * (len(answered) > 1)
        found.append({**sample, **cut, "messages": turns, "name": name})
    return found


def lies_somewhere(image) -> bool:
    """Whether an image, a path or a file's bytes, is a raster, which may say where it lies; of a URL nobody asks."""
    if isinstance(image, bytes):
        return is_raster(image[:16])
    if "://" in image:
        return False
    with open(image, "rb") as file:
        return is_raster(file.read(16))


# ---- Samples --------------------------------------------------------------------------------------------------------


@dataclass
class SampleReader:
    """A row of the data -> a sample, or what is wrong with it.

    Attributes:
        processor: [`UHRBatProcessor`].
        budgets: int[S] or int, the largest that a prompt may spend.
        max_length: tokens of the longest sample that is trained on.
        regions: folder of label maps, or None.
        sample_per: "question" or "chat".
        budget_factor: the largest by which a row's own budgets are multiplied; `budgets` are already.
    """

    processor: object
    budgets: list[int] | int
    max_length: int
    regions: Path | None = None
    sample_per: str = "question"
    budget_factor: float = 1.0

    def __post_init__(self):
        self.writer = ChatWriter(self.processor)

    def __call__(self, row: dict, row_idx: int, source: str, image_folder: str) -> dict:
        name = f"{source}, row {row_idx + 1}"
        sample = {"messages": [], "images": [], "regions": [], "options": "", "lengths": [], "name": name}
        sample |= {"kind": "", "detail": ""}
        try:
            if row.get("row_kind"):
                raise BadSample(row["row_kind"], row["row_detail"])
            row = json.loads(row["row_json"]) if "row_json" in row else row
            turns, named = read_turns(row)
            images = [self.find_image(image, Path(image_folder)) for image in read_images(row, named)]
            is_plain = not talk_of(row)
            messages = to_messages(turns, len(images), is_plain)
            regions = [self.find_regions(image) for image in images] if self.regions else []
            options = read_options(row, self.budgets)
            whole = sample | {"messages": messages, "images": images, "regions": regions, "options": options}
            if "dates" in (own := read_own(whole)):
                self.check_dates(whole, own)
            own = own.get("budgets")
            budgets = self.budgets if own is None else scale_budgets(own, self.budget_factor)
            lengths = [self.count_tokens(part["messages"], len(part["images"]), budgets) for part in self.split(whole)]
            sample = whole | {"lengths": lengths}
        except BadSample as problem:
            sample |= {"kind": problem.kind, "detail": problem.detail}
        return sample

    def check_dates(self, sample: dict, own: dict):
        """Raises `BadSample` where what is compared is not two images of one place. Pictures, which lie nowhere, stay closed."""
        try:
            check_dates([len(part["images"]) for part in split_answers(sample)], allowed=(2,))
        except ValueError as error:
            raise BadSample("whose `dates` are not two images", str(error)) from error
        images = [as_image(image) for image in sample["images"]]
        reading = {name: value for name, value in own.items() if name not in ("budgets", "dates")}
        if reading or any(map(lies_somewhere, images)):
            try:
                open_dates(partial(self.processor.image_processor.open_image, **reading), *reversed(images))
            except (OSError, ValueError) as error:
                raise BadSample("whose `dates` cannot be compared", str(error)) from error

    def split(self, sample: dict) -> list[dict]:
        """The samples of a chat."""
        return split_answers(sample) if self.sample_per == "question" else [sample]

    def split_batch(self, columns: dict) -> dict:
        """Columns of chats -> columns of samples, each with its own length."""
        found = {name: [] for name in [*columns, "length", "answers"] if name not in ("lengths", "kind", "detail")}
        for values in zip(*columns.values()):
            chat = dict(zip(columns, values))
            for part, length in zip(self.split(chat), chat.pop("lengths")):
                part |= {"length": length, "answers": "last" if self.sample_per == "question" else "all"}
                for name, column in found.items():
                    column.append(part[name])
        return found

    def find_image(self, image: dict, folder: Path) -> dict:
        """The image with its whole path; a URL and what is in the table are taken as they are."""
        path = image.get("path")
        if image.get("bytes") is not None or path is not None and "://" in path:
            return {"path": path, "bytes": image.get("bytes")}
        # Names of UHR-BAT-SFT-10K begin in the folder of its table, or in `images` there.
        within = (path, f"images/{path}", path.removeprefix("images/")) if image.get("within") else (path,)
        for name in within if path is not None else ():
            try:
                if (folder / name).is_file():
                    return {"path": str(folder / name), "bytes": None}
            except (OSError, ValueError):  # no name that a file can have
                break
        raise BadSample("whose image is missing", f"{str(folder / str(path))[:300]}: there is no such file")

    def find_regions(self, image: dict) -> str:
        path = self.regions / name_output(Path(image["path"] or ""))
        if not path.is_file():
            raise BadSample("whose label map is missing", f"{path}: there is no such file")
        return str(path)

    def count_tokens(self, messages: list[dict], num_images: int, budgets) -> int:
        """Tokens of a sample, its images as large as the scales are. Raises `BadSample` where they are too many."""
        image_processor = self.processor.image_processor
        try:
            ids, _ = self.writer.write(messages, self.sample_per == "chat")
        except ChatError as error:
            raise BadSample("that cannot be written", str(error)) from error
        placeholders = ids.count(self.processor.image_token_id)
        if placeholders != num_images:  # some other spelling of the token
            raise BadSample(f"with other numbers of {self.processor.image_token} and of images", f"{placeholders}")
        scales = image_processor.scales
        available = [[(scale // image_processor.patch_size) ** 2 for scale in scales]] * num_images
        try:
            counts = count_tokens(budgets, scales, [num_images], available) if num_images else []
        except ValueError as error:  # more images than a scale may spend tokens
            kind = "with too many images for the budgets" if budgets is self.budgets else "whose `budgets` do not fit"
            raise BadSample(kind, str(error)) from error
        length = len(ids) - num_images + sum(map(sum, counts))
        if length > self.max_length:
            raise BadSample(
                "that are too long", f"{length} tokens with {sum(map(sum, counts))} visual ones, over {self.max_length}"
            )
        return length


def open_table(source: str, split: str):
    """A file (JSON, JSON lines, CSV, TSV, parquet), a folder that `save_to_disk` wrote, or a data set of the Hub or of a
    folder, with files left closed. Raises `FileNotFoundError`, or `ValueError` for what cannot be read."""
    require("train", "datasets")
    from datasets import Dataset, Features, Value, load_dataset, load_from_disk

    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (*TEXT_FILES, ".parquet") and not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file of training data.")
    if path.is_file() and suffix not in (*TEXT_FILES, ".parquet"):
        raise ValueError(f"{source}: a file of training data ends in {', '.join(TEXT_FILES)} or .parquet.")
    if suffix in TEXT_FILES:
        stat = path.stat()
        return Dataset.from_generator(
            read_rows,
            features=Features(dict.fromkeys(COLUMNS, Value("large_string"))),
            gen_kwargs={"path": str(path.absolute()), "stamp": (stat.st_mtime_ns, stat.st_size, ROWS_VERSION)},
        )
    if suffix == ".parquet":
        try:
            table = load_dataset("parquet", data_files=str(source), split="train")
        except Exception as error:  # whatever pyarrow and datasets raise for a file that is none
            columns = zip(COLUMNS, ("", "that are no parquet", str(error.__cause__ or error)))
            table = Dataset.from_list([dict(columns)])
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        table = load_from_disk(source)
        if isinstance(table, dict):
            if split not in table:
                raise ValueError(f"{source}: there is no split {split}. There are: {', '.join(table)}.")
            table = table[split]
    else:
        try:
            table = load_dataset(source, split=split)
        except (FileNotFoundError, ConnectionError):  # they say what is missing
            raise
        except Exception as error:  # whatever datasets raises for what it cannot read
            raise ValueError(f"{source}: it cannot be read as a data set ({error.__cause__ or error}).") from error
    return leave_files_closed(table)


def metadata_of(source: str, split: str) -> str:
    """The table of a folder of images, as UHR-BAT-SFT-10K's train/metadata.parquet; other sources as they are."""
    names = (Path(source, split, "metadata.parquet"), Path(source, "metadata.parquet"))
    return next((str(name) for name in names if name.is_file()), source)


def split_share(source: str) -> tuple[str, float]:
    """(source, times that its samples are taken) of "b.csv:0.5"; once where nothing is said.

    Raises:
        ValueError: no number of times that could be meant.
    """
    name, colon, number = str(source).rpartition(":")
    if not colon or not re.fullmatch(r"[-+]?\d*\.?\d+(e-?\d+)?", number) or Path(source).exists():
        return str(source), 1.0
    if not 0 < float(number) <= MOST_TIMES:
        raise ValueError(
            f"{source}: behind the colon stands how often its samples are taken, more than 0 and at most {MOST_TIMES}: "
            f"0.5 is a half of them. Got {number}."
        )
    return name, float(number)


def take_share(samples, times: float, seed: int):
    """The samples `times` times: whole ones as they are, and of the rest some at random. At least one."""
    if times == 1:
        return samples
    whole, rest = divmod(round(times * len(samples)) or 1, max(len(samples), 1))
    drawn = np.random.default_rng(seed).permutation(len(samples))[:rest]
    return samples.select([*range(len(samples))] * whole + sorted(drawn.tolist()))


def load_samples(
    sources: str | list[str],
    processor,
    *,
    budgets: list[int] | int | None = None,
    max_length: int | None = None,
    image_folder: str | Path | None = None,
    regions: str | Path | None = None,
    bad_samples: str = "error",
    split: str = "train",
    num_proc: int | None = None,
    sample_per: str = "question",
    budget_factor: float = 1.0,
    seed: int = 0,
):
    """Samples for [`UHRBatDataCollator`], a `datasets.Dataset`: every row is checked, and no image is decoded.

    Args:
        sources: files (JSON, JSON lines, CSV, TSV, parquet), folders of `save_to_disk`, or data sets of the Hub; several are taken
            together. "b.csv:0.5" takes a half of its samples, at random, "b.csv:2" each twice.
        processor: [`UHRBatProcessor`].
        budgets: the largest that a prompt may spend, the processor's if None.
        max_length: tokens of the longest sample, text and visual ones; the context window if None.
        image_folder: what paths of images start from; the folder of their file if None.
        regions: folder of the label maps of all images (`uhr-bat regions`).
        bad_samples: "error", or "skip": they are left out, and counted in the log.
        split: of a data set that is no file.
        num_proc: processes that check.
        sample_per: "question": each answered question of a conversation is a sample, with the turns before as text and the
            visual tokens that it needs, as in `generate`. "chat": a conversation is one sample; all of its answers are learnt
            from the visual tokens that its first question needs, which `generate` does for none but the first.
        budget_factor: the largest by which a row's own budgets will be multiplied.
        seed: of the samples that a share takes.

    Raises:
        ValueError: there are bad samples; counts them by what is wrong, and names the first ones of each kind.
        FileNotFoundError: there is no such file.
    """
    if bad_samples not in ("error", "skip"):
        raise ValueError(f"`bad_samples` is 'error' or 'skip'. Got {bad_samples!r}.")
    if sample_per not in ("question", "chat"):
        raise ValueError(f"`sample_per` is 'question' or 'chat'. Got {sample_per!r}.")
    require("train", "datasets")
    from datasets import concatenate_datasets

    reader = SampleReader(
        processor,
        processor.default_budgets if budgets is None else budgets,
        min(max_length or processor.tokenizer.model_max_length, processor.tokenizer.model_max_length),
        None if regions is None else Path(regions),
        sample_per,
        budget_factor,
    )
    named = [*map(split_share, [sources] if isinstance(sources, (str, Path)) else sources)]
    tables = [check_rows(source, split, reader, image_folder, num_proc) for source, _ in named]
    if report := describe_problems(concatenate_datasets(tables)):
        if bad_samples == "error":
            raise ValueError(f"{report}\nCorrect them, or leave them out with `bad_samples: skip`.")
        logger.warning(f"{report}\nThey are left out.")
    parts = []
    for rows, (_, times) in zip(tables, named):
        rows = rows.filter(lambda kind: not kind, input_columns="kind", load_from_cache_file=False)
        if len(rows):
            parts.append(take_share(split_rows(rows, reader, num_proc), times, seed))
    if not parts:
        raise ValueError(f"{', '.join(source for source, _ in named)}: no sample is left to train on.")
    samples = concatenate_datasets(parts)
    check_region_files(samples)
    return samples


def _columns() -> dict:
    """What a sample holds, by name, as a table of `datasets` has it."""
    from datasets import Image, List, Value

    text = Value("string")
    content = List({"type": text, "text": text})
    return {
        "messages": List({"role": text, "content": content}), "images": List(Image(decode=False)),
        "regions": List(text), "options": text, "name": text,
    }  # fmt: skip


def check_rows(source: str, split: str, reader: SampleReader, image_folder, num_proc):
    """What a reader says of every row of a source: of one that cannot be trained on its `kind` and `detail`, too."""
    from datasets import Features, List, Value

    text, source = Value("string"), metadata_of(source, split)
    features = Features({**_columns(), "lengths": List(Value("int64")), "kind": text, "detail": text})
    table, place = open_table(source, split), Path(source)
    folder = image_folder or (place if place.is_dir() else place.parent if place.is_file() else ".")
    return table.map(
        reader,
        with_indices=True,
        fn_kwargs={"source": str(source), "image_folder": str(folder)},
        features=features,
        remove_columns=[name for name in table.column_names if name not in features],
        num_proc=num_proc,
        load_from_cache_file=False,  # an image that was missing may be there now
        desc=f"Checking {source}",
    )


def split_rows(rows, reader: SampleReader, num_proc):
    """The samples of rows that can be trained on."""
    from datasets import Features, Value

    return rows.map(
        reader.split_batch,
        batched=True,
        features=Features({**_columns(), "length": Value("int64"), "answers": Value("string")}),
        remove_columns=["lengths", "kind", "detail"],
        num_proc=num_proc,
        load_from_cache_file=False,
        desc=f"A sample for each {reader.sample_per}",
    )


def check_region_files(samples):
    """Raises `ValueError` where two images would share a label map, which is named as its image without the folder."""
    images = {}
    for paths, files in zip(samples["regions"][:], samples["images"][:]):
        for path, image in zip(paths, files):
            if images.setdefault(path, image["path"]) != image["path"]:
                raise ValueError(f"{path} would be the label map of {images[path]} and of {image['path']}: rename one.")


def describe_problems(samples) -> str:
    """How many samples cannot be trained on, by what is wrong, and the first ones of each kind; "" if all can."""
    kinds, details, names = samples["kind"][:], samples["detail"][:], samples["name"][:]
    counts = Counter(kind for kind in kinds if kind)
    if not counts:
        return ""
    lines = [f"{counts.total()} of {len(samples)} samples cannot be trained on:"]
    for kind, count in counts.most_common():
        found = [f"    {name}: {detail}" for its_kind, name, detail in zip(kinds, names, details) if its_kind == kind]
        lines += [f"  {count} {kind}", *found[:NAMED], *["    ..."] * (count > NAMED)]
    return "\n".join(lines)
