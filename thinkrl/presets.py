"""Presets: the protocol of a method that train.py trains, and the simplest one, Grpo.

To write your own, write a class with the members of `Preset` and name it in `train.method`. Members with a
body here are inherited, and a method whose attempts are single completions can inherit `OnePolicy`.
tests/example_method.py is a complete method. Packing, the loss, the optimizer step, logging and checkpoints
are the same for all methods.

    Grpo                          one completion per attempt, rewarded by its outcome; one advantage for all
                                  its tokens
    l2t.preset.L2T                the same completions with a reward per episode
    longshort.preset.LongShort    two policies write a conversation in turns; each round trains one of them
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thinkrl import length
from thinkrl.config import LENGTH_VALUES, Config, target_range
from thinkrl.distributed import World, gather, global_sum
from thinkrl.evaluate import summarise
from thinkrl.grpo import gdpo_advantages, group_advantages
from thinkrl.learner import Actor, learning_rate, model_path, new_actor
from thinkrl.rewards import each, load_rewards, require_columns, weighted_sum
from thinkrl.rollout import TRAINING, prompt_ids, require_room, rollout, sampling_file
from thinkrl.run.metrics import Tally
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Sample, Trajectory

T = TypeVar("T", bound=Trajectory)  # the method's type of trajectory


class Preset(Protocol[T]):
    """Method, called by train.py in the order below; the middle part is `train.train_step`.

    Its state between steps is in its learners and in `state_dict`, so that a resumed run is the same run. A
    `tally` takes numbers for metrics.jsonl; metrics.DEFINITIONS defines their names.
    """

    config: Config
    learners: dict[str, Actor]
    """Policies by name, which are trained, saved (as hf/ for "policy", else hf_NAME/) and restored."""

    # once, before the run folder exists

    def __init__(self, config: Config, world: World): ...

    def require_room(self, problems: list[Problem], training: bool) -> None:
        """Raise UserError if a prompt and the tokens sampled after it exceed the model's context."""
        ...

    # every step, in this order

    def begin_step(self, step: int) -> Actor:
        """Prepare step `step`, from 0, and return the learner that it trains. Called once a step."""
        ...

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> Sequence[T]:
        """Sample `group_size` graded attempts at each problem, groups contiguous, with `reward` their
        outcome.

        Random numbers have keys that begin (TRAINING, step), so they do not depend on the number of ranks.
        """
        ...

    def reward(self, trajectories: Sequence[T], step: int, tally: Tally) -> None:
        """Set each trajectory's `reward` and other fields that `advantages` reads. By default the outcome."""

    def advantages(self, trajectories: Sequence[T], step: int, tally: Tally) -> list[Tensor]:
        """Advantages of each trajectory's trained tokens, in order: a list of [tokens] fp32."""
        ...

    def samples(self, trajectories: Sequence[T], advantages: Sequence[Tensor], step: int) -> list[Sample]:
        """Samples (prompt, completion) for the loss; by default all turns."""
        return turn_samples(trajectories, advantages)

    def learning_rate(self, step: int) -> float:
        """Learning rate of this step."""
        return learning_rate(step, self.config.steps, self.config)

    # evaluation on held-out problems

    def attempt(
        self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...]
    ) -> Sequence[Trajectory]:
        """Sample n graded attempts at each problem; keys of random numbers begin with `address`."""
        ...

    def summarise(self, trajectories: Sequence[T]) -> dict:
        """Compute the entries of summary.json from held-out attempts."""
        return summarise(trajectories)

    def name(self, step: int) -> str:
        """Key in summary.json of an evaluation after `step` steps."""
        return f"step_{step}"

    # checkpoints

    def state_dict(self) -> dict:
        """State for a resume besides the learners: nested dicts, lists, tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore the result of `state_dict`; {} at the start of a new run."""


def turn_samples(
    trajectories: Sequence[Trajectory], advantages: Sequence[Tensor], role: str = ""
) -> list[Sample]:
    """Make a sample (prompt, completion) of every turn, or of every turn of one role.

    advantages: per trajectory, one value per token of these turns in order, [tokens] fp32.
    """
    samples = []
    for t, advantage in zip(trajectories, advantages, strict=True):
        own = [(i, turn) for i, turn in enumerate(t.turns) if role in ("", turn.role)]
        parts = advantage.split([len(turn.completion) for _, turn in own]) if own else []
        for (i, turn), part in zip(own, parts):
            logprobs, place = torch.tensor(turn.logprobs), f"{t.problem.id}/{t.sample}/{i}"
            samples.append(Sample(turn.prompt, turn.completion, part, logprobs, place))
    return samples


class OnePolicy(Preset[T]):
    """Common part of Grpo and L2T: one policy, whose attempts are single completions."""

    def __init__(self, config: Config, world: World):
        self.config = config
        self.rewards = load_rewards(config.reward, config.reward_weights)
        path = model_path(config.model)
        self.tokenizer = Tokenizer(path)
        files = sampling_file(config)
        self.learners = {"policy": new_actor(path, config, world, self.tokenizer, files=files)}

    def require_room(self, problems: list[Problem], training: bool, more: int = 0) -> None:
        """Raise UserError if a problem, its completion and `more` tokens exceed the model's context."""
        c, model = self.config, self.learners["policy"].policy
        prompts = [prompt_ids(problem, self.tokenizer, c.system, c.suffix) for problem in problems]
        require_room(problems, prompts, model.config.max_positions, c.max_tokens + more)
        if training:
            require_columns(self.rewards, problems)

    def base_rewards(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Reward of each trajectory by --reward, by default the outcome; NaN without a reward.

        Sets `rewards`, the value of each of several functions.
        """
        c = self.config
        for t, values in zip(
            trajectories, each(self.rewards, trajectories, self.tokenizer, c.system, c.suffix), strict=True
        ):
            t.rewards = values
        return [weighted_sum(self.rewards, t.rewards) for t in trajectories]

    def begin_step(self, step: int) -> Actor:
        return self.learners["policy"]

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


class Grpo(OnePolicy[Trajectory]):
    """Baseline: the reward is the outcome, or that of --length; a completion's tokens share one advantage."""

    def require_room(self, problems: list[Problem], training: bool, more: int = 0) -> None:
        super().require_room([with_target(problem, self.config) for problem in problems], training, more)

    def attempt(
        self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...], **hooks
    ) -> list[Trajectory]:
        asked = [with_target(problem, self.config) for problem in problems]
        return super().attempt(asked, n, temperature, address, **hooks)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> Sequence[Trajectory]:
        return self.attempt(problems, self.config.group_size, self.config.temperature, (TRAINING, step))

    def reward(self, trajectories: Sequence[Trajectory], step: int, tally: Tally) -> None:
        """Set the reward of --reward, or of --length from outcome and tokens."""
        if self.config.length in ("", "gfpo"):  # gfpo's function returns advantages
            rewards = self.base_rewards(trajectories)
        else:
            rewards = self._by_length(trajectories).flatten().tolist()
        for t, reward in zip(trajectories, rewards, strict=True):
            t.reward = reward

    def advantages(self, trajectories: Sequence[Trajectory], step: int, tally: Tally) -> list[Tensor]:
        if self.config.length == "gfpo":
            scalars = self._by_length(trajectories).flatten().float()
        elif self.config.advantage_std == "each":
            scalars = self._each_reward(trajectories)
        else:
            scalars = grpo_advantages(trajectories, self.config)
        return [value.expand(t.tokens) for value, t in zip(scalars, trajectories)]

    def _each_reward(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Advantages of GDPO, one fp32 number per trajectory from several rewards. Collective."""
        columns = torch.tensor([t.rewards for t in trajectories], dtype=torch.float64).unbind(1)
        groups = [column.view(-1, self.config.group_size) for column in columns]
        weights = [reward.weight for reward in self.rewards]
        return gdpo_advantages(groups, weights, reduce=global_sum).flatten().float()

    def _by_length(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Apply the function of thinkrl/length.py that --length names to this rank's groups: [P, G] fp64.
        Collective.
        """
        c = self.config
        options = {
            key.removeprefix("length_"): c[key]
            for key in LENGTH_VALUES[c.length]
            if key.startswith("length_")
        }
        correct, tokens = (
            torch.tensor(values, dtype=torch.float64).view(-1, c.group_size)
            for values in zip(*((t.outcome_reward, t.tokens) for t in trajectories))
        )
        if c.length_target:
            del options["prompt"]
            targets = [target_tokens(t.problem, c) for t in trajectories[:: c.group_size]]
            options["target"] = torch.tensor(targets, dtype=torch.float64)[:, None]
        if c.length == "laser_d":  # the step's groups of all ranks replace the paper's monitored set
            everywhere = gather((correct, tokens))
            sixteenths = torch.arange(1, 17) * c.max_tokens / 16
            all_correct, all_tokens = (torch.cat(parts) for parts in zip(*everywhere))
            limits = length.laser_d_limits(all_correct, all_tokens, sixteenths)
            before = sum(len(part) for part, _ in everywhere[: dist.get_rank()])
            return length.laser(correct, tokens, limits[before : before + len(correct)], **options)
        return getattr(length, c.length)(correct, tokens, **options)


def with_target(problem: Problem, config: Config) -> Problem:
    """Append the length request of L1 to the question; other methods return the problem unchanged."""
    if not config.length_target:
        return problem
    target = config.length_prompt.replace("{target}", str(target_tokens(problem, config)))
    return dataclasses.replace(problem, question=problem.question + target)


def target_tokens(problem: Problem, config: Config) -> int:
    """Length that L1's prompt asks for, drawn once per problem, as in its data preparation."""
    return random.Random(f"target/{config.seed}/{problem.id}").randint(*target_range(config.length_target))


def grpo_advantages(trajectories: Sequence[Trajectory], config: Config) -> Tensor:
    """Advantage of each trajectory in its group, fp32. Collective with --advantage_std batch."""
    reward = torch.tensor([t.reward for t in trajectories], dtype=torch.float64).view(-1, config.group_size)
    return group_advantages(reward, config.advantage_std, reduce=global_sum).flatten().float()
