r"""Canonical spelling of LaTeX answers that differ in notation only, and exact numbers read from them.

`normalise` replaces the row end of a matrix, `\\`, by the character `ROW_END`, so that no rule joins one of
its backslashes with the text after it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MAX_ANSWER = 500  # characters; a longer text is not an answer
ROW_END = "\x01"  # not matched by \s

_REAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_FORMS = [  # after thousands separators are gone
    re.compile(rf"(?P<sign>[-+]?)(?P<top>{_REAL})(?:\s*/\s*(?P<bottom>-?{_REAL}))?"),
    re.compile(rf"(?P<sign>[-+]?)(?P<whole>\d+)?\\frac\{{(?P<top>-?{_REAL})\}}\{{(?P<bottom>-?{_REAL})\}}"),
    re.compile(rf"(?P<sign>[-+]?)(?P<top>{_REAL})(?:[eE]|\*10\^)\{{?(?P<exponent>[-+]?\d{{1,3}})\}}?"),
    re.compile(r"(?P<sign>[-+]?)10\^\{(?P<exponent>[-+]?\d{1,3})\}"),
    re.compile(r"(?P<sign>[-+]?)(?P<top>\d*\.\d*)\\overline\{(?P<period>\d+)\}"),
]


def rational(text: str) -> Fraction | None:
    r"""Exact number written in the text, or None.

    It may be an integer, a decimal, a/b, \frac{a}{b}, a mixed number, 1.5e3, 3*10^{5} or 0.1\overline{6},
    with thousands separators between groups of three digits. The text has at most `MAX_ANSWER` characters,
    far fewer than Python's limit for integers, and exponents have at most three digits.
    """
    text = _THOUSANDS.sub(_without_commas, text)
    for form in _FORMS:
        if found := form.fullmatch(text):
            part = found.groupdict()
            top, bottom = part.get("top", "1"), Fraction(part.get("bottom") or 1)
            if bottom == 0:
                return None
            value = Fraction(f"0{top}" if top.startswith(".") else top) / bottom + int(part.get("whole") or 0)
            if period := part.get("period"):
                decimals = len(top.partition(".")[2])
                value += Fraction(int(period), 10**decimals * (10 ** len(period) - 1))
            value *= Fraction(10) ** int(part.get("exponent") or 0)
            return -value if part["sign"] == "-" else value
    return None


def _command(names: str) -> str:
    return rf"\\(?:{names})(?![A-Za-z])"


_TEXT = _command("text|textrm|textnormal|mbox|hbox|mathrm|operatorname|rm") + r"\s*"
_STYLED = (
    _command("text|textrm|textnormal|mbox|hbox|mathrm|operatorname|textbf|textit|mathbf|mathit|emph") + r"\s*"
)
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_LENGTHS = (
    r"(?:centi|milli|kilo)?met(?:er|re)s?|[cmk]m|in|inch(?:es)?|feet|foot|ft|yards?|miles?|mph|m(?=\s*/\s*s)"
)
_TIMES = r"seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?"
_MASSES = r"(?:kilo|milli)?grams?|[mk]g|tons?|pounds?|lbs?|ounces?|oz|(?:milli)?lit(?:er|re)s?|m[lL]|gallons?"
_OTHERS = r"degrees?|percent|dollars?|euros?|USD|cents?|units?"
_UNIT = rf"(?:square |cubic |sq\.? |cu\.? )?(?:{_LENGTHS}|{_TIMES}|{_MASSES}|{_OTHERS}){_POWER}"
_ARGUMENT = r"\d+|[A-Za-z]|\\(?!frac|sqrt|overline|text|begin|end|cdot)[A-Za-z]+"
_REWRITES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # digits in groups of three
        (r"(?<=\d)(?:,\s*\\!|\\!\s*,|\{\s*,\s*\}|\\[,!:; ]|~)\s*(?:\\!)?\s*(?=\d{3}(?!\d))", ""),
        (
            r"(?<![\w.,])(?<![\d.,] )([1-9]\d{0,2}(?: \d{3})+)(?![\d.,]| \d)",
            lambda found: found[0].replace(" ", ""),
        ),
        # one spelling for each command
        (_command("[dtc]frac"), r"\\frac"),
        (rf"<=|{_command('le|leqslant|leqq')}", r"\\leq "),
        (rf">=|{_command('ge|geqslant|geqq')}", r"\\geq "),
        (rf"!=|{_command('ne')}", r"\\neq "),
        (_command("lt"), "<"),
        (_command("gt"), ">"),
        (_command("lbrace"), r"\\{"),
        (_command("rbrace"), r"\\}"),
        (_command("langle"), "("),
        (_command("rangle"), ")"),
        (rf"\^\s*(?:\{{\s*{_command('prime')}\s*\}}|{_command('prime')})", "'"),
        (_command("cdot|times|ast"), "*"),
        (_command("div"), "/"),
        (_command("colon"), ":"),
        (_command("approx|simeq|thickapprox|doteq"), "="),
        (_command("vee|lor"), r"\\lor "),
        (rf"{_command('emptyset|varnothing')}|\\\{{\s*\\\}}", r"\\emptyset "),
        (_command("bar|dot"), r"\\overline"),
        (rf"{_command('mathbb|Bbb')}\s*(?:R(?![A-Za-z])|\{{\s*R\s*\}})", r"\\mathbb{R}"),
        (r"(?<![\\A-Za-z])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:inf|infinity)(?![A-Za-z])", r"\\infty "),
        # emphasis of Markdown, a letter's bracket
        (r"^\s*\*{1,2}([^*]+)\*{1,2}\s*$", r"\1"),
        (r"\*\*", "^"),
        (r"^\s*([A-Za-z])\)\s*$", r"\1"),
        # formatting without meaning
        (r"\\!", ""),
        (r"\{\s*,\s*\}", ","),
        (_command("[hv]?phantom") + r"\s*(?:\{[^{}]*\}|.)?", ""),
        (_command("[hv]space") + r"\*?\s*\{[^{}]*\}", " "),
        (rf"{_command('q?quad')}(?=\s*\\(?:text|mathrm|mbox))", " "),
        (_command("q?quad"), ", "),
        (_command("left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits"), " "),
        (r"\\[,;:> ]|~", " "),
        (r"\\[()\[\]]|\\?[$%]", ""),
        (rf"\^\s*(?:\{{\s*{_command('circ')}\s*\}}|{_command('circ')})|{_command('degree')}", "°"),
        (r"°\s*[CF]\s*$", "°"),
        # words and units
        (rf"[\s.,;:\\{ROW_END}]+$", ""),
        *(
            (rf"(?<=\d)\s*({_TEXT}\{{\s*)?{name}", rf"*10^{{{zeros}}}\1")
            for name, zeros in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
        ),
        (rf"{_TEXT}\{{\s*,?\s*and\s*,?\s*\}}|(?<=[\s,])and(?=\s)", ", "),
        (rf"{_TEXT}\{{\s*,?\s*or\s*,?\s*\}}|(?<=[\s,])or(?=\s)", r"\\lor "),
        (r"(?<=\d)\s*(?:\\text\s*\{)?\s*([ap])\.?\s?m\.?\s*\}?\s*$", r"\1m"),
        (rf"(?<=\S)\s*[*/]?\s*{_TEXT}\{{(?!\s*[iej]\s*\}})[^{{}}]*\}}{_POWER}\s*$", ""),
        (rf"{_STYLED}\{{([^{{}}]*)\}}", r"\1"),
        (r"\{\s*\\rm(?![A-Za-z])([^{}]*)\}", r"\1"),
        (rf"(?:(?<=[\d)}}])|(?<=pi))\s*{_UNIT}(?:\s*(?:/|per )\s*(?:{_UNIT}|[smhg]{_POWER}))?\s*$", ""),
        (r"(?i)^\s*(?:the )?(?:final )?answer(?: is|:)\s*:?", ""),
        # arguments in braces, numbers in full
        (rf"(\\sqrt\s*(?:\[[^\[\]]*\])?|\\overline)\s*({_ARGUMENT})", r"\1{\2}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d|[A-Za-z]|\\[A-Za-z]+)", r"\\frac{\1}"),
        (rf"([\^_])\s*({_ARGUMENT})", r"\1{\2}"),
        (r"\^\s*-\s*(\d+|[A-Za-z])", r"^{-\1}"),
        (r"(?<![\d./}])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"(?<!\d)\.(?=\d)", "0."),
        (r"(?<=\d)\*(?=(?![eE])[A-Za-z]|\\(?:sqrt|pi)(?![A-Za-z]))", ""),  # 2*x
    ]
]
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "％": "%", "，": ", ", "\xa0": " ", "€": "", "£": ""}
    | {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": "=", "±": r"\pm ", "∈": r"\in ", "∅": r"\emptyset "}
    | {"π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ", "θ": r"\theta ", "ℝ": r"\mathbb{R}"}
    | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^{2}", "³": "^{3}"}
)
_BRACKET = re.compile(r"(\\[{}]|[()\[\]])")
_SPACE = re.compile(r"(\\[A-Za-z]+|\d)?\s+(?=([A-Za-z\d])?)")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*°")


def normalise(answer: str) -> str:
    """Canonical spelling of an answer: apply `_REWRITES` until nothing changes. Idempotent.

    Spaces that LaTeX ignores are removed, except between digits. A separating comma is followed by a space;
    thousands separators are removed.
    """
    text = answer.translate(_UNICODE)
    if "\\\\" in text and ("\\begin" not in text or "\\\\begin" in text):
        text = text.replace("\\\\", "\\")  # escaped twice, \\frac for \frac, or a break that ends no row
    text = text.replace("\\\\", ROW_END)
    for _ in range(MAX_ANSWER):  # bounds the work for any text; two or three passes are usual
        before = text
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _second_arguments(text)
        if _TRIGONOMETRIC.search(text):
            text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
        text = text.replace("°", "")
        text = _SPACE.sub(_space_that_means, _join_thousands(text)).replace(",", ", ").strip()
        if text == before:
            break
    return text


def _second_arguments(text: str) -> str:
    r"""Put missing braces: \frac{a}b -> \frac{a}{b}, also with nested braces in a."""
    for command in reversed(list(re.finditer(r"\\frac\s*(?=\{)", text))):
        end = _closing(text, command.end())
        argument = re.compile(r"\s*(\d|[A-Za-z]|\\[A-Za-z]+)").match(text, end)
        if argument:
            text = f"{text[:end]}{{{argument[1]}}}{text[argument.end() :]}"
    return text


def _closing(text: str, opening: int) -> int:
    """Position after the brace that closes the one at `opening`, or the end of the text."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def _join_thousands(text: str) -> str:
    """Remove thousands separators, 1,000 -> 1000, except in brackets: (1,000) has two parts."""
    parts = _BRACKET.split(text)  # text, bracket, text, bracket, ...
    depth = 0
    for i, part in enumerate(parts):
        if i % 2:
            depth += 1 if part[-1] in "([{" else -1
        elif depth == 0:
            parts[i] = _THOUSANDS.sub(_without_commas, part)
    return "".join(parts)


def _without_commas(number: re.Match) -> str:
    return number[0].replace(",", "")


def _space_that_means(space: re.Match) -> str:
    r"""Keep the space of \pi x and of 1 2, and remove all others."""
    before, behind = space[1] or "", space[2] or ""
    keep = behind.isalpha() if before.startswith("\\") else before and behind.isdigit()
    return f"{before} " if keep else before
