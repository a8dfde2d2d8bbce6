"""Presets inside the step, on the embedded model: what each of them pays, and that its options reach the
reward.
"""

import copy
import dataclasses
import itertools
import json
import sys

import pytest
import torch

import thinkrl.l2t.compression
import train
from thinkrl import UserError, length
from thinkrl.arith import heldout
from thinkrl.checkpoint import save_hf
from thinkrl.config import parse
from thinkrl.grpo import group_advantages
from thinkrl.l2t import preset as preset_module
from thinkrl.l2t.episodes import segment
from thinkrl.l2t.prm import new_prm
from thinkrl.learner import TINY
from thinkrl.longshort.preset import LongShort
from thinkrl.longshort.protocol import Conversation
from thinkrl.model import ModelConfig, Transformer
from thinkrl.rollout import EVALUATION, sample_differences
from thinkrl.run.metrics import DEFINITIONS, Tally
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory

PROBLEMS = heldout()[40:240:100]  # one of two digits, one of three


def step_of(world, *argv: str):
    """One rollout of a preset with its advantages, at a fixed seed."""
    config = parse([*argv, "--group_size", "4", "--problems_per_step", "2", "--max_tokens", "100"])
    preset, tally = train.method(config.preset)(config, world), Tally()
    trajectories = preset.rollout(PROBLEMS, 0, tally)
    preset.reward(trajectories, 0, tally)
    return preset, trajectories, preset.advantages(trajectories, 0, tally), tally


@pytest.fixture(scope="module")
def default(world):
    return step_of(world, "l2t")


def test_l2t_pays_every_episode(default):
    _, trajectories, advantages, tally = default
    for t, advantage in zip(trajectories, advantages):
        K = len(t.episodes)
        assert t.episodes.ends[-1] + 1 == t.tokens == len(advantage) == len(t.episodes.ids)
        assert len(t.J) == K + 1 and len(t.compression) == len(t.penalty) == K
        assert ((t.J >= 0) & (t.J <= 1)).all() and (t.compression > 0).all()
        torch.testing.assert_close(t.process_reward, t.J.diff() - 0.6 * t.penalty)
    paid = sum(float(t.penalty.sum()) for t in trajectories) / len(trajectories)
    assert paid == pytest.approx(0.05), "the mean completion pays kappa"
    known = (tally.pairs.keys() | tally.sums.keys()) & DEFINITIONS.keys()
    assert {
        "episodes",
        "malformed",
        "fitting_gain",
        "compression",
        "penalty",
        "process_reward",
        "probe_tokens",
        "probe_seconds",
        "penalty_seconds",
        "penalty_tokens",
        "penalty_length_correlation",
    } <= known
    assert tally.sums["penalty_tokens"] == 0, "the states that the sampler kept serve"


@pytest.mark.slow
def test_rollouts_do_not_depend_on_the_preset(world, default):
    """So that arms of a comparison differ in the reward alone: the same address gives the same completion."""
    _, trajectories, _, _ = step_of(world, "grpo")
    assert [t.turns[0].completion for t in trajectories] == [t.turns[0].completion for t in default[1]]


def test_the_kernel_reaches_the_reward(world, default, monkeypatch):
    """Break kernels.fisher's quadratic form: what an episode is paid changes."""
    whole = thinkrl.l2t.compression.episode_quadratic
    monkeypatch.setattr(
        thinkrl.l2t.compression,
        "episode_quadratic",
        lambda x, g, cu, w, **more: whole(x, g, cu, w, **more).flip(0),
    )
    _, trajectories, _, _ = step_of(world, "l2t")
    assert any(not torch.equal(t.process_reward, u.process_reward) for t, u in zip(trajectories, default[1]))


@pytest.mark.slow
def test_profile_grpo_is_grpo_to_the_bit(world):
    _, _, plain, _ = step_of(world, "grpo")
    _, _, profile, _ = step_of(world, "l2t", "--profile", "grpo")
    assert any(a.abs().max() > 0 for a in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, profile))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--beta", "0"],
        ["--profile", "paper"],
        ["--credit", "guarded"],
        ["--credit", "to_go"],
        ["--credit", "step", "--credit_lambda", "0.5"],
        ["--credit", "local", "--gain_samples", "1", "--gain", "continue"],
        ["--gain_scale", "log"],
        ["--method", "mrt"],
        ["--advantage_std", "batch"],
        ["--statistic", "token_trunc_mean"],
        ["--compression", "rank1"],
        ["--compression", "natural"],
        ["--compression", "drift"],
        ["--proxy", "lm_head"],
        ["--proxy", "last_block"],
        ["--proxy", "layers"],
        ["--gain", "mc"],
        ["--gain", "continue"],
        ["--episodes", "fixed:10"],
        ["--alpha", "0"],
    ],
    ids=" ".join,
)
def test_every_option_changes_what_is_paid(world, default, options):
    _, trajectories, advantages, tally = step_of(world, "l2t", *options)
    assert all(a.isfinite().all() for a in advantages)
    spent = {key: tally.sums.get(key, 0) for key in ("probe_tokens", "penalty_tokens")}
    assert (spent["penalty_tokens"] > 0) == (options[-1] in ("last_block", "layers")), (
        "other proxies use the sampler's states"
    )
    assert spent["probe_tokens"] > default[3].sums["probe_tokens"] or options[-1] != "continue", "dearer"
    if options == ["--compression", "drift"]:
        assert all((t.compression == 0).all() for t in trajectories), (
            "nothing has moved before the first step"
        )
        return
    assert any(not torch.equal(a, b) for a, b in zip(advantages, default[2]))


def test_profile_code_sums_gains_by_length(world, monkeypatch):
    monkeypatch.setattr(preset_module, "load_prm", lambda *_: new_prm(TINY))
    monkeypatch.setattr(preset_module, "model_path", lambda *_: TINY)
    monkeypatch.setattr(
        preset_module,
        "score_completions",
        lambda model, prompts, completions, prefixes: [torch.linspace(0, 1, len(p)) for p in prefixes],
    )
    preset, trajectories, _, _ = step_of(world, "l2t", "--profile", "code", "--prm", "x")
    for t in trajectories:
        prefixes = segment(t.turns[0].completion, preset.tokenizer).prefixes
        K, lengths = len(t.episodes), [b - a for a, b in zip(prefixes, prefixes[1:])]
        expected = [0.0] * K if t.episodes.malformed else [0.0, *(n / K for n in lengths[1:])]
        assert t.process_reward.tolist() == pytest.approx(expected, abs=1e-6)
        assert t.reward == pytest.approx(t.outcome_reward - 0.01 * t.episodes.malformed)


LENGTHS = {
    "truncation --length_limit 40": dict(limit=40),
    "overlong --length_limit 60 --length_cache 40": dict(limit=60, cache=40),
    "l1_exact --length_target 30": dict(target=30, alpha=3e-4),
    "l1_max --length_target 30 --length_alpha 0.02": dict(target=30, alpha=0.02),
    "kimi": dict(weight=1.0),
    "arora_zanette": dict(alpha=0.2),
    "laser --length_limit 40 --length_weight 0.25": dict(limit=40, weight=0.25),
    "shorter_better --length_beta 0.01": dict(alpha=2.0, beta=0.01),
    "gr3": dict(alpha=0.33),
    "prime_linear": dict(weight=0.25),
    "priced --length_price 0.01": dict(price=0.01),
}


@pytest.fixture(scope="module")
def plain(world):
    return step_of(world, "grpo")


def shaped_by(plain, *argv: str):
    """The rewards and advantages of those completions under another --length."""
    preset, trajectories, _, _ = plain
    preset, copies = copy.copy(preset), [dataclasses.replace(t) for t in trajectories]
    preset.config = parse(
        ["grpo", *argv, "--group_size", "4", "--problems_per_step", "2", "--max_tokens", "100"]
    )
    preset.reward(copies, 0, Tally())
    return copies, preset.advantages(copies, 0, Tally())


def grid(trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.tensor(values).view(-1, 4)
        for values in zip(*((t.outcome_reward, t.tokens) for t in trajectories))
    )


@pytest.mark.parametrize("line", LENGTHS)
def test_every_length_method_reaches_the_reward(plain, line):
    name, _, _ = line.partition(" ")
    trajectories, advantages = shaped_by(plain, "--length", *line.split())
    expected = getattr(length, name)(*grid(trajectories), **LENGTHS[line])
    assert [t.reward for t in trajectories] == expected.flatten().tolist()
    assert any(t.reward != t.outcome_reward for t in trajectories)
    compared = group_advantages(expected, "none" if name in ("arora_zanette", "prime_linear") else "sample")
    for advantage, value in zip(advantages, compared.flatten().float(), strict=True):
        assert torch.equal(advantage, value.expand(len(advantage)))


def test_gfpo_is_an_advantage(plain):
    trajectories, advantages = shaped_by(plain, "--length", "gfpo", "--length_keep", "3")
    assert all(t.reward == t.outcome_reward for t in trajectories)
    expected = length.gfpo(*grid(trajectories), keep=3).flatten().float()
    assert [float(a[0]) for a in advantages] == expected.tolist() and expected.abs().sum() > 0


def test_laser_d_chooses_limits_from_the_step(plain):
    trajectories, _ = shaped_by(plain, "--length", "laser_d")
    limits = length.laser_d_limits(*grid(trajectories), torch.arange(1, 17) * 100 / 16)
    expected = length.laser(*grid(trajectories), limits)
    assert [t.reward for t in trajectories] == expected.flatten().tolist()


def test_l1_asks_for_its_length_in_the_prompt(world):
    preset, trajectories, _, _ = step_of(
        world, "grpo", "--length", "l1_exact", "--length_target", "20:60", "--length_prompt", " {target}"
    )
    targets = []
    for group in (trajectories[:4], trajectories[4:]):
        question, target = group[0].problem.question.split()
        assert question in [p.question for p in PROBLEMS]
        assert preset.tokenizer.decode(group[0].turns[0].prompt).split()[-1].startswith(target)
        targets.append(int(target))
        assert [t.reward for t in group] == pytest.approx(
            [t.outcome_reward - 3e-4 * abs(t.tokens - int(target)) for t in group]
        )
    assert targets[0] != targets[1] and all(20 <= target <= 60 for target in targets)
    greedy = preset.attempt(PROBLEMS, 1, 0.0, (EVALUATION, 0))
    assert [int(t.problem.question.split()[1]) for t in greedy] == targets, (
        "also in evaluation, and every time"
    )


def test_equal_groups_make_place_for_others():
    """Problems 0 and 2 are always right; of the first spare ones only that of slot 0 has differences, of the
    second both.
    """
    asked = []

    def sample(problems):
        asked.append([p.id for p in problems])
        mixed = {1, 10, 22}
        return [
            Trajectory(p, i, [], outcome_reward=float(i == 0 or p.id not in mixed))
            for p in problems
            for i in range(2)
        ]

    rounds = [[Problem(n + k, "", "") for k in range(3)] for n in (0, 10, 20)]
    kept, replaced = sample_differences(sample, rounds, group_size=2)
    assert asked == [[0, 1, 2], [10, 12], [22]]
    assert [t.problem.id for t in kept] == [10, 10, 1, 1, 22, 22]
    assert [t.problem.id for t in replaced] == [0, 0, 2, 2, 12, 12]
    kept, replaced = sample_differences(sample, rounds[:2], group_size=2)
    assert [t.problem.id for t in kept] == [10, 10, 1, 1, 12, 12], "the last round's group stays as it is"
    assert sample_differences(sample, [[]], group_size=2) == ([], [])


@pytest.mark.slow
def test_dynamic_sampling_in_a_step(world):
    """Two problems of one digit, which the embedded policy always solves, make place for two of three."""
    easy, hard = heldout()[:2], heldout()[240:300:50]
    options = "--group_size 4 --problems_per_step 2 --max_tokens 100 --dynamic_sampling 1".split()
    preset, tally = train.method("grpo")(parse(["grpo", *options]), world), Tally()
    first = preset.rollout(easy, 0, Tally())
    trajectories, _, _ = train.train_step(preset, easy, 0, world, tally, [hard])
    equal = [len({t.outcome_reward for t in first[i : i + 4]}) == 1 for i in (0, 4)]
    expected = [h if flat else e for e, h, flat in zip(easy, hard, equal)]
    assert any(equal) and [t.problem for t in trajectories[::4]] == expected
    assert list(tally.pairs["resampled"]) == [sum(equal), 2]
    assert tally.sums["sampled_tokens"] > 0


def test_each_of_several_rewards_is_compared_on_its_own(world, monkeypatch):
    """GDPO: twice the outcome and a reward of a thousandth's spread count by their weights, not by their
    spread.
    """
    import types

    brief = types.ModuleType("brief")
    brief.brief = lambda completions, **columns: [-0.001 * len(text) for text in completions]
    monkeypatch.setitem(sys.modules, "brief", brief)
    options = "--reward outcome+brief:brief --reward_weights 2,1 --advantage_std each".split()
    _, trajectories, advantages, _ = step_of(world, "grpo", *options)
    right, short = (torch.tensor([t.rewards[i] for t in trajectories]).view(-1, 4).double() for i in (0, 1))
    assert right.flatten().tolist() == [t.outcome_reward for t in trajectories] and (short < 0).all()
    assert [t.reward for t in trajectories] == pytest.approx((2 * right + short).flatten().tolist())
    total = 2 * group_advantages(right) + group_advantages(short)
    expected = (total / (total.square().sum() / 7).sqrt()).flatten()
    assert right.std() > 0
    for advantage, value in zip(advantages, expected):
        assert advantage.tolist() == pytest.approx([float(value)] * len(advantage), abs=1e-5)


@pytest.mark.slow
def test_flat_compression_is_grpo_with_a_fixed_price_per_episode(world):
    options = ["--gain", "none", "--compression", "flat", "--alpha", "0.5", "--beta", "0.04"]
    _, trajectories, advantages, _ = step_of(world, "l2t", *options)
    returns = torch.tensor([t.outcome_reward - 0.02 * len(t.episodes) for t in trajectories])
    expected = group_advantages(returns.view(-1, 4)).flatten()
    assert len({len(t.episodes) for t in trajectories}) > 1
    for advantage, value in zip(advantages, expected):
        torch.testing.assert_close(advantage, value.expand(len(advantage)), rtol=1e-5, atol=1e-5)


def test_an_l2t_step_trains(world):
    options = ["--group_size", "4", "--problems_per_step", "2", "--max_tokens", "100", "--lr", "1e-3"]
    preset, tally = train.method("l2t")(parse(["l2t", *options]), world), Tally()
    policy = preset.learners["policy"].policy
    before = policy.head_weight.full_tensor().clone()
    _, _, numbers = train.train_step(preset, PROBLEMS, 0, world, tally)
    assert numbers["grad_norm"] > 0 and not torch.equal(before, policy.head_weight.full_tensor())


# Long⊗Short: the long role's round is steps 0 to 2, the short role's 3 to 5

SIX = [Problem(0, "2*3?", "6"), Problem(1, "1*6?", "6")]


def pair_of(world, *argv: str) -> LongShort:
    return LongShort(
        parse(["longshort", "--rounds", "LS", "--steps_per_round", "3", "--group_size", "2", *argv]), world
    )


def rolled(pair: LongShort, problems: list[Problem], step: int) -> list[Conversation]:
    """The conversations of a step, rewarded."""
    talks = pair.rollout(problems, step, Tally())
    pair.reward(talks, step, Tally())
    return talks


def listen(monkeypatch, pair, **texts: list[str]) -> list[tuple]:
    """(role, temperature, max_tokens) of every call of a sampler. Roles that are given texts say these, in
    order, over and over.
    """
    asked, generate, spoken = (
        [],
        Sampler.generate,
        {role: itertools.cycle(own) for role, own in texts.items()},
    )

    def heard(sampler, prompts, n, **options):
        role = next(role for role, learner in pair.learners.items() if learner.sampler is sampler)
        asked.append((role, options["temperature"], options["max_tokens"]))
        if role not in spoken:
            return generate(sampler, prompts, n, **options)
        ids = [pair.learners[role].tokenizer.encode(next(spoken[role])) for _ in range(len(prompts) * n)]
        return [
            [Completion(own, [-0.5] * len(own), "stop") for own in ids[i : i + n]]
            for i in range(0, len(ids), n)
        ]

    monkeypatch.setattr(Sampler, "generate", heard)
    return asked


@pytest.mark.slow
def test_trained_role_partner_and_evaluation_are_sampled_differently(world, monkeypatch):
    pair = pair_of(
        world,
        "--rollout",
        "single_exchange",
        "--temperature",
        "0.9",
        "--max_tokens",
        "12",
        "--partner_temperature",
        "0.3",
        "--partner_max_tokens",
        "8",
    )
    asked = listen(monkeypatch, pair)
    pair.rollout(SIX, 0, Tally())
    pair.rollout(SIX, 3, Tally())
    assert asked == [("long", 0.9, 12), ("short", 0.3, 8), ("long", 0.3, 8), ("short", 0.9, 12)]
    asked.clear()
    first, second = pair.attempt(SIX[:1], 2, 0.0, (EVALUATION, 0))
    assert asked == [("long", 0.0, 12), ("short", 0.0, 12)]
    assert first.texts == second.texts, "greedy"


def test_brevity_is_paid_within_a_group_and_more_from_step_to_step(world, monkeypatch):
    """Everybody is right (1) and well formed (1); the briefer half of a group gets µ/2 more than that, the
    other µ/2 less.
    """
    pair = pair_of(world, "--length_coef", "2")
    listen(
        monkeypatch,
        pair,
        long=["<think>1</think>", "<think>12</think>", "<think>1234</think>", "<think>12345</think>"],
        short=["<answer>2*3=6\n6</answer>", "<answer>6</answer>"],
    )
    paid = [[t.reward for t in rolled(pair, SIX, step)] for step in range(6)]
    assert paid[:3] == [[2, 2, 2, 2], [2.5, 1.5, 2.5, 1.5], [3, 1, 3, 1]]
    assert paid[3:] == [[2, 2, 2, 2], [1.5, 2.5, 1.5, 2.5], [1, 3, 1, 3]], (
        "µ is 0 again; now the short turns count"
    )


@pytest.mark.parametrize(
    "options, paid",
    [
        ("", [0 + 1 + 0, 1 + 1 - 0.5]),
        ("--symmetric_length", [0 + 1 + 0.5, 1 + 1 - 0.5]),  # brief and wrong is paid too
        ("--strict_format", [0 + 1 + 0, 1 + 0 - 0.5]),  # the second thought holds a "<"
        ("--format_coef 3", [0 + 3 + 0, 1 + 3 - 0.5]),
    ],
)
def test_options_of_the_role_reward(world, monkeypatch, options, paid):
    """Outcome, format and length at the end of a round, where µ is 1: a brief thought that fails, a longer
    one that succeeds.
    """
    pair = pair_of(world, "--length_coef", "1", *options.split())
    listen(
        monkeypatch,
        pair,
        long=["<think>1</think>", "<think><episode_1>1</episode_1></think>"],
        short=["<answer>5</answer>", "<answer>6</answer>"],
    )
    assert [t.reward for t in rolled(pair, SIX[:1], 2)] == paid


@pytest.mark.parametrize(
    "options, turns, ended",
    [("", 10, "turns"), ("--max_turns 3", 6, "turns"), ("--rollout single_exchange", 2, "answered")],
)
def test_how_long_a_conversation_goes_on(world, monkeypatch, options, turns, ended):
    pair = pair_of(world, *options.split())
    listen(monkeypatch, pair, long=["<think>1</think>"], short=["<answer>1</rethink>"])
    for talk in pair.rollout(SIX, 0, Tally()) + pair.attempt(SIX, 1, 0.0, (EVALUATION, 0)):
        assert (len(talk.turns), talk.ended) == (turns, ended)


def test_the_learning_rate_starts_anew_with_every_round(world):
    pair = pair_of(world, "--lr", "1", "--schedule", "cosine")
    assert [pair.learning_rate(step) for step in range(6)] == pytest.approx([1, 1, 0.5, 1, 1, 0.5])


def test_a_round_begins_with_a_new_reference(world):
    """The policy at the start of the round; it stays through the round, and is set again. LS Eq. 7, 8"""
    pair = pair_of(world, "--kl_coef", "0.1")
    learner = pair.learners["short"]

    def head(model) -> torch.Tensor:
        return model.head_weight.full_tensor().clone()

    start = head(learner.reference)
    with torch.no_grad():
        learner.policy.head_weight.add_(1)
    moved = head(learner.policy)
    for step, expected in ((4, start), (5, start), (3, moved)):
        assert pair.begin_step(step) is learner
        assert torch.equal(head(learner.reference), expected), step


def test_roles_with_different_tokenizers_are_refused(world, tmp_path):
    for file in TINY.glob("*.json"):
        text = file.read_text()
        (tmp_path / file.name).write_text(
            text.replace('"+"', '"\0"').replace('"-"', '"+"').replace('"\0"', '"-"')
        )
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    with pytest.raises(UserError, match="different tokenizers"):
        pair_of(world, "--long", "tiny", "--short", str(tmp_path))


def test_two_sizes_of_one_family_train_each_other(world, tmp_path, monkeypatch):
    """The embedded model thinks, one a third as wide with random weights replies; each is trained for one
    step.
    """
    known = ModelConfig.from_hf(json.loads((TINY / "config.json").read_text()))
    narrow = dataclasses.replace(known, width=32, layers=2, heads=2, kv_heads=1, mlp_width=48)
    save_hf(Transformer.random(narrow), Tokenizer(TINY), tmp_path / "narrow")
    pair = pair_of(
        world,
        "--long",
        "tiny",
        "--short",
        str(tmp_path / "narrow"),
        "--rollout",
        "single_exchange",
        "--max_tokens",
        "16",
        "--partner_max_tokens",
        "16",
        "--kl_coef",
        "0.1",
        "--lr",
        "1e-3",
    )
    assert [pair.learners[role].policy.head_weight.shape for role in ("long", "short")] == [
        (72, 96),
        (72, 32),
    ]

    def weights(role: str) -> torch.Tensor:
        return pair.learners[role].policy.head_weight.full_tensor().clone()

    reward = pair.reward

    def generous(talks, step, tally):
        reward(talks, step, tally)
        talks[0].reward += 10  # so that there is something to learn, whatever they wrote

    monkeypatch.setattr(pair, "reward", generous)
    for step, role, partner in ((0, "long", "short"), (3, "short", "long")):
        tally, own, other = Tally(), weights(role), weights(partner)
        talks, _, numbers = train.train_step(pair, SIX, step, world, tally)
        assert numbers["grad_norm"] > 0 and torch.equal(other, weights(partner))
        assert not torch.equal(own, weights(role))
        assert torch.equal(pair.learners[role].sampler.model.head_weight, weights(role))
        mismatch, tokens = tally.pairs["mismatch"]
        assert (
            tokens == sum(len(t.turns[role == "short"].completion) for t in talks)
            and mismatch / tokens < 1e-5
        )


def test_the_partners_opening_turn_must_fit_too(world):
    """It is first sampled in the first round of the short role: hundreds of steps into a run."""
    pair = pair_of(world, "--partner_max_tokens", "1020")  # of 1024
    pair.require_room(SIX, training=False)
    with pytest.raises(UserError, match="1020 more, .* exceed .* of 1024; lower --partner_max_tokens"):
        pair.require_room(SIX, training=True)
    pair_of(world, "--rounds", "L", "--partner_max_tokens", "1020").require_room(SIX, training=True)


def test_published_longshort_values_on_a_real_model():
    for argv in (["--model", "some/folder"], ["--long", "some/L0", "--short", "some/S0"]):
        c = parse(["longshort", *argv])
        assert (c.partner_temperature, c.rounds, c.max_turns, c.rollout) == (0.3, "LLSLSL", 5, "full")
        assert c.steps == 6 * c.steps_per_round
