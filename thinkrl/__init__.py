"""thinkrl: reinforcement learning of efficient reasoning, from scratch, to be read. Start with train.py."""

import importlib.util
import os
from pathlib import Path

__version__ = "0.2.0"

# The sampler's KV pool is freed for every backward: in fixed segments, whatever is allocated meanwhile would
# keep its memory from it for good. Read when torch first allocates, so this comes before torch.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what, where, and what instead. Entry points print it
    and exit 2.
    """


def require_own_kernels() -> None:
    """`kernels` is also the name of a package on PyPI that transformers looks for: refuse to run with the
    wrong one.
    """
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
