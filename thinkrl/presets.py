"""Presets: who writes the trajectory, what it is paid, and how the advantage is filled. Nothing else differs between them.

    Grpo        one completion per attempt, paid for its outcome, one advantage for all its tokens
    L2T         the same completions, paid per episode: information gained minus parameters moved
    LongShort   two policies write a conversation in turns; each round trains one of them

train.py calls, for every step:  learner, rollout, advantages, samples.  A preset holds no state but its learners and what
`state_dict` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinkrl.config import Config
from thinkrl.distributed import World
from thinkrl.grpo import group_advantages
from thinkrl.l2t.episodes import segment
from thinkrl.learner import Learner, learning_rate, model_path, new_learner
from thinkrl.metrics import Tally
from thinkrl.rollout import TRAINING, require_room, rollout
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Sample, Trajectory


class Grpo:
    """The baseline: one completion per attempt, its graded outcome is the reward, one advantage for all
    its tokens.
    """

    def __init__(self, config: Config, world: World):
        self.config = config
        path = model_path(config.model)
        self.tokenizer = Tokenizer(path)
        self.learners = {"policy": new_learner(path, config, world, self.tokenizer)}

    def learner(self, step: int) -> Learner:
        return self.learners["policy"]

    def name(self, step: int) -> str:
        """What the policy after `step` steps is called in summary.json."""
        return f"step_{step}"

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.steps, self.config)

    def require_room(self, problems: list[Problem], more: int = 0) -> None:
        """Raise UserError before the first step if a problem and its completion, `more` tokens included,
        exceed the context.
        """
        c, model = self.config, self.learners["policy"].policy
        require_room(
            problems, self.tokenizer, model.config.max_positions, c.max_tokens + more, c.system, c.suffix
        )

    def require_trainable(self, problems: list[Problem]) -> None:
        """`require_room` for problems to train on, of which a preset may want more."""
        self.require_room(problems)

    def attempt(
        self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...], **hooks
    ) -> list[Trajectory]:
        c = self.config
        return rollout(
            self.learners["policy"].sampler,
            self.tokenizer,
            problems,
            group_size=n,
            max_tokens=c.max_tokens,
            temperature=temperature,
            seed=c.seed,
            address=address,
            system=c.system,
            suffix=c.suffix,
            **hooks,
        )

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        trajectories = self.attempt(
            problems, self.config.group_size, self.config.temperature, (TRAINING, step)
        )
        for t in trajectories:
            t.reward = t.outcome_reward * (1 - self.config.length_penalty * t.tokens)
            if self.config.episode_price:
                episodes = segment(t.turns[0].completion, self.tokenizer, self.config.episodes)
                t.reward -= self.config.episode_price * len(episodes)
        return trajectories

    def advantages(self, trajectories: list[Trajectory], step: int, tally: Tally) -> list[Tensor]:
        return [
            value.expand(t.tokens)
            for value, t in zip(grpo_advantages(trajectories, self.config), trajectories)
        ]

    def samples(self, trajectories: list[Trajectory], advantages: list[Tensor], step: int) -> list[Sample]:
        return [
            Sample(
                turn.prompt,
                turn.completion,
                advantage,
                torch.tensor(turn.logprobs),
                f"{t.problem.id}/{t.sample}",
            )
            for t, advantage in zip(trajectories, advantages)
            for turn in t.turns
        ]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def grpo_advantages(trajectories: list[Trajectory], config: Config) -> Tensor:
    """One fp32 number per trajectory, from its group's raw rewards."""
    reward = torch.tensor([t.reward for t in trajectories], dtype=torch.float64).view(-1, config.group_size)
    return group_advantages(reward, config.advantage_std).flatten().float()
