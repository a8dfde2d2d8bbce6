"""Reward functions in TRL's or verl's form:  --reward module:function, several joined by +

    TRL    fn(prompts, completions, **columns) -> one number or None per completion
    verl   compute_score(data_source, solution_str, ground_truth, extra_info) -> a number, or {"score": a
           number, …}

A function's parameters decide which form it has. The module is imported by Python, or from the current
folder. "outcome" is the graded outcome, 1 or 0. A trajectory's reward is the weighted sum of the functions'
values. None adds nothing; if all functions return None, the reward is NaN, which `group_advantages` leaves
out of the group's statistics.

A function gets the same arguments as in its library. Columns are those of the problem's row; question,
answer, solution, source and level are added if the row has no such column. As in TRL, prompts and completions
are lists of messages if the row's prompt is one, else texts.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from thinkrl import UserError
from thinkrl.data.problems import messages
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory

OUTCOME = "outcome"
VERL = {"solution_str", "ground_truth"}  # parameters of verl's functions
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


class Reward(NamedTuple):
    """One function of --reward with its weight."""

    name: str  # "module:function" or "outcome"
    function: Callable | None  # None: the outcome
    weight: float


def load_rewards(spec: str, weights: str = "") -> list[Reward]:
    """Load the functions of `--reward`, with `--reward_weights` or weights of 1. Raises UserError."""
    names = [name.strip() for name in spec.split("+")]
    try:
        numbers = [float(word) for word in weights.split(",")] if weights else [1.0] * len(names)
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"--reward_weights {weights}: give one number for each of the {len(names)} of --reward"
        )
    return [Reward(name, _function(name), weight) for name, weight in zip(names, numbers)]


def _function(name: str) -> Callable | None:
    if name == OUTCOME:
        return None
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UserError(f"--reward {name}: write module:function, or {OUTCOME}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--reward {name}: {error}") from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise UserError(f"--reward {name}: not a function that can be called and answers at once")
    parameters = inspect.signature(function).parameters
    if "completions" not in parameters and not parameters.keys() >= VERL:
        raise UserError(
            f"--reward {name}: neither TRL's form, with a parameter 'completions', nor verl's, with "
            f"'solution_str' and 'ground_truth': it has {', '.join(parameters) or 'none'}"
        )
    return function


def each(
    rewards: Sequence[Reward],
    trajectories: Sequence[Trajectory],
    tokenizer: Tokenizer,
    system: str = "",
    suffix: str = "",
) -> list[list[float]]:
    """Call each function: unweighted values [trajectory][function], NaN for None.

    A completion's text has no stop token. system, suffix: as in the prompts. Raises UserError, naming the
    function, if it fails or returns something else than numbers or None.
    """
    texts = [_text(t, tokenizer) for t in trajectories]
    asked = [messages(t.problem, system, suffix) for t in trajectories]
    given = [_given(reward, trajectories, texts, asked) for reward in rewards]
    return [[math.nan if value is None else value for value in values] for values in zip(*given)]


def weighted_sum(rewards: Sequence[Reward], values: Sequence[float]) -> float:
    """Weighted sum of a trajectory's values without NaN; NaN if all are."""
    known = [reward.weight * value for reward, value in zip(rewards, values) if not math.isnan(value)]
    return math.fsum(known) if known else math.nan


def _text(t: Trajectory, tokenizer: Tokenizer) -> str:
    ids = t.turns[-1].completion
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids)


def _given(
    reward: Reward, trajectories: Sequence[Trajectory], texts: list[str], asked: list[list[dict]]
) -> list[float | None]:
    """Call one function for all trajectories."""
    if reward.function is None:
        return [t.outcome_reward for t in trajectories]
    if not trajectories:
        return []
    try:
        if inspect.signature(reward.function).parameters.keys() >= VERL:
            scores = [_call(reward, **_verl_arguments(t, text)) for t, text in zip(trajectories, texts)]
            values = [score.get("score") if isinstance(score, dict) else score for score in scores]
        else:
            values = _call(reward, **_trl_arguments(trajectories, texts, asked))
    except UserError:
        raise
    except Exception as error:  # a user's function may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--reward {reward.name} failed with {type(error).__name__}: {error} "
            f"({where.filename}:{where.lineno})"
        ) from error
    values = list(values) if isinstance(values, Iterable) else []
    if len(values) != len(trajectories):
        raise UserError(f"--reward {reward.name} must return a list, one number or None per completion")
    return [_number(reward, value, t) for value, t in zip(values, trajectories)]


def _number(reward: Reward, value: object, t: Trajectory) -> float | None:
    """Convert a value to float; None for None or NaN."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if number is None or math.isnan(number):
        return None
    if math.isinf(number):
        raise UserError(
            f"--reward {reward.name} returned {value!r} for problem {t.problem.id}, sample {t.sample}: "
            "a finite number or None is expected"
        )
    return number


def _call(reward: Reward, **arguments):
    """Call the function with those arguments that it takes."""
    parameters = inspect.signature(reward.function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return reward.function(**arguments)


def require_columns(rewards: Sequence[Reward], problems: Sequence[Problem]) -> None:
    """Raise UserError if a function needs a column that no row has."""
    for reward in rewards:
        if reward.function is None:
            continue
        parameters = inspect.signature(reward.function).parameters
        known = [
            "prompts",
            "completions",
            "completion_ids",
            *dict.fromkeys(c for p in problems for c in _columns(p)),
        ]
        known = list(VERL_ARGUMENTS) if parameters.keys() >= VERL else known
        missing = [
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in known
        ]
        if missing:
            raise UserError(
                f"--reward {reward.name} wants {', '.join(missing)}, and --data has no such column: there "
                "are " + ", ".join(known)
            )


def _columns(problem: Problem) -> dict:
    """Columns of the row, plus our fields under names that the row does not use."""
    known = ("question", "answer", "solution", "source", "level")
    return {name: getattr(problem, name) for name in known} | (problem.row or {})


def _is_chat(problem: Problem) -> bool:
    """Whether the row's prompt is a list of messages."""
    row = problem.row or {}
    return isinstance(row.get("prompt", row.get("messages")), list)


def _trl_arguments(
    trajectories: Sequence[Trajectory], texts: list[str], asked: list[list[dict]]
) -> dict[str, list]:
    rows = [_columns(t.problem) for t in trajectories]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    arguments: dict[str, list] = {name: [row.get(name) for row in rows] for name in names}
    prompts, completions = [], []
    for t, text, chat in zip(trajectories, texts, asked):
        as_chat = _is_chat(t.problem)
        prompts.append(chat if as_chat else chat[-1]["content"])
        completions.append([{"role": "assistant", "content": text}] if as_chat else text)
    ids = [t.turns[-1].completion for t in trajectories]
    return arguments | {"prompts": prompts, "completions": completions, "completion_ids": ids}


def _verl_arguments(t: Trajectory, text: str) -> dict:
    row = t.problem.row or {}
    model = row.get("reward_model")
    gold = model["ground_truth"] if isinstance(model, dict) else t.problem.answer
    values = (row.get("data_source") or t.problem.source, text, gold, row.get("extra_info"))
    return dict(zip(VERL_ARGUMENTS, values, strict=True))
