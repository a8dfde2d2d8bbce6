"""The built-in task: products whose hard cases are unreliable at a glance and reliable step by step.

A problem is `a*b?`, with a of one to three digits and b from 2 to 9. A small teacher writes chains for it, on
purpose not efficient ones:

    at a glance     374*6?<think><episode_1>374*6=2244</episode_1></think><answer>2244</answer>
    step by step    374*6?<think><episode_1>300*6=1800</episode_1><episode_2>70*6=420</episode_2>
                    <episode_3>1800+420=2220</episode_3><episode_4>4*6=24</episode_4>
                    <episode_5>2220+24=2244</episode_5></think><answer>2244</answer>              (in one line)

between which it recalls the question, restates and checks what it has, says `wait` and starts again. Which of
the two ways it takes depends on the parity of b and not on the difficulty; a glance at a hard product is
often wrong. So there is something to learn besides writing less: where thinking helps, how much of it, and
what of it earns nothing.

Everything here is a function of its arguments: problem i of seed s is the same on every rank and machine.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from thinkrl.types import Problem, UserError

LEVELS = ("1 digit", "2 digits", "3 digits")
SHARES = (0.05, 0.45, 0.50)  # of the training stream, and of heldout() as far as there are that many products
MAX_EPISODES = 20  # the vocabulary has no higher number
LONGEST_CHAIN = 15  # episodes the teacher writes at most, so that no trace comes near 200 tokens
HELD_OUT = 4  # one product in four is never trained on


@dataclass(frozen=True)
class Teacher:
    """The habits of the chain writer, as probabilities. Tuples over levels or parities say so."""

    decompose: tuple[float, float] = (
        0.45,
        0.70,
    )  # for odd b, for even b: greedy decoding decomposes half of the problems
    misjudge: tuple[float, ...] = (
        0.0,
        0.30,
        0.45,
    )  # by level: a glance is wrong, and stays unreliable even greedily
    slip: float = 0.03  # a step is wrong
    notice: float = 0.5  # and is noticed at once: "check … no", then the right step
    empty: float = 0.05  # no thinking at all, the answer is a guess
    opening: float = 0.40  # recall the question first
    idle_middle: float = 0.60  # recall, restate or check after a step; again after that (geometric)
    idle_last: float = 0.30  # the same after the result; small, or greedy decoding never closes its thinking
    again_glance: float = 0.20  # wait, and then step by step
    again_steps: float = 0.12
    force: float = 0.35  # of the SFT rows: thinking cut after some episode, the answer demanded
    force_empty: float = (
        0.12  # of those: before the first episode; few, because they teach to answer at a glance
    )


TEACHER = Teacher()


def is_heldout(a: int, b: int) -> bool:
    """Whether the product a*b belongs to the evaluation set. As a step inside a chain it may still occur:
    7*8=56 is known.
    """
    return zlib.crc32(f"{a}*{b}".encode()) % HELD_OUT == 0


def training_problem(seed: int, index: int) -> Problem:
    """Problem `index` of the endless training stream `seed`; never a held-out one."""
    rng = random.Random(f"arith/{seed}/{index}")
    level = rng.choices(range(len(LEVELS)), SHARES)[0]
    while True:
        a, b = rng.randrange(*_range(level)), rng.randint(2, 9)
        if not is_heldout(a, b):
            return _problem(index, a, b)


def heldout(n: int = 500) -> list[Problem]:
    """n distinct problems that training never produces: `SHARES` of the levels, as far as there are that many. Always the same.

    Raises UserError if fewer than n products are held out.
    """
    pools = []
    for level in range(len(LEVELS)):
        pairs = [(a, b) for a in range(*_range(level)) for b in range(2, 10) if is_heldout(a, b)]
        pools.append(sorted(pairs, key=lambda pair: zlib.crc32(f"order/{pair}".encode())))
    if not 0 <= n <= (most := sum(map(len, pools))):
        raise UserError(f"the built-in task has {most} held-out problems, asked for {n}")
    counts = [min(round(n * share), len(pool)) for share, pool in zip(SHARES, pools)]
    for level in reversed(range(len(LEVELS))):  # what the small levels cannot fill comes from the large ones
        counts[level] += max(min(n - sum(counts), len(pools[level]) - counts[level]), -counts[level])
    chosen = [pair for count, pool in zip(counts, pools) for pair in pool[:count]]
    return [_problem(i, a, b) for i, (a, b) in enumerate(chosen)]


def operands(problem: Problem) -> tuple[int, int]:
    """(374, 6) of the question "374*6?"."""
    a, b = problem.question.rstrip("?").split("*")
    return int(a), int(b)


def episodes(problem: Problem, rng: random.Random, teacher: Teacher = TEACHER) -> tuple[list[str], str]:
    """One verbose chain as (contents of its episodes, the answer it comes to). At most LONGEST_CHAIN, possibly none.

    A step `x=y` may be wrong, by `misjudge` and `slip`; "check x=y ok" never is, and "check x=y no" always
    is.
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
    """`<think>` and the numbered episodes, thinking still open."""
    return "<think>" + "".join(f"<episode_{k}>{t}</episode_{k}>" for k, t in enumerate(thoughts, start=1))


def chain(problem: Problem, rng: random.Random, teacher: Teacher = TEACHER) -> str:
    """One verbose chain as text: `<think><episode_1>…</episode_1>…</think><answer>…</answer>`."""
    thoughts, answer = episodes(problem, rng, teacher)
    return f"{thinking(thoughts)}</think><answer>{answer}</answer>"


def sft_rows(seed: int, count: int, teacher: Teacher = TEACHER) -> Iterator[dict[str, str]]:
    """Rows {"problem", "response"} for next-token training.

    A share `teacher.force` has its thinking cut after some of its episodes and closed, and the *gold* answer
    as the response; what precedes it is in the prompt and so outside the loss. This puts the answer-forcing
    probe, and with it the predicted correctness J_k, into what the policy has been trained on.
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
    """A wrong number that looks like the right one: another digit in one place, and no leading zero."""
    digits = list(str(value))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place] and (d != "0" or place > 0)])
    return int("".join(digits))


def _write_steps(thoughts: list[str], a: int, b: int, rng: random.Random, teacher: Teacher) -> int:
    """Append the partial products from the left, each added to what stands, idling in between. Returns the
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
    """Append `expression=value`, or by a slip a wrong value, which is noticed and put right or stays.
    Returns what stands.
    """
    if rng.random() < teacher.slip:
        wrong = _misread(value, rng)
        thoughts.append(f"{expression}={wrong}")
        if rng.random() >= teacher.notice:
            return wrong
        thoughts.append(f"check {expression}={wrong} no")
    thoughts.append(f"{expression}={value}")
    return value


def _idle(thoughts: list[str], rate: float, a: int, b: int, rng: random.Random) -> None:
    """Append nothing, or with probability `rate` an episode that adds nothing to the last step, and so on."""
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
