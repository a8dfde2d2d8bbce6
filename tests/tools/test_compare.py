"""The comparison's bookkeeping, on two finished runs written by hand."""

import json
import sys

import pytest

from thinkrl.tools.compare import collect, draw, start_policy, table


def run(folder, name: str, accuracy: float, tokens: float) -> None:
    def result(step, accuracy, tokens):
        part = {"accuracy": accuracy, "tokens": tokens}
        return {
            "step": step,
            **part,
            "truncated": 0.0,
            "greedy": part | {"by_level": {"easy": part}},
            "by_level": {"easy": part},
        }

    (folder / name).mkdir()
    summary = {
        "before": result(0, 0.5, 60),
        "step_5": result(5, 0.6, 55),
        "after": result(10, accuracy, tokens),
    }
    (folder / name / "summary.json").write_text(json.dumps(summary))
    (folder / name / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "seconds": 2.0, "tokens": 40.0, "episodes": 4.0, "malformed": 0.0}) + "\n"
            for i in range(1, 11)
        )
    )


def test_lists_with_one_entry_per_finished_seed(tmp_path):
    run(tmp_path, "grpo-1", 0.8, 50)
    run(tmp_path, "grpo-2", 0.9, 40)
    result = collect("grpo", ["1", "2", "3"], tmp_path)
    assert (
        result["seed"] == [1, 2] and result["accuracy"] == [0.8, 0.9] and result["greedy_tokens"] == [50, 40]
    )
    assert result["curve"][0] == [[0, 0.5, 60], [5, 0.6, 55], [10, 0.8, 50]] and result[
        "seconds_per_step"
    ] == [2.0, 2.0]
    assert result["tokens_per_episode"] == [10, 10] and result["greedy_accuracy easy"] == result[
        "accuracy easy"
    ] == [0.8, 0.9]
    assert start_policy("grpo", ["1", "2", "3"], tmp_path)["tokens"] == [60, 60]
    assert "| grpo | 2 | 85.0 ± 7.1 | 45.0 ± 7.1 |" in table({"grpo": result})


RESULTS = {
    "grpo": {
        "curve": [[[0, 0.5, 60], [5, 0.6, 55], [10, 0.8, 50]], [[0, 0.5, 60], [5, 0.7, 45], [10, 0.9, 40]]]
    }
}


def test_a_path_per_recipe_averaged_over_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes, "plot", lambda *args, **options: drawn.append(args[1:3]) or plot(*args, **options)
        )
        assert draw(RESULTS, tmp_path / "f.svg") == str(tmp_path / "f.svg")
    (tokens, accuracy), svg = drawn[0], (tmp_path / "f.svg").read_text()
    assert tokens == (60, 50, 45) and accuracy == pytest.approx((0.5, 0.65, 0.85)) and "</svg>" in svg
    assert draw(RESULTS, tmp_path / "f.png") and (tmp_path / "f.png").stat().st_size > 1000


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(RESULTS, tmp_path / "f.svg") == "none, it needs matplotlib: pip install 'thinkrl[report]'"
    assert not (tmp_path / "f.svg").exists()
