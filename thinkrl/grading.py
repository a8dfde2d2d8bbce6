r"""Is the answer right? One rule set per kind of data, exact where it can be, and never `eval`.

    rule set   the answer is                                       equal means
    arith      the last `<answer>…</answer>`                       the same rational number
    gsm8k      the first number after the last `####`, same line   the same rational number
    math       the last `\boxed{…}` that is closed                 the same canonical form, else symbolic equality

A rule set has one marker, the one that its prompt asks for; no marker, no answer. Numbers are compared as
`fractions.Fraction`, so 1/3 is not 0.333333. `math` compares, in this order: normalised strings
(`normalise`), rational numbers, then tuples, intervals, sets, unions and inequalities part by part
(`canonical`). What these leave open goes to math-verify, if the `[math]` extra is installed: in a worker
process that ends after `TIMEOUT` seconds of its own time, since sympy on a model's text may run for ever and signals
fire in the main thread only. Without the extra it is wrong. Numbers, and tuples and sets of them, are never
sent there (exact arithmetic has the last word), nor are words and times.

Ten cases on which public scorers disagree, and what happens here, under `math` if the completion has a box,
else `gsm8k`:

    completion                      gold            verdict   because
    \boxed{42}                      42              right     under math; wrong under gsm8k, whose marker is ####
    #### 42.                        42              right     a full stop ends the sentence, not the number
    #### 42.0                       42              right     equal numbers
    \boxed{0.25}                    \frac14         right     equal numbers
    \boxed{\dfrac{3}{4}}            \frac{3}{4}     right     \dfrac is \frac
    \boxed{2\sqrt3}                 \sqrt{12}       right     with the [math] extra; wrong without
    \boxed{50\%}                    50              right     a percent sign is a unit, units are dropped; 0.5 is not 50\%
    \boxed{1} no, \boxed{2}         2               right     the last box counts
    the answer is 42                42              wrong     no marker
    \boxed{7} and 400 characters    7               right     the whole text is searched

Other readings: `1,000` outside brackets is a thousand, `(1,000)` a pair; `1\frac12` and `1 1/2` are three
halves; a list of solutions has no order, a tuple has; `x = 5` is 5; words ignore case; an answer longer than
`MAX_ANSWER` characters is wrong. Every step is linear in the text, or works on at most `MAX_ANSWER`
characters.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib.util
import inspect
import json
import re
import select
import subprocess
import sys
import threading
from collections.abc import Hashable
from fractions import Fraction

from thinkrl import UserError

MAX_ANSWER = 500  # characters
TIMEOUT = 3.0  # seconds of processor time that one symbolic comparison may take

RULES = ("arith", "gsm8k", "math")
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
    """The rule set that grades this data source, one of `RULES`. UserError, with the nearest name, if none
    does.
    """
    name = source.lower()
    if name in RULES:
        return name
    if name in DATA_SOURCES:
        return DATA_SOURCES[name]
    if name.startswith("aime"):
        return "math"
    nearest = difflib.get_close_matches(name, [*RULES, *DATA_SOURCES], n=1, cutoff=0)[0]
    raise UserError(
        f"no grading rule for data source {source!r} (nearest: {nearest!r}): set source to one of {', '.join(RULES)}"
    )


def extract(text: str, source: str) -> str | None:
    """The answer that a completion gives, as written, or None if its marker is missing."""
    return {"arith": _last_tag, "gsm8k": _after_hashes, "math": _last_box}[rule_set(source)](text)


def grade(text: str, gold: str, source: str) -> bool:
    """Whether the completion's answer is the gold one. Never raises on any `text`."""
    answer = extract(text, source)
    return answer is not None and equal(answer, gold, source)


def equal(answer: str, gold: str, source: str) -> bool:
    """Whether two extracted answers mean the same under the rule set of `source`."""
    a, b = canonical(answer, source), canonical(gold, source)
    if a is None or b is None:
        return False
    if a == b:
        return True
    if rule_set(source) != "math" or (_exact(a) and _exact(b)):
        return False
    return _symbolically_equal(normalise(answer), normalise(gold))


def canonical(answer: str, source: str) -> Hashable | None:
    """A value that is == for answers that are equal without algebra, to compare or to count votes. None:
    not an answer.
    """
    if len(answer) > MAX_ANSWER:
        return None
    if rule_set(source) != "math":
        return rational(answer.strip().rstrip(".,"))
    text = normalise(answer)
    return _structure(text) if text else None


def check_gold(gold: str, source: str) -> None:
    """Raise ValueError if no completion could ever equal this gold answer: a mistake in the data, never a
    reward.
    """
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


_NUMBER_AFTER_HASHES = re.compile(
    r"([-+]?) ?[$€£]? ?([-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?: ?/ ?\d+)?)"
)


def _after_hashes(text: str) -> str | None:
    start = text.rfind("####")
    if start < 0:
        return None
    line = text[start + 4 : start + 4 + MAX_ANSWER].split("\n", 1)[0].replace("\\", "").replace("−", "-")
    found = _NUMBER_AFTER_HASHES.search(line)
    return (found[1] + found[2]).rstrip(".,") if found else None


_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def _last_box(text: str) -> str | None:
    """Contents of the box that opens last among those that close, in one pass however many are left open."""
    open_at: list[int | None] = []  # where a box's contents start, None for any other brace
    best = (-1, -1)
    for token in _BOX_OR_BRACE.finditer(text):
        mark = token[0]
        if mark == "}":
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


_REAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_FORMS = [  # after thousands separators are gone
    re.compile(rf"(?P<sign>[-+]?)(?P<top>{_REAL})(?:\s*/\s*(?P<bottom>-?{_REAL}))?"),
    re.compile(rf"(?P<sign>[-+]?)(?P<whole>\d+)?\\frac\{{(?P<top>-?{_REAL})\}}\{{(?P<bottom>-?{_REAL})\}}"),
    re.compile(rf"(?P<sign>[-+]?)(?P<top>{_REAL})(?:[eE]|\*10\^)\{{?(?P<exponent>[-+]?\d{{1,3}})\}}?"),
]


def rational(text: str) -> Fraction | None:
    r"""The exact number that the text is: integer, decimal, a/b, \frac{a}{b}, mixed number, 1.5e3, 3*10^{5}; or None.

    Thousands separators are read where they stand in threes. The text is at most `MAX_ANSWER` characters
    long, far below the length at which Python refuses to read an integer, and exponents have at most three
    digits.
    """
    text = _THOUSANDS.sub(_without_commas, text)
    for form in _FORMS:
        if found := form.fullmatch(text):
            part = found.groupdict()
            value, bottom = Fraction(part["top"]), Fraction(part.get("bottom") or 1)
            if bottom == 0:
                return None
            value = value / bottom + int(part.get("whole") or 0)
            value *= Fraction(10) ** int(part.get("exponent") or 0)
            return -value if part["sign"] == "-" else value
    return None


def _command(names: str) -> str:
    return rf"\\(?:{names})(?![A-Za-z])"


_TEXT = _command("text|textbf|textit|textrm|textnormal|mbox|hbox|mathrm|mathbf|operatorname") + r"\s*"
_UNIT = (
    r"degrees?|dollars?|cents?|percent|units?|(?:centi|milli|kilo)?met(?:er|re)s?|cm|mm|km|inch(?:es)?|feet|foot|ft|yards?|miles?"
    r"|mph|seconds?|minutes?|hours?|days?|weeks?|months?|years?|(?:kilo)?grams?|kg|pounds?|lbs?|ounces?|oz|lit(?:er|re)s?|gallons?"
)
_SQUARED = r"(?:\s*\^\s*\{?\s*\d\s*\}?)?"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # one spelling for each command
        (_command("dfrac|tfrac|cfrac"), r"\\frac"),
        (rf"<=|{_command('le|leqslant')}", r"\\leq "),
        (rf">=|{_command('ge|geqslant')}", r"\\geq "),
        (_command("lt"), "<"),
        (_command("gt"), ">"),
        (_command("lbrace"), r"\\{"),
        (_command("rbrace"), r"\\}"),
        (_command("cdot|times"), "*"),
        # what shows but does not mean
        (r"\\!", ""),
        (r"\{,\}", ","),
        (
            _command("left|right|[bB]igg?[lrm]?|displaystyle|textstyle|quad|qquad|limits") + r"|\\[,;:> ]|~",
            " ",
        ),
        (r"\\[()\[\]]|\\?[$%]", ""),
        (rf"\^\s*(?:\{{\s*{_command('circ')}\s*\}}|{_command('circ')})|{_command('degree')}", ""),
        # words and units
        (rf"{_TEXT}\{{\s*(?:and|or)\s*\}}|(?<=\s)(?:and|or)(?=\s)", ", "),
        (rf"(?<=\S)\s*{_TEXT}\{{(?!\s*[ap]\.?m)[^{{}}]*\}}{_SQUARED}\s*$", ""),
        (rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1"),
        (rf"(?<=[\d}}])\s*(?:square |cubic |sq\.? )?\s*(?:{_UNIT}){_SQUARED}\s*$", ""),
        (r"[\s.,;:]+$", ""),
        # arguments in braces, numbers in full
        (r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*([0-9A-Za-z])", r"\\frac\1{\2}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![\d./}])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2"),
        (r"(?<!\d)\.(?=\d)", "0."),
        (r"(^|[(\[,{])\s*\+", r"\1"),
    ]
]
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "°": "", "％": "", "，": ", ", "\xa0": " "}
    | {
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "∪": r"\cup ",
    }
)
_BRACKET = re.compile(r"(\\[{}]|[()\[\]])")
_SPACE = re.compile(r"(\\[A-Za-z]+)?\s+([A-Za-z])?")


def normalise(answer: str) -> str:
    """One spelling for answers that differ in notation only: `_REWRITES`, to their fixed point. Idempotent.

    Spaces are dropped where LaTeX drops them; a comma that separates is followed by one, thousands separators
    are gone.
    """
    text = answer.translate(_UNICODE)
    for _ in range(MAX_ANSWER):  # each pass shortens, or ends; this bounds what a hostile text can ask for
        before = text
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _SPACE.sub(_space_that_ends_a_command, _join_thousands(text)).replace(",", ", ").strip()
        if text == before:
            break
    return text


def _join_thousands(text: str) -> str:
    """1,000 -> 1000, but in (1,000) the comma separates."""
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


def _space_that_ends_a_command(space: re.Match) -> str:
    r"""\pi x keeps its space, all others go."""
    command, letter = space[1] or "", space[2] or ""
    return f"{command} {letter}" if command and letter else command + letter


_TOKEN = re.compile(r"\\[A-Za-z]+ ?|\\.|.", re.DOTALL)
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_FLIPPED = {">": "<", r"\geq": r"\leq"}
_RELATIONS = {"<", r"\leq", "=", r"\neq", r"\in", *_FLIPPED}
_NAME = re.compile(r"[A-Za-z](?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?\s*")
_MAX_DEPTH = 8  # of brackets in brackets; deeper ones are compared as written


def _structure(text: str, depth: int = 0) -> Hashable:
    """Normalised text -> number, relation, set, tuple, or the text itself."""
    text = text.strip()
    number = rational(text)
    if number is not None:
        return number
    if depth == _MAX_DEPTH:
        return text

    def inner(parts: list[str]) -> list[Hashable]:
        return [_structure(part, depth + 1) for part in parts]

    items, _ = _split(text, {","})
    if len(items) > 1:
        return ("set", *sorted(inner(items), key=repr))  # a list of solutions has no order
    operands, relations = _split(text, _RELATIONS)
    if len(relations) == 1 and relations[0] in ("=", r"\in") and _NAME.fullmatch(operands[0]):
        return _structure(operands[1], depth + 1)  # x = 5 is 5
    if relations:
        if all(r in _FLIPPED for r in relations):  # 5 > x is x < 5
            operands, relations = operands[::-1], [_FLIPPED[r] for r in reversed(relations)]
        return ("relation", *relations, *inner(operands))
    pieces, _ = _split(text, {r"\cup"})
    if len(pieces) > 1:
        return ("union", *sorted(inner(pieces), key=repr))
    if bracketed := _bracketed(text):
        opening, content, closing = bracketed
        items, _ = _split(content, {","})
        if opening == r"\{":
            return ("set", *sorted(inner(items), key=repr))
        if len(items) == 1 and opening == "(" and closing == ")":
            return _structure(content, depth + 1)
        return (opening + closing, *inner(items))
    return text.casefold() if text.isalpha() and len(text) > 2 else text


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Parts between the separators that stand outside all brackets, and these separators."""
    parts, found, depth = [""], [], 0
    for token in _TOKEN.findall(text):
        if depth == 0 and token.strip() in separators:
            parts.append("")
            found.append(token.strip())
        else:
            depth += (token in _OPENING) - (token in _CLOSING)
            parts[-1] += token
    return parts, found


def _bracketed(text: str) -> tuple[str, str, str] | None:
    """("(", "1, 2", "]") of "(1, 2]", if the first token's bracket closes with the last token."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 3 or tokens[0] not in ("(", "[", r"\{") or tokens[-1] not in (")", "]", r"\}"):
        return None
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return (tokens[0], "".join(tokens[1:-1]), tokens[-1]) if position == len(tokens) - 1 else None
    return None


def _exact(value: Hashable) -> bool:
    """Whether a canonical form is made of numbers only, so that algebra has nothing to add."""
    return isinstance(value, Fraction) or (isinstance(value, tuple) and all(map(_exact, value[1:])))


_NO_ALGEBRA = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|:")


@functools.lru_cache(maxsize=4096)  # the answers of a group repeat
def _symbolically_equal(answer: str, gold: str) -> bool:
    if not has_algebra() or _NO_ALGEBRA.search(answer) or _NO_ALGEBRA.search(gold):
        return False  # as algebra, "east" and "seat" are one product of variables, and 10:30am is 10:30pm
    return _algebra.equal(answer, gold)


@functools.cache
def has_algebra() -> bool:
    """Whether math-verify, the `[math]` extra, is installed. Reported accuracies depend on it: say which."""
    return importlib.util.find_spec("math_verify") is not None


def _serve_algebra() -> None:
    """The worker's whole program: reads one JSON pair per line, writes "1" or "0" for each, after a first
    "." when ready.
    """
    import json
    import os
    import resource
    import signal
    import sys

    from math_verify import parse, verify

    def limit(kind, amount):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))

    reply, sys.stdout = sys.stdout, open(os.devnull, "w")
    limit(resource.RLIMIT_AS, 4 << 30)
    print(".", end="", file=reply, flush=True)
    for line in sys.stdin:
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends this process: nothing handles it
        try:
            both = [parse(f"${latex}$", parsing_timeout=None) for latex in (gold, answer)]
            same = verify(*both, float_rounding=12, timeout_seconds=None)
        except Exception:  # whatever a model's text does to the parser, it has not been shown to be equal
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(bool(same)), end="", file=reply, flush=True)


class _Algebra:
    """A worker process that compares two LaTeX expressions: started when first needed, ended when late."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, answer: str, gold: str) -> bool:
        """Whether math-verify finds the two equal within `TIMEOUT` seconds of processor time.

        Processor time, so that a busy machine grades as an idle one; the wait of the caller is only a last
        resort, should the worker hang without computing.
        """
        with self.lock:
            if self.process is None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([answer, gold, TIMEOUT]).encode() + b"\n")
                verdict = self._read(20 * TIMEOUT)
            except BrokenPipeError:
                verdict = b""
            if not verdict:
                self.close()
            return verdict == b"1"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        program = f"{inspect.getsource(_serve_algebra)}\n_serve_algebra()"
        pipe = subprocess.PIPE
        # from the root folder: the current one comes first on the worker's path, and may hold a types.py
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
        )
        if self._read(60.0) != b".":
            raise UserError(
                "math-verify is installed but does not start: pip install --force-reinstall 'thinkrl[math]'"
            )

    def _read(self, seconds: float) -> bytes:
        """One byte, or none if it does not come in time or the worker is dead."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.read(1) if ready else b""


_algebra = _Algebra()
