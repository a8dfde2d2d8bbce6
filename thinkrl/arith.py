"""The built-in task: products. Hard ones are often wrong if answered at once, and right if computed in steps.

A problem is `a*b?`, with a of one to three digits and b from 2 to 9. A scripted teacher writes its chains,
which are not efficient on purpose:

    at once         374*6?<think><episode_1>374*6=2244</episode_1></think><answer>2244</answer>
    step by step    374*6?<think><episode_1>300*6=1800</episode_1><episode_2>70*6=420</episode_2>
                    <episode_3>1800+420=2220</episode_3><episode_4>4*6=24</episode_4>
                    <episode_5>2220+24=2244</episode_5></think><answer>2244</answer>              (in one
                    line)

Between these steps it recalls the question, restates and checks results, or writes `wait` and starts again.
The parity of b, not the difficulty, decides whether it computes at once or in steps; a hard product computed
at once is often wrong. So a policy can learn more than brevity: for which problems steps help, how many, and
which are useless.

All functions depend on their arguments only: problem i of seed s is the same on every rank and machine.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from thinkrl.types import Problem, UserError

LEVELS = ("1 digit", "2 digits", "3 digits")
SHARES = (0.05, 0.45, 0.50)  # of levels in training, and in heldout() if it has enough products
MAX_EPISODES = 20  # the vocabulary has no higher number
LONGEST_CHAIN = 15  # episodes the teacher writes at most, so that no trace comes near 200 tokens
HELD_OUT = 4  # one product in four is never trained on


@dataclass(frozen=True)
class Teacher:
    """Probabilities of the chain writer. Tuples are by level or by parity, as their comments say."""

    # for odd b, for even b: greedy decoding decomposes half of the problems
    decompose: tuple[float, float] = (0.45, 0.70)
    misjudge: tuple[float, ...] = (0.0, 0.30, 0.45)  # by level: computing at once goes wrong, even greedily
    slip: float = 0.03  # a step is wrong …
    notice: float = 0.5  # … and corrected at once: "check … no", then the right step
    empty: float = 0.05  # no thinking, the answer is a guess
    opening: float = 0.40  # recall the question first
    idle_middle: float = 0.60  # recall, restate or check after a step; again after that (geometric)
    idle_last: float = 0.30  # the same after the result; small, or greedy decoding never ends its thinking
    again_glance: float = 0.20  # wait, and then step by step
    again_steps: float = 0.12
    force: float = 0.35  # of the SFT rows: thinking cut after some episode, the answer demanded
    # of those: before the first episode; few, because they teach answers without steps
    force_empty: float = 0.12


TEACHER = Teacher()


def is_heldout(a: int, b: int) -> bool:
    """Whether the product a*b belongs to the held-out set. It may still occur as a step inside a chain."""
    return zlib.crc32(f"{a}*{b}".encode()) % HELD_OUT == 0


def training_problem(seed: int, index: int) -> Problem:
    """Problem `index` of the endless training stream with this seed; never a held-out one."""
    rng = random.Random(f"arith/{seed}/{index}")
    level = rng.choices(range(len(LEVELS)), SHARES)[0]
    while True:
        a, b = rng.randrange(*_range(level)), rng.randint(2, 9)
        if not is_heldout(a, b):
            return _problem(index, a, b)


def heldout(n: int = 500) -> list[Problem]:
    """Return n distinct held-out problems, always the same, by level in `SHARES` as far as there are enough.

    Raises UserError if fewer than n products are held out.
    """
    pools = []
    for level in range(len(LEVELS)):
        pairs = [(a, b) for a in range(*_range(level)) for b in range(2, 10) if is_heldout(a, b)]
        pools.append(sorted(pairs, key=lambda pair: zlib.crc32(f"order/{pair}".encode())))
    if not 0 <= n <= (most := sum(map(len, pools))):
        raise UserError(f"the built-in task has {most} held-out problems, asked for {n}")
    counts = [min(round(n * share), len(pool)) for share, pool in zip(SHARES, pools)]
    for level in reversed(range(len(LEVELS))):  # what small levels cannot fill comes from larger ones
        counts[level] += max(min(n - sum(counts), len(pools[level]) - counts[level]), -counts[level])
    chosen = [pair for count, pool in zip(counts, pools) for pair in pool[:count]]
    return [_problem(i, a, b) for i, (a, b) in enumerate(chosen)]


def operands(problem: Problem) -> tuple[int, int]:
    """Operands (374, 6) of the question "374*6?"."""
    a, b = problem.question.rstrip("?").split("*")
    return int(a), int(b)


def episodes(problem: Problem, rng: random.Random, teacher: Teacher = TEACHER) -> tuple[list[str], str]:
    """Write one verbose chain: the texts of at most LONGEST_CHAIN episodes, and the answer.

    A step `x=y` may be wrong, by `misjudge` and `slip`. In "check x=y ok" it is always right, in "check x=y
    no" always wrong.
    """
    a, b = operands(problem)
    level = LEVELS.index(problem.level)
    if rng.random() < teacher.empty:
        return [], str(_glance(a * b, level, rng, teacher))
    thoughts = [f"recall {a}*{b}"] if rng.random() < teacher.opening else []
    by_steps = level > 0 and rng.random() < teacher.decompose[b % 2 == 0]
    if by_steps:
        result = _write_steps(thoughts, a, b, rng, teacher)
    else:
        result = _glance(a * b, level, rng, teacher)
        thoughts.append(f"{a}*{b}={result}")
    _idle(thoughts, teacher.idle_last, a, b, rng)
    if level > 0 and rng.random() < (teacher.again_steps if by_steps else teacher.again_glance):
        thoughts.append("wait")
        result = _write_steps(thoughts, a, b, rng, teacher)
        _idle(thoughts, teacher.idle_last, a, b, rng)
    if len(thoughts) > LONGEST_CHAIN:
        return episodes(problem, rng, teacher)
    return thoughts, str(result)


def holds(step: str) -> bool:
    """Whether a step such as "1800+420=2220" or "4*6=24" is right."""
    expression, value = step.split("=")
    x, operator, y = re.split(r"([+*])", expression)
    return int(value) == (int(x) * int(y) if operator == "*" else int(x) + int(y))


def thinking(thoughts: list[str]) -> str:
    """Format `<think>` and numbered episodes, without the closing tag."""
    return "<think>" + "".join(f"<episode_{k}>{t}</episode_{k}>" for k, t in enumerate(thoughts, start=1))


def chain(problem: Problem, rng: random.Random, teacher: Teacher = TEACHER) -> str:
    """One verbose chain as text: `<think><episode_1>…</episode_1>…</think><answer>…</answer>`."""
    thoughts, answer = episodes(problem, rng, teacher)
    return f"{thinking(thoughts)}</think><answer>{answer}</answer>"


def sft_rows(seed: int, count: int, teacher: Teacher = TEACHER) -> Iterator[dict[str, str]]:
    """Rows {"problem", "response"} for next-token training.

    In a share `teacher.force` of the rows, thinking is cut after some episodes and closed, and the response
    is the *gold* answer; the thinking is in the prompt and not in the loss. So the policy is trained on
    forced answers, which the predicted correctness J_k uses.
    """
    for index in range(count):
        problem = training_problem(seed, index)
        rng = random.Random(f"chain/{seed}/{index}")
        if rng.random() < teacher.force:
            thoughts, _ = episodes(problem, rng, teacher)
            kept = (
                0 if rng.random() < teacher.force_empty else rng.randint(min(1, len(thoughts)), len(thoughts))
            )
            cut = thinking(thoughts[:kept])
            yield {
                "problem": f"{problem.question}{cut}</think><answer>",
                "response": f"{problem.answer}</answer>",
            }
        else:
            yield {"problem": problem.question, "response": chain(problem, rng, teacher)}


def _range(level: int) -> tuple[int, int]:
    return (2, 10) if level == 0 else (10**level, 10 ** (level + 1))


def _problem(index: int, a: int, b: int) -> Problem:
    return Problem(
        id=index, question=f"{a}*{b}?", answer=str(a * b), source="arith", level=LEVELS[len(str(a)) - 1]
    )


def _glance(value: int, level: int, rng: random.Random, teacher: Teacher) -> int:
    return _misread(value, rng) if rng.random() < teacher.misjudge[level] else value


def _misread(value: int, rng: random.Random) -> int:
    """Wrong number that differs from `value` in one digit, without a leading zero."""
    digits = list(str(value))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place] and (d != "0" or place > 0)])
    return int("".join(digits))


def _write_steps(thoughts: list[str], a: int, b: int, rng: random.Random, teacher: Teacher) -> int:
    """Append the partial products from the left and their sums, with idle episodes between. Returns the
    result.
    """
    digits = str(a)
    parts = [
        int(digit) * 10 ** (len(digits) - place)
        for place, digit in enumerate(digits, start=1)
        if digit != "0"
    ]
    total = _write_step(thoughts, f"{parts[0]}*{b}", parts[0] * b, rng, teacher)
    for part in parts[1:]:
        _idle(thoughts, teacher.idle_middle, a, b, rng)
        product = _write_step(thoughts, f"{part}*{b}", part * b, rng, teacher)
        _idle(thoughts, teacher.idle_middle, a, b, rng)
        total = _write_step(thoughts, f"{total}+{product}", total + product, rng, teacher)
    return total


def _write_step(
    thoughts: list[str], expression: str, value: int, rng: random.Random, teacher: Teacher
) -> int:
    """Append `expression=value`, or by a slip a wrong value, which may be corrected. Returns the result."""
    if rng.random() < teacher.slip:
        wrong = _misread(value, rng)
        thoughts.append(f"{expression}={wrong}")
        if rng.random() >= teacher.notice:
            return wrong
        thoughts.append(f"check {expression}={wrong} no")
    thoughts.append(f"{expression}={value}")
    return value


def _idle(thoughts: list[str], rate: float, a: int, b: int, rng: random.Random) -> None:
    """Append useless episodes: one with probability `rate`, then another with that probability, and so on."""
    step = thoughts[-1]
    value = step.split("=")[1]
    while rng.random() < rate:
        idle = rng.choices(("check", "so", "recall"), (0.4, 0.3, 0.3))[0]
        if idle == "check" and holds(step):
            thoughts.append(f"check {step} ok")
        elif idle == "recall":
            thoughts.append(f"recall {a}*{b}")
        else:
            thoughts.append(f"so {value}")
