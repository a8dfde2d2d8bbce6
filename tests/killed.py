"""Runs a program of the repository that dies at a known place, whatever the load of the machine:

python tests/killed.py thinkrl.checkpoint:point_latest 2 train.py grpo …

The process sends itself SIGKILL when the named function has returned for the second time.
"""

import importlib
import operator
import os
import runpy
import signal
import sys

place, times, program, *arguments = sys.argv[1:]
module, name = place.split(":")
*path, name = name.split(".")
holder = (
    operator.attrgetter(".".join(path))(importlib.import_module(module))
    if path
    else importlib.import_module(module)
)
function, calls = getattr(holder, name), 0


def deadly(*args, **kwargs):
    global calls
    result = function(*args, **kwargs)
    calls += 1
    if calls == int(times):
        os.kill(os.getpid(), signal.SIGKILL)
    return result


setattr(holder, name, deadly)
sys.argv = [program, *arguments]
runpy.run_path(program, run_name="__main__")
