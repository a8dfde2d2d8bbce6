"""SIGTERM and SIGINT stop a run where nothing is lost, all ranks at the same step; a second one ends it at
once.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from helpers import ROOT, python, torchrun
from thinkrl.run.signals import RESUMABLE, StopRequest

SMALL = ["--problems_per_step", "2", "--group_size", "2", "--max_tokens", "10", "--eval_problems", "2"]
LINE = "thinkrl.run.metrics:Log.step"  # rank 0 has written the line of a step


def train(tmp_path, *options: str) -> list[str]:
    return ["train.py", *options, *SMALL, "--runs_dir", str(tmp_path), "--name", "run", "--resume", "auto"]


def steps(tmp_path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def ours(stderr: str) -> list[str]:
    assert 'train.py", line' not in stderr, "no traceback of ours; torchrun adds its own report"
    return [line for line in stderr.splitlines() if line.startswith("train.py: ")]


def test_the_first_signal_asks_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest("this step", main=True)
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.asked:
        pass
    stop.close()
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    """Also while the main thread waits in C and runs no handler: here, for a lock that never comes free."""
    program = (
        "import os, signal, sys, threading, time; from thinkrl.run import signals\n"
        "signals.SAME_REQUEST_SECONDS = 0\n"
        "stop = signals.StopRequest('this step', main=True)\n"
        "def send():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not stop.asked: time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=send).start()\n"
        "lock = threading.Lock(); lock.acquire(); lock.acquire()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.split("\n\n")[-1] == "SIGTERM: ended at once; what is saved stays usable\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_step_is_finished_and_saved_and_the_status_says_resumable(tmp_path, name):
    command = train(tmp_path, "grpo", "--steps", "3")
    done = python("tests/killed.py", LINE, "2", *command, KILL_SIGNAL=name)
    assert done.returncode == RESUMABLE
    assert ours(done.stderr) == [
        "train.py: stopped after step 2, which is saved: the same command with --resume auto continues "
        f"{tmp_path}/run"
    ]
    assert steps(tmp_path) == [1, 2]
    done = python(*command)
    assert (
        done.returncode == 0
        and f"continues at step 2 from {tmp_path}/run/checkpoints/step_2\n" in done.stdout
    )
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "1"])
def test_ranks_stop_at_the_same_step(tmp_path, who):
    """Whether torchrun is asked, which forwards it, or one rank alone."""
    command = train(tmp_path, "grpo", "--steps", "50")
    place = LINE if who == "launcher" else "thinkrl.sampler:Sampler.load_weights"
    done = torchrun(2, "tests/killed.py", place, "2", *command, KILL_SIGNAL="SIGTERM", KILL_WHO=who)
    [sentence] = ours(done.stderr)
    last = steps(tmp_path)[-1]
    assert f"stopped after step {last}, which is saved" in sentence and last < 50
    assert (tmp_path / "run" / "latest").read_text() == f"step_{last}\n"


@pytest.mark.slow
def test_a_start_without_a_checkpoint_says_so_and_keeps_what_was_written(tmp_path):
    command = train(tmp_path, "grpo", "--steps", "2")
    assert python("tests/killed.py", LINE, "1", *command).returncode == -signal.SIGKILL
    old = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = python(*command)
    assert done.returncode == 0 and "has no checkpoint yet: it starts over; " in done.stdout
    assert (tmp_path / "run" / "metrics.1.jsonl").read_text() == old and steps(tmp_path) == [1, 2]


@pytest.mark.slow
def test_a_signal_before_the_first_step(tmp_path):
    done = python(
        "tests/killed.py", "thinkrl.session:StopRequest", "1", *train(tmp_path, "grpo"), KILL_SIGNAL="SIGINT"
    )
    assert done.returncode == RESUMABLE and "stopped before the first step was taken" in ours(done.stderr)[0]


@pytest.mark.slow
def test_chunk_stops_between_items(tmp_path):
    command = ["chunk.py", "--limit", "6", "--items_per_batch", "2", "--rollouts", "1", "--max_tokens", "5"]
    command += ["--out", str(tmp_path)]
    done = python(
        "tests/killed.py", "thinkrl.longshort.thoughts:rollouts", "1", *command, KILL_SIGNAL="SIGTERM"
    )
    assert done.returncode == RESUMABLE, done.stderr
    assert len((tmp_path / "parts/rank_0.jsonl").read_text().splitlines()) == 2
    done = python(*command)
    assert done.returncode == 0 and json.loads((tmp_path / "summary.json").read_text())["rows"] == 6
