"""It learns: four products, the whole step, 25 times. And it does not if advantages are dealt out at
random or lr is 0.
"""

import pytest
import torch

import train
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.metrics import Tally
from thinkrl.types import Problem, pack

PROBLEMS = [
    Problem(0, "37*6?", "222"),
    Problem(1, "48*7?", "336"),
    Problem(2, "263*4?", "1052"),
    Problem(3, "519*3?", "1557"),
]
STEPS, LAST, LINE = 25, 5, 0.7


def final_reward(lr: str, shuffled: bool = False) -> float:
    """Mean reward of the last steps; the steps are those of train.train."""
    world = start("cpu")
    torch.set_num_threads(1)
    config = parse(
        ["grpo", "--lr", lr, "--steps", str(STEPS), "--problems_per_step", "4", "--max_tokens", "120"]
    )
    preset, rewards = train.Grpo(config, world), []
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        trajectories = preset.rollout(PROBLEMS, step, Tally())
        advantages = preset.advantages(trajectories, step, Tally())
        if shuffled:
            dealt = [advantages[i][0] for i in torch.randperm(len(advantages), generator=order)]
            advantages = [a.expand(t.tokens) for a, t in zip(dealt, trajectories)]
        packs = train.level(
            pack(preset.samples(trajectories, advantages, step), config.micro_batch_tokens), world
        )
        learner = preset.learner(step)
        train.update(learner, packs, preset.learning_rate(step), config, world, Tally())
        learner.sampler.load_weights(learner.policy)
        rewards += [t.reward for t in trajectories] if step >= STEPS - LAST else []
    return sum(rewards) / len(rewards)


def test_it_learns():
    assert final_reward("5e-4") > LINE


@pytest.mark.parametrize(
    "broken", [dict(lr="5e-4", shuffled=True), dict(lr="0")], ids=["shuffled advantages", "lr 0"]
)
def test_and_does_not_when_broken(broken):
    assert final_reward(**broken) < LINE
