"""Training of the step reward model (prm.py) on Monte-Carlo labels of the policy's own prefixes.

    loss = -sum_n [y_n log P_n + (1 - y_n) log(1 - P_n)] / N
    y_n  = share of the M continuations of prefix n that are right

The labels y_n are Monte-Carlo estimates of J, on completions that the policy itself sampled. They are soft:
the cross-entropy is smallest where P_n is the policy's probability of a right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkrl.checkpoint import load_model
from thinkrl.config import Config
from thinkrl.data.problems import reading, training_stream
from thinkrl.distributed import World, global_sum, shard
from thinkrl.evaluate import tally_outcomes
from thinkrl.grading import grade
from thinkrl.grpo import divisor
from thinkrl.l2t.episodes import segment
from thinkrl.l2t.prm import StepRewardModel, new_prm, save_prm
from thinkrl.learner import Learner, compute_dtype, learning_rate, model_path, new_optimizer
from thinkrl.rollout import LABELS, TRAINING, prompt_ids, require_room, rollout
from thinkrl.run.folder import Run
from thinkrl.run.metrics import Tally
from thinkrl.run.watch import at
from thinkrl.sampler import Sampler
from thinkrl.session import Session, require_enough
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Pack, Problem, Sample, Trajectory
from thinkrl.update import descend, pack_evenly


def train(config: Config, world: World, report: Callable[[Path], object] | None = None) -> Run:
    """Train a reward model that starts as the policy's decoder under a new head. Collective.

    Every step samples completions as l2t does, labels their prefixes and takes one optimizer step on them.
    The policy stays as it is. `report` as in `Session`.
    """
    path = model_path(config.model)
    tokenizer = Tokenizer(path)
    segment([], tokenizer, config.episodes)  # a tokenizer that cannot encode the tags is refused now
    stream = training_stream(config.data, config.seed, config.data_weights, **reading(config))
    require_enough(stream, config, world)
    model = load_model(path, compute_dtype(config, world), world.device)
    policy = Sampler(
        model, tokenizer, config.kv_pages or None, max_rows=config.max_rows, cuda_graphs=config.cuda_graphs
    )
    first = stream.preview(config.problems_per_step)
    prompts = [prompt_ids(problem, tokenizer, config.system, config.suffix) for problem in first]
    more = 2 * config.max_tokens  # a prefix of a completion, and its continuation
    require_room(first, prompts, model.config.max_positions, more)
    learner = new_learner(config, world, tokenizer)
    with Session(config, world, {"prm": learner}, export=save_prm, report=report) as session:
        for step in session.steps():
            at("rollout", step + 1)
            tally, lr = Tally(), learning_rate(step, config.steps, config)
            problems = stream.take(step, config.problems_per_step, world.rank, world.size)
            trajectories, labelled = labelled_rollout(policy, problems, step, config)
            policy.release_pool()
            at("update")
            packs = pack_evenly(labelled, config, world)
            objective = prm_objective(learner.policy, packs, tally)
            loss, grad_norm = descend(learner, packs, objective, lr, config, world)
            tally_outcomes(tally, trajectories, config.group_size)
            session.end_step(step, tally, {"loss": loss, "grad_norm": grad_norm, "lr": lr})
        session.summarise_loss()
    return session.run


def new_learner(config: Config, world: World, tokenizer: Tokenizer) -> Learner[StepRewardModel]:
    """The reward model, sharded, with its optimizer."""
    model = shard(
        new_prm(tokenizer.path),
        world,
        compute_dtype(config, world),
        config.replicate,
        config.activation_checkpointing,
        config.compile,
    )
    return Learner(model, tokenizer, new_optimizer(model, config))


def labelled_rollout(
    policy: Sampler, problems: list[Problem], step: int, config: Config
) -> tuple[list[Trajectory], list[Sample]]:
    """Sample completions, and make the training samples: their prefixes with labels."""
    c, tokenizer = config, policy.tokenizer
    drawn: dict[str, Any] = dict(max_tokens=c.max_tokens, temperature=c.temperature, seed=c.seed)
    trajectories = rollout(
        policy,
        tokenizer,
        problems,
        group_size=c.group_size,
        address=(TRAINING, step),
        system=c.system,
        suffix=c.suffix,
        **drawn,
    )
    prefixes = [segment(t.turns[0].completion, tokenizer, c.episodes).prefixes for t in trajectories]
    labels = prefix_labels(
        policy,
        tokenizer,
        trajectories,
        prefixes,
        continuations=c.gain_samples,
        address=(LABELS, step),
        **drawn,
    )
    return trajectories, samples(trajectories, prefixes, labels)


def prefix_labels(
    sampler: Sampler,
    tokenizer: Tokenizer,
    trajectories: Sequence[Trajectory],
    prefixes: Sequence[list[int]],
    *,
    continuations: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    address: tuple[int, ...],
) -> list[Tensor]:
    """Share of M continuations whose answer is right, for every prefix of every completion: a list of [K+1].

    prefixes    as in `score_completions`; prompt, prefix and `max_tokens` more must fit the model's context
    address     first words of the key of random numbers; problem, sample and prefix follow, so labels do not
                depend on the world size

    Equal prefixes are continued once: the K+1 of a group's trajectories share their J_0.
    """
    # ids up to the prefix's end -> its (trajectory, k)
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, (trajectory, counts) in enumerate(zip(trajectories, prefixes, strict=True)):
        turn = trajectory.turns[0]
        for k, count in enumerate(counts):
            ids = (trajectory.problem.id, *turn.prompt, *turn.completion[:count])
            places.setdefault(ids, []).append((i, k))
    firsts = [(trajectories[i], k) for (i, k), *_ in places.values()]
    keys = [(*address, t.problem.id, t.sample, k, m) for t, k in firsts for m in range(continuations)]
    groups = sampler.generate(
        [list(ids[1:]) for ids in places],
        n=continuations,
        max_tokens=max_tokens,
        temperature=temperature,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        keys=keys,
    )
    labels = [torch.zeros(len(counts)) for counts in prefixes]
    for asked, group in zip(places.values(), groups):
        i, k = asked[0]
        problem, begin = trajectories[i].problem, trajectories[i].turns[0].completion[: prefixes[i][k]]
        right = sum(
            grade(tokenizer.decode([*begin, *c.tokens]), problem.answer, problem.source) for c in group
        )
        for i, k in asked:
            labels[i][k] = right / continuations
    return labels


def samples(
    trajectories: Sequence[Trajectory], prefixes: Sequence[list[int]], labels: Sequence[Tensor]
) -> list[Sample]:
    """Make samples to pack: tokens up to the last prefix, with each label at its prefix's last token.

    The prompt counts as completion here, because J_0 is read at its last token.
    """
    out = []
    for t, counts, values in zip(trajectories, prefixes, labels, strict=True):
        turn = t.turns[0]
        tokens = [*turn.prompt, *turn.completion[: counts[-1]]]
        label = torch.full((len(tokens),), torch.nan)
        label[torch.tensor(counts) + len(turn.prompt) - 1] = values
        unused = torch.zeros(len(tokens))
        out.append(Sample([], tokens, unused, unused, f"{t.problem.id}/{t.sample}", label))
    return out


def prm_loss(logits: Tensor, labels: Tensor, denominator: Tensor | float) -> Tensor:
    """Cross-entropy of logits [N, 2] against the chance of being positive, labels [N] in [0, 1]. Scalar.

    A sum, divided by `denominator`, the step's number of labels over all ranks (at least 1).
    """
    logprob = logits.float().log_softmax(-1)
    total = -((1 - labels) * logprob[:, 0] + labels * logprob[:, 1]).sum()
    return total / divisor(denominator)


def prm_objective(model: StepRewardModel, packs: Sequence[Pack], tally: Tally) -> Callable[[Pack], Tensor]:
    """Make the loss of a pack, divided by the whole step's labels, which are counted here. Collective."""
    denominator = float(global_sum(sum(len(label_positions(p)) for p in packs)))

    def objective(p: Pack) -> Tensor:
        loss, stats = pack_loss(model, p, denominator)
        tally.add_all(stats)
        return loss

    return objective


def label_positions(p: Pack) -> Tensor:
    """Positions of the row's tokens that have a label, [N] int64."""
    if p.labelled is None:
        return torch.empty(0, dtype=torch.int64, device=p.tokens.device)
    return p.labelled


def pack_loss(
    model: StepRewardModel, p: Pack, denominator: Tensor | float
) -> tuple[Tensor, dict[str, tuple]]:
    """`prm_loss` of a row made of `samples`, and the (sum, count) of |P(positive) - label|.

    A row without labels also runs the whole model, with zero gradients, because every rank must run every
    forward.
    """
    at = label_positions(p)
    logits = model.logits(model(p.tokens, p.cu_seqlens, longest=p.longest)[at])
    labels = logits.new_zeros(0) if p.label is None else p.label[at]
    error = (logits.detach().softmax(-1)[:, 1] - labels).abs()
    return prm_loss(logits, labels, denominator), {"label_error": (error.sum(), len(at))}
