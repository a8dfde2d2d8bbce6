r"""Grading rules, one per kind of data: how an answer is found in a text, and when two answers are equal.

    rule set      the answer is                              equal means
    arith         the last `<answer>…</answer>`              the same rational number
    gsm8k         the number after the last `####`, else the last box         the same rational number
    last_number   the last number in the text                the same rational number
    math          the last `\boxed{…}` that is closed        the same value, else equal by algebra
    gym           the last `<answer>…</answer>`              the same text, or score 1 by the task's scorer

A rule has one marker, which its prompt asks for; without the marker there is no answer. `gsm8k` also reads a
box, because models trained on mathematics write one; `last_number` is for models that follow no format.
Numbers are compared as `fractions.Fraction`, so 1/3 is not 0.333333. For `math`, `notation` and `values` read
an answer, and math-verify compares what they cannot, if the `[math]` extra is installed (`algebra`). Numbers,
and tuples and sets of numbers, are only compared exactly. docs/data-and-grading.md has the rules by example,
their limits, and measurements beside other graders.

An answer longer than `MAX_ANSWER` characters is wrong. Every step takes time linear in the text, or works on
at most `MAX_ANSWER` characters. Text of a model is never passed to `eval`.
"""

from __future__ import annotations

import difflib
import functools
import re
from fractions import Fraction

from thinkrl import UserError, gym
from thinkrl.grading.algebra import Judge
from thinkrl.grading.notation import MAX_ANSWER, normalise, rational
from thinkrl.grading.values import Value, same, unnamed, value

RULES = ("arith", "gsm8k", "last_number", "math")
DATA_SOURCES = {  # verl's `data_source` values and hub names, in lower case
    "openai/gsm8k": "gsm8k",
    "lighteval/math": "math",
    "digitallearninggmbh/math-lighteval": "math",
    "huggingfaceh4/math-500": "math",
    "math500": "math",
    "math_dapo": "math",
    "math_dapo_reasoning": "math",
    "amc": "math",
    "amc23": "math",
    "gpqa": "math",
    "huggingfaceh4/aime_2024": "math",
    "opencompass/aime2025": "math",
    "math-ai/amc23": "math",
    "ai-mo/numinamath-cot": "math",
    "numina_aops_forum": "math",
    "numina_synthetic_math": "math",
    "numina_amc_aime": "math",
    "numina_synthetic_amc": "math",
    "numina_cn_k12": "math",
    "numina_olympiads": "math",
    "agentica-org/deepscaler-preview-dataset": "math",
}


def rule_set(source: str) -> str:
    """Rule of a data source, one of `RULES` or "gym". Raises UserError, with the nearest name, if unknown."""
    name = source.lower()
    if name in RULES:
        return name
    if name in DATA_SOURCES:
        return DATA_SOURCES[name]
    if name.startswith("aime"):
        return "math"
    if name.startswith("gym:"):
        return "gym"
    nearest = difflib.get_close_matches(name, [*RULES, *DATA_SOURCES], n=1, cutoff=0)[0]
    raise UserError(
        f"no grading rule for data source {source!r} (nearest: {nearest!r}): set source to one of "
        f"{', '.join(RULES)}"
    )


def extract(text: str, source: str) -> str | None:
    """Find the answer in a completion, as written, or None if its marker is missing."""
    rules = {"arith": _last_tag, "gsm8k": _hashes_or_box, "last_number": _last_number, "math": _last_box}
    return (rules | {"gym": _last_tag})[rule_set(source)](text)


def grade(text: str, gold: str, source: str) -> bool:
    """Whether the completion's answer equals the gold answer. Does not raise for any `text`."""
    answer = extract(text, source)
    return answer is not None and equal(answer, gold, source)


def equal(answer: str, gold: str, source: str) -> bool:
    """Whether an extracted answer equals the gold answer under the rule of `source`.

    Under `math` two readings depend on the gold answer: letters after a number are a unit if the gold answer
    is a number (5 m^2), and of `(C) 12` the letter counts if the gold answer is a letter.
    """
    if rule_set(source) == "gym":
        return answer.strip() == gold.strip() or gym.right(answer, source)
    a, b = canonical(answer, source), canonical(gold, source)
    if a is None or b is None:
        return False
    return a == b or (rule_set(source) == "math" and _equal_by_parts(answer, gold))


def canonical(answer: str, source: str) -> Value | None:
    """Value of an answer, == for answers that are equal without algebra; None if it is not an answer."""
    if len(answer) > MAX_ANSWER:
        return None
    rule = rule_set(source)
    if rule == "gym":
        return answer.strip() or None
    if rule == "arith":
        return rational(answer.strip().rstrip(".,"))
    meaning = unnamed(_value(answer))
    if rule == "math":
        return meaning if meaning != "" else None
    return meaning if isinstance(meaning, Fraction) else None


@functools.lru_cache(maxsize=4096)  # the answers of a group repeat
def _value(answer: str) -> Value:
    return value(normalise(answer))


@functools.lru_cache(maxsize=4096)
def _equal_by_parts(answer: str, gold: str) -> bool:
    """Whether two `math` answers whose canonical values differ are equal by names, parts or algebra."""
    judge = Judge()
    b = _value(gold)
    a = _value(_as_asked(answer, unnamed(b)))
    return same(unnamed(a), unnamed(b), judge) or (
        (unnamed(a), unnamed(b)) != (a, b) and same(a, b, judge)  # y = 2x is y - 2x = 0
    )


_LETTER_UNIT = re.compile(r"(.*[\d}])[mshgLlJNWVK](?:\^\{[23]\})?")
_CHOICE = re.compile(r"\(?([A-Z])[).]((?!.*(?:[A-Z]\)|, )).+)")


def _as_asked(answer: str, gold: Value) -> str:
    """Rewrite an answer in view of the gold answer: units, letters of options, thousands separators."""
    text = normalise(answer)
    if isinstance(gold, Fraction) and (found := _LETTER_UNIT.fullmatch(text)):
        return found[1]
    if isinstance(gold, tuple) and gold[0] == "set":
        return re.sub(r",(?=\d)", ", ", answer)  # 81,256 is two numbers
    if found := _CHOICE.fullmatch(text):
        letter = isinstance(gold, str) and len(gold) == 1 and gold.isupper()
        return found[1] if letter else found[2]
    return answer


def check_gold(gold: str, source: str) -> None:
    """Raise ValueError for a gold answer that no completion can equal, which is an error in the data."""
    rule = rule_set(source)
    if len(gold) > MAX_ANSWER:
        raise ValueError(f"has {len(gold)} characters, at most {MAX_ANSWER} can be graded")
    if canonical(gold, source) is None:
        raise ValueError(
            f"{gold!r} is not {'an answer' if rule == 'math' else 'a number'} that {rule} grading can read"
        )
    if rule == "math" and (unpaired := _unpaired_brace(gold)):
        raise ValueError(f"{gold!r} has an unpaired {unpaired!r}")


def _last_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip().replace("−", "-")


_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?: ?/ ?\d+)?"
_HASHES = re.compile(
    r"####[ *]*(?:(?:the )?(?:final )?answer(?: is)?:?|[a-z] ?=)?[ *(]*(?P<sign>[-+]?) ?[$€£]? ?"
    rf"(?P<number>{_NUMBER})",
    re.IGNORECASE,
)
_SIGNED_NUMBER = re.compile(rf"(?P<sign>[-+]?) ?[$€£]? ?(?P<number>{_NUMBER})")


def _hashes_or_box(text: str) -> str | None:
    """Find the number right after the last `####` that has one, else a box, else a number on the last line
    with `####`.

    `####` may also begin a heading, such as "#### Step 1".
    """
    lines = [line[:MAX_ANSWER].translate(_PLAIN) for line in re.findall(r"####(?!#)(?:(?!####)[^\n])*", text)]
    found = next(filter(None, map(_HASHES.match, reversed(lines))), None)
    if found is None and (box := _last_box(text)) is not None:
        return box
    if found is None and lines:
        found = _SIGNED_NUMBER.search(lines[-1])
    return (found["sign"] + found["number"]).rstrip(".,") if found else None


_PLAIN = str.maketrans({"\\": None, "−": "-"})
_LAST_NUMBER = re.compile(  # a minus between two terms is not a sign
    r"(?P<sign>(?<![\w)}\]])[-−])?[$€£]?"
    r"(?P<number>\\[dt]?frac\{\d+\}\{\d+\}|(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?: ?/ ?\d+)?)"
)


def _last_number(text: str) -> str | None:
    found = [("-" if number["sign"] else "") + number["number"] for number in _LAST_NUMBER.finditer(text)]
    return found[-1] if found else None


_BOX_OR_BRACE = re.compile(
    r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<bare>[^\s{}$\\]+)|(?P<digits>-?\d+))|\\.|[{}]", re.DOTALL
)


def _last_box(text: str) -> str | None:
    r"""Contents of the last box that is closed, in one pass.

    A box without braces, \boxed 2, holds the text up to the next space, brace, $ or \.
    """
    open_at: list[int | None] = []  # where a box's contents start, None for any other brace
    best = (-1, -1)
    for token in _BOX_OR_BRACE.finditer(text):
        mark = token[0]
        if bare := token["bare"] or token["digits"]:
            best = max(best, (token.end() - len(bare), token.end()))
        elif mark == "}":
            start = open_at.pop() if open_at else None
            if start is not None:
                best = max(best, (start, token.start()))
        elif mark.endswith("{") and mark != r"\{":
            open_at.append(None if mark == "{" else token.end())
    return None if best[0] < 0 else text[best[0] : best[1]].strip()


def _unpaired_brace(text: str) -> str | None:
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return "}"
    return "{" if depth else None
