"""The problems of a run: their sources, their order on every rank, and the chat that asks them.

    arith, gym:TASK        generators, built in and reasoning-gym's: training never ends, the held-out set is apart
    FILE or hub:DATASET    what `rows` reads and `layouts` understands; A+B for several

Everything is read and checked before the first step.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from thinkrl import UserError, arith, gym
from thinkrl.data import layouts, rows
from thinkrl.distributed import share
from thinkrl.grading import rule_set
from thinkrl.types import Problem

Row = TypeVar("Row")
Generator = Callable[[int, int], Row]  # (seed, index) -> row `index` of an endless stream

# What a question is followed by if it does not say itself where the answer goes; by grading rule.
INSTRUCTIONS = {
    "arith": ("", ""),
    "gsm8k": (
        "####",
        "Think step by step, then give the final answer as a number after ####, on a line of its own.",
    ),
    "last_number": ("", ""),
    "gym": ("<answer>", "Think step by step, then give the final answer between <answer> and </answer>."),
    "math": (r"\boxed", r"Think step by step, then put the final answer in \boxed{}."),
}


class Stream(Generic[Row]):
    """An endless stream of rows for training, cut into steps. It has no state: a step's rows follow from its number.

    A list is shuffled anew in each epoch, by (seed, epoch) alone, and gives len // n steps of n rows; the few
    left over wait for the next epoch, so that no row comes twice in one step. A generator is simply counted
    through.
    """

    def __init__(self, rows: list[Row] | Generator, seed: int):
        self.rows = rows
        self.seed = seed

    def take(self, step: int, n: int, rank: int = 0, world: int = 1) -> list[Row]:
        """This rank's rows of a step of n: contiguous blocks that make up the same step, in order, for any `world`.

        Earlier ranks take one more where n does not divide. Raises UserError if the list has fewer than n
        rows.
        """
        block = share(n, rank, world)
        if callable(self.rows):
            return [self.rows(self.seed, step * n + i) for i in block]
        if n > len(self.rows):
            raise UserError(
                f"the data has {len(self.rows)} rows, fewer than the {n} of one step: lower --problems_per_step"
            )
        epoch, step = divmod(step, len(self.rows) // n)
        order = _order(self.seed, epoch, len(self.rows))
        return [self.rows[order[step * n + i]] for i in block]

    def take_rounds(self, step: int, n: int, rounds: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
        """`take` of a step of n rows and as many spare ones for each further round: a list per round, slot by slot."""
        rows, block = self.take(step, n * rounds), share(n, rank, world)
        return [[rows[r * n + i] for i in block] for r in range(rounds)]

    def preview(self, n: int) -> list[Row]:
        """The rows that can be checked before the first step: the whole list, or what a generator gives to a
        first step of n.
        """
        return self.take(0, n) if callable(self.rows) else self.rows


class Mixture(Stream[Row]):
    """Several streams in one: each step has the same number of rows from each, in proportion to its weight.

    It has no state either; the order within a step follows from (seed, step).
    """

    def __init__(self, parts: Sequence[list[Row] | Generator], weights: Sequence[float], seed: int):
        self.streams = [Stream(rows, seed) for rows in parts]
        self.weights = weights
        self.seed = seed

    def take(self, step: int, n: int, rank: int = 0, world: int = 1) -> list[Row]:
        """As `Stream.take`. Raises UserError if n is too small for one row of each."""
        mixed = [
            row for stream, count in zip(self.streams, self.counts(n)) for row in stream.take(step, count)
        ]
        random.Random(f"mixture/{self.seed}/{step}").shuffle(mixed)
        return [mixed[i] for i in share(n, rank, world)]

    def counts(self, n: int) -> list[int]:
        """How many of a step's n rows each stream gives: whole numbers, the largest remainders rounded up."""
        exact = [n * weight / sum(self.weights) for weight in self.weights]
        counts = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: n - sum(counts)]:
            counts[i] += 1
        if min(counts) == 0:
            raise UserError(
                f"a step of {n} rows has none of part {counts.index(0) + 1} of --data: raise --problems_per_step, or "
                "its share in --data_weights"
            )
        return counts

    def preview(self, n: int) -> list[Row]:
        """As `Stream.preview`, of all parts."""
        return [row for stream, count in zip(self.streams, self.counts(n)) for row in stream.preview(count)]


def mix(parts: Sequence[list[Row] | Generator], weights: str, seed: int) -> Stream[Row]:
    """The stream of one part, or the mixture of several. weights: "3,1", one positive number per part."""
    try:
        shares = [float(word) for word in weights.split(",")] if weights else []
    except ValueError:
        shares = [0.0]
    if any(not 0 < share < float("inf") for share in shares) or weights and len(shares) != len(parts):
        raise UserError(
            f"--data_weights {weights}: give a positive number for each of the {len(parts)} parts of --data, such as 3,1"
        )
    if shares:
        return Mixture(parts, shares, seed)
    [part] = parts
    return Stream(part, seed)


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def load_problems(
    spec: str, source: str = "", columns: str = "", skip_bad_rows: bool = False, **how: bool
) -> list[Problem] | Generator:
    """All problems of files and datasets (see `rows`), or of "arith" or "gym:TASK" the generator of the training stream.

    source: the grading rule, whatever the rows name. columns, skip_bad_rows: as in `rows.load`; how: as in
    `layouts.problem`. Raises UserError, naming file, row and field, for anything unreadable.
    """
    if is_generator(spec):
        return _generator(spec, source)
    return _in_rows(spec, source, columns, skip_bad_rows, **how)


def _in_rows(
    spec: str, source: str = "", columns: str = "", skip_bad_rows: bool = False, **how: bool
) -> list[Problem]:
    if endless := [part for part in rows.split_spec(spec) if is_generator(part)]:
        raise UserError(
            f"--data {spec}: {endless[0]} never ends, so joined to others it needs --data_weights"
        )
    problems = rows.load(
        spec, lambda fields: [layouts.problem(fields, source, **how)], columns, skip_bad_rows
    )
    return [replace(problem, id=i) for i, problem in enumerate(problems)]


def is_generator(spec: str) -> bool:
    return spec == "arith" or spec.startswith("gym:") and len(rows.split_spec(spec)) == 1


def _generator(spec: str, source: str) -> Generator:
    """The training stream of a generator; its task's mistakes are raised now."""
    if spec == "arith":
        return arith.training_problem
    gym.training_problem(spec, 0, 0)
    return lambda seed, index: _graded_by(source, gym.training_problem(spec, seed, index))


def _graded_by(source: str, problem: Problem) -> Problem:
    """The same problem under another grading rule, if one is given."""
    return replace(problem, source=source) if source else problem


def reading(options) -> dict:
    """Those options of a program that say how rows are read, as arguments of the functions here.

    Rewards of the user's own want the row, and unless the outcome is one of them, its prompt as it stands.
    """
    rewards = getattr(options, "reward", "").split("+")
    own = [name.strip() for name in rewards if name.strip() not in ("", "outcome")]
    how = {name: getattr(options, name) for name in ("source", "columns", "skip_bad_rows")}
    return how | {"keep_row": bool(own), "verbatim": len(own) == len(rewards)}


def training_stream(spec: str, seed: int, weights: str = "", **how) -> Stream[Problem]:
    """The problems of `--data`, in the order of training. weights: shares of a step, for several joined by "+";
    without them the rows of all are one list. how: as in `load_problems`.
    """
    if not weights:
        return Stream(load_problems(spec, **how), seed)
    names = rows.split_spec(spec)
    return mix(
        [_with_ids(load_problems(each, **how), i, len(names)) for i, each in enumerate(names)], weights, seed
    )


def _with_ids(part: list[Problem] | Generator, place: int, count: int) -> list[Problem] | Generator:
    """The same problems with ids that no other of `count` parts has: random numbers are drawn by them."""

    def with_id(problem: Problem) -> Problem:
        return replace(problem, id=problem.id * count + place)

    if callable(part):
        return lambda seed, index: with_id(part(seed, index))
    return [with_id(problem) for problem in part]


def held_out_problems(eval_data: str, data: str, source: str = "", **how) -> list[Problem]:
    """The problems to evaluate on: `eval_data`, or the own held-out set of `data` if it is a generator, or none.
    how: as in `load_problems`.
    """
    spec = eval_data or (data if is_generator(data) else "")
    if spec == "arith":
        return arith.heldout()
    if is_generator(spec):
        return [_graded_by(source, problem) for problem in gym.heldout(spec)]
    return _in_rows(spec, source, **how | {"keep_row": False}) if spec else []


def subsample(problems: list[Problem], count: int) -> list[Problem]:
    """At most `count` of the problems, at even distances: a file is often sorted by level or source."""
    count = min(count, len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def messages(problem: Problem, system: str = "", suffix: str = "") -> list[dict[str, str]]:
    """The chat that asks the problem.

    system: used where the row has none. suffix: appended to the question after a line break; empty: the
    `INSTRUCTIONS` of the problem's grading rule, unless the question mentions the answer's marker itself
    (verl's rows do).
    """
    if not suffix and problem.instruct:
        marker, instruction = INSTRUCTIONS[rule_set(problem.source)]
        suffix = "" if marker in problem.question else instruction
    question = f"{problem.question}\n{suffix}" if suffix else problem.question
    system = problem.system or system
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
