"""Figures of the report, as SVG with colours of the page's style sheet.

Several runs share each figure: elements of run i have the class `run run-i`, which sets their colour and lets
the page's script hide them. A curve has its axes in data- attributes, so that the script can find the value
at the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from markupsafe import Markup

from thinkrl.tools.formats import mean, number, tick, ticks

COLOURS = 8  # of runs, in the style sheet; the next eight are dashed
DRAWN = 400  # points per line at most; all runs' lines together have at most five times as many

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Axes of a plot of `width` x `height` units; `x` and `y` are their first and last values."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 46
    right: int = 14
    top: int = 26
    bottom: int = 40
    log: bool = False  # x on a logarithmic scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        if self.log:
            x, (x0, x1) = math.log(x), map(math.log, self.x)
        else:
            x0, x1 = self.x
        u, v = (x - x0) / ((x1 - x0) or 1), (self.y[1] - y) / ((self.y[1] - self.y[0]) or 1)
        return (
            self.left + u * (self.width - self.left - self.right),
            self.top + v * (self.height - self.top - self.bottom),
        )

    def line(self, points: Points, kind: str) -> Markup:
        places = (self.at(x, y) for x, y in points)
        return Markup('<polyline class="{}" points="{}"/>').format(
            kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        )

    def disc(self, x: float, y: float, radius: float, kind: str, title: str) -> Markup:
        x, y = self.at(x, y)
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
            kind, x, y, radius, title
        )

    def frame(self, x_ticks: Sequence[float], y_key: str, x_title: str, y_title: str) -> Markup:
        """Draw grid lines with their numbers, and the titles of the axes."""
        right, floor = self.width - self.right, self.height - self.bottom
        parts = []
        for y in ticks(*self.y):
            level = self.at(self.x[0], y)[1]
            parts.append(_rule(self.left, level, right, level))
            parts.append(text(self.left - 6, level + 4, "end", tick(y, y_key)))
        for x in x_ticks:
            place = self.at(x, self.y[0])[0]
            parts.append(_rule(place, floor, place, floor + 4))
            parts.append(text(place, floor + 17, "middle", tick(x)))
        parts.append(text((self.left + right) / 2, self.height - 4, "middle", x_title))
        parts.append(text(2, 13, "start", y_title))
        return Markup('<g class="scale">{}</g>').format(Markup("").join(parts))

    def svg(self, label: str, *parts: Markup) -> Markup:
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, label, Markup("").join(parts)
        )


def text(x: float, y: float, anchor: str, words: str, kind: str = "") -> Markup:
    kind = Markup(' class="{}"').format(kind) if kind else ""
    return Markup('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, words
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(x1, y1, x2, y2)


def run_class(i: int) -> str:
    return f"run run-{i % COLOURS}" + " dashed" * (i // COLOURS % 2)


def padded(values: Sequence[float], share: float = 0.0) -> tuple[float, float]:
    """Range from the least to the greatest value, wider by `share`; never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low - share * (high - low), high + share * (high - low)


def curve(key: str, lines: Sequence[Points], dots: Sequence[Points], steps: tuple[float, float]) -> Markup:
    """Draw a metric of every run over the steps: values, running mean, held-out results as circles."""
    values = [y for points in (*lines, *dots) for _, y in points]
    axes = Axes(320, 132, steps, padded(values), left=4, right=42, top=8, bottom=18)
    right, floor = axes.width - axes.right, axes.height - 4
    scale = [text(axes.left, floor, "start", number(steps[0])), text(right, floor, "end", number(steps[1]))]
    for y in ticks(*axes.y):
        level = axes.at(steps[0], y)[1]
        scale += [_rule(0, level, right, level), text(axes.width, level + 3, "end", tick(y, key))]
    drawn, marks, most = [], [], points_of_a_line(len(lines))
    for i, (points, held_out) in enumerate(zip(lines, dots)):
        drawn.append(axes.line(thin(points, most), f"raw {run_class(i)}"))
        drawn.append(axes.line(thin(running_mean(points), most), f"mean {run_class(i)}"))
        for x, y in held_out:
            title = f"held-out, step {number(x)}: {number(y, key)}"
            marks.append(axes.disc(x, y, 3.5, f"mark {run_class(i)}", title))
    cursor = Markup('<line class="cursor" y1="{}" y2="{}" x1="0" x2="0"/>').format(
        axes.top, axes.height - axes.bottom
    )
    return Markup(
        '<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{} by step" data-key="{}" '
        'data-y0="{:.9g}" data-y1="{:.9g}"><g class="scale">{}</g>{}{}{}</svg>'
    ).format(
        axes.width,
        axes.height,
        key.replace("_", " "),
        key,
        *axes.y,
        Markup("").join(scale),
        Markup("").join(drawn),
        Markup("").join(marks),
        cursor,
    )


def running_mean(points: Points) -> Points:
    """Mean over a tenth of the run around each point, over less at the ends."""
    reach, sums = len(points) // 20, [0.0, *accumulate(y for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        begin, end = max(0, i - reach), min(len(points), i + reach + 1)
        out.append((x, (sums[end] - sums[begin]) / (end - begin)))
    return out if reach else points


def points_of_a_line(runs: int) -> int:
    """Number of points per curve, so that thirty curves of 64 runs fit a page."""
    return min(DRAWN, max(32, 5 * DRAWN // runs))


def thin(points: Points, most: int) -> Points:
    """Reduce to at most `most` points, the lowest and highest of equal intervals, so that peaks are kept."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    out = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        out += sorted(ends)
    return out


def accuracy_against_tokens(paths: Sequence[tuple[str, str, Sequence[tuple[str, float, float]]]]) -> Markup:
    """Draw accuracy against tokens: paths (class, label, [(evaluation, tokens, accuracy), …] in training
    order).

    Up and left is better. The start is an open circle, the end a full one with the label beside it.
    """
    tokens = [t for _, _, path in paths for _, t, _ in path]
    accuracy = [a for _, _, path in paths for _, _, a in path]
    (t0, t1), (a0, a1) = padded(tokens, 0.08), padded(accuracy, 0.08)
    axes = Axes(460, 300, (max(0.0, t0), t1), (max(0.0, a0), min(1.0, a1)))
    parts = [axes.frame(ticks(*axes.x), "accuracy", "mean tokens of a completion", "accuracy")]
    for kind, label, path in paths:
        parts.append(axes.line([(t, a) for _, t, a in path], f"path {kind}"))
        for i, (name, t, a) in enumerate(path):
            end = "start" if i == 0 < len(path) - 1 else "end" if i == len(path) - 1 else "between"
            title = f"{label}, {name}: {number(a, 'accuracy')} with {number(t, 'tokens')} tokens"
            parts.append(axes.disc(t, a, 3 if end == "between" else 5, f"{end} {kind}", title))
    lowest = 0.0
    # from above, so that labels do not overlap
    for kind, label, path in sorted(paths, key=lambda each: -each[2][-1][2]):
        x, y = axes.at(*path[-1][1:])
        lowest = max(y + 4, lowest + 13)
        place = (x - 9, "end") if x > 0.7 * axes.width else (x + 9, "start")
        parts.append(text(place[0], lowest, place[1], label, f"label {kind}"))
    return axes.svg("accuracy against tokens", *parts)


def accuracy_at_budgets(lines: Sequence[tuple[str, str, Points]]) -> Markup:
    """Draw accuracy at token budgets: lines (class, label, [(token budget, accuracy), …])."""
    budgets = sorted({b for _, _, points in lines for b, _ in points})
    axes = Axes(460, 300, (budgets[0], budgets[-1]), (0.0, 1.0), log=budgets[0] > 0)
    shown = [
        b for i, b in enumerate(budgets) if i == 0 or axes.at(b, 0)[0] - axes.at(budgets[i - 1], 0)[0] > 14
    ]
    parts = [axes.frame(shown, "accuracy", "tokens at most", "accuracy")]
    for kind, label, points in lines:
        parts.append(axes.line(points, f"path {kind}"))
        for b, a in points:
            title = f"{label}, {number(b)} tokens: {number(a, 'accuracy')}"
            parts.append(axes.disc(b, a, 3.5, f"end {kind}", title))
        if len(lines) <= 2:
            x, y = axes.at(*points[-1])
            parts.append(text(x, y - 9, "end", label, f"label {kind}"))
    return axes.svg("accuracy at token budgets", *parts)


def histogram(samples: Sequence[tuple[str, str, Sequence[float]]], x_title: str) -> Markup:
    """Draw histograms as outlines: samples (class, label, values), the share of values in equal bins."""
    everything = [v for _, _, values in samples for v in values]
    low, high = padded(everything)
    low = 0.0 if 0 <= low < 0.5 * high else low
    size = 10 ** math.floor(math.log10((high - low) / 36))
    size *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * size) <= 36)
    first, last = math.floor(low / size + 1e-9), math.floor(high / size + 1e-9) + 1
    shares = []
    for _, _, values in samples:
        counts = [0] * (last - first)
        for v in values:
            counts[math.floor(v / size + 1e-9) - first] += 1
        shares.append([c / len(values) for c in counts])
    axes = Axes(460, 220, (first * size, last * size), (0.0, 1.08 * max(map(max, shares))))
    parts = [axes.frame(ticks(*axes.x), "accuracy", x_title, "share of completions")]
    for (kind, _, _), share in zip(samples, shares):
        outline = [(first * size, 0.0)]
        for k, s in enumerate(share, first):
            outline += [(k * size, s), ((k + 1) * size, s)]
        parts.append(axes.line([*outline, (last * size, 0.0)], f"outline {kind}"))
    for k, column in enumerate(zip(*shares), first):
        (x0, _), (x1, _) = axes.at(k * size, 0), axes.at((k + 1) * size, 0)
        values = "\n".join(f"{label}: {number(s, 'accuracy')}" for (_, label, _), s in zip(samples, column))
        title = f"{number(k * size)} to {number((k + 1) * size)}\n{values}"
        parts.append(
            Markup(
                '<rect class="bin" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>'
            ).format(x0, axes.top, x1 - x0, axes.height - axes.top - axes.bottom, title)
        )
    return axes.svg(f"histogram: {x_title}", *parts)


def importance_by_place(chains: Sequence[dict]) -> Markup:
    """Draw mean importance of the i-th thought and mean accuracy after it, over the chains that have one."""
    longest = max(len(chain["importance"]) for chain in chains)
    if longest < 2:
        return Markup("")

    def means(name: str) -> Points:
        columns = ([c[name][i] for c in chains if len(c[name]) > i] for i in range(longest))
        return [(i, mean(column)) for i, column in enumerate(columns, 1)]

    lines = [("run run-0", "importance", means("importance")), ("run run-1", "accuracy", means("accuracies"))]
    low, high = padded([y for *_, points in lines for _, y in points], 0.05)
    axes = Axes(460, 240, (1, longest), (min(0.0, low), high))
    parts = [
        axes.frame(
            [1, *(t for t in ticks(1, longest) if t > 1)], "", "place of the thought", "mean over chains"
        )
    ]
    for kind, label, points in lines:
        parts.append(axes.line(points, f"path {kind}"))
        for x, y in points:
            parts.append(axes.disc(x, y, 3.5, f"end {kind}", f"thought {x}: {label} {number(y)}"))
    return axes.svg("importance by place", *parts)


def constant(lines: Sequence[Points]) -> bool:
    """Whether a metric never changes in any run."""
    return all(a == b for points in lines for (_, a), (_, b) in pairwise(points))
