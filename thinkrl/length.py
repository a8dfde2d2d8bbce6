"""Length-dependent rewards and advantages of published methods for efficient reasoning.

Every function maps the outcomes and lengths of P groups of G attempts to one number per attempt,

    f(correct [P, G] in {0, 1}, tokens [P, G], …) -> [P, G] fp64

which is the whole reward, outcome included, for `group_advantages`; only `gfpo` returns advantages. n is the
number of tokens of the completion, stop token included; c is correct; mean, min and max are over the group.

                     a right answer                              a wrong answer            can it score more?
    truncation       [n <= limit]                                0                         no
    overlong         1 + p(n), p from 0 down to -1               p(n)                      no
    l1_exact         1 - alpha |n - target|                      -alpha |n - target|       1 / alpha nearer
    l1_max           (clip(alpha (target - n), -1, 1) + 1) / 2   0                         no
    kimi             1 + weight lambda(n), |lambda| <= 1/2       weight min(0, lambda(n))  not if weight < 2
    arora_zanette    1 - alpha sigmoid(z(n))                     0                         not if alpha < 1
    laser            1 + weight [n <= limit]                     0                         no
    shorter_better   alpha - beta |n - n*|                       -beta |n - n*|            alpha / beta nearer
    gfpo             advantages over the shortest of G           the same                  no
    gr3              1 / (1 + alpha n / mean n)                  0                         no
    prime_linear     1 - weight mean(c) n / max n                -weight mean(c) n / max n   not if weight < 1
    priced           max(1 - price n, 0)                         0                         no

("1 / alpha nearer": yes, if it is so many tokens nearer to the target than the right one.) DLER is
`truncation` with `group_advantages(std="batch")`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinkrl.grpo import group_advantages


def truncation(correct: Tensor, tokens: Tensor, limit: float | Tensor) -> Tensor:
    """Reward c [n <= limit]: a right answer counts only within `limit` tokens.

    ThinkPrune (arXiv 2504.01296) lowers the limit in stages of 4000, 3000 and 2000 tokens and states it in
    the system prompt. DLER (2510.15110; abstract and project page only were read) normalises over the batch.
    """
    c, n = correct.double(), tokens.double()
    return c * (n <= limit)


def overlong(correct: Tensor, tokens: Tensor, limit: float, cache: float) -> Tensor:
    """Reward c + clip((limit - cache - n) / cache, -1, 0): a penalty that grows over the last `cache` tokens.

    DAPO (2503.14476) Eq. 13; TRL's soft overlong punishment, added to the outcome. DAPO's outcome is ±1, ours
    1 or 0, so here a right answer at the limit scores as much as a short wrong one. Raises ValueError unless
    0 < cache <= limit.
    """
    if not 0 < cache <= limit:
        raise ValueError(f"overlong needs 0 < cache <= limit, not cache={cache} with limit={limit}")
    c, n = correct.double(), tokens.double()
    return c + ((limit - cache - n) / cache).clamp(-1, 0)  # DAPO Eq. 13


def l1_exact(correct: Tensor, tokens: Tensor, target: float | Tensor, alpha: float = 3e-4) -> Tensor:
    """Reward c - alpha |n - target|, target the length that the prompt asks for ("Think for … tokens.").

    L1, LCPO-Exact (2503.04697). alpha is a penalty per token. target: a number, or one per problem [P, 1].
    """
    c, n = correct.double(), tokens.double()
    return c - alpha * (n - target).abs()


def l1_max(correct: Tensor, tokens: Tensor, target: float | Tensor, alpha: float = 2e-3) -> Tensor:
    """Reward c (clip(alpha (target - n), -1, 1) + 1) / 2, target the most tokens that the prompt allows.

    L1, LCPO-Max (2503.04697) as released, alpha 1/500 per token. The paper prints
    c clip(alpha (target - n) + 1/2, 0, 1), the same line at half the alpha: (clip(x, -1, 1) + 1) / 2 =
    clip(x / 2 + 1/2, 0, 1).
    """
    c, n = correct.double(), tokens.double()
    return c * ((alpha * (target - n)).clamp(-1, 1) + 1) / 2


def kimi(correct: Tensor, tokens: Tensor, weight: float = 1.0) -> Tensor:
    """Reward c + weight (lambda if c else min(0, lambda)), lambda = 1/2 - (n - min) / (max - min).

    Kimi k1.5 (2501.12599) §2.3.3. min and max are over the whole group, wrong answers included; lambda is 0
    if they are equal. The port in LASER's code adds 1e-6 to max - min; this one does not.
    """
    c, n = correct.double(), tokens.double()
    low, high = n.amin(1, keepdim=True), n.amax(1, keepdim=True)
    length = torch.where(high > low, 0.5 - (n - low) / (high - low).clamp(min=1), 0.0)
    return c + weight * torch.where(c > 0, length, length.clamp(max=0))


def arora_zanette(correct: Tensor, tokens: Tensor, alpha: float = 0.2, eps: float = 1e-6) -> Tensor:
    """Reward c (1 - alpha sigmoid(z)), z = (n - mean) / (std + eps), statistics over the group's right
    answers.

    Efficient (Arora & Zanette, 2502.04463), alpha from .05 to .4. std is the sample std. For a single right
    answer, the port in LASER's code takes mean 0 and std 1, so z = n and nearly all of alpha is subtracted.
    """
    c, n = correct.double(), tokens.double()
    k = c.sum(1, keepdim=True)
    mean = (c * n).sum(1, keepdim=True) / k.clamp(min=1)
    std = ((c * (n - mean) ** 2).sum(1, keepdim=True) / (k - 1).clamp(min=1)).sqrt()
    z = torch.where(k > 1, (n - mean) / (std + eps), n)
    return c * (1 - alpha * torch.sigmoid(z))


def laser(correct: Tensor, tokens: Tensor, limit: float | Tensor, weight: float = 0.5) -> Tensor:
    """Reward c + weight c [n <= limit]: a bonus for right answers within the limit.

    LASER (2505.15612). limit: a number, or one per problem [P, 1], which is LASER-D (`laser_d_limits`). In
    the released code a wrong answer gets -1/2 and an unfinished one -1; outcomes here are 0 or 1.
    """
    c, n = correct.double(), tokens.double()
    return c + weight * c * (n <= limit)


def laser_d_limits(correct: Tensor, tokens: Tensor, candidates: Tensor) -> Tensor:
    """Limit in tokens of each problem [P, 1], by its group's accuracy: the `limit` of LASER-D.

    Three bands of problems: at least 2/3 right, at least 1/3, fewer. A band's limit is the smallest of the
    ascending `candidates` [L] with floor(q m) >= 1, or else the longest attempt: q is the share of the band's
    attempts, right or wrong, that are no longer, and m = floor(2G/3), floor(G/3), 1. LASER (2505.15612) takes
    q from a monitored set that is sampled now and then; here it is the groups given.
    """
    c, n, G = correct.double(), tokens.double(), correct.shape[1]
    band = (3 * c.sum(1) >= G).long() + (3 * c.sum(1) >= 2 * G).long()
    m = torch.tensor([1.0, G // 3, 2 * G // 3], dtype=torch.float64)[:, None]
    # q [3, L]: the share of each band's attempts that are within each candidate
    q = torch.stack([(n[..., None] <= candidates)[band == b].double().mean((0, 1)) for b in range(3)])
    found, first = (q * m + 1e-9 >= 1).max(1)  # an empty band's q is NaN; its limit is not used
    return torch.where(found, candidates.double()[first], n.max())[band, None]


def shorter_better(correct: Tensor, tokens: Tensor, alpha: float = 2.0, beta: float = 1e-3) -> Tensor:
    """Reward alpha c - beta |n - n*|, n* the shortest right answer's length, or the group's mean without one.

    ShorterBetter (2504.21370). beta is a penalty per token.
    """
    c, n = correct.double(), tokens.double()
    shortest = n.masked_fill(c == 0, math.inf).amin(1, keepdim=True)
    optimal = torch.where(shortest.isinf(), n.mean(1, keepdim=True), shortest)
    return alpha * c - beta * (n - optimal).abs()


def gfpo(correct: Tensor, tokens: Tensor, keep: int, eps: float = 1e-4) -> Tensor:
    """Advantages (c - mean) / (std + eps) over the `keep` shortest attempts of each group, 0 for the others.

    GFPO (2508.09726). mean and sample std are over the kept attempts, the earlier one wins a tie, eps is
    TRL's. The paper's other criterion, reward per token, is left out: with outcomes 0 or 1 it keeps right
    answers first. Raises ValueError unless 2 <= keep <= G.
    """
    if not 2 <= keep <= correct.shape[1]:
        raise ValueError(f"gfpo keeps from 2 to G = {correct.shape[1]} attempts of a group, not {keep}")
    c, n = correct.double(), tokens.double()
    best = n.argsort(dim=1, stable=True)[:, :keep]
    return torch.zeros_like(c).scatter(1, best, group_advantages(c.gather(1, best), eps=eps))


def gr3(correct: Tensor, tokens: Tensor, alpha: float = 0.33) -> Tensor:
    """Reward c / (1 + alpha n / mean n): a discount, which keeps the sign of a reward.

    GR³ (2603.10535; the equation is from a note about it, the paper was not read). mean is over the whole
    group.
    """
    c, n = correct.double(), tokens.double()
    return c / (1 + alpha * n / n.mean(1, keepdim=True))


def prime_linear(correct: Tensor, tokens: Tensor, weight: float = 0.25) -> Tensor:
    """Reward c - weight mean(c) n / max n: the higher a group's accuracy, the larger the penalty per token.

    prime-rl's linear length penalty. max is over the whole group. prime-rl also penalises context and turns,
    by 0.1 each, which single completions do not have, and does not divide by a std:
    `group_advantages(std="none")`.
    """
    c, n = correct.double(), tokens.double()
    return c - weight * c.mean(1, keepdim=True) * n / n.amax(1, keepdim=True).clamp(min=1)


def priced(correct: Tensor, tokens: Tensor, price: float) -> Tensor:
    """Reward c max(1 - price n, 0): a plain penalty per token; not a published method, but a control for
    them.

    Without the bound, a right answer of more than 1 / price tokens would score less than a wrong one.
    """
    c, n = correct.double(), tokens.double()
    return c * (1 - price * n).clamp(min=0)
