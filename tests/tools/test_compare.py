"""The comparison's bookkeeping and conclusions, on finished runs written by hand."""

import json
import sys

import numpy as np
import pytest

from thinkrl import UserError
from thinkrl.tools.compare import CONTROLS, EMBEDDED, METHODS, arguments, draw, parse, read_tasks
from thinkrl.tools.differences import Measured, compare, conclusions, measure, table

RIGHT = {"before": [1, 0, 1, 0], "after": [1, 1, 1, 0]}


def write_run(folder, name: str, tokens: int) -> None:
    """Four problems, half of them right before and three after; tokens of every answer after training."""
    run = folder / name
    run.mkdir()
    summary, lines = {}, []
    for step, when, length in (0, "before", 60), (10, "after", tokens):
        for decoding in "sampled", "greedy":
            for problem in reversed(range(4)):  # ranks answer in another order
                row = {"when": when, "decoding": decoding, "problem": problem, "sample": 0}
                row |= {"question": "?", "gold": "1", "level": ""}
                row |= {"outcome_reward": float(RIGHT[when][problem]), "turns": [{"tokens": length}]}
                lines.append(json.dumps(row) + "\n")
        summary[when] = {"step": step, "accuracy": sum(RIGHT[when]) / 4, "tokens": length}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "evaluations.jsonl").write_text("".join(lines))
    (run / "config.json").write_text(json.dumps({"problems_per_step": 2, "group_size": 5}))
    step = {"tokens": 40.0, "probe_tokens": 100.0}
    (run / "metrics.jsonl").write_text(2 * (json.dumps(step) + "\n"))


def test_arrays_of_seeds_and_problems_from_finished_runs(tmp_path):
    write_run(tmp_path, "grpo-1", tokens=50)
    write_run(tmp_path, "grpo-2", tokens=40)
    m = measure("grpo", ["1", "2", "3"], tmp_path)
    assert m.seeds == ["1", "2"] and measure("kimi", ["1"], tmp_path) is None
    assert m.after["accuracy"].tolist() == 2 * [RIGHT["after"]] and m.greedy["tokens"].tolist() == [
        4 * [50],
        4 * [40],
    ]
    assert m.before["accuracy"].tolist() == 2 * [RIGHT["before"]] and m.before["tokens"].mean() == 60
    assert m.curve == [(0, 0.5, 60), (10, 0.75, 45)]
    assert m.million_tokens == pytest.approx(2 * (2 * 5 * 40 + 100) / 1e6) and m.budgets == []


def method(accuracy, tokens, seeds=("1", "2"), budgets=()) -> Measured:
    """Of 40 problems: a share that is right, and one length for all."""
    right = (np.arange(40) < 40 * accuracy).astype(float)
    after = {"accuracy": np.tile(right, (len(seeds), 1)), "tokens": np.full((len(seeds), 40), float(tokens))}
    before = {
        "accuracy": np.tile(np.arange(40) < 20, (len(seeds), 1)) * 1.0,
        "tokens": np.full((len(seeds), 40), 60.0),
    }
    return Measured(list(seeds), before, after, after, [(10, accuracy, tokens)], 1.0, list(budgets))


@pytest.mark.slow
def test_differences_are_paired_by_seed_and_problem():
    rows = compare(
        {"grpo": method(0.5, 50), "short": method(0.5, 40, seeds=("2", "3")), "good": method(0.9, 50)}, "grpo"
    )
    assert "tokens_difference" not in rows["grpo"] and rows["short"]["paired_seeds"] == ["2"]
    assert rows["short"]["tokens_difference"] == (-10, -10, -10)  # of every problem, so of every draw
    assert rows["short"]["accuracy_difference"] == (0, 0, 0)
    value, low, high = rows["good"]["accuracy_difference"]  # 16 of 40 problems: standard error .077
    assert value == pytest.approx(0.4) and 0.2 < low < 0.3 and 0.5 < high < 0.6
    value, low, high = rows["short"]["aes"]  # (60 - 40) / 60 + 3 · 0, equally right on every problem
    assert value == low == high == pytest.approx(1 / 3)


@pytest.mark.slow
def test_conclusions_name_what_is_shown():
    rows = compare({"grpo": method(0.5, 50), "short": method(0.5, 40), "good": method(0.9, 50)}, "grpo")
    text = conclusions(rows, "grpo")
    assert "- more points of accuracy than grpo: good (+40.0)" in text
    assert "- no shown difference in points of accuracy to grpo: short (+0.0)" in text
    assert "- fewer tokens than grpo: short (-10.0)" in text and "- 4 intervals" in text
    line = next(line for line in table(rows, "grpo").splitlines() if line.startswith("| short"))
    assert (
        "| 2 | 50.0 [" in line and "| -10.0 [-10.0, -10.0] | 0.33 [0.33, 0.33] | 50.0 | 40.0 | 1.00 |" in line
    )


@pytest.mark.slow
def test_the_gap_to_the_frontier_is_shown_where_every_method_has_budgets():
    with_budgets = {"a": method(0.5, 50, budgets=(0.2, 0.6)), "b": method(0.5, 50, budgets=(0.4, 0.5))}
    rows = compare(with_budgets, "a")  # best: .4, .6
    assert rows["a"]["gap_to_frontier"] == pytest.approx(0.1) and rows["b"][
        "gap_to_frontier"
    ] == pytest.approx(0.05)
    assert "| gap to frontier |" in table(rows, "a") and "| 10.0 |" in table(rows, "a")
    assert "gap_to_frontier" not in compare(with_budgets | {"c": method(0.5, 50)}, "a")["a"]


@pytest.mark.parametrize("name", METHODS | CONTROLS)
def test_every_method_is_a_configuration_of_train_py(name):
    from thinkrl.config import parse as parse_config

    parse_config(arguments(name, EMBEDDED["arith"], "1", parse([])))


def test_constants_in_tokens_follow_the_task():
    task = {"options": "--max_tokens 100", "tokens": 640}
    text = " ".join(arguments("shorter_better", task, "3", parse(["--steps", "7"])))
    assert "--length_beta 0.002 --max_tokens 100 --seed 3 --steps 7 " in text
    assert "--length_limit 640" in " ".join(arguments("laser", task, "3", parse([])))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no method 'kimmi' to compare .did you mean 'kimi'"):
        parse(["--methods", "grpo,kimmi"])
    with pytest.raises(UserError, match="--against grpo is not among --methods"):
        parse(["--methods", "l2t,kimi"])
    (tmp_path / "t.json").write_text('{"a": {"options": ""}}')
    with pytest.raises(UserError, match='it must be a JSON file of {"NAME"'):
        read_tasks(str(tmp_path / "t.json"))


ROWS = {"grpo": {"curve": [(0, 0.5, 60), (5, 0.65, 50), (10, 0.85, 45)]}}


def test_a_path_per_method(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes, "plot", lambda *args, **options: drawn.append(args[1:3]) or plot(*args, **options)
        )
        assert draw(ROWS, tmp_path / "f.svg") == str(tmp_path / "f.svg")
    (tokens, accuracy), svg = drawn[0], (tmp_path / "f.svg").read_text()
    assert tokens == (60, 50, 45) and accuracy == (0.5, 0.65, 0.85) and "</svg>" in svg
    assert draw(ROWS, tmp_path / "f.png") and (tmp_path / "f.png").stat().st_size > 1000


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(ROWS, tmp_path / "f.svg") == "none, it needs matplotlib: pip install 'thinkrl[report]'"
    assert not (tmp_path / "f.svg").exists()
