"""The preset LongShort: two policies in one conversation, trained in alternating rounds."""

from __future__ import annotations

from torch import Tensor

from thinkrl.config import Config
from thinkrl.distributed import World
from thinkrl.learner import Learner, learning_rate, model_path, new_learner
from thinkrl.longshort import protocol as longshort
from thinkrl.longshort.conversation import shared_prompts
from thinkrl.metrics import Tally
from thinkrl.presets import grpo_advantages
from thinkrl.rollout import TRAINING
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Sample, Trajectory


class LongShort:
    """Two policies write one conversation in turns; each round trains one of them against the other,
    frozen.
    """

    def __init__(self, config: Config, world: World):
        self.config = config
        paths = {
            role: model_path(config[role], f"--{role}") if config[role] else model_path(config.model)
            for role in ("long", "short")
        }
        tokenizers = {role: Tokenizer(path) for role, path in paths.items()}
        longshort.require_same_tokenizer(tokenizers["long"], tokenizers["short"])
        self.prompts = shared_prompts(config.prompts, *paths.values())
        self.learners = {
            role: new_learner(path, config, world, tokenizers[role], samplers=2, prompts=self.prompts)
            for role, path in paths.items()
        }

    def at(self, step: int) -> longshort.Round:
        return longshort.round_at(
            step, self.config.rounds, self.config.steps_per_round, self.config.length_coef
        )

    def learner(self, step: int) -> Learner:
        learner = self.learners[self.at(step).role]
        if self.at(step).step == 0:
            learner.reset_reference()
        return learner

    def name(self, step: int) -> str:
        """The pair at the end of a round; inside it the trained one is on its way."""
        rounds, inside = divmod(step, self.config.steps_per_round)
        return f"step_{step}" if inside else longshort.pair_name(self.config.rounds, rounds)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.at(step).step, self.config.steps_per_round, self.config)

    def require_room(self, problems: list[Problem]) -> None:
        """For the opening turn; a conversation that outgrows the context later on ends."""
        voice = self.learners["long"].sampler
        longshort.require_room(
            problems,
            voice.tokenizer,
            voice.model.config.max_positions,
            self.config.max_tokens,
            self.prompts,
            self.config.suffix,
        )

    require_trainable = require_room

    def converse(
        self, problems: list[Problem], n: int, voices: dict[str, longshort.RoleSampler], address: tuple
    ) -> list[Trajectory]:
        c = self.config
        return longshort.converse(
            voices,
            problems,
            self.prompts,
            group_size=n,
            max_turns=c.max_turns,
            seed=c.seed,
            address=address,
            suffix=c.suffix,
            rollout=c.rollout,
        )

    def attempt(
        self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...]
    ) -> list[Trajectory]:
        voices = {
            role: longshort.RoleSampler(x.sampler, temperature, self.config.max_tokens)
            for role, x in self.learners.items()
        }
        return self.converse(problems, n, voices, address)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        c, now = self.config, self.at(step)
        own, partner = (c.temperature, c.max_tokens), (c.partner_temperature, c.partner_max_tokens)
        voices = {
            role: longshort.RoleSampler(x.sampler, *(own if role == now.role else partner))
            for role, x in self.learners.items()
        }
        talks = self.converse(problems, c.group_size, voices, (TRAINING, step))
        rewards = longshort.role_rewards(
            talks,
            now.role,
            c.group_size,
            format_coef=c.format_coef,
            length_coef=now.length_coef,
            strict=c.strict_format,
            symmetric=c.symmetric_length,
        )
        for talk, reward, turns in zip(talks, rewards, longshort.exchanges(talks)):
            talk.reward = reward.total
            talk.extra |= {
                "format_reward": reward.format,
                "length_reward": reward.length,
                "trained": now.role,
            }
            tally.add_all({"format": (reward.format, 1), "turns": (turns, 1), "round": (now.index + 1, 1)})
        return talks

    def advantages(self, trajectories: list[Trajectory], step: int, tally: Tally) -> list[Tensor]:
        role, scalar = self.at(step).role, grpo_advantages(trajectories, self.config)
        return [value.expand(longshort.own_tokens(talk, role)) for value, talk in zip(scalar, trajectories)]

    def samples(self, trajectories: list[Trajectory], advantages: list[Tensor], step: int) -> list[Sample]:
        return longshort.own_samples(trajectories, self.at(step).role, advantages)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
