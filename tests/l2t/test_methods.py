"""Other credits, and the settings of --method, each against its formula on recorded completions."""

import itertools
import math
import statistics

import pytest
import torch

from thinkrl.config import parse
from thinkrl.grpo import group_advantages
from thinkrl.l2t.credit import (
    batch_scaled,
    discounted,
    local_advantages,
    process_reward,
    step_advantages,
    to_go_advantages,
)
from thinkrl.l2t.episodes import Episodes
from thinkrl.l2t.gain import Gain, Probe, answer_probability
from thinkrl.l2t.preset import L2T, EpisodeTrajectory
from thinkrl.run.metrics import Tally
from thinkrl.types import Problem, Turn

pytestmark = pytest.mark.usefixtures("world")


def recorded(J: list[float], outcome: float, lengths: list[int]) -> EpisodeTrajectory:
    """A completion of episodes of these lengths, with what its probes said."""
    ends, total = torch.tensor(lengths).cumsum(0) - 1, sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    values = torch.tensor(J, dtype=torch.float64)
    return EpisodeTrajectory(
        Problem(0, "?", "1"),
        0,
        [Turn("policy", [0], list(range(total)), [-0.5] * total, "stop")],
        outcome_reward=outcome,
        reward=outcome,
        episodes=Episodes(ids, ends, ends),
        J=values,
        penalty=torch.zeros(len(lengths), dtype=torch.float64),
        process_reward=process_reward(values, torch.zeros(len(lengths)), 0.0),
    )


def advantages(group: list[EpisodeTrajectory], *argv: str) -> list[list[float]]:
    """The L2T preset's advantages of one group, per episode."""
    preset = L2T.__new__(L2T)  # without a model: credit needs the options alone
    preset.config = parse(["l2t", *argv, "--group_size", str(len(group))])
    out = preset.advantages(group, 0, Tally())
    for t, a in zip(group, out, strict=True):
        assert all(len(set(part)) == 1 for part in per_episode(t, a)), (
            "one number for all tokens of an episode"
        )
    return [[part[0] for part in per_episode(t, a)] for t, a in zip(group, out)]


def per_episode(t: EpisodeTrajectory, advantage: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in advantage.split(t.episodes.lengths.tolist())]


RIGHT = recorded([0.25, 0.5, 1.0], 1.0, [1, 2])  # gains .25, .5
WRONG = recorded([0.25, 0.0, 0.25], 0.0, [2, 1])  # gains -.25, .25
GROUP = [RIGHT, WRONG]


def close(x, expected):
    assert [v for row in x for v in row] == pytest.approx([v for row in expected for v in row], abs=1e-6)


def test_mrt_adds_the_progress_to_the_outcome():
    """r = c + 0.2 (J_K - J_0): 1.15 against 0, so .575 to both sides of their mean."""
    close(advantages(GROUP, "--method", "mrt", "--advantage_std", "none"), [[0.575] * 2, [-0.575] * 2])


def test_vineppo_credits_an_episode_with_its_change_of_value():
    """A_k = V_k - V_{k-1}, the last one c - V_{K-1}: .25, .5 and -.25, 0, by the rms over 1 + 2 + 2 + 1
    tokens.
    """
    rms = math.sqrt((0.25**2 + 2 * 0.5**2 + 2 * 0.25**2) / 6)
    close(advantages(GROUP, "--method", "vineppo"), [[0.25 / rms, 0.5 / rms], [-0.25 / rms, 0]])


def test_vineppo_needs_no_group():
    """Where both are wrong, GRPO has nothing to say; the episode that lost the chance is told."""
    wrong = [WRONG, WRONG]
    assert advantages(wrong, "--profile", "grpo") == [[0.0, 0.0], [0.0, 0.0]]
    assert all(row[0] < 0 and row[1] == 0 for row in advantages(wrong, "--method", "vineppo"))


@pytest.mark.parametrize("method, scale", [("igpo", lambda j: j), ("pacr", math.log)])
def test_igpo_and_pacr_normalise_all_turns_of_a_group_and_sum_to_the_end(method, scale):
    """The paper: z over all gains and outcomes of the group; a turn gets its z and all later ones, γ = 1."""
    group, gains = [], []
    for J, outcome, lengths in (([0.25, 0.5, 1.0], 1.0, [1, 2]), ([0.25, 0.125, 0.25], 0.0, [2, 1])):
        J = [scale(j) for j in J]
        group.append(recorded(J, outcome, lengths))
        gains.append([b - a for a, b in itertools.pairwise(J)] + [outcome])
    everything = gains[0] + gains[1]
    mean, std = statistics.mean(everything), statistics.stdev(everything)
    z = [[(r - mean) / (std + 1e-6) for r in row] for row in gains]
    close(advantages(group, "--method", method), [[sum(row), sum(row[1:])] for row in z])


def test_step_credit_without_lambda_is_an_episode_s_own():
    """R = .25, .5 and -.25, .25, outcomes 1 and 0, mean 7/24; the answer belongs to the last episode."""
    options = ["--credit", "step", "--alpha", "1", "--beta", "0", "--compression", "none"]
    m = 1.75 / 6
    close(
        advantages(GROUP, *options, "--advantage_std", "none"),
        [[0.25 - m, 1.5 - 2 * m], [-0.25 - m, 0.25 - 2 * m]],
    )
    half = advantages(GROUP, *options, "--advantage_std", "none", "--credit_lambda", "0.5")
    close(half, [[0.25 - m + 0.75 - m, 1.5 - 2 * m], [-0.25 - m + 0.125 - m, 0.25 - 2 * m]])
    equal = step_advantages(torch.zeros(2), [torch.zeros(2), torch.zeros(1)], 1.0, 1.0)
    assert [row.tolist() for row in equal] == [[0.0, 0.0], [0.0]]


def test_alpha_weighs_gains_against_the_outcome():
    """R = .125, .25 and -.125, .125 beside 1 and 0: mean 1.375 / 6."""
    options = ["--credit", "step", "--alpha", "0.5", "--beta", "0", "--compression", "none"]
    m = 1.375 / 6
    close(
        advantages(GROUP, *options, "--advantage_std", "none"),
        [[0.125 - m, 1.25 - 2 * m], [-0.125 - m, 0.125 - 2 * m]],
    )


def test_discounted_by_hand():
    rewards = torch.tensor([1.0, 2.0])
    assert discounted(rewards, 1.0).tolist() == [3.0, 2.0] and rewards.tolist() == [1.0, 2.0]
    assert discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted(torch.tensor([1.0, 2.0, 4.0]), 0.0).tolist() == [1.0, 2.0, 4.0]


def test_local_credit_by_hand():
    J, free = RIGHT.J, torch.zeros(2)
    assert local_advantages(1.0, J, free, 0.0).tolist() == [0.25, 0.5]
    assert local_advantages(1.0, J, free, 0.5).tolist() == [0.5, 0.5]
    assert local_advantages(1.0, J, free, 1.0).tolist() == [0.75, 0.5], "the outcome less the state's value"
    assert local_advantages(1.0, J, torch.tensor([0.125, 0.25]), 0.0).tolist() == [0.125, 0.25], (
        "each pays its own"
    )
    assert local_advantages(0.0, torch.tensor([0.25, 0.75]), torch.zeros(1), 0.5).tolist() == [-0.25], (
        "J_K is not read"
    )


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_local_credit_is_unbiased(lam):
    """Two episodes of one binary token each, J from one continuation (M = 1), everything enumerated.

    The expectation of sum_k A_k ∂ log π(z_k | s_k) is the gradient of the expected outcome, to rounding.
    """
    # of z1, of z2 after 0, after 1
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    one = torch.sigmoid(logits)  # probability of a 1
    outcome = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 0.0}

    def p(index: int, z: int) -> torch.Tensor:
        return one[index] if z else 1 - one[index]

    # value of the state after z1
    after = [sum(p(1 + z1, z2) * outcome[z1, z2] for z2 in (0, 1)) for z1 in (0, 1)]
    value = sum(p(0, z1) * after[z1] for z1 in (0, 1))
    (expected,) = torch.autograd.grad(value, logits, retain_graph=True)
    total = torch.zeros(3, dtype=torch.float64)
    # J0 and J1: did their one continuation succeed?
    for z1, z2, J0, J1 in itertools.product((0, 1), repeat=4):
        chance = p(0, z1) * p(1 + z1, z2)
        chance = chance * (value if J0 else 1 - value) * (after[z1] if J1 else 1 - after[z1])
        r = outcome[z1, z2]
        A = local_advantages(r, torch.tensor([float(J0), float(J1), r]).double(), torch.zeros(2), lam)
        for k, (index, z) in enumerate([(0, z1), (1 + z1, z2)]):
            (score,) = torch.autograd.grad(p(index, z).log(), logits, retain_graph=True)
            total += chance.detach() * A[k] * score
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
    assert expected.abs().min() > 0.01


def test_batch_scaled_by_hand_and_over_ranks():
    parts = [torch.tensor([3.0, -3.0]), torch.tensor([1.0, 1.0])]  # mean square (9 + 9 + 1 + 1) / 4 = 5
    scaled = batch_scaled(parts)
    torch.testing.assert_close(torch.cat(scaled), torch.tensor([3, -3, 1, 1]) / math.sqrt(5))
    shares = [torch.tensor([18.0, 2.0]).double(), torch.tensor([2.0, 2.0]).double()]
    apart = [batch_scaled([part], lambda own: sum(shares))[0] for part in parts]
    torch.testing.assert_close(apart, scaled)
    for part, share in zip(parts, shares):
        batch_scaled([part], lambda own, share=share: torch.testing.assert_close(own, share) or own)
    assert batch_scaled([torch.zeros(2)])[0].tolist() == [0.0, 0.0]


BATCH = ["--advantage_std", "batch", "--beta", "0", "--compression", "none", "--alpha", "1"]


@pytest.mark.parametrize(
    "options", [["--profile", "grpo"], ["--alpha", "0", "--compression", "none"]], ids=" ".join
)
def test_batch_std_without_process_reward_is_grpo_s(options):
    out = advantages(GROUP, *options, "--advantage_std", "batch")
    expected = group_advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64), "batch").float()[0].tolist()
    assert out == [[expected[0]] * 2, [expected[1]] * 2], "to the bit"


def test_batch_std_takes_one_scale_for_all_groups():
    """A group whose J differs by a hundredth is not blown up to the size of one that differs by 1."""
    calm = [recorded([0.5, 0.6], 1.0, [2]), recorded([0.5, 0.59], 1.0, [2])]
    lively = [recorded([0.0, 1.0], 1.0, [2]), recorded([0.0, 0.0], 0.0, [2])]
    preset = L2T.__new__(L2T)
    for more in ([], ["--credit", "guarded"], ["--statistic", "token_trunc_mean"]):
        preset.config = parse(["l2t", *BATCH, *more, "--group_size", "2"])
        out = [float(a[0]) for a in preset.advantages(calm + lively, 0, Tally())]
        assert out[0] / out[2] == pytest.approx(0.01 / 2, rel=1e-3) and out[2] == pytest.approx(-out[3])
        preset.config = parse(["l2t", *BATCH, *more, "--group_size", "2", "--advantage_std", "sample"])
        out = [float(a[0]) for a in preset.advantages(calm + lively, 0, Tally())]
        assert out[0] == pytest.approx(out[2], rel=1e-3)


@pytest.mark.parametrize("credit", ["to_go", "step"])
def test_batch_std_of_credit_per_episode_is_an_rms_over_tokens(credit):
    group = [*GROUP, recorded([0.25, 0.5, 0.5], 0.0, [3, 1])]
    options = [*BATCH, "--credit", credit]
    preset = L2T.__new__(L2T)
    preset.config = parse(["l2t", *options, "--group_size", "3"])
    out = torch.cat(preset.advantages(group, 0, Tally()))
    assert out.square().mean() == pytest.approx(1, rel=1e-5)
    preset.config = parse(["l2t", *options[2:], "--credit", credit, "--group_size", "3"])
    own = torch.cat(preset.advantages(group, 0, Tally()))
    ratio = out / own
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_to_go_unscaled_is_the_same_up_to_its_group_s_rms():
    to_go = [torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.25])]
    J, ids = [t.J for t in GROUP], [t.episodes.ids for t in GROUP]
    raw, scaled = (torch.cat(to_go_advantages(to_go, J, ids, scaled=s)) for s in (False, True))
    torch.testing.assert_close(raw / raw.square().mean().sqrt(), scaled)
    assert not torch.equal(raw, scaled)


def test_scales_of_a_forced_answer_by_hand():
    """Gold tokens of .5 and .125 behind two forcing tokens: p = 1/16, its geometric mean 1/4."""
    probe, logprob = Probe([7, 8], [1, 2]), torch.tensor([0.9, 0.9, 0.5, 0.125]).log()
    values = {s: float(answer_probability(logprob, probe, s)) for s in ("p", "geometric", "log")}
    assert values == pytest.approx({"p": 1 / 16, "geometric": 1 / 4, "log": math.log(1 / 16)})
    far = torch.full((4,), -900.0)
    assert float(answer_probability(far, probe, "log")) == -1800, "log p does not underflow where p does"
    for kind, scale in (("mc", "log"), ("forced", "odds")):
        with pytest.raises(ValueError, match="scale"):
            Gain(None, [], None, kind, scale=scale)
