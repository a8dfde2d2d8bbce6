"""Runs train.py in this process and watches it: a line "step RSS" of resident bytes behind every step, and
the page pool, which must be whole when a rollout has ended.

python tests/embedded_run.py grpo --steps 500 …
"""

import gc
import os
import sys

import train
from thinkrl.config import parse
from thinkrl.sampler import Sampler
from thinkrl.session import Session

end_step, release_pool = Session.end_step, Sampler.release_pool


def watched_end(self, step, *arguments) -> None:
    end_step(self, step, *arguments)
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    print("RSS", step + 1, pages * os.sysconf("SC_PAGE_SIZE"), flush=True)


def watched_release(self) -> None:
    pool = self.pool
    free, whole = pool.free_pages, pool.num_pages
    assert free == whole, f"{whole - free} of {whole} pages are not free after a rollout"
    print("pool whole", flush=True)
    release_pool(self)


Session.end_step, Sampler.release_pool = watched_end, watched_release
train.main(parse(sys.argv[1:]))
