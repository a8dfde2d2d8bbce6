"""The loss is held to numbers from two published implementations, to finite differences, and to sums done
by hand.
"""

import math

import pytest
import torch

from thinkrl.grpo import (
    SURROGATES,
    batch_std,
    gdpo_advantages,
    group_advantages,
    importance_weight,
    kl_k3,
    loss_count,
    policy_loss,
)

# Four completions of 3, 1, 4 and 2 tokens, each behind a prompt of 2 tokens that must not count.
LENGTHS = [3, 1, 4, 2]
LOGPROB = [-0.5, -1.2, -0.1, -2.0, -0.7, -0.3, -1.5, -0.9, -0.2, -1.1]
OLD = [-0.6, -0.8, -0.1, -1.6, -0.9, -0.6, -1.4, -0.5, -0.5, -1.2]
REF = [-0.4, -1.0, -0.3, -2.5, -0.7, -0.2, -1.1, -1.3, -0.1, -1.0]
WEIGHT = [1.0, 0.5, 2.0, 0.9, 1.1, 0.8, 1.3, 2.0, 0.7, 1.0]
UNIFORM = [1.5, 1.5, 1.5, -0.5, -1.0, -1.0, -1.0, -1.0, 0.25, 0.25]
DENSE = [0.5, -0.25, 1.0, -2.0, 0.75, -1.5, 0.25, 2.0, -0.5, 1.25]


def packed(values, fill=float("nan")):
    """Completion values -> one row with prompts, whose columns hold `fill`."""
    values, row = iter(values), []
    for n in LENGTHS:
        row += [fill, fill] + [next(values) for _ in range(n)]
    return torch.tensor(row, dtype=torch.float64)


def completions(row):
    return row[packed(LOGPROB, fill=0.0) != 0]


def close(x, golden):
    """To the nine decimals that golden numbers are stored with."""
    torch.testing.assert_close(x, torch.tensor(golden, dtype=torch.float64), rtol=0, atol=2e-9)


MASK = packed([1.0] * 10, fill=0.0)
ICEPOP = [1.0, 0, 0, 0.9, 1.1, 0.8, 1.3, 0, 0, 1.0]  # WEIGHT within [0.8, 1.5]
CU_SEQLENS = torch.tensor([0, 5, 8, 14, 18], dtype=torch.int32)


# Written by trl 1.16.0 (GRPOTrainer._compute_loss) and verl 0.9.1 (get_policy_loss_fn, clip_ratio_c=1e9),
# torch 2.13.0, in fp64, on the padded form of the batch above. The two agree to 1e-9 in value and gradient in
# every row up to "KL"; verl's GSPO ran with loss_agg_mode="seq-mean-token-mean", its KL is low_var_kl. CISPO
# is TRL's with epsilon_high=1.2 and verl's with clip_ratio_low=1; with both bounds it is verl's. SAPO's value
# is the formula's: TRL keeps the temperature of 1.05 in fp32 (6e-8 more), verl adds 1e-8 to a sequence's
# length (6e-9 less). IcePop is TRL's vllm_importance_sampling_mode="token_mask" with bounds 0.8 and 1.5. DPPO
# is the formula of prime-rl's default_loss_fn (both masks 0.1, kl_tau=0), run for these numbers, not prime-rl
# itself; the gradient is also that of verl's dppo_tv, whose value has A ratio logprob instead of A ratio.
GOLDEN = {
    "DAPO": (
        dict(advantage=UNIFORM, clip_low=0.2, clip_high=0.28),
        -0.008343019,
        [-0.165775638, -0.100548007, -0.15, 0, 0.122140276, 0.134985881, 0.090483742, 0, 0, -0.027629273],
    ),
    "dense advantages": (
        dict(advantage=DENSE),
        -0.090118094,
        [-0.055258546, 0, -0.1, 0, 0, 0.202478821, -0.022620935, -0.134064009, 0.06749294, -0.138146365],
    ),
    "GRPO": (
        dict(advantage=UNIFORM, aggregate="sequence"),
        -0.051716775,
        [-0.138146364, -0.083790005, -0.125, 0, 0.076337672, 0.084366175, 0.056552338, 0, 0, -0.034536591],
    ),
    "Dr.GRPO": (
        dict(advantage=UNIFORM, aggregate="constant", denominator=16),
        -0.003964387,
        [-0.103609774, -0.062842504, -0.09375, 0, 0.076337672, 0.084366175, 0.056552339, 0, 0, -0.017268296],
    ),
    "GSPO": (
        dict(advantage=UNIFORM, aggregate="sequence", level="sequence", clip_low=0.03, clip_high=0.04),
        -0.033064032,
        [-0.113104677, -0.113104677, -0.113104677, 0, 0.0625, 0.0625, 0.0625, 0.0625, 0, 0],
    ),
    "importance weights": (
        dict(advantage=UNIFORM, weight=WEIGHT),
        -0.008707042,
        [-0.165775638, -0.050274003, -0.3, 0, 0.134354303, 0.107988705, 0.117628864, 0, 0, -0.027629273],
    ),
    "KL": (
        dict(advantage=UNIFORM, aggregate="sequence", ref_logprob=REF, kl_coef=0.04),
        -0.050030456,
        [
            -0.138496934,
            -0.084528015,
            -0.124395769,
            0.003934693,
            0.076337672,
            0.084103248,
            0.055322777,
            0.0008242,
        ]
        + [-0.000525855, -0.035062446],
    ),
    "IcePop": (
        dict(advantage=UNIFORM, weight=ICEPOP),
        0.202566962,
        [-0.165775638, 0, 0, 0, 0.134354303, 0.107988705, 0.117628864, 0, 0, -0.027629273],
    ),
    "CISPO": (
        dict(advantage=DENSE, surrogate="cispo", clip_low=1.0, clip_high=0.2),
        0.052941666,
        [-0.055258546, 0.016758001, -0.1, 0.134064009, -0.09, 0.18, -0.022620935, -0.134064009, 0.06]
        + [-0.138146365],
    ),
    "CISPO, both bounds": (
        dict(advantage=UNIFORM, surrogate="cispo"),
        -0.129445594,
        [-0.165775638, -0.12, -0.15, 0.04, 0.12, 0.12, 0.090483742, 0.08, -0.03, -0.027629273],
    ),
    "SAPO": (
        dict(advantage=DENSE, surrogate="sapo", aggregate="sequence"),
        0.247422016,
        [-0.045921687, 0.013554862, -0.083333333, 0.325316683, -0.05655732, 0.122374112, -0.014106125]
        + [-0.081553862, 0.081582741, -0.172206327],
    ),
    "DPPO": (
        dict(advantage=UNIFORM, surrogate="dppo", clip_low=0.1, clip_high=0.1),
        -0.062827017,
        [-0.165775638, -0.100548007, -0.15, 0.033516002, 0.122140276, 0.134985881, 0.090483742, 0, 0]
        + [-0.027629273],
    ),
    "DPPO, dense advantages": (
        dict(advantage=DENSE, surrogate="dppo", clip_low=0.1, clip_high=0.1),
        -0.137659291,
        [-0.055258546, 0, -0.1, 0.134064009, -0.091605207, 0.202478821, -0.022620935, -0.134064009]
        + [0.06749294, -0.138146365],
    ),
    "importance weights leave the KL alone": (
        dict(advantage=UNIFORM, weight=WEIGHT, ref_logprob=REF, kl_coef=0.04),
        -0.007389071,
        [
            -0.166196321,
            -0.051159614,
            -0.299274923,
            0.001573877,
            0.134354303,
            0.107568021,
            0.115661566,
            0.00131872,
        ]
        + [-0.000420684, -0.028049957],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_and_gradient_agree_with_published_code(name):
    options, value, gradient = GOLDEN[name]
    options = {k: packed(v) if isinstance(v, list) else v for k, v in options.items()}
    logprob = packed(LOGPROB).requires_grad_()
    loss, _ = policy_loss(logprob, packed(OLD), options.pop("advantage"), MASK, CU_SEQLENS, **options)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=2e-9)
    close(completions(logprob.grad), gradient)
    assert logprob.grad[MASK == 0].abs().sum() == 0  # the NaNs of the prompts reached nothing


def test_group_advantages_agree_with_verl():
    reward = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.25]], dtype=torch.float64)
    verl = [[1.154698538, -0.577349269, -0.577349269], [0.577346269, 0.577346269, -1.154692538]]  # 0.9.1
    close(group_advantages(reward), verl)
    trl = [[1.154500573, -0.577250287, -0.577250287], [0.576950546, 0.576950546, -1.153901092]]  # 1.16.0
    close(group_advantages(reward, eps=1e-4), trl)


def test_group_advantages_by_hand():
    reward = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    half = 1 / math.sqrt(2)  # a pair differs from its mean by half the gap; its sample std is gap / sqrt(2)
    torch.testing.assert_close(group_advantages(reward), torch.tensor([[half, -half], [-half, half]]))
    torch.testing.assert_close(
        group_advantages(reward, "population"), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    )
    assert group_advantages(reward, "none").tolist() == [[1.0, -1.0], [-0.5, 0.5]]
    assert group_advantages(torch.tensor([[1, 0]]), "none").tolist() == [[0.5, -0.5]]
    assert reward.tolist() == [[3.0, 1.0], [0.0, 1.0]]


def test_batch_std_by_hand():
    """Differences of 1, -1, 3 and -3, over all groups: sum of squares 20, over 4 - 1."""
    reward = torch.tensor([[2.0, 0.0], [7.0, 1.0]], dtype=torch.float64)
    scale = math.sqrt(20 / 3)
    close(group_advantages(reward, "batch", eps=0.0), [[1 / scale, -1 / scale], [3 / scale, -3 / scale]])
    assert group_advantages(torch.ones(2, 2), "batch").tolist() == [[0.0] * 2] * 2
    spread = torch.tensor([[1.0, 1.0 + 1e-9], [1.0, 0.0]], dtype=torch.float64)
    assert group_advantages(spread, "batch")[0].tolist() == [0.0, 0.0], "rounding is no reward"


def test_batch_std_does_not_depend_on_who_holds_which_group():
    reward = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [reward[:1], reward[1:]]
    shares: list = []
    for part in parts:
        group_advantages(part, "batch", reduce=lambda sums: shares.append(sums) or sums)
    apart = [group_advantages(part, "batch", reduce=lambda _: sum(shares)) for part in parts]
    torch.testing.assert_close(torch.cat(apart), group_advantages(reward, "batch"), rtol=1e-14, atol=0)


def test_maxrl_divides_by_the_mean():
    """As prime-rl's max_rl_advantage_fn: one right of four has 3, the others -1; no right answer, nothing to
    say.
    """
    reward = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    expected = [[3.0, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0] * 4, [0] * 4]
    torch.testing.assert_close(group_advantages(reward, "mean"), torch.tensor(expected))
    with pytest.raises(ValueError, match="at least 0"):
        group_advantages(-reward, "mean")


def test_gdpo_agrees_with_trl():
    right = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]])
    brief = torch.tensor([[0, -0.5, -1, 0], [-0.25, 0, 0, -1]])
    trl = [
        [1.230782945, -0.975261131, -1.48630476, 1.230782945],
        [-0.424672549, -0.166197252, -0.166197252, 0.757067053],
    ]
    close(gdpo_advantages([right, brief], [1.0, 0.5], eps=1e-4), trl)  # 1.16.0, "normalize_then_sum"


def test_gdpo_by_hand():
    """One reward is worth a hundred times the other: both count the same. Two groups of two, so every z is
    ±sqrt(1/2).
    """
    large, small = torch.tensor([[100.0, 0.0], [100.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    total = gdpo_advantages([large, small], [1.0, 1.0], eps=0.0)
    # the sums are ±sqrt(2) in the first group and 0 in the second: squares 4, over 4 - 1
    scale = math.sqrt(4 / 3)
    close(total, [[math.sqrt(2) / scale, -math.sqrt(2) / scale], [0, 0]])
    close(gdpo_advantages([large, small], [1.0, 0.0], eps=0.0), [[math.sqrt(3) / 2, -math.sqrt(3) / 2]] * 2)
    assert batch_std(total) == pytest.approx(1)
    with pytest.raises(ValueError, match="weights"):
        gdpo_advantages([large], [1.0, 1.0])


@pytest.mark.parametrize("std", ["sample", "population", "none", "mean"])
def test_equal_rewards_give_exactly_zero(std):
    third = 1 / 3
    reward = torch.tensor(
        [[0.7] * 4, [third, third + 1e-9, third, third], [0.0] * 4, [1e6, 1e6 + 0.1, 1e6, 1e6]]
    )
    assert group_advantages(reward.double(), std).tolist() == [[0.0] * 4] * 4
    assert group_advantages(torch.tensor([[1.0, 1.0 + 1e-5]], dtype=torch.float64), std)[0, 1] > 0


@pytest.mark.parametrize("std", ["sample", "population", "none", "mean"])
def test_what_could_not_be_rewarded_stays_out_of_the_statistics(std):
    nan = math.nan
    reward = torch.tensor(
        [[1.0, nan, 0.0, nan, 5.0], [nan, 2.0, nan, nan, nan], [nan] * 5, [3.0, 3.0, nan, 3.0, 3.0]]
    )
    advantage = group_advantages(reward, std)
    rest = group_advantages(torch.tensor([[1.0, 0.0, 5.0]]), std)[0]
    torch.testing.assert_close(advantage[0, [0, 2, 4]], rest, rtol=0, atol=0)
    assert advantage[0, [1, 3]].tolist() == [0, 0]
    assert advantage[1:].abs().max() == 0, "nothing to compare with, or nothing to tell apart"
    if std == "none":
        assert advantage[0].tolist() == [-1, 0, -2, 0, 3]
    # of the batch's eight rewards, three differ from their mean, by -1, -2 and 3: 14 / 7
    close(group_advantages(reward.double(), "batch", eps=0)[0] * 2**0.5, [-1, 0, -2, 0, 3])


def test_a_group_of_one_has_no_std():
    for std in ("sample", "population", "batch", "mean"):
        with pytest.raises(ValueError, match="group of 1"):
            group_advantages(torch.ones(3, 1), std)
    assert group_advantages(torch.ones(3, 1), "none").tolist() == [[0.0]] * 3


KINDS = [(surrogate, "token") for surrogate in SURROGATES] + [("clip", "sequence")]


@pytest.mark.parametrize("surrogate, level", [kind for kind in KINDS if kind[0] != "cispo"])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_gradient_is_the_derivative(aggregate, surrogate, level):
    def loss(logprob, ref_logprob):
        return policy_loss(
            logprob, packed(OLD), packed(UNIFORM), MASK, CU_SEQLENS, ref_logprob=ref_logprob, weight=weight,
            kl_coef=0.1, aggregate=aggregate, surrogate=surrogate, level=level, denominator=7.0,
        )[0]  # fmt: skip

    # at sequence level the published gradient sees one weight per sequence, as importance weights there are
    weight = packed(WEIGHT if level == "token" else [2.0] * 10)
    logprob = packed(LOGPROB, fill=-1.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logprob, packed(REF, fill=-1.0).requires_grad_()))


@pytest.mark.parametrize("surrogate, level", KINDS)
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_gradient_does_not_depend_on_how_the_step_is_cut(aggregate, surrogate, level):
    def gradient(groups):
        """The step's gradient when its sequences enter in these groups, each a row of its own."""
        logprob = packed(LOGPROB).requires_grad_()
        rows = []
        for group in groups:
            index = torch.cat([torch.arange(CU_SEQLENS[s], CU_SEQLENS[s + 1]) for s in group])
            lengths = [0] + [int(CU_SEQLENS[s + 1] - CU_SEQLENS[s]) for s in group]
            rows.append((index, torch.tensor(lengths).cumsum(0).int()))
        total = sum(loss_count(MASK[index], cu, aggregate) for index, cu in rows)
        for i, cu in rows:
            options = dict(ref_logprob=packed(REF)[i], kl_coef=0.1, aggregate=aggregate, denominator=total)
            options |= dict(surrogate=surrogate, level=level)
            policy_loss(logprob[i], packed(OLD)[i], packed(DENSE)[i], MASK[i], cu, **options)[0].backward()
        return logprob.grad

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().sum() > 0
    for groups in ([[0], [1], [2], [3]], [[2, 0], [3, 1]], [[1], [3, 2, 0]]):
        torch.testing.assert_close(gradient(groups), whole, rtol=1e-14, atol=1e-16)


def test_on_policy_loss_by_hand():
    logprob = torch.tensor([0.0, -1.0, -2.0, 0.0, -3.0], requires_grad=True)
    mask, cu_seqlens = torch.tensor([0.0, 1, 1, 0, 1]), torch.tensor([0, 3, 5], dtype=torch.int32)
    advantage = torch.tensor([0.0, 1.0, 1.0, 0.0, -4.0])
    loss, stats = policy_loss(logprob, None, advantage, mask, cu_seqlens)
    assert loss.item() == pytest.approx(2 / 3)  # -(1 + 1 - 4) / 3 tokens
    loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([0, -1 / 3, -1 / 3, 0, 4 / 3]))
    assert {k: (s.item(), n.item()) for k, (s, n) in stats.items()} == {
        "ratio": (3.0, 3.0),
        "advantage_abs": (6.0, 3.0),
        "clip_fraction": (0.0, 3.0),
        "kl_old": (0.0, 3.0),
    }
    loss, _ = policy_loss(logprob, None, advantage, mask, cu_seqlens, aggregate="sequence")
    assert loss.item() == pytest.approx(1.5)  # (-1 + 4) / 2 sequences


def test_the_clip_by_hand():
    """Ratio 2 and 1/2: what raises a good token or lowers a bad one too far is cut, the way back never is."""
    logprob = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    loss, stats = policy_loss(
        logprob, torch.zeros(4), advantage, torch.ones(4), cu_seqlens, clip_high=0.28, denominator=1
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.28 + 2.0 - 0.5 + 0.8)
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, 2.0, -0.5, 0.0]))
    assert stats["clip_fraction"][0] == 2 and stats["clip_fraction"][1] == 4


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bell(x):
    return sigmoid(x) * sigmoid(-x)


@pytest.mark.parametrize(
    "surrogate, gain, slope, clipped",
    [
        # the weight is bounded at 1.28 and 0.8, and multiplies A log p
        ("cispo", [1.28 * math.log(0.6), -1.28 * math.log(0.6), 0.8 * math.log(0.15), -0.8 * math.log(0.15)],
         [1.28, -1.28, 0.8, -0.8], 4),
        # 4 / tau sigmoid(tau (ratio - 1)), tau = 1 for gains, 1.05 for losses; slope 4 s (1 - s) ratio
        ("sapo", [4 * sigmoid(1), -4 / 1.05 * sigmoid(1.05), 4 * sigmoid(-0.5), -4 / 1.05 * sigmoid(-0.525)],
         [8 * bell(1), -8 * bell(1.05), 2 * bell(0.5), -2 * bell(0.525)], 0),
        # p rises by .3 and falls by .15: only the rise of a good token is beyond .28, only a bad one's fall
        # beyond .1
        ("dppo", [0, -2, 0.5, -0.5], [0, -2, 0.5, -0.5], 1),
        ("dppo, 0.1 and 0.35", [2, -2, 0.5, 0], [2, -2, 0.5, 0], 1),
    ],
)  # fmt: skip
def test_the_other_surrogates_by_hand(surrogate, gain, slope, clipped):
    """Ratio 2 and 1/2 as above, with probabilities: 0.3 -> 0.6 and 0.3 -> 0.15."""
    kind, low, high = ("dppo", 0.1, 0.35) if "," in surrogate else (surrogate, 0.2, 0.28)
    logprob = torch.tensor([0.6, 0.6, 0.15, 0.15]).double().log().requires_grad_()
    old, advantage = torch.full((4,), 0.3).double().log(), torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    loss, stats = policy_loss(
        logprob, old, advantage, torch.ones(4), cu_seqlens, surrogate=kind, clip_low=low, clip_high=high,
        denominator=1,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(-sum(gain), abs=1e-7)
    torch.testing.assert_close(logprob.grad, -torch.tensor(slope).double(), rtol=0, atol=1e-7)
    assert stats["clip_fraction"][0] == clipped


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_every_surrogate_has_the_same_gradient(surrogate):
    """A times that of the log-prob: they differ in what happens once the policy has moved."""
    logprob = packed(LOGPROB).requires_grad_()
    policy_loss(logprob, None, packed(DENSE), MASK, CU_SEQLENS, surrogate=surrogate)[0].backward()
    torch.testing.assert_close(completions(logprob.grad), -torch.tensor(DENSE).double() / 10)


def test_sequence_level_ratio_is_the_geometric_mean():
    logprob = torch.tensor([4.0, 1.0, 1.0]).log()  # against old log-probs of 0: ratios 4 and 1, then 1 alone
    options = dict(cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32), level="sequence", clip_high=9.0)
    _, stats = policy_loss(logprob, torch.zeros(3), torch.ones(3), torch.ones(3), **options)
    assert stats["ratio"][0].item() == pytest.approx(2 + 2 + 1)


@pytest.mark.parametrize("surrogate, level", KINDS)
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_a_row_that_is_masked_throughout_adds_nothing(aggregate, surrogate, level):
    nan = torch.full((4,), float("nan"), requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    loss, stats = policy_loss(
        nan, nan.detach(), nan.detach(), torch.zeros(4), cu_seqlens, ref_logprob=nan.detach(), weight=nan.detach(),
        kl_coef=1.0, aggregate=aggregate, surrogate=surrogate, level=level,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0 and nan.grad.tolist() == [0.0] * 4
    assert all(total == 0 and count == 0 for total, count in stats.values())
    assert loss_count(torch.zeros(4), cu_seqlens, aggregate) == 0


def test_nan_where_the_mask_is_one_is_not_hidden():
    loss, _ = policy_loss(
        torch.tensor([0.0, float("nan")]),
        None,
        torch.ones(2),
        torch.ones(2),
        torch.tensor([0, 2], dtype=torch.int32),
    )
    assert loss.isnan()


def test_loss_count_counts_sequences_that_have_a_token():
    mask, cu_seqlens = torch.tensor([0.0, 1, 1, 0, 0, 1]), torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    assert loss_count(mask, cu_seqlens, "token") == 3
    assert loss_count(mask, cu_seqlens, "sequence") == 2
    with pytest.raises(ValueError, match="constant"):
        loss_count(mask, cu_seqlens, "constant")


def test_k3_by_hand_and_at_its_edges():
    two = math.log(2)
    k3 = kl_k3(torch.tensor([0.0, 0.0, -1.0]), torch.tensor([two, -two, -1.0]))
    torch.testing.assert_close(k3, torch.tensor([1 - two, two - 0.5, 0.0]))
    far = torch.tensor([0.0, -100.0], requires_grad=True)
    kl_k3(far, torch.tensor([-100.0, 0.0])).sum().backward()
    assert kl_k3(far, far.flip(0)).isfinite().all() and far.grad.tolist() == [0.0, 0.0]


def test_k3_is_never_negative_and_keeps_its_digits():
    d = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 0, 100_000)
    k3 = kl_k3(torch.zeros_like(d), d)
    exact = torch.expm1(d.double()) - d.double()
    assert (k3 >= 0).all()
    assert ((torch.exp(d) - d - 1) < 0).any()  # what the textbook form does
    visible = d.abs() > 1e-3
    assert ((k3 - exact).abs() / exact)[visible].max() < 5e-4  # half an ulp of d over d^2 / 2


def test_importance_weights_are_truncated_and_carry_no_gradient():
    trainer = torch.tensor([2.0, 0.5, 9.0]).log().requires_grad_()
    weight = importance_weight(trainer, torch.zeros(3), cap=3.0)
    torch.testing.assert_close(weight, torch.tensor([2.0, 0.5, 3.0]))
    assert not weight.requires_grad


def test_icepop_weights_are_zero_outside_their_bounds():
    trainer = packed(WEIGHT, fill=1.0).log()
    weight = importance_weight(trainer, torch.zeros_like(trainer), cap=1.5, low=0.8)
    close(completions(weight), ICEPOP)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(level="word"), "level"),
        (dict(surrogate="ppo"), "surrogate"),
        (dict(surrogate="sapo", level="sequence"), "level"),
        (dict(aggregate="mean"), "aggregate"),
        (dict(aggregate="constant"), "denominator"),
        (dict(kl_coef=0.1), "ref_logprob"),
    ],
)
def test_wrong_options_are_named(options, message):
    one = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        policy_loss(one, None, one, one, torch.tensor([0, 1], dtype=torch.int32), **options)
    with pytest.raises(ValueError, match="std"):
        group_advantages(torch.ones(1, 2), std="mad")
