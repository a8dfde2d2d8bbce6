"""It learns: four products, the whole step, 25 times. And it does not if advantages are dealt out at
random or lr is 0.
"""

import pytest
import torch
from example_method import Reinforce

import train
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.presets import Grpo
from thinkrl.run.metrics import Tally
from thinkrl.types import Problem

PROBLEMS = [
    Problem(0, "37*6?", "222"),
    Problem(1, "48*7?", "336"),
    Problem(2, "263*4?", "1052"),
    Problem(3, "519*3?", "1557"),
]
STEPS, LAST, LINE = 25, 5, 0.7


class Shuffled(Grpo):
    """Every completion gets the advantage of another one."""

    order = torch.Generator().manual_seed(0)

    def advantages(self, trajectories, step, tally):
        advantages = super().advantages(trajectories, step, tally)
        dealt = [advantages[i][0] for i in torch.randperm(len(advantages), generator=self.order)]
        return [a.expand(t.tokens) for a, t in zip(dealt, trajectories)]


def rewards_of(method: type, steps: int, *options: str) -> list[float]:
    """Mean reward of every step."""
    world = start("cpu")
    torch.set_num_threads(1)
    preset = method(parse(["grpo", "--problems_per_step", "4", "--max_tokens", "120", *options]), world)
    means = []
    for step in range(steps):
        trajectories, _, _ = train.train_step(preset, PROBLEMS, step, world, Tally())
        means.append(sum(t.reward for t in trajectories) / len(trajectories))
    return means


def final_reward(method: type, lr: str) -> float:
    return sum(rewards_of(method, STEPS, "--steps", str(STEPS), "--lr", lr)[-LAST:]) / LAST


@pytest.mark.slow
def test_it_learns():
    assert final_reward(Grpo, "5e-4") > LINE


@pytest.mark.slow
@pytest.mark.parametrize("method, lr", [(Shuffled, "5e-4"), (Grpo, "0")], ids=["shuffled advantages", "lr 0"])
def test_and_does_not_when_broken(method, lr):
    assert final_reward(method, lr) < LINE


@pytest.mark.slow
def test_the_example_method_trains():
    """The whole of tests/example_method.py, two steps: it samples as grpo does, and its updates change the
    policy.
    """
    options = ["--lr", "1e-2", "--warmup", "0"]
    baseline, ours = (rewards_of(method, 2, *options) for method in (Grpo, Reinforce))
    assert ours[0] == baseline[0] and ours[1] != ours[0]
