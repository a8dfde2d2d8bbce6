"""Runs a program of the repository that is killed at a known place, whatever the load of the machine:

python tests/killed.py thinkrl.resume:point_latest 2 train.py grpo …

When the named function has returned for the second time, SIGKILL is sent. The environment chooses otherwise:

KILL_SIGNAL    SIGTERM, … | STALL: none, the process sleeps for ever
KILL_MARK      a file that is made before
KILL_WHO       all: every rank that comes there, itself | a rank's number: this one, itself | launcher: rank
               0, torchrun
"""

import importlib
import operator
import os
import runpy
import signal
import sys
import time

place, times, program, *arguments = sys.argv[1:]
wanted = os.environ.get("KILL_SIGNAL", "SIGKILL")
who, rank = os.environ.get("KILL_WHO", "all"), os.environ.get("RANK", "0")
module, name = place.split(":")
*path, name = name.split(".")
holder = importlib.import_module(module)
holder = operator.attrgetter(".".join(path))(holder) if path else holder
function, calls = getattr(holder, name), 0


def strike(process: int) -> None:
    if "KILL_MARK" in os.environ:
        open(os.environ["KILL_MARK"], "w").close()
    while wanted == "STALL":
        time.sleep(1)
    os.kill(process, signal.Signals[wanted])


def deadly(*args, **kwargs):
    global calls
    result = function(*args, **kwargs)
    calls += 1
    if calls == int(times):
        if who in ("all", rank):
            strike(os.getpid())
        elif who == "launcher" and rank == "0":
            strike(os.getppid())
    return result


setattr(holder, name, deadly)
sys.argv = [program, *arguments]
runpy.run_path(program, run_name="__main__")
