"""thinkrl: reinforcement learning of efficient reasoning, from scratch, to be read. Start with train.py."""

import importlib.util
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what, where, and what instead. Entry points print it and exit 2."""


def require_own_kernels() -> None:
    """`kernels` is also the name of a package on PyPI that transformers looks for: refuse to run with the wrong one."""
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    ours = Path(__file__).resolve().parent.parent / "kernels"
    if found != ours:
        raise UserError(
            f"the package 'kernels' that Python finds is {found or 'missing'}, not thinkrl's own at {ours}: "
            "pip uninstall kernels, then pip install -e . in the repository"
        )
