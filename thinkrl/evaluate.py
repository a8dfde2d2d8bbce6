"""Evaluation: accuracy against tokens of graded attempts, as numbers, records and a table. intervals.py has the statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from thinkrl.grading import canonical
from thinkrl.intervals import aes as aes
from thinkrl.intervals import maj_at_k, pass_at_k
from thinkrl.metrics import Tally
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Trajectory

RIGHT = "right"  # every right answer's vote, however it is spelled


def summarise(trajectories: Sequence[Trajectory]) -> dict:
    """Accuracy and cost of graded attempts at problems, as numbers for summary.json.

    completions    attempts
    accuracy       share that is right
    tokens         mean sampled tokens of an attempt, all turns and roles; tokens_max the most
    truncated      share with a turn that was cut at the token limit
    tokens_per_correct   all tokens / right answers; None if there are none
    pass@k, maj@k  for k = 2, 4, 8, … up to the attempts at each problem, averaged over problems
    by_level       {level: completions, accuracy, tokens} in the order of the levels' names
    """
    if not trajectories:
        raise ValueError("there is nothing to summarise: no completions")
    out = _accuracy_and_tokens(trajectories)
    out["tokens_max"] = max(t.tokens for t in trajectories)
    out["truncated"] = _mean([any(turn.finish_reason == "length" for turn in t.turns) for t in trajectories])
    correct = sum(t.correct for t in trajectories)
    out["tokens_per_correct"] = sum(t.tokens for t in trajectories) / correct if correct else None
    groups = _grouped(trajectories, lambda t: t.problem.id).values()
    k = 2
    while k <= min(map(len, groups)):
        out[f"pass@{k}"] = _mean(
            [pass_at_k(len(group), sum(t.correct for t in group), k) for group in groups]
        )
        out[f"maj@{k}"] = _mean([maj_at_k([_vote(t) for t in group], RIGHT, k) for group in groups])
        k *= 2
    levels = _grouped(trajectories, lambda t: t.problem.level)
    out["by_level"] = {level: _accuracy_and_tokens(levels[level]) for level in sorted(levels)}
    return out


def tally_outcomes(tally: Tally, trajectories: Sequence[Trajectory], group_size: int) -> None:
    """Add a step's rewards, accuracy and tokens to its tally; groups are contiguous."""
    for t in trajectories:
        rewarded = not math.isnan(t.reward)
        tally.add("reward", t.reward if rewarded else 0.0, rewarded)
        tally.add("unrewarded", not rewarded)
        tally.add("accuracy", t.outcome_reward)
        tally.add("tokens", t.tokens)
        tally.add("truncated", any(turn.finish_reason == "length" for turn in t.turns))
        tally.add_sum("sampled_tokens", t.tokens)
    for i in range(0, len(trajectories), group_size):
        rewards = {t.reward for t in trajectories[i : i + group_size] if not math.isnan(t.reward)}
        tally.add("zero_groups", len(rewards) <= 1)


def held_out_record(t: Trajectory, tokenizer: Tokenizer) -> dict:
    """One line of evaluations.jsonl, to which "step", "when" (the key in summary.json) and "decoding" are added.

    problem, sample           address: the problem's id, the place in its group
    question, gold, level     of the problem
    answer, outcome_reward    as extracted (null: none found), and 1 if it is the gold one
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
        "level": t.problem.level,
        "answer": t.answer,
        "outcome_reward": t.outcome_reward,
        "turns": turns,
    }


def summary_table(summary: dict) -> str:
    """The run's summary.json as text: accuracy and mean tokens, before and after, sampled and greedy, by
    level.
    """
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
            (f"  {level}", [r["by_level"][level] for r in results]) for level in levels
        ]:
            lines.append(f"{name:<24}" + "".join(f"{r['accuracy']:>11.1%}{r['tokens']:>9.1f}" for r in row))
    return "\n".join(lines)


def _vote(t: Trajectory) -> Hashable | None:
    if t.correct:
        return RIGHT
    answer = None if t.answer is None else canonical(t.answer, t.problem.source)
    return None if answer is None else ("wrong", answer)


def _accuracy_and_tokens(trajectories: Sequence[Trajectory]) -> dict:
    accuracy, tokens = _mean([t.correct for t in trajectories]), _mean([t.tokens for t in trajectories])
    return {"completions": len(trajectories), "accuracy": accuracy, "tokens": tokens}


def _grouped(
    trajectories: Sequence[Trajectory], key: Callable[[Trajectory], Hashable]
) -> dict[Hashable, list[Trajectory]]:
    groups: dict[Hashable, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(key(t), []).append(t)
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
