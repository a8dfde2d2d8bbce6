"""The optimizer step: one step of AdamW on packs, independent of the number of packs and ranks.

    update     the policy loss on one rollout, `updates_per_rollout` times        (reinforcement learning)
    descend    one step on any loss of packs                                      (also sft and prm)

Each pack's loss is a sum divided by a count over the whole step and all ranks, which is computed before the
first backward. So gradients do not depend on the micro-batch size or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.logprob import linear_logprob
from thinkrl.config import Config
from thinkrl.distributed import World, gather, global_max, global_sum, whole
from thinkrl.grpo import importance_weight, loss_count, policy_loss
from thinkrl.learner import Learner
from thinkrl.model import Transformer
from thinkrl.run.metrics import Tally
from thinkrl.types import Pack, Sample, Trajectory, empty_pack, pack


class Diverged(RuntimeError):
    """Error of a step with values that are not finite; it is not taken. packs: this rank's rows."""

    def __init__(self, sentence: str, learner: Learner, packs: Sequence[Pack]):
        super().__init__(sentence)
        self.learner, self.packs = learner, packs


class Mismatched(RuntimeError):
    """Error of a sampler whose log-probs are not those of the trained policy."""


def mismatch_limit(dtype: torch.dtype, width: int, temperature: float) -> float:
    """Largest mean |trainer's - sampler's log-prob| per token that rounding explains, in nats.

    A state that is rounded in each of 2 L residual additions has an error vector of length sqrt(L/2) eps |h|
    in a random direction. So a logit of about |h| |w| cos has an error of sqrt(L/2) eps |z| / (cos
    sqrt(width)): about 4 eps for L = 28, |z| = 16, cos = 1/4, width = 3584. Sums of `width` fp32 products
    have an error of sqrt(width) eps_32. The limit is four times both, divided by the temperature as logits
    are: 0.125 in bfloat16, where 1e-3 to 1e-2 are usual; 2e-5 (width 96) to 1e-4 in float32, where 1e-7 is
    usual.
    """
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return 16 * (eps + width**0.5 * eps32) / min(1.0, temperature)


def pack_evenly(samples: list[Sample], config: Config, world: World) -> list[Pack]:
    """Pack this rank's samples, with the same number of packs on every rank, at least one. Collective.

    Each forward of a sharded model is collective, so ranks with fewer packs run empty ones.
    """
    packs = pack(samples, config.micro_batch_tokens)
    most = max(1, int(global_max(len(packs))))
    return [p.to(world.device) for p in packs + [empty_pack()] * (most - len(packs))]


def require_finite(learner: Learner, packs: Sequence[Pack], trajectories: Sequence[Trajectory] = ()) -> None:
    """Raise Diverged, on all ranks, if a reward, advantage or sampler's log-prob is not finite. Collective.

    A reward may be NaN, which means none. Advantages and log-probs are those of trained tokens.
    """
    inputs = [torch.stack([p.advantage, p.sampler_logprob]) for p in packs]  # 0 in prompts
    finite = torch.stack([values.isfinite().all() for values in inputs]).all()
    infinite = [
        f"reward {t.reward} of {t.problem.id}/{t.sample}" for t in trajectories if math.isinf(t.reward)
    ]
    if global_max(float(not finite or bool(infinite))) == 0:
        return
    for p, values in zip(packs, inputs):
        for name, row in zip(("advantage", "sampler's log-prob"), values):
            for sequence, id in zip(row.split(p.cu_seqlens.diff().tolist()), p.ids):
                infinite += [
                    f"{name} {wrong} of {id}" for wrong in sequence[~sequence.isfinite()][:1].tolist()
                ]
    found: list[str] = sum(gather(infinite), [])
    raise Diverged(f"{_some(found)} (problem/sample/turn)", learner, packs)


def _some(found: list[str]) -> str:
    """Join at most eight of the texts."""
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def update(
    learner: Learner, packs: Sequence[Pack], lr: float, config: Config, world: World, tally: Tally
) -> tuple[float, float]:
    """Take `updates_per_rollout` optimizer steps on one rollout. Returns the last one's loss and gradient
    norm.

    If every advantage of the step is 0 and there is no KL, the loss is 0 for any policy, so the gradient is
    set to 0 and not computed.
    """
    largest = global_max(float(torch.stack([p.advantage.abs().max() for p in packs]).max()))
    tally.add("advantage_max", largest)
    # the same on all ranks, because backwards are collective
    flat = largest == 0 and not config.kl_coef
    with torch.no_grad():
        for p in packs:
            if learner.reference is not None:
                p.ref_logprob, _ = token_logprobs(learner.reference, p, config.temperature)
            if config.updates_per_rollout > 1:
                p.old_logprob, _ = token_logprobs(learner.policy, p, config.temperature)
    if learner.reference is not None:
        learner.reference.reshard()  # no backward follows that would do it

    objective = policy_objective(learner.policy, packs, config, tally)
    for _ in range(config.updates_per_rollout):
        loss, grad_norm = descend(learner, packs, objective, lr, config, world, flat)
    return loss, grad_norm


def policy_objective(
    policy: Transformer, packs: Sequence[Pack], config: Config, tally: Tally
) -> Callable[[Pack], Tensor]:
    """Make the policy loss of a pack, divided by the whole step's count, which is summed here. Collective.

    Packs must have ref_logprob with a KL term, and old_logprob with more than one update per rollout.
    """
    if config.aggregate == "constant":
        denominator = float(config.problems_per_step * config.group_size * config.max_tokens)
    else:
        denominator = float(
            global_sum(sum(loss_count(p.mask, p.cu_seqlens, config.aggregate) for p in packs))
        )

    def objective(p: Pack) -> Tensor:
        logprob, entropy = token_logprobs(policy, p, config.temperature)
        old_logprob = logprob.detach() if p.old_logprob is None else p.old_logprob
        cap, low = config.importance_cap, config.importance_low
        loss, stats = policy_loss(
            logprob,
            p.old_logprob,
            p.advantage,
            p.mask,
            p.cu_seqlens,
            ref_logprob=p.ref_logprob,
            weight=importance_weight(old_logprob, p.sampler_logprob, cap, low) if cap else None,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            aggregate=config.aggregate,
            level=config.level,
            surrogate=config.surrogate,
            denominator=denominator,
        )
        tally.add_all(stats)
        tally.add("entropy", entropy.sum(), p.mask.sum())
        tally.add("mismatch", (old_logprob - p.sampler_logprob).abs().sum(), p.mask.sum())
        return loss

    return objective


def descend(
    learner: Learner,
    packs: Sequence[Pack],
    objective: Callable[[Pack], Tensor],
    lr: float,
    config: Config,
    world: World,
    flat: bool = False,
) -> tuple[float, float]:
    """Take one optimizer step on the sum of `objective` over all packs and ranks.

    Returns that sum and the gradient norm before clipping. Raises Diverged, before the step, if one is not
    finite.

    flat: the gradient is known to be 0 on every rank. The optimizer step is still taken, because its averages
    decay.
    """
    losses = []
    for p in packs:
        with torch.set_grad_enabled(not flat):
            loss = objective(p)
        if not flat:
            (loss * world.size).backward()  # FSDP averages over ranks, but the loss is a sum over them
        losses.append(loss.detach())
    if flat:
        learner.policy.reshard()  # no backward follows that would do it
        for parameter in learner.policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = float(
        whole(torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), config.max_grad_norm))
    )
    total = float(global_sum(sum(losses)))
    if not math.isfinite(total + grad_norm):
        suspects = gather([i for p, loss in zip(packs, losses) if not loss.isfinite() for i in p.ids])
        named = _some(sum(suspects, [])) or "none, only the gradient"
        raise Diverged(
            f"loss {total}, gradient norm {grad_norm}; samples (problem/sample/turn) of the rows that are "
            f"not finite: {named}",
            learner,
            packs,
        )
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    learner.optimizer.step()
    learner.optimizer.zero_grad()  # frees memory for the next rollout
    return total, grad_norm


def token_logprobs(policy: Transformer, p: Pack, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each sampled token and entropy of its distribution, [T] fp32, 0 where the mask is 0.

    Only hidden states that predict a sampled token go through the LM head. A row without sampled tokens keeps
    one state, so that every rank's backward reaches the parameters.
    """
    hidden, own = policy(p.tokens, p.cu_seqlens, longest=p.longest), p.places
    logprob, entropy = linear_logprob(hidden[own - 1], policy.head_weight, p.tokens[own], temperature)
    zeros = logprob.new_zeros(len(p.tokens))
    full, counted = torch.stack([zeros.index_copy(0, own, x) for x in (logprob, entropy)]), p.mask > 0
    return tuple(torch.where(counted, full, 0.0))
