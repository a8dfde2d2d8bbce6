"""thinkrl: readable reinforcement learning of efficient reasoning. Start with train.py."""

import importlib.util
import os
from pathlib import Path

__version__ = "0.2.0"

# The sampler's KV pool is freed for every backward. With the allocator's fixed segments, later allocations
# would block its memory; expandable segments avoid that. Read when torch first allocates, so set before
# torch.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class UserError(ValueError):
    """Mistake of the user: one sentence that says what, where, and what instead. Programs print it and exit
    2.
    """


def require_own_kernels() -> None:
    """Raise UserError if Python finds another package `kernels`; one of that name is on PyPI."""
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    ours = Path(__file__).resolve().parent.parent / "kernels"
    if found != ours:
        raise UserError(
            f"the package 'kernels' that Python finds is {found or 'missing'}, not thinkrl's own at {ours}: "
            "pip uninstall kernels, then pip install -e . in the repository"
        )


def require_extra(module: str, extra: str, purpose: object) -> None:
    """Raise UserError, naming the extra, if a module that `purpose` needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose}: this needs {module}: pip install 'thinkrl[{extra}]'")
