"""S-GRPO on the embedded model, and its formulas by hand."""

import pytest
import torch
from l2t_ranks import PROBLEMS

from thinkrl import UserError
from thinkrl.config import parse
from thinkrl.l2t.exits import SGrpo, chain_advantages, draw_exits, exit_rewards
from thinkrl.run.metrics import Tally
from thinkrl.types import Problem

SMALL = "l2t --method s-grpo --group_size 4 --max_tokens 60".split()


def test_each_right_answer_halves_what_the_next_one_earns():
    correct = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert exit_rewards(correct).tolist() == [[1, 0, 0.5, 0.25], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_token_of_the_chain_counts_for_every_completion_that_holds_it():
    advantage = torch.tensor([1.0, -3.0, 2.0])  # exits after 1 and 3 tokens, then the chain of 4
    assert chain_advantages(advantage, [1, 3], 4).tolist() == [0.0, -1.0, -1.0, 2.0]


def test_exits_are_drawn_from_all_of_the_thinking():
    drawn = [draw_exits(2, 4, 3, key=f"{i}") for i in range(50)]
    assert {n for places in drawn for n in places} == {2, 3, 4} and all(p == sorted(p) for p in drawn)
    assert draw_exits(2, 400, 3, "a") == draw_exits(2, 400, 3, "a") != draw_exits(2, 400, 3, "b")


@pytest.fixture(scope="module")
def preset(world) -> SGrpo:
    return SGrpo(parse(SMALL), world)


@pytest.fixture(scope="module")
def rolled(preset):
    trajectories, tally = preset.rollout(PROBLEMS, 0, Tally()), Tally()
    preset.reward(trajectories, 0, tally)
    return trajectories


def test_an_exit_is_the_chain_s_beginning_and_a_forced_answer(preset, rolled):
    forced = preset.tokenizer.encode("</think><answer>")
    assert len(rolled) == 4 * len(PROBLEMS)
    for i, problem in enumerate(PROBLEMS):
        *exits, chain = rolled[4 * i : 4 * i + 4]
        tokens = chain.turns[0].completion
        assert [t.problem for t in exits] == 3 * [problem] and [
            t.sample for t in rolled[4 * i : 4 * i + 4]
        ] == [0, 1, 2, 3]
        assert [t.cut for t in exits] == sorted(t.cut for t in exits) and chain.cut == len(tokens)
        for t in exits:
            assert t.turns[0].prompt == chain.turns[0].prompt + tokens[: t.cut] + forced
            assert t.text == preset.tokenizer.decode(tokens[: t.cut] + forced + t.turns[0].completion)


def test_the_gradient_is_that_of_whole_completions(preset, rolled):
    """Sum of advantage x log-prob over what is trained on: the same for G whole completions, each with its
    A_i.
    """
    advantages = preset.advantages(rolled, 0, Tally())
    samples = preset.samples(rolled, advantages, 0)
    shared = sum(float((s.advantage.double() * s.sampler_logprob.double()).sum()) for s in samples)
    whole = 0.0
    for i in range(0, len(rolled), 4):
        group, chain = rolled[i : i + 4], rolled[i + 3]
        mean = sum(t.reward for t in group) / 4
        for t in group:
            logprobs = chain.turns[0].logprobs[: t.cut] if t is not chain else []
            whole += (t.reward - mean) * sum(logprobs + t.turns[0].logprobs)
    assert len({t.reward for t in rolled}) > 1 and whole != 0
    # fp32 advantages and log-probs: 2^-24 each, no cancellation
    assert shared == pytest.approx(whole, rel=1e-5)


def test_options_that_it_does_not_read_are_refused():
    for option in ("--beta", "--gain_samples", "--advantage_std"):
        value = "batch" if option == "--advantage_std" else "2"
        with pytest.raises(UserError, match=f"s-grpo does not read {option}: leave it out"):
            parse([*SMALL, option, value])
    with pytest.raises(UserError, match="s-grpo counts right answers: leave out --reward"):
        parse([*SMALL, "--reward", "module:function"])
    assert parse([*SMALL, "--probe_prefix", "</think><answer>"]).method == "s-grpo"


def test_a_chain_needs_room_for_an_answer_behind_it(preset):
    context = preset.learners["policy"].policy.config.max_positions
    config = parse([*SMALL, "--max_tokens", str(context // 2)])
    crowded = SGrpo.__new__(SGrpo)
    crowded.__dict__ = preset.__dict__ | {"config": config}
    crowded.require_room([Problem(0, "5*6?", "30")], training=False)
    with pytest.raises(UserError, match="exceed the model's context"):
        crowded.require_room([Problem(0, "5*6?", "30")], training=True)
