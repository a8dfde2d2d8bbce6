"""No GPU: Triton kernels run in the interpreter, which must be chosen before triton is imported."""

import getpass
import os
import random
import tempfile

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available() and "THINKRL_AOT" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    # tests that launch ranks set their own; many tiny ops gain nothing from two
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache does not tell them apart: code compiled for AVX-512 gives nan in an AVX2 process
    folder = f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

# A busy machine is no failure, and a run that is repeated draws the same examples.
settings.register_profile("thinkrl", deadline=None, derandomize=True)
settings.load_profile("thinkrl")


@pytest.fixture(scope="module")
def world():
    """A group of this process alone."""
    from thinkrl.distributed import start  # torch's threads and triton's interpreter are set first

    return start("cpu")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long tests begin first, so that no process of several is left with one at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_runtest_setup(item):
    """A test draws the same numbers alone, in another order, and in another process."""
    torch.manual_seed(0)
    random.seed(0)
