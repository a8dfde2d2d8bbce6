"""Make solutions of reasoning-gym's chain_sum, to fine-tune a pretrained model before RL (extra [gym]).

    python -m thinkrl.tools.worked_sums --out sums.jsonl [--data gym:chain_sum,min_terms=4,max_terms=4]
    torchrun … train.py sft --model DIR --data sums.jsonl
    torchrun … train.py grpo --model runs/NAME/hf --data gym:chain_sum,min_terms=4,max_terms=4

A solution adds one term per paragraph. After some steps a paragraph repeats the step, which RL can learn to
leave out. The rows are of another stream than RL's, and none is held out.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from thinkrl import UserError, gym
from thinkrl.data.problems import messages
from thinkrl.options import option, parse_as, run_tool
from thinkrl.types import Problem


@dataclass(frozen=True)
class Options:
    out: str = option("", "file to write")
    data: str = option("gym:chain_sum,min_terms=4,max_terms=4,min_digits=2,max_digits=2", "the task")
    rows: int = option(4000, "solutions to write", low=1)
    repeats: float = option(0.33, "share of the steps that are repeated", low=0, high=1)
    system: str = option("", "system message of every row; RL then needs the same --system")
    suffix: str = option("", "text after every question; RL then needs the same --suffix")
    seed: int = option(1, "stream of problems; RL's is its own --seed, 42 if not given")


def parse(argv: list[str]) -> Options:
    options = parse_as(Options, argv, "python -m thinkrl.tools.worked_sums [--key value …]")
    if not options.out:
        raise UserError("--out FILE is missing")
    return options


def solution(problem: Problem, draw: random.Random, repeats: float) -> str:
    """Write "<think>\\nStart with 3.\\n\\n3 + 4 = 7\\n\\n7 - 2 = 5\\n</think>\\n<answer>5</answer>" for "3 +
    4 - 2".
    """
    no_sum = UserError(f"{problem.question!r} is no chain of sums and differences of positive numbers")
    terms = re.findall(r"[+-]|\d+", problem.question.split(":")[-1])
    if not terms or not terms[0].isdecimal():
        raise no_sum
    total, paragraphs = int(terms[0]), [f"Start with {terms[0]}."]
    for sign, term in zip(terms[1::2], terms[2::2]):
        after = total + int(term) if sign == "+" else total - int(term)
        step = f"{total} {sign} {term} = {after}"
        paragraphs.append(step)
        if draw.random() < repeats:
            paragraphs.append(f"Let me check this step again: {step}, yes.")
        total = after
    if str(total) != problem.answer:
        raise no_sum
    thinking = "\n\n".join(paragraphs)
    return f"<think>\n{thinking}\n</think>\n<answer>{total}</answer>"


def main(options: Options) -> None:
    draw = random.Random(options.seed)
    with Path(options.out).open("w") as file:
        for index in range(options.rows):
            problem = gym.training_problem(options.data, options.seed, index)
            row = {
                "messages": [
                    *messages(problem, options.system, options.suffix),
                    {"role": "assistant", "content": solution(problem, draw, options.repeats)},
                ]
            }
            file.write(json.dumps(row) + "\n")
    print(f"{options.rows} worked solutions: {options.out}")


if __name__ == "__main__":
    run_tool("thinkrl.tools.worked_sums", parse, main)
