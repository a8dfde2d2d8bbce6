"""Statistics of graded attempts: pass@k, maj@k, AES, and confidence intervals.

    pass@k   = 1 - C(n - c, k) / C(n, k)            probability of a right one among k of n, c right
    maj@k    = E[the most frequent answer of k samples is right]
    AES      = dL + 3 dA  if dA >= 0,  else  dL - 5 |dA|
               dA = (accuracy - base accuracy) / base accuracy,  dL = (base tokens - tokens) / base tokens

    clustered_interval    of one policy's accuracy
    paired_bootstrap      of the difference of two policies, on the same problems and seeds
    aes_interval          of AES, on the same problems and seeds

Intervals are at 95 %. Their unit is the problem: samples of one problem are correlated, so they are not
independent observations of other problems. The bootstrap draws problems with replacement, and seeds if there
are several, the same ones for both policies.

Departures: the Long⊗Short paper prints a coefficient of -5 for a negative dA, which would reward a loss of
accuracy; its table uses -5 |dA|, as here. pass@k and maj@k are means over all subsets of k of the n samples,
not over the first k.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # 97.5 % quantile of the standard normal
DRAWS = 10_000
AT_ONCE = 100  # draws that are averaged together: fewer calls of numpy, in memory that a cache holds


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that one of k samples is right, from n samples with c right. Chen et al. 2021, Eq.
    1

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    """Exact expected accuracy of the majority vote among k of these answers, over all subsets of k.

    Answers are compared by ==, so they should be canonical (`grading.canonical`); None has no vote. If m
    answers tie, each wins with probability 1/m. Raises ValueError unless 1 <= k <= len(answers).
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= n, not n={n}, k={k}")
    rivals = Counter(answer for answer in answers if answer is not None)
    silent = n - rivals.total()
    right = rivals.pop(gold, 0)
    wins = Fraction(0)
    for lead in range(1, min(right, k) + 1):  # the gold answer has so many votes, and no answer has more
        # (members left to draw, leaders) -> how many subsets
        subsets = Counter({(k - lead, 1): math.comb(right, lead)})
        for votes in rivals.values():
            extended: Counter[tuple[int, int]] = Counter()
            for (left, leaders), ways in subsets.items():
                for drawn in range(min(votes, lead, left) + 1):
                    extended[left - drawn, leaders + (drawn == lead)] += ways * math.comb(votes, drawn)
            subsets = extended
        wins += sum(
            Fraction(ways * math.comb(silent, left), leaders) for (left, leaders), ways in subsets.items()
        )
    return float(wins / math.comb(n, k))


def aes(accuracy: float, tokens: float, base_accuracy: float, base_tokens: float) -> float:
    """Accuracy-Efficiency Score relative to a base model (O1-Pruner), from accuracies and mean tokens.

    Raises ValueError if the base's accuracy or tokens are 0.
    """
    if base_accuracy <= 0 or base_tokens <= 0:
        raise ValueError(f"AES is relative to a base: {base_accuracy=} and {base_tokens=} must be above 0")
    gain = (accuracy - base_accuracy) / base_accuracy
    saving = (base_tokens - tokens) / base_tokens
    return saving + (3 if gain >= 0 else 5) * gain


def clustered_interval(correct: ArrayLike) -> tuple[float, float, float]:
    """Accuracy, low, high from outcomes [P, N] in [0, 1], N samples for each of P problems ([P]: one each).

    Wilson's interval for p in n independent samples. n = p (1 - p) / SE² is the number of independent samples
    with the standard error of the P problem means, SE² = sum (m_i - p)² / P²: it is P if the samples of a
    problem are all equal, and at most PN. With a single problem, and if all samples are right or all wrong, n
    = P. Unlike p ± 2 SE the interval stays in [0, 1], and does not have length 0 for 10 right of 10.
    """
    outcomes = np.asarray(correct, dtype=np.float64)
    outcomes = outcomes.reshape(len(outcomes), -1)
    (problems, samples), p = outcomes.shape, float(outcomes.mean())
    variance = p * (1 - p)
    squared_error = float(((outcomes.mean(1) - p) ** 2).sum()) / problems**2
    size = float(problems)
    if variance > 0 and problems > 1:
        size = problems * samples
        if squared_error > variance / size:
            size = variance / squared_error
    scale = 1 + Z**2 / size
    centre = (p + Z**2 / (2 * size)) / scale
    half = Z * math.sqrt(variance / size + Z**2 / (4 * size**2)) / scale
    return p, max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Mean a - mean b, low, high from values per problem, [P], or per seed and problem, [S, P].

    Entries of a and b at the same index are of the same problem and seed. The interval is percentiles of
    resampled differences. With few seeds it is too narrow: resampling S values has (S - 1) / S of their
    variance.
    """
    a, b = _paired(a, b)
    differences = [x - y for x, y in _resampled_means((a, b), draws, seed)]
    return float(a.mean() - b.mean()), *_percentiles(differences)


def aes_interval(
    accuracy: ArrayLike,
    tokens: ArrayLike,
    base_accuracy: ArrayLike,
    base_tokens: ArrayLike,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """AES, low, high from values [P] or [S, P] as in `paired_bootstrap`.

    A draw in which the base model is never right has no AES: it counts as -inf for the lower end and as +inf
    for the upper end, so an end is infinite if 2.5 % of the draws are such. Raises ValueError as `aes` does.
    """
    measured = _paired(accuracy, tokens, base_accuracy, base_tokens)
    score = aes(*(float(values.mean()) for values in measured))
    scores = [aes(*means) if means[2] > 0 else math.nan for means in _resampled_means(measured, draws, seed)]
    return score, *_percentiles(scores)


def _paired(*arrays: ArrayLike) -> list[np.ndarray]:
    """Convert each to [S, P] fp64. Raises ValueError unless all have the same shape."""
    measured = [np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in arrays]
    shapes = {values.shape for values in measured}
    if len(shapes) > 1 or measured[0].size == 0 or measured[0].ndim > 2:
        raise ValueError(f"paired values must be of one shape, [P] or [S, P], not {sorted(shapes)}")
    return measured


def _resampled_means(measured: Sequence[np.ndarray], draws: int, seed: int) -> list[list[float]]:
    """Means of each [S, P] array in every draw, over seeds and problems drawn with replacement, the same for
    all.
    """
    random = np.random.default_rng(seed)
    seeds, problems = measured[0].shape
    drawn = [
        (random.integers(seeds, size=seeds), random.integers(problems, size=problems)) for _ in range(draws)
    ]
    means = []
    for start in range(0, draws, AT_ONCE):
        rows, columns = (np.stack(part) for part in zip(*drawn[start : start + AT_ONCE]))
        places = (rows[:, :, None] * problems + columns[:, None, :]).reshape(len(rows), -1)
        means.append(np.stack([values.ravel()[places].mean(1) for values in measured], 1))
    return np.concatenate(means).tolist()


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Percentiles 2.5 (NaN counts as -inf) and 97.5 (NaN as +inf), without interpolation."""
    drawn = np.asarray(values)
    low, high = (np.where(np.isnan(drawn), end, drawn) for end in (-np.inf, np.inf))
    return float(np.quantile(low, 0.025, method="lower")), float(np.quantile(high, 0.975, method="higher"))
