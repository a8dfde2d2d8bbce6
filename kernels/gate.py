"""SwiGLU gate of the MLP in one kernel, for decoding.

    y = silu(gate) · up        silu(z) = z / (1 + e^-z)        gate, up: the two halves of a row

Letters: T rows, F width of the MLP.

One launch where PyTorch takes two, and 6 F bytes of a row in bf16 instead of 10 F: silu(gate) is neither
written nor read. Arithmetic in fp32, rounded once. No gradient: the trainer compiles its blocks instead.

    python -m kernels.gate          the benchmark
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """Specification of `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # [T, 2 WIDTH]
    y_ptr,  # [T, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one block of one row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    gate = tl.load(gate_up_ptr + 2 * row + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """`silu_mul` in Triton."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, y, width, block, num_warps=4)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) · up of contiguous rows [T, 2 F], gate first -> [T, F]. No gradient on CUDA."""
    fits = gate_up.is_cuda and gate_up.dtype != torch.float64
    return (silu_mul_triton if fits else silu_mul_ref)(gate_up)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare

    for rows, width in ((256, 4864), (256, 18_944)) if DEVICE == "cuda" else ((64, 384), (64, 1728)):
        gate_up = torch.randn(rows, 2 * width, dtype=DTYPE, device=DEVICE)
        ops = dict(ref=silu_mul_ref, compiled_ref=torch.compile(silu_mul_ref))
        if DEVICE == "cuda":
            ops["triton"] = silu_mul_triton
        runs = {name: lambda op=op, gate_up=gate_up: op(gate_up) for name, op in ops.items()}
        compare(f"gate, {rows} x {width}", 5 * rows * width, 1.5 * gate_up.nbytes, **runs)


if __name__ == "__main__":
    _benchmark()
