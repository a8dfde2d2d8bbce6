"""GRPO: group advantages, and the policy loss of every preset.

    A_pg    = (r_pg - mean_g r_p) / (std_g r_p + eps)                                           DSMath §4.1.2
    ratio_t = exp(logprob_t - old_logprob_t)
    l_t     = -weight_t surrogate_t + kl_coef k3_t
    loss    = sum_t l_t                          / tokens of the step      aggregate="token"      DAPO Eq. 8
              sum_s 1/n_s sum_{t in s} l_t       / sequences of the step   aggregate="sequence"   DSMath Eq. 3
              sum_t l_t                          / a constant              aggregate="constant"   Dr.GRPO

    surrogate_t, where sg stops the gradient and p = exp(logprob):
    "clip"    min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)                       DSMath Eq. 3
    "cispo"   sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A logprob                         CISPO, 2506.13585
    "sapo"    4 / tau sigmoid(tau (ratio - 1)) A,   tau = 1 if A > 0 else 1.05               SAPO, 2511.20347
    "dppo"    ratio A, or 0 where p - p_old > clip_high (A > 0) or < -clip_low (A < 0)       DPPO, 2602.04879

Choices:

1. A loss is a sum over a denominator. The caller counts the denominator once per optimizer step, over all
   packs and ranks (`loss_count`), so gradients do not depend on the micro-batch size or the number of ranks.
2. There is one advantage per token: GRPO's are equal in a sequence, L2T's are not.
3. k3 is computed with expm1: exp(d) - d - 1 in fp32 is negative for some per cent of small d.
4. Log-ratios are clamped at ±20, for ratio and KL. Beyond that (a factor of 5e8) the gradient is zero.
5. Values with mask 0 have no effect. They are replaced by zeros first, since NaN * 0 is NaN.

Letters: T tokens of S sequences in one row, P problems, G attempts at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
ADVANTAGE_STD = ("sample", "population", "none", "batch", "mean")
SURROGATES = ("clip", "cispo", "sapo", "dppo")
SAPO_TAU = (1.0, 1.05)  # of gains and of losses


def group_advantages(
    reward: Tensor,
    std: str = "sample",
    eps: float = 1e-6,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Advantage of each attempt relative to its group, [P, G] -> [P, G] in the reward's dtype. DSMath §4.1.2

    std: the divisor of the difference to the group's mean, plus eps:
        "sample"       the group's std over G - 1, as in verl and TRL
        "population"   the group's std over G
        "none"         nothing (Dr.GRPO)
        "batch"        one std for all groups, of the differences over P G - 1 (DLER, REINFORCE++-baseline);
                       TRL's scale_rewards="batch" uses the std of the rewards themselves
        "mean"         the group's mean, without eps, for rewards of at least 0 (MaxRL, 2602.02710); 0 where
                       the mean is 0
    reduce sums a tensor over ranks; only "batch" calls it, and every rank must.

    Statistics are in fp64. A group whose max - min is within 1e-6 of its largest |reward| gets exactly 0:
    such a difference is rounding, and dividing by its std would make it as large as a real one. NaN means no
    reward: its advantage is 0, and statistics are those of the others. Raises ValueError for a group of one
    that is divided by a statistic, and for "mean" with a negative reward.
    """
    if std not in ADVANTAGE_STD:
        raise ValueError(f"std must be one of {', '.join(ADVANTAGE_STD)}, not {std!r}")
    group_size = reward.shape[1]
    if group_size == 1 and std != "none":
        raise ValueError(
            "a group of 1 has no differences that could be compared: use group_size of at least 2"
        )
    scored = ~reward.isnan()
    r = torch.where(scored, reward, 0.0).double()
    if std == "mean" and (r < 0).any():
        raise ValueError('std="mean" needs rewards of at least 0')
    count = scored.sum(1, keepdim=True)
    mean = r.sum(1, keepdim=True) / count.clamp(min=1)
    advantage = torch.where(scored, r - mean, 0.0)
    spread = advantage.amax(1, keepdim=True) - advantage.amin(1, keepdim=True)
    tied = spread <= 1e-6 * r.abs().amax(1, keepdim=True)
    advantage = torch.where(tied, 0.0, advantage)
    if std in ("sample", "population"):
        degrees = (count - int(std == "sample")).clamp(min=1)
        advantage = advantage / ((advantage.square().sum(1, keepdim=True) / degrees).sqrt() + eps)
    elif std == "mean":
        advantage = advantage / torch.where(tied, 1.0, mean)
    elif std == "batch":
        advantage = advantage / (batch_std(advantage[scored], reduce) + eps)
    return advantage.to(reward.dtype if reward.is_floating_point() else torch.float32)


def batch_std(centred: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Sample std over all ranks of values centred in their groups, [P, G] -> scalar fp64."""
    values = centred.double()
    squares, count = reduce(
        torch.stack([values.square().sum(), torch.tensor(float(values.numel())).double()])
    )
    return (squares / (count - 1).clamp(min=1)).sqrt()


def gdpo_advantages(
    rewards: Sequence[Tensor],
    weights: Sequence[float],
    eps: float = 1e-6,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Advantages from several rewards [P, G], each normalised in its group: [P, G] fp64. GDPO, 2601.05242

        A = a / (std a + eps),   a = sum_k weights_k group_advantages(rewards_k),   std over the batch

    A reward with a small std then counts as much as its weight says. As TRL's "normalize_then_sum" (there eps
    = 1e-4); verl takes the batch's mean and std over tokens, so that long answers weigh more.
    """
    if len(rewards) != len(weights):
        raise ValueError(f"{len(rewards)} rewards need as many weights, not {len(weights)}")
    parts = [w * group_advantages(r.double(), eps=eps) for r, w in zip(rewards, weights)]
    total = torch.stack(parts).sum(0)
    return total / (batch_std(total, reduce) + eps)


def kl_k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token: exp(d) - 1 - d, d = ref_logprob - logprob, [T].

    Never negative, and unbiased for samples of the policy. d is clamped at ±20.
    """
    d = (ref_logprob - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(d) - d).clamp(min=0)  # expm1 may be low by one ulp


def importance_weight(
    logprob_trainer: Tensor, logprob_sampler: Tensor, cap: float, low: float = 0.0
) -> Tensor:
    """Importance weights trainer / sampler [T], without gradient: min(w, cap), or masked.

    They correct the loss for a sampler whose numerics differ from the trainer's. Both log-probs are at the
    sampling temperature. With `low` above 0 they are IcePop's (2510.18855): w where low <= w <= cap, 0
    elsewhere.
    """
    weight = (logprob_trainer - logprob_sampler).detach().exp()
    if low > 0:
        return torch.where((weight >= low) & (weight <= cap), weight, 0.0)
    return weight.clamp(max=cap)


def loss_count(mask: Tensor, cu_seqlens: Tensor, aggregate: str = "token") -> Tensor:
    """Count one row's tokens with mask 1, or its sequences with any, for the denominator. Scalar fp32.

    Raises ValueError for "constant", whose denominator the caller knows.
    """
    if aggregate == "token":
        return (mask > 0).sum().float()
    if aggregate == "sequence":
        return (_sequence_sums((mask > 0).float(), cu_seqlens) > 0).sum().float()
    raise ValueError(f'only "token" and "sequence" aggregation have something to count, not {aggregate!r}')


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    aggregate: str = "token",
    level: str = "token",
    surrogate: str = "clip",
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Compute the policy loss of one packed row, and its statistics.

    logprob, old_logprob, advantage, mask, ref_logprob, weight: [T] fp32 or fp64; cu_seqlens: int32 [S+1].
    old_logprob    by the policy before its first update on this rollout; None: unchanged, ratio exactly 1
    weight         importance weights (`importance_weight`), which multiply the surrogate, not the KL
    surrogate      "clip", "cispo", "sapo" or "dppo", as above. The clips bound the ratio, under "dppo" the
                   change of probability; sapo has none. TRL's CISPO has no lower bound, caps at epsilon_high:
                   clip_low=1, clip_high=epsilon_high - 1
    level          "token", or "sequence" for GSPO: the geometric mean of a sequence's ratios replaces each
    denominator    the step's count over all packs and ranks, at least 1; None: this row's own

    Returns (loss, stats), stats = {name: (sum, count)}, scalar tensors to be added over packs and ranks:
    ratio, advantage_abs, clip_fraction (tokens whose gradient the clip removed, or bounded under "cispo"),
    kl_old (k3 against old_logprob) and, with a reference, kl. Raises ValueError for an unknown option, for a
    KL without a reference, and for ratios per sequence without the clip.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f'level must be "token" or "sequence", not {level!r}')
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, not {surrogate!r}")
    if level == "sequence" and surrogate != "clip":
        raise ValueError(f'surrogate {surrogate!r} is one of tokens, level="sequence" goes with "clip"')
    if aggregate not in ("token", "sequence", "constant"):
        raise ValueError(f'aggregate must be "token", "sequence" or "constant", not {aggregate!r}')
    if aggregate == "constant" and denominator is None:
        raise ValueError('aggregate="constant" needs its constant: pass denominator')
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob, the reference policy's log-probs")

    unmasked = mask > 0

    def own(x: Tensor) -> Tensor:
        return torch.where(unmasked, x, 0.0)

    logprob, advantage = own(logprob), own(advantage)
    old_logprob = logprob.detach() if old_logprob is None else own(old_logprob)
    log_ratio = (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    own_tokens = _sequence_sums(unmasked.to(logprob.dtype), cu_seqlens).clamp(min=1)
    if level == "sequence":
        mean = _sequence_sums(log_ratio.detach(), cu_seqlens) / own_tokens
        # GSPO Eq. 14: the value is the sequence's ratio, the gradient is that of each token's log-prob
        log_ratio = own(_to_tokens(mean, cu_seqlens, len(mask))) + logprob - logprob.detach()
    ratio = log_ratio.exp()
    if surrogate == "clip":
        gain = torch.minimum(
            ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
        )  # DSMath Eq. 3
        clipped = gain < ratio * advantage
    elif surrogate == "cispo":
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high).detach()
        gain, clipped = bounded * advantage * logprob, bounded != ratio
    elif surrogate == "sapo":
        tau = torch.full_like(advantage, SAPO_TAU[1]).masked_fill(advantage > 0, SAPO_TAU[0])
        gain = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
        clipped = torch.zeros_like(unmasked)
    else:
        moved = logprob.exp() - old_logprob.exp()
        clipped = (advantage > 0) & (moved > clip_high) | (advantage < 0) & (moved < -clip_low)
        gain = torch.where(clipped, 0.0, ratio * advantage)
    token_loss = -gain if weight is None else -own(weight) * gain
    kl = None if ref_logprob is None else kl_k3(logprob, own(ref_logprob))
    if kl is not None and kl_coef:
        token_loss = token_loss + kl_coef * kl

    if aggregate == "sequence":
        token_loss = token_loss / _to_tokens(own_tokens, cu_seqlens, len(mask))
    if denominator is None:
        denominator = loss_count(mask, cu_seqlens, aggregate)
    loss = token_loss.sum() / divisor(denominator)

    with torch.no_grad():
        count = unmasked.sum().float()
        stats = {
            "ratio": (own(ratio).sum(), count),
            "advantage_abs": (advantage.abs().sum(), count),
            "clip_fraction": (clipped.sum().float(), count),
            "kl_old": (kl_k3(logprob, old_logprob).sum(), count),
        }
        if kl is not None:
            stats["kl"] = (kl.sum(), count)
    return loss, stats


def divisor(denominator: Tensor | float) -> Tensor | float:
    """Clamp a step's count to at least 1. A number stays a number, to avoid a copy to the device."""
    return denominator.clamp(min=1) if isinstance(denominator, Tensor) else max(denominator, 1.0)


def _sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum each sequence, [T] -> [S]. Deterministic on a GPU, unlike scattered additions."""
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long())


def _to_tokens(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Repeat each sequence's value on its tokens, [S] -> [T]. With T given, no lengths are read back."""
    return x.repeat_interleave(cu_seqlens.diff(), output_size=total)
