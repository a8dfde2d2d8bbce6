"""Each length-shaped reward is held to numbers worked out by hand and to what released code computes."""

import math

import pytest
import torch

from thinkrl import length

# Three of four right; one of four; none; all, at one length. Right lengths of the first group: mean 20, std
# 10.
CORRECT = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
TOKENS = torch.tensor([[10, 20, 60, 30], [40, 10, 20, 10], [5, 15, 25, 35], [8, 8, 8, 8]])
NEAR = 1 / (1 + math.exp(-1)) / 5  # a fifth of sigmoid(1)


def rewards(name, **options):
    return getattr(length, name)(CORRECT, TOKENS, **options)


def close(x, expected, atol=1e-9):
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("truncation", dict(limit=20), [[1, 1, 0, 0], [0, 0, 1, 0], [0] * 4, [1] * 4]),
        # from 10 to 30 tokens the penalty falls by 1 / 20 per token
        (
            "overlong",
            dict(limit=30, cache=20),
            [[1, 0.5, -1, 0], [-1, 0, 0.5, 0], [0, -0.25, -0.75, -1], [1] * 4],
        ),
        (
            "l1_exact",
            dict(target=20, alpha=0.01),
            [[0.9, 1, -0.4, 0.9], [-0.2, -0.1, 1, -0.1], [-0.15, -0.05, -0.05, -0.15], [0.88] * 4],
        ),
        ("l1_max", dict(target=20, alpha=0.05), [[0.75, 0.5, 0, 0.25], [0, 0, 0.5, 0], [0] * 4, [0.8] * 4]),
        ("l1_max", dict(target=20, alpha=0.5), [[1, 0.5, 0, 0], [0, 0, 0.5, 0], [0] * 4, [1] * 4]),
        # lambda of the first group: .5, .3, -.5, .1; a wrong answer keeps only what is negative of its own
        (
            "kimi",
            dict(weight=1.0),
            [[1.5, 1.3, -0.5, 1.1], [-0.5, 0, 7 / 6, 0], [0, 0, -1 / 6, -0.5], [1] * 4],
        ),
        # z = -1, 0, 1; a lone right answer has z = 20; equal ones z = 0
        (
            "arora_zanette",
            dict(alpha=0.2),
            [[0.8 + NEAR, 0.9, 0, 1 - NEAR], [0, 0, 0.8, 0], [0] * 4, [0.9] * 4],
        ),
        ("laser", dict(limit=20, weight=0.5), [[1.5, 1.5, 0, 1], [0, 0, 1.5, 0], [0] * 4, [1.5] * 4]),
        (
            "laser",
            dict(limit=torch.tensor([[10], [30], [30], [7]]), weight=0.5),
            [[1.5, 1, 0, 1], [0, 0, 1.5, 0], [0] * 4, [1] * 4],
        ),
        # the shortest right answer has 10, 20 and 8 tokens; the third group's mean is 20
        (
            "shorter_better",
            dict(alpha=2.0, beta=0.1),
            [[2, 1, -5, 0], [-2, -1, 2, -1], [-1.5, -0.5, -0.5, -1.5], [2] * 4],
        ),
        # a third, two thirds, twice and once the mean of 30; the mean of the second group is 20
        ("gr3", dict(alpha=1.0), [[0.75, 0.6, 0, 0.5], [0, 0, 0.5, 0], [0] * 4, [0.5] * 4]),
        # weight mean(c) = .3, .1, 0, .4, times n / max
        (
            "prime_linear",
            dict(weight=0.4),
            [[0.95, 0.9, -0.3, 0.85], [-0.1, -0.025, 0.95, -0.025], [0] * 4, [0.6] * 4],
        ),
        ("priced", dict(price=0.04), [[0.6, 0.2, 0, 0], [0, 0, 0.2, 0], [0] * 4, [0.68] * 4]),
    ],
)
def test_by_hand(name, options, expected):
    close(rewards(name, **options), expected, atol=1e-7)  # arora_zanette's eps of 1e-6


# Written by the loops of LASER's length_penalty.py (compute_kimi_penalty, compute_norm_length_penalty,
# compute_length_reward_larse), of ShorterBetter's reward manager, both with 0 for a wrong answer, and by trl
# 1.16.0's get_soft_overlong_punishment, in fp32 on the batch above; gfpo by the formula of trl 0.26's
# GFPOTrainer in fp64.
GOLDEN = {
    "kimi": (dict(weight=0.4), [[1.2, 1.12, -0.2, 1.04], [-0.2, 0, 1.066667, 0], [0, 0, -0.066667, -0.2], [1] * 4]),
    "arora_zanette": (
        dict(alpha=0.2),
        [[0.946212, 0.9, 0, 0.853788], [0, 0, 0.8, 0], [0] * 4, [0.9] * 4],
    ),
    "laser": (dict(limit=20), [[1.5, 1.5, 0, 1], [0, 0, 1.5, 0], [0] * 4, [1.5] * 4]),
    "shorter_better": (
        dict(),
        [[2, 1.99, -0.05, 1.98], [-0.02, -0.01, 2, -0.01], [-0.015, -0.005, -0.005, -0.015], [2] * 4],
    ),
    "overlong": (
        dict(limit=30, cache=20),
        [[1, 0.5, -1, 0], [-1, 0, 0.5, 0], [0, -0.25, -0.75, -1], [1] * 4],
    ),
    "gfpo": (
        dict(keep=3),
        [[0] * 4, [0, -0.577250287, 1.154500573, -0.577250287], [0] * 4, [0] * 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_against_released_code(name):
    options, expected = GOLDEN[name]
    close(rewards(name, **options), expected, atol=1e-9 if name == "gfpo" else 1e-6)


def test_l1_max_is_the_paper_s_line_at_half_its_alpha():
    paper = CORRECT * (0.025 * (20 - TOKENS).double() + 0.5).clamp(0, 1)
    torch.testing.assert_close(rewards("l1_max", target=20, alpha=0.05), paper)


def test_gfpo_by_hand():
    """The two shortest: 10 and 20, both right; 10 and 10, both wrong; 5 and 15; the first two of 8. Nothing
    to compare.
    """
    assert rewards("gfpo", keep=2).abs().sum() == 0
    # all of them: the second group's mean is 1/4 and its std 1/2
    close(rewards("gfpo", keep=4, eps=0.0)[1], [-0.5, -0.5, 1.5, -0.5])
    # of 30, 10 (right), 20 (right), 10: the two of 10
    pair = length.gfpo(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[30, 10, 20, 10]]), keep=2, eps=0.0)
    close(pair, [[0, math.sqrt(0.5), 0, -math.sqrt(0.5)]])
    for keep in (1, 5):
        with pytest.raises(ValueError, match=f"not {keep}"):
            rewards("gfpo", keep=keep)


def test_laser_d_gives_each_band_its_limit():
    """G = 6, so a band wants 1/4, 1/2 or all of its attempts within the limit: m = 4, 2, 1."""
    correct = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6])
    tokens = torch.tensor(
        [[5, 9, 20, 20, 20, 20], [9, 11, 12, 30, 30, 30], [9, 9, 9, 9, 9, 24], [9, 9, 9, 9, 9, 25]]
    )
    limits = length.laser_d_limits(correct, tokens, torch.tensor([8, 10, 15, 22, 25, 28]))
    assert limits.tolist() == [[10], [15], [25], [25]]
    assert length.laser_d_limits(correct, tokens, torch.tensor([8, 20])).tolist() == [[20], [20], [30], [30]]
    assert length.laser_d_limits(correct[:1], tokens[:1], torch.tensor([8])).tolist() == [[20]]
    # half of six are right: m = 6 // 3 = 2, so half of the attempts must be no longer
    half = torch.tensor([[1, 1, 1, 0, 0, 0]]), torch.tensor([[10, 20, 30, 40, 50, 60]])
    assert length.laser_d_limits(*half, torch.tensor([10, 20, 30, 40])).tolist() == [[30]]
    bonus = length.laser(correct, tokens, limits)
    close(bonus[:3].sum(1), [4 + 1, 2 + 1, 1 + 0.5])


def test_overlong_needs_a_cache():
    for cache in (0, 31):
        with pytest.raises(ValueError, match=f"cache={cache}"):
            rewards("overlong", limit=30, cache=cache)
    # a cache as long as the limit: the penalty grows from the first token on, by 1 / 30 per token
    close(rewards("overlong", limit=30, cache=30)[3], [1 - 8 / 30] * 4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("truncation", dict(limit=2000)),
        ("overlong", dict(limit=3000, cache=1000)),
        ("l1_max", dict(target=2000)),
        ("kimi", dict()),
        ("arora_zanette", dict()),
        ("laser", dict(limit=2000)),
        ("gr3", dict()),
        ("prime_linear", dict()),
        ("priced", dict(price=0.004)),
    ],
)
def test_no_right_answer_scores_below_a_wrong_one(name, options):
    """At real lengths, which is where an unbounded price per token turns right and wrong around."""
    generator = torch.Generator().manual_seed(0)
    correct = torch.randint(2, (200, 8), generator=generator).double()
    tokens = torch.randint(50, 4000, (200, 8), generator=generator)
    reward = getattr(length, name)(correct, tokens, **options)
    worst_right = reward.masked_fill(correct == 0, math.inf).amin(1)
    best_wrong = reward.masked_fill(correct == 1, -math.inf).amax(1)
    assert (worst_right >= best_wrong - 1e-12).all()


@pytest.mark.parametrize(
    "name, options",
    [("l1_exact", dict(target=100, alpha=0.01)), ("shorter_better", dict(alpha=1.0, beta=0.01))],
)
def test_where_a_wrong_answer_may_score_more(name, options):
    """By distance alone: 100 tokens nearer pay what being right pays."""
    correct, tokens = torch.tensor([[1, 1, 0]]), torch.tensor([[100, 201, 100]])
    reward = getattr(length, name)(correct, tokens, **options)[0]
    assert reward.tolist() == pytest.approx([1, -0.01, 0])
