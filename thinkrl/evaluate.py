"""Results of evaluations: accuracy and tokens of graded attempts. intervals.py has the statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from thinkrl.grading import canonical
from thinkrl.intervals import aes as aes
from thinkrl.intervals import clustered_interval, maj_at_k, pass_at_k
from thinkrl.run.metrics import Tally
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Trajectory
from thinkrl.visible import visible

RIGHT = "right"  # vote of every right answer, in any spelling


@dataclass(frozen=True)
class Attempt:
    """Results of one graded attempt at a problem."""

    problem: int
    level: str
    correct: bool
    tokens: int  # sampled, all turns and roles
    truncated: bool  # whether a turn reached the token limit
    vote: Hashable | None  # its answer, for maj@k; None: no answer


def attempt_of(t: Trajectory) -> Attempt:
    """Make an Attempt from a graded trajectory."""
    truncated = any(turn.finish_reason == "length" for turn in t.turns)
    vote = _vote(t.correct, t.answer, t.problem.source)
    return Attempt(t.problem.id, t.problem.level, t.correct, t.tokens, truncated, vote)


def recorded_attempt(record: dict) -> Attempt:
    """Make an Attempt from a `held_out_record`."""
    correct = is_correct(record)
    truncated = any(turn["finish_reason"] == "length" for turn in record["turns"])
    vote = _vote(correct, record["answer"], record["source"])
    return Attempt(record["problem"], record["level"], correct, tokens_of(record), truncated, vote)


def is_correct(record: dict) -> bool:
    """Whether the attempt of a `held_out_record` is right."""
    return record["outcome_reward"] > 0.5


def tokens_of(record: dict) -> int:
    """Number of sampled tokens in a `held_out_record`, all turns and roles."""
    return sum(turn["tokens"] for turn in record["turns"])


def _vote(correct: bool, answer: str | None, source: str) -> Hashable | None:
    if correct:
        return RIGHT
    found = None if answer is None else canonical(answer, source)
    return None if found is None else ("wrong", found)


def summarise(trajectories: Sequence[Trajectory]) -> dict:
    """Compute the entries of summary.json, see `summary_of`."""
    return summary_of([attempt_of(t) for t in trajectories])


def summary_of(attempts: Sequence[Attempt]) -> dict:
    """Accuracy and tokens of attempts, equally many per problem.

    problems, completions    how many; completions are attempts
    accuracy            share of right attempts; accuracy_interval its 95 % interval, clustered by problem
    tokens              mean sampled tokens of an attempt, all turns and roles; tokens_median, tokens_95 (95th
                        percentile) and tokens_max
    truncated           share with a turn that was cut at the token limit
    tokens_per_correct  all tokens / right answers; None if there are none
    pass@k, maj@k       for k = 2, 4, 8, … and all attempts at a problem, averaged over problems
    by_level            {level: the same numbers} in the order of the levels' names
    """
    if not attempts:
        raise ValueError("there is nothing to summarise: no completions")
    levels = _grouped(attempts, lambda a: a.level)
    return _numbers(attempts) | {"by_level": {level: _numbers(levels[level]) for level in sorted(levels)}}


def _numbers(attempts: Sequence[Attempt]) -> dict:
    groups = list(_grouped(attempts, lambda a: a.problem).values())
    accuracy, low, high = clustered_interval([[a.correct for a in group] for group in groups])
    tokens = [a.tokens for a in attempts]
    correct, n = sum(a.correct for a in attempts), len(groups[0])
    out = {
        "problems": len(groups),
        "completions": len(attempts),
        "accuracy": accuracy,
        "accuracy_interval": [low, high],
        "tokens": sum(tokens) / len(tokens),
        "tokens_median": float(np.median(tokens)),
        "tokens_95": float(np.percentile(tokens, 95)),
        "tokens_max": max(tokens),
        "truncated": sum(a.truncated for a in attempts) / len(attempts),
        "tokens_per_correct": sum(tokens) / correct if correct else None,
    }
    for k in _sizes(n):
        passes = [pass_at_k(n, sum(a.correct for a in group), k) for group in groups]
        majorities = [maj_at_k([a.vote for a in group], RIGHT, k) for group in groups]
        out[f"pass@{k}"], out[f"maj@{k}"] = sum(passes) / len(groups), sum(majorities) / len(groups)
    return out


def _sizes(n: int) -> list[int]:
    """2, 4, 8, … up to n, and n."""
    return sorted({2**i for i in range(1, n.bit_length())} | {n}) if n > 1 else []


def _grouped(attempts: Sequence[Attempt], key: Callable[[Attempt], Hashable]) -> dict:
    groups: dict[Hashable, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(key(attempt), []).append(attempt)
    return groups


def tally_outcomes(tally: Tally, trajectories: Sequence[Trajectory], group_size: int) -> None:
    """Add a step's rewards, accuracy and tokens to its tally; groups are contiguous."""
    for t in trajectories:
        rewarded = not math.isnan(t.reward)
        tally.add("reward", t.reward if rewarded else 0.0, rewarded)
        tally.add("unrewarded", not rewarded)
        tally.add("accuracy", t.outcome_reward)
        tally.add("answered", t.answer is not None)
        tally.add("tokens", t.tokens)
        tally.add("truncated", any(turn.finish_reason == "length" for turn in t.turns))
        tally.add_sum("sampled_tokens", t.tokens)
    for i in range(0, len(trajectories), group_size):
        rewards = {t.reward for t in trajectories[i : i + group_size] if not math.isnan(t.reward)}
        tally.add("zero_groups", len(rewards) <= 1)


def held_out_record(t: Trajectory, tokenizer: Tokenizer) -> dict:
    """One line of evaluations.jsonl, to which "step", "when" (the key in summary.json) and "decoding" are
    added.

    problem, sample           the problem's id, the index in its group
    question, gold, source, level    of the problem
    answer, outcome_reward    as extracted (null: none found), and 1 if it is right
    turns                     role, text, tokens and finish_reason of each turn
    """
    turns = [
        {
            "role": turn.role,
            "text": tokenizer.decode(turn.completion),
            "tokens": len(turn.completion),
            "finish_reason": turn.finish_reason,
        }
        for turn in t.turns
    ]
    return {
        "problem": t.problem.id,
        "sample": t.sample,
        "question": t.problem.question,
        "gold": t.problem.answer,
        "source": t.problem.source,
        "level": t.problem.level,
        "answer": t.answer,
        "outcome_reward": t.outcome_reward,
        "turns": turns,
    }


def summary_table(summary: dict) -> str:
    """Format summary.json as a table: accuracy and mean tokens before and after, by decoding and level."""
    columns = [when for when in ("before", "after") if "accuracy" in summary.get(when, {})]
    if not columns:
        return "nothing was evaluated: no held-out problems (--eval_data)"
    lines = [
        " " * 24 + "".join(f"{when:^20}" for when in columns),
        " " * 24 + f"{'accuracy':>11}{'tokens':>9}" * len(columns),
    ]
    for decoding in ("sampled", "greedy"):
        results = [summary[when] if decoding == "sampled" else summary[when]["greedy"] for when in columns]
        levels = [level for level in results[0]["by_level"] if level]
        for name, row in [(decoding, results)] + [
            (f"  {visible(level)}", [r["by_level"][level] for r in results]) for level in levels
        ]:
            lines.append(f"{name:<24}" + "".join(f"{r['accuracy']:>11.1%}{r['tokens']:>9.1f}" for r in row))
    return "\n".join(lines)
