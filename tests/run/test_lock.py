"""One writer per folder, until the last of its processes has ended."""

import json
import os
import signal
import subprocess
import sys

import pytest

from helpers import ROOT, python, torchrun
from thinkrl import UserError
from thinkrl.distributed import start
from thinkrl.run import lock

HOLDER = (
    "import sys; from pathlib import Path; from thinkrl.run.lock import take\n"
    "take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.0)
    yield
    lock.release()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_second_is_told_who_the_first_is_until_that_is_killed(holder, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on .* since 20"):
        lock.take(tmp_path)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        lock.hold(tmp_path, start("cpu"))
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock.take(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_one_process_is_one_writer(tmp_path):
    lock.take(tmp_path)
    lock.take(tmp_path)
    lock.hold(tmp_path, start("cpu"))


def test_a_rank_that_outlives_rank_0_keeps_the_folder(tmp_path):
    """Rank 0 shares the lock with the others, and nobody can take it alone while one of them has it."""
    folder = tmp_path / "run"
    lock.hold(folder, start("cpu"))
    with open(folder / ".lock", "a+") as other_rank:
        assert lock._lock(other_rank, lock.fcntl.LOCK_SH)
        lock.release()
        with pytest.raises(UserError, match="in use by process"):
            lock.take(folder)
    lock.take(folder)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*choose another --runs_dir"):
        lock.take(tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "chunk", "pipeline"])
def test_a_second_start_is_refused_with_one_sentence(holder, tmp_path, program):
    command = {
        "train": ["train.py", "grpo", "--runs_dir", str(tmp_path.parent), "--name", tmp_path.name],
        "chunk": ["chunk.py", "--out", str(tmp_path)],
        "pipeline": ["-m", "thinkrl.tools.pipeline", "--out", str(tmp_path)],
    }[program]
    done = python(*command)
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith(program)]
    assert done.returncode == 2 and f"is in use by process {holder.pid}" in sentence, done.stderr
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.slow
def test_workers_end_with_their_launcher(tmp_path):
    """torchrun is killed when step 1 is saved. Its workers end at once, so the run can be continued."""
    command = ["train.py", "grpo", "--steps", "3", "--save_every", "1", "--problems_per_step", "2"]
    command += [
        "--group_size",
        "2",
        "--max_tokens",
        "10",
        "--eval_problems",
        "0",
        "--runs_dir",
        str(tmp_path),
    ]
    command += ["--name", "run", "--resume", "auto"]
    done = torchrun(2, "tests/killed.py", "thinkrl.resume:point_latest", "1", *command, KILL_WHO="launcher")
    assert done.returncode == -signal.SIGKILL
    again = torchrun(2, *command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continues at step 1 from" in again.stdout
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2, 3]
