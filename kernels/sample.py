"""Sampling: draw a token, its log-prob and the log-sum-exp in one pass over the logits.

    z = logits / temperature        lse = log Σ_v exp z_v        logprob = z_token - lse
    token = the first v with  Σ_{i<=v} exp z_i > u Σ_i exp z_i         u in (0, 1), one number per row

A row's u is a counter hash of its 64-bit key and its position, and nothing else is random: the same key,
position and logits give the same token in any batch, on any rank, on any device (up to floating-point ties).
`hash_key` makes a completion's key, such as hash_key(seed, step, problem, sample); the draw adds the
position. temperature = 0 takes the largest logit (the first, if several are equal) and returns its log-prob
at temperature 1.

Letters: B rows, V vocabulary.

Costs, per row of V bf16 logits. Eager: an fp32 copy, softmax, log-softmax and cumulative sum, about 10 passes
of 4 V bytes. Fused: 2 V bytes, read once. The pass keeps the maximum and the sum of exponentials of each
block of the vocabulary; then only the block in which the cumulative sum crosses u is read again and scanned.
At B = 256, V = 152,064 that is 78 MB, 18 µs at 4.3 TB/s. On a CPU the same two levels replace a serial scan
over V by one over V / 64 blocks.

Inverse CDF instead of Gumbel-argmax: one hash per row, not one per logit, which on a CPU took 25 times as
long. Exponentials are summed in fp64; fp32 sums would lose tokens of probability below 1e-7.

    python -m kernels.sample        the benchmark
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014): a counter, then a mix in which every input bit affects every output
# bit
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit numbers, which wrap in torch
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(number) for number in (GOLDEN, MIX_1, MIX_2))  # for Triton


def hash_key(*words: int | Tensor) -> Tensor:
    """Hash numbers, in order, to 64-bit keys: int64, of the numbers' common shape.

    Words are ints or int64 tensors: hash_key(seed, step, problem, torch.arange(8)) is eight keys. A key is a
    word too: a row's key is made once, and hash_key(key, position) at each step.
    """
    device = next((word.device for word in words if isinstance(word, Tensor)), "cpu")
    # made on the device: a copy from the host would synchronize
    key = torch.zeros((), dtype=torch.int64, device=device)
    for word in words:
        key = _mix((key ^ word) + GOLDEN)
    return key


def _mix(x: Tensor) -> Tensor:
    # int64 shifts copy the sign bit: the mask removes the copies
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(keys: Tensor) -> Tensor:
    """Uniform fp64 numbers (k + 1/2) / 2^32 inside (0, 1), k the upper 32 bits of int64 keys."""
    return ((keys >> 32 & 0xFFFFFFFF).double() + 0.5) * 2.0**-32


def sample_token_ref(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Specification of `sample_token`: fp64, the whole cumulative sum."""
    z = logits.double() / (temperature or 1.0)
    logprobs = z.log_softmax(-1)
    if temperature == 0:
        token = z.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        u = uniform(hash_key(keys, positions))[:, None]
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
    logprob = logprobs.gather(-1, token[:, None])[:, 0]
    return token, logprob.float(), z.logsumexp(-1).float()


def sample_token_torch(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample_token` in PyTorch ops; for a large vocabulary first by blocks of 64 tokens, then inside one."""
    z = logits.float()
    if temperature not in (0, 1):
        z = z / temperature
    probability = z.softmax(-1)
    if temperature == 0:
        token = z.argmax(-1, keepdim=True)
    elif z.shape[-1] <= 512:
        token, _ = _invert(probability, uniform(hash_key(keys, positions))[:, None])
    else:
        blocks = F.pad(probability, (0, -z.shape[-1] % 64)).unflatten(-1, (-1, 64))  # [B, V/64, 64]
        block, share = _invert(blocks.sum(-1), uniform(hash_key(keys, positions))[:, None])
        inside, _ = _invert(blocks.gather(1, block[..., None].expand(-1, 1, 64))[:, 0], share)
        token = (block * 64 + inside).clamp_(max=z.shape[-1] - 1)
    logprob = probability.gather(-1, token).log_()
    return token[:, 0], logprob[:, 0], (z.gather(-1, token) - logprob)[:, 0]


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B, 1] where the cumulative mass [B, N] passes its share u [B, 1], and u's place in it."""
    cdf = mass.cumsum(-1, dtype=torch.float64)
    target = u * cdf[:, -1:]
    # NaN logits must give a NaN log-prob, not an index error: hence the clamp
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=mass.shape[-1] - 1)
    here = mass.gather(-1, index)
    # strictly below 1: otherwise rounding could select a token of probability 0 at the next level
    return index, ((target - cdf.gather(-1, index) + here) / here).clamp_(0.0, 1.0 - 2.0**-40)


@triton.jit
def _hash_word(key, word):
    """Add one word as in `hash_key`, in the same wrapping int64 arithmetic."""
    x = (key ^ word) + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _sample_kernel(
    logits_ptr,  # [B, V]
    keys_ptr,  # [B] int64; not read when GREEDY
    positions_ptr,  # [B] int64; not read when GREEDY
    token_ptr,  # [B] int64
    logprob_ptr,  # [B] fp32
    lse_ptr,  # [B] fp32
    V,
    scale,  # 1 / temperature
    GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample one row: maximum and mass of every block in one pass, then a scan of the draw's block."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    index = tl.arange(0, BLOCKS)
    offset = tl.arange(0, BLOCK)
    tops = tl.full([BLOCKS], float("-inf"), tl.float32)
    masses = tl.zeros([BLOCKS], tl.float32)
    for b in range(tl.cdiv(V, BLOCK)):
        at = b * BLOCK + offset
        z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
        top = tl.max(z, 0)
        # the floor avoids -inf - -inf, a NaN, in a block of only -inf, which has no mass
        mass = tl.sum(tl.exp(z - tl.maximum(top, -3e38)), 0)
        tops = tl.where(index == b, top, tops)
        masses = tl.where(index == b, mass, masses)
    top = tl.max(tops, 0)
    masses *= tl.exp(tops - top)
    lse = top + tl.log(tl.sum(masses, 0))

    if GREEDY:
        block = tl.argmax(tops, 0)
        at = block * BLOCK + offset
        z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
        token = block * BLOCK + tl.argmax(z, 0)
    else:
        zero = tl.zeros([], tl.int64)
        key = _hash_word(_hash_word(zero, tl.load(keys_ptr + row)), tl.load(positions_ptr + row))
        u = (((key >> 32) & 0xFFFFFFFF).to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
        masses64 = masses.to(tl.float64)
        cdf = tl.cumsum(masses64, 0)
        target = u * tl.sum(tl.where(index == BLOCKS - 1, cdf, 0.0), 0)
        block = tl.minimum(tl.sum((cdf <= target).to(tl.int32), 0), BLOCKS - 1)
        here = index == block
        mass = tl.sum(tl.where(here, masses64, 0.0), 0)
        # strictly below 1: otherwise rounding could select a token of probability 0
        share = (target - tl.sum(tl.where(here, cdf, 0.0), 0) + mass) / mass
        share = tl.minimum(tl.maximum(share, 0.0), 1.0 - 1.0 / 1099511627776.0)
        at = block * BLOCK + offset
        z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
        cdf = tl.cumsum(tl.exp(z - top).to(tl.float64), 0)
        target = share * tl.sum(tl.where(offset == BLOCK - 1, cdf, 0.0), 0)
        token = tl.minimum(block * BLOCK + tl.sum((cdf <= target).to(tl.int32), 0), V - 1)
    chosen = tl.load(logits_ptr + token).to(tl.float32) * scale
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, chosen - lse)
    tl.store(lse_ptr + row, lse)


def sample_token_triton(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample_token` in Triton: one program per row, one read of the logits and of one more block."""
    logits, keys, positions = logits.contiguous(), keys.contiguous(), positions.contiguous()
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    block = min(4096, max(16, triton.next_power_of_2(vocab)))
    blocks = max(2, triton.next_power_of_2(triton.cdiv(vocab, block)))
    scale = 1.0 / (temperature or 1.0)
    arrays = (logits, keys, positions, token, logprob, lse)
    _sample_kernel[(rows,)](*arrays, vocab, scale, temperature == 0, blocks, block, num_warps=8)
    return token, logprob, lse


def sample_token(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row of logits.

    logits       [B, V], any float dtype; -inf marks a token that cannot be drawn
    keys         [B] int64, one per row from `hash_key`; not read when temperature is 0
    positions    [B] int64: u is made from hash_key(keys, positions)
    temperature  0 is greedy
    returns      token [B] int64, logprob [B] fp32 (of that token, at the temperature it was drawn with;
                 greedy: at 1), logsumexp [B] fp32 of logits / temperature
    raises       ValueError when keys and rows do not match
    """
    if not keys.shape == positions.shape == logits.shape[:1]:
        raise ValueError(
            f"one key and position per row of logits, not {(*keys.shape,)} keys and {(*positions.shape,)} "
            f"positions for {(*logits.shape,)} logits"
        )
    sample = sample_token_triton if logits.is_cuda and logits.dtype != torch.float64 else sample_token_torch
    return sample(logits, keys, positions, temperature)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare

    for rows, vocab in ((256, 152_064), (64, 152_064)) if DEVICE == "cuda" else ((64, 4096), (64, 32)):
        logits = torch.randn(rows, vocab, dtype=DTYPE, device=DEVICE)
        keys = hash_key(torch.arange(rows, device=DEVICE))
        positions = torch.zeros_like(keys)
        ops = dict(
            ref=sample_token_ref, compiled_ref=torch.compile(sample_token_ref), torch=sample_token_torch
        )
        if DEVICE == "cuda":
            ops["triton"] = sample_token_triton
        runs = {
            name: lambda op=op, arrays=(logits, keys, positions): op(*arrays, 0.8) for name, op in ops.items()
        }
        compare(f"draw from {rows} x {vocab} logits", 4 * logits.numel(), logits.nbytes, **runs)


if __name__ == "__main__":
    _benchmark()
