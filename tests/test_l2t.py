import math

import pytest
import torch

from thinkrl.grpo import group_advantages
from thinkrl.l2t import (
    episode_rewards,
    process_reward,
    returns_to_go,
    to_go_advantages,
    token_advantages,
    token_rewards,
    truncated_mean,
)

# Three rollouts of one problem: surprise of each token, last token of each episode, outcome, J_0..J_K, C_k
GROUP = [
    ([0.1, 0.4, 0.5, 0.2, 0.8, 1.0, 0.3, 0.7], [2, 5, 7], 1.0, [0.2, 0.3, 0.6, 0.9], [0.01, 0.02, 0.05]),
    ([0.2, 0.2, 0.6, 0.1, 0.3, 0.6], [2, 5], 0.0, [0.2, 0.25, 0.15], [0.02, 0.10]),
    ([0.5] * 10, [4, 9], 1.0, [0.2, 0.2, 0.8], [0.0, 0.04]),
]
ALPHA, BETA = 0.8, 0.6


def ids_of(ends):
    return torch.searchsorted(torch.tensor(ends), torch.arange(ends[-1] + 1))


def golden_rewards(alpha=ALPHA, beta=BETA):
    """Alg. 1 l. 7-11 of the group: process rewards, episode rewards, token rewards."""
    r_prg = [process_reward(torch.tensor(J), torch.tensor(C), beta) for *_, J, C in GROUP]
    R = [episode_rewards(r_out, prg, alpha) for (_, _, r_out, _, _), prg in zip(GROUP, r_prg)]
    tokens = [token_rewards(r, ids_of(ends), -torch.tensor(s)) for r, (s, ends, *_) in zip(R, GROUP)]
    return r_prg, R, tokens


def near(got, expected, tolerance=1e-6):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got).double(), expected, atol=tolerance, rtol=0)


def test_algorithm_1_on_the_golden_group():
    r_prg, R, tokens = golden_rewards()
    for got, expected in zip(r_prg, [[0.094, 0.288, 0.270], [0.038, -0.160], [0.0, 0.576]]):
        near(got, expected)
    for got, expected in zip(R, [[0.408533, 0.563733, 0.549333], [0.0304, -0.128], [0.5, 0.9608]]):
        near(got, expected)
    near(tokens[0], [0.040853, 0.163413, 0.204267, 0.056373, 0.225493, 0.281867, 0.164800, 0.384533])
    near(tokens[1], [0.00608, 0.00608, 0.01824, -0.0128, -0.0384, -0.0768])
    near(tokens[2], [0.1] * 5 + [0.19216] * 5)
    near(torch.stack([truncated_mean(r) for r in tokens]), [0.190200, -0.016267, 0.146080])
    for mode in ("paper", "guarded"):
        A = token_advantages(tokens, mode=mode, statistic="token_trunc_mean")
        near(A[0], [0.165010, 0.660039, 0.825049, 0.227696, 0.910785, 1.138481, 0.665640, 1.553160])
        near(A[1], [0.422616, 0.422616, 1.267849, -0.889719, -2.669156, -5.338313])
        near(A[2], [0.248119] * 5 + [0.476785] * 5)


def test_rewards_of_tokens_sum_to_those_of_episodes_and_gains_telescope():
    r_prg, R, tokens = golden_rewards()
    for (_, ends, r_out, J, C), prg, episode, token in zip(GROUP, r_prg, R, tokens):
        sums = torch.zeros(len(ends), dtype=torch.float64).index_add(0, ids_of(ends), token)
        torch.testing.assert_close(sums, episode.double())
        assert math.isclose(token.sum(), r_out + ALPHA * prg.sum(), abs_tol=1e-6)
        assert math.isclose(prg.sum(), J[-1] - J[0] - BETA * sum(C), abs_tol=1e-6)


def test_mean_advantage_is_the_completion_s():
    """Without trimming, line 15 spreads the advantage without changing its mean."""
    *_, tokens = golden_rewards()
    uniform = token_advantages(tokens, mode="uniform")
    for A, spread in zip(uniform, token_advantages(tokens, mode="paper")):
        assert math.isclose(spread.mean(), A[0], rel_tol=1e-6)
    near([A[0] for A in uniform], [0.768233, -1.130684, 0.362452])


def test_the_paper_s_statistic_is_a_price_on_length():
    """A correct answer of 400 tokens is punished beside one of 100, and even with a wrong one in the group."""
    tokens = [torch.full((n,), r / n, dtype=torch.float64) for n, r in ((100, 1.0), (400, 1.0), (250, 0.0))]
    near([A[0] for A in token_advantages(tokens[:2], mode="uniform")], [0.707107, -0.707107], 1e-5)
    near([A[0] for A in token_advantages(tokens, mode="uniform")], [1.12, -0.32, -0.80], 5e-3)
    by_return = token_advantages(tokens, mode="uniform", statistic="return_sum")
    assert by_return[0][0] == by_return[1][0] > 0 > by_return[2][0]


def test_without_process_reward_it_is_grpo_to_the_last_bit():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    lengths = [7, 40, 3, 11, 64, 5]
    tokens = []
    for r, n in zip(reward, lengths):
        R = episode_rewards(float(r), torch.full((3,), 0.1), alpha=0.0)
        tokens.append(token_rewards(R, torch.arange(n) * 3 // n, -torch.rand(n)))
    for std in ("sample", "population", "none"):
        expected = group_advantages(reward[None], std)[0]
        got = token_advantages(tokens, mode="uniform", statistic="return_sum", returns=reward, std=std)
        assert all(torch.equal(A, a.expand(n)) for A, a, n in zip(got, expected, lengths))
    # equal lengths and uniform weights: Alg. 1's own statistic gives GRPO too, up to the eps beside the std
    even = [torch.full((20,), float(r) / 20, dtype=torch.float64) for r in reward]
    near([A[0] for A in token_advantages(even, mode="uniform")], group_advantages(reward[None])[0].tolist(), 1e-5)


def test_the_group_statistic_does_not_feel_its_epsilon():
    """Rewards per token are of the size 1/T: GRPO's 1e-6 beside their std would bend the advantage, ours must not."""
    tokens = [torch.full((16384,), r / 16384, dtype=torch.float64) for r in (1.0, 0.9, 0.8)]
    near([A[0] for A in token_advantages(tokens, mode="uniform")], [1.0, 0.0, -1.0], 2e-3)
    bent = token_advantages(tokens, mode="uniform", eps=1e-6)[0][0]
    assert bent < 0.9


def test_truncated_mean_drops_whole_values_at_both_ends():
    values = torch.cat([torch.tensor([1e6, -1e9]), torch.arange(1.0, 39.0)])  # 40 values: one goes at each end
    assert truncated_mean(values, 0.95) == 19.5
    assert truncated_mean(values[1:], 0.95) == values[1:].mean()  # 39: none
    assert truncated_mean(torch.arange(20.0), 0.9) == 9.5  # 0.05 · 20 is one, whatever its rounding
    assert truncated_mean(torch.tensor([0.0, 0.0, 0.0, 1.0, 5.0]), 0.6) == pytest.approx(1 / 3)
    assert truncated_mean(values, 1.0) == values.mean()


def test_guarded_credit_does_not_reward_the_negatively_rewarded():
    """A positive mean below the group's: as printed, line 15 reinforces the token with the negative reward."""
    tokens = [torch.tensor([0.3, -0.1]), torch.tensor([0.5, 0.5])]
    paper = token_advantages(tokens, mode="paper")
    near(paper[0], [-2.12, 0.71], 5e-3)
    near(paper[1], [0.71, 0.71], 5e-3)
    guarded = token_advantages(tokens, mode="guarded")
    near(guarded[0], [-0.71, -0.71], 5e-3)
    near(guarded[1], [0.71, 0.71], 5e-3)


def test_guarded_credit_is_bounded():
    tokens = [torch.tensor([5.0, -4.98]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, -9.0] + [0.3] * 28)]
    A = token_advantages(tokens, mode="guarded", max_ratio=3.0)
    uniform = token_advantages(tokens, mode="uniform")
    assert torch.equal(A[0], uniform[0])  # its mean 0.01 is no divisor beside the group's
    assert all((a.abs() <= 3 * u.abs() + 1e-12).all() for a, u in zip(A, uniform))
    assert A[2].abs().max() == 3 * uniform[2].abs().max()


@pytest.mark.parametrize("statistic", ["token_trunc_mean", "return_sum"])
@pytest.mark.parametrize("mode", ["guarded", "paper", "uniform", "to_go"])
def test_degenerate_groups_are_finite(mode, statistic):
    nothing = torch.zeros(3)
    cases = {
        "one completion": [([0.1, 0.2], [1], 1.0, [0.1, 0.9], [0.1])],
        "equal rewards": [([0.5] * 4, [1, 3], 1.0, [0.1, 0.5, 0.9], [0.1, 0.1])] * 4,
        "zero surprise": [([0.0] * n, [1, n - 1], float(n > 3), [0.1, 0.5, 0.9], [0.1, 0.2]) for n in (3, 4, 5)],
        "wrong only": [([0.5] * n, [n - 1], 0.0, [0.2, 0.2], [0.0]) for n in (2, 3)],
        "wrong, gains that cancel": [([0.5] * 4, [1, 3], 0.0, [0.1, 0.1 + g, 0.1], [0.0, 0.0]) for g in (0.3, 0.7, 0.1)],
        "one episode of one token": [([1.0], [0], r, [0.5, 0.5 + r / 4], [0.0]) for r in (0.0, 1.0)],
    }
    for name, group in cases.items():
        tokens, to_go, J, ids = [], [], [], []
        for surprise, ends, r_out, values, C in group:
            prg = process_reward(torch.tensor(values), torch.tensor(C), BETA)
            ids.append(ids_of(ends))
            J.append(torch.tensor(values))
            to_go.append(returns_to_go(r_out, prg, ALPHA))
            tokens.append(token_rewards(episode_rewards(r_out, prg, ALPHA), ids[-1], -torch.tensor(surprise)))
        A = token_advantages(tokens, mode=mode, statistic=statistic, to_go=to_go, J=J, episode_ids=ids)
        assert [len(a) for a in A] == [len(t) for t in tokens], name
        assert all(a.isfinite().all() for a in A), name
        if name in ("one completion", "equal rewards", "wrong only"):
            assert all((a == 0).all() for a in A), name
    assert all(torch.equal(a, nothing.double()) for a in token_advantages([nothing, nothing], mode=mode, statistic=statistic,
                                                                          to_go=[nothing[:1]] * 2, J=[nothing[:2]] * 2,
                                                                          episode_ids=[torch.zeros(3).long()] * 2))


def test_certain_tokens_share_evenly():
    r = token_rewards(torch.tensor([0.6, 0.5]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.0, 0.0, 0.0, -2.0, 0.0]))
    near(r, [0.2, 0.2, 0.2, 0.5, 0.0], 1e-8)


def test_returns_to_go_end_with_the_last_episode():
    r_prg = torch.tensor([0.1, 0.2, 0.5])
    near(returns_to_go(1.0, r_prg, 0.5), [1.4, 1.35, 1.25])


def test_to_go_subtracts_what_the_state_let_expect():
    """Two states with J = 0.2 and 0.8, from which half and all of the others succeed."""
    ids = torch.tensor([0, 0, 1, 1])
    J = [torch.tensor([0.2, j, j]) for j in (0.8, 0.8, 0.8, 0.2, 0.2, 0.2)]
    outcome = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    to_go = [torch.tensor([r, r]) for r in outcome]
    A = to_go_advantages(to_go, J, [ids] * 6)
    # first episode: same state for all, so reward alone decides
    assert A[0][0] == A[1][0] > 0 > A[3][0]
    # from the good state success is no surprise, from the bad one it is
    assert abs(A[0][2]) < 1e-9 < 1 < A[5][2]
    assert A[0][0] == A[0][1] and A[0][2] == A[0][3]
    assert math.isclose(torch.cat(A).square().mean(), 1.0, rel_tol=1e-12)


def test_to_go_s_baseline_ignores_its_own_completion():
    """Unbiasedness: an episode's outcome must not move its own baseline. With one feature the baseline is the others' mean."""
    ids = torch.zeros(2, dtype=torch.int64)
    J = [torch.tensor([0.3, 0.5])] * 4
    for own in (3.0, 5.0):
        to_go = [torch.tensor([own]), torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([2.0])]
        A = to_go_advantages(to_go, J, [ids] * 4)
        # D_0 = own - 1, and D_3 - D_2 = (2 - (own + 1) / 3) - (1 - (own + 2) / 3) = 4 / 3: the common scale cancels
        assert math.isclose(A[0][0] / (A[3][0] - A[2][0]), (own - 1) / (4 / 3), rel_tol=1e-9)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="mode must be"):
        token_advantages([torch.ones(2)], mode="even")
    with pytest.raises(ValueError, match="statistic must be"):
        token_advantages([torch.ones(2)], statistic="mean")
    with pytest.raises(ValueError, match="to_go, J and episode_ids"):
        token_advantages([torch.ones(2)], mode="to_go")
