"""Training data: conversations about images, read by `datasets` and checked before the first step.

A row of the data is one of

    {"image": "a.tif" or ["a.tif", "b.tif"], "conversations": [{"from": "human", "value": "<image>\\nHow many ships?"},
                                                              {"from": "gpt", "value": "Three."}]}
    {"image": ..., "messages": [{"role": "user", "content": "<image>\\nHow many ships?"}, ...]}
    {"image": ..., "question": "How many ships?", "answer": "Three."}

and `image` may be missing (`images` is the same). Every answered question of a conversation is a sample of its own, so that
its selection is the one that `generate` makes. A sample, which the collator takes, is

    messages   turns as chat templates take them: role, and content as parts of the types "image" and "text"
    images     a path, or the bytes of a file, for each part of the type "image"
    answers    "last": the last turn is learnt; "all": every turn of the assistant's
    regions    paths of their label maps (`uhr-bat regions`), where there are any
    length     tokens of the sample with its visual tokens, at most
    name       file and row, for messages
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..budgets_uhr_bat import count_tokens
from ..common.chats import ChatError, ChatWriter, answered_turns, as_parts
from ..common.data_tables import leave_files_closed
from ..common.extras import require
from ..regions.cache import name_output

logger = logging.get_logger(__name__)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
NAMED = 5  # bad samples of each kind that a message names


class BadSample(ValueError):
    """What is wrong with a sample: its kind, and what is to be seen in this one."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


# ---- A row ----------------------------------------------------------------------------------------------------------


def split_text(text: str, image_token: str = "<image>") -> list[dict]:
    """Parts of a turn: "<image>\\nHow many?" -> [{"type": "image"}, {"type": "text", "text": "How many?"}].

    Around an image, line breaks are the chat template's. Text without an image stays as it is.
    """
    if image_token not in text:
        return [{"type": "text", "text": text}]
    parts = []
    for piece in text.split(image_token):
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        parts += [{"type": "image", "text": None}]
    return parts[:-1]  # one image between two pieces


def join_parts(content, image_token: str = "<image>"):
    """The inverse of `split_text`; what is no list of parts stays what it is."""
    if not isinstance(content, list):
        return content
    return "\n".join(image_token if part.get("type") == "image" else str(part.get("text")) for part in content)


def read_turns(row: dict) -> list[tuple[str, str]]:
    """(role, text) of each turn. Raises `BadSample`."""
    if row.get("conversations") is not None:
        turns = [(turn.get("from"), turn.get("value")) for turn in row["conversations"]]
    elif row.get("messages") is not None:
        turns = [(turn.get("role"), join_parts(turn.get("content"))) for turn in row["messages"]]
    elif row.get("question") is not None:
        turns = [("user", row["question"]), ("assistant", row.get("answer"))]
    else:
        raise BadSample("without `conversations`, `messages` or `question`", f"columns: {', '.join(row)}")
    for role, text in turns:
        if role not in ROLES:
            raise BadSample("with an unknown role", f"{role!r} is none of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise BadSample("with a turn that is no text", f"{role}: {text!r}")
    return [(ROLES[role], text) for role, text in turns]


def read_images(row: dict) -> list[dict]:
    """[{"path": ..., "bytes": ...}] of a row whose images are paths, or files in the table."""
    images = row.get("images") if row.get("image") is None else row["image"]
    images = images if isinstance(images, list) else [] if images is None else [images]
    return [image if isinstance(image, dict) else {"path": str(image), "bytes": None} for image in images]


def to_messages(row: dict, num_images: int, image_token: str) -> list[dict]:
    """The turns of a row as messages. Where no turn says where its images go, those of a plain row go first.

    Raises:
        BadSample: no answer, or other numbers of images and of placeholders.
    """
    turns = read_turns(row)
    if not turns or turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise BadSample("without an answer at the end", turns[-1][0] if turns else "no turns")
    placeholders = sum(text.count(image_token) for _, text in turns)
    if not placeholders and row.get("conversations") is None and row.get("messages") is None:
        turns[0] = (turns[0][0], image_token * num_images + turns[0][1])
        placeholders = num_images
    if placeholders != num_images:
        raise BadSample(f"with other numbers of {image_token} and of images", f"{placeholders} and {num_images}")
    if any(image_token in text for role, text in turns if role != "user"):
        raise BadSample(f"with {image_token} in a turn that is not the user's")
    return [{"role": role, "content": split_text(text, image_token)} for role, text in turns]


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
    """

    processor: object
    budgets: list[int] | int
    max_length: int
    regions: Path | None = None
    sample_per: str = "question"

    def __post_init__(self):
        self.writer = ChatWriter(self.processor)

    def __call__(self, row: dict, row_idx: int, source: str, image_folder: str) -> dict:
        name = f"{source}, row {row_idx + 1}"
        sample = {"messages": [], "images": [], "regions": [], "lengths": [], "name": name, "kind": "", "detail": ""}
        try:
            images = [self.find_image(image, Path(image_folder)) for image in read_images(row)]
            messages = to_messages(row, len(images), self.processor.image_token)
            regions = [self.find_regions(image) for image in images] if self.regions else []
            whole = sample | {"messages": messages, "images": images, "regions": regions}
            lengths = [self.count_tokens(one["messages"], len(one["images"])) for one in self.split(whole)]
            sample = whole | {"lengths": lengths}
        except BadSample as problem:
            sample |= {"kind": problem.kind, "detail": problem.detail}
        return sample

    def split(self, sample: dict) -> list[dict]:
        """The samples of a chat."""
        return split_answers(sample) if self.sample_per == "question" else [sample]

    def split_batch(self, columns: dict) -> dict:
        """Columns of chats -> columns of samples, each with its own length."""
        found = {name: [] for name in [*columns, "length", "answers"] if name != "lengths"}
        for values in zip(*columns.values()):
            chat = dict(zip(columns, values))
            for one, length in zip(self.split(chat), chat.pop("lengths")):
                one |= {"length": length, "answers": "last" if self.sample_per == "question" else "all"}
                for name, column in found.items():
                    column.append(one[name])
        return found

    def find_image(self, image: dict, folder: Path) -> dict:
        """The image with its whole path; a URL and what is in the table are taken as they are."""
        path = image.get("path")
        if image.get("bytes") is not None or path is not None and "://" in path:
            return {"path": path, "bytes": image.get("bytes")}
        if path is None or not (folder / path).is_file():
            raise BadSample("whose image is missing", f"{folder / str(path)}: there is no such file")
        return {"path": str(folder / path), "bytes": None}

    def find_regions(self, image: dict) -> str:
        path = self.regions / name_output(Path(image["path"] or ""))
        if not path.is_file():
            raise BadSample("whose label map is missing", f"{path}: there is no such file")
        return str(path)

    def count_tokens(self, messages: list[dict], num_images: int) -> int:
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
            counts = count_tokens(self.budgets, scales, [num_images], available) if num_images else []
        except ValueError as error:  # more images than a scale may spend tokens
            raise BadSample("with too many images for the budgets", str(error)) from error
        length = len(ids) - num_images + sum(map(sum, counts))
        if length > self.max_length:
            raise BadSample(
                "that are too long", f"{length} tokens with {sum(map(sum, counts))} visual ones, over {self.max_length}"
            )
        return length


def open_table(source: str, split: str):
    """A file of JSON, JSON lines, parquet or CSV, or a data set of the Hub or of a folder, with files left closed."""
    require("train", "datasets")
    from datasets import load_dataset

    suffix = Path(source).suffix
    if suffix in FILE_TYPES:
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: there is no such file of training data.")
        table = load_dataset(FILE_TYPES[suffix], data_files=str(source), split="train")
    else:
        table = load_dataset(source, split=split)
    return leave_files_closed(table, ("image", "images"))


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
):
    """Samples for [`UHRBatDataCollator`], a `datasets.Dataset`: every row is checked, and no image is decoded.

    Args:
        sources: files (JSON, JSON lines, parquet, CSV), or data sets of the Hub; several are taken together.
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

    Raises:
        ValueError: there are bad samples; counts them by what is wrong, and names the first ones of each kind.
        FileNotFoundError: there is no such file.
    """
    if bad_samples not in ("error", "skip"):
        raise ValueError(f"`bad_samples` is 'error' or 'skip'. Got {bad_samples!r}.")
    if sample_per not in ("question", "chat"):
        raise ValueError(f"`sample_per` is 'question' or 'chat'. Got {sample_per!r}.")
    require("train", "datasets")
    from datasets import Features, Image, List, Value, concatenate_datasets

    text = Value("string")
    part = {"type": text, "text": text}
    features = {
        "messages": List({"role": text, "content": List(part)}), "images": List(Image(decode=False)),
        "regions": List(text), "lengths": List(Value("int64")), "name": text, "kind": text, "detail": text,
    }  # fmt: skip
    reader = SampleReader(
        processor,
        processor.default_budgets if budgets is None else budgets,
        min(max_length or processor.tokenizer.model_max_length, processor.tokenizer.model_max_length),
        None if regions is None else Path(regions),
        sample_per,
    )
    tables = []
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        table = open_table(str(source), split)
        folder = image_folder or (Path(source).parent if Path(source).is_file() else ".")
        samples = table.map(
            reader,
            with_indices=True,
            fn_kwargs={"source": str(source), "image_folder": str(folder)},
            features=Features(features),
            remove_columns=[name for name in table.column_names if name not in features],
            num_proc=num_proc,
            load_from_cache_file=False,  # an image that was missing may be there now
            desc=f"Checking {source}",
        )
        tables.append(samples)
    samples = concatenate_datasets(tables)
    if report := describe_problems(samples):
        if bad_samples == "error":
            raise ValueError(f"{report}\nCorrect them, or leave them out with `bad_samples: skip`.")
        logger.warning(f"{report}\nThey are left out.")
    samples = samples.filter(lambda kind: not kind, input_columns="kind", load_from_cache_file=False)
    if not len(samples):
        raise ValueError(f"{', '.join(map(str, sources))}: no sample is left to train on.")
    check_region_files(samples)
    samples = samples.remove_columns(["kind", "detail"])
    own = {name: feature for name, feature in features.items() if name in samples.column_names and name != "lengths"}
    return samples.map(
        reader.split_batch,
        batched=True,
        features=Features({**own, "length": Value("int64"), "answers": text}),
        remove_columns="lengths",
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="A sample for each question" if sample_per == "question" else "A sample for each chat",
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
        found = [f"    {name}: {detail}" for one, name, detail in zip(kinds, names, details) if one == kind]
        lines += [f"  {count} {kind}", *found[:NAMED], *["    ..."] * (count > NAMED)]
    return "\n".join(lines)
