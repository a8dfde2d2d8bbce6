"""Q/K norm, rotary embedding and K/V store in one kernel, between decoding's qkv product and attention.

    q, k = norm(q), norm(k)                          if the model has these norms (Qwen3)
    (x_i, x_{i+Dh/2}) rotated by position · f_i      q and k, every pair of every head
    k, v go to slot position mod page_size of page page_table[row, position // page_size]

Letters: B rows, one token each; H query heads, Hkv key heads, Dh head width.

One launch instead of PyTorch's seven (nine with the norms). Every number is read once and written once.
Angles, sines and cosines are computed in fp32 where they are used, which is cheaper than reading a table.

    python -m kernels.rotary        the benchmark
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@dataclass
class Places:
    """Positions and pages of a decoding step's tokens, the same for every layer."""

    positions: Tensor  # [B] int64, each token's position in its sequence
    page_table: Tensor  # [B, P] int32; two rows must not write to one slot, except the same values
    frequencies: Tensor  # [Dh / 2] fp32, angle per position
    page_size: int

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of every angle, [B, 1, Dh] fp32. The Triton kernel computes its own."""
        angle = (self.positions.float()[:, None] * self.frequencies)[:, None]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    @cached_property
    def slots(self) -> Tensor:
        """Slot page * page_size + offset of each token's K/V, [B] int64."""
        page = self.page_table.gather(1, (self.positions // self.page_size)[:, None])[:, 0].long()
        return page * self.page_size + self.positions % self.page_size


def rotate_and_store_ref(
    qkv: Tensor,
    places: Places,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Specification of `rotate_and_store`."""
    kv_heads, width = k_pages.shape[2:]
    heads = qkv.shape[1] // width - 2 * kv_heads
    qk, v = qkv.unflatten(-1, (-1, width)).split([heads + kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        q, k = qk.split([heads, kv_heads], dim=1)
        qk = torch.cat(
            [F.rms_norm(q, (width,), q_weight, eps), F.rms_norm(k, (width,), k_weight, eps)], dim=1
        )
    cos, sin = places.rotation
    qk = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin).to(qkv.dtype)
    q, k = qk.split([heads, kv_heads], dim=1)
    k_pages.view(-1, kv_heads, width).index_copy_(0, places.slots, k)
    v_pages.view(-1, kv_heads, width).index_copy_(0, places.slots, v)
    return q


@triton.jit(do_not_specialize=["table_stride"])
def _rotate_and_store_kernel(
    qkv_ptr,  # [B, H + 2 HKV, D]
    positions_ptr,  # [B] int64
    table_ptr,  # [B, P] int32
    frequency_ptr,  # [D / 2] fp32
    q_weight_ptr,  # [D]; not read unless NORM
    k_weight_ptr,  # [D]; not read unless NORM
    k_ptr,  # [num_pages, PAGE, HKV, D]
    v_ptr,  # [num_pages, PAGE, HKV, D]
    q_ptr,  # [B, H, D]
    table_stride,
    eps,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one head of one row, as its two halves a and b."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    at = tl.arange(0, BLOCK)
    mask = at < HALF
    source = qkv_ptr + (row * (H + 2 * HKV) + head) * D + at
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + row)
    if head < H + HKV:
        if NORM:
            scale = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            weight = q_weight_ptr + at
            if head >= H:
                weight = k_weight_ptr + at
            a = a * scale * tl.load(weight, mask=mask, other=0.0).to(tl.float32)
            b = b * scale * tl.load(weight + HALF, mask=mask, other=0.0).to(tl.float32)
        angle = position.to(tl.float32) * tl.load(frequency_ptr + at, mask=mask, other=0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        a, b = a * cos - b * sin, b * cos + a * sin
    if head < H:
        target = q_ptr + (row * H + head) * D + at
    else:
        page = tl.load(table_ptr + row * table_stride + position // PAGE).to(tl.int64)
        slot = page * PAGE + position % PAGE
        target = k_ptr + (slot * HKV + head - H) * D + at
        if head >= H + HKV:
            target = v_ptr + (slot * HKV + head - H - HKV) * D + at
    tl.store(target, a.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, b.to(q_ptr.dtype.element_ty), mask=mask)


def rotate_and_store_triton(
    qkv: Tensor,
    places: Places,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rotate_and_store` in Triton: one program per head and row."""
    kv_heads, width = k_pages.shape[2:]
    rows, all_heads = qkv.shape[0], qkv.shape[1] // width
    heads = all_heads - 2 * kv_heads
    q = torch.empty(rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    norm = q_weight is not None
    weights = (q_weight, k_weight) if norm else (qkv, qkv)
    table = places.page_table
    arrays = (qkv, places.positions, table, places.frequencies, *weights, k_pages, v_pages, q)
    shape = (heads, kv_heads, width, places.page_size, norm, triton.next_power_of_2(width // 2))
    _rotate_and_store_kernel[(rows, all_heads)](*arrays, table.stride(0), eps, *shape, num_warps=1)
    return q


def rotate_and_store(
    qkv: Tensor,
    places: Places,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate each row's q and k heads to its position and store k and v in its pages. Not differentiable.

    qkv          [B, (H + 2 Hkv) Dh], contiguous: q heads, k heads, v heads
    k_pages      [num_pages, page_size, Hkv, Dh], v_pages likewise, contiguous: written
    q_weight, k_weight   [Dh], of the RMSNorm over each head; both or neither
    returns      q [B, H, Dh]
    """
    run = rotate_and_store_triton if qkv.is_cuda and qkv.dtype != torch.float64 else rotate_and_store_ref
    return run(qkv, places, k_pages, v_pages, q_weight, k_weight, eps)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare

    rows, heads, kv_heads, width = (256, 28, 4, 128) if DEVICE == "cuda" else (64, 10, 2, 64)
    shape: dict[str, Any] = dict(dtype=DTYPE, device=DEVICE)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width, **shape)
    positions = torch.arange(rows, device=DEVICE) * 4 % 1024
    table = torch.randperm(rows * 64, device=DEVICE).view(rows, 64).int()
    frequencies = torch.rand(width // 2, device=DEVICE)
    k_pages, v_pages = (torch.zeros(rows * 64, 16, kv_heads, width, **shape) for _ in range(2))
    inputs = (qkv, Places(positions, table, frequencies, 16), k_pages, v_pages)
    ops = dict(ref=rotate_and_store_ref)
    if DEVICE == "cuda":
        ops["triton"] = rotate_and_store_triton
    runs = {name: lambda op=op: op(*inputs) for name, op in ops.items()}
    compare(f"rotation and store, {rows} rows", 3 * qkv.numel(), 2 * qkv.nbytes, **runs)


if __name__ == "__main__":
    _benchmark()
