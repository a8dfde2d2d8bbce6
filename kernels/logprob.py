"""LM head: log-probs and entropies, or gradients at the hidden states, without storing [T, V] logits.

    z_t = W h_t / temperature       p_t = softmax z_t       lse_t = log Σ_v exp z_tv
    logprob_t = z_t[target_t] - lse_t                       entropy_t = lse_t - Σ_v p_tv z_tv
    ∂ logprob_t / ∂ h_t = (W[target_t] - Wᵀ p_t) / temperature                         `linear_score`, at 1
    ∂ L / ∂ W = Σ_t c_t (onehot(target_t) - p_t) h_tᵀ / temperature                    c_t = ∂ L / ∂ logprob_t

Letters: T tokens, D width, V vocabulary, C tokens of one chunk.

Costs. Naive: the logits and their log-softmax are kept for the backward, 2 to 4 times 4 T V bytes (T = 4096,
V = 152k: 2.5 GB each). Here: one chunk of logits at a time, in the forward and again in the backward, with
one number per token (lse) kept between them. A product of 2 T D V FLOP is done once in the forward and three
times in the backward (logits again, ∂h, ∂W): 4 instead of 3. Each chunk reads W and adds to ∂W, about 12 D V
bytes. On an H200 (790 TFLOP/s, 4.3 TB/s) that takes as long as the chunk's arithmetic at C = 370; at C = 2048
it takes less than a fifth. On a CPU, logits larger than the cache cost page faults: there C V is at most
CPU_LOGITS, and C at least CPU_CHUNK.

cuBLAS computes the products. Triton fuses the operations on rows: one program reads a row of logits once and
computes lse, logprob and entropy; another turns a row of logits into c (onehot - p) / temperature for the two
products of the backward.

    python -m kernels.logprob       the benchmark
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens
CPU_LOGITS, CPU_CHUNK = 1 << 21, 256  # logits, 8 MB of fp32; tokens


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Specification of `linear_logprob`: all logits at once, with autograd."""
    logprobs = (_upcast(hidden @ weight.T) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy.detach()


def linear_score_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Specification of `linear_score`: the gradient at the hidden states, by autograd."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logprob, _ = linear_logprob_ref(hidden, weight.detach(), targets)
        (score,) = torch.autograd.grad(logprob.sum(), hidden)
    return logprob.detach(), _upcast(score)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = CHUNK if hidden.is_cuda else max(CPU_CHUNK, CPU_LOGITS // len(weight))
    for start in range(0, max(len(hidden), 1), size):  # zero tokens give one empty chunk
        yield slice(start, start + size)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b in fp32 (fp64 for fp64): cuBLAS returns its accumulator; a CPU needs upcast operands."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return _upcast(a @ b)


def _rows_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logprob, entropy and lse [C] of a chunk of logits [C, V]."""
    z = logits if temperature == 1 else logits / temperature
    logprobs = z.log_softmax(-1)
    logprob = logprobs.gather(-1, targets[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
    # relative to the maximum, so that small log-probs keep their precision in the difference
    return logprob, entropy, z.amax(-1) - logprobs.amax(-1)


def _residual_torch(
    logits: Tensor, targets: Tensor, lse: Tensor, coef: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Compute coef (onehot(target) - p) / temperature of a chunk [C, V] in `dtype`; overwrites logits."""
    coef = coef[:, None] / temperature
    p = logits.div_(temperature).sub_(lse[:, None]).exp_()
    return p.mul_(-coef).scatter_add_(-1, targets[:, None], coef).to(dtype)


@triton.jit
def _rows_kernel(
    logits_ptr,  # [C, V]
    targets_ptr,  # [C] int64
    logprob_ptr,  # [C] fp32
    entropy_ptr,  # [C] fp32
    lse_ptr,  # [C] fp32
    V,
    scale,  # 1 / temperature
    BLOCK: tl.constexpr,
):
    """Reduce one row in one read: running maximum top, Σ exp(z - top) and Σ (z - top) exp(z - top)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    offset = tl.arange(0, BLOCK)
    top = -3e38  # not -inf: a difference of two tops must be a number
    mass = 0.0
    moment = 0.0
    for start in range(0, V, BLOCK):
        z = (
            tl.load(logits_ptr + start + offset, mask=start + offset < V, other=float("-inf")).to(tl.float32)
            * scale
        )
        new = tl.maximum(top, tl.max(z, 0))
        rescale = tl.exp(top - new)
        e = tl.exp(z - new)
        moment = (moment + mass * (top - new)) * rescale + tl.sum(tl.where(e > 0, z - new, 0.0) * e, 0)
        mass = mass * rescale + tl.sum(e, 0)
        top = new
    lse = top + tl.log(mass)
    target = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32) * scale
    tl.store(logprob_ptr + row, target - lse)
    tl.store(entropy_ptr + row, tl.log(mass) - moment / mass)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _residual_kernel(
    logits_ptr,  # [C, V]
    targets_ptr,  # [C] int64
    lse_ptr,  # [C] fp32
    coef_ptr,  # [C] fp32
    out_ptr,  # [C, V]
    V,
    scale,  # 1 / temperature
    BLOCK: tl.constexpr,
):
    """Compute coef (onehot - p) / temperature of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
    p = tl.exp(z - tl.load(lse_ptr + row))
    onehot = (at == tl.load(targets_ptr + row)).to(tl.float32)
    residual = tl.load(coef_ptr + row) * scale * (onehot - p)
    tl.store(out_ptr + row * V + at, residual.to(out_ptr.dtype.element_ty), mask=at < V)


def _rows_triton(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_rows_torch` in one pass."""
    rows, vocab = logits.shape
    logprob, entropy, lse = torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind()
    block = min(4096, triton.next_power_of_2(vocab))
    arrays = (logits, targets.contiguous(), logprob, entropy, lse)
    _rows_kernel[(rows,)](*arrays, vocab, 1.0 / temperature, block, num_warps=8)
    return logprob, entropy, lse


def _residual_triton(
    logits: Tensor, targets: Tensor, lse: Tensor, coef: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """`_residual_torch` in one pass."""
    rows, vocab = logits.shape
    out = torch.empty_like(logits, dtype=dtype)
    block = min(4096, triton.next_power_of_2(vocab))
    arrays = (logits, targets.contiguous(), lse.contiguous(), coef.contiguous(), out)
    _residual_kernel[(rows, triton.cdiv(vocab, block))](*arrays, vocab, 1.0 / temperature, block, num_warps=8)
    return out


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        rows: Callable,
        residual: Callable,
    ):
        chunks = []
        for chunk in _chunks(hidden, weight):
            chunks.append(rows(_matmul(hidden[chunk], weight.T), targets[chunk], temperature))
        logprob, entropy, lse = (torch.cat(column) for column in zip(*chunks))
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.residual = temperature, residual
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in fp32: bf16 would drop terms that are small beside the sum
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden, weight):
            logits = _matmul(hidden[chunk], weight.T)
            residual = ctx.residual(
                logits, targets[chunk], lse[chunk], grad_logprob[chunk], ctx.temperature, weight.dtype
            )
            if grad_hidden is not None:
                grad_hidden[chunk] = residual @ weight
            if grad_weight is not None:
                grad_weight += _matmul(residual.T, hidden[chunk])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


@torch.no_grad()
def _linear_score(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Callable, residual: Callable):
    logprob = torch.empty(
        len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
    )
    score = torch.empty(hidden.shape, dtype=logprob.dtype, device=hidden.device)
    for chunk in _chunks(hidden, weight):
        logits = _matmul(hidden[chunk], weight.T)
        logprob[chunk], _, lse = rows(logits, targets[chunk], 1.0)
        difference = residual(logits, targets[chunk], lse, torch.ones_like(lse), 1.0, weight.dtype)
        score[chunk] = _matmul(difference, weight)
    return logprob, score


def linear_logprob_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in PyTorch ops, chunk by chunk."""
    return _LinearLogprob.apply(hidden, weight, targets, temperature, _rows_torch, _residual_torch)


def linear_logprob_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`linear_logprob`, chunk by chunk, with one Triton pass over each chunk of logits."""
    return _LinearLogprob.apply(hidden, weight, targets, temperature, _rows_triton, _residual_triton)


def linear_score_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_score` in PyTorch ops, chunk by chunk."""
    return _linear_score(hidden, weight, targets, _rows_torch, _residual_torch)


def linear_score_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_score`, chunk by chunk, with two Triton passes over each chunk of logits."""
    return _linear_score(hidden, weight, targets, _rows_triton, _residual_triton)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution softmax(hidden weightᵀ / temperature).

    hidden   [T, D], the states that predict the targets; weight [V, D] of the same dtype; targets [T] int64
    returns  logprob [T], entropy [T] in nats, both fp32 (fp64 for fp64 inputs). logprob is
             differentiable with respect to hidden and weight; entropy has no gradient, it is for logging
    """
    run = linear_logprob_triton if hidden.is_cuda and hidden.dtype != torch.float64 else linear_logprob_torch
    return run(hidden, weight, targets, temperature)


def linear_score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and its gradient at the hidden state, at temperature 1.

    hidden   [T, D]; weight [V, D] of the same dtype; targets [T] int64
    returns  logprob [T], score [T, D] = weight[target] - softmax(hidden weightᵀ) weight; both fp32 (fp64 for
             fp64 inputs), without gradients
    """
    run = linear_score_triton if hidden.is_cuda and hidden.dtype != torch.float64 else linear_score_torch
    return run(hidden, weight, targets)


def _benchmark() -> None:
    from kernels.bench import DEVICE, DTYPE, compare, with_backward

    gpu = DEVICE == "cuda"
    for tokens, width, vocab in (
        ((4096, 3584, 152_064), (8192, 896, 151_936)) if gpu else ((1024, 128, 4096),)
    ):
        shape: dict[str, Any] = dict(dtype=DTYPE, device=DEVICE, requires_grad=True)
        hidden, weight = torch.randn(tokens, width, **shape), torch.randn(vocab, width, **shape)
        targets = torch.randint(vocab, (tokens,), device=DEVICE)
        sizes = f"{tokens} tokens, width {width}, vocabulary {vocab}"
        product, traffic = 2 * tokens * width * vocab, weight.nbytes + 2 * hidden.nbytes
        ops = dict(
            ref=linear_logprob_ref, compiled_ref=torch.compile(linear_logprob_ref), torch=linear_logprob_torch
        )
        scores = dict(ref=linear_score_ref, torch=linear_score_torch)
        if gpu:
            ops["triton"], scores["triton"] = linear_logprob_triton, linear_score_triton
        runs = {name: with_backward(op, hidden, weight, targets) for name, op in ops.items()}
        compare(f"log-prob, forward and backward, {sizes}", 3 * product, 3 * traffic, **runs)
        detached = (hidden.detach(), weight.detach(), targets)
        runs = {name: partial(op, *detached) for name, op in ops.items()}
        compare(f"log-prob alone, {sizes}", product, traffic, **runs)
        runs = {name: partial(op, *detached) for name, op in scores.items()}
        compare(f"score, {sizes}", 2 * product, traffic, **runs)


if __name__ == "__main__":
    _benchmark()
