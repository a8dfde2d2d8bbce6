"""Numbers of graded attempts, by hand."""

import json

import pytest

from thinkrl.evaluate import attempt_of, held_out_record, recorded_attempt, summarise, summary_table
from thinkrl.intervals import clustered_interval
from thinkrl.learner import TINY
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory, Turn


def attempt(id, sample, answer, tokens, level="", finish_reason="stop"):
    problem = Problem(id, "?", "1", "arith", level)
    turn = Turn("policy", [0], [1] * tokens, [0.0] * tokens, finish_reason)
    return Trajectory(problem, sample, [turn], answer=answer, outcome_reward=float(answer in ("1", "1.0")))


ATTEMPTS = [
    attempt(0, 0, "1", 10, "easy"),
    attempt(0, 1, "1.0", 20, "easy"),
    attempt(1, 0, None, 60, "hard", "length"),
    attempt(1, 1, "1", 30, "hard"),
]


def test_summarise_by_hand():
    out = summarise(ATTEMPTS)
    levels = out.pop("by_level")
    interval = out.pop("accuracy_interval")
    assert out == {
        "problems": 2,
        "completions": 4,
        "accuracy": 0.75,
        "tokens": 30.0,
        "tokens_median": 25.0,
        "tokens_95": pytest.approx(30 + 0.85 * 30),  # 0.95 of the way from the first to the fourth
        "tokens_max": 60,
        "truncated": 0.25,
        "tokens_per_correct": 40.0,
        "pass@2": 1.0,
        "maj@2": 1.0,
    }
    assert tuple(interval) == clustered_interval([[1, 1], [0, 1]])[1:]
    assert list(levels) == ["easy", "hard"]
    assert levels["hard"] == summarise(ATTEMPTS[2:])["by_level"]["hard"]
    assert levels["easy"]["accuracy"] == 1.0 and levels["hard"]["tokens"] == 45.0
    assert levels["hard"]["pass@2"] == 1.0 and levels["hard"]["truncated"] == 0.5


def test_a_record_counts_as_its_attempt_does():
    """Through JSON, as evaluations.jsonl keeps it."""
    tokenizer = Tokenizer(TINY)
    for t in [*ATTEMPTS, attempt(3, 0, "2.0", 7)]:
        assert recorded_attempt(json.loads(json.dumps(held_out_record(t, tokenizer)))) == attempt_of(t)
    assert attempt_of(attempt(3, 0, "2.0", 7)).vote == attempt_of(attempt(3, 1, "2", 7)).vote


@pytest.mark.parametrize("n, sizes", [(1, []), (2, [2]), (5, [2, 4, 5]), (8, [2, 4, 8])])
def test_subsets_are_powers_of_two_and_all(n, sizes):
    keys = summarise([attempt(0, i, "1", 5) for i in range(n)])
    assert [key for key in keys if key.startswith("pass@")] == [f"pass@{k}" for k in sizes]


def test_wrong_votes_count_when_they_agree():
    group = [attempt(0, 0, "1", 5), attempt(0, 1, "2", 5), attempt(0, 2, "2.0", 5), attempt(0, 3, "3", 5)]
    # of 6 pairs, 3 hold the right answer against one wrong vote (1/2 each) and 3 do not
    assert summarise(group)["maj@2"] == pytest.approx(0.25)
    assert summarise(group)["maj@4"] == 0.0


def test_no_right_answer_and_no_answer():
    out = summarise([attempt(0, 0, "2", 5)])
    assert out["tokens_per_correct"] is None and "pass@2" not in out
    assert json.loads(json.dumps(out)) == out
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([])


def test_summary_table():
    now = summarise(ATTEMPTS)
    table = summary_table({"before": now | {"greedy": now}, "after": now | {"greedy": now}, "steps": 3})
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["before", "after"] and lines[1] == ["accuracy", "tokens"] * 2
    assert lines[2] == ["sampled", "75.0%", "30.0", "75.0%", "30.0"]
    assert lines[4] == ["hard", "50.0%", "45.0", "50.0%", "45.0"]
    assert [line[0] for line in lines[2:]] == ["sampled", "easy", "hard", "greedy", "easy", "hard"]
    assert "nothing was evaluated" in summary_table({})
