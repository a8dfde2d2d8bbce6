"""Train a policy to reason efficiently:  torchrun --nproc_per_node=8 train.py [PRESET] [--key value …]

One step of reinforcement learning, whatever the preset (`train`, below):

    problems -> rollout -> reward -> advantage -> pack -> loss -> optimizer step -> sync the sampler

A preset decides who writes the trajectory and how the advantage is filled. Below `pack` nothing knows which
one is running.
"""

from thinkrl.config import parse
from thinkrl.options import command_line

if __name__ == "__main__":  # before torch is imported: --help and misspelt options answer at once
    CONFIG = command_line("train.py", parse)

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.logprob import linear_logprob
from thinkrl import UserError, require_own_kernels
from thinkrl.checkpoint import load_model, read_config
from thinkrl.config import Config, as_dict
from thinkrl.distributed import World, gather, global_max, global_sum, run_and_exit, shard, start, stop
from thinkrl.evaluate import summarise, summary_table
from thinkrl.grpo import importance_weight, loss_count, policy_loss
from thinkrl.l2t.episodes import segment
from thinkrl.l2t.preset import L2T
from thinkrl.l2t.prm import label_positions, new_prm, pack_loss, prefix_labels, save_prm
from thinkrl.l2t.prm import samples as prm_samples
from thinkrl.learner import (
    Learner,
    compute_dtype,
    learning_rate,
    model_path,
    new_learner,
    new_optimizer,
    restore,
    save,
)
from thinkrl.longshort import protocol as longshort
from thinkrl.longshort.conversation import load_prompts, require_prompts
from thinkrl.longshort.preset import LongShort
from thinkrl.metrics import DEFINITIONS, Log, Stopwatch, Tally, require_sinks
from thinkrl.model import Transformer
from thinkrl.options import exit_with_error
from thinkrl.presets import Grpo
from thinkrl.problems import Stream, held_out_problems, load_problems, subsample
from thinkrl.rollout import EVALUATION, LABELS, TRAINING, require_room, rollout
from thinkrl.runs import Run, open_run
from thinkrl.sampler import Sampler
from thinkrl.sft import load_rows, nll_loss
from thinkrl.sft import samples as sft_samples
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools.report import write_report
from thinkrl.types import Pack, Problem, Trajectory, empty_pack, pack


class Diverged(RuntimeError):
    """A loss or a gradient is not finite."""


def train(config: Config, world: World) -> None:
    """Reinforcement learning: grpo, l2t, longshort."""
    stream = Stream(load_problems(config.data, config.source), config.seed)
    require_a_problem_each(stream, config, world)
    preset = {"grpo": Grpo, "l2t": L2T, "longshort": LongShort}[config.preset](config, world)
    preset.require_trainable(stream.preview(config.problems_per_step))
    held_out = subsample(
        held_out_problems(config.eval_data, config.data, config.source), config.eval_problems
    )
    preset.require_room(held_out)
    run = open_run(config, world)
    first, state = restore(run.folder, preset.learners)
    preset.load_state_dict(state)

    def evaluate_after(step: int) -> None:
        if config.eval_every and step % config.eval_every == 0 and 0 < step < config.steps:
            evaluate(preset, held_out, run, preset.name(step), config, world, step)

    evaluate(preset, held_out, run, "before", config, world, first)
    evaluate_after(first)  # a kill may have come between a step and its evaluation
    log = Log(run.folder, world.main, first, config.steps, config.wandb, config.tensorboard, as_dict(config))

    for step in range(first, config.steps):
        clock, tally = Stopwatch(), Tally()
        learner, lr = preset.learner(step), preset.learning_rate(step)
        problems = stream.take(step, config.problems_per_step, world.rank, world.size)
        trajectories = preset.rollout(problems, step, tally)  # graded; masks and log-probs are born here
        tally.add("rollout_seconds", clock.seconds)
        advantages = preset.advantages(
            trajectories, step, tally
        )  # per trajectory, one value per token of its own turns
        samples = preset.samples(trajectories, advantages, step)
        packs = level(pack(samples, config.micro_batch_tokens), world)
        for each in preset.learners.values():
            each.sampler.release_pool()  # its memory belongs to the backward now
        loss, grad_norm = update(learner, packs, lr, config, world, tally)
        learner.sampler.load_weights(learner.policy)

        count(tally, trajectories, config.group_size)
        log.step(row(step, tally, clock, loss=loss, grad_norm=grad_norm, lr=lr))
        shown = config.log_groups * config.group_size
        log.samples(step + 1, [describe(t, a) for t, a in zip(trajectories[:shown], advantages)])
        if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
            save(run.folder, step + 1, preset.learners, preset.state_dict(), config)
        evaluate_after(step + 1)

    log.close()
    evaluate(preset, held_out, run, "after", config, world, config.steps)
    if world.main:
        print(summary_table(run.summary), f"\nreport: {write_report(run.folder)}\nrun: {run.folder}")


def require_a_problem_each(stream: Stream, config: Config, world: World) -> None:
    if world.size > config.problems_per_step:
        raise UserError(
            f"{world.size} ranks share {config.problems_per_step} problems per step, some would have none: raise "
            "--problems_per_step, or lower --nproc_per_node"
        )
    stream.take(0, config.problems_per_step)  # raises if there are not as many


def level(packs: list[Pack], world: World) -> list[Pack]:
    """As many packs on every rank, at least one: each forward of a sharded model is a collective, and
    every step descends.
    """
    most = max(1, int(global_max(len(packs))))
    return [p.to(world.device) for p in packs + [empty_pack()] * (most - len(packs))]


def update(
    learner: Learner, packs: list[Pack], lr: float, config: Config, world: World, tally: Tally
) -> tuple[float, float]:
    """Train on one rollout: `updates_per_rollout` optimizer steps. Returns the last one's loss and gradient norm.

    The denominator is counted over all packs and ranks before the first backward, so neither the micro-batch
    size nor the number of ranks changes a gradient.
    """
    if config.aggregate == "constant":
        denominator = float(config.problems_per_step * config.group_size * config.max_tokens)
    else:
        denominator = float(
            global_sum(sum(loss_count(p.mask, p.cu_seqlens, config.aggregate) for p in packs))
        )
    with torch.no_grad():
        for p in packs:
            if learner.reference is not None:
                p.ref_logprob, _ = token_logprobs(learner.reference, p, config.temperature)
            if config.updates_per_rollout > 1:
                p.old_logprob, _ = token_logprobs(learner.policy, p, config.temperature)
    if learner.reference is not None:
        learner.reference.reshard()  # no backward follows that would do it

    def objective(p: Pack) -> Tensor:
        logprob, entropy = token_logprobs(learner.policy, p, config.temperature)
        old_logprob = logprob.detach() if p.old_logprob is None else p.old_logprob
        cap = config.importance_cap
        loss, stats = policy_loss(
            logprob,
            p.old_logprob,
            p.advantage,
            p.mask,
            p.cu_seqlens,
            ref_logprob=p.ref_logprob,
            weight=importance_weight(old_logprob, p.sampler_logprob, cap) if cap else None,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            aggregate=config.aggregate,
            level=config.level,
            denominator=denominator,
        )
        tally.add_all(stats)
        tally.add("entropy", entropy.sum(), p.mask.sum())
        tally.add("mismatch", (old_logprob - p.sampler_logprob).abs().sum(), p.mask.sum())
        return loss

    for _ in range(config.updates_per_rollout):
        loss, grad_norm = descend(learner, packs, objective, lr, config, world)
    return loss, grad_norm


def descend(
    learner: Learner,
    packs: list[Pack],
    objective: Callable[[Pack], Tensor],
    lr: float,
    config: Config,
    world: World,
) -> tuple[float, float]:
    """One optimizer step on the sum of `objective` over all packs and ranks. Returns that sum and the
    gradient norm.
    """
    losses = []
    for p in packs:
        loss = objective(p)
        (loss * world.size).backward()  # FSDP averages over ranks, ours is a sum over them
        losses.append(loss.detach())
    grad_norm = float(
        torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), config.max_grad_norm).full_tensor()
    )
    total = float(global_sum(sum(losses)))
    if not math.isfinite(total + grad_norm):
        suspects = gather([i for p, loss in zip(packs, losses) if not loss.isfinite() for i in p.ids])
        raise Diverged(
            f"loss {total}, gradient norm {grad_norm}; samples (problem/sample) of the rows that are not finite: "
            f"{sum(suspects, []) or 'none, only the gradient'}; nothing was saved over the last checkpoint"
        )
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    learner.optimizer.step()
    learner.optimizer.zero_grad()  # the next rollout needs the memory
    return total, grad_norm


def token_logprobs(policy: Transformer, p: Pack, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each sampled token, and entropy of the distribution it came from: [T], 0 where the mask is 0.

    Only states that predict a sampled token meet the LM head. A row with none keeps one, so that every rank's
    backward reaches the parameters.
    """
    hidden = policy(p.tokens, p.cu_seqlens)
    own = p.mask.nonzero().flatten()
    own = own if len(own) else torch.tensor([1], device=p.mask.device)
    logprob, entropy = linear_logprob(hidden[own - 1], policy.head_weight, p.tokens[own], temperature)
    zeros = torch.zeros(len(p.tokens), device=logprob.device)
    full, counted = torch.stack([zeros.index_copy(0, own, x) for x in (logprob, entropy)]), p.mask > 0
    return tuple(torch.where(counted, full, 0.0))


def evaluate(
    preset: Grpo | LongShort,
    problems: list[Problem],
    run: Run,
    when: str,
    config: Config,
    world: World,
    step: int,
) -> None:
    """Held-out accuracy and tokens, sampled and greedy, into summary.json under `when`. Collective."""
    if when in run.summary or not problems:
        return
    mine = [problems[i] for i in world.share(len(problems))]
    sampled = preset.attempt(mine, config.eval_samples, config.temperature, (EVALUATION, step))
    greedy = preset.attempt(mine, 1, 0.0, (EVALUATION, step))
    results = []
    for part in (sampled, greedy):
        everything = sum(gather(part), [])
        results.append(
            summarise(everything) | (longshort.summary(everything) if config.preset == "longshort" else {})
        )
    if world.main:
        run.update_summary(**{when: {"step": step, **results[0], "greedy": results[1]}})


def count(tally: Tally, trajectories: list[Trajectory], group_size: int) -> None:
    for t in trajectories:
        tally.add("reward", t.reward)
        tally.add("accuracy", t.outcome_reward)
        tally.add("tokens", t.tokens)
        tally.add("truncated", any(turn.finish_reason == "length" for turn in t.turns))
    for i in range(0, len(trajectories), group_size):
        tally.add("zero_groups", len({t.reward for t in trajectories[i : i + group_size]}) == 1)


def row(step: int, tally: Tally, clock: Stopwatch, **own: float) -> dict[str, float]:
    """One line of metrics.jsonl. Collective."""
    sums, means = tally.reduce()
    known = {name: value for name, value in means.items() if name in DEFINITIONS}
    seconds = clock.seconds
    return {
        "step": step + 1,
        "kl": 0.0,
        **known,
        **own,
        "seconds": seconds,
        "tokens_per_second": sums["tokens"] / seconds,
    }


def describe(t: Trajectory, advantage: Tensor) -> dict:
    """One line of samples.jsonl: everything needed to see what a token was paid for."""
    return {
        "problem": t.problem.id,
        "sample": t.sample,
        "question": t.problem.question,
        "gold": t.problem.answer,
        "level": t.problem.level,
        "answer": t.answer,
        "text": t.text,
        "outcome_reward": t.outcome_reward,
        "reward": t.reward,
        "turns": [
            {
                "role": turn.role,
                "prompt": turn.prompt,
                "completion": turn.completion,
                "finish_reason": turn.finish_reason,
            }
            for turn in t.turns
        ],
        "advantage": [round(a, 4) for a in advantage.tolist()],
        **t.extra,
    }


def supervised(config: Config, world: World) -> None:
    """sft: next-token loss on the completion part of rows. The same packs, the same descent."""
    path = model_path(config.model)
    tokenizer = Tokenizer(path)
    rows, prompts = load_rows(config.data), load_prompts(config.prompts, path)
    stream = Stream(sft_samples(rows, tokenizer, read_config(path).max_positions), config.seed)
    require_a_problem_each(stream, config, world)
    turns = [each for each in rows if each.conversation]
    for turn in turns:
        require_prompts(turn.conversation, turn.where, prompts)
    learners = {
        "policy": new_learner(path, config, world, tokenizer, samplers=0, prompts=prompts if turns else None)
    }
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
            save(run.folder, step + 1, learners, {}, config)
    log.close()
    if world.main:
        loss = log.last("loss")
        run.update_summary(after={"loss": loss})
        write_report(run.folder)
        print(f"loss {loss:.4f}\nmodel: {run.folder}/checkpoints/step_{config.steps}/hf\nrun: {run.folder}")


def train_prm(config: Config, world: World) -> None:
    """prm: a step reward model learns the Monte-Carlo correctness of prefixes that the policy itself
    wrote.
    """
    path, dtype = model_path(config.model), compute_dtype(config, world)
    tokenizer = Tokenizer(path)
    segment([], tokenizer, config.episodes)
    stream = Stream(load_problems(config.data, config.source), config.seed)
    require_a_problem_each(stream, config, world)
    sampler = Sampler(load_model(path, dtype, world.device), tokenizer, config.kv_pages or None)
    require_room(
        stream.preview(config.problems_per_step),
        tokenizer,
        sampler.model.config.max_positions,
        2 * config.max_tokens,
        config.system,
        config.suffix,
    )  # a prefix of a completion, and its continuation
    model = shard(new_prm(path), world, dtype, config.replicate, config.activation_checkpointing)
    learners = {"prm": Learner(model, tokenizer, new_optimizer(model, config), sampler=None)}
    run = open_run(config, world)
    first, _ = restore(run.folder, learners)
    log = Log(run.folder, world.main, first, config.steps, config.wandb, config.tensorboard, as_dict(config))
    drawn = dict(max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed)

    for step in range(first, config.steps):
        clock, tally, lr = Stopwatch(), Tally(), learning_rate(step, config.steps, config)
        problems = stream.take(step, config.problems_per_step, world.rank, world.size)
        trajectories = rollout(
            sampler,
            tokenizer,
            problems,
            group_size=config.group_size,
            address=(TRAINING, step),
            system=config.system,
            suffix=config.suffix,
            **drawn,
        )
        prefixes = [segment(t.turns[0].completion, tokenizer, config.episodes).prefixes for t in trajectories]
        labels = prefix_labels(
            sampler,
            tokenizer,
            trajectories,
            prefixes,
            continuations=config.gain_samples,
            address=(LABELS, step),
            **drawn,
        )
        sampler.release_pool()
        packs = level(pack(prm_samples(trajectories, prefixes, labels), config.micro_batch_tokens), world)
        denominator = float(global_sum(sum(len(label_positions(p)) for p in packs)))

        def objective(p: Pack, denominator: float = denominator, tally: Tally = tally) -> Tensor:
            loss, stats = pack_loss(model, p, denominator)
            tally.add_all(stats)
            return loss

        loss, grad_norm = descend(learners["prm"], packs, objective, lr, config, world)
        count(tally, trajectories, config.group_size)
        log.step(row(step, tally, clock, loss=loss, grad_norm=grad_norm, lr=lr))
        if step + 1 == config.steps or config.save_every and (step + 1) % config.save_every == 0:
            save(run.folder, step + 1, learners, {}, config, export=save_prm)
    log.close()
    if world.main:
        loss = log.last("loss")
        run.update_summary(after={"loss": loss})
        write_report(run.folder)
        print(
            f"loss {loss:.4f}\nreward model: {run.folder}/checkpoints/step_{config.steps}/prm\nrun: {run.folder}"
        )


def main(config: Config) -> None:
    try:
        require_own_kernels()
        require_sinks(config.wandb, config.tensorboard)
        world = start(config.device)
        {"sft": supervised, "prm": train_prm}.get(config.preset, train)(config, world)
    except UserError as mistake:
        exit_with_error("train.py", mistake)
    except Diverged as reason:
        exit_with_error("train.py", reason, status=1)
    finally:
        stop()


if __name__ == "__main__":
    run_and_exit(main, CONFIG)
