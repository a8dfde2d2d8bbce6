import json

import pytest

from report_runs import (
    evaluation,
    new_chains,
    new_run,
    result,
    row,
    with_tokenizer,
    write_evaluations,
    write_summary,
)
from thinkrl import UserError
from thinkrl.tools.reading import Chains, TrainingRun, open_folders


def opened(folder) -> TrainingRun:
    return open_folders([folder])[0]


def test_a_run_that_is_still_written(tmp_path):
    log = new_run(tmp_path)
    assert (
        opened(log.folder).steps == 0
        and not opened(log.folder).finished
        and not opened(log.folder).logged_steps
    )
    log.step({"step": 1, "reward": 0.5})
    log.samples(1, [row("5")])
    write_evaluations(log, evaluation("before", 0, [True]))
    for name in ("metrics", "samples", "evaluations"):
        with (log.folder / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
    run = opened(log.folder)
    assert (
        run.steps == 1
        and list(run.logged_steps) == [1]
        and len(run.samples(1)) == len(list(run.held_out())) == 1
    )


def test_samples_of_a_step_are_found_without_reading_the_others(tmp_path):
    log = new_run(tmp_path)
    log.samples(3, [row("3"), row("33", sample=1)])
    log.samples(12, [row("12")])
    path = log.folder / "samples.jsonl"
    path.write_text(path.read_text().replace('{"step": 3, "problem"', '{"step": 3, damaged', 1))
    run = opened(log.folder)
    assert [r["text"] for r in run.samples(12)] == ["12"] and run.samples(5) == []
    assert {step: len(rows) for step, rows in run.logged_steps.items()} == {3: 2, 12: 1}


def test_evaluations_in_the_order_of_training(tmp_path):
    log = new_run(tmp_path)
    write_summary(log, before=result(0.5, 60, 0), after=result(0.8, 40, 9), step_5=result(0.6, 50, 5))
    run = opened(log.folder)
    assert [name for name, _ in run.evaluations] == ["before", "step_5", "after"] and run.after[
        "tokens"
    ] == 40
    write_summary(log, before=result(0.5, 60, 0), step_5=result(0.6, 50, 5))
    assert opened(log.folder).after["tokens"] == 50, "the newest, while it is running"
    write_summary(log, after={"loss": 1.0})
    assert opened(log.folder).finished and opened(log.folder).evaluations == [], (
        "sft and prm have no accuracy"
    )


def test_the_newest_checkpoint_has_the_tokenizer(tmp_path):
    log = new_run(tmp_path)
    with_tokenizer(log, 10)
    with_tokenizer(log, 9)
    (log.folder / "checkpoints" / "step_9" / "hf" / "tokenizer.json").write_text("damaged: must not be read")
    (log.folder / "checkpoints" / "step_11.tmp" / "hf").mkdir(parents=True)
    assert opened(log.folder).tokenizer.path.parent.name == "step_10"


def test_before_the_first_checkpoint_it_is_that_of_the_start_policy(tmp_path):
    log = new_run(tmp_path)
    assert opened(log.folder).tokenizer.path.name == "tiny"
    config = log.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(tmp_path / "gone")}))
    assert opened(log.folder).tokenizer is None


def test_folders_of_runs_and_of_chunk(tmp_path):
    for name in ("b", "a"):
        new_run(tmp_path, name=name)
    new_chains(tmp_path, name="c")
    (tmp_path / "a" / "checkpoints").mkdir()
    found = open_folders([tmp_path])
    assert [(type(each), each.name) for each in found] == [
        (TrainingRun, "a"),
        (TrainingRun, "b"),
        (Chains, "c"),
    ]
    (tmp_path / "other").mkdir()
    new_run(tmp_path / "other", name="a")
    alike = open_folders([tmp_path / "a", tmp_path / "other" / "a"])
    assert [each.name for each in alike] == [f"{tmp_path.name}/a", "other/a"]
    for wrong in (tmp_path / "a" / "checkpoints", tmp_path / "nothing"):
        with pytest.raises(
            UserError, match=f"{wrong} is not a run folder, it has no config.json of train.py"
        ):
            open_folders([wrong])
