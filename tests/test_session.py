"""What a run does after its steps: it saves while it goes on, and says if the sampler is another policy."""

import json
import threading

import pytest
import torch

import train
from thinkrl import learner
from thinkrl.config import parse
from thinkrl.sampler import Sampler
from thinkrl.update import mismatch_limit

SMALL = "--problems_per_step 2 --group_size 2 --max_tokens 30 --eval_problems 0 --name run"


def run(tmp_path, *options: str) -> list[dict]:
    """The lines of metrics.jsonl."""
    train.main(parse(["grpo", *SMALL.split(), "--runs_dir", str(tmp_path), *options]))
    return lines(tmp_path)


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one_weight_is_changed(monkeypatch):
    """One number of the sampler's copy of the policy, after every sync."""
    sync = Sampler.load_weights

    def wrong(self, policy) -> None:
        sync(self, policy)
        with torch.no_grad():
            self.model.norm.weight[5] += 0.5

    monkeypatch.setattr(Sampler, "load_weights", wrong)


def test_the_limit():
    """16 eps in bfloat16; in float32 of width 225, 16 (1 + 15) eps; twice that at half the temperature."""
    assert mismatch_limit(torch.bfloat16, 225, 1.0) == pytest.approx(16 * 2**-7, rel=1e-3)
    assert mismatch_limit(torch.float32, 225, 1.0) == 256 * 2**-23
    assert mismatch_limit(torch.float32, 225, 0.5) == 512 * 2**-23
    assert mismatch_limit(torch.float32, 225, 2.0) == 256 * 2**-23


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_normal_run_is_far_below_it(tmp_path, capsys, dtype):
    rows = run(tmp_path, "--steps", "2", "--dtype", dtype, "--temperature", "0.5", "--strict")
    limit = mismatch_limit(getattr(torch, dtype), 96, 0.5)
    assert all(row["mismatch"] < limit / 10 for row in rows) and "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_one_changed_weight_is_warned_of_once(tmp_path, capsys, one_weight_is_changed):
    """The first rollout is before the first sync: from the second step on."""
    rows = run(tmp_path, "--steps", "4")
    limit = mismatch_limit(torch.float32, 96, 1.0)
    assert [row["mismatch"] > limit for row in rows] == [False, True, True, True]
    said = capsys.readouterr().err
    assert said.count("log-probs of sampler and trainer differ") == 1
    assert f"warning: step 2: log-probs of sampler and trainer differ by {rows[1]['mismatch']:.2g}" in said


@pytest.mark.slow
def test_strict_stops_before_anything_is_saved(tmp_path, capsys, one_weight_is_changed):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--steps", "4", "--save_every", "1", "--strict")
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stopped.value.code == 1 and "step 2: log-probs" in sentence and "--strict" in sentence
    assert (tmp_path / "run" / "latest").read_text() == "step_1\n" and len(lines(tmp_path)) == 2


@pytest.mark.slow
def test_a_checkpoint_is_written_while_the_next_step_runs(tmp_path, monkeypatch):
    """The first one is held back until the second step has sampled. The last is there when the run ends."""
    sampled, met, rollouts = threading.Event(), [], []
    save_step, release = learner.save_step, Sampler.release_pool

    def held_back(snapshot, group) -> None:
        met.append(sampled.wait(60))
        save_step(snapshot, group)

    def released(self) -> None:
        rollouts.append(self)
        if len(rollouts) == 2:
            sampled.set()
        release(self)

    monkeypatch.setattr(learner, "save_step", held_back)
    monkeypatch.setattr(Sampler, "release_pool", released)
    run(tmp_path, "--steps", "3", "--save_every", "1", "--keep_checkpoints", "3")
    assert met == [True, True, True] and (tmp_path / "run" / "latest").read_text() == "step_3\n"
    folders = (tmp_path / "run" / "checkpoints").iterdir()
    assert sorted(folder.name for folder in folders) == ["step_1", "step_2", "step_3"]


@pytest.mark.slow
def test_a_write_that_fails_ends_the_run_and_the_checkpoint_before_stays(tmp_path, monkeypatch, capsys):
    """In the place of step 2's folder of shards is a file."""
    begin_step = learner.begin_step

    def spoilt(folder, step, *state):
        snapshot = begin_step(folder, step, *state)
        if step == 2:
            (snapshot.path.with_name("step_2.tmp") / "dcp").touch()
        return snapshot

    monkeypatch.setattr(learner, "begin_step", spoilt)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--steps", "4", "--save_every", "1")
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stopped.value.code == 2 and "step_2" in sentence and "File exists" in sentence
    assert (tmp_path / "run" / "latest").read_text() == "step_1\n" and len(lines(tmp_path)) == 3
