"""Console commands thinkrl-train, thinkrl-sample and thinkrl-chunk, which run in any folder.

    torchrun --nproc_per_node=8 --no-python thinkrl-train l2t --model DIR --data FILE

Outside the repository `python -m chunk` would start a module of Python's own (until 3.12).
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # folder of train.py


def train() -> None:
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def sample() -> None:
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


def chunk() -> None:
    runpy.run_path(str(ROOT / "chunk.py"), run_name="__main__")
