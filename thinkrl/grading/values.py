r"""Values of answers: == for answers that are equal without algebra (which algebra.py adds).

A Value is a `Fraction`, a text that is not a number, or a tuple (kind, part, …) whose parts are Values:

    kind                            written
    "()" "[)" "(]" "[]"             (1, 2), [1, 2), 1 \le x < 2, x > 5, matrix column: tuple or interval
    "set"                           1, 2 · 2 or 1 · \{1, 2\} · 1 \pm 2 · x = 1, x = 2             no order
    "named"                         x = 1, y = 2                                                  by name
    "union"                         [1, 2) \cup (3, \infty) · x < 1 or x > 2 · x \ne 3            no order
    "matrix", "row"                 \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
    "=" (a name, a Value)           x = 5 · 5 = x · f(x) = x^2 · x \in [1, 2)
    "relation" (signs, then parts)  x + y = 5 · a < b

`value` reads one, and `same` compares two, with a judge for parts that are not numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from thinkrl.grading.notation import ROW_END, rational

Value = Any  # a Fraction, a str or a tuple; hashable
Judge = Callable[[str, str], bool]  # whether two LaTeX texts are the same by algebra

_TOKEN = re.compile(r"\\[A-Za-z]+ ?|\\.|.", re.DOTALL)
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_FLIPPED = {">": "<", r"\geq": r"\leq"}
_RELATIONS = {"=", r"\in", r"\neq", "<", r"\leq", *_FLIPPED}
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|"
    "varphi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_NAME = re.compile(  # x, x_{1}, AB, Area, f(x), f^{-1}(x), y', \theta, \angle ABC, (a, b)
    r"(?:\\(?:angle|triangle) ?)?"
    rf"(?:[A-Za-z]+|\\overline\{{[A-Za-z]+\}}|\\(?:{_GREEK}))(?:_\{{[^{{}}]*\}})?'*"
    rf"(?:\^\{{-1\}})?(?:\([A-Za-z](?:, [A-Za-z])*\))?\s*|\([A-Za-z](?:, [A-Za-z])+\)"
)
_MATRIX = re.compile(
    r"(.*?)([\[(]?)\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\3\}([\])]?)",
    re.DOTALL,
)
_CONDITION = re.compile(rf"({_NAME.pattern})(?:\\in ?\\mathbb\{{R\}})?(?:\\mid ?|:|\|)(.+)")
_MAX_DEPTH = 8  # of brackets in brackets; deeper ones are compared as written
REALS = ("()", r"-\infty", r"\infty")


def value(text: str, depth: int = 0) -> Value:
    """Value of a normalised text."""
    text = text.strip().removeprefix("+")
    number = rational(text)
    if number is not None:
        return number
    if depth == _MAX_DEPTH:
        return text
    items, separators = _split(text, {",", ";", r"\lor"})
    items = [signed for item in items if item.strip() for signed in _both_signs(item.strip())]
    if len(items) > 1:
        return _list(items, separators, depth)
    text = items[0].strip().removeprefix("+") if items else text
    operands, signs = _split(text, _RELATIONS)
    if signs:
        return _relation(operands, signs, depth)
    pieces, _ = _split(text, {r"\cup"})
    if len(pieces) > 1:
        return _unordered("union", [value(piece, depth + 1) for piece in pieces])
    if r"\begin" in text and (found := _MATRIX.fullmatch(text)):
        return _matrix(found, depth) or text
    if bracketed := _bracketed(text):
        return _in_brackets(*bracketed, depth)
    if text == r"\mathbb{R}":
        return REALS
    if text == r"\emptyset":
        return ("set",)
    return text.casefold() if text.isalpha() and len(text) > 2 else text


def _unordered(kind: str, values: Iterable[Value]) -> Value:
    return (kind, *sorted(values, key=repr))


def _both_signs(item: str) -> list[str]:
    r"""Replace 1 \pm 2 by 1 + 2 and 1 - 2, except inside a set's braces, where its elements are read."""
    if item.startswith(r"\{") or not re.search(r"\\(?:pm|mp)(?![A-Za-z])", item):
        return [item]
    return [
        re.sub(r"\\pm(?![A-Za-z]) ?", upper, re.sub(r"\\mp(?![A-Za-z]) ?", lower, item))
        for upper, lower in ("+-", "-+")
    ]


def _list(items: list[str], separators: list[str], depth: int) -> Value:
    """Value of several answers: a set (without names if all are equal), values by name, or a union of
    inequalities.
    """
    values = [value(item, depth + 1) for item in items]
    names = {part[1] for part in values if _kind(part) == "="}
    if 1 < len(names) == len(values):
        return ("named", *values)
    if set(separators) == {r"\lor"} and all(_split(item, {"<", r"\leq", *_FLIPPED})[1] for item in items):
        return _unordered("union", values)
    return _unordered("set", [unnamed(part) for part in values] if len(names) == 1 else values)


def _relation(operands: list[str], signs: list[str], depth: int) -> Value:
    def parse(text: str) -> Value:
        return value(text, depth + 1)

    names = [bool(_NAME.fullmatch(operand)) for operand in operands]
    if all(sign in ("=", r"\in") for sign in signs):
        if not operands[0]:
            return parse(operands[-1])  # = 5, or about 5
        if len(operands) == 2 and names == [False, True] and signs == ["="]:
            operands, names = operands[::-1], [True, False]  # 5 = x
        if names[0]:
            return ("=", operands[0].strip(), parse(operands[-1]))  # also x = 1/2 = 0.5
        values = [parse(operand) for operand in operands]
        if len(set(values)) == 1 and isinstance(values[0], Fraction):
            return values[0]
        return ("relation", *signs, *(sorted(values, key=repr) if signs == ["="] else values))
    if signs == [r"\neq"] and names == [True, False]:
        return _without(parse(operands[1]))
    if all(sign in _FLIPPED for sign in signs):  # 5 > x is x < 5
        operands, names, signs = operands[::-1], names[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
    if all(sign in ("<", r"\leq") for sign in signs) and sum(names) == 1:
        position = names.index(True)
        low, high = operands[:position], operands[position + 1 :]
        if len(low) <= 1 and len(high) <= 1:
            opening = "(" if not low or signs[0] == "<" else "["
            closing = ")" if not high or signs[-1] == "<" else "]"
            return (
                opening + closing,
                parse(low[0]) if low else REALS[1],
                parse(high[0]) if high else REALS[2],
            )
    return ("relation", *signs, *map(parse, operands))


def _without(point: Value) -> Value:
    """Set of all real numbers except this one."""
    return _unordered("union", [("()", REALS[1], point), ("()", point, REALS[2])])


def _matrix(found: re.Match, depth: int) -> Value | None:
    """Entries of a matrix, multiplied by the number before it; one column is a tuple. None: not a matrix."""
    before, opening, environment, body, closing = found.groups()
    factor = rational(f"{before}1" if before in ("", "-") else before.rstrip("*"))
    if factor is None or r"\begin" in body or (opening + closing) not in ("", "()", "[]"):
        return None
    rows = [
        [_times(factor, value(entry, depth + 1)) for entry in _split(row, {"&"})[0]]
        for row in re.split(rf"{ROW_END}(?:\[[\d.]*(?:pt|em|ex|[mc]m)\])?", body)
        if row.strip()
    ]
    if not rows or any(entry is None for row in rows for entry in row) or len({len(row) for row in rows}) > 1:
        return None
    if len(rows[0]) == 1 < len(rows):
        return ("()", *(row[0] for row in rows))
    return ("matrix", *(("row", *row) for row in rows))


def _times(factor: Fraction, entry: Value) -> Value | None:
    if factor == 1:
        return entry
    return factor * entry if isinstance(entry, Fraction) else None


def _in_brackets(opening: str, content: str, closing: str, depth: int) -> Value:
    if opening == "{":
        return value(content, depth + 1)
    if opening == r"\{" and (found := _CONDITION.fullmatch(content)):
        condition = value(f"{found[1]}{found[2]}" if found[2][0] in "<>=" else found[2], depth + 1)
        if _kind(condition) not in ("", "relation"):
            return condition  # {x | x > 5}
    items, separators = _split(content, {",", ";"})
    if opening == r"\{":
        values = {value(signed, depth + 1) for item in items for signed in _both_signs(item.strip())}
        return values.pop() if len(values) == 1 else _unordered("set", values)
    if not separators and opening == "(" and closing == ")":
        return value(content, depth + 1)
    return (opening + closing, *(value(item, depth + 1) for item in items))


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Split at separators outside all brackets: the parts, and these separators."""
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
    """Split "(1, 2]" into ("(", "1, 2", "]"), if the first bracket is closed by the last one."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 3 or tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return None
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return (tokens[0], "".join(tokens[1:-1]), tokens[-1]) if position == len(tokens) - 1 else None
    return None


def _kind(part: Value) -> str:
    return part[0] if isinstance(part, tuple) else ""


def unnamed(part: Value) -> Value:
    """Remove a name: x = 5 -> 5."""
    return part[2] if _kind(part) == "=" else part


def same(a: Value, b: Value, judge: Judge) -> bool:
    """Whether two Values are equal; `judge` compares two texts that are not numbers."""
    if a == b:
        return True
    kinds = {_kind(a), _kind(b)}
    if kinds <= {"=", "relation"} or kinds == {""}:
        if kinds == {"="} and (value(a[1]), a[2]) == (b[2], value(b[1])):
            return True  # x = y, y = x
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        return not exact and judge(_latex(a), _latex(b))
    if "named" in kinds:
        return _same_named(*((a, b) if _kind(a) == "named" else (b, a)), judge)
    if len(kinds) > 1 or len(a) != len(b):
        return False
    if kinds <= {"set", "union"}:
        return _same_unordered(a[1:], b[1:], judge)
    return all(same(x, y, judge) for x, y in zip(a[1:], b[1:]))


def _same_unordered(a: Sequence[Value], b: Sequence[Value], judge: Judge) -> bool:
    left, right = Counter(a), Counter(b)
    open_a, open_b = list((left - right).elements()), list((right - left).elements())
    for part in open_a:
        partner = next((other for other in open_b if same(part, other, judge)), None)
        if partner is None:
            return False
        open_b.remove(partner)
    return not open_b


def _same_named(named: Value, other: Value, judge: Judge) -> bool:
    """Whether x = 2, y = 3 equals the same in another order, or (2, 3), or 2, 3 without names."""
    if _kind(other) == "named":
        a, b = ({part[1]: part[2] for part in group[1:]} for group in (named, other))
        return len(named) == len(other) and a.keys() == b.keys() and all(same(a[x], b[x], judge) for x in a)
    as_written = [part[2] for part in named[1:]]
    by_name = [part[2] for part in sorted(named[1:], key=lambda part: part[1])]
    if _kind(other) == "set":
        return len(as_written) == len(other) - 1 and _same_unordered(as_written, other[1:], judge)
    return any(same(("()", *values), other, judge) for values in (as_written, by_name))


def _latex(part: Value) -> str:
    """LaTeX of a number, a text or an equation of these, for algebra; "" for other values."""
    if isinstance(part, Fraction):
        return (
            str(part.numerator)
            if part.denominator == 1
            else rf"\frac{{{part.numerator}}}{{{part.denominator}}}"
        )
    if isinstance(part, str):
        return part
    if _kind(part) == "=":
        part = ("relation", "=", *part[1:])
    if _kind(part) != "relation":
        return ""
    signs, operands = part[1 : len(part) // 2], [_latex(operand) for operand in part[len(part) // 2 :]]
    if not all(operands):
        return ""
    return operands[0] + "".join(f"{sign} {operand}" for sign, operand in zip(signs, operands[1:]))
