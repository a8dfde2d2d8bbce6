"""Run under torchrun by l2t/test_preset.py: each rank pays its share of the problems; rank 0 writes what
all of them paid.
"""

import sys

import torch

from thinkrl.arith import heldout
from thinkrl.config import parse
from thinkrl.distributed import gather, run_and_exit, start, stop
from thinkrl.l2t.preset import L2T
from thinkrl.run.metrics import Tally

PROBLEMS = heldout()[40:240:100]  # one of two digits, one of three
SMALL = ["l2t", "--group_size", "4", "--problems_per_step", "2", "--max_tokens", "100"]


def main(out: str) -> None:
    world = start("cpu")
    preset, tally = L2T(parse(SMALL), world), Tally()
    trajectories = preset.rollout([PROBLEMS[i] for i in world.share(len(PROBLEMS))], 0, tally)
    preset.reward(trajectories, 0, tally)
    paid = {
        name: sum(gather([getattr(t, name) for t in trajectories]), []) for name in ("compression", "penalty")
    }
    if world.main:
        torch.save(paid, out)
    stop()


if __name__ == "__main__":
    run_and_exit(main, sys.argv[1])
