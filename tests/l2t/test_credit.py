import copy
import itertools
import math

import pytest
import torch

from thinkrl import distributed
from thinkrl.arith import heldout
from thinkrl.checkpoint import load_model
from thinkrl.config import parse
from thinkrl.data.problems import messages
from thinkrl.grading import grade
from thinkrl.grpo import group_advantages
from thinkrl.l2t import compression as compression_module
from thinkrl.l2t.compression import (
    DAMPING,
    Proxy,
    Row,
    block_factors,
    compression,
    normalise_compression,
    svd_basis,
    svd_factors,
)
from thinkrl.l2t.credit import (
    episode_rewards,
    process_reward,
    released_reward,
    returns_to_go,
    to_go_advantages,
    token_advantages,
    token_rewards,
    truncated_mean,
)
from thinkrl.l2t.episodes import Episodes, segment
from thinkrl.l2t.gain import (
    Gain,
    Probe,
    answer_probability,
    forcing,
    make_probe,
    predicted_correctness_ref,
    room_behind,
)
from thinkrl.l2t.preset import L2T
from thinkrl.learner import TINY
from thinkrl.model import ModelConfig, Transformer
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Turn, UserError

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
    """A correct answer of 400 tokens is punished beside one of 100, and even with a wrong one in the
    group.
    """
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
    near(
        [A[0] for A in token_advantages(even, mode="uniform")],
        group_advantages(reward[None])[0].tolist(),
        1e-5,
    )


def test_the_group_statistic_does_not_feel_its_epsilon():
    """Rewards per token are of the size 1/T: GRPO's 1e-6 beside their std would bend the advantage, ours
    must not.
    """
    tokens = [torch.full((16384,), r / 16384, dtype=torch.float64) for r in (1.0, 0.9, 0.8)]
    near([A[0] for A in token_advantages(tokens, mode="uniform")], [1.0, 0.0, -1.0], 2e-3)
    bent = token_advantages(tokens, mode="uniform", eps=1e-6)[0][0]
    assert bent < 0.9


def test_truncated_mean_drops_whole_values_at_both_ends():
    # 40 values: one goes at each end
    values = torch.cat([torch.tensor([1e6, -1e9]), torch.arange(1.0, 39.0)])
    assert truncated_mean(values, 0.95) == 19.5
    assert truncated_mean(values[1:], 0.95) == values[1:].mean()  # 39: none
    assert truncated_mean(torch.arange(20.0), 0.9) == 9.5  # 0.05 · 20 is one, whatever its rounding
    assert truncated_mean(torch.tensor([0.0, 0.0, 0.0, 1.0, 5.0]), 0.6) == pytest.approx(1 / 3)
    assert truncated_mean(values, 1.0) == values.mean()


def test_guarded_credit_does_not_reward_the_negatively_rewarded():
    """A positive mean below the group's: as printed, line 15 reinforces the token with the negative
    reward.
    """
    tokens = [torch.tensor([0.3, -0.1]), torch.tensor([0.5, 0.5])]
    paper = token_advantages(tokens, mode="paper")
    near(paper[0], [-2.12, 0.71], 5e-3)
    near(paper[1], [0.71, 0.71], 5e-3)
    guarded = token_advantages(tokens, mode="guarded")
    near(guarded[0], [-0.71, -0.71], 5e-3)
    near(guarded[1], [0.71, 0.71], 5e-3)


def test_guarded_credit_is_bounded():
    tokens = [torch.tensor([5.0, -4.998]), torch.tensor([-0.5, -0.5]), torch.tensor([0.3] * 28 + [-9.0, 0.0])]
    guarded, uniform = token_advantages(tokens, max_ratio=3.0), token_advantages(tokens, mode="uniform")
    # its mean 0.001 is no divisor beside the group's 0.5
    assert uniform[0][0] > 0 and torch.equal(guarded[0], uniform[0])
    assert all((a.abs() <= 3 * u.abs() + 1e-12).all() for a, u in zip(guarded, uniform))
    paper = token_advantages(tokens, mode="paper")
    assert paper[0].abs().max() > 1000 * uniform[0][0]
    spread = token_advantages(
        [torch.tensor([0.4] * 9 + [3.6]), torch.tensor([0.1])], max_ratio=3.0, statistic="return_sum"
    )
    near(spread[0] / 0.707107, [0.4 / 0.72] * 9 + [3.0], 1e-5)  # 3.6 is five times the mean


@pytest.mark.parametrize("statistic", ["token_trunc_mean", "return_sum"])
@pytest.mark.parametrize("mode", ["guarded", "paper", "uniform", "to_go"])
def test_degenerate_groups_are_finite(mode, statistic):
    nothing = torch.zeros(3)
    cases = {
        "one completion": [([0.1, 0.2], [1], 1.0, [0.1, 0.9], [0.1])],
        "equal rewards": [([0.5] * 4, [1, 3], 1.0, [0.1, 0.5, 0.9], [0.1, 0.1])] * 4,
        "zero surprise": [
            ([0.0] * n, [1, n - 1], float(n > 3), [0.1, 0.5, 0.9], [0.1, 0.2]) for n in (3, 4, 5)
        ],
        "wrong only": [([0.5] * n, [n - 1], 0.0, [0.2, 0.2], [0.0]) for n in (2, 3)],
        "wrong, gains that cancel": [
            ([0.5] * 4, [1, 3], 0.0, [0.1, 0.1 + g, 0.1], [0.0, 0.0]) for g in (0.3, 0.7, 0.1)
        ],
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
        A = token_advantages(tokens, mode=mode, statistic=statistic, states=(to_go, J, ids))
        assert [len(a) for a in A] == [len(t) for t in tokens], name
        assert all(a.isfinite().all() for a in A), name
        if name in ("one completion", "equal rewards", "wrong only"):
            assert all((a == 0).all() for a in A), name
    assert all(
        torch.equal(a, nothing.double())
        for a in token_advantages(
            [nothing, nothing],
            mode=mode,
            statistic=statistic,
            states=([nothing[:1]] * 2, [nothing[:2]] * 2, [torch.zeros(3).long()] * 2),
        )
    )


def test_certain_tokens_share_evenly():
    r = token_rewards(
        torch.tensor([0.6, 0.5]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.0, 0.0, 0.0, -2.0, 0.0])
    )
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
    assert A[0][0] == A[1][0] > 0.1 and A[3][0] < -0.1
    # from the good state success is no surprise, from the bad one it is
    assert abs(A[0][2]) < 1e-9 < 1 < A[5][2]
    assert A[0][0] == A[0][1] and A[0][2] == A[0][3]
    assert math.isclose(torch.cat(A).square().mean(), 1.0, rel_tol=1e-12)


def test_to_go_s_baseline_ignores_its_own_completion():
    """Unbiasedness: an episode's outcome must not move its own baseline. With one feature the baseline is
    the others' mean.
    """
    ids = torch.zeros(2, dtype=torch.int64)
    J = [torch.tensor([0.3, 0.5])] * 4
    for own in (3.0, 5.0):
        to_go = [torch.tensor([own]), torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([2.0])]
        A = to_go_advantages(to_go, J, [ids] * 4)
        # D_0 = own - 1, and D_3 - D_2 = (2 - (own + 1) / 3) - (1 - (own + 2) / 3) = 4 / 3: the common scale
        # cancels
        assert math.isclose(A[0][0] / (A[3][0] - A[2][0]), (own - 1) / (4 / 3), rel_tol=1e-9)


@pytest.mark.parametrize("lengths, returns, ratio", [((1, 3), (2.0, 2.0), 1.5), ((3, 1), (2.0, -1.0), -1.0)])
def test_to_go_s_baseline_knows_the_tokens_already_written(lengths, returns, ratio):
    """All J alike; the others earn 1 from token 0 on and 0 from token 2 on: b = 1 - n / 2, between 0 and 1.

    After 1 token it is 1/2, so D = 2 - 1 and 2 - 1/2; after 3 it would be -1/2, held at 0: D = 2 - 1 and -1 -
    0.
    """
    own = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(lengths))
    ids, J = torch.tensor([0, 0, 1, 1]), torch.full((3,), 0.5)
    to_go = [torch.tensor(returns), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    A = to_go_advantages(to_go, [J] * 3, [own, ids, ids])[0]
    assert float(A[-1] / A[0]) == pytest.approx(ratio, rel=1e-6)


def test_paper_credit_divides_by_the_truncated_mean():
    """The central half of 0, 1, 1, 4 has the mean 1; all have 1.5."""
    tokens = [torch.tensor([0.0, 1.0, 1.0, 4.0]), torch.zeros(4)]
    A = token_advantages(tokens, keep=0.5, mode="paper", statistic="token_trunc_mean")
    near(A[0] / 0.707107, [0.0, 1.0, 1.0, 4.0], 1e-5)


def test_the_guard_is_a_share_of_the_mean_statistic():
    """Statistics .015, 1, 0, 0: a fiftieth of their mean is .005, of their largest .02."""
    tokens = [torch.tensor([0.02, 0.01]), torch.ones(2), torch.zeros(2), torch.zeros(2)]
    returns = torch.tensor([1.0, 0.0, 0.0, 0.0])
    A = token_advantages(tokens, mode="guarded", statistic="return_sum", returns=returns)
    near(A[0] / A[0].mean(), [4 / 3, 2 / 3])


def test_the_released_sum_counts_from_closing_tag_to_closing_tag():
    """Of a completion whose tags close at tokens 4 and 7 and whose answer and stop token follow, the
    second episode has 3.
    """
    J = torch.tensor([0.5, 0.9, 0.95], dtype=torch.float64)
    torch.testing.assert_close(
        released_reward(J, [1, 5, 8], False), torch.tensor([0.0, 3 * 0.05], dtype=torch.float64)
    )
    assert released_reward(J, [1, 5, 8], True).tolist() == [0.0, 0.0]
    assert released_reward(J[:1], [0], False).tolist() == [], "an empty completion"


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="mode must be"):
        token_advantages([torch.ones(2)], mode="even")
    with pytest.raises(ValueError, match="statistic must be"):
        token_advantages([torch.ones(2)], statistic="mean")
    with pytest.raises(ValueError, match="needs states"):
        token_advantages([torch.ones(2)], mode="to_go")


# The model of the tests below: small, but with weights large enough that no distribution is flat.
CONFIG = ModelConfig(
    "Qwen3ForCausalLM",
    vocab_size=13,
    width=8,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=4,
    mlp_width=12,
    max_positions=2048,
)


def tiny_model(seed=0, dtype=torch.float64, scale=15.0, tied=False):
    config = CONFIG if not tied else ModelConfig(**{**vars(CONFIG), "tied": True})
    model = Transformer.random(config, seed).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= scale
    return model


def cut_at(*ends):
    """Episodes that end where told, probed there too."""
    ends = torch.tensor(ends)
    return Episodes(torch.searchsorted(ends, torch.arange(int(ends[-1]) + 1)), ends, ends)


def written(seed=0):
    """Two completions and their episodes: of 2, 1 and 3 tokens, and of 4 and 1."""
    tokens = torch.randint(0, 13, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    turns = [
        Turn("policy", tokens[:3], tokens[3:9], [], "stop"),
        Turn("policy", tokens[9:11], tokens[11:16], [], "length"),
    ]
    return turns, [cut_at(1, 2, 5), cut_at(3, 4)]


def autograd_gradients(model, parameters):
    """Every episode's gradient of log π(z_k | s_k), by one whole backward per episode: a list over
    episodes of lists.
    """
    gradients = []
    for turn, episodes in zip(*written()):
        tokens = torch.tensor(turn.prompt + turn.completion)
        hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
        logprob = (
            model.logits(hidden).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[len(turn.prompt) - 1 :, 0]
        )
        for start, end in itertools.pairwise([0, *(episodes.ends + 1).tolist()]):
            gradients.append(torch.autograd.grad(logprob[start:end].sum(), parameters, retain_graph=True))
    return gradients


def from_factors(factors, cu):
    return [[g[a:b].T @ x[a:b] for x, g in factors] for a, b in itertools.pairwise(cu.tolist())]


def relative_error(got, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected))


def with_hidden(model, turns):
    row = Row.of(turns, written()[1])
    hidden = model(row.tokens, row.cu_seqlens)[row.own - 1].detach().split([len(t.completion) for t in turns])
    for turn, h in zip(turns, hidden):
        turn.hidden = h
    return turns


def test_row_points_at_the_completions():
    turns, episodes = written()
    row = Row.of(turns, episodes)
    assert row.cu_seqlens.tolist() == [0, 9, 16]
    assert row.own.tolist() == [3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15]
    assert row.tokens[row.own].tolist() == turns[0].completion + turns[1].completion
    assert row.cu_episodes.tolist() == [0, 2, 3, 6, 10, 11]
    assert row.hidden is None


@pytest.mark.parametrize("tied", [False, True])
def test_lm_head_and_svd_core_are_the_exact_gradient(tied):
    model = tiny_model(tied=tied)
    weight = model.head_weight
    turns, episodes = written()
    row = Row.of(with_hidden(model, turns), episodes)
    if tied:  # only the use as a head counts: the embedding's own gradient is cut off
        embedding = copy.deepcopy(model.embed)
        model.embed.forward = lambda tokens: embedding(tokens).detach()
    exact = [g for (g,) in autograd_gradients(model, [weight])]

    head = Proxy(model, "lm_head")
    got = [g for (g,) in from_factors(head.factors(row), row.cu_episodes)]
    assert relative_error(got, exact) < 1e-12

    for rank in (8, 3):
        U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        V, singular = svd_basis(weight, rank)
        torch.testing.assert_close(singular, S[:rank])
        signs = (V * Vh[:rank].T).sum(0).sign()
        torch.testing.assert_close(V, Vh[:rank].T * signs)
        core = from_factors(
            svd_factors(row.hidden, weight.detach(), row.tokens[row.own], V, singular), row.cu_episodes
        )
        expected = [(U[:, :rank] * signs).T @ g @ V for g in exact]
        assert relative_error([c for (c,) in core], expected) < 1e-10


def test_rank_is_that_of_the_weight():
    V, S = svd_basis(torch.outer(torch.arange(1.0, 6.0), torch.tensor([3.0, 4.0, 0.0])), 3)
    assert V.shape == (3, 1) and S.shape == (1,)
    torch.testing.assert_close(V[:, 0].abs(), torch.tensor([0.6, 0.8, 0.0]))
    torch.testing.assert_close(S[0], torch.tensor(55.0).sqrt() * 5)


def test_last_block_is_exact_and_an_earlier_one_is_not():
    model = tiny_model()
    row = Row.of(*written())
    for layer, right in ((2, True), (1, False), (0, False)):
        block = model.blocks[layer]
        weights = [block.qkv.weight, block.o.weight, block.gate_up.weight, block.down.weight]
        exact = [[g[0][:8], *g[1:]] for g in autograd_gradients(model, weights)]  # of qkv's rows, q's
        got = from_factors(block_factors(model, row, layer), row.cu_episodes)
        errors = [relative_error(a, b) for a, b in zip(got, exact)]
        assert (max(errors) < 1e-10) if right else (min(errors) > 0.1 and max(errors) > 0.5), layer


def test_random_layers_are_exact():
    model = tiny_model()
    proxy = Proxy(model, "layers")
    row = Row.of(*written())
    (factors,) = proxy.factors(row)
    assert len(proxy.parameters) == 4  # a block out of three
    exact = torch.stack(
        [torch.cat([g.flatten() for g in gs]) for gs in autograd_gradients(model, proxy.parameters)]
    )
    torch.testing.assert_close(factors[0], exact)
    cu = torch.arange(6)
    weight = torch.rand_like(exact[:1])
    torch.testing.assert_close(
        compression("diag", [factors], cu, [weight], 1), 0.5 * ((weight + DAMPING) * exact**2).sum(1)
    )


def test_compression_by_hand():
    """One parameter, gradients 2 and -1, N F = 6 over N = 3 tokens."""
    factors = [(torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.5], [1.5], [-1.0]]))]
    cu, fisher = torch.tensor([0, 2, 3]), [torch.tensor([[6.0]])]
    near(compression("diag", factors, cu, fisher, 3), [0.5 * 6 * 4, 0.5 * 6 * 1], 1e-4)
    near(compression("rank1", factors, cu, fisher, 3), [16.0, 1.0])
    near(compression("invariant", factors, cu, fisher, 3), [0.5 * 4 / 6, 0.5 * 1 / 6], 1e-4)
    near(compression("natural", factors, cu, fisher, 3), [(4 / 2) ** 2, (1 / 2) ** 2], 1e-4)
    near(compression("drift", factors, cu, fisher, 3, [torch.tensor([[0.1]])]), [0.04, 0.01])
    with pytest.raises(ValueError, match="diag, invariant, rank1, natural or drift"):
        compression("full", factors, cu, fisher, 3)


def test_rank_one_is_equation_4_as_printed():
    """Built as the paper writes it: move, outer product of the gradient, move."""
    model = tiny_model()
    turns, episodes = written()
    (C0, C1) = Proxy(model, "lm_head").penalties("rank1", turns, episodes)
    for c, (g,) in zip([*C0, *C1], autograd_gradients(model, [model.head_weight])):
        move = g.flatten()
        torch.testing.assert_close(c, move @ torch.outer(g.flatten(), g.flatten()) @ move)


def test_cutting_more_does_not_change_the_expected_penalty():
    """All 3^4 completions of a policy of three words, weighted by their probability: no sampling noise.

    The scores of sampled tokens are uncorrelated, so squares of sums and sums of squares agree in
    expectation.
    """
    torch.manual_seed(0)
    W, mixing = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    nF = [torch.rand(3, 4, dtype=torch.float64)]
    cuts = {"one": [0, 4], "two": [0, 1, 4], "four": [0, 1, 2, 3, 4]}
    summed, averaged = dict.fromkeys(cuts, 0.0), dict.fromkeys(cuts, 0.0)
    for words in itertools.product(range(3), repeat=4):
        hidden = torch.cumsum(
            torch.stack([torch.ones(4).double(), *(mixing[w] for w in words[:3])]), 0
        ).tanh()
        targets = torch.tensor(words)
        probability = (hidden @ W.T).log_softmax(-1)[torch.arange(4), targets].sum().exp()
        (factors,) = compression_module.head_factors(hidden, W, targets)
        for name, cu in cuts.items():
            cu = torch.tensor(cu)
            summed[name] += probability * compression("diag", [factors], cu, nF, 1).sum()
            averaged[name] += probability * (compression("diag", [factors], cu, nF, 1) / cu.diff() ** 2).sum()
    assert math.isclose(summed["one"], summed["two"], rel_tol=1e-12)
    assert math.isclose(summed["one"], summed["four"], rel_tol=1e-12)
    assert averaged["four"] > 3 * averaged["one"]  # what mean gradients would have paid for long episodes


@pytest.mark.parametrize("kind", ["svd", "lm_head", "last_block", "layers"])
def test_penalties_do_not_depend_on_how_rows_are_filled(kind):
    model = tiny_model()
    turns, episodes = written()

    def run(budget, turns, episodes):
        proxy = Proxy(model, kind, rank_share=0.5)
        proxy.begin(0)
        return proxy, proxy.penalties("diag", turns, episodes, budget)

    proxy, together = run(100, turns, episodes)
    assert [len(c) for c in together] == [3, 2] and all((c > 0).all() for c in together)
    assert proxy.count == 11
    for other in (run(1, turns, episodes)[1], run(100, turns[::-1], episodes[::-1])[1][::-1]):
        for a, b in zip(together, other):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_hidden_states_of_the_sampler_replace_a_forward():
    model = tiny_model()
    turns, episodes = written()
    fresh, kept = (Proxy(model, "svd", rank_share=1.0) for _ in range(2))
    fresh.begin(0), kept.begin(0)
    expected = fresh.penalties("diag", turns, episodes)
    with_hidden(model, turns)
    model.forward = None
    for a, b in zip(kept.penalties("diag", turns, episodes), expected):
        torch.testing.assert_close(a, b)


def test_fisher_is_a_running_mean_of_earlier_steps():
    model = tiny_model()
    turns, episodes = written()
    proxy = Proxy(model, "lm_head", decay=0.5)
    first = proxy.penalties("diag", turns, episodes)
    squares = sum(g.T.square() @ x.square() for x, g in [proxy.factors(Row.of(turns, episodes))[0]])
    torch.testing.assert_close(proxy.fisher[0], squares)
    (again,) = proxy.penalties("diag", turns[:1], episodes[:1])
    torch.testing.assert_close(first[0], again)  # the second step's Fisher is the first's tokens still
    new = sum(g.T.square() @ x.square() for x, g in [proxy.factors(Row.of(turns[:1], episodes[:1]))[0]])
    torch.testing.assert_close(proxy.fisher[0], 0.5 * squares + new)
    assert proxy.count == 0.5 * 11 + 6
    # with F fixed, the order of the responses does not matter (the kernel's part to the last bit:
    # tests/kernels; the states come from products over a whole row, of which a CPU's library may round the
    # last rows differently)
    state = copy.deepcopy(proxy.state_dict())
    one = proxy.penalties("diag", turns, episodes)
    proxy.load_state_dict(state)
    other = proxy.penalties("diag", turns[::-1], episodes[::-1])
    for a, b in zip(one, other[::-1]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_fisher_is_summed_over_ranks():
    model = tiny_model()
    turns, episodes = written()
    alone, both = Proxy(model, "lm_head"), Proxy(model, "lm_head")
    alone.penalties("diag", turns, episodes)
    both.penalties("diag", turns, episodes, reduce=lambda t: 2 * t)
    torch.testing.assert_close(both.fisher[0], 2 * alone.fisher[0])
    assert both.count == 2 * alone.count
    idle = Proxy(model, "lm_head")
    assert idle.penalties("diag", [], [], reduce=lambda t: t + 1) == [] and idle.count == 1


def test_the_basis_is_refreshed_and_resumed():
    model = tiny_model()
    turns, episodes = written()
    proxy = Proxy(model, "svd", rank_share=0.5, refresh_every=2, drift=True)
    proxy.begin(0)
    proxy.penalties("diag", turns, episodes)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    resumed = Proxy(tiny_model(1), "svd", rank_share=0.5, refresh_every=2, drift=True)
    resumed.model = model
    resumed.load_state_dict(copy.deepcopy(proxy.state_dict()))
    S = proxy.S.clone()
    for p in (proxy, resumed):
        p.begin(1)
        torch.testing.assert_close(p.S, S)
    for kind in ("natural", "drift"):  # which reads N too, and the start
        for a, b in zip(*(p.penalties(kind, turns, episodes) for p in (proxy, resumed))):
            assert torch.equal(a, b)
    proxy.begin(2)
    torch.testing.assert_close(proxy.S, 2 * S)
    assert proxy.fisher == [] and proxy.count == 0


def test_drift_is_the_directional_derivative_along_the_way_from_the_start():
    turns, episodes = written()
    for kind in ("svd", "lm_head", "last_block", "layers"):
        model = tiny_model()
        proxy = Proxy(model, kind, rank_share=1.0, drift=True)
        proxy.begin(0)
        assert all((c == 0).all() for c in proxy.penalties("drift", turns, episodes))
        parameters = {
            "last_block": [w for w in model.blocks[-1].parameters() if w.ndim == 2],
            "layers": proxy.parameters,
        }
        parameters = parameters.get(kind, [model.head.weight])
        ways = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double() * 0.1
            for i, p in enumerate(parameters)
        ]
        if kind == "last_block":
            ways[0][8:] = 0  # k and v are not in the proxy
        with torch.no_grad():
            for p, way in zip(parameters, ways):
                p += way
        proxy.begin(0) if kind == "svd" else None
        C = torch.cat(proxy.penalties("drift", turns, episodes))
        exact = [
            sum((g * w).sum() for g, w in zip(gs, ways)) ** 2 for gs in autograd_gradients(model, parameters)
        ]
        if kind == "svd":  # the part of the way that lies in W's own row and column space
            U, _, Vh = torch.linalg.svd(model.head.weight.detach(), full_matrices=False)
            way = U @ (U.T @ ways[0] @ Vh.T) @ Vh
            exact = [(g * way).sum() ** 2 for (g,) in autograd_gradients(model, parameters)]
        torch.testing.assert_close(C, torch.stack(exact))


def test_the_mean_completion_pays_kappa():
    C = [torch.tensor([1.0, 2.0]), torch.tensor([5.0])]
    near(torch.cat(normalise_compression(C, 0.05)), [0.0125, 0.025, 0.0625])
    # another rank's completions cost twice as much: totals 8 and 16 over 4 completions, mean 6
    near(
        torch.cat(normalise_compression(C, 0.06, lambda t: t + torch.tensor([16.0, 2.0]))), [0.01, 0.02, 0.05]
    )
    assert torch.cat(normalise_compression([torch.zeros(2), torch.zeros(1)], 0.05)).tolist() == [0, 0, 0]
    assert normalise_compression([], 0.05) == []


class Digits:
    """Ids are the digits 0-9 and three marks."""

    words = (*"0123456789", "<a>", "</a>", "<eos>")
    eos_id, stop_ids = 12, [12]
    pieces = list(words)

    def encode(self, text):
        ids = []
        while text:
            word = next(w for w in self.words if text.startswith(w))
            ids.append(self.words.index(word))
            text = text[len(word) :]
        return ids

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    continuation = decode


def test_a_probe_scores_the_answer_and_its_terminator():
    probe = make_probe(Digits(), "42", "<a>", "</a>")
    assert probe == Probe([10], [4, 2, 11])
    assert make_probe(Digits(), "42", "<a>", "") == Probe([10], [4, 2, 12], ((2, (10, 11)),)), (
        "the end of the completion ends the answer, and so does what is no digit"
    )
    assert [
        room_behind(kind, [probe, Probe([10, 10], [1, 11])], 50) for kind in ("forced", "mc", "continue")
    ] == [5, 16, 50]
    logprob = torch.tensor([-9.0, math.log(0.5), math.log(0.4), math.log(0.25)])
    assert answer_probability(logprob, probe) == pytest.approx(0.05)
    with pytest.raises(UserError, match="tokenizes to nothing"):
        make_probe(Digits(), "", "<a>", "</a>")


@pytest.mark.parametrize(
    "source, gold", [("arith", "42"), ("gsm8k", "1,000"), ("openai/gsm8k", "-3"), ("math", r"\frac{3}{4}")]
)
def test_what_forces_the_answer_follows_the_grading_rule(source, gold):
    problem = Problem(7, "?", gold, source)
    prefix, suffix = forcing(problem)
    assert prefix.strip().startswith("</think>") and grade(prefix + gold + suffix, gold, source)
    marked = prefix.replace("</think>", "</think> So:")
    assert forcing(problem, marked) == (marked, suffix) and forcing(problem, suffix=f"{suffix}.") == (
        prefix,
        f"{suffix}.",
    )
    with pytest.raises(UserError, match=r"problem 7 .* --probe_prefix and --probe_suffix"):
        forcing(problem, "The answer is ")


def test_the_last_number_is_forced_without_a_marker():
    problem = Problem(7, "?", "3.5", "last_number")
    assert forcing(problem) == ("\n</think>\n\nThe answer is ", "")
    with pytest.raises(UserError, match="problem 7"):
        forcing(problem, suffix=" or 4")


def test_the_preset_s_probe_is_the_rule_s_and_ends_the_answer():
    problem = Problem(0, "374*6?", "2244")
    wanted = {
        (): ["</think><answer>", "2244</answer>"],
        ("--probe_prefix", "<answer>"): ["<answer>", "2244</answer>"],
        ("--probe_suffix", "</answer>\n"): ["</think><answer>", "2244</answer>\n"],
    }
    world = distributed.start("cpu")
    try:
        for options, texts in wanted.items():
            preset = L2T(parse(["l2t", *options]), world)
            [probe] = preset.probes([problem])
            assert [preset.tokenizer.decode(ids) for ids in (probe.forced, probe.gold)] == texts
        with pytest.raises(UserError, match="arith grading does not find the gold answer"):
            L2T(parse(["l2t", "--probe_suffix", "."]), world).require_room([problem], training=True)
    finally:
        distributed.stop()


def every(n):
    return lambda tokens: cut_at(*range(n - 1, len(tokens) - 1, n), len(tokens) - 1)


@pytest.mark.parametrize("max_tokens_per_forward", [8192, 40])
def test_probes_on_forked_pages_equal_full_forwards(max_tokens_per_forward):
    model = tiny_model(dtype=torch.float32, scale=8.0)
    sampler = Sampler(
        model, Digits(), num_pages=80, page_size=4, max_tokens_per_forward=max_tokens_per_forward
    )
    prompts = [[1, 2, 3, 4, 5], [7]]
    probes = [make_probe(Digits(), answer, "<a>", "</a>") for answer in ("42", "7")]
    gain = Gain(sampler, probes, every(6))
    groups = sampler.generate(prompts, n=3, max_tokens=30, stop_ids=[], on_finish=gain.on_finish)
    results = gain.results()
    assert sampler.pool.free_pages == 80
    written = [(i, completion) for i, group in enumerate(groups) for completion in group]
    assert len(results) == len(written) == 6
    assert max(len(e) for e, _ in results) == 5
    for (i, completion), (episodes, J) in zip(written, results):
        expected = predicted_correctness_ref(model, prompts[i], completion.tokens, episodes, probes[i])
        assert J.shape == expected.shape == (len(episodes) + 1,)
        torch.testing.assert_close(J, expected, atol=1e-5, rtol=0)
        assert (J > 0).all() and (J < 1).all() and J.std() > 0
    assert len({float(J[0]) for _, J in results}) == 2  # asked once per prompt


@pytest.mark.slow
def test_probes_cost_a_fifth_of_full_forwards():
    """K = 10, prompt 100, completion 1000, probe 25, tokens counted by the sampler; the reference's by its
    model.
    """
    model = tiny_model(dtype=torch.float32, scale=4.0)
    sampler = Sampler(model, num_pages=80)
    prompt, probe = [i % 13 for i in range(100)], Probe([1] * 15, [2] * 10)
    gain = Gain(sampler, [probe], every(100))
    ((completion,),) = sampler.generate([prompt], max_tokens=1000, stop_ids=[], on_finish=gain.on_finish)
    ((episodes, J),) = gain.results()
    assert len(episodes) == 10 and len(completion.tokens) == 1000
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(
        J, predicted_correctness_ref(model, prompt, completion.tokens, episodes, probe), atol=0, rtol=1e-5
    )
    forwards = sampler.forwards
    trunk = forwards.prefill + forwards.decode
    print(
        f"\ntoken-forwards: {sum(seen)} full, {forwards.probe} for probes, {forwards.probe + trunk} with the "
        "trunk"
    )
    assert sum(seen) == 6875 and forwards.probe == 275
    assert sum(seen) >= 5 * (forwards.probe + trunk)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mc", "continue"])
def test_sampled_gains_estimate_the_probability_of_being_right(kind):
    """Right is an answer that starts with an even digit, or a completion whose last digit is even: about
    as often as not.
    """
    model = tiny_model(dtype=torch.float32, scale=2.0)
    sampler = Sampler(model, Digits(), num_pages=4000, page_size=4)
    graded = []

    def grade(prompt, text):
        digits = [c for c in text if c.isdigit()]
        graded.append((prompt, text, bool(digits) and int(digits[0 if kind == "mc" else -1]) % 2 == 0))
        return graded[-1][-1]

    def estimate():
        probes = [make_probe(Digits(), "42", "<a>", "</a>")] * 2
        gain = Gain(sampler, probes, lambda tokens: segment(tokens, Digits(), "fixed:4"), kind, samples=40, max_tokens=10,
                    grade=grade, keys=[(5, 0), (5, 1)])  # fmt: skip
        groups = sampler.generate([[1, 2, 3], [4]], n=2, max_tokens=10, on_finish=gain.on_finish)
        return groups, gain.results()

    groups, results = estimate()
    assert sampler.pool.free_pages == 4000
    if kind == "mc":
        assert any("</a>" in text[:-4] for _, text, _ in graded), (
            "a terminator may stand inside an answer too: it ends nothing"
        )
    assert len(graded) == 40 * sum(len(J) for _, J in results)
    assert sum(40 * float(J.sum()) for _, J in results) == pytest.approx(sum(right for *_, right in graded))
    completions = [completion for group in groups for completion in group]
    for i, (completion, (episodes, J)) in enumerate(zip(completions, results)):
        for n, j in zip(episodes.prefixes[1:], J[1:]):
            start = "<a>" if kind == "mc" else Digits().decode(completion.tokens[:n])
            rights = [right for prompt, text, right in graded if prompt == i // 2 and text.startswith(start)]
            assert len(rights) >= 40
            if kind == "continue":
                assert len(rights) > 40 or j == pytest.approx(sum(rights) / 40)
    J = torch.cat([J for _, J in results])
    assert 0.2 < J.mean() < 0.8 and J.std() > 0
    # the same address, the same draws
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(results, estimate()[1]))


@pytest.mark.slow
def test_a_sampled_answer_is_right_as_often_as_the_forced_one_is_probable():
    """On the embedded model, which knows how to answer behind its forcing text and nowhere else."""
    tokenizer, problems = Tokenizer(TINY), heldout()[150:500:90]
    sampler, J = Sampler(load_model(TINY), tokenizer), {}
    for kind in ("forced", "mc"):
        gain = Gain(
            sampler,
            [make_probe(tokenizer, p.answer, *forcing(p)) for p in problems],
            lambda tokens: segment(tokens, tokenizer),
            kind,
            samples=200,
            keys=[(p.id,) for p in problems],
            grade=lambda i, text: grade(text, problems[i].answer, problems[i].source),
        )
        sampler.generate(
            [tokenizer.encode_chat(messages(p)) for p in problems], max_tokens=200, on_finish=gain.on_finish
        )
        J[kind] = torch.cat([J for _, J in gain.results()])
    torch.testing.assert_close(J["mc"], J["forced"], atol=0.15, rtol=0)  # four standard deviations
    assert J["forced"].max() > 0.9 and ((J["forced"] > 0.2) & (J["forced"] < 0.8)).any()


@pytest.mark.parametrize("kind", ["mc", "continue"])
def test_every_prefix_draws_its_own_numbers(kind):
    """Four probes of the same prefix, as after an empty thinking: what is sampled differs, or their J
    would share their noise.
    """
    texts = []
    sampler = Sampler(tiny_model(dtype=torch.float32, scale=2.0), Digits(), num_pages=400, page_size=4)
    same = Episodes(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([0, 1, 4]), torch.tensor([-1, -1, -1]))
    gain = Gain(
        sampler,
        [make_probe(Digits(), "42", "<a>", "</a>")],
        lambda tokens: same,
        kind,
        samples=3,
        max_tokens=10,
        grade=lambda prompt, text: texts.append(text) is None,
        keys=[(5, 0)],
    )
    sampler.generate([[1, 2, 3]], max_tokens=5, stop_ids=[], on_finish=gain.on_finish)
    gain.results()
    assert len(texts) == len(set(texts)) == 4 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind, num_pages", [("forced", 10), ("mc", 13), ("continue", 16)])
def test_the_smallest_pool_gives_the_same_gains(kind, num_pages):
    """As many pages as the longest probe needs alone: rows, prompts and forks that wait have to make room
    for each other.
    """

    def gains(num_pages, max_rows):
        sampler = Sampler(
            tiny_model(dtype=torch.float32, scale=2.0), Digits(), num_pages, page_size=4, max_rows=max_rows
        )
        gain = Gain(
            sampler,
            [make_probe(Digits(), "42", "<a>", "</a>")] * 2,
            every(6),
            kind,
            samples=3,
            max_tokens=30,
            grade=lambda prompt, text: text[-1] in "02468",
            keys=[(5, 0), (5, 1)],
        )
        sampler.generate([[1, 2, 3, 4, 5], [7]], n=3, max_tokens=30, stop_ids=[], on_finish=gain.on_finish)
        assert gain.forwards > 0 or max_rows != 6, "what waits is asked as soon as pages get short"
        J = [J for _, J in gain.results()]
        assert sampler.pool.free_pages == num_pages and not sampler.idle
        return torch.cat(J)

    for max_rows in (1, 6):
        torch.testing.assert_close(
            gains(num_pages, max_rows), gains(4000, 256), atol=1e-6 * (kind == "forced"), rtol=0
        )


def test_misused_nouns_are_explained():
    with pytest.raises(ValueError, match="forced, mc or continue"):
        Gain(None, [], None, "prm")
    with pytest.raises(ValueError, match="svd, lm_head, last_block or layers"):
        Proxy(tiny_model(), "core")
    with pytest.raises(UserError, match=r"outside \(0, 1\]"):
        Proxy(tiny_model(), "svd", rank_share=0.0)
