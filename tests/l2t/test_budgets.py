"""Accuracy at token budgets: what each budget counts, and that nothing is sampled for it."""

import pytest
import torch

import train
from thinkrl.arith import heldout
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.l2t.budgets import at_budgets, attempt, budgets_of, curve, cut_at, gaps_to_frontier
from thinkrl.l2t.gain import forcing, make_probe, predicted_correctness_ref
from thinkrl.learner import TINY
from thinkrl.rollout import EVALUATION
from thinkrl.tokenizer import Tokenizer

CONFIG = ["grpo", "--max_tokens", "100", "--eval_budgets", "4"]


def test_a_budget_counts_the_longest_prefix_within_it_and_the_outcome_of_what_ended():
    J = torch.tensor([0.1, 0.2, 0.4, 0.8])  # after 1, 20, 40 and 50 tokens; the completion has 55
    assert at_budgets(J, [1, 20, 40, 50], 55, 0.0, [20, 39, 40, 54, 55, 90]) == pytest.approx(
        [0.2, 0.2, 0.4, 0.8, 0, 0]
    )
    assert at_budgets(J, [5, 20, 40, 50], 55, 1.0, [4, 60]) == pytest.approx([0.1, 1.0])


def test_budgets_are_parts_of_the_limit():
    assert budgets_of(parse(CONFIG)) == [25, 50, 75, 100]
    assert budgets_of(parse(["grpo", "--max_tokens", "2", "--eval_budgets", "3"])) == [1, 2]
    rows = [[0.0, 0.5, 1.0, 1.0], [0.5, 0.5, 0.5, 1.0]]
    points = [[25, 0.25], [50, 0.5], [75, 0.75], [100, 1.0]]
    assert curve(rows, parse(CONFIG)) == {"budgets": points, "budget_area": 0.625}


def test_gap_to_the_frontier_by_hand():
    """The frontier of .5, .5 and .25, .75 is .5, .75."""
    assert gaps_to_frontier({"a": [0.5, 0.5], "b": [0.25, 0.75], "c": [0.5, 0.75]}) == {
        "a": 0.125,
        "b": 0.125,
        "c": 0,
    }


def test_thinking_is_cut_at_the_budgets_and_where_it_ends():
    tokenizer = Tokenizer(TINY)
    tokens = tokenizer.encode("<think>1234567890</think><answer>12</answer>")
    assert tokenizer.decode(tokens[:11]) == "<think>1234567890"
    assert cut_at(tokens, [4, 8, 12, 16], tokenizer).prefixes == [1, 4, 8, 11], "never behind the thinking"
    assert cut_at(tokens, [1, 11], tokenizer).prefixes == [1, 11]
    assert len(cut_at([], [4], tokenizer)) == 0


@pytest.mark.slow
def test_an_evaluation_with_budgets():
    """J is that of full forwards of the cut completions, which are those of an evaluation without budgets."""
    config, problems = parse(CONFIG), heldout()[40:240:100]
    preset = train.method("grpo")(config, start("cpu"))
    trajectories, rows = attempt(preset, problems, 2, 1.0, (EVALUATION, 0))
    plain = preset.attempt(problems, 2, 1.0, (EVALUATION, 0))
    assert [t.turns[0].completion for t in trajectories] == [t.turns[0].completion for t in plain]
    for t, row in zip(trajectories, rows, strict=True):
        probe = make_probe(preset.tokenizer, t.problem.answer, *forcing(t.problem))
        turn, cut = t.turns[0], cut_at(t.turns[0].completion, budgets_of(config), preset.tokenizer)
        J = predicted_correctness_ref(
            preset.learners["policy"].sampler.model, turn.prompt, turn.completion, cut, probe
        )
        expected = at_budgets(J, cut.prefixes, t.tokens, t.outcome_reward, budgets_of(config))
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row[-1] == t.outcome_reward
    assert len({tuple(row) for row in rows}) > 1
