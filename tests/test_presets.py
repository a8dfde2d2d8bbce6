"""Presets inside the step, on the embedded model: what each of them pays, and that its options reach the reward."""

import pytest
import torch

import thinkrl.compression
import train
from thinkrl import presets
from thinkrl.arith import heldout
from thinkrl.config import parse
from thinkrl.distributed import World, start
from thinkrl.episodes import segment
from thinkrl.learner import TINY
from thinkrl.metrics import DEFINITIONS, Tally
from thinkrl.prm import new_prm
from thinkrl.types import pack

PROBLEMS = heldout()[40:240:100]  # one of two digits, one of three


@pytest.fixture(scope="module")
def world() -> World:
    return start("cpu")


def step_of(world, *argv: str):
    """One rollout of a preset with its advantages, at a fixed seed."""
    config = parse([*argv, "--group_size", "4", "--problems_per_step", "2", "--max_tokens", "100"])
    preset, tally = {"grpo": train.Grpo, "l2t": train.L2T}[config.preset](config, world), Tally()
    trajectories = preset.rollout(PROBLEMS, 0, tally)
    return preset, trajectories, preset.advantages(trajectories, 0, tally), tally


@pytest.fixture(scope="module")
def default(world):
    return step_of(world, "l2t")


def test_l2t_pays_every_episode(default):
    _, trajectories, advantages, tally = default
    for t, advantage in zip(trajectories, advantages):
        K = len(t.extra["ends"])
        assert t.extra["ends"][-1] == t.tokens == len(advantage) == len(t.extra["episode_ids"])
        assert len(t.extra["J"]) == K + 1 and len(t.extra["compression"]) == len(t.extra["penalty"]) == K
        assert all(0 <= j <= 1 for j in t.extra["J"]) and all(c > 0 for c in t.extra["compression"])
        gains = [b - a for a, b in zip(t.extra["J"], t.extra["J"][1:])]
        expected = [g - 0.6 * c for g, c in zip(gains, t.extra["penalty"])]
        assert t.extra["process_reward"] == pytest.approx(expected)
    paid = sum(sum(t.extra["penalty"]) for t in trajectories) / len(trajectories)
    assert paid == pytest.approx(0.05), "the mean completion pays kappa"
    known = tally.pairs.keys() & DEFINITIONS.keys()
    assert {"episodes", "malformed", "fitting_gain", "compression", "penalty", "process_reward", "probe_tokens",
            "probe_seconds", "penalty_seconds", "penalty_tokens", "penalty_length_correlation", "advantage_max"} <= known
    assert tally.pairs["penalty_tokens"][0] == 0, "the states that the sampler kept serve"


def test_rollouts_do_not_depend_on_the_preset(world, default):
    """So that arms of a comparison differ in the reward alone: the same address gives the same completion."""
    _, trajectories, _, _ = step_of(world, "grpo")
    assert [t.turns[0].completion for t in trajectories] == [t.turns[0].completion for t in default[1]]


def test_the_kernel_reaches_the_reward(world, default, monkeypatch):
    """Break kernels.fisher's quadratic form: what an episode is paid changes."""
    whole = thinkrl.compression.episode_quadratic
    monkeypatch.setattr(thinkrl.compression, "episode_quadratic", lambda x, g, cu, w, **more: whole(x, g, cu, w, **more).flip(0))
    _, trajectories, _, _ = step_of(world, "l2t")
    assert any(t.extra["process_reward"] != u.extra["process_reward"] for t, u in zip(trajectories, default[1]))


def test_profile_grpo_is_grpo_to_the_bit(world):
    _, _, plain, _ = step_of(world, "grpo")
    _, _, profile, _ = step_of(world, "l2t", "--profile", "grpo")
    assert any(a.abs().max() > 0 for a in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, profile))


@pytest.mark.parametrize("options", [
    ["--beta", "0"], ["--profile", "paper"], ["--credit", "guarded"], ["--credit", "to_go"], ["--statistic", "token_trunc_mean"],
    ["--compression", "rank1"], ["--compression", "natural"], ["--compression", "drift"], ["--proxy", "lm_head"],
    ["--proxy", "last_block"], ["--proxy", "layers"], ["--gain", "mc"], ["--gain", "continue"], ["--episodes", "fixed:10"],
    ["--alpha", "0"],
], ids=" ".join)
def test_every_option_changes_what_is_paid(world, default, options):
    _, trajectories, advantages, tally = step_of(world, "l2t", *options)
    assert all(a.isfinite().all() for a in advantages)
    spent = {key: tally.pairs[key][0] for key in ("probe_tokens", "penalty_tokens")}
    assert (spent["penalty_tokens"] > 0) == (options[-1] in ("last_block", "layers")), "other proxies use the sampler's states"
    assert spent["probe_tokens"] > default[3].pairs["probe_tokens"][0] or options[-1] != "continue", "dearer"
    if options == ["--compression", "drift"]:
        assert all(c == 0 for t in trajectories for c in t.extra["compression"]), "nothing has moved before the first step"
        return
    assert any(not torch.equal(a, b) for a, b in zip(advantages, default[2]))


def test_profile_code_sums_gains_by_length(world, monkeypatch):
    monkeypatch.setattr(presets, "load_prm", lambda *_: new_prm(TINY))
    monkeypatch.setattr(presets, "model_path", lambda *_: TINY)
    monkeypatch.setattr(presets, "score_completions", lambda model, prompts, completions, prefixes: [
        torch.linspace(0, 1, len(p)) for p in prefixes])
    preset, trajectories, _, _ = step_of(world, "l2t", "--profile", "code", "--prm", "x")
    for t in trajectories:
        prefixes = segment(t.turns[0].completion, preset.tokenizer).prefixes
        K, lengths = len(t.extra["ends"]), [b - a for a, b in zip(prefixes, prefixes[1:])]
        expected = [0.0] * K if t.extra["malformed"] else [0.0, *(n / K for n in lengths[1:])]
        assert t.extra["process_reward"] == pytest.approx(expected, abs=1e-6)
        assert t.reward == pytest.approx(t.outcome_reward - 0.01 * t.extra["malformed"])


def test_controls_price_length_and_episodes(world, default):
    _, plain, _, _ = step_of(world, "grpo")
    _, tokens, _, _ = step_of(world, "grpo", "--length_penalty", "0.01")
    _, episodes, _, _ = step_of(world, "grpo", "--episode_price", "0.1")
    for a, b, c, d in zip(plain, tokens, episodes, default[1]):
        assert b.reward == pytest.approx(a.outcome_reward * (1 - 0.01 * a.tokens))
        assert c.reward == pytest.approx(a.outcome_reward - 0.1 * len(d.extra["ends"]))


def test_an_l2t_step_trains(world, default):
    preset, trajectories, advantages, tally = default
    learner = preset.learner(0)
    before = learner.policy.head_weight.full_tensor().clone()
    packs = train.level(pack(preset.samples(trajectories, advantages, 0), 4096), world)
    loss, grad_norm = train.update(learner, packs, 1e-3, preset.config, world, tally)
    assert grad_norm > 0 and not torch.equal(before, learner.policy.head_weight.full_tensor())
