"""Two runs on the same problems: what is paired, and the numbers by hand."""

import json

import pytest

from thinkrl.tools.paired import compare, compare_runs, read, tables
from thinkrl.types import UserError


def record(problem, correct, tokens, level="", sample=0, **more):
    turns = [{"role": "policy", "text": "", "tokens": tokens, "finish_reason": "stop"}]
    return {
        **{"problem": problem, "sample": sample, "question": f"{problem}?", "gold": "1", "level": level},
        **{"outcome_reward": float(correct), "turns": turns},
        **more,
    }


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_numbers_by_hand():
    # A is right on all four and spends half of B's tokens; B is right on three
    a = [record(i, True, 10, "hard" if i else "easy") for i in range(4)]
    b = [record(i, i > 0, 20, "hard" if i else "easy") for i in range(4)]
    out = compare(a, b, ("a", "b"))
    assert (out["problems"], out["better"], out["worse"], out["left_out"]) == (4, 1, 0, [0, 0])
    accuracy, tokens = out["quantities"]["accuracy"], out["quantities"]["tokens"]
    assert accuracy == {"a": 1.0, "b": 0.75, "difference": 0.25, "interval": [0.0, 0.75]}
    assert tokens == {"a": 10.0, "b": 20.0, "difference": -10.0, "interval": [-10.0, -10.0]}
    assert out["aes"] == pytest.approx(1 / 2 + 3 * (1 / 4) / (3 / 4))
    assert out["aes_interval"][0] == 0.5, "a draw without the problem that differs"
    assert out["quantities"]["accuracy, hard"]["difference"] == 0.0
    assert out["quantities"]["accuracy, easy"] == {"a": 1.0, "b": 0.0, "difference": 1.0, "interval": None}


def test_samples_of_a_problem_count_as_their_mean_and_need_not_be_as_many():
    a = [
        record(0, True, 10),
        record(0, False, 30, sample=1),
        record(1, True, 10),
        record(1, True, 10, sample=1),
    ]
    b = [record(0, True, 20), record(1, True, 10)]
    out = compare(a, b, ("a", "b"))
    assert out["quantities"]["accuracy"]["a"] == 0.75 and out["quantities"]["tokens"]["a"] == 15.0
    assert (out["better"], out["worse"]) == (0, 1)


def test_only_the_same_problems_are_paired():
    a, b = [record(0, True, 9), record(1, True, 9)], [record(1, True, 9), record(2, True, 9)]
    out = compare(a, b, ("a", "b"))
    assert out["problems"] == 1 and out["left_out"] == [1, 1]
    assert "left out: 1 that only A has, 1 that only B has" in tables(out)
    with pytest.raises(UserError, match="a and b have no problem in common"):
        compare(a, [record(0, True, 9) | {"gold": "2"}], ("a", "b"))


@pytest.mark.slow
def test_shared_budgets_are_compared():
    a = [record(i, True, 9, at_budgets=[[8, 0.5], [16, 1.0]]) for i in range(2)]
    b = [record(i, True, 9, at_budgets=[[8, 0.25], [16, 1.0]]) for i in range(2)]
    found = compare(a, b, ("a", "b"))["quantities"]
    assert found["accuracy at 8 tokens"]["difference"] == 0.25
    assert found["accuracy at 16 tokens"]["difference"] == 0.0
    others = [record(i, True, 9, at_budgets=[[8, 0.25]]) for i in range(2)]
    assert list(compare(a, others, ("a", "b"))["quantities"]) == ["accuracy", "tokens"]


@pytest.mark.slow
def test_without_accuracy_there_is_no_aes():
    out = compare([record(0, True, 9)], [record(0, False, 9)], ("a", "b"))
    assert out["aes"] is None and out["aes_interval"] == [] and "no AES" in tables(out)
    half = compare(
        [record(i, True, 9) for i in range(2)], [record(i, i > 0, 9) for i in range(2)], ("a", "b")
    )
    assert half["aes"] == 3.0 and half["aes_interval"] == [None, None] and "−∞ to +∞" in tables(half)
    assert json.loads(json.dumps(half)) == half


def test_a_table_with_signs():
    a, b = [record(i, True, 10) for i in range(4)], [record(i, i > 0, 20) for i in range(4)]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tables(compare(a, b, ("x", "y"))).splitlines()
    ]
    assert ["accuracy", "100.0 %", "75.0 %", "+25.0", "+0.0 to +75.0"] in lines
    assert ["tokens", "10.0", "20.0", "−10.0", "−10.0 to −10.0"] in lines


def test_runs_and_their_evaluations(tmp_path):
    kinds = [("before", False, "sampled"), ("after", True, "sampled"), ("after", True, "greedy")]
    rows = [
        record(i, right, 9, when=when, decoding=decoding) for when, right, decoding in kinds for i in range(2)
    ]
    # one was written twice, before and after a kill
    write(tmp_path / "run" / "evaluations.jsonl", rows + rows[:1])
    write(tmp_path / "out" / "completions.jsonl", [record(i, i > 0, 9, decoding="sampled") for i in range(2)])
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert len(read(f"{run}:before")["sampled"]) == 2 and set(read(run)) == {"sampled", "greedy"}
    assert compare_runs(run, f"{run}:before")["sampled"]["better"] == 2
    assert list(compare_runs(run, out)) == ["sampled"] and compare_runs(run, out)["sampled"]["better"] == 1
    write(tmp_path / "greedy" / "completions.jsonl", [record(0, True, 9, decoding="greedy")])
    for spec, sentence in (
        (f"{run}:middle", "no evaluation is named middle; there are before, after"),
        (f"{tmp_path}/none", "no such folder"),
        (str(tmp_path), "neither a run folder with evaluations.jsonl"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(spec)
    with pytest.raises(UserError, match="nothing to pair"):
        compare_runs(f"{run}:before", str(tmp_path / "greedy"))
    (tmp_path / "begun" / "parts").mkdir(parents=True)
    with pytest.raises(UserError, match="is not finished"):
        read(str(tmp_path / "begun"))
