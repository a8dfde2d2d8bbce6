"""GRPO: advantages from a group of answers to one problem, and the one policy loss that every preset trains with.

    A_pg    = (r_pg - mean_g r_p) / (std_g r_p + eps)                                           DSMath §4.1.2
    ratio_t = exp(logprob_t - old_logprob_t)
    l_t     = -weight_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef k3_t
    loss    = sum_t l_t                          / tokens of the step         aggregate="token"      DAPO Eq. 8
              sum_s 1/n_s sum_{t in s} l_t       / sequences of the step      aggregate="sequence"   DSMath Eq. 3
              sum_t l_t                          / a constant                 aggregate="constant"   Dr.GRPO

Choices, first: 1. A loss is a sum over a denominator. The caller counts the denominator once per optimizer
step, over all packs and all
   ranks (`loss_count`), so that gradients depend neither on the micro-batch size nor on the number of ranks.
2. The advantage is one number per token. GRPO fills a sequence with one value, L2T does not; nothing here
knows which. 3. k3 is computed by expm1: exp(d) - d - 1 in fp32 is negative for some per cent of all small d.
4. Log-ratios are clamped at +-20, ratio and KL alike: beyond it (a factor of 5e8) the gradient is zero, not
infinite. 5. Columns with mask 0 never enter, whatever they hold: they are replaced by zeros before the first
operation, since
   NaN * 0 is NaN.

Letters: T tokens of S sequences in one row, P problems, G attempts at each.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def group_advantages(reward: Tensor, std: str = "sample", eps: float = 1e-6) -> Tensor:
    """Advantage of each attempt over its group's mean, reward [P, G] -> [P, G] in the reward's dtype. DSMath §4.1.2.

    std: what the difference is divided by, plus eps: "sample" (over G - 1, as in verl and TRL), "population"
    (over G), or "none" (Dr.GRPO: not divided). Statistics are taken in fp64, and a group whose max - min is
    within 1e-6 of its largest |reward| gets exactly 0: a difference that small is rounding, and dividing by
    its std would turn it into a full-sized reward. Raises ValueError for a group of one with a std, which
    would be 0 (or undefined) whatever the reward.
    """
    if std not in ("sample", "population", "none"):
        raise ValueError(f'std must be "sample", "population" or "none", not {std!r}')
    group_size = reward.shape[1]
    if group_size == 1 and std != "none":
        raise ValueError(
            'a group of 1 has no standard deviation: use group_size of at least 2, or std="none"'
        )
    r = reward.double()
    spread = r.amax(1, keepdim=True) - r.amin(1, keepdim=True)
    advantage = r - r.mean(1, keepdim=True)
    if std != "none":
        advantage = advantage / (r.std(1, correction=int(std == "sample"), keepdim=True) + eps)
    tied = spread <= 1e-6 * r.abs().amax(1, keepdim=True)
    return torch.where(tied, 0.0, advantage).to(reward.dtype if reward.is_floating_point() else torch.float32)


def kl_k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, [T] -> [T]: exp(d) - 1 - d with d = ref_logprob - logprob.

    Never negative, unbiased under samples of the policy. d is clamped at +-20.
    """
    d = (ref_logprob - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(d) - d).clamp(min=0)  # expm1 may be one ulp low, where the value is below fp32 anyway


def importance_weight(logprob_trainer: Tensor, logprob_sampler: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(trainer / sampler, cap) [T], without gradient.

    They correct the loss for a sampler whose numerics differ from the trainer's. Both at the sampling
    temperature.
    """
    return (logprob_trainer - logprob_sampler).detach().exp().clamp(max=cap)


def loss_count(mask: Tensor, cu_seqlens: Tensor, aggregate: str = "token") -> Tensor:
    """What one row adds to the step's denominator: its unmasked tokens, or its sequences with any. Scalar fp32.

    Raises ValueError for "constant", whose denominator is the caller's own.
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
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Clipped policy loss of one packed row, to be minimised, and its statistics.

    logprob, old_logprob, advantage, mask, ref_logprob, weight: [T] fp32 or fp64; cu_seqlens: int32 [S+1].
    old_logprob    the policy before its first update on this rollout; None: it has not moved, ratio exactly 1
    weight         importance weights (`importance_weight`): they multiply the surrogate, never the KL
    level          "token", or "sequence" for GSPO: the geometric mean of a sequence's ratios stands in for each of them
    denominator    the whole step's count over all packs and ranks; None: this row's own. Taken as at least 1
    Returns (loss, stats), stats = {name: (sum, count)}, both scalar tensors to be added over packs and ranks:
    ratio, advantage_abs, clip_fraction (tokens whose gradient the clip removed), kl_old (k3 against old_logprob) and,
    with a reference, kl. Raises ValueError for an unknown option and for a KL without a reference.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f'level must be "token" or "sequence", not {level!r}')
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
        # GSPO Eq. 14: the value is the sequence's ratio, the gradient flows through each token's own log-prob
        log_ratio = own(_to_tokens(mean, cu_seqlens, len(mask))) + logprob - logprob.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # DSMath Eq. 3
    token_loss = -surrogate if weight is None else -own(weight) * surrogate
    kl = None if ref_logprob is None else kl_k3(logprob, own(ref_logprob))
    if kl_coef:
        token_loss = token_loss + kl_coef * kl

    if aggregate == "sequence":
        token_loss = token_loss / _to_tokens(own_tokens, cu_seqlens, len(mask))
    if denominator is None:
        denominator = loss_count(mask, cu_seqlens, aggregate)
    loss = token_loss.sum() / torch.as_tensor(denominator, device=logprob.device).clamp(min=1)

    with torch.no_grad():
        count = unmasked.sum().float()
        stats = {
            "ratio": (own(ratio).sum(), count),
            "advantage_abs": (advantage.abs().sum(), count),
            "clip_fraction": ((surrogate < ratio * advantage).sum().float(), count),
            "kl_old": (kl_k3(logprob, old_logprob).sum(), count),
        }
        if kl is not None:
            stats["kl"] = (kl.sum(), count)
    return loss, stats


def _sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] -> [S]. Repeatable on a GPU, where scattered additions are not."""
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long())


def _to_tokens(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """[S] -> [T]. Naming T spares a GPU the wait for its lengths."""
    return x.repeat_interleave(cu_seqlens.diff(), output_size=total)
