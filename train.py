"""Train a policy to reason efficiently:  torchrun --nproc_per_node=8 train.py [PRESET] [--key value …]

One step of reinforcement learning, whatever the preset (`train`, below):

    problems -> rollout -> reward -> advantage -> pack -> loss -> optimizer step -> sync the sampler

A preset decides who writes the trajectory and how the advantage is filled. Below `pack` nothing knows which one is running.
"""

from thinkrl.config import command_line

if __name__ == "__main__":  # before torch is imported: --help and misspelt options answer at once
    CONFIG = command_line("train.py")

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.logprob import linear_logprob
from thinkrl import UserError, longshort, require_own_kernels
from thinkrl.config import Config, as_dict, excuse
from thinkrl.conversation import load_prompts
from thinkrl.distributed import World, gather, global_max, global_sum, start, stop
from thinkrl.episodes import Episodes, segment
from thinkrl.evaluate import summarise, summary_table
from thinkrl.grading import grade
from thinkrl.grpo import group_advantages, importance_weight, loss_count, policy_loss
from thinkrl.l2t import (
    Gain,
    Probe,
    Proxy,
    episode_rewards,
    make_probe,
    normalise_compression,
    process_reward,
    released_reward,
    returns_to_go,
    token_advantages,
    token_rewards,
)
from thinkrl.learner import Learner, compute_dtype, learning_rate, model_path, new_learner, restore, save
from thinkrl.metrics import DEFINITIONS, Log, Stopwatch, Tally, correlation
from thinkrl.model import Transformer
from thinkrl.prm import load_prm, score_completions
from thinkrl.problems import Stream, held_out_problems, load_problems
from thinkrl.report import write_report
from thinkrl.rollout import EVALUATION, PROBE, TRAINING, require_room, rollout
from thinkrl.runs import Run, open_run
from thinkrl.sft import load_rows, nll_loss
from thinkrl.sft import samples as sft_samples
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Pack, Problem, Sample, Trajectory, Turn, empty_pack, pack


class Diverged(RuntimeError):
    """A loss or a gradient is not finite."""


def train(config: Config, world: World) -> None:
    """Reinforcement learning: grpo, l2t, longshort."""
    require_a_problem_each(config, world)
    stream = Stream(load_problems(config.data, config.source), config.seed)
    preset = {"grpo": Grpo, "l2t": L2T, "longshort": LongShort}[config.preset](config, world)
    preset.require_room(stream.take(0, config.problems_per_step) if callable(stream.rows) else stream.rows)
    preset.require_room(held_out_problems(config.eval_data, config.data, config.source))
    run = open_run(config, world)
    first, state = restore(run.folder, preset.learners)
    preset.load_state_dict(state)
    evaluate(preset, run, "before", config, world, first)
    log = Log(run.folder, world.main, first, config.steps, config.wandb, config.tensorboard, as_dict(config))

    for step in range(first, config.steps):
        clock, tally = Stopwatch(), Tally()
        learner, lr = preset.learner(step), preset.learning_rate(step)
        problems = stream.take(step, config.problems_per_step, world.rank, world.size)
        trajectories = preset.rollout(problems, step, tally)  # graded; masks and log-probs are born here
        tally.add("rollout_seconds", clock.seconds)
        advantages = preset.advantages(trajectories, step, tally)  # per trajectory, one value per token of its own turns
        samples = preset.samples(trajectories, advantages, step)
        packs = level(pack(samples, config.micro_batch_tokens), world)
        learner.sampler.release_pool()  # its memory belongs to the backward now
        loss, grad_norm = update(learner, packs, lr, config, world, tally)
        learner.sampler.load_weights(learner.policy)

        count(tally, trajectories, config.group_size)
        log.step(row(step, tally, clock, loss=loss, grad_norm=grad_norm, lr=lr))
        shown = config.log_groups * config.group_size
        log.samples(step + 1, [describe(t, a) for t, a in zip(trajectories[:shown], advantages)])
        if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
            save(run.folder, step + 1, preset.learners, preset.state_dict(), preset.tokenizer, config)
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            evaluate(preset, run, preset.name(step + 1), config, world, step + 1)

    log.close()
    evaluate(preset, run, "after", config, world, config.steps)
    if world.main:
        print(summary_table(run.summary), f"\nreport: {write_report(run.folder)}\nrun: {run.folder}")


class Grpo:
    """The baseline: one completion per attempt, its graded outcome is the reward, one advantage for all its tokens."""

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
        c, model = self.config, self.learners["policy"].policy
        require_room(problems, self.tokenizer, model.config.max_positions, c.max_tokens + more, c.system, c.suffix)

    def attempt(self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...], **hooks) -> list[Trajectory]:
        c = self.config
        return rollout(self.learners["policy"].sampler, self.tokenizer, problems, group_size=n, max_tokens=c.max_tokens,
                       temperature=temperature, seed=c.seed, address=address, system=c.system, suffix=c.suffix, **hooks)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        trajectories = self.attempt(problems, self.config.group_size, self.config.temperature, (TRAINING, step))
        for t in trajectories:
            t.reward = t.outcome_reward * (1 - self.config.length_penalty * t.tokens)
            if self.config.episode_price:
                episodes = segment(t.turns[0].completion, self.tokenizer, self.config.episodes)
                t.reward -= self.config.episode_price * len(episodes)
        return trajectories

    def advantages(self, trajectories: list[Trajectory], step: int, tally: Tally) -> list[Tensor]:
        return [value.expand(t.tokens) for value, t in zip(grpo_advantages(trajectories, self.config), trajectories)]

    def samples(self, trajectories: list[Trajectory], advantages: list[Tensor], step: int) -> list[Sample]:
        return [
            Sample(turn.prompt, turn.completion, advantage, torch.tensor(turn.logprobs), f"{t.problem.id}/{t.sample}")
            for t, advantage in zip(trajectories, advantages) for turn in t.turns
        ]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class L2T(Grpo):
    """Grpo's completions, paid per episode: information gained minus parameters moved. All of it is in thinkrl/l2t.py."""

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        self.cut = partial(segment, tokenizer=self.tokenizer, how=config.episodes)
        self.cut([])  # a tokenizer that cannot write the tags is refused now
        self.prm = load_prm(model_path(config.prm), compute_dtype(config, world), world.device) if config.gain == "prm" else None
        self.proxy = None
        if config.compression != "none":
            self.proxy = Proxy(self.learners["policy"].sampler.model, config.proxy, config.rank_share, config.fisher_decay,
                               config.refresh_every, drift=config.compression == "drift", seed=config.seed)

    def probe(self, problem: Problem) -> Probe:
        return make_probe(self.tokenizer, problem.answer, self.config.probe_prefix, self.config.probe_suffix)

    def require_room(self, problems: list[Problem]) -> None:
        probes = [self.probe(p) for p in problems]
        super().require_room(problems, more=max((len(p.forced) + len(p.gold) for p in probes), default=0))

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        c, sampler = self.config, self.learners["policy"].sampler
        forwards = sampler.forwards.probe
        gain = Gain(sampler, [self.probe(p) for p in problems], self.cut, c.gain if c.gain in ("mc", "continue") else "forced",
                    samples=c.gain_samples, max_tokens=c.max_tokens, seed=c.seed, keys=[(PROBE, step, p.id) for p in problems],
                    grade=lambda i, text: grade(text, problems[i].answer, problems[i].source))
        probed = c.gain in ("forced", "mc", "continue")
        trajectories = self.attempt(problems, c.group_size, c.temperature, (TRAINING, step),
                                    on_finish=gain.on_finish if probed else None, return_hidden=self.proxy is not None)
        turns = [t.turns[0] for t in trajectories]
        if probed:
            episodes, J = map(list, zip(*gain.results())) if trajectories else ([], [])
        else:
            episodes = [self.cut(turn.completion) for turn in turns]
            J = self.score_steps(turns, episodes)

        clock = Stopwatch()
        raw = [torch.zeros(len(e), dtype=torch.float64) for e in episodes]
        if self.proxy:
            self.proxy.begin(step)
            raw = self.proxy.penalties(c.compression, turns, episodes, reduce=global_sum)
        tally.add("penalty_seconds", clock.seconds)
        penalty = normalise_compression(raw, c.kappa, global_sum)
        for t, e, j, C, C_hat in zip(trajectories, episodes, J, raw, penalty):
            r_prg = released_reward(j, e.lengths, e.malformed) if c.released_sum else process_reward(j, C_hat, c.beta)
            t.turns[0].hidden = None
            t.reward = t.outcome_reward - c.malformed_penalty * e.malformed
            t.extra |= {"ends": (e.ends + 1).tolist(), "J": j.tolist(), "compression": C.tolist(), "penalty": C_hat.tolist(),
                        "process_reward": r_prg.tolist(), "malformed": e.malformed}
            t.extra["episode_ids"] = e.ids.tolist()
            tally.add_all({"episodes": (len(e), 1), "malformed": (e.malformed, 1), "fitting_gain": (j[-1] - j[0], 1),
                           "compression": (C.sum(), 1), "penalty": (C_hat.sum(), 1), "process_reward": (r_prg.sum(), 1)})
        tally.add("probe_tokens", sampler.forwards.probe - forwards, 1 / dist.get_world_size())
        lengths = torch.cat([e.lengths for e in episodes]) if episodes else torch.zeros(0)
        tally.add("penalty_length_correlation", correlation(torch.cat([torch.zeros(0), *penalty]), lengths), 1)
        return trajectories

    def score_steps(self, turns: list[Turn], episodes: list[Episodes]) -> list[Tensor]:
        """J by the step reward model; zeros for --gain none."""
        if self.prm is None:
            return [torch.zeros(len(e) + 1, dtype=torch.float64) for e in episodes]
        prompts, completions = [t.prompt for t in turns], [t.completion for t in turns]
        return [s.double() for s in score_completions(self.prm, prompts, completions, [e.prefixes for e in episodes])]

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
                rewards, c.keep, c.credit, c.statistic, max_ratio=c.max_ratio, std=c.advantage_std,
                returns=torch.tensor([t.reward + c.alpha * float(r.sum()) for t, r in zip(group, r_prg)], dtype=torch.float64),
                to_go=[returns_to_go(t.reward, r, c.alpha) for t, r in zip(group, r_prg)],
                J=[torch.tensor(t.extra["J"], dtype=torch.float64) for t in group], episode_ids=ids,
            )
        tally.add("advantage_max", max((float(a.abs().max()) for a in out), default=0.0))
        return [a.float() for a in out]

    def state_dict(self) -> dict:
        return {"proxy": self.proxy.state_dict()} if self.proxy else {}

    def load_state_dict(self, state: dict) -> None:
        if self.proxy and state:
            self.proxy.load_state_dict(state["proxy"])


class LongShort:
    """Two policies write one conversation in turns; each round trains one of them against the other, frozen."""

    def __init__(self, config: Config, world: World):
        self.config = config
        paths = {role: model_path(config[role] or config.model) for role in ("long", "short")}
        tokenizers = {role: Tokenizer(path) for role, path in paths.items()}
        longshort.require_same_tokenizer(tokenizers["long"], tokenizers["short"])
        self.tokenizer = tokenizers["long"]
        self.prompts = load_prompts(config.prompts, paths["long"])
        self.learners = {role: new_learner(path, config, world, tokenizers[role]) for role, path in paths.items()}

    def at(self, step: int) -> longshort.Round:
        return longshort.round_at(step, self.config.rounds, self.config.steps_per_round, self.config.length_coef)

    def learner(self, step: int) -> Learner:
        learner = self.learners[self.at(step).role]
        if self.at(step).step == 0:
            learner.refer_to_itself()
        return learner

    def name(self, step: int) -> str:
        return longshort.pair_name(self.config.rounds, step // self.config.steps_per_round)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.at(step).step, self.config.steps_per_round, self.config)

    def require_room(self, problems: list[Problem]) -> None:
        """Nothing to check ahead: a conversation that outgrows the context ends, and the sampler names a problem that does."""

    def converse(self, problems: list[Problem], n: int, voices: dict[str, longshort.Voice], address: tuple) -> list[Trajectory]:
        c = self.config
        return longshort.converse(voices, problems, self.prompts, group_size=n, max_turns=c.max_turns, seed=c.seed,
                                  address=address, suffix=c.suffix, rollout=c.rollout)

    def attempt(self, problems: list[Problem], n: int, temperature: float, address: tuple[int, ...]) -> list[Trajectory]:
        voices = {role: longshort.Voice(x.sampler, temperature, self.config.max_tokens) for role, x in self.learners.items()}
        return self.converse(problems, n, voices, address)

    def rollout(self, problems: list[Problem], step: int, tally: Tally) -> list[Trajectory]:
        c, now = self.config, self.at(step)
        own, partner = (c.temperature, c.max_tokens), (c.partner_temperature, c.partner_max_tokens)
        voices = {role: longshort.Voice(x.sampler, *(own if role == now.role else partner)) for role, x in self.learners.items()}
        talks = self.converse(problems, c.group_size, voices, (TRAINING, step))
        rewards = longshort.role_rewards(talks, now.role, c.group_size, format_coef=c.format_coef, length_coef=now.length_coef,
                                         strict=c.strict_format, symmetric=c.symmetric_length)
        for talk, reward, turns in zip(talks, rewards, longshort.exchanges(talks)):
            talk.reward = reward.total
            talk.extra |= {"format_reward": reward.format, "length_reward": reward.length, "trained": now.role}
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


def require_a_problem_each(config: Config, world: World) -> None:
    if world.size > config.problems_per_step:
        raise UserError(f"{world.size} ranks share {config.problems_per_step} problems per step, some would have none: raise "
                        "--problems_per_step, or lower --nproc_per_node")


def level(packs: list[Pack], world: World) -> list[Pack]:
    """As many packs on every rank: each forward of a sharded model is a collective."""
    most = int(global_max(len(packs)))
    return [p.to(world.device) for p in packs + [empty_pack()] * (most - len(packs))]


def update(learner: Learner, packs: list[Pack], lr: float, config: Config, world: World, tally: Tally) -> tuple[float, float]:
    """Train on one rollout: `updates_per_rollout` optimizer steps. Returns the last one's loss and gradient norm.

    The denominator is counted over all packs and ranks before the first backward, so neither the micro-batch size nor
    the number of ranks changes a gradient.
    """
    if config.aggregate == "constant":
        denominator = float(config.problems_per_step * config.group_size * config.max_tokens)
    else:
        denominator = float(global_sum(sum(loss_count(p.mask, p.cu_seqlens, config.aggregate) for p in packs)))
    with torch.no_grad():
        for p in packs:
            if learner.reference is not None:
                p.ref_logprob, _ = token_logprobs(learner.reference, p, config.temperature)
            if config.updates_per_rollout > 1:
                p.old_logprob, _ = token_logprobs(learner.policy, p, config.temperature)

    def objective(p: Pack) -> Tensor:
        logprob, entropy = token_logprobs(learner.policy, p, config.temperature)
        old_logprob = logprob.detach() if p.old_logprob is None else p.old_logprob
        cap = config.importance_cap
        loss, stats = policy_loss(
            logprob, p.old_logprob, p.advantage, p.mask, p.cu_seqlens, ref_logprob=p.ref_logprob,
            weight=importance_weight(old_logprob, p.sampler_logprob, cap) if cap else None,
            clip_low=config.clip_low, clip_high=config.clip_high, kl_coef=config.kl_coef,
            aggregate=config.aggregate, level=config.level, denominator=denominator,
        )
        tally.add_all(stats)
        tally.add("entropy", entropy.sum(), p.mask.sum())
        tally.add("mismatch", (old_logprob - p.sampler_logprob).abs().sum(), p.mask.sum())
        return loss

    for _ in range(config.updates_per_rollout):
        loss, grad_norm = descend(learner, packs, objective, lr, config, world)
    return loss, grad_norm


def descend(learner: Learner, packs: list[Pack], objective: Callable[[Pack], Tensor], lr: float, config: Config,
            world: World) -> tuple[float, float]:
    """One optimizer step on the sum of `objective` over all packs and ranks. Returns that sum and the gradient norm."""
    learner.optimizer.zero_grad()
    losses = []
    for p in packs:
        loss = objective(p)
        (loss * world.size).backward()  # FSDP averages over ranks, ours is a sum over them
        losses.append(loss.detach())
    grad_norm = float(torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), config.max_grad_norm).full_tensor())
    total = float(global_sum(sum(losses)))
    if not math.isfinite(total + grad_norm):
        suspects = gather([i for p, loss in zip(packs, losses) if not loss.isfinite() for i in p.ids])
        raise Diverged(f"loss {total}, gradient norm {grad_norm}; samples (problem/sample) of the rows that are not finite: "
                       f"{sum(suspects, []) or 'none, only the gradient'}; nothing was saved over the last checkpoint")
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    learner.optimizer.step()
    return total, grad_norm


def token_logprobs(policy: Transformer, p: Pack, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each sampled token, and entropy of the distribution it came from: [T], 0 where the mask is 0.

    Only states that predict a sampled token meet the LM head. A row with none keeps one, so that every rank's backward
    reaches the parameters.
    """
    hidden = policy(p.tokens, p.cu_seqlens)
    own = p.mask.nonzero().flatten()
    own = own if len(own) else torch.tensor([1], device=p.mask.device)
    logprob, entropy = linear_logprob(hidden[own - 1], policy.head_weight, p.tokens[own], temperature)
    zeros = torch.zeros(len(p.tokens), device=logprob.device)
    return zeros.index_copy(0, own, logprob), zeros.index_copy(0, own, entropy) * p.mask


def evaluate(preset: Grpo, run: Run, when: str, config: Config, world: World, step: int) -> None:
    """Held-out accuracy and tokens, sampled and greedy, into summary.json under `when`. Collective."""
    problems = held_out_problems(config.eval_data, config.data, config.source)
    problems = problems[:: max(1, len(problems) // config.eval_problems)][: config.eval_problems]  # spread over the levels
    if when in run.summary or not problems:
        return
    mine = [problems[i] for i in world.share(len(problems))]
    sampled = preset.attempt(mine, config.eval_samples, config.temperature, (EVALUATION, step))
    greedy = preset.attempt(mine, 1, 0.0, (EVALUATION, step))
    results = []
    for part in (sampled, greedy):
        everything = sum(gather(part), [])
        results.append(summarise(everything) | (longshort.summary(everything) if config.preset == "longshort" else {}))
    if world.main:
        run.update_summary(**{when: results[0] | {"greedy": results[1]}})


def count(tally: Tally, trajectories: list[Trajectory], group_size: int) -> None:
    for t in trajectories:
        tally.add("reward", t.reward)
        tally.add("accuracy", t.outcome_reward)
        tally.add("tokens", t.tokens)
        tally.add("truncated", t.turns[-1].finish_reason == "length")
    for i in range(0, len(trajectories), group_size):
        tally.add("zero_groups", len({t.reward for t in trajectories[i : i + group_size]}) == 1)


def row(step: int, tally: Tally, clock: Stopwatch, **own: float) -> dict[str, float]:
    """One line of metrics.jsonl. Collective."""
    sums, means = tally.reduce()
    known = {name: value for name, value in means.items() if name in DEFINITIONS}
    seconds = clock.seconds
    return {"step": step + 1, "kl": 0.0, **known, **own, "seconds": seconds, "tokens_per_second": sums["tokens"] / seconds}


def describe(t: Trajectory, advantage: Tensor) -> dict:
    """One line of samples.jsonl: everything needed to see what a token was paid for."""
    return {
        "problem": t.problem.id, "sample": t.sample, "question": t.problem.question, "gold": t.problem.answer,
        "level": t.problem.level, "answer": t.answer, "text": t.text, "outcome_reward": t.outcome_reward, "reward": t.reward,
        "turns": [{"role": turn.role, "prompt": turn.prompt, "completion": turn.completion,
                   "finish_reason": turn.finish_reason} for turn in t.turns],
        "advantage": [round(a, 4) for a in advantage.tolist()], **t.extra,
    }


def supervised(config: Config, world: World) -> None:
    """sft: next-token loss on the completion part of rows. The same packs, the same descent."""
    require_a_problem_each(config, world)
    path = model_path(config.model)
    tokenizer = Tokenizer(path)
    stream = Stream(sft_samples(load_rows(config.data), tokenizer), config.seed)
    learners = {"policy": new_learner(path, config, world, tokenizer, samples=False)}
    run = open_run(config, world)
    first, _ = restore(run.folder, learners)
    log = Log(run.folder, world.main, first, config.steps, config.wandb, config.tensorboard, as_dict(config))

    for step in range(first, config.steps):
        clock, tally, lr = Stopwatch(), Tally(), learning_rate(step, config.steps, config)
        samples = stream.take(step, config.problems_per_step, world.rank, world.size)
        packs = level(pack(samples, config.micro_batch_tokens), world)
        denominator = float(global_sum(sum(p.mask.sum() for p in packs)))

        def objective(p: Pack, denominator: float = denominator) -> Tensor:
            logprob, _ = token_logprobs(learners["policy"].policy, p, temperature=1.0)
            return nll_loss(logprob, p.mask, denominator)

        loss, grad_norm = descend(learners["policy"], packs, objective, lr, config, world)
        for sample in samples:
            tally.add("tokens", len(sample.completion))
        log.step(row(step, tally, clock, loss=loss, grad_norm=grad_norm, lr=lr))
        if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
            save(run.folder, step + 1, learners, {}, tokenizer, config)
    log.close()
    if world.main:
        run.update_summary(after={"loss": loss})
        write_report(run.folder)
        print(f"loss {loss:.4f}\nmodel: {run.folder}/checkpoints/step_{config.steps}/hf\nrun: {run.folder}")


def main(config: Config) -> None:
    try:
        require_own_kernels()
        world = start(config.device)
        {"sft": supervised}.get(config.preset, train)(config, world)
    except UserError as mistake:
        excuse("train.py", mistake)
    except Diverged as reason:
        excuse("train.py", reason, status=1)
    finally:
        stop()


if __name__ == "__main__":
    main(CONFIG)
