"""Completions for the page's script, as many as fit: training groups, held-out problems, chains.

All of it becomes JSON in the page. Keys are short because they are repeated thousands of times; report.js
explains them. A text is a list of pieces, one per token, because positions in Python's and in the browser's
strings differ; without a tokenizer it is one piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise

from thinkrl.tokenizer import Tokenizer
from thinkrl.tools.formats import finite, mean, script_json, visible
from thinkrl.tools.reading import Chains, TrainingRun
from thinkrl.tracing import trace

LONGEST = 60_000  # characters of one turn that are shown, half from its start, half from its end
KNOWN = {"step", "problem", "sample", "question", "gold", "level", "answer", "text", "outcome_reward",
         "reward", "turns", "advantage", "ends", "episode_ids", "J", "fitting_gain", "compression", "penalty",
         "process_reward", "malformed", "entropy", "trained"}  # fmt: skip


def training_groups(run: TrainingRun, i: int, budget: int, steps: set[int] | None) -> list[dict]:
    """Groups of run `i` in order: of these steps, or of evenly spaced ones up to `budget` bytes."""
    logged = list(run.logged_steps)
    if steps is not None:
        logged = [step for step in logged if step in steps]

    def groups(step: int) -> list[dict]:
        rows = run.samples(step)
        of_problem = groupby(rows, key=lambda row: row["problem"])
        return [training_group(i, list(group), run.tokenizer) for _, group in of_problem]

    kept = fill(budget, spread(len(logged)), lambda k: groups(logged[k]))
    return [group for _, part in sorted(kept.items()) for group in part]


def training_group(i: int, rows: list[dict], tokenizer: Tokenizer | None) -> dict:
    first = rows[0]
    return {
        "run": i,
        "step": first["step"],
        "problem": first["problem"],
        "q": visible(first["question"]),
        "gold": visible(first["gold"]),
        "level": visible(first.get("level", "")),
        "rows": [completion(row, tokenizer) for row in rows],
    }


def completion(row: dict, tokenizer: Tokenizer | None) -> dict:
    """Convert one row of samples.jsonl."""
    turns, advantage = row.get("turns", []), row.get("advantage", [])
    out = {
        "sample": row["sample"],
        "answer": None if row.get("answer") is None else visible(row["answer"]),
        "right": row.get("outcome_reward", 0) > 0.5,
        "reward": row.get("reward"),
        "n": sum(len(turn["completion"]) for turn in turns),
        "cut": any(turn.get("finish_reason") == "length" for turn in turns),
        "turns": [_turn(turn, tokenizer) for turn in turns],
    }
    if tokenizer is None or not turns:
        out["turns"] = [
            {"role": "policy", "pieces": shortened([visible(row.get("text", ""))]), "n": out["n"]}
        ]
    elif len(turns) == 1:
        out["turns"][0] |= {"entropy": row["entropy"]} if "entropy" in row else {}
    if advantage:
        out["advantage"] = mean(advantage)
        _spread_over_turns(advantage, turns, row.get("trained"), out["turns"])
    notes = {k: v for k, v in row.items() if k not in KNOWN and isinstance(v, (int, float, str))}
    if notes:
        out["notes"] = {
            k.replace("_", " "): visible(v) if isinstance(v, str) else v for k, v in notes.items()
        }
    if row.get("malformed"):
        out["malformed"] = True
    if row.get("ends") and tokenizer is not None:
        out["ends"] = row["ends"]
        for short, key in (("J", "J"), ("C", "compression"), ("P", "penalty"), ("R", "process_reward")):
            if row.get(key):
                out[short] = [significant(value) for value in row[key]]
    return out


def _turn(turn: dict, tokenizer: Tokenizer | None) -> dict:
    out = {"role": turn["role"], "n": len(turn["completion"])}
    if tokenizer is not None:
        out["pieces"] = shortened(pieces(turn["completion"], tokenizer))
        if turn.get("logprobs"):
            out["surprise"] = [significant(-value, 3) for value in turn["logprobs"]]
    return out


def _spread_over_turns(
    advantage: list[float], turns: list[dict], trained: str | None, out: list[dict]
) -> None:
    """Split a trajectory's token advantages among its trained turns, as pairs [value, count]."""
    own = [k for k, turn in enumerate(turns) if trained in (None, turn["role"])]
    if "pieces" not in out[0] or sum(len(turns[k]["completion"]) for k in own) != len(advantage):
        return
    begin = 0
    for k in own:
        end = begin + len(turns[k]["completion"])
        out[k]["credit"] = [[value, len(list(same))] for value, same in groupby(advantage[begin:end])]
        begin = end


def held_out(runs: Sequence[TrainingRun], budget: int) -> tuple[list[str], list[dict], list[dict]]:
    """Columns, tables and problems: held-out problems before and after training, in every run.

    A column is an evaluation: the first one of the first run, then the newest one of each. A table counts how
    many problems are right in the first and in the last column. If not all problems fit, they are taken in
    turn from each kind of change.
    """
    columns, cells = [], {}
    for run in runs:
        found: dict[str, dict] = {}
        for row in run.held_out():  # a repeated evaluation replaces the rows of a killed one
            found.setdefault(row["when"], {})[
                row["decoding"], row["problem"], row["question"], row["sample"]
            ] = row
        names = sorted(found, key=lambda name: (next(iter(found[name].values()))["step"], name != "before"))
        for name in names[-1:] if columns else names[:1] + names[1:][-1:]:
            for (decoding, problem, question, _), row in found[name].items():
                key = decoding, problem, question
                cells.setdefault(key, {}).setdefault(len(columns), []).append(row)
            columns.append(f"{run.name}, {name}" if len(runs) > 1 else name)
    problems = [
        _problem(*key, by_column) for key, by_column in cells.items() if len(by_column) == len(columns)
    ]
    kinds: dict[tuple, list[int]] = {}
    for i, problem in enumerate(problems):
        kinds.setdefault((problem["cells"][0]["right"], problem["cells"][-1]["right"]), []).append(i)
    in_turn = sorted((at, i) for members in kinds.values() for at, i in enumerate(members))
    kept = fill(budget, (i for _, i in in_turn), lambda i: [problems[i]])
    tables = []
    for decoding in dict.fromkeys(problem["decoding"] for problem in problems):
        mine = [p["cells"] for p in problems if p["decoding"] == decoding]
        count = {(a, b): sum((c[0]["right"], c[-1]["right"]) == (a, b) for c in mine)
                 for a in (True, False) for b in (True, False)}  # fmt: skip
        tables.append({"decoding": decoding, "count": count, "problems": len(mine)})
    return columns, tables, [part[0] for _, part in sorted(kept.items())]


def _problem(decoding: str, problem: int, question: str, by_column: dict[int, list[dict]]) -> dict:
    first = by_column[0][0]
    return {
        "problem": problem,
        "decoding": decoding,
        "q": visible(question),
        "gold": visible(first["gold"]),
        "level": visible(first.get("level", "")),
        "cells": [_cell(by_column[k]) for k in sorted(by_column)],
    }


def _cell(rows: list[dict]) -> dict:
    """First attempt of one evaluation at a problem, and the number of right attempts."""
    row, right = rows[0], sum(row["outcome_reward"] > 0.5 for row in rows)
    turns = [{"role": turn["role"], "n": turn["tokens"], "pieces": shortened([visible(turn["text"])])}
             for turn in row["turns"]]  # fmt: skip
    return {
        "answer": None if row.get("answer") is None else visible(row["answer"]),
        "right": row["outcome_reward"] > 0.5,
        "n": sum(turn["n"] for turn in turns),
        "cut": any(turn["finish_reason"] == "length" for turn in row["turns"]),
        "turns": turns,
    } | ({"share": f"{right} of {len(rows)}"} if len(rows) > 1 else {})


def annotated_chains(folder: Chains, i: int, budget: int) -> list[dict]:
    """Evenly spaced chains of chunk.py up to `budget` bytes: texts, labels and importance of thoughts."""

    def chain(k: int) -> list[dict]:
        item = folder.items[k]
        return [{
            "run": i,
            "problem": item["id"],
            "q": visible(item["question"]),
            "gold": visible(item["answer"]),
            "thoughts": [visible(text) for text in item["thoughts"]],
            "labels": item["labels"],
            "lengths": item["lengths"],
            "J": [significant(value) for value in item["accuracies"]],
            "R": [significant(value) for value in item["importance"]],
        }]  # fmt: skip

    kept = fill(budget, spread(len(folder.items)), chain)
    return [part[0] for _, part in sorted(kept.items())]


def lengths_by_evaluation(run: TrainingRun) -> dict[str, list[float]]:
    """Tokens of every sampled held-out completion, by evaluation."""
    out: dict[str, dict] = {}
    for row in run.held_out():
        if row["decoding"] == "sampled":
            tokens = sum(turn["tokens"] for turn in row["turns"])
            out.setdefault(row["when"], {})[row["problem"], row["question"], row["sample"]] = tokens
    return {name: list(tokens.values()) for name, tokens in out.items()}


def fill(budget: int, order: Iterable[int], make: Callable[[int], list[dict]]) -> dict[int, list[dict]]:
    """Collect make(i) for i in `order` until their JSON exceeds `budget` bytes; at least one."""
    out = {}
    for i in order:
        part = make(i)
        budget -= len(script_json(part).encode("utf-8", "replace"))
        if out and budget < 0:
            break
        out[i] = part
    return out


def spread(count: int) -> Iterator[int]:
    """Yield 0, …, count - 1 so that every prefix is evenly spaced: both ends, then middles."""
    yield from sorted({0, count - 1} & set(range(count)))
    gaps = deque([(0, count - 1)])
    while gaps:
        low, high = gaps.popleft()
        middle = (low + high) // 2
        if low < middle < high:
            yield middle
            gaps += [(low, middle), (middle, high)]


def pieces(completion: list[int], tokenizer: Tokenizer) -> list[str]:
    """Split a completion into the text that each token adds."""
    text, reached = trace(completion, tokenizer)
    return [visible(text[a:b]) for a, b in pairwise([0, *reached])]


def shortened(parts: list[str]) -> list[str]:
    """Shorten a long text: the same number of pieces, the middle ones empty except for a note."""
    length, half = sum(map(len, parts)), LONGEST // 2
    if length <= LONGEST:
        return parts
    note = f" […] {length - LONGEST:,} characters are left out here […] "
    if len(parts) == 1:
        return [parts[0][:half] + note + parts[0][-half:]]
    reached = [0, *accumulate(map(len, parts))]
    out = [
        part if end <= half or begin >= length - half else ""
        for part, (begin, end) in zip(parts, pairwise(reached))
    ]
    out[out.index("")] = note
    return out


def significant(value: float, digits: int = 4) -> float | None:
    return float(f"{value:.{digits}g}") if finite(value) else None
