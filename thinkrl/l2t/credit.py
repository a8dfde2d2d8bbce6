"""L2T's rewards per episode, fitting gain minus compression penalty, and the token advantages made from them.

    r_prg_k = (J_k - J_{k-1}) - beta C_k                                                 Eq. 3
    R_k     = r_out / K + alpha r_prg_k                                                  Alg. 1 l. 9
    r_t     = R_k w_t / sum_{t' in k} w_t',    w_t = -log p_old(z_t | s_t)               Alg. 1 l. 10-11
    A_t     = A r_t / r~,                      A: the completion's normalised statistic     Alg. 1 l. 13-15

J_k, predicted correctness, is computed in gain.py; C_k, compression, in compression.py.

Departures (docs/l2t.md measures them):
1. The default group statistic is the return r_out + alpha sum r_prg, which the paper's objective (Eq. 2, 5)
   maximises. Line 13's truncated mean is a reward per token, an implicit length penalty:
   `statistic="token_trunc_mean"`.
2. Line 15 reverses its meaning where A and r~ differ in sign, and diverges where r~ is near 0. There
   `mode="guarded"` gives every token A, and elsewhere it clips the ratio.
   `mode="paper"` is the line as printed.
3. A group without differences, or with differences of rounding size, gets zero advantage.

Letters: T tokens and K episodes of one completion, G completions of one problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinkrl.grpo import group_advantages

SURPRISE_FLOOR = 1e-8  # an episode of certain tokens spreads its reward evenly instead of dividing 0 by 0
GUARD = 0.02  # guarded credit does not divide by statistics below this share of the group's mean
ROUNDING = 1e-6  # relative; what is smaller is not a reward


def process_reward(J: Tensor, C: Tensor, beta: float) -> Tensor:
    """Process reward of each episode, [K]: fitting gain from J [K+1] minus beta times compression C [K]."""
    return J.diff() - beta * C  # L2T Eq. 3


def released_reward(J: Tensor, prefixes: Sequence[int], malformed: bool) -> Tensor:
    """Process reward of the released code, [K]: the gain J_k - J_{k-1} once per token between closing tags.

    prefixes are `Episodes.prefixes`, so text after the last tag has no weight. The first episode gets 0, and
    every episode of a malformed completion gets 0. A longer episode gets more, unlike in Eq. 3. Used by
    `--profile code`.
    """
    gain = J.diff() * torch.tensor(prefixes).diff()
    return torch.zeros_like(gain) if malformed else torch.where(torch.arange(len(gain)) > 0, gain, 0.0)


def episode_rewards(r_out: float, r_prg: Tensor, alpha: float) -> Tensor:
    """Reward R [K] of each episode: an equal share of the outcome reward plus alpha times r_prg [K]."""
    return r_out / max(len(r_prg), 1) + alpha * r_prg  # L2T Alg. 1 l. 9


def surprise(old_logprob: Tensor) -> Tensor:
    """Surprise -log p of each token under the policy that sampled it, [T] fp64, positive."""
    return (-old_logprob.double()).clamp(min=0) + SURPRISE_FLOOR  # L2T Alg. 1 l. 10


def token_rewards(R: Tensor, episode_ids: Tensor, old_logprob: Tensor) -> Tensor:
    """Spread each episode's reward R [K] over its tokens in proportion to their surprise: [T] fp64.

    episode_ids [T] says which episode a token belongs to. The tokens of an episode sum to its R.
    """
    w = surprise(old_logprob)
    total = w.new_zeros(len(R)).index_add(0, episode_ids, w)
    return w / total[episode_ids] * R.double()[episode_ids]  # L2T Alg. 1 l. 11


def truncated_mean(values: Tensor, keep: float = 0.95) -> Tensor:
    """Mean of values [T] without the floor((1 - keep) / 2 · T) smallest and as many largest. Scalar."""
    drop = math.floor((1 - keep) / 2 * len(values) + 1e-9)  # the sum rounds: 0.05 · 20 may come out below 1
    return values.sort().values[drop : len(values) - drop].mean()  # L2T Alg. 1 l. 13


def group_normalise(values: Tensor, eps: float = 1e-6, std: str = "sample") -> Tensor:
    """(v - mean) / (std + eps) over one group, [G] -> [G]; zeros for equal values and for a group of one."""
    if len(values) == 1 and std != "none":
        return torch.zeros_like(values)
    return group_advantages(values[None], std, eps)[0]  # L2T Alg. 1 l. 14


def token_advantages(
    rewards: Sequence[Tensor],
    keep: float = 0.95,
    mode: str = "guarded",
    statistic: str = "token_trunc_mean",
    returns: Tensor | None = None,
    eps: float = 1e-8,
    max_ratio: float = 10.0,
    *,
    std: str = "sample",
    states: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Advantage of every token of one group: G completions with token rewards [T_i] -> list of [T_i] fp64.

    mode        how a completion's advantage is spread over its tokens: "uniform" (every token gets it),
                "paper" (`paper_credit`), "guarded" (`guarded_credit`), or "to_go"
                (`to_go_advantages(*states)`, which uses no other argument)
    statistic   what the group compares; `group_statistic` explains it, keep, returns, eps and std

    Groups without differences get zeros. Raises ValueError for an unknown mode or statistic.
    """
    if mode == "to_go":
        if states is None:
            raise ValueError('mode "to_go" needs states: what to_go_advantages takes')
        return to_go_advantages(*states)
    rewards = [r.double() for r in rewards]
    A, centers = group_statistic(rewards, statistic, keep, returns, eps, std)
    if mode == "uniform":
        return [a.expand(len(r)) for a, r in zip(A, rewards)]
    if mode == "paper":
        return [paper_credit(a, r, center) for a, r, center in zip(A, rewards, centers)]
    if mode == "guarded":
        floor = GUARD * centers.abs().mean()
        return [guarded_credit(a, r, center, floor, max_ratio) for a, r, center in zip(A, rewards, centers)]
    raise ValueError(f"mode must be uniform, paper, guarded or to_go, not {mode!r}")


def group_statistic(
    rewards: Sequence[Tensor],
    statistic: str,
    keep: float = 0.95,
    returns: Tensor | None = None,
    eps: float = 1e-8,
    std: str = "sample",
) -> tuple[Tensor, Tensor]:
    """Advantage A [G] of each completion in its group, and the statistic per token [G] that divides the
    ratio.

    statistic   "return_sum": the return, divided by std + 1e-6 exactly as GRPO does; per token, the mean
                reward. "token_trunc_mean": the mean of the central `keep` of the token rewards, divided by
                std + eps
    returns     [G] exact returns in fp64 for return_sum; None: the sums of the token rewards, which carry
                their rounding
    std         "sample", "population" or "none", as in `group_advantages`
    """
    if statistic == "return_sum":
        totals = torch.stack([r.sum() for r in rewards]) if returns is None else returns.double()
        return group_normalise(totals, std=std), torch.stack([r.mean() for r in rewards])
    if statistic == "token_trunc_mean":
        centers = torch.stack([truncated_mean(r, keep) for r in rewards])
        return group_normalise(centers, eps, std), centers
    raise ValueError(f"statistic must be token_trunc_mean or return_sum, not {statistic!r}")


def paper_credit(A: Tensor, r: Tensor, center: Tensor) -> Tensor:
    """Compute A r_t / center, [T], from token rewards r [T]; A for every token if center rounds to 0."""
    if center.abs() <= ROUNDING * r.abs().max():
        return A.expand(len(r))
    return A * (r / center)  # L2T Alg. 1 l. 15


def guarded_credit(A: Tensor, r: Tensor, center: Tensor, floor: Tensor, max_ratio: float) -> Tensor:
    """`paper_credit` with the ratio clipped to ±max_ratio, [T]. Every token gets A where the ratio is not
    meaningful: if A and center differ in sign, or |center| is at most `floor`, or 0 up to rounding.
    """
    if A * center <= 0 or center.abs() <= max(floor, ROUNDING * r.abs().max()):
        return A.expand(len(r))
    return A * (r / center).clamp(-max_ratio, max_ratio)


def discounted(rewards: Tensor, lam: float) -> Tensor:
    """Discounted sums sum_{j >= k} lam^(j-k) rewards_j, [K] -> [K]; lam 1 gives plain returns-to-go."""
    out = rewards.clone()
    for k in range(len(rewards) - 2, -1, -1):
        out[k] += lam * out[k + 1]
    return out


def step_advantages(
    outcomes: Tensor,
    r_prg: Sequence[Tensor],
    alpha: float,
    lam: float,
    std: str = "sample",
    eps: float = 1e-6,
) -> list[Tensor]:
    """Advantage of each episode of a group: its own and later normalised rewards. List of [K_i] fp64.

        A_k = sum_{j >= k} lam^(j-k) z_j,      z = (R - mean) / (std + eps)

    R holds alpha r_prg_k [K_i] of all episodes and the outcomes [G], normalised together. The answer is part
    of the last episode, so the outcome's z is added there. lam 1 is IGPO (2510.14967) as printed, with gamma
    = 1. std: "sample", "population" or "none". Zeros if all R are equal.
    """
    K = [len(r) for r in r_prg]
    R = torch.cat([*(alpha * r.double() for r in r_prg), outcomes.double()])
    *z, outcome = group_normalise(R, eps, std).split([*K, len(outcomes)])
    for own, last in zip(z, outcome):
        own[-1] += last
    return [discounted(own, lam) for own in z]


def local_advantages(r_out: float, J: Tensor, cost: Tensor, lam: float) -> Tensor:
    """Advantage of each episode over the value of the state where it begins, [K] fp64.

    VinePPO (2410.01679), per episode:

        A_k = sum_{j >= k} lam^(j-k) d_j
        d_k = J_k - J_{k-1} - cost_k  for k < K,      d_K = r_out - J_{K-1} - cost_K

    J [K+1]: accuracy of continuations, an estimate of the state's value; cost [K]: an episode's penalty,
    alpha beta C.

    Unbiased for any lam and any number of continuations, even one: given the state and the episode, J_k and
    J_{k-1} are in expectation the values after and before it, so d_k is the episode's advantage, and later
    d_j have expectation 0 under the policy except for their cost. A larger lam adds their noise and, if J is
    a biased estimate, removes its bias: lam 1 is r_out - J_{k-1} minus costs, with J only a baseline. There
    is no group baseline, so a group whose answers are all wrong still has different advantages. J from forced
    answers is a biased value.
    """
    d = torch.cat([J.double()[1:-1], J.new_tensor([r_out]).double()]) - J.double()[:-1] - cost
    return discounted(d, lam)


def batch_scaled(
    advantages: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> list[Tensor]:
    """Divide token advantages [T_i] by their rms over the tokens of all ranks; zeros if the rms is 0."""
    squares = sum((a.double().square().sum() for a in advantages), torch.zeros((), dtype=torch.float64))
    count = torch.tensor(float(sum(len(a) for a in advantages)), dtype=torch.float64)
    squares, count = reduce(torch.stack([squares, count]))
    rms = (squares / count.clamp(min=1)).sqrt()
    return [a / rms if rms > 0 else torch.zeros_like(a) for a in advantages]


def returns_to_go(r_out: float, r_prg: Tensor, alpha: float) -> Tensor:
    """Returns-to-go r_out + alpha sum_{j >= k} r_prg_j, [K] fp64. The first is the return."""
    return r_out + alpha * r_prg.double().flip(0).cumsum(0).flip(0)


def to_go_advantages(
    to_go: Sequence[Tensor], J: Sequence[Tensor], episode_ids: Sequence[Tensor], scaled: bool = True
) -> list[Tensor]:
    """Advantages by return-to-go minus a baseline of the episode's state. List of [T_i] fp64.

        D_ik = G_ik - b_i(J_{i,k-1}, n_{i,k-1})       A_t = D_ik / rms(D over the group's tokens), t in k

    to_go [K_i] are returns-to-go G_ik; J [K_i + 1] predicted correctness, with J_{k-1} that of the state
    where episode k begins; n_{k-1} the number of tokens before it; episode_ids [T_i]. b_i is the
    least-squares plane of G over J and n through the tokens of the *other* completions of the group, clamped
    between their smallest and largest G.

    Unbiased up to a positive scale: J_{k-1} and n_{k-1} are known before the episode is written, and b_i
    comes from other completions, so the baseline does not depend on the episode or on what follows.
    Subtracting such a baseline, or leaving out earlier rewards, does not change the expected policy gradient.
    The baseline is a fit and not J itself because G contains -alpha J_{k-1} (the gains telescope) and J may
    be uncalibrated; if J predicts nothing, its coefficient is 0. The token count predicts the penalties that
    are still to come.

    scaled: False leaves out the division by the group's rms, for a scale over the whole step
    (`batch_scaled`). Zeros for a group of one, for equal returns, and where differences are of rounding size.
    """
    G = [values.double() for values in to_go]
    targets = [values[ids] for values, ids in zip(G, episode_ids)]
    returns = torch.stack([values[0] for values in G])
    size = returns.abs().max()
    if len(G) == 1 or returns.max() - returns.min() <= ROUNDING * size:
        return [torch.zeros_like(y) for y in targets]
    states = _states(J, episode_ids)
    planes = _planes_of_the_others(states, targets)
    D = []
    for i, (x, y, plane) in enumerate(zip(states, targets, planes)):
        others = torch.cat(G[:i] + G[i + 1 :])
        D.append(y - (x @ plane).clamp(others.min(), others.max()))
    rms = torch.cat(D).square().mean().sqrt()
    return [torch.zeros_like(d) if rms <= ROUNDING * size else d / rms if scaled else d for d in D]


def _states(J: Sequence[Tensor], episode_ids: Sequence[Tensor]) -> list[Tensor]:
    """Features of the state where each token's episode begins: 1, J_{k-1}, n_{k-1} / longest. List of [T_i,
    3] fp64.
    """
    longest = max(len(ids) for ids in episode_ids)
    states = []
    for values, ids in zip(J, episode_ids):
        n = torch.searchsorted(ids, ids) / longest  # ids are sorted: counts tokens of earlier episodes
        states.append(torch.stack([torch.ones_like(n), values[:-1][ids], n], 1).double())
    return states


def _planes_of_the_others(states: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Coefficients [G, 3] of the least-squares plane through the tokens of all other completions."""
    squares = torch.stack([x.T @ x for x in states])
    products = torch.stack([x.T @ y for x, y in zip(states, targets)])
    inverse = torch.linalg.pinv(squares.sum(0) - squares, rtol=1e-9, hermitian=True)  # J or n may be constant
    return (inverse @ (products.sum(0) - products)[..., None])[..., 0]
