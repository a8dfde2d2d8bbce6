"""Accuracy at token budgets: thinking is cut off after L tokens, and the answer is forced.

    accuracy(L) = mean over completions of    the outcome        where the completion ended within L tokens
                                              J at its prefix    of at most L tokens, elsewhere

J is the probability of the gold answer after the prefix (gain.py). It equals the expected accuracy of a
forced answer sampled at temperature 1. The probes fork the pages of the evaluation's own completions: nothing
is sampled for them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from thinkrl.config import Config
from thinkrl.l2t.episodes import Episodes, segment
from thinkrl.l2t.gain import Gain, Probe, forcing, make_probe, room_behind
from thinkrl.presets import OnePolicy
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.tracing import Codec
from thinkrl.types import Problem, Trajectory


def budgets_of(config: Config) -> list[int]:
    """Budgets in tokens: multiples of --max_tokens / --eval_budgets, rounded down, up to --max_tokens."""
    parts = config.eval_budgets
    return sorted({config.max_tokens * (i + 1) // parts for i in range(parts)} - {0})


def cut_at(tokens: list[int], budgets: Sequence[int], tokenizer: Codec) -> Episodes:
    """Cut a completion's thinking into episodes that end at the budgets; the last ends with the thinking."""
    whole = segment(tokens, tokenizer, f"fixed:{max(1, len(tokens))}")
    if not tokens:
        return whole
    end = whole.prefixes[-1]
    cuts = torch.tensor([b - 1 for b in budgets if whole.start + 1 < b < end] + [end - 1])
    ends = cuts.clone()
    ends[-1] = len(tokens) - 1
    return Episodes(torch.searchsorted(ends, torch.arange(len(tokens))), ends, cuts, whole.start)


def at_budgets(
    J: Tensor, prefixes: Sequence[int], tokens: int, outcome: float, budgets: Sequence[int]
) -> list[float]:
    """Probability that one completion's answer is right, for each budget.

    J [K+1] is measured after `prefixes` tokens, ascending; `tokens` is the length of the whole completion. A
    budget below the first prefix gets J_0, because no thinking precedes that prefix.
    """
    values = J.tolist()
    return [
        outcome if tokens <= budget else values[max(bisect_right(prefixes, budget) - 1, 0)]
        for budget in budgets
    ]


def require_room(preset: OnePolicy, problems: Sequence[Problem]) -> None:
    """Raise UserError if a forced answer does not fit after a completion, or a problem has no answer to
    force.
    """
    preset.require_room(list(problems), training=False, more=room_for(_probes_of(preset, problems)))


def room_for(probes: Sequence[Probe]) -> int:
    """Largest number of tokens that a forced answer adds to a completion."""
    return room_behind("forced", probes, 0)


def make_probes(
    problems: Sequence[Problem], tokenizer: Tokenizer, prefix: str = "", suffix: str = ""
) -> list[Probe]:
    """Make one probe per problem. Raises UserError if the grading rule does not find a forced answer
    (`gain.forcing`).
    """
    texts = (forcing(p, prefix, suffix) for p in problems)
    return [make_probe(tokenizer, p.answer, *text) for p, text in zip(problems, texts)]


def _probes_of(preset: OnePolicy, problems: Sequence[Problem]) -> list[Probe]:
    return make_probes(problems, preset.tokenizer, preset.config.probe_prefix, preset.config.probe_suffix)


def attempt(
    preset: OnePolicy, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...]
) -> tuple[list[Trajectory], list[list[float]]]:
    """Run `preset.attempt`; also return each trajectory's probability of a right answer at each budget."""
    run = partial(preset.attempt, problems, n, temperature, address)
    sampler = preset.learners["policy"].sampler
    return measured(run, sampler, _probes_of(preset, problems), budgets_of(preset.config))


def measured(
    run: Callable[..., list[Trajectory]], sampler: Sampler, probes: Sequence[Probe], budgets: Sequence[int]
) -> tuple[list[Trajectory], list[list[float]]]:
    """Run `run(on_finish=…)`; also return each trajectory's probability of a right answer at each budget.

    probes: one per prompt of that call.
    """
    gain = Gain(sampler, probes, partial(cut_at, budgets=budgets, tokenizer=sampler.tokenizer))
    trajectories = run(on_finish=gain.on_finish)
    rows = [
        at_budgets(J, episodes.prefixes, t.tokens, t.outcome_reward, budgets)
        for t, (episodes, J) in zip(trajectories, gain.results(), strict=True)
    ]
    return trajectories, rows


def curve(rows: Sequence[Sequence[float]], config: Config) -> dict:
    """Entries of summary.json: budgets, a list of [tokens, accuracy], and budget_area, the mean accuracy over
    them.
    """
    accuracy = [sum(column) / len(rows) for column in zip(*rows)]
    points = [[budget, a] for budget, a in zip(budgets_of(config), accuracy, strict=True)]
    return {"budgets": points, "budget_area": sum(accuracy) / len(accuracy)}


def gaps_to_frontier(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over budgets of the best policy's accuracy minus this policy's; 0 for a policy that is best
    everywhere.

    curves: policy -> accuracy at each budget, the same budgets for all. Adapted from REO-RL's reasoning
    efficiency gap (2506.07104, only the abstract was read), which estimates the best accuracy from policies
    trained for one budget each.
    """
    frontier = [max(column) for column in zip(*curves.values(), strict=True)]
    return {
        name: sum(best - own for best, own in zip(frontier, accuracy)) / len(frontier)
        for name, accuracy in curves.items()
    }
