"""Formats of numbers and text in a report."""

from __future__ import annotations

import json
import math
import re

from markupsafe import Markup

from thinkrl.visible import visible as visible

# numbers that are shown in per cent
SHARES = {"accuracy", "answered", "truncated", "zero_groups", "clip_fraction", "malformed", "format"}


def script_json(value) -> Markup:
    """Format JSON for a script element, without '<', so that it cannot close the element."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def number(value: float | None, key: str = "", sign: bool = False) -> str:
    """Format with three digits, a true minus, per cent for SHARES; an en dash for None."""
    if not finite(value):
        return "–"
    plus = "+" if sign else ""
    if key in SHARES:
        text = f"{100 * value:{plus}.1f} %"
    elif abs(value) >= 999.5:
        text = f"{value:{plus},.0f}"
    else:
        # so that means of tokens align in a table
        text = f"{value:{plus}.{'1f' if key == 'tokens' else '3g'}}"
    return text.replace("-", "−")


def change(before: float | None, after: float | None, key: str) -> tuple[str, str]:
    """Verdict and text of a change: accuracy in points, others relative to the start; ("", "") without both.

    The verdict is "good", "bad" or "same": accuracy should rise, tokens should fall.
    """
    if not (finite(before) and finite(after)) or not (key in SHARES or before):
        return "", ""
    verdict = "same" if after == before else "good" if (after > before) == (key in SHARES) else "bad"
    difference = after - before if key in SHARES else after / before - 1
    return verdict, f"{100 * difference:+.1f}{'' if key in SHARES else ' %'}".replace("-", "−")


def tick(value: float, key: str = "") -> str:
    """Format a number on an axis."""
    return re.sub(r"\.0(?= %|$)", "", number(value, key))


def ticks(low: float, high: float) -> list[float]:
    """Choose two to four round numbers in [low, high], low < high."""
    unit = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    for step in (factor * unit for factor in (2, 5, 10, 20, 50)):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) <= 4:
            break
    return [i * step for i in numbers]


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
