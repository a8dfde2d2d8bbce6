"""The comparison's bookkeeping, on two finished runs written by hand."""

import json

from thinkrl.tools.compare import collect, figure, start_policy, table


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
    figure({"grpo": result}, tmp_path / "f.svg")
    assert (tmp_path / "f.svg").read_text().count("<circle") == 3
