"""The LM head: log-prob and entropy of every token, or the gradient at the hidden state, without the [T, V] logits.

    z_t = W h_t / temperature       p_t = softmax z_t       lse_t = log Σ_v exp z_tv
    logprob_t = z_t[target_t] - lse_t                       entropy_t = lse_t - Σ_v p_tv z_tv
    ∂ logprob_t / ∂ h_t = (W[target_t] - Wᵀ p_t) / temperature                                 `linear_score`, at 1
    ∂ L / ∂ W = Σ_t c_t (onehot(target_t) - p_t) h_tᵀ / temperature                            c_t = ∂ L / ∂ logprob_t

Letters: T tokens, D width, V vocabulary, C tokens of one chunk.

Costs. Naive: the logits and their log-softmax are kept for the backward, 2 to 4 times 4 T V bytes (4096 × 152k: 2.5 GB each).
Here: one chunk of logits at a time, in the forward and again in the backward, and one number per token (lse) between
them. A product of 2 T D V FLOP is done once in the forward and three times in the backward (logits again, ∂h, ∂W), 4 in all
against the naive 3. Each chunk reads W once and adds to ∂W once, about 12 D V bytes; on an H200 (790 TFLOP/s over 4.3 TB/s)
that equals its arithmetic at C = 370, so C = 2048 keeps it under a fifth. A smaller C saves memory and loses time: at 64
chunks of 64 tokens W is what is read. On a CPU logits that outgrow the cache cost page faults: there C V is held to
CPU_LOGITS, but C to no less than 256.

The products are cuBLAS's; what is fused is the row: a Triton program reads a row of logits once and has lse, logprob and
entropy, another turns a row of logits into c (onehot - p) / temperature for the two products of the backward.

    python -m kernels.logprob       the benchmark
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2048
CPU_LOGITS = 1 << 21  # elements: 8 MB of fp32


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_logprob`: all logits at once, differentiated by autograd."""
    logprobs = (_upcast(hidden @ weight.T) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy.detach()


def linear_score_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `linear_score`: the gradient at the hidden states, by autograd."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logprob, _ = linear_logprob_ref(hidden, weight.detach(), targets)
        (score,) = torch.autograd.grad(logprob.sum(), hidden)
    return logprob.detach(), _upcast(score)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = CHUNK if hidden.is_cuda else max(256, CPU_LOGITS // len(weight))
    for start in range(0, max(len(hidden), 1), size):  # no tokens are one empty chunk
        yield slice(start, start + size)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64 for fp64), whatever the operands: cuBLAS keeps the accumulator, a CPU rounds first."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return _upcast(a @ b)


def _rows_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of logits [C, V] -> logprob, entropy, lse [C]."""
    z = logits if temperature == 1 else logits / temperature
    logprobs = z.log_softmax(-1)
    logprob = logprobs.gather(-1, targets[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
    return logprob, entropy, z.gather(-1, targets[:, None])[:, 0] - logprob


def _residual_torch(logits: Tensor, targets: Tensor, lse: Tensor, coef: Tensor, temperature: float) -> Tensor:
    """One chunk of logits [C, V] -> coef (onehot - p) / temperature, written over the logits."""
    p = logits.div_(temperature).sub_(lse[:, None]).exp_()
    p.mul_(-coef[:, None] / temperature)
    return p.scatter_add_(-1, targets[:, None], coef[:, None] / temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        rows = []
        for chunk in _chunks(hidden, weight):
            rows.append(_rows_torch(_matmul(hidden[chunk], weight.T), targets[chunk], temperature))
        logprob, entropy, lse = (torch.cat(column) for column in zip(*rows))
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in fp32: bf16 would drop what is small beside the sum so far
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden, weight):
            logits = _matmul(hidden[chunk], weight.T)
            residual = _residual_torch(logits, targets[chunk], lse[chunk], grad_logprob[chunk], ctx.temperature)
            residual = residual.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = residual @ weight
            if grad_weight is not None:
                grad_weight += _matmul(residual.T, hidden[chunk])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy of each distribution, under softmax(hidden weightᵀ / temperature).

    hidden   [T, D], the states that predict the targets; weight [V, D] of the same dtype; targets [T] int64
    returns  logprob [T], entropy [T] in nats, both fp32 (fp64 for fp64 inputs). Gradients reach hidden and weight through
             logprob; entropy carries none: it is a number to log, not a bonus to train on
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


@torch.no_grad()
def linear_score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and its gradient at the hidden state, in one pass over the LM head, at temperature 1.

    hidden   [T, D]; weight [V, D] of the same dtype; targets [T] int64
    returns  logprob [T], score [T, D] = weight[target] - softmax(hidden weightᵀ) weight; both fp32 (fp64 for fp64 inputs)
    """
    logprob = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    score = torch.empty(hidden.shape, dtype=logprob.dtype, device=hidden.device)
    for chunk in _chunks(hidden, weight):
        logits = _matmul(hidden[chunk], weight.T)
        logprob[chunk], _, lse = _rows_torch(logits, targets[chunk], 1.0)
        residual = _residual_torch(logits, targets[chunk], lse, torch.ones_like(lse), 1.0)
        score[chunk] = _matmul(residual.to(weight.dtype), weight)
    return logprob, score
