"""Estimators against enumeration, intervals against arithmetic, scores against the paper's table."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkrl.intervals import Z, aes, aes_interval, clustered_interval, maj_at_k, paired_bootstrap, pass_at_k


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(2000, 1000, 1) == 0.5


def test_maj_at_k_by_hand():
    assert maj_at_k(["a", "a", "b"], "a", 3) == 1.0
    assert maj_at_k(["a", "a", "b"], "b", 3) == 0.0
    assert maj_at_k(["a", "b"], "a", 2) == 0.5  # a tie
    # {a,b,c} twice, a third of a win each
    assert maj_at_k(["a", "b", "c", "c"], "a", 3) == pytest.approx(2 / 4 / 3)
    assert maj_at_k(["a", None, None], "a", 3) == 1.0  # who says nothing has no vote
    assert maj_at_k([None, None], "a", 2) == 0.0
    assert maj_at_k(["a", "b", "b", "a"], "a", 1) == 0.5


def vote(subset, gold):
    counts = {a: subset.count(a) for a in subset if a is not None}
    leaders = [a for a in counts if counts[a] == max(counts.values())]
    return (gold in leaders) / max(len(leaders), 1)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8), st.integers(1, 8))
def test_estimators_equal_the_mean_over_all_subsets(answers, k):
    k = min(k, len(answers))
    subsets = list(combinations(answers, k))
    assert maj_at_k(answers, "a", k) == pytest.approx(sum(vote(s, "a") for s in subsets) / len(subsets))
    assert pass_at_k(len(answers), answers.count("a"), k) == pytest.approx(
        sum("a" in s for s in subsets) / len(subsets)
    )


def test_many_samples_are_no_obstacle():
    answers = ["a"] * 90 + ["b"] * 80 + [f"c{i}" for i in range(30)]
    assert 0.5 < maj_at_k(answers, "a", 64) < 1.0
    assert maj_at_k(answers, "a", 200) == 1.0


def test_impossible_counts_are_refused():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)
    for k in (0, 2):
        with pytest.raises(ValueError, match="maj@k needs"):
            maj_at_k(["a"], "a", k)


def test_aes_reproduces_the_papers_table():
    assert aes(61.554, 2113, 65.476, 24566) == pytest.approx(0.6145, abs=5e-5)  # LS Table 2, Qwen
    assert aes(58.798, 2402, 60.004, 28496) == pytest.approx(0.8152, abs=5e-5)  # LS Table 2, Llama
    assert aes(35.82, 1623, 65.476, 24566) == pytest.approx(-1.3307, abs=5e-5)
    assert aes(0.6, 50, 0.5, 100) == pytest.approx(0.5 + 3 * 0.2)
    assert aes(0.4, 50, 0.5, 100) == pytest.approx(0.5 - 5 * 0.2)
    assert aes(0.5, 100, 0.5, 100) == 0.0


@pytest.mark.parametrize("base_accuracy, base_tokens", [(0.0, 10.0), (0.5, 0.0)])
def test_aes_needs_a_base(base_accuracy, base_tokens):
    with pytest.raises(ValueError, match="relative to a base"):
        aes(0.5, 10, base_accuracy, base_tokens)


def wilson(p, n):
    """The two solutions q of (q - p)² = Z² q (1 - q) / n."""
    return np.roots([1 + Z**2 / n, -(2 * p + Z**2 / n), p**2])[::-1]


@pytest.mark.parametrize(
    "correct, p, n",
    [
        ([1, 1, 0, 1], 3 / 4, 4),  # one sample each: as many as there are problems
        ([[1] * 5, [1] * 5, [0] * 5, [1] * 5], 3 / 4, 4),  # samples all alike count once
        # no problem differs from another: eight independent samples
        ([[1, 0], [1, 0], [0, 1], [1, 0]], 1 / 2, 8),
        # means 1, 1/2, 1/2, 0; SE² = (1/4 + 1/4) / 16 = 1/32; n = (1/4) / (1/32)
        ([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], 1 / 2, 8),
        ([[1, 1], [1, 1], [1, 1]], 1, 3),  # nothing shows how alike a problem's samples are
        ([[0, 0], [0, 0], [0, 0]], 0, 3),
        ([[1, 0, 1, 1]], 3 / 4, 1),  # one problem says little of others
        ([0.5, 0.25], 3 / 8, 2),  # chances instead of outcomes; their own n would be larger than 2
    ],
)
def test_clustered_interval_is_wilson_s_of_the_effective_number_of_samples(correct, p, n):
    mean, low, high = clustered_interval(correct)
    assert mean == pytest.approx(p)
    assert [low, high] == pytest.approx(wilson(p, n), abs=1e-6)
    assert 0 <= low <= mean <= high <= 1


def test_ten_of_ten_is_no_certainty():
    mean, low, high = clustered_interval([1] * 10)
    assert (mean, high) == (1, pytest.approx(1)) and low == pytest.approx(10 / (10 + Z**2))


def test_the_interval_covers_what_it_says():
    """2,000 evaluations of a policy whose chance differs from problem to problem: its mean is inside 95 % of
    them. Were the samples taken as independent, it would be inside fewer than two thirds.
    """
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        chances = random.beta(0.5, 0.5, size=(60, 1))  # mean 1/2
        _, low, high = clustered_interval(random.random((60, 8)) < chances)
        inside += low <= 0.5 <= high
    assert abs(inside / 2000 - 0.95) < 0.02  # four standard errors


def test_a_difference_without_spread_is_sure():
    a, b = [0.5, 1.0, 0.25, 0.75], [0.25, 0.75, 0.0, 0.5]  # 1/4 better on every problem
    assert paired_bootstrap(a, b, draws=50) == (0.25, 0.25, 0.25)
    assert paired_bootstrap(a, a, draws=50) == (0.0, 0.0, 0.0)


def test_two_problems_by_hand():
    # better by 1 on one problem, equal on the other: of four draws of two, one has 0, two have 1/2, one has 1
    assert paired_bootstrap([1, 0], [0, 0], draws=2000) == (0.5, 0.0, 1.0)


def every_draw(x):
    """The means over all equally likely draws of seeds and problems of [S, P]."""
    seeds, problems = x.shape
    draws = product(product(range(seeds), repeat=seeds), product(range(problems), repeat=problems))
    return np.array([x[np.ix_(s, p)].mean() for s, p in draws])


def test_seeds_and_problems_are_both_drawn():
    """Against all 2² × 3³ draws: where both differ, where only seeds do, where only problems do."""
    random = np.random.default_rng(0)
    for x in (random.random((2, 3)), np.array([[0.0] * 3, [1.0] * 3]), np.array([[0.0, 0.5, 1.0]] * 2)):
        exact = every_draw(x)
        difference, low, high = paired_bootstrap(x, np.zeros_like(x), draws=20_000)
        assert difference == pytest.approx(x.mean())
        for end, share in ((low, 0.025), (high, 0.975)):  # a percentile of the draws is one of the exact ones
            below, up_to = np.mean(exact < end - 1e-12), np.mean(exact < end + 1e-12)
            assert below - 0.01 <= share <= up_to + 0.01


def test_pairing_matters():
    """Problems differ by far more than the two policies do: paired, the small difference is seen."""
    hard = np.linspace(0, 1, 40)
    _, low, high = paired_bootstrap(hard + 0.01, hard, draws=200)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    _, low, high = paired_bootstrap(hard + 0.01, hard[::-1], draws=200)
    assert low < 0 < high


def test_aes_interval_by_hand():
    # the same accuracy and half the tokens on every problem: 1/2 whatever is drawn
    assert aes_interval([1, 1], [5, 10], [1, 1], [10, 20], draws=50) == (0.5, 0.5, 0.5)
    # as many tokens; right on one more of two problems than the base: 3 · (1 - 1/2) / (1/2) = 3; the draw of
    # two of the first problem has 0, and that of two of the second no AES, because the base is never right
    # there
    score, low, high = aes_interval([1, 1], [9, 9], [1, 0], [9, 9], draws=2000)
    assert (score, low, high) == (3.0, -np.inf, np.inf)
    with pytest.raises(ValueError, match="relative to a base"):
        aes_interval([1, 1], [9, 9], [0, 0], [9, 9])


def test_a_loss_of_accuracy_costs_more_than_a_gain_pays():
    correct, tokens = np.array([[1, 1, 1, 0]]), np.full((1, 4), 9)
    gain = aes_interval(np.ones((1, 4)), tokens, correct, tokens, draws=400)
    loss = aes_interval(correct, tokens, np.ones((1, 4)), tokens, draws=400)
    assert gain[0] == pytest.approx(3 * (1 / 4) / (3 / 4)) and loss[0] == pytest.approx(-5 / 4)
    assert gain[1] == 0 and loss[2] == 0  # a draw without the last problem
    assert loss[1] < -5 / 4 and gain[2] > 1


def test_a_seed_of_the_draws_repeats_them():
    random = np.random.default_rng(0)
    a, b = random.random((2, 3, 20))
    assert paired_bootstrap(a, b, 100, seed=1) == paired_bootstrap(a, b, 100, seed=1)
    assert paired_bootstrap(a, b, 100, seed=1) != paired_bootstrap(a, b, 100, seed=2)


def test_what_is_not_paired_is_refused():
    for a, b in (([1, 2], [1, 2, 3]), ([], []), (np.zeros((1, 1, 1)), np.zeros((1, 1, 1)))):
        with pytest.raises(ValueError, match="paired values must be of one shape"):
            paired_bootstrap(a, b)
