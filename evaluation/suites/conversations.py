"""Any file of LLaVA conversations: {"image": ..., "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}.

Every question is asked by itself, about the pictures of its conversation; the answer that follows is the right one.
"""

import re

from ..samples import Sample, first, text_of
from ..scoring import Scorer, read_letters, read_letters_1, read_words, same_letters, same_words
from .suite import Suite

ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")


def letters_alone(text: str) -> bool:
    return re.fullmatch(r"\(?[A-H]\)?(?:[\s,]*\(?[A-H]\)?)*\.?", text.strip()) is not None


def read(sample: Sample, text: str) -> str:
    return read_letters(sample, text) if letters_alone(sample.answer) else read_words(sample, text)


def read_1(sample: Sample, text: str) -> str:
    return read_letters_1(sample, text) if letters_alone(sample.answer) else read_words(sample, text)


def worth(sample: Sample, said: str) -> bool:
    return same_letters(sample, said) if letters_alone(sample.answer) else same_words(sample, said)


def words(turn: dict) -> tuple[str, str]:
    """(role, text) of a turn in LLaVA's or the library's form."""
    content = first(turn, "value", "content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return str(first(turn, "from", "role")), content.replace("<image>", "").strip()


class Conversations(Suite):
    title = "Conversations"
    places = ("", "images", "image")
    anywhere = True
    prompts = {"conversations/as-written-1": lambda sample: sample.question}
    scorers = (
        Scorer(
            "conversations/match-2",
            "Equal words without case and final stop; where the right answer is letters of options, the letters that are "
            "declared last.",
            read,
            worth,
        ),
        Scorer(
            "conversations/match-1",
            "Equal words without case and final stop; where the right answer is letters of options, the same letters.",
            read_1,
            worth,
        ),
    )
    max_new_tokens = 64

    def samples_of(self, record, index, pictures):
        turns = [words(turn) for turn in first(record, "conversations", "messages")]
        shown = pictures(value) if (value := record.get("image") or record.get("images")) else ()
        pairs = [
            (question, answer)
            for (asks, question), (answers, answer) in zip(turns, turns[1:])
            if asks in ASKS and answers in ANSWERS
        ]
        name = text_of(first(record, "id", "question_id", default=index))
        return [
            Sample(
                id=name if len(pairs) == 1 else f"{name}/{turn}",
                pictures=shown,
                question=question,
                answer=answer,
                task=str(first(record, "category", "task", "type", default="questions")),
            )
            for turn, (question, answer) in enumerate(pairs)
        ]
