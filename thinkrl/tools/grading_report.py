r"""Count grading errors on the gold answers of data files, also of math-verify and verl if installed.

    python -m thinkrl.tools.grading_report FILE [FILE …] [--show 20]

Each different gold answer of a file is graded, in a box,

    in other spellings          \dfrac, spaces, units, decimals, bmatrix, …       wrong is a false negative
    with a change               a number changed, another sign, entries swapped, … right is a false positive
    against other rows' golds   four others, two of them of the same shape         right is a false positive

and against the answer of the row's solution, if it has one. Spellings and changes are text patterns (the
tables `SPELLINGS` and `CHANGES`), independent of any grader. Verdicts of thinkrl that look wrong are printed,
`--show` of each kind, because a gold answer may itself be wrong.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType

from thinkrl import UserError
from thinkrl.data.problems import load_problems
from thinkrl.grading import grade
from thinkrl.options import asks_for_help, option, parse_as, run_tool

Grader = Callable[[str, str], bool]  # (completion, gold answer) -> right?
Case = tuple[str, str, str]  # (gold answer, what was done to it, completion)

# golds with words, to which rules about signs do not apply
WORDS = r"\\(?:text|mbox)|(?<![\\A-Za-z])[A-Za-z]{4}"
NO_FORMULA = rf"{WORDS}|[<>=]|\\(?:le|ge|in|cup|approx)"
INTEGERS = r"\A-?\d+(?:\s*,\s*-?\d+)+\Z"
MIXED_UP = r"\d,\d{3}(?!\d)"  # a comma that may separate thousands


def _decimal(fraction: re.Match) -> str:
    exact = Fraction(int(fraction[2]), int(fraction[3]))
    ends = 10**6 % exact.denominator == 0
    return fraction[1] + f"{float(exact):.6f}".rstrip("0").rstrip(".") if ends else fraction[0]


def _array(matrix: re.Match) -> str:
    columns = "c" * (matrix[1].split(r"\\")[0].count("&") + 1)
    return rf"\left(\begin{{array}}{{{columns}}}{matrix[1]}\end{{array}}\right)"


FRACTION = r"\A(-?)\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?\Z"
MATRIX = r"\A\\begin\{pmatrix\}(.*)\\end\{pmatrix\}\Z"
VALUE = r"\A-?(?:\d+(?:\.\d+)?|\\[dt]?frac\{\d+\}\{\d+\}|\d*\s*\\sqrt\{\d+\})\Z"
CHOICE = r"\A(?:\\text\{\(?)?([A-Z])(?:\)?\})?\Z"
UNIT = r"(?<=[\d}])\s*\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^\d)?\Z"

# (name, pattern, replacement, pattern of golds that are excluded)
SPELLINGS: list[tuple[str, str, str | Callable, str]] = [
    ("as it is", r"\A", "", ""),
    ("full stop", r"\Z", ".", r"\.\Z"),
    ("dollar signs", r"\A\$?(.*?)\$?\Z", r"$\1$", r".\$."),
    (r"\dfrac", r"\\[dt]?frac(?![A-Za-z])", r"\\dfrac", ""),
    ("spaced signs", r"(?<=[\w)}])(?<![eE])\s*([-+=<>])\s*(?=[\w\\({])", r" \1 ", WORDS),
    ("tight commas", r"(?<=[\w)}]),\s+(?=[-\w(\\])", ",", WORDS),
    ("wide commas", r"(?<=[\w)}]),\s*(?=[-\w(\\])", ", ", rf"{WORDS}|{MIXED_UP}|\\!"),
    (r"\left \right", r"\A([(\[])(.*)([)\]])\Z", r"\\left\1 \2 \\right\3", r"\\left|[)\]].*[(\[]"),
    ("Unicode minus", r"-", "−", WORDS),
    ("Unicode π", r"\\pi(?![A-Za-z])\s?", "π", ""),
    ("Unicode ∞", r"\\infty(?![A-Za-z])", "∞", ""),
    ("Unicode ∪", r"\\cup(?![A-Za-z])", "∪", ""),
    ("Unicode √", r"\\sqrt\{(\d+)\}(?!\s*\d)", r"√\1", ""),
    (r"\sqrt3", r"\\sqrt\{(\d)\}(?!\s*\d)", r"\\sqrt\1", ""),
    (r"\cdot", r"(?<=\d)\s*(?=\\sqrt|\\pi)", r" \\cdot ", r"\^\d|_"),
    ("x = 3", VALUE, r"x = \g<0>", ""),
    ("in text", r"\A\d+\Z", r"\\text{\g<0>}", ""),
    ("bold", r"\A\d+\Z", r"\\mathbf{\g<0>}", ""),
    ("a unit", VALUE, r"\g<0>\\text{ cm}", ""),
    ("a price", r"\A\d+(?:\.\d\d)?\Z", r"\\$\g<0>", ""),
    ("3.0", r"\A-?\d+\Z", r"\g<0>.0", ""),
    ("1,000", r"(?<=\d)(?=(?:\d{3})+\Z)", ",", r"[^-\d]"),
    ("1{,}000", r"(?<=\d)(?=(?:\d{3})+\Z)", "{,}", r"[^-\d]"),
    (r"1\,000", r"(?<=\d)(?=(?:\d{3})+\Z)", r"\\,", r"[^-\d]"),
    (r"without ,\!", r",\\!\s*", "", ""),
    (r"comma for ,\!", r",\\!\s*", ",", r"[(\[{]"),
    ("a/b", FRACTION, r"\1\2/\3", ""),
    ("sign inside", r"\A-" + FRACTION[6:], r"\\frac{-\1}{\2}", ""),
    ("decimal", FRACTION, _decimal, ""),
    ("°", r"\s*\^\s*\{?\s*\\circ\s*\}?", "°", ""),
    ("degrees", r"(?<=\d)\s*\^\s*\{?\s*\\circ\s*\}?\Z", " degrees", r",|\\(?!circ)[a-z]"),
    (r"^{\circ}", r"\s*\^\s*\\circ", r"^{\\circ}", ""),
    ("without unit", UNIT, "", r"p\.m|or"),
    ("unit in words", UNIT, lambda unit: " " + re.sub(r"\\\w+\{\s*|\}", "", unit[0]).strip(), r"p\.m|or"),
    ("bmatrix", "pmatrix", "bmatrix", ""),
    ("rows on lines", r"\\\\", r"\\\\\n", ""),
    ("tight rows", r"\s*(\\\\|&)\s*", r"\1", "phantom"),
    ("fractions in rows", r"(-?)(?<![\d.])(\d+)/(\d+)", r"\1\\frac{\2}{\3}", r"\A[^&]*\Z(?<!matrix})"),
    ("array", MATRIX, _array, ""),
    ("inequality", r"\A\[\s*([^,]+),\s*([^,\\]+)\)\Z", r"\1 \\le x < \2", r"\\infty"),
    ("inequality", r"\A\(\s*([^,\\]+),\s*\\infty\s*\)\Z", r"x > \1", ""),
    ("inequality", r"\A\(\s*-\\infty\s*,\s*([^,\\]+)\]\Z", r"x \\le \1", ""),
    ("other order", INTEGERS, lambda many: ", ".join(reversed(re.split(r"\s*,\s*", many[0]))), MIXED_UP),
    ("and", r"\A(.*),\s*(-?\d+)\Z", r"\1 \\text{ and } \2", rf"[^-\d, ]|{MIXED_UP}"),
    ("braces of a set", INTEGERS, r"\\{\g<0>\\}", rf"(?<!\d)(-?\d+),(?:.*,)?\s*\1(?!\d)|{MIXED_UP}"),
    ("x = 1, x = 2", r"\A|,\s*", r"\g<0>x = ", rf"[^-\d, ]|\A[^,]*\Z|{MIXED_UP}"),
    ("without name", r"\A[a-z]\s*=\s*([^=,]+)\Z", r"\1", ""),
    ("3 = x", r"\A([a-z])\s*=\s*([^=,a-z]+)\Z", r"\2 = \1", ""),
    ("plain word", r"\A\\(?:text|mbox)\{([A-Za-z ]{2,})\}\Z", r"\1", ""),
    ("bold word", r"\A\\(?:text|mbox)\{([A-Za-z ]{2,})\}\Z", r"\\textbf{\1}", ""),
    ("(A)", CHOICE, r"\\text{(\1)}", ""),
    ("**A**", CHOICE, r"**\1**", ""),
    ("A)", CHOICE, r"\1)", ""),
    ("terms swapped", r"\A([\d\w^]+|\d*\\sqrt\{\d+\})\s*\+\s*([\d\w^]+|\d*\s*\\sqrt\{\d+\})\Z", r"\2 + \1", "[A-Za-z]{4}"),
]  # fmt: skip


def _up(number: re.Match) -> str:
    return str(int(number[0]) + 1)


def _rounded(fraction: re.Match) -> str:
    two_digits = f"{int(fraction[2]) / int(fraction[3]):.2f}"
    exact = Fraction(int(fraction[2]), int(fraction[3]))
    return fraction[1] + two_digits if Fraction(two_digits) != exact else fraction[0]


CHANGES: list[tuple[str, str, str | Callable, str]] = [
    ("first number up", r"\A([^\d]*)(\d+)", lambda part: part[1] + str(int(part[2]) + 1), ""),
    ("last number up", r"\d+(?=[^\d]*\Z)", _up, r"\A[^\d]*\d+[^\d]*\Z|\\(?:text|mbox)"),
    ("other sign", r"\A(?=[\d\\])", "-", rf"{NO_FORMULA}|\A[^\d]*0*\Z|\\pm|\\begin|,|\\$"),
    ("other sign", r"\A-", "", rf"{NO_FORMULA}|\\pm|,"),
    ("digits apart", r"\A(\d+)(\d)\Z", r"\1 \2", ""),
    ("upside down", FRACTION, r"\1\\frac{\3}{\2}", ""),
    ("rounded", FRACTION, _rounded, ""),
    ("entries swapped", r"\A((?:\\left)?[(\[])([^,()\[\]]+),([^,()\[\]]+?)(?=,|\s*\\right|[)\]])", r"\1\3,\2", r"\)\s*[,;(]"),
    ("one entry less", r",[^,()\[\]]+(?=(?:\\right)?[)\]]\Z)", "", r"\A[^,]*,[^,]*\Z|\)\s*[,;(]"),
    ("other bracket", r"\A\(", "[", r"\A[^,]*\Z|\)\s*[,;(]|\\cup"),
    ("other bracket", r"\A\[", "(", r"\A[^,]*\Z|\\cup"),
    ("one element less", r",\s*-?\d+\Z", "", rf"[^-\d, ]|{MIXED_UP}"),
    ("one element more", r"\Z", ", 12345", rf"[^-\d, ]|\A[^,]*\Z|{MIXED_UP}"),
    ("other letter", r"(?<![\\A-Za-z{])[a-df-hj-z](?![A-Za-z])", "Q", rf"{NO_FORMULA}|\\begin|_|Q|[a-z]\("),
    ("other case", r"(?<![\\A-Za-z{])[A-DF-HJ-Z](?![A-Za-z])", lambda letter: letter[0].lower(), rf"{NO_FORMULA}|\A.\Z|\(.\)|,"),
    ("other choice", CHOICE, lambda part: chr((ord(part[1]) - ord("A") + 1) % 26 + ord("A")), ""),
    ("rows swapped", r"\A(\\begin\{pmatrix\})(.*?)\\\\(.*?)(?=\\\\|\\end)", r"\1\3\\\\\2", ""),
    ("base left out", r"(?<=\d)_\{?\d+\}?", "", ""),
]  # fmt: skip


def boxed(answer: str) -> str:
    return rf"Therefore, the answer is $\boxed{{{answer}}}$."


def rewritten(gold: str, table: list[tuple[str, str, str | Callable, str]]) -> Iterator[Case]:
    """Apply each fitting row of a table to the gold answer; yields different boxed answers."""
    # a change of spaces alone does not count
    space = r"\Z" if table is SPELLINGS else r"(?<!\d)\s+|\s+(?!\d)"
    seen = set() if table is SPELLINGS else {re.sub(space, "", gold)}
    for name, pattern, replacement, unless in table:
        if (unless and re.search(unless, gold)) or not re.search(pattern, gold, re.DOTALL):
            continue
        text = re.sub(pattern, replacement, gold, count=1 if name.startswith("first") else 0, flags=re.DOTALL)
        form = re.sub(space, "", text)
        if form not in seen:
            seen.add(form)
            yield gold, name, boxed(text)


def spellings(gold: str) -> Iterator[Case]:
    yield from rewritten(gold, SPELLINGS)
    if re.fullmatch(r"\d+", gold):
        yield gold, "box without braces", rf"Therefore, the answer is $\boxed {gold}$."


def changes(gold: str) -> Iterator[Case]:
    yield from rewritten(gold, CHANGES)


def others(golds: list[str]) -> Iterator[Case]:
    """Pair each gold answer with four others: the next two of all, and of the same shape, in a fixed random
    order.

    The others have different digits, so that they are not the same answer in another spelling.
    """
    golds = sorted(golds)
    random.Random(0).shuffle(golds)
    groups: dict[str, list[str]] = {"": golds}
    for gold in golds:
        groups.setdefault("shape " + re.sub(r"\d+", "0", re.sub(r"\s+", "", gold)), []).append(gold)
    pairs = {
        (gold, group[(i + step) % len(group)])
        for group in groups.values()
        for i, gold in enumerate(group)
        for step in (1, 2)
    }
    for gold, other in sorted(pairs):
        if sorted(re.findall(r"\d", gold)) != sorted(re.findall(r"\d", other)):
            yield gold, "another row's", boxed(other)


def read_golds(path: Path) -> list[tuple[str, str]]:
    """Read (gold answer, solution) of each problem of a file; solution "" if it has no answer."""
    return [
        (
            re.sub(r"\A\$([^$]+)\$\Z", r"\1", problem.answer),
            problem.solution if re.search(r"####|\\(?:boxed|fbox)", problem.solution) else "",
        )
        for problem in load_problems(str(path), skip_bad_rows=True)
    ]


def graders() -> dict[str, Grader]:
    found: dict[str, Grader] = {"thinkrl": _thinkrl}
    if importlib.util.find_spec("math_verify"):
        found["math-verify"] = _math_verify()
    verl = importlib.util.find_spec("verl")
    if verl and verl.submodule_search_locations:
        folder = Path(verl.submodule_search_locations[0]) / "utils" / "reward_score"
        found["verl"] = _verl(_module(folder / "gsm8k.py"), _module(folder / "math_reward.py"))
    return found


def _thinkrl(completion: str, gold: str) -> bool:
    return grade(completion, gold, "gsm8k" if "####" in completion else "math")


def _math_verify() -> Grader:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # silences its messages about text it cannot parse
    return lambda completion, gold: bool(verify(parse(f"${gold.strip('$')}$"), parse(completion)))


def _verl(gsm8k: ModuleType, math: ModuleType) -> Grader:
    def right(completion: str, gold: str) -> bool:
        module = gsm8k if "####" in completion else math
        gold = gold.replace(",", "") if module is gsm8k else gold  # as in its data preparation
        with contextlib.redirect_stdout(io.StringIO()):  # it prints errors
            return module.compute_score(completion, gold) > 0

    return right


def _module(path: Path) -> ModuleType:
    """Import one scorer file of verl, because importing verl imports ray."""
    spec = importlib.util.spec_from_file_location(f"verl_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Options:
    show: int = option(20, "verdicts of thinkrl to print, of each kind, that look wrong")


def parse(argv: list[str]) -> tuple[list[Path], Options]:
    """`FILE [FILE …] [--key value …]`. Raises UserError."""
    usage = "python -m thinkrl.tools.grading_report FILE [FILE …] [--key value …]"
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not first and not asks_for_help(argv):
        raise UserError(f"which files? usage: {usage}")
    return [Path(word) for word in argv[:first]], parse_as(Options, argv[first:], usage)


def report(path: Path, show: int) -> str:
    """Count wrong verdicts on one file: a line for each grader, and thinkrl's wrong verdicts."""
    rows = read_golds(path)
    golds = list(dict.fromkeys(gold for gold, _ in rows))
    kinds: dict[str, tuple[bool, list[Case]]] = {  # the right verdict, and the cases
        "spellings": (True, [case for gold in golds for case in spellings(gold)]),
        "changes": (False, [case for gold in golds for case in changes(gold)]),
        "other rows": (False, list(others(golds))),
        "solutions": (True, [(gold, "a solution", solution) for gold, solution in rows if solution]),
    }
    sizes = ", ".join(f"{len(cases)} {kind}" for kind, (_, cases) in kinds.items())
    lines = [f"{path.name}: {len(rows)} rows, {len(golds)} different gold answers; wrong of {sizes}"]
    for name, right in graders().items():
        wrong = {
            kind: [case for case in cases if right(case[2], case[0]) is not wanted]
            for kind, (wanted, cases) in kinds.items()
        }
        common = Counter(done for cases in wrong.values() for _, done, _ in cases).most_common(6)
        lines.append(
            f"  {name:<12}"
            + "".join(f"{len(cases):>7}" for cases in wrong.values())
            + "   "
            + ", ".join(f"{done} {count}" for done, count in common)
        )
        if name == "thinkrl":
            shown = [(kind, case) for kind, cases in wrong.items() for case in cases[:show]]
    lines += [f"    {kind}, {done}: {text[-200:]!r} for {gold!r}" for kind, (gold, done, text) in shown]
    return "\n".join(lines)


def main(paths: list[Path], options: Options) -> None:
    for path in paths:
        print(report(path, options.show), flush=True)


if __name__ == "__main__":
    run_tool("thinkrl.tools.grading_report", parse, lambda parsed: main(*parsed))
