"""Compare two policies on the same problems: differences and AES with intervals. `sample.py --compare A B`

A and B are run folders, RUN or RUN:NAME for one of its evaluations (NAME is a key of summary.json: before,
step_50, …; without it, after), or folders that `sample.py --data … --out` has written. Differences are A - B,
and B is the base of AES. Problems are paired by id, question and gold answer; problems of one side only are
left out and counted. Several samples of a problem count as their mean, and the bootstrap draws problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from thinkrl import UserError
from thinkrl.evaluate import is_correct, tokens_of
from thinkrl.intervals import aes_interval, paired_bootstrap
from thinkrl.run.files import read_lines
from thinkrl.tools.evaluation import table
from thinkrl.tools.formats import number
from thinkrl.visible import visible

Group = list[dict]  # the records of one problem


def read(spec: str) -> dict[str, list[dict]]:
    """Read the evaluation that `spec` names: {"sampled" or "greedy": records}. Raises UserError."""
    path, name = Path(spec), ""
    if not path.is_dir() and ":" in spec:
        path, name = Path(spec.rpartition(":")[0]), spec.rpartition(":")[2]
    if not path.is_dir():
        raise UserError(f"--compare {spec}: no such folder")
    if (path / "completions.jsonl").exists():
        return _by_decoding(read_lines(path / "completions.jsonl"))
    if (path / "parts").exists():
        raise UserError(
            f"--compare {spec}: the evaluation is not finished, give its command again to continue it"
        )
    if not (path / "evaluations.jsonl").exists():
        raise UserError(
            f"--compare {spec}: neither a run folder with evaluations.jsonl nor one that sample.py --out has "
            "written"
        )
    name, found = name or "after", evaluations(path)
    if name not in found:
        raise UserError(f"--compare {spec}: no evaluation is named {name}; there are {', '.join(found)}")
    return found[name]


def evaluations(run: Path) -> dict[str, dict[str, list[dict]]]:
    """Records of a run folder's evaluations: {name: {decoding: records}}."""
    found: dict[str, list[dict]] = {}
    for record in read_lines(run / "evaluations.jsonl"):
        found.setdefault(record["when"], []).append(record)
    return {name: _by_decoding(records) for name, records in found.items()}


def _by_decoding(records: Iterable[dict]) -> dict[str, list[dict]]:
    """Group records by decoding; a record that was written twice, before and after a kill, counts once."""
    found: dict[str, dict] = {}
    for record in records:
        found.setdefault(record["decoding"], {})[record["problem"], record["sample"]] = record
    return {decoding: list(unique.values()) for decoding, unique in found.items()}


def compare_runs(a: str, b: str) -> dict[str, dict]:
    """Apply `compare` to every decoding that both have. Raises UserError if nothing can be paired."""
    ours, base = read(a), read(b)
    shared = [decoding for decoding in ours if decoding in base]
    if not shared:
        raise UserError(
            f"--compare: {a} is {' and '.join(ours)}, {b} is {' and '.join(base)}: nothing to pair"
        )
    return {decoding: compare(ours[decoding], base[decoding], (a, b)) for decoding in shared}


def compare(a: Sequence[dict], b: Sequence[dict], names: tuple[str, str]) -> dict:
    """Compare two lists of records; returns a dict for JSON.

    names                 of both
    problems, left_out    number of pairs; of problems of A only and of B only
    better, worse         problems on which A is right more often than B, and less often
    quantities            {name: {"a", "b", "difference", "interval"}}: accuracy and tokens, both by level,
                          and accuracy at token budgets; the interval of a single problem is null
    aes, aes_interval     of A against B; null where B is never right. An end that is null is infinite: B was
                          never right in 2.5 % of the draws
    """
    ours, base = by_problem(a), by_problem(b)
    pairs = [(ours[key], base[key]) for key in ours if key in base]
    if not pairs:
        raise UserError(
            f"{names[0]} and {names[1]} have no problem in common: same id, question and gold answer"
        )
    accuracy, tokens = _means(pairs, is_correct), _means(pairs, tokens_of)
    found = {"accuracy": accuracy, "tokens": tokens}
    for level in sorted({group[0]["level"] for group, _ in pairs} - {""}):
        own = [pair for pair in pairs if pair[0][0]["level"] == level]
        found |= {f"accuracy, {level}": _means(own, is_correct), f"tokens, {level}": _means(own, tokens_of)}
    for i, budget in enumerate(_shared_budgets(pairs)):
        found[f"accuracy at {budget} tokens"] = _means(pairs, lambda r: r["at_budgets"][i][1])  # noqa: B023
    aes, *ends = (
        aes_interval(*accuracy[:1], *tokens[:1], *accuracy[1:], *tokens[1:]) if accuracy[1].any() else [None]
    )
    return {
        "names": list(names),
        "problems": len(pairs),
        "left_out": [len(ours) - len(pairs), len(base) - len(pairs)],
        "better": int((accuracy[0] > accuracy[1]).sum()),
        "worse": int((accuracy[0] < accuracy[1]).sum()),
        "quantities": {name: _difference(*values) for name, values in found.items()},
        "aes": aes,
        "aes_interval": [end if math.isfinite(end) else None for end in ends],
    }


def by_problem(records: Sequence[dict]) -> dict[tuple, Group]:
    """Group records by (id, question, gold answer) of their problem, in the order of ids."""
    groups: dict[tuple, Group] = {}
    for r in sorted(records, key=lambda r: (r["problem"], r["sample"])):
        groups.setdefault((r["problem"], r["question"], r["gold"]), []).append(r)
    return groups


def _means(pairs: Sequence[tuple[Group, Group]], value: Callable[[dict], float]) -> list[np.ndarray]:
    """Mean of a value over each problem's samples: [P] of A and [P] of B."""
    return [
        np.array([np.mean([value(record) for record in pair[side]]) for pair in pairs]) for side in (0, 1)
    ]


def _shared_budgets(pairs: Sequence[tuple[Group, Group]]) -> list[int]:
    """Token budgets, if both sides have the same, else []."""
    budgets = {
        tuple(tokens for tokens, _ in group[0].get("at_budgets", ())) for pair in pairs for group in pair
    }
    return list(budgets.pop()) if len(budgets) == 1 else []


def _difference(a: np.ndarray, b: np.ndarray) -> dict:
    """Difference with interval; none for a single problem."""
    difference, *interval = paired_bootstrap(a, b)
    out = {"a": float(a.mean()), "b": float(b.mean()), "difference": difference}
    return out | {"interval": interval if len(a) > 1 else None}


def tables(result: dict) -> str:
    """Format `compare` as Markdown that is readable on a terminal, accuracies in percentage points."""
    a, b = result["names"]
    rows = []
    for name, q in result["quantities"].items():
        share = name.startswith("accuracy")
        values = (number(q[side], "accuracy" if share else "tokens") for side in "ab")
        ends = " to ".join(_signed(end, share) for end in q["interval"]) if q["interval"] else "–"
        rows.append([name, *values, _signed(q["difference"], share), ends])
    if result["aes"] is not None:
        ends = [
            number(end, sign=True) if end is not None else sign + "∞"
            for end, sign in zip(result["aes_interval"], "−+")
        ]
        rows.append(["AES", "", "", number(result["aes"], sign=True), " to ".join(ends)])
    paired = f"{result['problems']} problems, paired: {result['better']} better, {result['worse']} worse"
    lines = [
        f"A = {visible(a)}",
        f"B = {visible(b)}",
        "",
        table(["", "A", "B", "A − B", "95 % interval"], rows),
        "",
        paired,
    ]
    if any(result["left_out"]):
        lines.append("left out: {} that only A has, {} that only B has".format(*result["left_out"]))
    if result["aes"] is None:
        lines.append("no AES: it is relative to the accuracy of B, which is 0 here")
    return "\n".join(lines)


def _signed(difference: float, share: bool) -> str:
    return f"{100 * difference if share else difference:+.1f}".replace("-", "−")
