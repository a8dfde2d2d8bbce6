"""Timing of the kernels' benchmarks: candidates in turn, in one process, against this machine's roofline.

Inputs are random, because a product of zeros is faster. A candidate that cannot run here is reported and
skipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch
import triton.testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def milliseconds(*candidates: Callable[[], object], rounds: int = 10, device: str = DEVICE) -> list[float]:
    """Median time of each candidate, in ms. On a CPU they take turns, so other load affects all alike."""
    if device == "cuda":
        return [triton.testing.do_bench(candidate, return_mode="median") for candidate in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds + 1):
        for candidate, record in zip(candidates, times):
            start = time.perf_counter()
            candidate()
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record[1:]) for record in times]  # the first round warms up


@lru_cache
def ceilings(device: str = DEVICE) -> tuple[float, float]:
    """Measure FLOP/s of a large product, in bf16 on CUDA and fp32 on a CPU, and bytes/s of a large copy."""
    n, size, dtype = (8192, 1 << 29, torch.bfloat16) if device == "cuda" else (1024, 1 << 24, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(size, device=device) for _ in range(2))
    product, copy = milliseconds(lambda: a @ b, lambda: target.copy_(source), device=device)
    return 2 * n**3 / product * 1e3, 8 * size / copy * 1e3


def compare(title: str, flop: float, traffic: float, **candidates: Callable[[], object]) -> None:
    """Print each candidate's time, its speed against the first, and its share of the roofline.

    flop, traffic   FLOP and bytes that the operation needs at least; the roofline is the larger of their
                    times at the measured `ceilings`
    """
    product, copy = ceilings()
    floor = 1e3 * max(flop / product, traffic / copy)
    print(f"{title}: {flop:.3g} FLOP, {traffic:.3g} bytes, not under {floor:.3g} ms")
    runnable = {}
    for name, candidate in candidates.items():
        try:
            candidate()
            runnable[name] = candidate
        # no C++ compiler for torch.compile, too little memory for a naive candidate
        except Exception as error:
            print(f"  {name:<24} not run: {type(error).__name__}")
    times = milliseconds(*runnable.values())
    for name, t in zip(runnable, times):
        print(f"  {name:<24} {t:10.3f} ms   {times[0] / t:6.2f}x   {floor / t:6.1%} of the roofline")


def with_backward(op: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """Make a function that runs forward, and backward from op's first output to its inputs."""
    leaves = [x for x in inputs if x.requires_grad]

    def run():
        output = op(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(output.sum(), leaves)

    return run
