"""The preset L2T: GRPO's completions with a reward per episode.                                 L2T Alg. 1

rollout       completions with their episodes, and J_0, …, J_K by short probes on their KV pages
reward        compression C_k, then the process reward of every episode         Eq. 3
advantages    episode rewards -> token rewards -> one advantage per token       Alg. 1 l. 9-15
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from thinkrl.config import Config
from thinkrl.distributed import World, global_sum
from thinkrl.grading import grade
from thinkrl.grpo import batch_std
from thinkrl.l2t.compression import Proxy, normalise_compression
from thinkrl.l2t.credit import (
    batch_scaled,
    episode_rewards,
    group_statistic,
    local_advantages,
    process_reward,
    released_reward,
    returns_to_go,
    step_advantages,
    to_go_advantages,
    token_advantages,
    token_rewards,
)
from thinkrl.l2t.episodes import Episodes, segment
from thinkrl.l2t.gain import Gain, Probe, forcing, make_probe, room_behind
from thinkrl.l2t.prm import (
    StepRewardModel,
    load_prm,
    require_context,
    require_same_ids,
    retokenize,
    score_completions,
)
from thinkrl.learner import compute_dtype, model_path
from thinkrl.presets import OnePolicy
from thinkrl.rollout import PROBE, TRAINING, prompt_ids
from thinkrl.run.metrics import Stopwatch, Tally, correlation
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory

DECORATIVE = 0.01  # an episode that changes J by less counts as decorative
PROBED = ("forced", "mc", "continue")  # gains that are measured by probes on the sampler's pages


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(kw_only=True)
class EpisodeTrajectory(Trajectory):
    """One completion with its K episodes and their rewards. Tensors are fp64, on the CPU.

    `L2T.rollout` sets episodes and J, `L2T.reward` the rest.
    """

    episodes: Episodes
    J: Tensor  # [K+1], predicted correctness before the first episode and after each
    compression: Tensor = field(default_factory=_nothing)  # [K], raw C
    penalty: Tensor = field(default_factory=_nothing)  # [K], normalised C, which beta multiplies
    process_reward: Tensor = field(default_factory=_nothing)  # [K]

    def record(self, advantage: Tensor) -> dict:
        """Make one line of samples.jsonl: a trajectory's, and

        ends                      token count of the completion up to the end of each episode, K numbers
        episode_ids               the episode of each completion token, T numbers
        malformed                 whether the tags are not exactly 1, …, K, each closed
        J                         K+1 numbers
        fitting_gain, compression, penalty, process_reward    K numbers each
        """
        return super().record(advantage) | {
            "ends": (self.episodes.ends + 1).tolist(),
            "episode_ids": self.episodes.ids.tolist(),
            "malformed": self.episodes.malformed,
            "J": self.J.tolist(),
            "fitting_gain": self.J.diff().tolist(),
            "compression": self.compression.tolist(),
            "penalty": self.penalty.tolist(),
            "process_reward": self.process_reward.tolist(),
        }


class L2T(OnePolicy[EpisodeTrajectory]):
    """GRPO's completions with a reward per episode: fitting gain minus compression penalty."""

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        self.segment = partial(segment, tokenizer=self.tokenizer, how=config.episodes)
        self.segment([])  # a tokenizer that cannot encode the tags is refused now
        self.prm = self._load_prm(world) if config.gain == "prm" else None
        self.proxy = None
        if config.compression not in ("flat", "none"):
            self.proxy = Proxy(
                self.learners["policy"].sampler.model,
                config.proxy,
                config.rank_share,
                config.fisher_decay,
                config.refresh_every,
                drift=config.compression == "drift",
                seed=config.seed,
            )

    def _load_prm(self, world: World) -> StepRewardModel:
        path = model_path(self.config.prm, "--prm")
        prm = load_prm(path, compute_dtype(self.config, world), world.device)
        self.prm_tokenizer = Tokenizer(path)
        if prm.separator is None:
            require_same_ids(self.tokenizer, self.prm_tokenizer)
        return prm

    def probes(self, problems: list[Problem]) -> list[Probe]:
        """Probes for each problem's answer if --gain is forced or mc, else none."""
        c = self.config
        return [
            make_probe(self.tokenizer, p.answer, *forcing(p, c.probe_prefix, c.probe_suffix))
            for p in problems
            if c.gain in ("forced", "mc")
        ]

    def require_room(self, problems: list[Problem], training: bool, more: int = 0) -> None:
        """Raise UserError also if the gain's probes, or the reward model's context, need more room."""
        c = self.config
        if training:
            more = room_behind(c.gain, self.probes(problems), c.max_tokens)
        super().require_room(problems, training, more)
        if training and self.prm is not None:
            prompts = [prompt_ids(problem, self.tokenizer, c.system, c.suffix) for problem in problems]
            require_context(self.prm, self.prm_tokenizer, problems, prompts, c.max_tokens)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[EpisodeTrajectory]:
        """Sample completions with their episodes and J. Hidden states are kept if the penalty reads them."""
        c, gain = self.config, self._gain(problems, step)
        sampled = self.attempt(
            problems,
            c.group_size,
            c.temperature,
            (TRAINING, step),
            on_finish=gain.on_finish if c.gain in PROBED else None,
            return_hidden=self.proxy is not None and self.proxy.reads_hidden,
        )
        if c.gain in PROBED:
            measured = gain.results()
            seconds, forwards = gain.seconds, gain.forwards
        else:
            clock = Stopwatch()
            episodes = [self.segment(t.turns[0].completion) for t in sampled]
            J, forwards = self._score(sampled, episodes)
            measured, seconds = list(zip(episodes, J)), clock.seconds
        tally.add("probe_seconds", seconds)
        tally.add_sum("probe_tokens", forwards)
        return [
            EpisodeTrajectory(**vars(t), episodes=episodes, J=J)
            for t, (episodes, J) in zip(sampled, measured, strict=True)
        ]

    def _gain(self, problems: list[Problem], step: int) -> Gain:
        """Make the object that measures J of this step's completions."""
        c = self.config
        return Gain(
            self.learners["policy"].sampler,
            self.probes(problems),
            self.segment,
            c.gain if c.gain in PROBED else "forced",
            scale=c.gain_scale,
            samples=c.gain_samples,
            max_tokens=c.max_tokens,
            temperature=c.temperature,
            seed=c.seed,
            keys=[(PROBE, step, p.id) for p in problems],
            grade=lambda i, text: grade(text, problems[i].answer, problems[i].source),
        )

    def _score(self, trajectories: list[Trajectory], episodes: list[Episodes]) -> tuple[list[Tensor], int]:
        """J by the step reward model, and the number of tokens it read; zeros for --gain none.

        Episodes are re-tokenized for a model with a vocabulary of its own. Beyond its context J keeps its
        last value.
        """
        if self.prm is None:
            return [torch.zeros(len(e) + 1, dtype=torch.float64) for e in episodes], 0
        rows, before = [], self.prm.forwards
        for t, e in zip(trajectories, episodes):
            prompt, completion = t.turns[0].prompt, t.turns[0].completion
            if self.prm.separator is None:
                rows.append((prompt, completion, e.prefixes))
            else:
                steps = [self.tokenizer.decode(completion[a:b]) for a, b in pairwise(e.prefixes)]
                rows.append(
                    retokenize(t.problem.question, steps, self.prm_tokenizer, self.prm.config.max_positions)
                )
        prompts, completions, prefixes = zip(*rows) if rows else ((), (), ())
        scores = score_completions(self.prm, prompts, completions, prefixes)
        J = [torch.cat([s, s[-1:].expand(len(e) + 1 - len(s))]).double() for s, e in zip(scores, episodes)]
        return J, self.prm.forwards - before

    def reward(self, trajectories: Sequence[EpisodeTrajectory], step: int, tally: Tally) -> None:
        """Set each episode's process reward; the trajectory's own reward is its outcome reward."""
        c = self.config
        compression = self._compression(trajectories, step, tally)
        if c.compression == "flat":
            penalty = compression  # C_k = 1 is not normalised
        else:
            penalty = normalise_compression(compression, c.kappa, global_sum)
        rewards = self.base_rewards(trajectories)
        for t, C, C_hat, reward in zip(trajectories, compression, penalty, rewards, strict=True):
            e, t.compression, t.penalty = t.episodes, C, C_hat
            t.reward = reward - c.malformed_penalty * e.malformed
            if c.released_sum:
                t.process_reward = released_reward(t.J, e.prefixes, e.malformed)
            else:
                t.process_reward = process_reward(t.J, C_hat, c.beta)
        self._tally(trajectories, tally)

    def _compression(
        self, trajectories: Sequence[EpisodeTrajectory], step: int, tally: Tally
    ) -> list[Tensor]:
        """Raw C of each trajectory's episodes, list of [K_i] fp64."""
        clock, episodes = Stopwatch(), [t.episodes for t in trajectories]
        if self.proxy:
            turns = [t.turns[0] for t in trajectories]
            self.proxy.begin(step)
            C = self.proxy.penalties(self.config.compression, turns, episodes, reduce=global_sum)
            tally.add_sum("penalty_tokens", self.proxy.forwards)
            for turn in turns:
                turn.hidden = None  # no longer needed, and the largest part of a trajectory
        else:
            constant = float(self.config.compression == "flat")
            C = [torch.full((len(e),), constant, dtype=torch.float64) for e in episodes]
        tally.add("penalty_seconds", clock.seconds)
        return C

    def _tally(self, trajectories: Sequence[EpisodeTrajectory], tally: Tally) -> None:
        for t in trajectories:
            tally.add("episodes", len(t.episodes))
            tally.add("malformed", t.episodes.malformed)
            tally.add("fitting_gain", t.J[-1] - t.J[0])
            tally.add("decorative", (t.J.diff().abs() < DECORATIVE).sum(), len(t.episodes))
            tally.add("compression", t.compression.sum())
            tally.add("penalty", t.penalty.sum())
            tally.add("process_reward", t.process_reward.sum())
        penalties = [torch.zeros(0), *(t.penalty for t in trajectories)]
        lengths = [torch.zeros(0), *(t.episodes.lengths for t in trajectories)]
        tally.add("penalty_length_correlation", correlation(torch.cat(penalties), torch.cat(lengths)))

    def advantages(self, trajectories: Sequence[EpisodeTrajectory], step: int, tally: Tally) -> list[Tensor]:
        c, size = self.config, self.config.group_size
        rewarded = [t for t in trajectories if not math.isnan(t.reward)]  # --reward may give none
        groups = [
            [t for t in trajectories[i : i + size] if not math.isnan(t.reward)]
            for i in range(0, len(trajectories), size)
        ]
        groups = [group for group in groups if group]
        if c.credit == "local":
            own = [
                local_advantages(t.reward, t.J, c.alpha * c.beta * t.penalty, c.credit_lambda)[t.episodes.ids]
                for t in rewarded
            ]
            out = batch_scaled(own, global_sum)
        elif c.advantage_std == "batch":  # one scale for the step, over all ranks
            out = [a for group in groups for a in self._group_advantages(group, std="none")]
            out = (
                batch_scaled(out, global_sum)
                if c.credit in ("step", "to_go")
                else self._over_batch_std(out, groups)
            )
        else:
            out = [a for group in groups for a in self._group_advantages(group, std=c.advantage_std)]
        values = iter(out)
        out = [torch.zeros(t.tokens) if math.isnan(t.reward) else next(values) for t in trajectories]
        return [a.float() for a in out]

    def _group_advantages(self, group: Sequence[EpisodeTrajectory], std: str) -> list[Tensor]:
        c, ids = self.config, [t.episodes.ids for t in group]
        if c.credit == "to_go":
            to_go = [returns_to_go(t.reward, t.process_reward, c.alpha) for t in group]
            return to_go_advantages(to_go, [t.J for t in group], ids, scaled=c.advantage_std != "batch")
        if c.credit == "step":
            outcomes = torch.tensor([t.reward for t in group], dtype=torch.float64)
            r_prg = [t.process_reward for t in group]
            steps = step_advantages(outcomes, r_prg, c.alpha, c.credit_lambda, std)
            return [own[i] for own, i in zip(steps, ids)]
        return token_advantages(
            self._token_rewards(group),
            c.keep,
            c.credit,
            c.statistic,
            returns=self._returns(group),
            max_ratio=c.max_ratio,
            std=std,
        )

    def _token_rewards(self, group: Sequence[EpisodeTrajectory]) -> list[Tensor]:
        return [
            token_rewards(
                episode_rewards(t.reward, t.process_reward, self.config.alpha),
                t.episodes.ids,
                torch.tensor(t.turns[0].logprobs),
            )
            for t in group
        ]

    def _returns(self, group: Sequence[EpisodeTrajectory]) -> Tensor:
        returns = [t.reward + self.config.alpha * float(t.process_reward.sum()) for t in group]
        return torch.tensor(returns, dtype=torch.float64)

    def _over_batch_std(
        self, advantages: list[Tensor], groups: Sequence[Sequence[EpisodeTrajectory]]
    ) -> list[Tensor]:
        """Divide advantages that have no std by the std of the groups' statistic over the whole step, as GRPO
        does.
        """
        c = self.config
        statistics = [
            group_statistic(self._token_rewards(g), c.statistic, c.keep, self._returns(g), std="none")[0]
            for g in groups
        ]
        scale = batch_std(torch.cat([torch.zeros(0), *statistics]), global_sum) + 1e-6
        return [a / scale for a in advantages]

    def state_dict(self) -> dict:
        return {"proxy": self.proxy.state_dict()} if self.proxy else {}

    def load_state_dict(self, state: dict) -> None:
        if self.proxy and state:
            self.proxy.load_state_dict(state["proxy"])
