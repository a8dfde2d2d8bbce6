"""Estimators against enumeration, scores against the paper's table."""

import json
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkrl.evaluate import aes, maj_at_k, pass_at_k, summarise, summary_table
from thinkrl.types import Problem, Trajectory, Turn


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(2000, 1000, 1) == 0.5


def test_maj_at_k_by_hand():
    assert maj_at_k(["a", "a", "b"], "a", 3) == 1.0
    assert maj_at_k(["a", "a", "b"], "b", 3) == 0.0
    assert maj_at_k(["a", "b"], "a", 2) == 0.5  # a tie
    assert maj_at_k(["a", "b", "c", "c"], "a", 3) == pytest.approx(
        2 / 4 / 3
    )  # {a,b,c} twice, a third of a win each
    assert maj_at_k(["a", None, None], "a", 3) == 1.0  # who says nothing has no vote
    assert maj_at_k([None, None], "a", 2) == 0.0
    assert maj_at_k(["a", "b", "b", "a"], "a", 1) == 0.5


def vote(subset, gold):
    counts = {a: subset.count(a) for a in subset if a is not None}
    leaders = [a for a in counts if counts[a] == max(counts.values())]
    return (gold in leaders) / max(len(leaders), 1)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8), st.integers(1, 8))
def test_estimators_equal_the_mean_over_all_subsets(answers, k):
    k = min(k, len(answers))
    subsets = list(combinations(answers, k))
    assert maj_at_k(answers, "a", k) == pytest.approx(sum(vote(s, "a") for s in subsets) / len(subsets))
    assert pass_at_k(len(answers), answers.count("a"), k) == pytest.approx(
        sum("a" in s for s in subsets) / len(subsets)
    )


def test_many_samples_are_no_obstacle():
    answers = ["a"] * 90 + ["b"] * 80 + [f"c{i}" for i in range(30)]
    assert 0.5 < maj_at_k(answers, "a", 64) < 1.0
    assert maj_at_k(answers, "a", 200) == 1.0


def test_impossible_counts_are_refused():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)
    for k in (0, 2):
        with pytest.raises(ValueError, match="maj@k needs"):
            maj_at_k(["a"], "a", k)


def test_aes_reproduces_the_papers_table():
    assert aes(61.554, 2113, 65.476, 24566) == pytest.approx(0.6145, abs=5e-5)  # LS Table 2, Qwen
    assert aes(58.798, 2402, 60.004, 28496) == pytest.approx(0.8152, abs=5e-5)  # LS Table 2, Llama
    assert aes(35.82, 1623, 65.476, 24566) == pytest.approx(-1.3307, abs=5e-5)
    assert aes(0.6, 50, 0.5, 100) == pytest.approx(0.5 + 3 * 0.2)
    assert aes(0.4, 50, 0.5, 100) == pytest.approx(0.5 - 5 * 0.2)
    assert aes(0.5, 100, 0.5, 100) == 0.0


@pytest.mark.parametrize("base_accuracy, base_tokens", [(0.0, 10.0), (0.5, 0.0)])
def test_aes_needs_a_base(base_accuracy, base_tokens):
    with pytest.raises(ValueError, match="relative to a base"):
        aes(0.5, 10, base_accuracy, base_tokens)


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
    assert summarise(ATTEMPTS) == {
        "completions": 4,
        "accuracy": 0.75,
        "tokens": 30.0,
        "tokens_max": 60,
        "truncated": 0.25,
        "tokens_per_correct": 40.0,
        "pass@2": 1.0,
        "maj@2": 1.0,
        "by_level": {
            "easy": {"completions": 2, "accuracy": 1.0, "tokens": 15.0},
            "hard": {"completions": 2, "accuracy": 0.5, "tokens": 45.0},
        },
    }


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
