"""An evaluation that is killed goes on, one that was begun otherwise is refused; its numbers and tables by
hand.
"""

import json

import pytest

from thinkrl.distributed import start
from thinkrl.intervals import clustered_interval
from thinkrl.tools.evaluation import ROWS, evaluate, settings_of, summary, table, tables
from thinkrl.types import Problem, UserError

PROBLEMS = [Problem(i, f"{i}?", str(i), "arith", f"level {i % 2}") for i in range(5)]


def record(problem, sample, correct=True, tokens=10, chances=None):
    turns = [{"role": "policy", "text": "", "tokens": tokens, "finish_reason": "stop"}]
    answer = problem.answer if correct else "7"
    out = {
        **{"problem": problem.id, "sample": sample, "question": problem.question, "gold": problem.answer},
        **{"source": "arith", "level": problem.level, "answer": answer},
        **{"outcome_reward": float(correct), "turns": turns},
    }
    return out | ({"at_budgets": chances} if chances else {})


class Scripted:
    """A policy that answers, and is killed when it has been asked for `dies_after` problems."""

    samplers = ()

    def __init__(self, n, dies_after=None):
        self.n, self.left, self.asked = n, dies_after, []

    def require_room(self, problems):
        assert problems == PROBLEMS

    def records(self, problems):
        if self.left is not None and len(self.asked) >= self.left:
            raise KeyboardInterrupt
        self.asked += [p.id for p in problems]
        return [record(p, i, correct=(p.id + i) % 2 == 0) for p in problems for i in range(self.n)]


def measure(policy, folder, n=2, settings=None):
    return evaluate(PROBLEMS, n, lambda: policy, start("cpu"), folder, settings or {"n": n}, "sampled")


def test_a_killed_evaluation_goes_on(tmp_path):
    n = ROWS // 2  # two problems in a call of the sampler
    whole = measure(Scripted(n), tmp_path / "whole", n)
    with pytest.raises(KeyboardInterrupt):
        measure(Scripted(n, dies_after=2), tmp_path / "killed", n)
    part = tmp_path / "killed" / "parts" / "rank_0.jsonl"
    written = part.read_text()
    assert len(written.splitlines()) == 2 * n
    part.write_text(written[: len(written) - 10])  # the kill tore the last line: its problem is not finished
    second = Scripted(n)
    assert measure(second, tmp_path / "killed", n) == whole and second.asked == [1, 2, 3, 4]
    for folder in ("whole", "killed"):
        lines = (tmp_path / folder / "completions.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == whole and not (tmp_path / folder / "parts").exists()
    third = Scripted(n)
    assert measure(third, tmp_path / "killed", n) == whole and third.asked == [], "nothing is left to do"


def test_a_changed_option_is_refused(tmp_path):
    measure(Scripted(2), tmp_path, 2, {"n": 2, "temperature": 1.0})
    with pytest.raises(UserError, match="was begun with temperature 1.0, now 0.5: give the same"):
        measure(Scripted(2), tmp_path, 2, {"n": 2, "temperature": 0.5})


def test_other_problems_and_other_weights_are_other_settings(tmp_path):
    def crc(problems, weights):
        (tmp_path / "model.safetensors").write_bytes(weights)
        settings = settings_of({"n": 1}, problems, [tmp_path])
        return settings["problems_crc32"], settings["weights_crc32"]

    first = crc(PROBLEMS, b"a" * 3_000_000)
    assert first == crc(PROBLEMS, b"a" * 3_000_000)
    assert first[0] != crc(PROBLEMS[:4], b"a")[0] and first[1] != crc(PROBLEMS, b"a" * 2_999_999 + b"b")[1]


def test_nothing_is_written_for_a_policy_without_room(tmp_path):
    policy = Scripted(1)
    policy.require_room = lambda problems: (_ for _ in ()).throw(UserError("no room"))
    with pytest.raises(UserError, match="no room"):
        measure(policy, tmp_path / "out", 1)
    assert not (tmp_path / "out" / "config.json").exists()


def test_budgets_are_summed_up_by_problem():
    chances = [[[8, 0.25], [16, 1.0]], [[8, 0.75], [16, 1.0]], [[8, 0.0], [16, 0.5]], [[8, 0.0], [16, 0.5]]]
    result = summary([record(PROBLEMS[i // 2], i % 2, chances=c) for i, c in enumerate(chances)])
    assert result["budgets"] == [[8, 0.25], [16, 0.75]] and result["budget_area"] == 0.5
    assert tuple(result["budget_intervals"][0]) == clustered_interval([[0.25, 0.75], [0.0, 0.0]])[1:]


def test_tables():
    made = [record(p, i, correct=p.id > 0, tokens=10 + p.id) for p in PROBLEMS for i in range(2)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables(summary(made)).splitlines()]
    assert lines[2][:3] == ["all", "5", "80.0 %"] and lines[2][4:] == ["12.0", "12.0", "14.0", "14", "0.0 %"]
    assert lines[3][0] == "level 0" and lines[4][0] == "level 1" and lines[4][2] == "100.0 %"
    assert ["pass@k", "80.0 %"] in lines and ["maj@k", "80.0 %"] in lines


def test_a_level_cannot_break_a_table_or_turn_it_round():
    assert table(["", "x"], [["a|b\n\u202e", 1]]).splitlines()[-1] == "| a\\|b ⟨U+202E⟩ |   1 |"
