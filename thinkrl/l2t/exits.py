"""S-GRPO (arXiv 2505.07686): train on answers forced at early exits of a chain of thought.

`train.py l2t --method s-grpo` runs it.

A group is one chain of thought and its G - 1 exits: token counts n_1 <= … <= n_{G-1}, drawn uniformly from
its thinking, at which it is cut off and an answer is forced and sampled.

    r_i = 2^(1 - N_i) if answer i is right, else 0        N_i: right answers up to i; i = G is the chain

    A_i = r_i - mean r                                    no division by the group's std

Every completion of the group, prefix and answer, has the advantage A_i. The prefixes are shared, so a token
of the chain is trained on once, with the sum of the A_i of all completions that contain it; forced tokens are
not trained on. This equals the gradient of the group's summed log-probs; means over tokens count a shared
token once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkrl.grpo import group_advantages
from thinkrl.l2t.episodes import segment
from thinkrl.l2t.gain import forcing
from thinkrl.presets import OnePolicy
from thinkrl.rollout import PROBE, TRAINING, graded
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Completion
from thinkrl.types import Problem, Trajectory, Turn


@dataclass(kw_only=True)
class Exit(Trajectory):
    """Answer forced after `cut` tokens of the chain; or the chain itself, with `cut` its whole length."""

    cut: int

    def record(self, advantage: Tensor) -> dict:
        """One line of samples.jsonl: that of a trajectory, and `cut`."""
        return super().record(advantage) | {"cut": self.cut}


def exit_rewards(correct: Tensor) -> Tensor:
    """Rewards 2^(1 - N_i) for right answers, else 0, [P, G] fp64.

    correct [P, G] in {0, 1}: the exits in order, then the chain.
    """
    c = correct.double()
    return c * 2 ** (1 - c.cumsum(1))  # S-GRPO §3.2


def chain_advantages(advantage: Tensor, cuts: Sequence[int], tokens: int) -> Tensor:
    """Advantage of each of the chain's tokens, [tokens]: the sum over the completions that contain it.

    advantage [G]; cuts: the number of the chain's tokens in each of the G - 1 exits; the last completion is
    the chain.
    """
    out = advantage[-1].repeat(tokens)
    for own, cut in zip(advantage, cuts):
        out[:cut] += own
    return out


def draw_exits(first: int, last: int, count: int, key: str) -> list[int]:
    """Draw `count` integers from `first` to `last`, uniformly with repetition, in ascending order."""
    draw = random.Random(f"exits/{key}")
    return sorted(draw.randint(first, last) for _ in range(count))


class SGrpo(OnePolicy[Exit]):
    """GRPO with one chain of thought per problem, whose early exits are its group."""

    def _forced(self, problem: Problem) -> list[int]:
        return self.tokenizer.encode(forcing(problem, self.config.probe_prefix, self.config.probe_suffix)[0])

    def require_room(self, problems: list[Problem], training: bool, more: int = 0) -> None:
        """Raise UserError also if, in training, a forced answer does not fit after the longest chain."""
        if training:
            forced = max(len(self._forced(problem)) for problem in problems)
            more = forced + self.config.max_tokens
        super().require_room(problems, training, more)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Exit]:
        c, exits = self.config, self.config.group_size - 1
        chains = self.attempt(problems, 1, c.temperature, (TRAINING, step))
        cuts, prompts = [], []
        for t in chains:
            prompt, tokens = t.turns[0].prompt, t.turns[0].completion
            places = segment(tokens, self.tokenizer, c.episodes).prefixes
            cuts.append(draw_exits(places[0], places[-1], exits, f"{c.seed}/{step}/{t.problem.id}"))
            prompts += [prompt + tokens[:n] + self._forced(t.problem) for n in cuts[-1]]
        answers = self.learners["policy"].sampler.generate(
            prompts,
            max_tokens=c.max_tokens,
            temperature=c.temperature,
            stop_ids=self.tokenizer.stop_ids,
            seed=c.seed,
            keys=[(PROBE, step, t.problem.id, i) for t in chains for i in range(exits)],
        )
        written = iter(zip(prompts, answers, strict=True))
        group: list[Exit] = []
        for chain, places in zip(chains, cuts):
            for i, cut in enumerate(places):
                prompt, [answer] = next(written)
                group.append(self._exit(chain, i, cut, prompt, answer))
            chain.sample = exits
            group.append(Exit(**vars(chain), cut=chain.tokens))
        return group

    def _exit(self, chain: Trajectory, i: int, cut: int, prompt: list[int], answer: Completion) -> Exit:
        written = prompt[len(chain.turns[0].prompt) :] + answer.tokens
        turn = Turn("policy", prompt, answer.tokens, answer.logprobs, answer.finish_reason)
        return Exit(**vars(graded(chain.problem, i, turn, self.tokenizer.decode(written))), cut=cut)

    def reward(self, trajectories: Sequence[Exit], step: int, tally: Tally) -> None:
        correct = torch.tensor([t.outcome_reward for t in trajectories]).view(-1, self.config.group_size)
        for t, reward in zip(trajectories, exit_rewards(correct).flatten().tolist(), strict=True):
            t.reward = reward

    def advantages(self, trajectories: Sequence[Exit], step: int, tally: Tally) -> list[Tensor]:
        size, out = self.config.group_size, []
        rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64).view(-1, size)
        for i, own in enumerate(group_advantages(rewards, std="none").float()):
            *exits, chain = trajectories[i * size : (i + 1) * size]
            out += [a.expand(t.tokens) for a, t in zip(own, exits)]
            out.append(chain_advantages(own, [t.cut for t in exits], chain.tokens))
        return out
