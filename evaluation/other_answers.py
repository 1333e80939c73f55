"""Answers that another program wrote, by stated rules. The field of the right answer is never read as the model's.

| file | who writes it | the sample | the answer |
|---|---|---|---|
| JSON, JSONL with `filtered_resps` or `resps` | lmms-eval, `--log_samples` | `doc_id`, the row in the data | `filtered_resps`, else `resps` |
| XLSX, TSV, CSV, JSON with `prediction` | VLMEvalKit | `index` | `prediction` |
| JSON, JSONL, TSV, CSV of one's own | anybody | `id`, `question_id`, `Question_id` or `index` | a field of `SAID`; `answer` where nothing else can be meant |
| predictions.jsonl | `uhr-bat evaluate` | `id` | `answer` of the view with the image |

`answer` is the model's where no record has it beside another answer's field, beside a question or its options, or beside a
text of a field that is not known here: that may be the model's. What the file says of the question, its options and the right
answer is held against the data: answers to other questions are refused.
"""

import warnings
from pathlib import Path
from string import ascii_uppercase

from ..common.answers import option_lines, plain, right_letters
from ..common.extras import require
from .running import IMAGE
from .samples import first, option_columns, read_lines, text_of

LMMS = ("filtered_resps", "resps")
SAID = (
    "prediction", "pred", "Output", "output", "response", "model_answer", "model_output", "generated_text", "predict", "predicted",
    "predicted_answer", "model_prediction", "model_response", "generated_answer", "completion",
)  # fmt: skip
IDS = ("id", "question_id", "Question_id", "index", "sample_id")
RIGHT = (
    "ground_truth",
    "Ground truth",
    "gt_answer",
    "gt",
    "target",
    "label",
    "gold",
    "correct_answer",
    "answer_key",
    "gt_option",
)
ASKED = ("question", "Question", "Text", "prompt", "input")
OPTIONS = ("options", "multi-choice options", "Answer choices", "choices", "A", "B")
LLAVA = ("prompt", "answer_id", "model_id", "metadata")  # beside `text`, the answer of LLaVA's own scripts
# Fields beside `answer` that are no answer of anybody's.
NEUTRAL = {
    "image", "images", "Image", "image_id", "image_path", "category", "Category", "l2-category", "cycle_category", "task", "Task",
    "subtask", "Subtask", "type", "question_type", "Question Type", "dataset", "split", "source", "suite", "model", "model_id",
    "answer_id", "metadata", "view", "error", "hint", "asked",
}  # fmt: skip
FAILED = "Failed to obtain answer via API."  # what VLMEvalKit writes where a model gave none
SUFFIXES = (".xlsx", ".tsv", ".csv", ".json", ".jsonl")


def read_answers(path: Path) -> list[dict]:
    """Records of a file.

    Raises:
        ValueError: no records, or a kind of file that is not read; pickle is not, as it runs what is in it.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in (".pkl", ".pickle"):
        raise ValueError(
            f"{path}: a pickle runs what is in it and is not read. VLMEvalKit writes tables with PRED_FORMAT=tsv or xlsx."
        )
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: answers are read from {', '.join(SUFFIXES)}.")
    if kind in (".json", ".jsonl"):
        records = read_lines(path)
    else:
        require("evaluate", "pandas", "openpyxl")
        import pandas

        options = {"dtype": object, "keep_default_na": False, "na_filter": False}
        try:
            if kind == ".xlsx":
                table = pandas.read_excel(path, engine="openpyxl", **options)
            else:
                options |= {
                    "dtype": str,
                    "index_col": False,
                    "on_bad_lines": "error",
                    "encoding": "utf-8-sig",
                    "sep": "\t" if kind == ".tsv" else ",",
                }
                with warnings.catch_warnings():  # of cells that are one too many
                    warnings.simplefilter("error", pandas.errors.ParserWarning)
                    table = pandas.read_csv(path, **options)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: this is no table that can be read ({error}).") from error
        records = table.to_dict("records")
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} holds no records of answers.")
    return [{str(name): value for name, value in record.items()} for record in records]


def field_of(path, records) -> tuple[str, ...]:
    """The fields, the first that a record has, that hold the model's answers in a file.

    Raises:
        ValueError: none can be meant, and why.
    """
    fields = set().union(*records)
    if found := [name for name in LMMS if name in fields]:
        return tuple(found)
    if all("view" in record for record in records):
        return ("answer",)
    # Beside "instruction", "output" is the right answer, as in the files that are trained on.
    said = [name for name in SAID if name in fields and not (name == "output" and "instruction" in fields)]
    if "text" in fields and set(LLAVA) & fields and not {"answer", "ground_truth", *said} & fields:
        return ("text",)
    both = any("answer" in record and any(name in record for name in said) for record in records)
    beside = sorted(fields & {*ASKED[:3], *OPTIONS})
    if "answer" in fields and not both and not (beside and not set(RIGHT) & fields):
        if not said and (
            unknown := sorted(name for name in fields - KNOWN if any(holds_text(one.get(name)) for one in records))
        ):
            raise ValueError(
                f"{path}: beside {', '.join(unknown)} it is not told whether the field answer is the model's or the right one. Call the "
                'model\'s answers "prediction".'
            )
        return (*said, "answer")
    if said:
        return tuple(said)
    if "answer" in fields:
        raise ValueError(
            f"{path}: beside {', '.join(beside)}, the field answer is the right one, and there is none of the model's "
            f"({', '.join(SAID)})."
        )
    raise ValueError(
        f"{path} has no field of the model's answers: one of {', '.join((*LMMS, *SAID, 'answer'))}. Its fields are "
        f"{sorted(fields)}."
    )


KNOWN = {"answer", *SAID, *IDS, *RIGHT, *ASKED, *OPTIONS, *ascii_uppercase} - {"output"} | NEUTRAL


def holds_text(value) -> bool:
    return isinstance(value, (str, list, dict)) and bool(value)


def said_by(path, record, fields) -> tuple[str | None, str | None]:
    """(answer, None) of a record, or (None, why there is none)."""
    present = [name for name in fields if name in record]
    if record.get("error") and isinstance(record["error"], (str, bool)):
        return None, str(record["error"])
    if not present:
        raise ValueError(f"{path}: a record has none of the fields {list(fields)}: its fields are {sorted(record)}.")
    value = record[present[0]]
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, tuple, dict)) and value:
        raise ValueError(
            f"{path}: {present[0]} holds {len(value)} values for a sample, as likelihoods of options or several tries do. An "
            "answer is one text."
        )
    if value is None or value in ([], (), {}) or isinstance(value, float) and value != value:
        return None, f"the field {present[0]} is empty"
    text = text_of(value).encode("utf-8", "replace").decode()  # half a character is none
    return (None, text) if text.startswith(FAILED) else (text, None)


def other_answers(path, samples, unlimited=None) -> dict:
    """{(sample, view): line} of the answers in a file, see the module. Samples without a record failed.

    Args:
        unlimited: all samples of the data where `samples` are some of them: answers to the others are left.

    Raises:
        ValueError: no field of answers, two answers to one sample, samples that the suite does not have, or another
        question.
    """
    records = read_answers(path)
    fields = field_of(path, records)
    lmms = set(fields) & set(LMMS)
    of = {}
    for sample in unlimited or samples:
        name = str(sample.row) if lmms else sample.id
        if name in of:
            raise ValueError(
                f"{path} names rows of the data, but row {name} has several questions: give lines with `id`."
            )
        of[name] = sample
    found, unknown = {}, set()
    for record in records:
        if record.get("view", IMAGE) != IMAGE:  # a run's own file has its controls, too
            continue
        name = text_of(first(record, *(("doc_id",) if lmms else IDS))).strip()
        # Tables make 3.0 of 3 where a row has no number.
        sample = of.get(name) or of.get(name.removesuffix(".0"))
        if sample is None:
            unknown.add(name)
            continue
        if sample.id in found:
            raise ValueError(f"{path} answers {name!r} twice: give one answer a sample.")
        check_question(path, record, sample, fields)
        found[sample.id] = said_by(path, record, fields)
    if unknown:
        raise ValueError(f"{path} answers {len(unknown)} samples that the suite does not have, as {min(unknown)!r}.")
    if not found:
        raise ValueError(f"{path} holds no answer with the image.")
    lines = {}
    for sample in samples:
        said, error = found.get(sample.id, (None, "no answer in the file"))
        lines[sample.id, IMAGE] = {"id": sample.id, "view": IMAGE, "answer": said, "error": error}
    return lines


def check_question(path, record, sample, fields):
    """Raises `ValueError` where a record says of its question or right answer what the sample does not."""
    if isinstance(record.get("doc"), dict):  # lmms-eval's, with its record of the data
        check_question(path, record["doc"], sample, ())
    check_options(path, record, sample)
    wanted = squeezed(sample.question)
    for name in () if "view" in record else ASKED:  # a run's own lines hold the name of the prompt
        text = record.get(name)
        if isinstance(text, str) and text.strip() and name not in fields:
            asked = squeezed(text)
            if wanted not in asked and asked not in wanted:
                raise ValueError(
                    f"{path} answers another question than {sample.id!r}: {text[:120]!r}, not {sample.question[:120]!r}."
                )
    right = [name for name in RIGHT if name in record] + (["answer"] if "answer" not in fields else [])
    for name in right:
        value = record.get(name)
        if value is None or isinstance(value, float) and value != value or not text_of(value).strip():
            continue
        if not same_answer(text_of(value), sample):
            raise ValueError(
                f"{path} answers another question than {sample.id!r}: its {name} is {text_of(value)[:80]!r}, that of the data "
                f"{sample.answer[:80]!r}."
            )


def check_options(path, record, sample):
    """Raises `ValueError` where an option of the sample has another letter in a record: it says "B" of another one."""
    lists = [record[name] for name in OPTIONS[:-2] if isinstance(record.get(name), (list, tuple))]
    there = option_lines([text_of(one) for one in lists[0]] if lists else option_columns(record))
    here = {letter: squeezed(text) for letter, text in option_lines(sample.options).items()}
    for letter, text in there.items():
        if here.get(letter) != squeezed(text) and squeezed(text) in here.values():
            raise ValueError(
                f"{path} answers {sample.id!r} with its options in another order: its {letter} is {text[:80]!r}. Its letters "
                "are not those of the data."
            )


def same_answer(text: str, sample) -> bool:
    if sample.options:
        try:
            return right_letters(text, option_lines(sample.options), several=True) == "".join(sorted(sample.answer))
        except ValueError:
            return False
    return plain(text) == plain(sample.answer)


def squeezed(text: str) -> str:
    """Without placeholders of images and spaces."""
    return "".join(text.replace("<image>", "").lower().split())
