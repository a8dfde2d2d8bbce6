"""Trackers: TensorBoard for real where it is installed; Weights & Biases as a stub with its documented
signatures.
"""

import json
import sys

import pytest

from helpers import torchrun
from report_runs import evaluation, row
from thinkrl import UserError
from thinkrl.run.sinks import (
    COLUMNS,
    LONGEST,
    SHOWN,
    TensorBoard,
    flat,
    markdown,
    open_sinks,
    require_sinks,
    table_rows,
)

WANDB = '''
"""Writes the calls of wandb's documented interface to calls.jsonl beside this file."""

import json
from pathlib import Path


def note(call, **values):
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps({"call": call, **{k: v for k, v in values.items() if v is not None}}, default=str) + "\\n")


class Table:
    def __init__(self, columns=None, data=None, rows=None, dataframe=None, dtype=None, optional=True,
                 allow_mixed_types=False, log_mode="IMMUTABLE"):
        self.columns, self.data = columns, data

    def __str__(self):
        return json.dumps({"columns": self.columns, "data": self.data})


class Run:
    def log(self, data, step=None, commit=None):
        note("log", data=data, step=step, commit=commit)

    def finish(self, exit_code=None, quiet=None):
        note("finish", exit_code=exit_code)


def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
         config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
         mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
         tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None):
    note("init", project=project, dir=dir, id=id, name=name, config=config, resume=resume)
    return Run()
'''


def calls(folder, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "wandb" / "calls.jsonl").read_text().splitlines()]
    return [line for line in lines if line["call"] == name]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The folder of a stub named wandb that Python finds first."""
    (tmp_path / "stub" / "wandb").mkdir(parents=True)
    (tmp_path / "stub" / "wandb" / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path / "stub"
    sys.modules.pop("wandb", None)


def test_a_resumed_run_keeps_its_id_and_another_has_its_own(wandb, tmp_path):
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (sink,) = open_sinks(tmp_path / name, 0, "efficient", False, {"lr": 0.5})
        sink.numbers(3, {"reward": 0.5})
        sink.completions(3, "held-out completions", table_rows(3, evaluation("before", 0, [True])))
        sink.close()
    begun = calls(wandb, "init")
    assert [c["name"] for c in begun] == ["a", "a", "b"] and {c["project"] for c in begun} == {"efficient"}
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"] and {c["resume"] for c in begun} == {"allow"}
    assert begun[0]["config"] == {"lr": 0.5} and begun[0]["dir"] == str(tmp_path / "a")
    numbers, table = calls(wandb, "log")[:2]
    assert numbers["data"] == {"reward": 0.5} and numbers["step"] == table["step"] == 3
    table = json.loads(table["data"]["held-out completions"])
    assert table == {"columns": COLUMNS, "data": [[3, 0, "hard", "question 0", "10", "10", True, 10, "5"]]}
    assert len(calls(wandb, "finish")) == 3


@pytest.mark.slow
def test_a_run_sends_what_its_page_has(wandb, tmp_path):
    small = [
        "--steps",
        "4",
        "--eval_every",
        "2",
        "--eval_problems",
        "4",
        "--problems_per_step",
        "2",
        "--group_size",
        "2",
    ]
    done = torchrun(
        1, "train.py", "grpo", *small, "--report_every", "2", "--wandb", "--wandb_project", "efficient",
        "--runs_dir", str(tmp_path), "--name", "run", PYTHONPATH=str(wandb),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (begun,) = calls(wandb, "init")
    assert begun["project"] == "efficient" and begun["config"]["steps"] == 4
    sent = calls(wandb, "log")
    assert [c["step"] for c in sent if "loss" in c["data"]] == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    held_out = [(c["step"], c["data"]["held_out/accuracy"], c["data"]["held_out/greedy/tokens"])
                for c in sent if "held_out/accuracy" in c["data"]]  # fmt: skip
    results = [summary[when] for when in ("before", "step_2", "after")]
    assert held_out == [(r["step"], r["accuracy"], r["greedy"]["tokens"]) for r in results]
    tables = [(c["step"], name) for c in sent for name in c["data"] if name.endswith(" completions")]
    assert tables == [(0, "held-out completions"), (2, "training completions"), (2, "held-out completions"),
                      (4, "training completions"), (4, "held-out completions")]  # fmt: skip
    assert [c["step"] for c in sent] == sorted(c["step"] for c in sent), "wandb drops what goes back"
    assert len(calls(wandb, "finish")) == 1


def test_numbers_of_an_evaluation():
    result = {"step": 4, "accuracy": 0.5, "tokens_per_correct": None, "budgets": [[16, 0.25], [32, 0.5]],
              "by_level": {"easy": {"accuracy": 1.0}}, "greedy": {"tokens": 12.0}}  # fmt: skip
    assert dict(flat(result, "held_out")) == {
        "held_out/accuracy": 0.5,
        "held_out/accuracy at 16 tokens": 0.25,
        "held_out/accuracy at 32 tokens": 0.5,
        "held_out/by_level/easy/accuracy": 1.0,
        "held_out/greedy/tokens": 12.0,
    }


def test_a_table_is_bounded():
    rows = table_rows(7, [row("5", sample=i) | {"text": "x" * 2 * LONGEST} for i in range(2 * SHOWN)])
    assert len(rows) == SHOWN and len(rows[0][-1]) == LONGEST
    assert rows[0][:-1] == [7, 7, "two steps", "What is (2+3)*2?", "10", "10", True, 1]


def test_model_text_is_a_block_for_markdown():
    """Indented by four spaces, a line is shown as it is: no tag, no link, no heading."""
    text = markdown([1, 2, "easy", "q", "5", "5", True, 9, "<script>\n\n# x\r[a](b)\u2028y"])
    assert all(line.startswith("    ") for line in text.splitlines()) and "<script>" in text


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install 'thinkrl[tensorboard]'"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(first: int, values: list[tuple[int, float]]) -> None:
        sink = TensorBoard(tmp_path, first)
        for step, value in values:
            sink.numbers(step, {"held_out/accuracy": value})
        sink.completions(
            values[-1][0], "held-out completions", table_rows(2, evaluation("after", 2, [True, False]))
        )
        sink.close()

    write(0, [(1, 0.25), (2, 0.5), (3, 0.125)])
    write(2, [(3, 0.75)])  # resumed after step 2
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("held_out/accuracy")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    (tag,) = [tag for tag in events.Tags()["tensors"] if "completions" in tag]
    text = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    assert "    question: question 1" in text and "    right: False" in text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--wandb needs the wandb package: pip install 'thinkrl\[wandb\]'"):
        require_sinks(wandb=True, tensorboard=False)
    require_sinks(wandb=False, tensorboard=False)
