"""Statistics of every episode's gradient from one backward, without storing the gradients.

For a position-wise linear layer y = W x, token t is a pair: its input x_t, and g_t, the gradient of its
log-prob at y. The gradient of episode k at W, and the quantities computed from it, are

    G_k = Σ_{t∈k} g_t x_tᵀ                                [D2, D1]
    quadratic_k = Σ_ij w_ij (G_k)_ij^p                    p = 2: diagonal-Fisher form; p = 1: product with w
    ghost_k = ‖G_k‖² = Σ_{t,t'∈k} (g_t·g_t') (x_t·x_t')   the same norm without forming G_k
    F_ij = mean_t g_ti² x_tj²                             diagonal Fisher: one product of squares

Letters: T tokens, K episodes, n tokens of one episode, D1 input width, D2 output width, w weight.

Costs. The naive loop writes G_k, squares, weights and sums it: 2 T D1 D2 FLOP and about 28 K D1 D2 bytes of
pointwise traffic, which dominate for short episodes. `episode_quadratic` does the same FLOP with one read of
w and no other traffic of that size: a program loads one tile of w and loops over all episodes with G_k in
registers. `ghost_norm` needs n² (D1 + D2) FLOP per episode, fewer while n < 2 D1 D2 / (D1 + D2).

Results are bitwise reproducible, and an episode's value does not depend on its place in the row: every tile
of every episode has its own output slot, slots are summed in fp64, and there are no atomics. Episodes are
contiguous and cover the tokens from cu_episodes[0] to cu_episodes[K]; other tokens are ignored; an empty
episode gives exactly 0. Nothing here is differentiable.

    python -m kernels.fisher        the benchmark
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

CHUNK = 1 << 18  # elements of padded factors or gradients per batch of the torch path: 1 MB stays in cache


def episode_quadratic_ref(
    x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor | None = None, power: int = 2
) -> Tensor:
    """Specification of `episode_quadratic`: one gradient at a time, in the inputs' dtype."""
    values = torch.zeros(len(cu_episodes) - 1, dtype=torch.float64, device=x.device)
    for k, (start, end) in enumerate(pairwise(cu_episodes.tolist())):
        gradient = g[start:end].T @ x[start:end]
        powered = gradient**power
        values[k] = (powered if weight is None else weight * powered).sum()
    return values


def ghost_norm_ref(x: Tensor, g: Tensor, cu_episodes: Tensor) -> Tensor:
    """Specification of `ghost_norm`: pairs of tokens, one episode at a time, in the inputs' dtype."""
    values = torch.zeros(len(cu_episodes) - 1, dtype=torch.float64, device=x.device)
    for k, (start, end) in enumerate(pairwise(cu_episodes.tolist())):
        values[k] = ((g[start:end] @ g[start:end].T) * (x[start:end] @ x[start:end].T)).sum()
    return values


def diagonal_fisher_ref(x: Tensor, g: Tensor) -> Tensor:
    """Specification of `diagonal_fisher`: one token's gradient at a time."""
    total = torch.zeros(g.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for x_t, g_t in zip(x, g):
        total += torch.outer(g_t, x_t) ** 2
    return total / max(len(x), 1)


@triton.jit(do_not_specialize=["K", "episodes_per_program"])
def _quadratic_kernel(
    x_ptr,  # [T, D1]
    g_ptr,  # [T, D2]
    cu_ptr,  # [K+1] int64, as all offsets computed from it
    weight_ptr,  # [D2, D1] fp32; not read unless WEIGHTED
    partial_ptr,  # [K, tiles] fp32, every slot is written
    K,
    D1,
    D2,
    episodes_per_program,
    POWER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bit patterns of bf16
):
    tile = tl.program_id(0)
    columns = tl.cdiv(D1, BLOCK_D1)
    i = (tile // columns) * BLOCK_D2 + tl.arange(0, BLOCK_D2)
    j = (tile % columns) * BLOCK_D1 + tl.arange(0, BLOCK_D1)
    if WEIGHTED:
        inside = (i < D2)[:, None] & (j < D1)[None, :]
        weight = tl.load(weight_ptr + i[:, None].to(tl.int64) * D1 + j[None, :], mask=inside, other=0.0)
    first = tl.program_id(1) * episodes_per_program
    for k in range(first, tl.minimum(first + episodes_per_program, K)):
        start = tl.load(cu_ptr + k)
        end = tl.load(cu_ptr + k + 1)
        gradient = tl.zeros((BLOCK_D2, BLOCK_D1), dtype=tl.float32)
        for chunk in range(start, end, BLOCK_T):
            t = chunk + tl.arange(0, BLOCK_T)  # in 64 bits: T D2 may exceed 32
            g = tl.load(
                g_ptr + t[:, None] * D2 + i[None, :], mask=(t < end)[:, None] & (i < D2)[None, :], other=0.0
            )
            x = tl.load(
                x_ptr + t[:, None] * D1 + j[None, :], mask=(t < end)[:, None] & (j < D1)[None, :], other=0.0
            )
            if UPCAST:
                g = g.to(tl.float32)
                x = x.to(tl.float32)
            gradient = tl.dot(tl.trans(g), x, gradient, input_precision="ieee")
        value = gradient
        if WEIGHTED:
            value = value * weight
        if POWER == 2:
            value = value * gradient  # (w G) G and not w G²: G² would underflow first
        tl.store(partial_ptr + k * tl.num_programs(0).to(tl.int64) + tile, tl.sum(value))


@triton.jit
def _dots(ptr, t, s, end, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Compute all dot products of rows t with rows s of a [T, D] matrix; rows from `end` on are zero."""
    dots = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        j = d + tl.arange(0, BLOCK_D)
        a = tl.load(ptr + t[:, None] * D + j[None, :], mask=(t < end)[:, None] & (j < D)[None, :], other=0.0)
        b = tl.load(ptr + s[:, None] * D + j[None, :], mask=(s < end)[:, None] & (j < D)[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
    return dots


@triton.jit
def _ghost_kernel(
    x_ptr,  # [T, D1]
    g_ptr,  # [T, D2]
    cu_ptr,  # [K+1] int64
    partial_ptr,  # [K, row tiles of the longest episode] fp32, every slot is written
    D1,
    D2,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    k = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(cu_ptr + k)
    end = tl.load(cu_ptr + k + 1)
    t = start + row * BLOCK_T + tl.arange(0, BLOCK_T)
    total = 0.0
    if start + row * BLOCK_T < end:
        for column in range(0, row + 1):
            s = start + column * BLOCK_T + tl.arange(0, BLOCK_T)
            g_dots = _dots(g_ptr, t, s, end, D2, BLOCK_T, BLOCK_D, UPCAST)
            x_dots = _dots(x_ptr, t, s, end, D1, BLOCK_T, BLOCK_D, UPCAST)
            pairs = tl.sum(g_dots * x_dots)
            # a tile below the diagonal counts twice, for its mirror
            total += tl.where(column < row, 2.0 * pairs, pairs)
    tl.store(partial_ptr + k * tl.num_programs(1).to(tl.int64) + row, total)


# Fixed tiles: tuning at run time would change rounding between runs. 16 bits | fp32, whose exact products use
# no tensor cores and need smaller tiles | interpreter, where small tests should cross tile borders. With
# three stages the fp32 ghost norm spills under Triton 3.6 and 3.7.1.
QUADRATIC_TILES = {
    2: dict(BLOCK_D2=128, BLOCK_D1=128, BLOCK_T=64, num_warps=8, num_stages=3),
    4: dict(BLOCK_D2=64, BLOCK_D1=64, BLOCK_T=32, num_warps=4, num_stages=3),
    0: dict(BLOCK_D2=16, BLOCK_D1=16, BLOCK_T=16, num_warps=4, num_stages=1),
}
GHOST_TILES = {
    2: dict(BLOCK_T=64, BLOCK_D=64, num_warps=4, num_stages=3),
    4: dict(BLOCK_T=64, BLOCK_D=32, num_warps=8, num_stages=2),
    0: dict(BLOCK_T=16, BLOCK_D=16, num_warps=4, num_stages=1),
}


def episode_quadratic_triton(
    x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor | None = None, power: int = 2
) -> Tensor:
    """As `episode_quadratic`, for bf16, fp16 or fp32 on a GPU (or in the interpreter)."""
    _check(x, g, weight, power)
    x, g, K = x.contiguous(), g.contiguous(), len(cu_episodes) - 1
    tiling = QUADRATIC_TILES[0 if INTERPRET else x.dtype.itemsize]
    tiles = triton.cdiv(g.shape[1], tiling["BLOCK_D2"]) * triton.cdiv(x.shape[1], tiling["BLOCK_D1"])
    # few tiles: split the episodes among more programs, so that every processor has work
    per_program = triton.cdiv(max(K, 1), triton.cdiv(512, tiles))
    partial = torch.empty(K, tiles, dtype=torch.float32, device=x.device)
    _quadratic_kernel[(tiles, triton.cdiv(max(K, 1), per_program))](
        x, g, cu_episodes.to(x.device, torch.int64), x if weight is None else weight.float().contiguous(),
        partial,
        K, x.shape[1], g.shape[1], per_program,
        POWER=power, WEIGHTED=weight is not None, UPCAST=INTERPRET, **tiling,
    )  # fmt: skip
    return partial.sum(1, dtype=torch.float64)


def ghost_norm_triton(x: Tensor, g: Tensor, cu_episodes: Tensor, longest: int | None = None) -> Tensor:
    """As `ghost_norm`, for bf16, fp16 or fp32 on a GPU (or in the interpreter)."""
    _check(x, g)
    x, g, K = x.contiguous(), g.contiguous(), len(cu_episodes) - 1
    tiling = GHOST_TILES[0 if INTERPRET else x.dtype.itemsize]
    if longest is None and K:
        longest = int(cu_episodes.diff().max())
    rows = max(triton.cdiv(longest or 0, tiling["BLOCK_T"]), 1)
    partial = torch.empty(K, rows, dtype=torch.float32, device=x.device)
    if K:
        _ghost_kernel[(K, rows)](
            x, g, cu_episodes.to(x.device, torch.int64), partial, x.shape[1], g.shape[1],
            UPCAST=INTERPRET, **tiling
        )  # fmt: skip
    return partial.sum(1, dtype=torch.float64)


def _equal_lengths(
    x: Tensor, g: Tensor, cu_episodes: Tensor, elements: Callable[[int], int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches (k [B], x [B, n, D1], g [B, n, D2]) of episodes with the same length rounded up to 16.

    A length is rounded to a multiple of 16, not to that of other episodes, and every episode's factors have
    the same alignment in memory. So an episode's arithmetic does not depend on its batch. A batch's factors,
    and `elements(n)` numbers for each of its episodes, fit CHUNK (or the batch is a single episode). The next
    batch reuses this one's memory: on a CPU, page faults of new memory would cost as much as the arithmetic.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, g = x.to(dtype), g.to(dtype)
    x_room, g_room = x.new_empty(0), g.new_empty(0)
    start, length = cu_episodes[:-1].to(x.device, torch.int64), cu_episodes.diff().to(x.device, torch.int64)
    rounded = (length + 15) // 16 * 16
    for n in rounded.unique().tolist():
        if n == 0:
            continue
        offset = torch.arange(n, device=x.device)
        batch = CHUNK // max(n * (x.shape[1] + g.shape[1]), elements(n))
        for k in (rounded == n).nonzero()[:, 0].split(max(batch, 1)):
            rows = (start[k, None] + offset).clamp_(max=len(x) - 1).flatten()
            padding = (offset >= length[k, None])[..., None]
            x_k = torch.index_select(x, 0, rows, out=x_room.resize_(len(rows), x.shape[1])).view(
                len(k), n, -1
            )
            g_k = torch.index_select(g, 0, rows, out=g_room.resize_(len(rows), g.shape[1])).view(
                len(k), n, -1
            )
            yield k, x_k.masked_fill_(padding, 0.0), g_k.masked_fill_(padding, 0.0)


def episode_quadratic_torch(
    x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor | None = None, power: int = 2
) -> Tensor:
    """As `episode_quadratic`, by batched products of equal lengths, at most CHUNK elements at once."""
    _check(x, g, weight, power)
    values = torch.zeros(len(cu_episodes) - 1, dtype=torch.float64, device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(dtype)
    gradient, value = (torch.empty(0, dtype=dtype, device=x.device) for _ in range(2))
    for k, x_k, g_k in _equal_lengths(x, g, cu_episodes, lambda n: x.shape[1] * g.shape[1]):
        torch.bmm(g_k.mT, x_k, out=gradient.resize_(len(k), g.shape[1], x.shape[1]))
        if weight is not None:
            torch.mul(gradient, weight, out=value.resize_(gradient.shape))
        weighted = gradient if weight is None else value
        if power == 2:
            weighted = torch.mul(weighted, gradient, out=value.resize_(gradient.shape))
        values[k] = weighted.sum(-1).double().sum(-1)
    return values


def ghost_norm_torch(x: Tensor, g: Tensor, cu_episodes: Tensor, longest: int | None = None) -> Tensor:
    """As `ghost_norm`, by batched products of equal lengths."""
    _check(x, g)
    values = torch.zeros(len(cu_episodes) - 1, dtype=torch.float64, device=x.device)
    for k, x_k, g_k in _equal_lengths(x, g, cu_episodes, lambda n: n * n):
        values[k] = ((g_k @ g_k.mT) * (x_k @ x_k.mT)).sum(-1).double().sum(-1)
    return values


@torch.no_grad()
def episode_quadratic(
    x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor | None = None, power: int = 2
) -> Tensor:
    """Compute Σ_ij w_ij (G_k)_ij^power of every episode k, where G_k = Σ_{t∈k} g_t x_tᵀ is not stored.

    x [T, D1] and g [T, D2] of one dtype, cu_episodes [K+1] integer, weight [D2, D1] (None: ones), power 1 or
    2. Returns [K] fp64: sums inside a tile are fp32 (fp64 for fp64 inputs). Raises ValueError when the shapes
    do not fit.
    """
    run = episode_quadratic_triton if x.is_cuda and x.dtype != torch.float64 else episode_quadratic_torch
    return run(x, g, cu_episodes, weight, power)


@torch.no_grad()
def ghost_norm(x: Tensor, g: Tensor, cu_episodes: Tensor, longest: int | None = None) -> Tensor:
    """Compute ‖G_k‖² of every episode k, [K] fp64, from dot products of tokens.

    Equals `episode_quadratic(x, g, cu_episodes)`, and is cheaper while episodes are shorter than 2 D1 D2 /
    (D1 + D2) tokens. longest: tokens of the longest episode; None: a GPU is waited for to know it. Raises
    ValueError if the shapes do not fit.
    """
    run = ghost_norm_triton if x.is_cuda and x.dtype != torch.float64 else ghost_norm_torch
    return run(x, g, cu_episodes, longest)


@torch.no_grad()
def diagonal_fisher(x: Tensor, g: Tensor) -> Tensor:
    """Compute F_ij = mean over tokens of (g_ti x_tj)², [D2, D1] fp32 (fp64 for fp64 inputs); zeros without
    tokens.

    This is a Fisher diagonal only if the policy itself sampled the tokens at temperature 1 and g is not
    weighted by advantages.
    """
    _check(x, g)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # bf16 also for fp16 inputs: their squares would underflow
        squares = (g.bfloat16().square().T, x.bfloat16().square())
        return torch.mm(*squares, out_dtype=torch.float32) / max(len(x), 1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return g.to(dtype).square().T @ x.to(dtype).square() / max(len(x), 1)


def _check(x: Tensor, g: Tensor, weight: Tensor | None = None, power: int = 2) -> None:
    if x.dim() != 2 or g.dim() != 2 or len(x) != len(g) or x.dtype != g.dtype:
        given = f"{(*x.shape,)} {x.dtype} and {(*g.shape,)} {g.dtype}"
        raise ValueError(f"x [T, D1] and g [T, D2] must share T and dtype, not {given}")
    if weight is not None and weight.shape != (g.shape[1], x.shape[1]):
        raise ValueError(f"weight must be [D2, D1] = {(g.shape[1], x.shape[1])}, not {(*weight.shape,)}")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, not {power}")


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare

    @torch.compile(dynamic=True)
    def compiled_episode(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        return (weight * (g.T @ x) ** 2).sum()

    def compiled_loop(x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(
            [compiled_episode(x[a:b], g[a:b], weight) for a, b in pairwise(cu_episodes.tolist())]
        )

    def vmap(x: Tensor, g: Tensor, cu_episodes: Tensor, weight: Tensor) -> Tensor:
        n = int(cu_episodes[1])  # it needs equal lengths, and holds all K gradients
        gradients = torch.vmap(lambda x_k, g_k: g_k.T @ x_k)(
            x.view(-1, n, x.shape[1]), g.view(-1, n, g.shape[1])
        )
        return (weight * gradients**2).sum((1, 2))

    gpu = DEVICE == "cuda"
    sizes = [
        (4096, 256, 18944, 3584),
        (4096, 64, 18944, 3584),
        (4096, 64, 1024, 1024),
        (4096, 256, 152_064, 3584),
    ]
    for T, n, D2, D1 in sizes if gpu else [(4096, 32, 512, 128), (4096, 12, 48, 48), (4096, 100, 64, 64)]:
        T -= T % n
        x, g = torch.randn(T, D1, device=DEVICE, dtype=DTYPE), torch.randn(T, D2, device=DEVICE, dtype=DTYPE)
        weight, cu_episodes = torch.rand(D2, D1, device=DEVICE), torch.arange(0, T + 1, n, device=DEVICE)
        ops = dict(
            eager_loop=episode_quadratic_ref, compiled_loop=compiled_loop, vmap=vmap, ours=episode_quadratic
        )
        runs = {name: partial(op, x, g, cu_episodes, weight) for name, op in ops.items()}
        traffic = x.nbytes + g.nbytes + weight.nbytes
        compare(
            f"quadratic forms, {T} tokens in episodes of {n}, {D2} × {D1}", 2 * T * D1 * D2, traffic, **runs
        )
        if gpu:
            for name, run in runs.items():
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run()
                print(
                    f"  {name:<24} {(torch.cuda.max_memory_allocated() - held) / 2**20:10.1f} MiB at its peak"
                )
        runs = dict(
            eager_loop=partial(ghost_norm_ref, x, g, cu_episodes), ours=partial(ghost_norm, x, g, cu_episodes)
        )
        compare(
            f"ghost norms, {T} tokens in episodes of {n}, {D2} × {D1}",
            T * n * (D1 + D2),
            x.nbytes + g.nbytes,
            **runs,
        )
        runs = dict(diagonal_fisher=partial(diagonal_fisher, x, g))
        compare(f"diagonal Fisher, {T} tokens, {D2} × {D1}", 2 * T * D1 * D2, traffic, **runs)


if __name__ == "__main__":
    _benchmark()
