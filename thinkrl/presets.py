"""Presets: who writes the trajectory, what it is paid, and how the advantage is filled. Nothing else differs between them.

    Grpo        one completion per attempt, paid for its outcome, one advantage for all its tokens
    L2T         the same completions, paid per episode: information gained minus parameters moved
    LongShort   two policies write a conversation in turns; each round trains one of them

train.py calls, for every step:  learner, rollout, advantages, samples.  A preset holds no state but its learners and what
`state_dict` says.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from thinkrl import longshort
from thinkrl.compression import Proxy, normalise_compression
from thinkrl.config import Config
from thinkrl.conversation import shared_prompts
from thinkrl.distributed import World, global_max, global_sum
from thinkrl.episodes import Episodes, segment
from thinkrl.gain import Gain, Probe, forcing, make_probe, room_behind
from thinkrl.grading import grade
from thinkrl.grpo import group_advantages
from thinkrl.l2t import (
    episode_rewards,
    process_reward,
    released_reward,
    returns_to_go,
    token_advantages,
    token_rewards,
)
from thinkrl.learner import Learner, compute_dtype, learning_rate, model_path, new_learner
from thinkrl.metrics import Stopwatch, Tally, correlation
from thinkrl.prm import load_prm, require_context, require_same_ids, retell, score_completions
from thinkrl.rollout import PROBE, TRAINING, prompt_ids, require_room, rollout
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
                    retell(t.problem.question, steps, self.prm_tokenizer, self.prm.config.max_positions)
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
            learner.refer_to_itself()
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
        self, problems: list[Problem], n: int, voices: dict[str, longshort.Voice], address: tuple
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
            role: longshort.Voice(x.sampler, temperature, self.config.max_tokens)
            for role, x in self.learners.items()
        }
        return self.converse(problems, n, voices, address)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        c, now = self.config, self.at(step)
        own, partner = (c.temperature, c.max_tokens), (c.partner_temperature, c.partner_max_tokens)
        voices = {
            role: longshort.Voice(x.sampler, *(own if role == now.role else partner))
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


def grpo_advantages(trajectories: list[Trajectory], config: Config) -> Tensor:
    """One fp32 number per trajectory, from its group's raw rewards."""
    reward = torch.tensor([t.reward for t in trajectories], dtype=torch.float64).view(-1, config.group_size)
    return group_advantages(reward, config.advantage_std).flatten().float()
