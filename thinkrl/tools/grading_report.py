r"""Does grading read the gold answers of these files, and only them? Beside math-verify and verl, if installed.

    python -m thinkrl.tools.grading_report FILE… [--per_file 0] [--show 20]

Each gold answer that differs from the others of its file is boxed and graded against itself

    in other spellings     \dfrac, spaces, units, decimals, bmatrix, … : each must be right (else a false negative)
    after a change         one number up, another sign, two entries swapped, …: each must be wrong (else a false positive)
    against another row's  the next gold answer of the same shape: wrong, where the two are not the same number

and, where rows have a solution, against what the solution boxes. The changes do not know how any grader
reads: they work on the text. Prints the share of wrong verdicts of each grader, and the first `--show` of
thinkrl's, to be read: a gold answer may be mistaken itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from thinkrl.grading import extract, grade
from thinkrl.problems import read_rows

Grader = Callable[[str, str], bool]  # (completion, gold answer) -> right?


def boxed(answer: str) -> str:
    return rf"Therefore the answer is $\boxed{{{answer}}}$."


def golds(path: Path) -> Iterator[tuple[str, str]]:
    """(gold answer, solution or "") of each row that has an answer."""
    for _, row in read_rows(path):
        gold = row.get("answer", row.get("final_answer"))
        solution = row.get("solution") or ""
        if isinstance(gold, list):
            gold = gold[0]
        if isinstance(gold, str) and "####" in gold:
            gold, solution = extract(gold, "gsm8k"), gold
        elif gold is None and isinstance(solution, str):
            gold = extract(solution, "math")
        elif isinstance(gold, float) and gold.is_integer():
            gold = int(gold)
        if gold is not None and str(gold).strip():
            yield str(gold).strip(), solution if isinstance(solution, str) else ""


# --- other spellings -------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
BARE = re.compile(r"[^=<>,;\\{}]*|[^=<>,;]*")
RELATION = re.compile(
    r"[=<>]|\\(?:leq?|geq?|leqslant|geqslant|approx|cup|in|neq?|pm)(?![A-Za-z])|\bwhere\b|\bor\b|\band\b"
)
BRACKETED = re.compile(r"(\\left\s*)?([(\[])([^()\[\]]*)(\\right\s*)?([)\]])")


def spellings(gold: str) -> dict[str, str]:
    r"""Ways to write the same answer, each for the kinds of answer that it fits. They need not differ from the gold."""
    found = {"as it is": gold, "with a full stop": f"{gold}.", "in dollar signs": f"${gold.strip('$')}$"}
    found["with spaces"] = re.sub(r"(?<=[\w)}])\s*([-+=<>])\s*(?=[\w\\({])", r" \1 ", gold) + " "
    found["without spaces"] = (
        re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", re.sub(r"\\ |\\[,;!]", "", gold))
        if "\\text" not in gold and "\\mbox" not in gold and not re.search(r"\d\s+\d|[A-Za-z]\s", gold)
        else gold
    )
    found["\\dfrac"] = re.sub(r"\\[dt]?frac", r"\\dfrac", gold)
    found["Unicode"] = (
        gold.replace("\\infty", "∞").replace("\\cup", "∪").replace("-", "−").replace("\\pi", "π")
        if "\\text" not in gold
        else gold
    )
    if number := NUMBER.fullmatch(gold):
        exact = Fraction(gold)
        found["decimal"] = f"{gold}.0" if exact.denominator == 1 else f"{gold}0"
        found["named"] = f"x = {gold}"
        found["in text"] = rf"\text{{{gold}}}"
        found["bold"] = rf"\mathbf{{{gold}}}"
        if "." not in number[0]:
            found["unit"] = rf"{gold}\text{{ units}}"
            found["dollars"] = rf"\${gold}" if not gold.startswith("-") else gold
        if abs(exact) >= 1000:
            found["comma"], found["{,}"], found["thin space"] = (
                f"{Decimal_text(gold, mark)}" for mark in (",", "{,}", r"\,")
            )
    if part := FRACTION.fullmatch(gold):
        sign, top, bottom = part[1], int(part[2]), int(part[3])
        found["a/b"] = f"{sign}{top}/{bottom}"
        found["braces"] = rf"{sign}\frac{{{top}}}{{{bottom}}}"
        found["unit"] = rf"{gold}\text{{ cm}}"
        found["named"] = f"x={gold}"
        if sign:
            found["sign inside"] = rf"\frac{{-{top}}}{{{bottom}}}"
        if 10**6 % bottom == 0:
            found["decimal"] = (
                sign
                + f"{Fraction(top, bottom).numerator / Fraction(top, bottom).denominator:.6f}".rstrip(
                    "0"
                ).rstrip(".")
            )
    if re.search(r"\^\{?\\circ", gold):
        found["degrees"] = (
            re.sub(r"\s*\^\s*\{?\s*\\circ\s*\}?", " degrees", gold)
            if "," not in gold and "\\cos" not in gold and "\\tan" not in gold
            else gold
        )
        found["°"] = re.sub(r"\s*\^\s*\{?\s*\\circ\s*\}?", "°", gold)
        found["^{\\circ}"] = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}", gold)
    if "matrix}" in gold:
        found["bmatrix"] = gold.replace("pmatrix", "bmatrix")
        found["lines"] = gold.replace("\\\\", "\\\\\n")
        found["tight"] = (
            re.sub(r"\s*(\\\\|&|\})\s*", r"\1", gold).replace("\\end", " \\end")
            if "phantom" not in gold
            else gold
        )
        found["fractions"] = re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", gold)
    else:
        found["\\left \\right"] = (
            BRACKETED.sub(r"\\left\2\3\\right\5", gold) if BRACKETED.fullmatch(gold) else gold
        )
    if BRACKETED.fullmatch(gold) and gold.count(",") == 1:
        found["tight bracket"] = re.sub(r"\s+(?![A-Za-z])", "", gold)
    if re.fullmatch(r"-?\d+(?:\s*,\s*-?\d+)+", gold) and not re.search(r"\d,\d{3}(?!\d)", gold):
        items = [item.strip() for item in gold.split(",")]
        found["other order"] = ", ".join(reversed(items))
        found["and"] = rf"{', '.join(items[:-1])} \text{{ and }} {items[-1]}"
        found["braces of a set"] = rf"\{{{', '.join(items)}\}}"
        found["each named"] = ", ".join(f"x = {item}" for item in items)
    if interval := re.fullmatch(r"([(\[])\s*(-?\d+|-\\infty)\s*,\s*(-?\d+|\\infty)\s*([)\]])", gold):
        opening, low, high, closing = interval.groups()
        if "\\infty" in gold or {opening, closing} != {"(", ")"}:
            left = "" if "infty" in low else f"{low} {'<' if opening == '(' else chr(92) + 'le'} "
            right = "" if "infty" in high else f" {'<' if closing == ')' else chr(92) + 'le'} {high}"
            if left or right:
                found["inequality"] = f"{left}x{right}"
    if words := re.fullmatch(r"\\(?:text|mbox)\{([A-Za-z ]+)\}|([A-Za-z]{3,})", gold):
        found["plain word"] = words[1] or words[2]
        found["bold word"] = rf"\textbf{{{words[1] or words[2]}}}"
    if letter := re.fullmatch(r"\\text\{\(?([A-Z])\)?\}|([A-Z])", gold):
        name = letter[1] or letter[2]
        found["(A)"], found["**A**"], found["A)"] = rf"\text{{({name})}}", f"**{name}**", f"{name})"
    if unit := re.fullmatch(r"(.*[\d}])\s*\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^\d)?", gold):
        found["no unit"] = unit[1].strip()
    if re.search(r"\\sqrt\s*\{\d\}", gold):
        found["\\sqrt3"] = (
            re.sub(r"\\sqrt\s*\{(\d)\}", r"\\sqrt\1", gold)
            if not re.search(r"\\sqrt\s*\{\d\}\s*\d", gold)
            else gold
        )
        found["√"] = (
            re.sub(r"\\sqrt\s*\{(\d+)\}", r"√\1", gold)
            if not re.search(r"\\sqrt\s*\{\d+\}\s*\d", gold)
            else gold
        )
    if total := re.fullmatch(r"(-?[\d\\A-Za-z{}^ ]+)\s*([-+])\s*([\d\\A-Za-z{}^ ]+)", gold):
        if (
            not RELATION.search(gold)
            and "\\text" not in gold
            and gold.count("{") == gold.count("}")
            and total[1].count("{") == total[1].count("}")
        ):
            first = total[1].strip()
            found["terms swapped"] = (
                f"{'-' if total[2] == '-' else ''}{total[3].strip()} {'' if first.startswith('-') else '+ '}{first}"
            )
    if equation := re.fullmatch(r"([a-z])\s*=\s*([^=,]+)", gold):
        found["without name"] = equation[2].strip()
        found["turned"] = f"{equation[2].strip()} = {equation[1]}" if "x" not in equation[2] else gold
    if re.fullmatch(r"-?\d+", gold):
        found["no braces"] = gold
    return found


def Decimal_text(gold: str, mark: str) -> str:
    whole, point, rest = gold.partition(".")
    return f"{int(whole):,}".replace(",", mark) + point + rest


# --- wrong answers ---------------------------------------------------------------------------------------


def changes(gold: str) -> dict[str, str]:
    """Answers that resemble the gold one and differ from it."""
    found = {}
    numbers = list(re.finditer(r"\d+", gold))
    if numbers:
        first = numbers[0]
        found["first number up"] = gold[: first.start()] + str(int(first[0]) + 1) + gold[first.end() :]
        if not re.search(r"text|mbox", gold) and len(numbers) > 1:
            last = numbers[-1]
            found["last number up"] = gold[: last.start()] + str(int(last[0]) + 1) + gold[last.end() :]
    if NUMBER.fullmatch(gold) or FRACTION.fullmatch(gold):
        if any(int(n[0]) for n in numbers):
            found["other sign"] = gold.removeprefix("-") if gold.startswith("-") else f"-{gold}"
    if re.fullmatch(r"\d{2,}", gold):
        found["digits apart"] = f"{gold[:-1]} {gold[-1]}"
    if part := FRACTION.fullmatch(gold):
        if part[2] != part[3]:
            found["upside down"] = rf"{part[1]}\frac{{{part[3]}}}{{{part[2]}}}"
        rounded = f"{int(part[2]) / int(part[3]):.2f}"
        if Fraction(rounded) != Fraction(int(part[2]), int(part[3])):
            found["rounded"] = part[1] + rounded
    bracket = BRACKETED.fullmatch(gold)
    if bracket and "," in gold:
        entries = [entry.strip() for entry in bracket[3].split(",")]
        if entries[0] != entries[1]:
            swapped = [entries[1], entries[0], *entries[2:]]
            found["entries swapped"] = f"{bracket[2]}{', '.join(swapped)}{bracket[5]}"
        if len(entries) > 2:
            found["one entry less"] = f"{bracket[2]}{', '.join(entries[:-1])}{bracket[5]}"
        if len(entries) == 2:
            other = {"(": "[", "[": "("}[bracket[2]]
            found["other bracket"] = f"{other}{bracket[3]}{bracket[5]}"
    if re.fullmatch(r"-?\d+(?:\s*,\s*-?\d+)+", gold) and not re.search(r"\d,\d{3}(?!\d)", gold):
        items = [item.strip() for item in gold.split(",")]
        if items[-1] not in items[:-1]:
            found["one element less"] = ", ".join(items[:-1])
            found["one element more"] = f"{', '.join(items)}, {max(map(int, items)) + 1}"
    variables = set(re.findall(r"(?<![\\A-Za-z])[a-hj-z](?![A-Za-z])", gold))
    if len(variables) == 1 and not re.search(r"text|mbox|=|<|>|\\le|\\ge|\\in|matrix", gold):
        found["other letter"] = re.sub(
            r"(?<![\\A-Za-z])[a-hj-z](?![A-Za-z])", "q" if "q" not in variables else "w", gold
        )
    if letter := re.fullmatch(r"\\text\{\(?([A-Z])\)?\}|([A-Z])", gold):
        found["other choice"] = chr((ord(letter[1] or letter[2]) - 64) % 26 + 65)
    return found


def shape(gold: str) -> str:
    return re.sub(r"\d+", "0", re.sub(r"\s+", "", gold))


def neighbours(answers: list[str]) -> Iterator[tuple[str, str]]:
    """(gold, wrong answer): the next two of the same shape with other numbers, and two of any shape."""
    shuffled = sorted(answers)
    random.Random(0).shuffle(shuffled)
    by_shape: dict[str, list[str]] = {}
    for gold in shuffled:
        by_shape.setdefault(shape(gold), []).append(gold)
    for same in by_shape.values():
        for i, gold in enumerate(same):
            for step in (1, 2):
                other = same[(i + step) % len(same)]
                if sorted(re.findall(r"\d+", gold)) != sorted(re.findall(r"\d+", other)):
                    yield gold, other
    for i, gold in enumerate(shuffled):
        for step in (1, 2):
            other = shuffled[(i + step) % len(shuffled)]
            if re.findall(r"\d+", gold) != re.findall(r"\d+", other):
                yield gold, other


# --- graders ---------------------------------------------------------------------------------------------


def graders() -> dict[str, Grader]:
    found: dict[str, Grader] = {"thinkrl": lambda completion, gold: grade(completion, gold, "math")}
    if importlib.util.find_spec("math_verify"):
        found["math-verify"] = _math_verify()
    spec = importlib.util.find_spec("verl")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "utils" / "reward_score"
        found["verl"] = _verl(folder / "math_reward.py")
    return found


def _math_verify() -> Grader:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def right(completion: str, gold: str) -> bool:
        return bool(verify(parse(f"${gold.strip('$')}$"), parse(completion)))

    return right


def _verl(path: Path) -> Grader:
    spec = importlib.util.spec_from_file_location("verl_math_reward", path)  # verl itself imports ray
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def right(completion: str, gold: str) -> bool:
        with contextlib.redirect_stdout(io.StringIO()):
            return module.compute_score(completion, gold) > 0

    return right
