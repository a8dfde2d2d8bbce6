"""A rank that stalls or is gone ends the job and is named; one that waits for others does not."""

import os
import signal
import socket
import sys

import pytest

from helpers import python, torchrun
from thinkrl.distributed import start
from thinkrl.run import watch

HALF_A_MINUTE = "0.5"  # no step of SMALL takes as long, not on a machine with other work either
SMALL = "grpo --steps 50 --problems_per_step 2 --group_size 2 --max_tokens 10 --eval_problems 0 --name run"


def train(tmp_path, place: str, times: int, timeout: str, *options: str, **environment: str) -> list[str]:
    """What a run of two ranks says that is struck there."""
    command = ["train.py", *SMALL.split(), "--runs_dir", str(tmp_path), "--timeout", timeout, *options]
    done = torchrun(2, "tests/killed.py", place, str(times), *command, **environment)
    assert done.returncode != 0 and 'train.py", line' not in done.stderr, done.stderr[-3000:]
    return [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]


@pytest.mark.slow
def test_a_rank_that_stalls_is_named(tmp_path):
    """The second rank sleeps in the third step's rollout, and the first waits for it."""
    [said] = train(tmp_path, "thinkrl.rollout:rollout", 3, HALF_A_MINUTE, KILL_SIGNAL="STALL", KILL_WHO="1")
    assert said.startswith(
        f"train.py: rank 1 on {socket.gethostname()} (step 3, rollout, tests/killed.py:"
    ), said
    assert ") has done nothing for 3" in said and said.endswith(" s (--timeout)")


@pytest.mark.slow
def test_a_stall_of_the_thread_that_saves_is_named(tmp_path):
    """The second rank's, at the first checkpoint; the main thread takes a step and waits before the next."""
    environment = {"KILL_SIGNAL": "STALL", "KILL_WHO": "1"}
    [said] = train(tmp_path, "thinkrl.resume:save_step", 1, HALF_A_MINUTE, "--save_every", "1", **environment)
    assert said.startswith(f"train.py: rank 1 on {socket.gethostname()} (step 2, save, tests/killed.py:"), (
        said
    )


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["0", "1"])
def test_a_rank_that_dies_is_named(tmp_path, lost):
    """At once: its peer's collective fails. Here in the update."""
    said = train(tmp_path, "thinkrl.update:token_logprobs", 3, "10", KILL_WHO=lost)[-1]
    assert said.startswith(
        f"train.py: rank {lost} on {socket.gethostname()} (step 3, update): the process has ended; "
    ), said


@pytest.mark.slow
def test_a_frozen_process_is_named(tmp_path):
    """Nothing of it can speak, as if its machine had left the network."""
    place = "thinkrl.sampler:Sampler.load_weights"
    said = train(tmp_path, place, 2, HALF_A_MINUTE, KILL_SIGNAL="SIGSTOP", KILL_WHO="1")[-1]
    assert f"rank 1 on {socket.gethostname()} (step 2, weight sync) has not been heard of for 3" in said


WAITING = """
import pathlib, sys, time
from thinkrl.distributed import global_max, start, stop
from thinkrl.run import watch
world = start("cpu")
watch.begin("waiting", 0.25, world)
until = time.monotonic() + 25
while world.rank == int(sys.argv[1]) and time.monotonic() < until:
    watch.alive()
    time.sleep(0.1)
global_max(0.0)
watch.end()
stop()
pathlib.Path(sys.argv[2], str(world.rank)).write_text("finished")
"""


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["0", "1"])
def test_rollouts_of_very_different_lengths_do_not_trip_it(tmp_path, busy):
    """One rank works for 25 seconds, the other waits for it, and the limit is 15."""
    (tmp_path / "waiting.py").write_text(WAITING)
    done = torchrun(2, str(tmp_path / "waiting.py"), busy, str(tmp_path))
    finished = [rank for rank in range(2) if (tmp_path / str(rank)).exists()]
    assert done.returncode == 0 and finished == [0, 1], done.stderr


def test_who_waits():
    """A frame of torch.distributed is one that waits."""
    import torch.distributed as dist

    start("cpu")
    frames = []

    class Probe:
        def __reduce__(self):
            frames.append(sys._getframe().f_back)
            return str, ()

    dist.broadcast_object_list([Probe()], src=0)
    assert any(watch.waits(frame) for frame in [frames[0], frames[0].f_back, frames[0].f_back.f_back])
    assert not watch.waits(sys._getframe()) and watch.line(sys._getframe()).startswith(
        "tests/run/test_watch.py:"
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "program", ["train.py", pytest.param("chunk.py", marks=SLOW), pytest.param("sample.py", marks=SLOW)]
)
def test_a_worker_whose_launcher_is_gone_ends_at_once(tmp_path, program):
    """Where torchrun's store was, nobody listens: it was killed while its workers started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"train.py": ["grpo"], "chunk.py": [], "sample.py": ["--prompt", "1+1?"]}[program]
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = python(program, *options, TORCHELASTIC_RUN_ID="none", **ranks, **there)
    assert done.returncode == 2 and done.stderr.startswith(
        f"{program}: torchrun is gone: nobody listens on 127.0.0.1:"
    )


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.py", "chunk.py", "sample.py"])
def test_a_launcher_that_is_killed_before_torch_is_imported(program, tmp_path):
    """Its workers end, or `torchrun` would not return: they hold its output open."""
    options = {"train.py": ["grpo"], "chunk.py": ["--out", str(tmp_path)], "sample.py": ["--prompt", "1+1?"]}[
        program
    ]
    done = torchrun(
        2,
        "tests/killed.py",
        "thinkrl.launcher:end_with_launcher",
        "1",
        program,
        *options,
        KILL_WHO="launcher",
    )
    assert (
        done.returncode == -signal.SIGKILL and "Traceback" not in done.stderr and os.listdir(tmp_path) == []
    )
