"""Answers that another program wrote, by stated rules. The field of the right answer is never read as the model's.

| file | who writes it | the sample | the answer |
|---|---|---|---|
| JSON, JSONL with `filtered_resps` or `resps` | lmms-eval, `--log_samples` | `doc_id`, the row in the data | `filtered_resps`, else `resps` |
| XLSX, TSV, CSV, JSON with `prediction` | VLMEvalKit | `index` | `prediction` |
| JSON, JSONL, TSV, CSV of one's own | anybody | `id`, `question_id`, `Question_id` or `index` | a field of `SAID`; `answer` where nothing else can be meant |
| predictions.jsonl | `uhr-bat evaluate` | `id` | `answer` of the view with the image |

`answer` is the model's where no record has it beside another answer's field, or beside a question or its options. What
the file
says of the question and of the right answer is held against the data: answers to other questions are refused.
"""

from pathlib import Path

from ..common.answers import option_lines, plain, right_letters
from ..common.extras import require
from .running import IMAGE
from .samples import first, read_lines, text_of

LMMS = ("filtered_resps", "resps")
SAID = ("prediction", "pred", "Output", "output", "response", "model_answer", "model_output", "generated_text")
IDS = ("id", "question_id", "Question_id", "index", "sample_id")
RIGHT = ("ground_truth", "Ground truth", "gt_answer", "gt", "target", "label", "gold")
ASKED = ("question", "Question", "Text", "prompt", "input")
OPTIONS = ("options", "multi-choice options", "Answer choices", "choices", "A", "B")
LLAVA = ("prompt", "answer_id", "model_id", "metadata")  # beside `text`, the answer of LLaVA's own scripts
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
                options |= {"dtype": str, "encoding": "utf-8-sig", "sep": "\t" if kind == ".tsv" else ","}
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
    said = [name for name in SAID if name in fields]
    if "text" in fields and set(LLAVA) & fields and not {"answer", "ground_truth", *said} & fields:
        return ("text",)
    both = any("answer" in record and any(name in record for name in said) for record in records)
    beside = sorted(fields & {*ASKED[:3], *OPTIONS})
    if "answer" in fields and not both and not (beside and not set(RIGHT) & fields):
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


def said_by(path, record, fields) -> tuple[str | None, str | None]:
    """(answer, None) of a record, or (None, why there is none)."""
    present = [name for name in fields if name in record]
    if record.get("error") and isinstance(record["error"], (str, bool)):
        return None, str(record["error"])
    if not present:
        raise ValueError(f"{path}: a record has none of the fields {list(fields)}: its fields are {sorted(record)}.")
    value = record[present[0]]
    while present[0] in LMMS and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(
            f"{path}: {present[0]} holds {len(value)} values for a sample, as likelihoods of options or several tries do. An "
            "answer is one text."
        )
    if value is None or isinstance(value, float) and value != value:
        return None, f"the field {present[0]} is empty"
    if text_of(value).startswith(FAILED):
        return None, text_of(value)
    return text_of(value), None


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
        name = text_of(first(record, *(("doc_id",) if lmms else IDS)))
        sample = of.get(name)
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
    wanted = squeezed(sample.question)
    for name in ASKED:
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
