"""The preset LongShort: two policies in one conversation, trained in alternating rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinkrl.config import Config
from thinkrl.distributed import World
from thinkrl.evaluate import summarise
from thinkrl.learner import Actor, learning_rate, model_path, new_actor
from thinkrl.longshort.conversation import prompts_file, shared_prompts
from thinkrl.longshort.protocol import (
    Conversation,
    RoleSampler,
    Round,
    converse,
    exchanges,
    opening_prompts,
    own_tokens,
    pair_name,
    require_same_tokenizer,
    role_rewards,
    round_at,
    summary,
)
from thinkrl.presets import Preset, grpo_advantages, turn_samples
from thinkrl.rollout import TRAINING, require_room, sampling_file
from thinkrl.run.metrics import Tally
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Sample


class LongShort(Preset[Conversation]):
    """Two policies that write one conversation in turns; each round trains one while the other is frozen."""

    def __init__(self, config: Config, world: World):
        self.config, self.device = config, world.device
        paths = {
            role: model_path(config[role], f"--{role}") if config[role] else model_path(config.model)
            for role in ("long", "short")
        }
        tokenizers = {role: Tokenizer(path) for role, path in paths.items()}
        require_same_tokenizer(tokenizers["long"], tokenizers["short"])
        self.prompts = shared_prompts(config.prompts, *paths.values())
        files = prompts_file(self.prompts) | sampling_file(config)
        self.learners = {
            role: new_actor(path, config, world, tokenizers[role], files, samplers=2)
            for role, path in paths.items()
        }

    def at(self, step: int) -> Round:
        """Round that a step belongs to."""
        return round_at(step, self.config.rounds, self.config.steps_per_round, self.config.length_coef)

    def require_room(self, problems: list[Problem], training: bool) -> None:
        """Raise UserError if an opening turn does not fit the context; a later turn that does not fit ends a
        conversation.

        If the short role is trained, the opening turn is the partner's.
        """
        c, sampler = self.config, self.learners["long"].sampler
        context = sampler.model.config.max_positions
        prompts = opening_prompts(problems, sampler.tokenizer, self.prompts, c.suffix)
        for option in ("max_tokens", "partner_max_tokens")[: 2 if training and "S" in c.rounds else 1]:
            require_room(problems, prompts, context, c[option], f"--{option}")

    def begin_step(self, step: int) -> Actor:
        """Return the learner of the round's role. The reference is the policy at the start of the round. LS
        Eq. 7, 8

        The frozen partner's optimizer moments are moved to the host.
        """
        trained = self.at(step).role
        for role, each in self.learners.items():  # the partner's first: memory may not hold both
            if role != trained:
                each.move_moments(torch.device("cpu"))
        learner = self.learners[trained]
        learner.move_moments(self.device)
        if self.at(step).step == 0:
            learner.reset_reference()
        return learner

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step; every round has its own schedule."""
        return learning_rate(self.at(step).step, self.config.steps_per_round, self.config)

    def converse(
        self,
        problems: list[Problem],
        n: int,
        sampling: dict[str, tuple[float, int]],
        address: tuple[int, ...],
    ) -> list[Conversation]:
        """Sample conversations. sampling: role -> temperature and token limit of a turn."""
        c = self.config
        roles = {
            role: RoleSampler(self.learners[role].sampler, *limits, self.prompts, c.suffix)
            for role, limits in sampling.items()
        }
        return converse(
            roles,
            problems,
            group_size=n,
            max_turns=c.max_turns,
            seed=c.seed,
            address=address,
            rollout=c.rollout,
        )

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Conversation]:
        """Sample conversations; the partner of the trained role has its own sampling options."""
        c, trained = self.config, self.at(step).role
        sampling = {role: (c.partner_temperature, c.partner_max_tokens) for role in self.learners}
        sampling[trained] = (c.temperature, c.max_tokens)
        talks = self.converse(problems, c.group_size, sampling, (TRAINING, step))
        for talk in talks:
            talk.trained = trained
        return talks

    def reward(self, trajectories: Sequence[Conversation], step: int, tally: Tally) -> None:
        """Set outcome, format and length reward of the trained role. LS Eq. 9"""
        c, now = self.config, self.at(step)
        rewards = role_rewards(
            trajectories,
            now.role,
            c.group_size,
            format_coef=c.format_coef,
            length_coef=now.length_coef,
            strict=c.strict_format,
            symmetric=c.symmetric_length,
        )
        for talk, reward, turns in zip(trajectories, rewards, exchanges(trajectories)):
            talk.role_reward, talk.reward = reward, reward.total
            tally.add("format", reward.format)
            tally.add("turns", turns)
            tally.add("round", now.index + 1)

    def advantages(self, trajectories: Sequence[Conversation], step: int, tally: Tally) -> list[Tensor]:
        """One advantage per conversation, for all tokens of the trained role's turns."""
        role, scalars = self.at(step).role, grpo_advantages(trajectories, self.config)
        return [v.expand(own_tokens(talk, role)) for v, talk in zip(scalars, trajectories)]

    def samples(
        self, trajectories: Sequence[Conversation], advantages: Sequence[Tensor], step: int
    ) -> list[Sample]:
        return turn_samples(trajectories, advantages, self.at(step).role)  # LS Eq. 7, 8

    def attempt(
        self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...]
    ) -> list[Conversation]:
        sampling = {role: (temperature, self.config.max_tokens) for role in self.learners}
        return self.converse(problems, n, sampling, address)

    def summarise(self, trajectories: Sequence[Conversation]) -> dict:
        return summarise(trajectories) | summary(trajectories)

    def name(self, step: int) -> str:
        """Name of an evaluation: at the end of a round the pair, as in the paper's tables, else the step."""
        rounds, inside = divmod(step, self.config.steps_per_round)
        return f"step_{step}" if inside else pair_name(self.config.rounds, rounds)
