"""Attention over packed rows (training, prefill) and over pages of keys and values (decoding, probes).

    o_i = Σ_{j<=i} p_ij v_j        p_i = softmax_j(q_i · k_j / √Dh)        i and j in the same sequence

`packed_attention`: S sequences are concatenated in one row of T tokens; sequence s is tokens cu_seqlens[s] to
cu_seqlens[s+1]. `paged_attention`: keys and values are in pages of a pool, those of token j of sequence s in
slot j mod page_size of page page_table[s, j // page_size]; the queries are the last tokens of each sequence.
In both, query head h reads key head h // (H / Hkv), for any ratio.

Letters: T tokens (of the row; queries), S sequences, H query heads, Hkv key heads, Dh head width, P pages of
a sequence, L the longest context.

Costs of one head of one sequence of n tokens. Naive: two products of 2 n² Dh FLOP, half of it masked, and 4
n² bytes of scores, written and read three times. Fused: the unmasked half, 2.5 times that in the backward,
and q, k, v and o read or written once, 8 n Dh bytes in bf16. Decoding reads 4 Hkv Dh bytes of bf16 keys and
values per token of context and does 4 H Dh FLOP with them, H / Hkv FLOP per byte, so it is bound by memory
bandwidth. Gathering the pages into a padded block first would move the bytes three times.

Results are bitwise reproducible: no atomics, and tile sizes from a fixed table.

    python -m kernels.attention     the benchmark
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
# torch 2.11 shares key heads by default and has no such argument
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)

# in the interpreter, tl.dot multiplies bf16 bit patterns: upcast first
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens of context per program in decoding. It is a fixed size, not a fixed number of parts, so one long row
# does not delay a batch, and a row's sums do not depend on the other rows. 1,024 tokens are 16 tiles of keys.
SPLIT = 1024
LOG2E = tl.constexpr(1.4426950408889634)


def packed_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Specification of `packed_attention`: one sequence at a time, with its whole matrix of scores."""
    return torch.cat([_causal_ref(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(cu_seqlens.tolist())])


def _causal_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [N, H, Dh], the last N of L tokens, to k, v [L, Hkv, Dh] -> [N, H, Dh]."""
    (n, heads, width), length = q.shape, len(k)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * width**-0.5
    future = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def paged_attention_ref(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Specification of `paged_attention`: one sequence at a time, its pages concatenated."""
    ends = range(len(lengths) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for (a, b), length, pages in zip(pairwise(ends), lengths.tolist(), page_table):
        k, v = (x[pages].flatten(0, 1)[:length] for x in (k_pages, v_pages))
        outputs.append(_causal_ref(q[a:b], k, v))
    return torch.cat(outputs)


@lru_cache(maxsize=8)
def _blocks(cu_seqlens: tuple[int, ...]) -> tuple[list[tuple[int, int]], Tensor, Tensor, Tensor]:
    """Group sequences of similar length into blocks of shapes (S_b, L_b), with maps between slots and row.

    Returns the shapes, the token [slots] in each slot, the slot [T] of each token, and the padding slots. A
    block ends where a sequence is shorter than 3/4 of the block's longest, so padding is less than a quarter.
    Slots after the end of a sequence repeat its last token; causality hides them from all real queries.
    Cached, because every layer needs the same result.
    """
    shapes: list[tuple[int, int]] = []
    tokens, padding, slots = [], [], torch.empty(cu_seqlens[-1], dtype=torch.int64)
    slot = 0
    for start, end in sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1]):
        n, longest = shapes[-1] if shapes and end - start >= 0.75 * shapes[-1][1] else (0, end - start)
        shapes[len(shapes) - (n > 0) :] = [(n + 1, longest)]
        tokens.append(torch.arange(start, start + longest).clamp_(max=end - 1))
        slots[start:end] = torch.arange(slot, slot + end - start)
        padding.append(torch.arange(slot + end - start, slot + longest))
        slot += longest
    return shapes, torch.cat(tokens), slots, torch.cat(padding)


class _Pad(torch.autograd.Function):
    """Gather of a row into blocks. The backward gathers back and ignores padding slots."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.slots), None, None


class _Unpad(torch.autograd.Function):
    """Gather of blocks into a row. The backward gathers into blocks, with zeros in padding slots."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, slots: Tensor, padding: Tensor) -> Tensor:
        ctx.tokens, ctx.padding = tokens, padding
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.tokens).index_fill_(0, ctx.padding, 0.0), None, None, None


def packed_attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`packed_attention` in PyTorch ops: gather blocks of similar length, SDPA on each, gather the row."""
    shapes, *maps = _blocks(tuple(cu_seqlens.tolist()))
    tokens, slots, padding = (index.to(q.device) for index in maps)
    sizes = [n * longest for n, longest in shapes]
    q, k, v = (_Pad.apply(x, tokens, slots).split(sizes) for x in (q, k, v))
    outputs = []
    for shape, *block in zip(shapes, q, k, v):
        qb, kb, vb = (x.unflatten(0, shape).transpose(1, 2) for x in block)  # [S_b, heads, L_b, Dh]
        output = F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), tokens, slots, padding)


def paged_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in PyTorch ops, all sequences at once.

    Decoding is bound by memory traffic. Keys are gathered head by head into [S, Hkv, L, Dh], as fast as page
    by page and in bmm's layout. Values are not gathered: `embedding_bag` sums weighted rows directly from the
    pages.
    """
    page_size, kv_heads, width = k_pages.shape[1:]
    length = int(lengths.max())
    pages = -(-length // page_size)
    token = torch.arange(0, page_size * kv_heads, kv_heads, dtype=torch.int32, device=q.device)
    rows = (page_table[:, :pages, None] * (page_size * kv_heads) + token).flatten(1)[:, :length]
    dead = torch.arange(length, dtype=torch.int32, device=q.device) >= lengths[:, None]  # [S, L]
    # slots after the end read the first token, whose finite values get weight 0; a NaN would survive weight 0
    rows = torch.where(dead, rows[:, :1], rows)
    rows = rows[:, None] + torch.arange(kv_heads, dtype=torch.int32, device=q.device)[:, None]  # [S, Hkv, L]
    keys = k_pages.view(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)
    if cu_seqlens is None:
        return _decode_torch(q, keys, v_pages, rows, dead)
    values = v_pages.view(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)

    counts = cu_seqlens.diff()
    query = torch.arange(int(counts.max()), dtype=torch.int32, device=q.device)
    real = query < counts[:, None]  # [S, N]
    last = (lengths - counts)[:, None] + query  # each query's position: the last key it sees
    future = torch.arange(length, dtype=torch.int32, device=q.device) > last[..., None]
    at = (cu_seqlens[:-1, None] + query).clamp_(max=len(q) - 1)
    padded = q.index_select(0, at.flatten()).unflatten(0, at.shape)
    visible = ~(future | dead[:, None])[:, None]  # [S, 1, N, L]
    output = F.scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=visible, enable_gqa=q.shape[1] != kv_heads
    )
    return output.transpose(1, 2)[real]


def _decode_torch(q: Tensor, keys: Tensor, v_pages: Tensor, rows: Tensor, dead: Tensor) -> Tensor:
    """Attention of one query per sequence: q [S, H, Dh], keys [S, Hkv, L, Dh], rows [S, Hkv, L] of the
    values.
    """
    (sequences, heads, width), (_, kv_heads, length) = q.shape, rows.shape
    group = heads // kv_heads
    scores = torch.bmm((q * width**-0.5).view(-1, group, width), keys.flatten(0, 1).transpose(1, 2))
    weights = scores.view(sequences, heads, length).masked_fill_(dead[:, None], float("-inf")).softmax(-1)
    rows = rows[:, :, None].expand(-1, -1, group, -1).reshape(sequences * heads, length)
    bags = F.embedding_bag(
        rows, v_pages.view(-1, width), mode="sum", per_sample_weights=weights.flatten(0, 1)
    )
    return bags.view(q.shape)


@triton.jit
def _sequence_of(cu_ptr, S, block, BLOCK: tl.constexpr):
    """Find the sequence of a block of the row: the largest s with cu[s] // BLOCK + s <= block.

    Sequence s has at least ⌈n_s / BLOCK⌉ blocks, sometimes one more that is empty. The grid, T // BLOCK + S,
    is known without reading cu_seqlens back from the device.
    """
    low, high = 0, S
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _tile(ptr, rows, stride, dims, rows_end, D: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows of width D as a [len(rows), len(dims)] tile, zero outside."""
    mask = (rows[:, None] < rows_end) & (dims[None, :] < D)
    x = tl.load(ptr + rows[:, None].to(tl.int64) * stride + dims[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit(do_not_specialize=["S", "T"])
def _packed_forward_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, HKV, D]
    v_ptr,  # [T, HKV, D]
    o_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, base 2
    cu_ptr,  # [S+1] int32
    S,
    T,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one block of queries of one head against every block of keys up to its last query."""
    block, head = tl.program_id(0), tl.program_id(1)
    s = _sequence_of(cu_ptr, S, block, BLOCK_M)
    start, end = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    first = start + (block - (start // BLOCK_M + s)) * BLOCK_M
    if first >= end:
        return
    dims = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    kv_head = head // (H // HKV)
    q = _tile(q_ptr + head * D, rows, H * D, dims, end, D, UPCAST)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(start, tl.minimum(first + BLOCK_M, end), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
        v = _tile(v_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # rows after the end attend to all keys, so they stay finite; they are not stored
        scores = tl.where(cols[None, :] <= rows[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = m_new
    acc = acc / total[:, None]
    o = o_ptr + head * D + rows[:, None].to(tl.int64) * (H * D) + dims[None, :]
    tl.store(o, acc.to(o_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (dims[None, :] < D))
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, m + tl.log2(total), mask=rows < end)


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    o_ptr,  # [T, H, D]
    do_ptr,  # [T, H, D]
    delta_ptr,  # [H, T] fp32: Σ_d o do, which is Σ_j p_ij dp_ij
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    o = _tile(o_ptr + head * D, rows, H * D, dims, T, D, True)
    do = _tile(do_ptr + head * D, rows, H * D, dims, T, D, True)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit(do_not_specialize=["S", "T"])
def _packed_backward_kv_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, HKV, D]
    v_ptr,  # [T, HKV, D]
    do_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, base 2
    delta_ptr,  # [H, T] fp32
    dk_ptr,  # [T, HKV, D]
    dv_ptr,  # [T, HKV, D]
    cu_ptr,  # [S+1] int32
    S,
    T,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one block of keys of one key head for all query heads that share it, which needs no atomics."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    s = _sequence_of(cu_ptr, S, block, BLOCK_N)
    start, end = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    first = start + (block - (start // BLOCK_N + s)) * BLOCK_N
    if first >= end:
        return
    dims = tl.arange(0, BLOCK_D)
    cols = first + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
    v = _tile(v_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(H // HKV):
        head = kv_head * (H // HKV) + member
        stats = head.to(tl.int64) * T
        for r in range(first, end, BLOCK_M):
            rows = r + tl.arange(0, BLOCK_M)
            q = _tile(q_ptr + head * D, rows, H * D, dims, end, D, UPCAST)
            do = _tile(do_ptr + head * D, rows, H * D, dims, end, D, UPCAST)
            # +inf where there is no row: its p, and so every contribution, is exactly 0
            lse = tl.load(lse_ptr + stats + rows, mask=rows < end, other=float("inf"))
            delta = tl.load(delta_ptr + stats + rows, mask=rows < end, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [N, M]
            p = tl.where(cols[:, None] <= rows[None, :], tl.exp2(scores - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    out = kv_head * D + cols[:, None].to(tl.int64) * (HKV * D) + dims[None, :]
    mask = (cols[:, None] < end) & (dims[None, :] < D)
    tl.store(dk_ptr + out, (dk * (scale / LOG2E)).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "T"])
def _packed_backward_q_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, HKV, D]
    v_ptr,  # [T, HKV, D]
    do_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, base 2
    delta_ptr,  # [H, T] fp32
    dq_ptr,  # [T, H, D]
    cu_ptr,  # [S+1] int32
    S,
    T,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one block of queries of one head, over keys as in the forward, with p from lse."""
    block, head = tl.program_id(0), tl.program_id(1)
    s = _sequence_of(cu_ptr, S, block, BLOCK_M)
    start, end = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    first = start + (block - (start // BLOCK_M + s)) * BLOCK_M
    if first >= end:
        return
    dims = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    kv_head = head // (H // HKV)
    q = _tile(q_ptr + head * D, rows, H * D, dims, end, D, UPCAST)
    do = _tile(do_ptr + head * D, rows, H * D, dims, end, D, UPCAST)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < end, other=float("inf"))
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < end, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(start, tl.minimum(first + BLOCK_M, end), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
        v = _tile(v_ptr + kv_head * D, cols, HKV * D, dims, end, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(cols[None, :] <= rows[:, None], tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    out = dq_ptr + head * D + rows[:, None].to(tl.int64) * (H * D) + dims[None, :]
    mask = (rows[:, None] < end) & (dims[None, :] < D)
    tl.store(out, (dq * (scale / LOG2E)).to(dq_ptr.dtype.element_ty), mask=mask)


TILES = {  # BLOCK_M, BLOCK_N, num_warps, num_stages: 16 bits | fp32, without tensor cores
    "forward": ((128, 32, 8, 2), (16, 16, 4, 1)),
    "backward_kv": ((32, 64, 8, 2), (32, 32, 8, 1)),
    "backward_q": ((64, 64, 8, 2), (32, 32, 8, 1)),
    "decode": ((16, 64, 4, 3), (16, 32, 8, 1)),
    "extend": ((64, 32, 8, 2), (16, 32, 8, 1)),
}


def tiles(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options, from a fixed table so that the order of sums is always the same."""
    block_m, block_n, num_warps, num_stages = TILES[kernel][dtype == torch.float32]
    if INTERPRET:
        # small tests should have several tiles
        block_m, block_n = max(16, block_m // 4), max(16, block_n // 4)
    block_d = max(16, triton.next_power_of_2(width))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=num_warps, num_stages=num_stages)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        (tokens, heads, width), sequences = q.shape, len(cu_seqlens) - 1
        config = tiles("forward", width, q.dtype)
        o = torch.empty_like(q)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        shape = (sequences, tokens, LOG2E.value * width**-0.5, heads, k.shape[1], width)
        _packed_forward_kernel[tokens // config["BLOCK_M"] + sequences, heads](
            q, k, v, o, lse, cu_seqlens, *shape, UPCAST=INTERPRET, **config
        )
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.shape = shape
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        do = do.contiguous()
        (tokens, heads, width), kv_heads, sequences = q.shape, k.shape[1], len(cu_seqlens) - 1
        delta, dq, dk, dv = (torch.empty_like(x) for x in (lse, q, k, v))
        arrays = (q, k, v, do, lse, delta)
        config = tiles("backward_q", width, q.dtype)
        block = config["BLOCK_M"]
        _delta_kernel[triton.cdiv(tokens, block), heads](
            o, do, delta, tokens, heads, width, BLOCK_D=config["BLOCK_D"], BLOCK_M=block
        )
        _packed_backward_q_kernel[tokens // block + sequences, heads](
            *arrays, dq, cu_seqlens, *ctx.shape, UPCAST=INTERPRET, **config
        )
        config = tiles("backward_kv", width, q.dtype)
        _packed_backward_kv_kernel[tokens // config["BLOCK_N"] + sequences, kv_heads](
            *arrays, dk, dv, cu_seqlens, *ctx.shape, UPCAST=INTERPRET, **config
        )
        return dq, dk, dv, None


def packed_attention_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`packed_attention` in Triton, forward and backward, without scores in memory."""
    return _PackedAttention.apply(q, k, v, cu_seqlens)


def packed_attention_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`packed_attention` by the flash-attn package, in 16 bits."""
    v = v.contiguous()  # kept for the backward without the rest of its row
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, deterministic=True
    )


def packed_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`packed_attention` by torch's own FlashAttention 2, in 16 bits."""
    v = v.contiguous()  # kept for the backward without the rest of its row
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # newer versions of torch prefer cuDNN's
        # window right of a query is 0: causal
        o: Any = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **GROUPED
        )
    if o.grad_fn is not None and not torch.are_deterministic_algorithms_enabled():
        # its backward uses atomics unless torch's deterministic mode is on
        o.grad_fn.register_prehook(lambda _: torch.use_deterministic_algorithms(True))
        o.grad_fn.register_hook(lambda *_: torch.use_deterministic_algorithms(False))
    return o


@functools.cache
def _torch_has_flash(device: torch.device) -> bool:
    """Whether torch has FlashAttention 2 here: a CUDA build and compute capability 8 or higher."""
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor) -> Callable | None:
    """Find a flash attention for packed rows in 16 bits, or None."""
    if q.dtype == torch.float32 or q.shape[-1] % 8:
        return None
    if flash_attn_varlen_func is not None:
        return packed_attention_flash
    return packed_attention_varlen if _torch_has_flash(q.device) else None


@triton.jit(do_not_specialize=["S", "T", "table_stride"])
def _paged_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [num_pages, PAGE, HKV, D]
    v_ptr,  # [num_pages, PAGE, HKV, D]
    table_ptr,  # [S, P] int32
    lengths_ptr,  # [S] int32 or int64
    cu_ptr,  # [S+1] int32; not read when DECODE
    o_ptr,  # SPLIT = 0: [T, H, D]; else [⌈P PAGE / SPLIT⌉, T, H, D] fp32
    lse_ptr,  # [⌈P PAGE / SPLIT⌉, T, H] fp32, base 2; not written when SPLIT = 0
    S,
    T,
    table_stride,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,  # tokens of context per program, a multiple of BLOCK_N; 0: all of them
    DECODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a block of queries, with all query heads of one key head, against one part of the context.

    A tile's rows are (query, head of the group) pairs, BLOCK_M // G queries of G = H / HKV heads, so a key is
    read once for all of them. With one query, the other of the 16 rows that a tensor core needs are idle.
    """
    G: tl.constexpr = H // HKV
    QUERIES: tl.constexpr = BLOCK_M // G
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DECODE:
        s, start, count, local = block, block, 1, 0
    else:
        s = _sequence_of(cu_ptr, S, block, QUERIES)
        start = tl.load(cu_ptr + s)
        count = tl.load(cu_ptr + s + 1) - start
        local = (block - (start // QUERIES + s)) * QUERIES
        if local >= count:
            return
    length = tl.load(lengths_ptr + s).to(tl.int32)
    first, end = 0, tl.minimum(length, length - count + local + QUERIES)
    if SPLIT > 0:
        first = split * SPLIT
        end = tl.minimum(end, first + SPLIT)
        if first >= end:  # this row is shorter than the longest: it has fewer parts
            return
    row = tl.arange(0, BLOCK_M)
    query = local + row // G
    live = (row < QUERIES * G) & (query < count)
    position = length - count + query  # the last key that a row sees
    head = kv_head * G + row % G
    dims = tl.arange(0, BLOCK_D)
    place = (start + query).to(tl.int64) * H + head  # row of [T * H, D]
    q = tl.load(
        q_ptr + place[:, None] * D + dims[None, :], mask=live[:, None] & (dims[None, :] < D), other=0.0
    )
    if UPCAST:
        q = q.to(tl.float32)
    table_ptr += s.to(tl.int64) * table_stride
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(first, end, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + cols // PAGE, mask=cols < end, other=0)
        slot = (page.to(tl.int64) * PAGE + cols % PAGE) * HKV + kv_head  # row of [num_pages * PAGE * HKV, D]
        mask = (cols[:, None] < end) & (dims[None, :] < D)
        k = tl.load(k_ptr + slot[:, None] * D + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + slot[:, None] * D + dims[None, :], mask=mask, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # every row sees the first key of its part, so m is finite from here on
        scores = tl.where(cols[None, :] <= position[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = m_new
    acc = acc / total[:, None]
    if SPLIT > 0:
        place += split.to(tl.int64) * T * H
        tl.store(lse_ptr + place, m + tl.log2(total), mask=live)
    out = o_ptr + place[:, None] * D + dims[None, :]
    tl.store(out, acc.to(o_ptr.dtype.element_ty), mask=live[:, None] & (dims[None, :] < D))


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    partial_ptr,  # [parts, T, H, D] fp32
    lse_ptr,  # [parts, T, H] fp32, base 2
    lengths_ptr,  # [T] int32 or int64
    o_ptr,  # [T, H, D]
    rows,  # T * H
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine one head of one row: outputs of its parts, weighted by their shares of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.cdiv(tl.load(lengths_ptr + row // H).to(tl.int32), SPLIT)
    top = -3e38  # not -inf: the difference of two maxima must be a number
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(0, parts):
        lse = tl.load(lse_ptr + row)
        partial = tl.load(partial_ptr + row * D + dims, mask=dims < D, other=0.0)
        new = tl.maximum(top, lse)
        rescale, weight = tl.exp2(top - new), tl.exp2(lse - new)
        total = total * rescale + weight
        acc = acc * rescale + weight * partial
        top = new
        lse_ptr += rows
        partial_ptr += rows * D
    tl.store(o_ptr + row * D + dims, (acc / total).to(o_ptr.dtype.element_ty), mask=dims < D)


def paged_attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in Triton. No size is read back from the device, so a CUDA graph can record it.

    Decoding with tables of more than SPLIT tokens needs a second kernel, which combines the parts. A block of
    several queries is not split, because it is enough work for a program.
    """
    q, decode = q.contiguous(), cu_seqlens is None
    (tokens, heads, width), (sequences, pages) = q.shape, page_table.shape
    page_size, kv_heads = k_pages.shape[1:3]
    config = tiles("decode" if decode else "extend", width, q.dtype)
    group = heads // kv_heads
    config["BLOCK_M"] = max(config["BLOCK_M"], triton.next_power_of_2(group))
    blocks = sequences if decode else tokens // (config["BLOCK_M"] // group) + sequences
    parts = triton.cdiv(pages * page_size, SPLIT) if decode else 1
    split = SPLIT if parts > 1 else 0
    o = torch.empty_like(q)
    partial, lse = o, q
    if split:
        partial = torch.empty(parts, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(parts, tokens, heads, dtype=torch.float32, device=q.device)
    arrays = (q, k_pages, v_pages, page_table, lengths, lengths if decode else cu_seqlens, partial, lse)
    sizes = (sequences, tokens, page_table.stride(0), LOG2E.value * width**-0.5)
    shape = (heads, kv_heads, width, page_size, split, decode)
    _paged_kernel[(blocks, kv_heads, parts)](*arrays, *sizes, *shape, UPCAST=INTERPRET, **config)
    if split:
        parted = (partial, lse, lengths, o, tokens * heads)
        _combine_kernel[(tokens * heads,)](*parted, heads, width, split, config["BLOCK_D"], num_warps=1)
    return o


def _kernels_take(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels can run this. Raises ValueError if shapes or dtypes do not fit."""
    alike = k.shape == v.shape and q.shape[-1] == k.shape[-1] and q.dtype == k.dtype == v.dtype
    if not alike or q.shape[-2] % k.shape[-2]:
        given = ", ".join(f"{(*x.shape,)} {x.dtype}" for x in (q, k, v))
        raise ValueError(
            f"q, k, v must share head width and dtype, and q have a multiple of their heads, not {given}"
        )
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= 128


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int | None = None
) -> Tensor:
    """Causal attention within each sequence of a packed row. Differentiable.

    q           [T, H, Dh]; k, v [T, Hkv, Dh], H a multiple of Hkv
    cu_seqlens  int32 [S+1], from 0 to T, without empty sequences
    longest     tokens of the longest sequence; None: FlashAttention reads it from the device
    returns     [T, H, Dh] in q's dtype; softmax and sums in fp32
    raises      ValueError when the shapes or dtypes do not fit
    """
    if not _kernels_take(q, k, v):
        return packed_attention_torch(q, k, v, cu_seqlens)
    if flash := _flash(q):
        return flash(q, k, v, cu_seqlens, int(cu_seqlens.diff().max()) if longest is None else longest)
    return packed_attention_triton(q, k, v, cu_seqlens)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention of the last tokens of each sequence over its pages. Not differentiable.

    q           [T, H, Dh]; their own keys and values are in the pages already
    k_pages     [num_pages, page_size, Hkv, Dh], v_pages likewise, contiguous
    page_table  [S, P] int32: entries past a sequence's end may hold any valid page, which is never looked at
    lengths     [S] int32 or int64, at least 1: tokens of context, the queries among them
    cu_seqlens  None: one query per sequence (T = S). Otherwise int32 [S+1]: sequence s has queries
                cu_seqlens[s] to cu_seqlens[s+1], its last ones, each seeing the context up to itself
    returns     [T, H, Dh] in q's dtype; softmax and sums in fp32
    raises      ValueError when the shapes or dtypes do not fit
    """
    kernels = _kernels_take(q, k_pages, v_pages)
    attention = paged_attention_triton if kernels else paged_attention_torch
    return attention(q, k_pages, v_pages, page_table, lengths, cu_seqlens)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare, with_backward

    gpu = DEVICE == "cuda"
    generator = torch.Generator().manual_seed(0)
    sequences, longest, heads, kv_heads, width = (32, 2048, 28, 4, 128) if gpu else (64, 100, 4, 2, 32)
    lengths = torch.randint(longest // 5, longest + 1, (sequences,), generator=generator)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    tokens = int(lengths.sum())
    shape: dict[str, Any] = dict(dtype=DTYPE, device=DEVICE, requires_grad=True)
    inputs = [torch.randn(tokens, h, width, **shape) for h in (heads, kv_heads, kv_heads)]
    flop = 14 * float((lengths.double() ** 2).sum() / 2) * heads * width  # 2 products forward, 5 backward
    traffic = sum(4 * x.numel() * x.element_size() for x in (inputs[0], inputs[0], *inputs[1:]))
    ops: dict[str, Callable] = dict(ref=packed_attention_ref, torch=packed_attention_torch)
    if gpu:  # on a CPU, compiling a loop over sequences of every length takes minutes
        ops |= dict(compiled_ref=torch.compile(packed_attention_ref), triton=packed_attention_triton)
        if flash := _flash(inputs[0]):
            ops["flash"] = functools.partial(flash, longest=int(lengths.max()))
    runs = {name: with_backward(op, *inputs, cu_seqlens) for name, op in ops.items()}
    compare(
        f"packed attention, forward and backward, {tokens} tokens of {sequences} sequences",
        flop,
        traffic,
        **runs,
    )

    page_size, pages = 16, -(-longest // 16)
    table = torch.randperm(sequences * pages, generator=generator).view(sequences, pages).int().to(DEVICE)
    shape = dict(dtype=DTYPE, device=DEVICE)
    q = torch.randn(sequences, heads, width, **shape)
    k_pages, v_pages = (torch.randn(sequences * pages, page_size, kv_heads, width, **shape) for _ in range(2))
    context = (q, k_pages, v_pages, table, lengths.int().to(DEVICE))
    ops = dict(ref=paged_attention_ref, torch=paged_attention_torch)
    if gpu:
        ops |= dict(compiled_ref=torch.compile(paged_attention_ref), triton=paged_attention_triton)
    runs = {name: functools.partial(op, *context) for name, op in ops.items()}
    traffic = 2 * tokens * kv_heads * width * k_pages.element_size()
    flop = 4 * tokens * heads * width
    compare(f"decoding, {sequences} sequences, {tokens} tokens of context", flop, traffic, **runs)


if __name__ == "__main__":
    _benchmark()
