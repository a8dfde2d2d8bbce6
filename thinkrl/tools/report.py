"""A run as one self-contained HTML page: results, curves, completions coloured by what each episode was paid, options.

    python -m thinkrl.tools.report runs/NAME        writes runs/NAME/report.html; also for a run that is still going

Reads config.json, metrics.jsonl, samples.jsonl and summary.json; what is missing leaves its section out. The
text of an episode follows from token ids, so colours need a tokenizer: that of the newest hf folder under
checkpoints/. Without one the whole text is shown plain.

Everything from the run is data, model text above all: it is escaped, control and direction characters are
made visible or isolated, and the page's own policy forbids scripts and any request.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from html import escape
from itertools import pairwise
from pathlib import Path

from thinkrl import UserError
from thinkrl.config import Config
from thinkrl.l2t.episodes import trace
from thinkrl.metrics import DEFINITIONS
from thinkrl.options import exit_with_error
from thinkrl.tokenizer import Tokenizer

CURVES = ("reward", "accuracy", "tokens", "loss", "entropy", "grad_norm", "mismatch")
SHARES = {"accuracy", "truncated", "zero_groups", "clip_fraction", "malformed", "format"}  # shown in per cent
HOVERED = 80  # a curve answers the pointer at this many places at most
SHOWN = {
    "step",
    "problem",
    "sample",
    "question",
    "gold",
    "level",
    "answer",
    "text",
    "outcome_reward",
    "reward",
    "turns",
    "advantage",
    "ends",
    "J",
    "compression",
    "penalty",
    "process_reward",
    "malformed",
}
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and return its path. Raises UserError if `folder` is not a run's."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a run folder, it has no config.json")
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    metrics = list(_lines(folder / "metrics.jsonl"))
    sections = [
        _header(folder.resolve().name, config, summary, metrics),
        _results(summary),
        _curves(metrics, summary),
        _completions(_some_samples(folder / "samples.jsonl"), _tokenizer(folder)),
        _options(config),
    ]
    page = PAGE.format(
        title=_text(folder.resolve().name), style=STYLE, body="\n".join(filter(None, sections))
    )
    path, temporary = folder / "report.html", folder / "report.html.tmp"
    temporary.write_bytes(
        page.encode("utf-8", "replace")
    )  # JSON can spell half a surrogate pair, UTF-8 cannot
    os.replace(temporary, path)
    return path


def _lines(path: Path, steps: set[int] | None = None) -> Iterator[dict]:
    """The rows of a .jsonl file, of these steps only. A last line that is still being written is left out."""
    for line in path.open(encoding="utf-8") if path.exists() else ():
        if line.endswith("\n") and (steps is None or _step(line) in steps):
            yield json.loads(line)


def _step(line: str) -> int:
    """The log writes the step first, so that a long row need not be parsed to know it."""
    return int(re.match(r'\{"step": (\d+)', line)[1])


def _some_samples(path: Path) -> list[dict]:
    """The rows of the first, a middle and the last step in samples.jsonl."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        steps = sorted({_step(line) for line in file if line.endswith("\n")})
    return list(_lines(path, {steps[i] for i in (0, len(steps) // 2, -1)} if steps else set()))


def _tokenizer(folder: Path) -> Tokenizer | None:
    folders = folder.glob("checkpoints/step_*[0-9]/hf*")
    saved = [path for path in folders if not path.suffix and (path / "tokenizer.json").exists()]
    if not saved:
        return None
    return Tokenizer(max(saved, key=lambda path: (int(path.parent.name.removeprefix("step_")), path.name)))


def _text(value) -> str:
    """Any value as HTML text, in an element or in an attribute."""
    return escape(str(value).translate(VISIBLE))


def _number(value: float | None, key: str = "", sign: bool = False) -> str:
    """Three digits, a true minus, per cent for shares; an en dash for what is not there."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    if key in SHARES:
        text = f"{100 * value:{plus}.1f} %"
    elif abs(value) >= 999.5:
        text = f"{value:{plus},.0f}"
    else:
        text = f"{value:{plus}.{'1f' if key == 'tokens' else '3g'}}"  # means of tokens line up in a table
    return text.replace("-", "−")


def _change(before: float | None, after: float | None, key: str) -> str:
    """Accuracy in points, anything else relative to its start."""
    if before is None or after is None or not (key in SHARES or before):
        return ""
    verdict = (
        "same" if after == before else "good" if (after > before) == (key in SHARES) else "bad"
    )  # more accuracy, fewer tokens
    difference = after - before if key in SHARES else after / before - 1
    text = f"{100 * difference:+.1f}{'' if key in SHARES else ' %'}".replace("-", "−")
    return f'<span class="{verdict}">{text}</span>'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def _header(name: str, config: dict, summary: dict, metrics: list[dict]) -> str:
    done = metrics[-1]["step"] if metrics else 0
    state = "finished" if "after" in summary else f"step {done:,} of {config['steps']:,}"
    rows = "rows" if config["preset"] == "sft" else f"× {config['group_size']} completions"
    models = " and ".join(config[role] for role in ("long", "short") if config.get(role)) or config["model"]
    facts = [
        f"model {models}",
        f"data {config['data']}",
        f"{done:,} steps",
        f"{config['problems_per_step']} {rows} a step",
    ]
    if seconds := sum(row.get("seconds", 0) for row in metrics):
        facts.append(_duration(seconds))
    return (
        f'<header><p class="eyebrow">thinkrl · {_text(config["preset"])} · {state}</p><h1>{_text(name)}</h1>'
        f'<p class="facts">{" · ".join(_text(fact) for fact in facts)}</p>{_tiles(summary, metrics)}</header>'
    )


def _tiles(summary: dict, metrics: list[dict]) -> str:
    tiles = []
    before, after = summary.get("before", {}), summary.get("after", {})
    for decoding, a, b in (
        ("sampled", before, after),
        ("greedy", before.get("greedy", {}), after.get("greedy", {})),
    ):
        for key in ("accuracy", "tokens"):
            if key in b or key in a:
                start = f"from {_number(a[key], key)} " if key in a and key in b else ""
                tiles.append(
                    (
                        f"{key}, {decoding}",
                        b.get(key, a.get(key)),
                        key,
                        start + _change(a.get(key), b.get(key), key),
                    )
                )
    if not tiles and metrics:
        tiles = [
            (key, metrics[-1][key], key, f"from {_number(metrics[0].get(key), key)}")
            for key in ("loss", "reward", "accuracy", "tokens")
            if key in metrics[-1]
        ]
    body = "".join(
        f"<div><dt>{name}</dt><dd>{_number(value, key)}</dd><small>{note}</small></div>"
        for name, value, key, note in tiles
    )
    return f'<dl class="tiles">{body}</dl>' if tiles else ""


def _results(summary: dict) -> str:
    """Before and after by level, once sampled and once greedily."""
    before, after = summary.get("before", {}), summary.get("after", {})
    if "accuracy" not in (before | after):
        return ""
    tables = []
    for decoding in ("sampled", "greedy"):
        a, b = (x if decoding == "sampled" else x.get("greedy", {}) for x in (before, after))
        a_levels, b_levels = a.get("by_level", {}), b.get("by_level", {})
        rows = [("all", a, b)] + [
            (level, a_levels.get(level, {}), b_levels.get(level, {}))
            for level in sorted(a_levels.keys() | b_levels.keys())
            if level
        ]
        body = "".join(
            f"<tr><th>{_text(name)}</th>{''.join(_cells(x, y, key) for key in ('accuracy', 'tokens'))}</tr>"
            for name, x, y in rows
        )
        head = "".join(f'<th colspan="3">{key}</th>' for key in ("accuracy, %", "tokens"))
        tables.append(_table(f"<th>{decoding}</th>{head}", body))
    return _section(
        "Held-out problems",
        "Before and after training; tokens are the mean per attempt.",
        f'<div class="tables">{"".join(tables)}</div>',
    )


def _cells(before: dict, after: dict, key: str) -> str:
    a, b = before.get(key), after.get(key)
    start, end = (_number(value, key).removesuffix(" %") for value in (a, b))
    return f'<td class="from">{start}</td><td class="to">{end}</td><td class="by">{_change(a, b, key)}</td>'


def _curves(metrics: list[dict], summary: dict) -> str:
    if not metrics:
        return ""
    present = {key for row in metrics for key in row} - {"step"}
    of_preset = [
        key for key, words in DEFINITIONS.items() if words.startswith(("l2t:", "longshort:", "prm:"))
    ]
    first = [key for key in (*CURVES, *of_preset) if key in present]
    rest = sorted(present - set(first), key=[*DEFINITIONS, *sorted(present)].index)
    held_out = {values["step"]: values for values in summary.values() if "step" in values}

    def charts(keys: list[str]) -> str:
        figures = (
            _chart(
                key,
                [(row["step"], row[key]) for row in metrics if _finite(row.get(key))],
                [
                    (step, values[key])
                    for step, values in sorted(held_out.items())
                    if key in ("accuracy", "tokens") and _finite(values.get(key))
                ],
            )
            for key in keys
        )
        return f'<div class="charts">{"".join(figures)}</div>'

    more = f"<details><summary>{len(rest)} more</summary>{charts(rest)}</details>" if rest else ""
    words = "Per optimizer step. The bold line is a running mean, and the number its last value; circles are held-out evaluations."
    return _section("Curves", words, charts(first) + more)


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _chart(key: str, points: list[tuple[float, float]], dots: list[tuple[float, float]] = ()) -> str:
    """A curve of (step, value), with its definition under it."""
    name, words = _text(key.replace("_", " ")), _text(DEFINITIONS.get(key, ""))
    if not points:
        return f"<figure><h3>{name}</h3><figcaption>never finite: {words}</figcaption></figure>"
    width, height, left, right, top, bottom = 320, 140, 4, 40, 8, 18  # the scale stands in the right margin
    xs, ys = zip(*points, *dots)
    low, high = min(ys), max(ys)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2

    def at(x: float, y: float) -> tuple[str, str]:
        u, v = (x - min(xs)) / ((max(xs) - min(xs)) or 1), (high - y) / (high - low)
        return f"{left + u * (width - left - right):.1f}", f"{top + v * (height - top - bottom):.1f}"

    def line(kind: str, points: list[tuple[float, float]]) -> str:
        return f'<polyline class="{kind}" points="{" ".join(",".join(at(*point)) for point in points)}"/>'

    def label(x: float, y: float | str, anchor: str, words: str) -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'

    def disc(x: float, y: float, radius: float) -> str:
        return '<circle cx="{}" cy="{}" r="{}"/>'.format(*at(x, y), radius)

    floor = height - 3
    scale = label(left, floor, "start", _number(min(xs))) + label(
        width - right, floor, "end", _number(max(xs))
    )
    for y in _ticks(low, high):
        level = at(0, y)[1]
        scale += f'<line x1="0" x2="{width - right}" y1="{level}" y2="{level}"/>'
        scale += label(width, f"{float(level) + 3:.1f}", "end", _tick(y, key))
    probed = points[:: -(-len(points) // HOVERED)]
    edges = [
        0.0,
        *((float(at(*a)[0]) + float(at(*b)[0])) / 2 for a, b in pairwise(probed)),
        width - right + 4.0,
    ]
    bands = "".join(
        f'<g><rect x="{begin:.1f}" y="0" width="{end - begin:.1f}" height="{height - bottom}"/>{disc(x, y, 3)}'
        f"<title>step {_number(x)}: {_number(y, key)}</title></g>"
        for (x, y), (begin, end) in zip(probed, pairwise(edges))
    )
    marks = "".join(
        f"<g>{disc(x, y, 3.5)}<title>held-out, step {_number(x)}: {_number(y, key)}</title></g>"
        for x, y in dots
    )
    mean = _smooth(points)
    return (
        f'<figure><h3>{name} <b>{_number(mean[-1][1], key)}</b></h3><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{name} per step"><g class="scale">{scale}</g>{line("raw", points)}{line("mean", mean)}'
        f'<g class="bands">{bands}</g><g class="marks">{marks}</g></svg><figcaption>{words}</figcaption></figure>'
    )


def _tick(value: float, key: str) -> str:
    return re.sub(r"\.0(?= %|$)", "", _number(value, key))


def _ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers in [low, high]."""
    unit = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    for step in (factor * unit for factor in (2, 5, 10, 20, 50)):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) <= 4:
            return [i * step for i in numbers]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a tenth of the run around each point, over what there is of it at the ends."""
    reach = len(points) // 20
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [(x, _mean([y for _, y in window])) for (x, _), window in zip(points, windows)]


def _completions(rows: list[dict], tokenizer: Tokenizer | None) -> str:
    if not rows:
        return ""
    scale = max((abs(r) for row in rows for r in row.get("process_reward", []) if _finite(r)), default=0.0)
    out, groups = [], {}
    for row in rows:
        groups.setdefault((row["step"], row["problem"]), []).append(row)
    last = None
    for (step, _), group in groups.items():
        if step != last:
            out.append(f'<h3 class="step">Step {step:,}</h3>')
            last = step
        first = group[0]
        level = f'<span class="chip">{_text(first["level"])}</span>' if first.get("level") else ""
        right = sum(row.get("outcome_reward", 0) > 0.5 for row in group)
        out.append(
            f'<div class="question"><bdi>{_text(first["question"])}</bdi><p><span class="chip">gold <b>'
            f'{_text(first["gold"])}</b></span>{level}<span class="chip">{right} of {len(group)} right</span></p></div>'
            f'<div class="cards">{"".join(_card(row, tokenizer, scale) for row in group)}</div>'
        )
    legend = ""
    if scale and tokenizer is not None:
        stops = "".join(
            f'<i class="{_side(w)}" style="--w:{abs(w) ** 0.5:.2f}"></i>'
            for w in (i / 8 for i in range(-8, 9))
        )
        legend = (
            f'<p class="legend"><span>−{_number(scale)}</span>{stops}<span>+{_number(scale)}</span> process reward of an '
            "episode, on a square-root scale. Point at an episode, or tap it, for its numbers.</p>"
        )
    return _section(
        "Completions", "Groups of the first, a middle and the last logged step.", legend + "".join(out)
    )


def _card(row: dict, tokenizer: Tokenizer | None, scale: float) -> str:
    """One trajectory: verdict and numbers, then its text."""
    correct = row.get("outcome_reward", 0) > 0.5
    turns, advantage = row.get("turns", []), row.get("advantage", [])
    answer = "no answer" if row.get("answer") is None else row["answer"]
    chips = [
        f"{_number(sum(len(turn['completion']) for turn in turns))} tokens",
        f"reward {_number(row.get('reward'))}",
    ]
    if advantage:
        chips.append(f"advantage {_number(_mean(advantage), sign=True)}")
    chips += [
        f"{key.replace('_', ' ')} {_number(value) if _finite(value) else value}"
        for key, value in row.items()
        if key not in SHOWN and isinstance(value, (int, float, str))
    ]
    warnings = ["malformed tags"] * bool(row.get("malformed"))
    warnings += ["cut at the limit"] * any(turn.get("finish_reason") == "length" for turn in turns)
    head = "".join(f'<span class="chip">{_text(chip)}</span>' for chip in chips)
    head += "".join(f'<span class="chip warning">{_text(warning)}</span>' for warning in warnings)
    return (
        f'<article class="{"right" if correct else "wrong"}"><div class="head"><span class="badge">{"✓" if correct else "✗"} <bdi>'
        f"{_text(answer)}</bdi></span>{head}{_spark(row.get('J') or [])}</div>{_body(row, turns, tokenizer, scale)}</article>"
    )


def _body(row: dict, turns: list[dict], tokenizer: Tokenizer | None, scale: float) -> str:
    if tokenizer is None or not turns:
        return f"<pre><bdi>{_text(row.get('text', ''))}</bdi></pre>"
    if len(turns) == 1:
        return f"<pre><bdi>{_episodes(row, turns[0]['completion'], tokenizer, scale)}</bdi></pre>"
    return "".join(
        f'<div class="turn {"short" if turn["role"] == "short" else "long"}"><b>{_text(turn["role"])}</b>'
        f"<small>{len(turn['completion']):,} tokens</small><pre><bdi>{_text(tokenizer.decode(turn['completion']))}</bdi></pre>"
        "</div>"
        for turn in turns
    )


def _episodes(row: dict, completion: list[int], tokenizer: Tokenizer, scale: float) -> str:
    """The completion's text, each episode on the colour of its process reward, with its numbers beside the
    pointer.
    """
    text, reached = trace(completion, tokenizer)
    ends, advantage = row.get("ends", []), row.get("advantage", [])
    out, shown, begin = [], 0, 0
    for k, end in enumerate(ends):
        stop = reached[end - 1] if end else 0
        reward = row.get("process_reward", [])[k : k + 1]
        w = (reward or [0.0])[0] / scale if scale else 0.0
        words = _numbers_of_episode(
            row, k, end - begin, advantage[begin:end] if len(advantage) == len(completion) else []
        )
        out.append(
            f'<span class="ep {_side(w)}" style="--w:{min(1.0, abs(w)) ** 0.5:.2f}" tabindex="0" '
            f'data-tip="{_text(words)}">{_text(text[shown:stop])}</span>'
        )
        shown, begin = stop, end
    return "".join(out) + _text(text[shown:])


def _numbers_of_episode(row: dict, k: int, tokens: int, advantage: list[float]) -> str:
    def of(key: str, i: int = k) -> float | None:
        values = row.get(key) or []
        return values[i] if i < len(values) else None

    lines = [f"episode {k + 1} of {len(row['ends'])} · {tokens:,} token{'' if tokens == 1 else 's'}"]
    before, after = of("J"), of("J", k + 1)
    if after is not None:
        lines.append(
            f"J {_number(before)} → {_number(after)} · fitting gain {_number(after - before, sign=True)}"
        )
    if of("compression") is not None or of("penalty") is not None:
        lines.append(f"compression {_number(of('compression'))} raw · {_number(of('penalty'))} normalised")
    paid = (
        [f"process reward {_number(of('process_reward'), sign=True)}"]
        if of("process_reward") is not None
        else []
    )
    paid += [f"advantage {_number(_mean(advantage), sign=True)}"] if advantage else []
    return "\n".join([*lines, " · ".join(paid)] if paid else lines)


def _spark(J: list[float]) -> str:
    """J_0, …, J_K from 0 to 1, as a line of a word's height."""
    if len(J) < 2 or not all(map(_finite, J)):
        return ""
    points = [(2 + 76 * k / (len(J) - 1), 18 - 16 * min(1.0, max(0.0, value))) for k, value in enumerate(J)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return (
        f'<svg class="spark" viewBox="0 0 80 20" role="img" aria-label="J from {_number(J[0])} to {_number(J[-1])}"><title>J, '
        f'predicted correctness after each episode: {" → ".join(map(_number, J))}</title><polyline points="{line}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/></svg>'
    )


def _options(config: dict) -> str:
    changed = [
        (f.name, config[f.name], f.default, f.metadata["help"])
        for f in fields(Config)
        if f.name in config and config[f.name] != f.default
    ]
    rows = "".join(
        f'<tr title="{_text(words)}"><th>{_text(name)}</th><td class="to">{_value(value)}</td>'
        f'<td class="from">{_value(default)}</td></tr>'
        for name, value, default, words in changed
    )
    return _section(
        "Options",
        "Those that differ from their defaults, as resolved from preset, model, profile and command line.",
        _table("<th>option</th><th>here</th><th>default</th>", rows, "options") if changed else "<p>none</p>",
    )


def _value(value) -> str:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value)


def _table(head: str, body: str, kind: str = "results") -> str:
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, words: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="about">{words}</p>{body}</section>'


def _side(value: float) -> str:
    return "plus" if value >= 0 else "minus"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · thinkrl</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

STYLE = """
:root { --paper: #fcfbf8; --card: #ffffff; --ink: #1d1f23; --soft: #6b6f76; --line: #e4e1d9; --accent: #2f5fa8;
  --plus: 38 125 196; --minus: 222 110 40; --good: #17794a; --bad: #b3372f; --long: #7a4fb0; --short: #1f8a7a }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --card: #1c1f24; --ink: #e6e4df; --soft: #979ba3;
  --line: #2e3238; --accent: #82aef0; --plus: 70 150 225; --minus: 228 120 50; --good: #5cc48e; --bad: #ef8379;
  --long: #b593e6; --short: #58c4b2 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 68rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 7rem }
h1, h2, h3, p, dl, dd, figure, pre { margin: 0 }
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; font-weight: 650; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; letter-spacing: -.01em; font-weight: 650 }
section { margin-top: clamp(2.5rem, 6vw, 4rem); padding-top: 1.25rem; border-top: 1px solid var(--line) }
.eyebrow { color: var(--accent); font-size: .85rem; font-weight: 600; letter-spacing: .02em; margin-bottom: .4rem }
.facts, .about, small, figcaption { color: var(--soft) }
.facts { margin-top: .5rem; overflow-wrap: anywhere } .about { margin-bottom: 1.25rem; font-size: .92rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin-top: 1.75rem;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
.tiles div { background: var(--card); padding: .9rem 1.1rem 1rem }
.tiles dt { color: var(--soft); font-size: .82rem } .tiles dd { font-size: 1.75rem; font-weight: 620; line-height: 1.25;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums } .tiles small { font-size: .82rem }
.good { color: var(--good) } .same { color: var(--soft) } .bad { color: var(--bad) }
.scroll { overflow-x: auto }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem 3rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .35rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; font-weight: 400 }
th:first-child { text-align: left; padding-left: 0 } thead th { color: var(--soft); font-size: .82rem }
.results tbody tr:first-child > * { font-weight: 600 }
.from { color: var(--soft) } .to { font-weight: 600 } .by { font-size: .82rem; min-width: 3.6em } .by + td { padding-left: 1.2rem }
.options { max-width: 46rem } .options th, .options td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.options tbody th, .options td { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; vertical-align: top }
.options tbody .to { font-weight: 600 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 2rem 2.25rem }
figure h3 { display: flex; justify-content: space-between; align-items: baseline; font-size: .95rem; font-weight: 600 }
figure b { font-weight: 600; font-variant-numeric: tabular-nums; color: var(--accent) }
figure svg { display: block; width: 100%; margin: .4rem 0 .35rem; overflow: visible }
figcaption { font-size: .8rem; line-height: 1.4 }
.scale line { stroke: var(--line); stroke-width: 1 }
.scale text { fill: var(--soft); font-size: 9.5px; font-variant-numeric: tabular-nums }
polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round }
.raw { stroke-width: 1; opacity: .35 } .mean { stroke-width: 2 }
.bands rect { fill: transparent } .bands circle { fill: var(--accent); opacity: 0; pointer-events: none }
.bands g:hover rect { fill: var(--accent); opacity: .08 } .bands g:hover circle { opacity: 1 }
.marks circle { fill: var(--paper); stroke: rgb(var(--minus)); stroke-width: 2 }
details { margin-top: 2rem } summary { cursor: pointer; color: var(--accent); font-size: .92rem; margin-bottom: 1.25rem }
.legend { display: flex; flex-wrap: wrap; align-items: center; font-size: .82rem; color: var(--soft); margin-bottom: .5rem }
.legend i { width: 13px; height: 14px } .legend span { margin: 0 .45rem 0 0; font-variant-numeric: tabular-nums }
.legend i + span { margin: 0 .9rem 0 .45rem }
.step { margin: 2.25rem 0 .75rem; font-size: 1.02rem; font-weight: 650 }
.question { margin: 0 0 .9rem; white-space: pre-wrap; overflow-wrap: anywhere }
.question p { margin-top: .35rem; white-space: normal }
.question + .cards + .question { margin-top: 1.75rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: .9rem; align-items: start }
article { background: var(--card); border: 1px solid var(--line); border-left: 3px solid var(--good); border-radius: 8px;
  padding: .75rem .95rem .85rem; min-width: 0 }
article.wrong { border-left-color: var(--bad) }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .75rem; margin-bottom: .55rem }
.badge { font-weight: 650; color: var(--good); overflow-wrap: anywhere } .wrong .badge { color: var(--bad) }
.chip { font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; margin-right: .75rem; overflow-wrap: anywhere }
.head .chip { margin: 0 } .chip b { color: var(--ink) } .warning { color: var(--bad) }
.spark { width: 80px; height: 20px; margin-left: auto } .spark polyline { stroke-width: 1.5 } .spark circle { fill: var(--accent) }
pre { font: .84rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 26rem; overflow-y: auto }
.ep { border-radius: 5px; padding: .12em 0; margin-right: 2px; cursor: default }
.plus { background: rgb(var(--plus) / calc(var(--w) * .62)) } .minus { background: rgb(var(--minus) / calc(var(--w) * .62)) }
.ep:hover, .ep:focus { outline: 2px solid var(--ink); outline-offset: 0 }
.ep:hover::after, .ep:focus::after { content: attr(data-tip); position: fixed; z-index: 1; left: 50%; bottom: 1rem;
  transform: translateX(-50%); width: max-content; max-width: calc(100vw - 2rem); padding: .65rem 1rem; border-radius: 9px;
  background: var(--ink); color: var(--paper); font: .85rem/1.55 ui-sans-serif, system-ui, sans-serif; white-space: pre-wrap;
  font-variant-numeric: tabular-nums; box-shadow: 0 6px 24px rgb(0 0 0 / .25); pointer-events: none }
.turn { border-left: 3px solid var(--long); padding-left: .75rem; margin-top: .7rem }
.turn b { color: var(--long); font-size: .82rem } .turn small { margin-left: .6rem; font-size: .78rem }
.turn.short { border-color: var(--short) } .turn.short b { color: var(--short) }
@media (max-width: 30rem) { .results { font-size: .82rem } .results th, .results td { padding-inline: .2rem }
  .results .by + td { padding-left: .5rem } }
@media print { .ep, .plus, .minus { print-color-adjust: exact } pre { max-height: none } }
"""

if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("usage: python -m thinkrl.tools.report runs/NAME")
        print(write_report(Path(sys.argv[1])))
    except UserError as mistake:
        exit_with_error("thinkrl.tools.report", mistake)
