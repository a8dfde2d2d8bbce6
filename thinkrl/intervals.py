"""What graded attempts say about a policy, and how far that can be trusted. Pure functions of numbers.

    pass@k   = 1 - C(n - c, k) / C(n, k)            chance that k of n samples, c of them right, hold a right one
    maj@k    = E[the commonest answer of k samples is the gold one]
    AES      = dL + 3 dA  if dA >= 0,  else  dL - 5 |dA|
               dA = (accuracy - base accuracy) / base accuracy,  dL = (base tokens - tokens) / base tokens

    clustered_interval    of one policy's accuracy
    paired_bootstrap      of the difference of two, on the same problems and seeds
    aes_interval          of AES, likewise

Intervals hold 95 %. Their unit is the problem: several samples of one are alike, so they are no independent
observations of how the policy does on other problems. Resampling draws problems with replacement, and with several
seeds also seeds, the same ones for both policies.

Departures: the Long⊗Short paper prints a coefficient of -5 for a negative dA, which would reward a loss of
accuracy; its own table follows -5 |dA|, as here. pass@k and maj@k are means over all subsets of k of the n
samples, not over the first k.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # 97.5 % of a standard normal lie below it
DRAWS = 10_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which c are. Chen et al. 2021, Eq. 1.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    """Expected accuracy of the majority vote among k of these answers, over all subsets of k. Exact.

    Answers are compared by ==, so they should be canonical (`grading.canonical`); None is no answer and has
    no vote. When m answers share the lead, each wins with chance 1/m. Raises ValueError unless 1 <= k <=
    len(answers).
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= n, not n={n}, k={k}")
    rivals = Counter(answer for answer in answers if answer is not None)
    silent = n - rivals.total()
    right = rivals.pop(gold, 0)
    wins = Fraction(0)
    for lead in range(1, min(right, k) + 1):  # the gold answer has this many votes, and nobody has more
        subsets = Counter(
            {(k - lead, 1): math.comb(right, lead)}
        )  # (members left to draw, leaders) -> how many subsets
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
    """Accuracy-Efficiency Score against a base model (O1-Pruner). Accuracies in the same unit, tokens per answer.

    Raises ValueError for a base without accuracy or tokens, to which nothing can be relative.
    """
    if base_accuracy <= 0 or base_tokens <= 0:
        raise ValueError(f"AES is relative to a base: {base_accuracy=} and {base_tokens=} must be above 0")
    gain = (accuracy - base_accuracy) / base_accuracy
    saving = (base_tokens - tokens) / base_tokens
    return saving + (3 if gain >= 0 else 5) * gain


def clustered_interval(correct: ArrayLike) -> tuple[float, float, float]:
    """(accuracy, low, high) of outcomes [P, N] in [0, 1]: N samples at each of P problems. [P] is one sample each.

    Wilson's interval for p observed in n independent samples, with n = p (1 - p) / SE², the number of independent samples
    that would have the standard error of the P problem means, SE² = sum (m_i - p)² / P². That is P if a problem's samples
    are all alike, and at most PN. Where nothing shows how alike they are, n = P: with a single problem, and where all
    samples are right or all wrong. Unlike p ± 2 SE it never leaves [0, 1], and 10 right of 10 is no certainty.
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
    """(mean a - mean b, low, high) for values per problem, [P], or per seed and problem, [S, P].

    Entry by entry, a and b are the same problem and the same seed. Percentiles of resampled differences. Of few seeds
    the interval is too narrow: resampling S values sees (S - 1) / S of their variance.
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
    """(AES, low, high) from values per problem, [P], or per seed and problem, [S, P], paired as in `paired_bootstrap`.

    A draw in which the base model is never right has no AES and may lie anywhere: it counts as -inf for the lower and as
    +inf for the upper end, which are infinite if 2.5 % of the draws are such. Raises ValueError as `aes` does.
    """
    measured = _paired(accuracy, tokens, base_accuracy, base_tokens)
    score = aes(*(float(values.mean()) for values in measured))
    scores = [aes(*means) if means[2] > 0 else math.nan for means in _resampled_means(measured, draws, seed)]
    return score, *_percentiles(scores)


def _paired(*arrays: ArrayLike) -> list[np.ndarray]:
    """Each as [S, P] fp64. Raises ValueError unless all have the same shape."""
    measured = [np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in arrays]
    shapes = {values.shape for values in measured}
    if len(shapes) > 1 or measured[0].size == 0 or measured[0].ndim > 2:
        raise ValueError(f"paired values must be of one shape, [P] or [S, P], not {sorted(shapes)}")
    return measured


def _resampled_means(measured: Sequence[np.ndarray], draws: int, seed: int) -> list[list[float]]:
    """Per draw, the mean of each [S, P] array over S seeds and P problems, drawn with replacement, the same for all."""
    random = np.random.default_rng(seed)
    seeds, problems = measured[0].shape
    means = []
    for _ in range(draws):
        drawn = np.ix_(random.integers(seeds, size=seeds), random.integers(problems, size=problems))
        means.append([float(values[drawn].mean()) for values in measured])
    return means


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5th, with NaN taken as -inf, and the 97.5th, with NaN as +inf: values that were drawn, none in between."""
    drawn = np.asarray(values)
    low, high = (np.where(np.isnan(drawn), end, drawn) for end in (-np.inf, np.inf))
    return float(np.quantile(low, 0.025, method="lower")), float(np.quantile(high, 0.975, method="higher"))
