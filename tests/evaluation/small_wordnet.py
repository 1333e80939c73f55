"""The smallest WordNet that nltk reads: a few nouns, in the form of WordNet 3.0's files."""

from pathlib import Path

EMPTY = (
    "index.adj", "index.adv", "index.verb", "index.sense", "data.adj", "data.adv", "data.verb", "cntlist.rev",
    "adj.exc", "adv.exc", "verb.exc",
)  # fmt: skip
SYNSETS = (("car", "automobile"), ("ship",), ("two", "2", "ii"), ("tennis_court",), ("area",), ("ship", "area"))


def write(nltk_data: Path):
    """`corpora/wordnet` below a folder of nltk's path; "ships" is a plural that morphy knows."""
    folder = nltk_data / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in EMPTY:
        (folder / name).write_text("")
    (folder / "lexnames").write_text("".join(f"{number:02}\tnoun.{number}\t1\n" for number in range(4)))
    (folder / "noun.exc").write_text("")
    data, of_word = "", {}
    for words in SYNSETS:
        offset = f"{len(data):08d}"
        data += f"{offset} 03 n {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 | a gloss  \n"
        for word in words:
            of_word.setdefault(word, []).append(offset)
    (folder / "data.noun").write_text(data)
    lines = (f"{word} n {len(found)} 0 {len(found)} 0 {' '.join(found)}  \n" for word, found in sorted(of_word.items()))
    (folder / "index.noun").write_text("".join(lines))
