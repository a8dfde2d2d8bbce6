"""What the L2T preset hands to its parts, on the embedded model: options, prefixes, log-probs, steps,
ranks.
"""

import json
import re
import string
from dataclasses import replace

import pytest
import torch
from l2t_ranks import PROBLEMS, SMALL

from helpers import PRM_CONFIG, random_prm, torchrun, write_tokenizer
from kernels.fisher import episode_quadratic_ref
from thinkrl import UserError
from thinkrl.config import parse
from thinkrl.distributed import World
from thinkrl.l2t.compression import DAMPING, Row
from thinkrl.l2t.credit import (
    episode_rewards,
    group_normalise,
    returns_to_go,
    surprise,
    to_go_advantages,
    token_rewards,
    truncated_mean,
)
from thinkrl.l2t.episodes import segment
from thinkrl.l2t.preset import L2T, EpisodeTrajectory
from thinkrl.l2t.prm import SEPARATOR, SYSTEM, StepRewardModel, new_prm, save_prm
from thinkrl.learner import TINY
from thinkrl.rollout import PROBE, TRAINING
from thinkrl.run.metrics import Tally
from thinkrl.tokenizer import Tokenizer

ALPHA = 0.8


def preset_of(world: World, *options: str) -> L2T:
    return L2T(parse([*SMALL, *options]), world)


def rolled(preset: L2T, step: int = 0) -> tuple[list[EpisodeTrajectory], Tally]:
    tally = Tally()
    trajectories = preset.rollout(PROBLEMS, step, tally)
    preset.reward(trajectories, step, tally)
    return trajectories, tally


@pytest.fixture(scope="module")
def written(world) -> list[EpisodeTrajectory]:
    """By default options. Other credits and statistics are applied to the same trajectories."""
    return rolled(preset_of(world))[0]


def advantages(world: World, trajectories: list[EpisodeTrajectory], *options: str) -> list[torch.Tensor]:
    return preset_of(world, *options).advantages(trajectories, 0, Tally())


def test_credit_follows_the_surprise_of_the_sampler(world, written):
    """Alg. 1 l. 11: inside an episode, advantages are to each other as the surprises are."""
    for t, advantage in zip(written, advantages(world, written, "--profile", "paper")):
        ratio = advantage / surprise(torch.tensor(t.turns[0].logprobs))
        for k in range(len(t.episodes)):
            own = ratio[t.episodes.ids == k]
            assert own.abs().min() > 0
            torch.testing.assert_close(own, own[:1].expand(len(own)), rtol=1e-4, atol=0)


def test_to_go_credit_gets_each_state_s_own_prediction(world, written):
    expected = []
    for group in (written[:4], written[4:]):
        to_go = [returns_to_go(t.reward, t.process_reward, ALPHA) for t in group]
        expected += to_go_advantages(to_go, [t.J for t in group], [t.episodes.ids for t in group])
    for advantage, values in zip(advantages(world, written, "--credit", "to_go"), expected, strict=True):
        torch.testing.assert_close(advantage, values.float())


def test_keep_reaches_the_truncated_mean(world, written):
    options = ["--statistic", "token_trunc_mean", "--credit", "uniform", "--keep", "0.5"]
    rewards = [
        token_rewards(
            episode_rewards(t.reward, t.process_reward, ALPHA),
            t.episodes.ids,
            torch.tensor(t.turns[0].logprobs),
        )
        for t in written
    ]
    means = torch.stack([truncated_mean(r, 0.5) for r in rewards]).split(4)
    expected = torch.cat([group_normalise(group, 1e-8) for group in means]).float()
    torch.testing.assert_close(torch.stack([a[0] for a in advantages(world, written, *options)]), expected)


def test_max_ratio_clips_guarded_credit(world, written):
    even = torch.cat(advantages(world, written)).abs()
    guarded = torch.cat(advantages(world, written, "--credit", "guarded", "--max_ratio", "1.5")).abs()
    assert guarded.max() > 0 and (guarded <= 1.5 * even + 1e-6).all() and (guarded > 1.4 * even + 1e-6).any()


@pytest.mark.slow
def test_gain_samples_is_the_number_of_continuations(world):
    trajectories, _ = rolled(preset_of(world, "--gain", "continue", "--gain_samples", "3"))
    thirds = torch.cat([3 * t.J for t in trajectories])
    torch.testing.assert_close(thirds, thirds.round())
    assert ((thirds > 0) & (thirds < 3)).any(), "not all prefixes are certain"


@pytest.mark.slow
def test_continuations_are_drawn_at_their_own_address_as_the_completion_was(world, monkeypatch):
    options = ["--temperature", "0.7", "--compression", "none", "--gain_samples", "2", "--max_tokens", "40"]
    preset, asked = preset_of(world, "--gain", "continue", "--seed", "5", *options), []
    sampler = preset.learners["policy"].sampler
    generate = sampler.generate

    def recorded(prompts, *args, **kwargs):
        asked.append(kwargs)
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(sampler, "generate", recorded)
    rolled(preset, 3)
    completions, *continuations = sorted(asked, key=lambda call: call.get("prefix") is not None)
    assert continuations and {key[:2] for key in completions["keys"]} == {(TRAINING, 3)}
    for call in continuations:
        assert (call["max_tokens"], call["temperature"], call["seed"]) == (40, 0.7, 5)
        assert {key[:2] for key in call["keys"]} == {(PROBE, 3)} and len(set(call["keys"])) == len(
            call["keys"]
        )
        assert {key[2] for key in call["keys"]} <= {p.id for p in PROBLEMS}


@pytest.mark.slow
@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_the_return_counts_malformed_tags_and_its_std_is_the_one_asked_for(world, std):
    options = ["--max_tokens", "60", "--malformed_penalty", "0.5", "--advantage_std", std]
    preset = preset_of(world, *options)
    trajectories, tally = rolled(preset)
    malformed = torch.tensor([float(t.episodes.malformed) for t in trajectories], dtype=torch.float64)
    assert 0 < malformed[:4].sum() < 4 or 0 < malformed[4:].sum() < 4, (
        "a group in which it makes a difference"
    )
    earned = torch.stack([t.outcome_reward + ALPHA * t.process_reward.sum() for t in trajectories])
    expected = torch.cat([group_normalise(g, std=std) for g in (earned - 0.5 * malformed).split(4)])
    A = torch.stack([a[0] for a in preset.advantages(trajectories, 0, tally)])
    torch.testing.assert_close(A, expected.float())


@pytest.mark.slow
def test_the_basis_has_its_rank_and_is_refreshed_in_time(world):
    preset = preset_of(world, "--rank_share", "0.25", "--refresh_every", "2", "--fisher_decay", "0.25")
    bases, tokens = [], []
    for step in range(3):
        trajectories, _ = rolled(preset, step)
        bases.append(preset.proxy.V)
        tokens.append(sum(t.tokens for t in trajectories))
        if step == 1:
            assert preset.proxy.count == 0.25 * tokens[0] + tokens[1], "the first step's Fisher has faded"
    assert bases[0].shape == (96, 24)
    assert bases[1] is bases[0] and bases[2] is not bases[0] and preset.proxy.count == tokens[2]


@pytest.mark.slow
def test_penalty_tokens_are_those_of_one_step(world):
    preset = preset_of(world, "--proxy", "last_block", "--max_tokens", "20")
    rolled(preset)
    trajectories, tally = rolled(preset, 1)
    assert tally.sums["penalty_tokens"] == sum(len(t.turns[0].prompt) + t.tokens for t in trajectories)


def test_malformed_completions_are_counted(world):
    trajectories, tally = rolled(preset_of(world, "--max_tokens", "30"))
    assert tally.pairs["malformed"] == [sum(t.episodes.malformed for t in trajectories), len(trajectories)]
    assert any(t.episodes.malformed for t in trajectories), "an episode is left open"


@pytest.mark.slow
def test_the_natural_step_divides_by_the_mean_fisher(world):
    preset = preset_of(world, "--compression", "natural", "--proxy", "lm_head")
    trajectories, _ = rolled(preset)
    turns = [t.turns[0] for t in trajectories]
    with torch.no_grad():
        row = Row.of(turns, [segment(turn.completion, preset.tokenizer) for turn in turns])
        [(x, g)] = (tuple(f.double() for f in pair) for pair in preset.proxy.factors(row))
    fisher = g.T.square() @ x.square() / len(x)
    expected = episode_quadratic_ref(x, g, row.cu_episodes, 1 / (fisher + DAMPING)) ** 2
    torch.testing.assert_close(torch.cat([t.compression for t in trajectories]), expected, rtol=1e-3, atol=0)


def save_own(folder, **changes) -> str:
    """A reward model on the embedded model's body, its head no longer undecided."""
    model = new_prm(TINY)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_prm(model, Tokenizer(TINY), folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return str(folder)


def save_separator(folder, context: int = 1024) -> str:
    """A reward model with a separator and a vocabulary of its own, in which words are spelled."""
    tokenizer = write_tokenizer(folder, ["<eos>", SEPARATOR, *string.printable])
    model = random_prm(
        True,
        tokenizer.encode(SEPARATOR)[0],
        config=replace(PRM_CONFIG, vocab_size=102, max_positions=context),
    )
    save_prm(model, tokenizer, folder)
    return str(folder)


def scores(model: StepRewardModel, row: list[int], positions: list[int]) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, len(row)], dtype=torch.int32)
    with torch.no_grad():
        return model.step_scores(torch.tensor(row), cu_seqlens, torch.tensor(positions)).double()


@pytest.mark.slow
def test_a_reward_model_never_sees_the_answer(world, tmp_path):
    preset, seen = preset_of(world, "--gain", "prm", "--prm", save_own(tmp_path)), []
    preset.prm.body.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].tolist()))
    trajectories, tally = rolled(preset)
    assert (
        any("<answer>" in t.text for t in trajectories) and preset.tokenizer.encode("<answer>")[0] not in seen
    )
    assert tally.sums["probe_tokens"] == len(seen)
    for t in trajectories:
        turn = t.turns[0]
        counts = segment(turn.completion, preset.tokenizer).prefixes
        expected = scores(
            preset.prm, turn.prompt + turn.completion, [len(turn.prompt) + n - 1 for n in counts]
        )
        torch.testing.assert_close(t.J, expected, atol=1e-5, rtol=1e-4)


def test_a_separator_model_is_told_one_step_per_episode(world, tmp_path):
    preset = preset_of(world, "--gain", "prm", "--prm", save_separator(tmp_path))
    trajectories, tally = rolled(preset)
    own, read, several = Tokenizer(tmp_path), 0, 0
    separator = own.encode(SEPARATOR)
    for t in trajectories:
        if t.episodes.malformed:
            continue
        prompt = own.encode_chat(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": t.problem.question}]
        )
        row, positions = [*prompt], []
        for step in re.findall(r"<episode_\d+>(.*?)</episode_\d+>", t.text, re.DOTALL):
            row += own.encode(step.strip()) + separator
            positions.append(len(row) - 1)
        expected = torch.cat(
            [scores(preset.prm, prompt + separator, [len(prompt)]), scores(preset.prm, row, positions)]
        )
        torch.testing.assert_close(t.J, expected, atol=1e-5, rtol=1e-4)
        read += len(prompt) + 1 + len(row)
        several += len(positions) > 1
    assert several and read <= tally.sums["probe_tokens"]


@pytest.mark.slow
def test_beyond_a_separator_model_s_context_nothing_is_gained(world, tmp_path):
    long, short = (
        rolled(preset_of(world, "--gain", "prm", "--prm", save_separator(tmp_path / str(context), context)))[
            0
        ]
        for context in (1024, 110)
    )
    held = 0
    for whole, t in zip((t.J for t in long), short):
        J = t.J
        known = 1 + int((J[:-1] != J[1:]).sum())
        expected = torch.cat([whole[:known], whole[known - 1].expand(len(whole) - known)])
        torch.testing.assert_close(J, expected, atol=1e-5, rtol=1e-4)
        held += known < len(J)
    assert 0 < held


def test_a_reward_model_that_cannot_read_the_policy_is_refused(world, tmp_path):
    foreign = tmp_path / "foreign"
    save_prm(random_prm(), write_tokenizer(foreign), foreign)
    with pytest.raises(UserError, match="decodes ids differently from the policy"):
        preset_of(world, "--gain", "prm", "--prm", str(foreign))
    preset = preset_of(
        world, "--gain", "prm", "--prm", save_own(tmp_path / "short", max_position_embeddings=100)
    )
    with pytest.raises(UserError, match="exceed the reward model's context of 100"):
        preset.require_room(PROBLEMS, training=True)
    preset = preset_of(world, "--gain", "prm", "--prm", save_separator(tmp_path / "other", context=40))
    with pytest.raises(UserError, match="exceed the reward model's context of 40"):
        preset.require_room(PROBLEMS, training=True)


@pytest.mark.slow
def test_two_ranks_pay_what_one_pays(written, tmp_path):
    """The Fisher and the mean that normalises are those of all ranks, each of which wrote one group."""
    done = torchrun(2, "tests/l2t_ranks.py", str(tmp_path / "penalties"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("compression", "penalty"):
        theirs = torch.load(tmp_path / "penalties")[name]
        for t, values in zip(written, theirs, strict=True):
            torch.testing.assert_close(values, getattr(t, name), rtol=1e-4, atol=0)
