"""Run folders: a name is used once, a run continues only as it was started. Metrics: sums over counts,
lines once.
"""

import json
import os

import pytest
import torch

from thinkrl import UserError
from thinkrl.config import parse
from thinkrl.run.folder import open_run
from thinkrl.run.metrics import Log, Tally


def options(tmp_path, *more: str):
    return parse(["grpo", "--runs_dir", str(tmp_path), *more])


def test_fresh_names_differ(world, tmp_path):
    a, b = (open_run(options(tmp_path), world).folder for _ in range(2))
    assert (
        a != b
        and a.name.startswith("grpo-")
        and json.loads((a / "config.json").read_text())["preset"] == "grpo"
    )


def test_a_name_is_used_once(world, tmp_path):
    open_run(options(tmp_path, "--name", "x"), world)
    with pytest.raises(UserError, match="--resume auto"):
        open_run(options(tmp_path, "--name", "x"), world)


def test_resume_continues_the_same_configuration_only(world, tmp_path):
    run = open_run(options(tmp_path, "--name", "x"), world)
    assert open_run(options(tmp_path, "--name", "x", "--resume", "auto"), world).folder == run.folder
    assert open_run(options(tmp_path, "--resume", str(run.folder)), world).resumed
    assert open_run(options(tmp_path, "--resume", "auto"), world).folder == run.folder, (
        "found without its name"
    )
    with pytest.raises(UserError, match="lr 0.0002, now 0.5"):
        open_run(options(tmp_path, "--name", "x", "--resume", "auto", "--lr", "0.5"), world)
    run.update_summary(after={"accuracy": 1.0})
    with pytest.raises(UserError, match="finished"):
        open_run(options(tmp_path, "--name", "x", "--resume", "auto"), world)
    assert not open_run(options(tmp_path, "--resume", "auto"), world).resumed, (
        "a finished run is not continued"
    )


def test_resume_of_what_is_no_run(world, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        open_run(options(tmp_path, "--resume", str(tmp_path)), world)


@pytest.mark.parametrize("obstacle", ["a file where the folder should be"])
def test_unwritable(world, tmp_path, obstacle):
    (tmp_path / "file").write_text(obstacle)
    with pytest.raises(UserError, match="--runs_dir"):
        open_run(parse(["grpo", "--runs_dir", str(tmp_path / "file")]), world)


def test_tally_divides_sums_by_counts(world):
    tally = Tally()
    tally.add("reward", 1.0)
    tally.add("reward", torch.tensor(0.0))
    tally.add_all({"kl": (torch.tensor(6.0), torch.tensor(3.0)), "entropy": (0.0, 0.0)})
    tally.add_sum("probe_tokens", 3.0)
    tally.add_sum("probe_tokens", 4.0)
    assert tally.reduce() == {"reward": 0.5, "kl": 2.0, "entropy": 0.0, "probe_tokens": 7.0}


def test_a_resumed_log_repeats_no_step(world, tmp_path):
    log = Log(tmp_path, main=True, first_step=0, steps=3)
    for step in (1, 2, 3):
        log.step({"step": step, "loss": 0.1})
        log.samples(step, [{"text": "x"}])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    Log(tmp_path, main=True, first_step=2, steps=3).close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_an_undefined_metric_is_refused(world, tmp_path):
    log = Log(tmp_path, main=True, first_step=0, steps=1)
    with pytest.raises(AssertionError, match="mystery"):
        log.step({"step": 1, "mystery": 0.0})
    log.close()
