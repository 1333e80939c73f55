"""What an answer in words says: the letters of options, a number, words without what does not matter. Pure functions of texts
and numbers.

`options` is {letter: text}, as `option_lines` makes it.
"""

import re
import unicodedata

LETTERS = "ABCDEFGH"  # of options that stand nowhere
# What says that the answer comes now.
DECLARES = re.compile(
    r"\b(?:answers?|options?|choices?)(?:\(s\))?(?:\s{1,4}(?:to|for)\s{1,4}(?:the|this|that)\s{1,4}question)?[\s*_]{0,8}(?:\((?:is|are)\))?"
    r"[\s*_\"']{0,8}(?:is|are|would\s+be|should\s+be|must\s+be|might\s+be|will\s+be|[:=\uff1a]|->|\u2192)"
    r"|\bI(?:\s+would|\s+will|'d|'ll)?\s+(?:choose|select|pick|go\s+with|say)\b"
    r"|(?:\u7b54\u6848|\u6b63\u786e\u9009\u9879)(?:\u662f|\u4e3a|[:\uff1a])|\u9009\u62e9?(?=\s{0,4}[(\uff08]?[A-Za-z][^A-Za-z]|\s{0,4}[A-Z]$)"
    r"|\\boxed|<answer>",
    re.IGNORECASE,
)
FILLERS = re.compile(
    r"(?:[\s*_:=\"'`\[({<\uff1a\uff08$]|\\text|\b(?:is|are|the|option|options|choice|letter|letters|answer|clearly|therefore|thus|most|"
    r"likely|probably|definitely|indeed|correct|best|in|fact|to|be)\b(?!\s*$)){0,24}",
    re.IGNORECASE,
)
CONFIRMS = r"(?:is|are|seems|must be|would be)\s{1,4}(?:the\s{1,4}|clearly\s{1,4}|most\s{1,4}likely\s{1,4}){0,3}(?:correct|right|best|true)\b"
DENIES = (
    r"[\s\])}*]{0,8}(?:is|are|was|can be|seems|looks)?\s{0,4}(?:clearly\s{1,4})?(?:wrong|incorrect|not\b|false|eliminated|excluded|"
    r"ruled\s+out|out\b|unlikely|impossible|isn't|aren't|cannot\b|can't|does\s*n[o']t)"
)
DENIED_BEFORE = (
    r"(?:\b(?:not|cannot|neither|nor|except|excluding|exclude|eliminate|reject|rule\s+out|rather\s+than|instead\s+of|other\s+than)"
    r"|n['\u2019]t)\s{1,4}(?:be\s{1,4}|options?\s{1,4}|choices?\s{1,4}|the\s{1,4}|\w+\s{1,4}(?=[(\uff08])){0,2}"
)
MARKS = " \t\r\n*_\"'`[](){}<>.,:;!$\uff08\uff09\u3002"
# Letters of full width, and marks that nobody sees.
WIDE = {0xFEE0 + ord(letter): letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
WIDE |= dict.fromkeys((0x200B, 0x200E, 0x200F, 0xFEFF))
BETWEEN = re.compile(rf"[{re.escape(MARKS)}/&+|-]+")
DECLARED = 20  # declarations that are looked at, from the last on
NEAR = 60  # characters beside a letter that say what is said of it
NUMBERS = dict(zip(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split(), range(20),
)) | dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))  # fmt: skip
MAGNITUDES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
UNITS = {
    "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
    "cm": "cm centimeter centimeters centimetre centimetres", "ft": "ft foot feet", "mi": "mi mile miles",
    "ha": "ha hectare hectares", "m2": "m2 m\u00b2 sqm", "km2": "km2 km\u00b2 sqkm", "%": "% percent pct",
    "px": "px pixel pixels", "\u00b0": "\u00b0 degree degrees deg",
}  # fmt: skip
UNIT_OF = {word: unit for unit, words in UNITS.items() for word in words.split()}


def option_lines(options) -> dict[str, str]:
    """{letter: text} of options, whether they are written "(A) red", "A. red" or "red".

    Only letters that all options have, in their order, are letters: "N. of it" and "S. of it" are texts.
    """
    options = [option.strip() for option in options]
    found = [re.fullmatch(r"\(?([A-Z])[.):]\s*(.*)", option, re.DOTALL) for option in options]
    letters = [match[1] for match in found if match]
    if len(letters) == len(options) and letters[:1] == ["A"] and sorted(set(letters)) == letters:
        return {match[1]: match[2].strip() for match in found}
    return {chr(ord("A") + index): option for index, option in enumerate(options)}


def plain(text: str) -> str:
    """A word or phrase without case, final stop and surplus spaces; letters with accents in one form."""
    return " ".join(unicodedata.normalize("NFC", text).lower().strip().rstrip(".").split())


def after_thinking(text: str) -> str:
    """What stands behind the last "</think>", and before a "<think>" that does not end: that one never came to an
    answer."""
    kept = re.split(r"(?i)</\s*(?:think|thinking|reasoning)\s*>", text)[-1]
    return re.split(r"(?i)<\s*(?:think|thinking|reasoning)\s*>", kept)[0].strip()


# ---- Letters of options ----------------------------------------------------------------------------------------------


def option_quoted(options: dict[str, str], text: str) -> str:
    """The letter of the one option that an answer quotes, or that quotes the answer; "" where that is not one."""
    text = plain(text)
    options = {letter: plain(option) for letter, option in options.items() if plain(option)}
    for fits in (
        lambda option: option == text,
        lambda option: re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text),
        lambda option: text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", option),
    ):
        found = [letter for letter, option in options.items() if fits(option)]
        if found:
            # "dark red" quotes "red" too: the longest is meant, where it holds all others.
            longest = max(found, key=lambda letter: len(options[letter]))
            inside = all(options[letter] in options[longest] for letter in found)
            equal = sum(options[letter] == options[longest] for letter in found)
            return (
                longest if inside and equal == 1 and (len(found) == 1 or _once(options, found, longest, text)) else ""
            )
    return ""


def _once(options, found, longest, text) -> bool:
    """Whether the other options are quoted nowhere but inside the longest."""
    rest = re.sub(rf"(?<!\w){re.escape(options[longest])}(?!\w)", " ", text)
    return not any(
        re.search(rf"(?<!\w){re.escape(options[letter])}(?!\w)", rest) for letter in found if letter != longest
    )


def letters_said(text: str, options: dict[str, str], several: bool = False) -> str:
    """The letter of the option that an answer chooses, "" where it names none; all of them, sorted, where `several` may
    be right.

    Only letters of the options are letters, in either case. What a model thinks before "</think>" does not count. A
    letter
    alone is the answer; else what is declared last ("The answer is B", "option b", "B is correct", a last line "B");
    else the
    last "(B)", of several all; else the first capital that stands alone, of several all; else the option that is
    quoted. "I"
    and "A" are no letters where they are words of a sentence.

        "I considered (A). Final answer: B." -> B        "answer: b" -> B        "<think>A or C?</think>B" -> B
    """
    text = after_thinking(text).translate(WIDE)
    options = options or dict.fromkeys(LETTERS, "")
    found = _bare(text, options) or _whole(text, options) or _declared(text, options, several)
    found = found or ("" if several else _leading(text, options))
    if not found:
        text = _without_denied(text, options)
        found = _in_brackets(text, options)
        found = found if several else found[-1:]
    found = found or _standing(text, options)
    return "".join(sorted(set(found))) if several else found[:1]


def _class(options) -> str:
    return "".join(options) + "".join(options).lower()


def _bare(text, options) -> str:
    """The letters of an answer of nothing else: "b", "(B).", "A, C", "A and C", "AC"."""
    text = text.strip(MARKS)
    if len(text) > 200:
        return ""
    words = [word for word in BETWEEN.split(text) if word and word not in ("and", "or")]
    letters = set("".join(options))
    alone = bool(words) and all(
        set(word) <= letters and len(set(word)) == len(word) or (len(word) == 1 and word.upper() in letters)
        for word in words
    )
    if alone and len(words) == 1 and len(text) > 1 and option_quoted({"": text}, " ".join(options.values())):
        return option_quoted(options, text)  # "CAB" may be one of the texts
    return "".join(words).upper() if alone else ""


def _whole(text, options) -> str:
    """The option whose text the answer is, where that has a letter in it: "route A" may be option C."""
    return next(
        (letter for letter in [option_quoted(options, text)] if letter and plain(options[letter]) == plain(text)), ""
    )


def _declared(text, options, several) -> str:
    """The letters that are declared last, or those of the option that is quoted there."""
    group, places = _class(options), []
    for match in DECLARES.finditer(text):
        places.append((match.end(), "declares"))
    for match in re.finditer(rf"(?i:\b(?:option|choice)[\s*_\"'`(\[]{{0,8}})([{group}])(?![\w'])", text):
        if not re.match(DENIES, text[match.end() : match.end() + NEAR], re.IGNORECASE):
            places.append((match.start(1), "names"))
    lower = "".join(options).lower().translate({ord("a"): None, ord("i"): None})  # words of a sentence
    for match in re.finditer(
        rf"(?<![\w'])([{''.join(options)}{lower}])(?![\w'])[\s)\]}}*.:]{{0,8}}(?i:{CONFIRMS})", text
    ):
        if not (
            match[1] in "AI" and re.match(r"\s+(?!is|are|seems|must|would)", text[match.end(1) : match.end(1) + NEAR])
        ):
            places.append((match.start(1), "names"))
    for match in re.finditer(rf"(?i:\b(?:it|that)(?:['\u2019]s|\s+is)\s+)([{group}])\s*(?:[.!)]|$)", text):
        places.append((match.start(1), "names"))
    ends = rf"(?:[(\[*_]{{0,3}}([{''.join(options)}])(?![\w'])[)\]*_]{{0,3}}\s*(?:$|[.\n]|because\b|since\b))"
    concludes = r"\b(?:so|therefore|thus|hence|conclusion|result|verdict|solution|finally)\b[\s:,*=>-]{1,6}(?:it\s+is\s+|it's\s+)?"
    for match in re.finditer(rf"(?i:{concludes}){ends}", text):
        places.append((match.start(1), "names"))
    if match := re.search(rf"(?i:\banswer)\s+([{group}])\s*[.)]?\s*$", text):
        places.append((match.start(1), "names"))
    lines = list(re.finditer(r"[^\n]+", text))
    if len(lines) > 1 and (found := _bare(lines[-1][0], options)):
        places.append((lines[-1].start(), "line"))
    # "Option B is right" says more than "option A" beside it: names count where nothing is declared behind a colon or verb.
    for kind in (("declares", "line"), ("names",)):
        named = ""
        for place, _ in sorted((found_at for found_at in places if found_at[1] in kind), reverse=True)[:DECLARED]:
            start = FILLERS.match(text, place).end()
            if found := _letters_at(text, start, options, group):
                if not several:
                    return found
                if kind[0] == "declares":
                    rest = _without_denied(
                        _sentence(text[start - 1 if text[start - 1 : start] in "([" else start :]), options
                    )
                    return found + (_in_brackets(rest, options) if re.match(r"[*_]*[(\[]", rest) else "")
                named += found
            if kind[0] == "declares" and (found := _quoted_at(text, place, options)):
                return found
        if named:
            return named + (_in_list(text, options) if several else "")
    return ""


def _in_list(text, options) -> str:
    """The letters before the last of a list that is said to be right: "A, C and D are correct"."""
    letter = rf"(?<![\w'])[(\[*_]{{0,3}}[{''.join(options)}](?![\w'])[)\]*_]{{0,3}}"
    lists = re.findall(
        rf"{letter}(?:(?:\s{{0,2}},|\s{{1,2}}and|\s{{1,2}}or|,\s{{0,2}}and)\s{{1,2}}{letter}){{1,8}}\s{{1,2}}(?i:{CONFIRMS})",
        text,
    )
    return "".join(re.findall(rf"(?<![\w'])([{''.join(options)}])(?![\w'])", " ".join(lists)))


def _letters_at(text, place, options, group) -> str:
    """The letters that stand at a place: "B", "A, C", "A and C", "AC"; "" where a word does."""
    rest = text[place : place + 10 * NEAR]
    one = rf"[*_(\[\"'`\uff08{{]*([{group}])[*_)\]\"'`\uff09}}]*"
    match = re.match(rf"{one}(?![\w'])", rest)
    if not match:
        match = re.match(rf"([{''.join(options)}]{{2,}})(?![\w'])", rest)
        return match[1] if match else ""
    letter, behind = match[1], rest[match.end(1) :]
    sentence = re.match(r"\s+[a-z]", behind)
    if re.match(DENIES, behind, re.IGNORECASE):
        return ""
    if (
        letter.islower()
        and sentence
        and not re.match(r"\s+(?:and|or|because|as|since|is\s+(?:correct|right))\b", behind)
    ):
        return ""  # "the answer is a car"
    if letter == "A" and sentence and (quoted := option_quoted(options, _sentence(rest))):
        return quoted
    if letter == "I" and sentence:
        return ""
    found = [letter]
    position = match.end()
    while following := re.match(
        rf"\s*(?:,|;|/|&|\band\b|\bor\b|\s)\s*(?:and\s+|or\s+)?{one}(?![\w'])(?!\s+[a-z])", rest[position:]
    ):
        if following[1].islower() != letter.islower():
            break
        found.append(following[1])
        position += following.end()
    return "".join(found).upper()


def _sentence(text: str) -> str:
    return re.split(r"\n|(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _quoted_at(text, place, options) -> str:
    """The letter of the option whose text stands behind a declaration, in the same sentence."""
    rest = _sentence(text[place : place + 10 * NEAR].split("</")[0]).strip(MARKS)
    if re.match(r"(?i)(?:not|n't|never|none)\b", rest) and not option_quoted(options, rest):
        return ""
    return "" if re.match(r"(?i)not\b", rest) else option_quoted(options, rest)


def _leading(text, options) -> str:
    """The letter that an answer begins with, as "B. blue, not red (A)"; "" where other lines begin so, too."""
    found = re.findall(
        rf"(?m)^[\s*_#(\[]{{0,8}}([{''.join(options)}])(?:[)\]*_]{{0,4}}[.:)][)\]*_]{{0,4}}(?:\s|$)|[)\]*_]{{0,4}}$)",
        text,
    )
    first = re.match(rf"[\s*_#(\[]{{0,8}}([{''.join(options)}])(?![\w'])", text)
    return (
        found[0] if first and found == [first[1]] and not re.match(DENIES, text[first.end() :], re.IGNORECASE) else ""
    )


def _without_denied(text, options) -> str:
    """The text without the letters of which it says that they are wrong: "not (A)", "A, B and C are wrong"."""
    one = rf"(?<![\w'])[(\[*_\uff08]{{0,3}}([{''.join(options)}])(?![\w'])[)\]*_\uff09]{{0,3}}"
    several = rf"{one}(?:\s{{0,2}}(?:,|/|&|\band\b|\bor\b)\s{{0,2}}(?:(?:and|or)\s)?{one}){{0,8}}"

    def kept(match):
        # "(B) not visible" may be an option's own text.
        text, letter = plain(match.string[match.end(1) :].lstrip(MARKS)), options[match[1]]
        return match[0] if letter and text.startswith(plain(letter)) else " "

    text = re.sub(rf"{several}(?:(?i:{DENIES})|(?i::\s{{0,2}}(?:no|wrong|incorrect|false)\b))", kept, text)
    return re.sub(rf"(?i:{DENIED_BEFORE}){several}", " ", text)


def _in_brackets(text, options) -> str:
    return "".join(re.findall(rf"[(\uff08]\s{{0,2}}([{_class(options)}])\s{{0,2}}[)\uff09]", text)).upper()


def _standing(text, options) -> str:
    """Capitals that are words, or the option that is quoted where there are none but an article and "I"."""
    found = []
    for match in re.finditer(rf"(?<![\w'])([{''.join(options)}])(?![\w'])", text):
        before, behind = text[max(match.start() - NEAR, 0) : match.start()], text[match.end() : match.end() + NEAR]
        denied = re.match(DENIES, behind, re.IGNORECASE) or re.search(r"(?i)\b(?:not|isn't|neither|nor)\s+$", before)
        if denied or (match[1] == "I" and re.match(r"\s+[a-z]|['\u2019]", behind)):
            continue
        found.append(match[1])
    article = set(found) == {"A"} and re.search(r"(?<!\w)A\s+[a-z]", text)
    inside = any(re.search(rf"(?<![\w'])[{''.join(options)}](?![\w'])", option) for option in options.values())
    if article or inside or not found:
        return option_quoted(options, text) or "".join(found)
    return "".join(found)


def right_letters(answer: str, options: dict[str, str], several: bool = False) -> str:
    """The letters of a right answer as a file has it: "B", "(b)", "B.", "B. blue", "blue"; where several may be right,
    "AC",
    "A, C", "(A) (C)".

    Raises:
        ValueError: it is none of the options, or two of one text.
    """
    said = answer.strip(MARKS)
    if len(said) == 1 and said.upper() in options:
        return said.upper()
    texts = {letter: plain(text) for letter, text in options.items()}
    lead = re.match(r"\s*[(\[]?\s*([A-Za-z])\s*[)\].:,]+\s*(.*)", answer, re.DOTALL)
    lead = lead or re.match(r"\s*([A-Z])\s+-*\s*(.*)", answer, re.DOTALL)
    wanted = [plain(answer), plain(lead[2])] if lead else [plain(answer)]
    for number, text in enumerate(wanted):
        found = [letter for letter, option in texts.items() if option == text and text]
        if number and lead[1].upper() in found:
            return lead[1].upper()
        if not number and len(found) == 1:
            return found[0]
    words = [word for word in BETWEEN.split(said) if word and word.lower() not in ("and", "or")]
    letters = "".join(words).upper()
    if (
        several
        and letters
        and set(letters) <= set(options)
        and (all(len(word) == 1 for word in words) or letters == "".join(words))
    ):
        return "".join(sorted(set(letters)))
    raise ValueError(
        f"{answer!r} is no option: these are {', '.join(f'{letter}. {text}' for letter, text in options.items())}."
    )


# ---- Numbers and words -----------------------------------------------------------------------------------------------


def number_words(text: str) -> str:
    """The text with its numbers in digits: "twenty-one ships" is "21 ships", "1,200" is "1200", "3.0" is "3"."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    names = "|".join([*NUMBERS, *MAGNITUDES])
    text = re.sub(
        rf"(?i)\b(?:{names})\b(?:(?:\s+and)?[\s-]+(?:{names})\b)*", lambda match: _value_of(match[0].lower()), text
    )
    return re.sub(r"(?<!\d)\d+\.\d+", lambda match: f"{float(match[0]):g}" if len(match[0]) < 16 else match[0], text)


def _value_of(words: str) -> str:
    total = part = 0
    for word in re.findall(r"[a-z]+", words):
        if word in NUMBERS:
            part += NUMBERS[word]
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word in MAGNITUDES:
            total, part = total + max(part, 1) * MAGNITUDES[word], 0
    return str(total + part)


def number_said(text: str) -> float | None:
    """The last number of an answer, in digits or words, behind what was thought; None where there is none."""
    found = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", number_words(after_thinking(text)))
    return float(found[-1]) if found else None


def tolerant_words(text: str) -> str:
    """A word or phrase without what does not matter: what was thought, case, punctuation, articles; numbers in digits,
    units in
    short, none before "there are" and "it is"."""
    text = plain(after_thinking(text))
    text = re.sub(
        r"\bsq(?:uare|\.)?\s*(km|m)\b",
        r"\g<1>2",
        re.sub(r"\bsquare (kilo)?met(?:re|er)s?\b", lambda found: "km2" if found[1] else "m2", text),
    )
    text = re.sub(r"(?<=\d)(?=[a-z%\u00b0])|(?<=\d)\s+(?=[%\u00b0])", " ", number_words(text).replace("m2", "m\u00b2"))
    text = re.sub(r"^(?:the answer is|answer:|there (?:is|are)|it is|it's|they are|this is)\s+", "", text)
    words = re.findall(r"-?\d+(?:\.\d+)?|[^\W_]+(?:['\u2019][^\W_]+)?|[%\u00b0\u00b2]", text.replace("m\u00b2", "m2"))
    return " ".join(UNIT_OF.get(word, word) for word in words if word not in ("a", "an", "the"))
