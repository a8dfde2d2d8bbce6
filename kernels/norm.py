"""Residual addition and RMSNorm in one kernel, for decoding.

    s = x + delta        y = s / √(mean(s²) + eps) · weight

Letters: T rows, D width.

The number of kernels bounds decoding, not their arithmetic: this is one launch instead of two or three. Bytes
of a row in bf16: 4 D read, 4 D written. Sums in fp32; s is rounded to x's dtype before the norm, as in
separate operations. No gradient: the trainer compiles its blocks instead.

    python -m kernels.norm          the benchmark
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm_ref(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Specification of `add_rms_norm`."""
    s = x if delta is None else x + delta
    return s, F.rms_norm(s, weight.shape, weight, eps)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,  # [T, D]
    delta_ptr,  # [T, D]; not read unless ADD
    weight_ptr,  # [D]
    sum_ptr,  # [T, D]; not written unless ADD
    y_ptr,  # [T, D]
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row."""
    row = tl.program_id(0).to(tl.int64) * D
    at = tl.arange(0, BLOCK)
    mask = at < D
    s = tl.load(x_ptr + row + at, mask=mask, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
        s = (s.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + at, s, mask=mask)
    s = s.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
    y = s * scale * tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_rms_norm_triton(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in Triton: one program per row."""
    rows, width = x.shape
    s, y = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    arrays = (x, x if delta is None else delta, weight, s, y)
    _add_rms_norm_kernel[(rows,)](*arrays, eps, width, delta is not None, block, num_warps=4)
    return s, y


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum. Not differentiable on CUDA.

    x        [T, D], contiguous; delta likewise, of the same dtype, or None for 0
    weight   [D]
    returns  x + delta (x itself where delta is None) and its RMSNorm, both [T, D] in x's dtype
    """
    run = add_rms_norm_triton if x.is_cuda and x.dtype != torch.float64 else add_rms_norm_ref
    return run(x, delta, weight, eps)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare

    for rows, width in ((256, 896), (256, 3584)) if DEVICE == "cuda" else ((64, 128), (64, 640)):
        shape: dict[str, Any] = dict(dtype=DTYPE, device=DEVICE)
        inputs = (*(torch.randn(rows, width, **shape) for _ in range(2)), torch.randn(width, **shape), 1e-6)
        ops = dict(ref=add_rms_norm_ref, compiled_ref=torch.compile(add_rms_norm_ref))
        if DEVICE == "cuda":
            ops["triton"] = add_rms_norm_triton
        runs = {name: lambda op=op, inputs=inputs: op(*inputs) for name, op in ops.items()}
        traffic = 4 * rows * width * DTYPE.itemsize
        compare(f"addition and norm, {rows} x {width}", 6 * rows * width, traffic, **runs)


if __name__ == "__main__":
    _benchmark()
