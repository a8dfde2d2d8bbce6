"""The preset L2T: Grpo's completions, rewarded per episode."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from thinkrl.config import Config
from thinkrl.distributed import World, global_max, global_sum
from thinkrl.grading import grade
from thinkrl.l2t.compression import Proxy, normalise_compression
from thinkrl.l2t.credit import (
    episode_rewards,
    process_reward,
    released_reward,
    returns_to_go,
    token_advantages,
    token_rewards,
)
from thinkrl.l2t.episodes import Episodes, segment
from thinkrl.l2t.gain import Gain, Probe, forcing, make_probe, room_behind
from thinkrl.l2t.prm import load_prm, require_context, require_same_ids, retokenize, score_completions
from thinkrl.learner import compute_dtype, model_path
from thinkrl.metrics import Stopwatch, Tally, correlation
from thinkrl.presets import Grpo
from thinkrl.rollout import PROBE, TRAINING, prompt_ids
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory


class L2T(Grpo):
    """Grpo's completions, paid per episode: information gained minus parameters moved. All of it is in
    thinkrl/l2t.py.
    """

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        self.cut = partial(segment, tokenizer=self.tokenizer, how=config.episodes)
        self.cut([])  # a tokenizer that cannot write the tags is refused now
        self.prm = None
        if config.gain == "prm":
            path = model_path(config.prm, "--prm")
            self.prm, self.prm_tokenizer = (
                load_prm(path, compute_dtype(config, world), world.device),
                Tokenizer(path),
            )
            if self.prm.separator is None:
                require_same_ids(self.tokenizer, self.prm_tokenizer)
        self.proxy = None
        if config.compression != "none":
            self.proxy = Proxy(
                self.learners["policy"].sampler.model,
                config.proxy,
                config.rank_share,
                config.fisher_decay,
                config.refresh_every,
                drift=config.compression == "drift",
                seed=config.seed,
            )

    def probes(self, problems: list[Problem]) -> list[Probe]:
        """What asks for each problem's answer, if the gain is one that forces it."""
        c = self.config
        return [
            make_probe(self.tokenizer, p.answer, *forcing(p, c.probe_prefix, c.probe_suffix))
            for p in problems
            if c.gain in ("forced", "mc")
        ]

    def require_trainable(self, problems: list[Problem]) -> None:
        """Behind the longest completion there must be room for what the gain puts there; a reward model
        has a context too.
        """
        c = self.config
        self.require_room(problems, more=room_behind(c.gain, self.probes(problems), c.max_tokens))
        if self.prm is not None:
            prompts = [prompt_ids(problem, self.tokenizer, c.system, c.suffix) for problem in problems]
            require_context(self.prm, self.prm_tokenizer, problems, prompts, c.max_tokens)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        c, sampler = self.config, self.learners["policy"].sampler
        gain = Gain(
            sampler,
            self.probes(problems),
            self.cut,
            c.gain if c.gain in ("mc", "continue") else "forced",
            samples=c.gain_samples,
            max_tokens=c.max_tokens,
            seed=c.seed,
            keys=[(PROBE, step, p.id) for p in problems],
            grade=lambda i, text: grade(text, problems[i].answer, problems[i].source),
        )
        probed = c.gain in ("forced", "mc", "continue")
        trajectories = self.attempt(
            problems,
            c.group_size,
            c.temperature,
            (TRAINING, step),
            on_finish=gain.on_finish if probed else None,
            return_hidden=self.proxy is not None and self.proxy.reads_hidden,
        )
        turns, clock = [t.turns[0] for t in trajectories], Stopwatch()
        if probed:
            episodes, J = map(list, zip(*gain.results())) if trajectories else ([], [])
            seconds, forwards = gain.seconds, gain.forwards
        else:
            episodes = [self.cut(turn.completion) for turn in turns]
            J, forwards = self.score_steps(trajectories, episodes)
            seconds = clock.seconds
        tally.add("probe_seconds", seconds)
        tally.add("probe_tokens", forwards, 1 / dist.get_world_size())

        sampler.release_pool()  # its memory belongs to the penalty, and to the backward
        clock = Stopwatch()
        raw = [torch.zeros(len(e), dtype=torch.float64) for e in episodes]
        if self.proxy:
            self.proxy.begin(step)
            raw = self.proxy.penalties(c.compression, turns, episodes, reduce=global_sum)
            tally.add("penalty_tokens", self.proxy.forwards, 1 / dist.get_world_size())
        tally.add("penalty_seconds", clock.seconds)
        penalty = normalise_compression(raw, c.kappa, global_sum)
        for t, e, j, C, C_hat in zip(trajectories, episodes, J, raw, penalty):
            r_prg = (
                released_reward(j, e.prefixes, e.malformed)
                if c.released_sum
                else process_reward(j, C_hat, c.beta)
            )
            t.turns[0].hidden = None
            t.reward = t.outcome_reward - c.malformed_penalty * e.malformed
            t.extra |= {
                "ends": (e.ends + 1).tolist(),
                "episode_ids": e.ids.tolist(),
                "malformed": e.malformed,
                "J": j.tolist(),
                "fitting_gain": j.diff().tolist(),
                "compression": C.tolist(),
                "penalty": C_hat.tolist(),
                "process_reward": r_prg.tolist(),
            }
            tally.add_all(
                {
                    "episodes": (len(e), 1),
                    "malformed": (e.malformed, 1),
                    "fitting_gain": (j[-1] - j[0], 1),
                    "compression": (C.sum(), 1),
                    "penalty": (C_hat.sum(), 1),
                    "process_reward": (r_prg.sum(), 1),
                }
            )
        lengths = torch.cat([e.lengths for e in episodes]) if episodes else torch.zeros(0)
        tally.add(
            "penalty_length_correlation", correlation(torch.cat([torch.zeros(0), *penalty]), lengths), 1
        )
        return trajectories

    def score_steps(
        self, trajectories: list[Trajectory], episodes: list[Episodes]
    ) -> tuple[list[Tensor], int]:
        """J by the step reward model, in its own vocabulary if it brings one, and the tokens it read; zeros for --gain none.

        Where it could read no further, J stays as it was.
        """
        if self.prm is None:
            return [torch.zeros(len(e) + 1, dtype=torch.float64) for e in episodes], 0
        told, before = [], self.prm.forwards
        for t, e in zip(trajectories, episodes):
            prompt, completion = t.turns[0].prompt, t.turns[0].completion
            if self.prm.separator is None:
                told.append((prompt, completion, e.prefixes))
            else:
                steps = [self.tokenizer.decode(completion[a:b]) for a, b in pairwise(e.prefixes)]
                told.append(
                    retokenize(t.problem.question, steps, self.prm_tokenizer, self.prm.config.max_positions)
                )
        scores = score_completions(self.prm, *zip(*told)) if told else []
        J = [torch.cat([s, s[-1:].expand(len(e) + 1 - len(s))]).double() for s, e in zip(scores, episodes)]
        return J, self.prm.forwards - before

    def advantages(self, trajectories: list[Trajectory], step: int, tally: Tally) -> list[Tensor]:
        c, out = self.config, []
        for i in range(0, len(trajectories), c.group_size):
            group = trajectories[i : i + c.group_size]
            r_prg = [torch.tensor(t.extra["process_reward"], dtype=torch.float64) for t in group]
            ids = [torch.tensor(t.extra["episode_ids"]) for t in group]
            rewards = [
                token_rewards(episode_rewards(t.reward, r, c.alpha), i, torch.tensor(t.turns[0].logprobs))
                for t, r, i in zip(group, r_prg, ids)
            ]
            out += token_advantages(
                rewards,
                c.keep,
                c.credit,
                c.statistic,
                max_ratio=c.max_ratio,
                std=c.advantage_std,
                returns=torch.tensor(
                    [t.reward + c.alpha * float(r.sum()) for t, r in zip(group, r_prg)], dtype=torch.float64
                ),
                to_go=[returns_to_go(t.reward, r, c.alpha) for t, r in zip(group, r_prg)],
                J=[torch.tensor(t.extra["J"], dtype=torch.float64) for t in group],
                episode_ids=ids,
            )
        tally.add("advantage_max", global_max(max((float(a.abs().max()) for a in out), default=0.0)))
        return [a.float() for a in out]

    def state_dict(self) -> dict:
        return {"proxy": self.proxy.state_dict()} if self.proxy else {}

    def load_state_dict(self, state: dict) -> None:
        if self.proxy and state:
            self.proxy.load_state_dict(state["proxy"])
