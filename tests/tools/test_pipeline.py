"""The four stages of Long⊗Short as one command: end to end on a few problems, and its bookkeeping by hand."""

import json

import pytest

from report_runs import Page
from thinkrl.tools import pipeline
from thinkrl.tools.pipeline import collect, parse, require_exchanges, table


def result(accuracy: float, tokens: float, turns: int | None = None) -> dict:
    part = {
        "accuracy": accuracy,
        "tokens": tokens,
        "by_level": {"easy": {"accuracy": accuracy, "tokens": tokens}},
    }
    if turns:
        part |= {
            "turns": {"min": 1, "mean": (1 + turns) / 2, "max": turns},
            "long_tokens": tokens / 4,
            "short_tokens": 3 * tokens / 4,
            "ended": {"answered": 1.0},
        }
    return part | {"greedy": part | {"tokens": tokens - 10}}


def test_one_entry_per_round(tmp_path):
    files = {
        "longshort/summary.json": {
            "before": result(0.4, 80, 3),
            "L1⊗S0": result(0.5, 60, 2),
            "after": result(0.75, 30, 1),
        },
        "grpo/summary.json": {"before": result(0.5, 60), "after": result(0.6, 30)},
        "chunk/annotated.json": [
            {"lengths": [10, 20], "thoughts": ["a", "b"], "segments": ["x"] * 4},
            {"lengths": [30, 40], "thoughts": ["a", "b"], "segments": ["x"] * 2},
        ],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    summary = collect(tmp_path, "LS")
    assert [(r["policies"], r["trained"], r["accuracy"]) for r in summary["rounds"]] == [
        ("L0⊗S0", None, 0.4),
        ("L1⊗S0", "long", 0.5),
        ("L1⊗S1", "short", 0.75),
    ]
    # against 50 % at 60 tokens: (60-80)/60 - 5·0.2; nothing; (60-30)/60 + 3·0.5
    assert [round(r["aes"], 4) for r in summary["rounds"]] == [-1.3333, 0.0, 2.0]
    # greedily against 50 % at 50 tokens: (50-70)/50 - 5·0.2; nothing; (50-20)/50 + 3·0.5
    assert [round(r["greedy"]["aes"], 4) for r in summary["rounds"]] == [-1.4, 0.0, 2.1]
    assert summary["base"]["aes"] == summary["base"]["greedy"]["aes"] == 0
    assert round(summary["grpo"]["aes"], 4) == 1.1
    assert summary["long_chains"] == {"chains": 2, "tokens": 50, "thoughts": 2, "exchanges": 1.5}
    assert "| L1⊗S1 | 75.0% | 30.0 | 7.5 + 22.5 | 1 / 1.00 / 1 | +2.00 |" in table(summary)
    with pytest.raises(pipeline.UserError, match="every conversation of L1⊗S1 ended at its first turn"):
        require_exchanges(summary)


@pytest.mark.slow
def test_all_stages_and_continuing(tmp_path, capfd):
    """Two steps of cold start teach no protocol: the command does all of its work, and then says so."""
    arguments = [
        "--out",
        str(tmp_path),
        "--chains",
        "70",
        "--sft_steps",
        "2",
        "--steps_per_round",
        "1",
        "--eval_problems",
        "20",
    ]
    small = parse([*arguments, "--rounds", "LS"])
    with pytest.raises(SystemExit) as stopped:
        pipeline.main(small)
    assert stopped.value.code == 1 and "ended at its first turn" in capfd.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["policies"] for r in summary["rounds"]] == ["L0⊗S0", "L1⊗S0", "L1⊗S1"]
    assert {"turns", "long_tokens", "aes", "greedy"} <= summary["rounds"][-1].keys()
    page = Page(tmp_path / "report.html")
    assert page.data["runs"] == ["L0", "S0", "grpo", "longshort"] and page.data["chains"]
    assert {"Rounds", "Before and after", "Training completions", "Chains"} <= set(page.texts("h2"))
    grpo, base = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("grpo", "longshort"))
    same = ("steps", "problems_per_step", "group_size", "temperature", "seed", "lr", "eval_problems")
    assert [grpo[key] for key in same] == [base[key] for key in same], "the same budget"
    with pytest.raises(SystemExit):
        pipeline.main(parse([*arguments, "--rounds", "LS", "--ranks", "1"]))
    said = capfd.readouterr().out
    assert "== 1 chunk" in said and "== 2" not in said and "== 3" not in said, (
        "finished stages are not done again"
    )
    with pytest.raises(SystemExit) as stopped:
        pipeline.main(parse([*arguments, "--rounds", "LLS"]))
    said = capfd.readouterr()
    assert (
        stopped.value.code == 2
        and "was begun with rounds 'LS', now 'LLS': give the same, or choose another" in said.err
    )
    assert not said.out and json.loads((tmp_path / "summary.json").read_text()) == summary, (
        "no pair's number under another's name"
    )


def test_a_wrong_schedule_before_anything_runs():
    with pytest.raises(pipeline.UserError, match="letters L and S, not X"):
        parse(["--rounds", "LXS"])
    with pytest.raises(pipeline.UserError, match="--sft_steps is 0: it must be at least 1"):
        parse(["--sft_steps", "0"])


def test_a_folder_belongs_to_its_options(tmp_path):
    folder = pipeline.open_folder(parse(["--out", str(tmp_path / "out")]))
    assert pipeline.open_folder(parse(["--out", str(folder), "--ranks", "1"])) == folder, (
        "the number of ranks decides nothing"
    )
    with pytest.raises(
        pipeline.UserError, match="was begun with seed 42, now 43; chains 800, now 70: give the same"
    ):
        pipeline.open_folder(parse(["--out", str(folder), "--seed", "43", "--chains", "70"]))
    with pytest.raises(pipeline.UserError, match="config.json cannot be written .*choose another"):
        pipeline.open_folder(parse(["--out", str(folder / "config.json")]))
