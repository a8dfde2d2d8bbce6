"""A pretended CUDA device, for what can be known about the CUDA path without one.

fake_cuda       inside it, tensors on the device CUDA have shapes and no data. PyTorch itself refuses for
                them what a CUDA device refuses (tensors of two devices in one operation), and whatever makes
                the host wait for a number from the device (.item(), .tolist(), nonzero) raises
Launches        counts, inside fake_cuda, the kernels that are launched and the copies between devices
Graph, record   stand for torch.cuda.CUDAGraph and torch.cuda.graph on CPU tensors: every operation is
                recorded with the tensors and numbers it was given, and replayed on exactly these
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import GridExecutor

# a build of torch without CUDA has no tensors of that device; these say that they are
CUDA = torch.device("meta")


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    FakeTensor.is_cuda = property(lambda x: x.device.type == CUDA.type)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        del FakeTensor.is_cuda


def tensors_in(*trees) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, torch.Tensor)]


def shares_memory(out: torch.Tensor, inputs: list[torch.Tensor]) -> bool:
    return any(out.untyped_storage()._cdata == x.untyped_storage()._cdata for x in inputs)


class Launches(TorchDispatchMode):
    """`with Launches() as seen: …` leaves the names and numbers of launches in `seen.count`.

    An operation is one launch unless its result is a view or unwritten memory. Interpreted Triton kernels
    count, and are not run. A copy between devices is a launch named "copy".
    """

    def __enter__(self) -> Launches:
        self.count: Counter[str] = Counter()
        self.launch, seen = GridExecutor.__call__, self

        def launch(executor: GridExecutor, *args, **kwargs) -> None:
            for x in tensors_in(args):
                assert x.is_cuda, f"{executor.fn.__name__} is given a tensor of the {x.device}"
            inspect.signature(executor.fn).bind(
                *args, **{k: v for k, v in kwargs.items() if k not in ("num_warps", "num_stages")}
            )
            seen.count[executor.fn.__name__] += 1

        GridExecutor.__call__ = launch
        return super().__enter__()

    def __exit__(self, *error) -> None:
        GridExecutor.__call__ = self.launch
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, inputs = func.overloadpacket.__name__, tensors_in(args, kwargs)
        results = tensors_in(out)
        if len({x.device.type for x in [*inputs, *results] if x.ndim}) > 1:
            self.count["copy"] += 1
        elif any(x.is_cuda for x in (inputs if func._schema.is_mutable else results)):
            view = not func._schema.is_mutable and shares_memory(results[0], inputs)
            if not (view or name.startswith(("empty", "new_empty", "detach"))):
                self.count[name] += 1
        return out

    @property
    def total(self) -> int:
        return self.count.total()


class Graph:
    """What a recording holds: operations with their arguments and results."""

    recording: Graph | None = None

    def __init__(self):
        self.operations = []

    def replay(self) -> None:
        for run, args, kwargs, results in self.operations:
            for old, new in zip(results, tensors_in(run(*args, **kwargs))):
                if old is not new:
                    old.copy_(new)


class record(TorchDispatchMode):
    """`with record(graph): …` fills the graph. What makes the host wait raises, as in a capture."""

    def __init__(self, graph: Graph, pool=None, capture_error_mode: str = "global"):
        super().__init__()
        self.graph = graph

    def __enter__(self) -> record:
        self.launch, graph = GridExecutor.__call__, self.graph

        def launch(executor: GridExecutor, *args, **kwargs) -> None:
            with _disable_current_modes():
                self.launch(executor, *args, **kwargs)
            graph.operations.append((self.launch, (executor, *args), kwargs, []))

        GridExecutor.__call__ = launch
        return super().__enter__()

    def __exit__(self, *error) -> None:
        GridExecutor.__call__ = self.launch
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} during a recording"
        out = func(*args, **kwargs)
        results = tensors_in(out)
        mutable = func._schema.is_mutable
        if mutable or not (results and shares_memory(results[0], tensors_in(args, kwargs))):
            if not name.startswith("empty"):
                self.graph.operations.append((func, args, kwargs, [] if mutable else results))
        return out


class FusedNorm(torch.autograd.Function):
    """What the norm of CUDA keeps for its backward, which elsewhere is made of several operations."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.zeros_like(x)  # one launch

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.empty_like(weight)  # another
