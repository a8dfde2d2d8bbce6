"""The LM head in chunks: values, gradients and scores against the specification, by hand, by autograd and
in fp64.
"""

from __future__ import annotations

import math

import pytest
import torch

from kernels import logprob as module
from kernels.logprob import (
    linear_logprob,
    linear_logprob_ref,
    linear_logprob_torch,
    linear_logprob_triton,
    linear_score,
    linear_score_ref,
    linear_score_torch,
    linear_score_triton,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGPROB = [linear_logprob_torch, linear_logprob_triton]
SCORE = [linear_score_torch, linear_score_triton]
# one token and one word, below, at and above a block of the row kernel (4096)
SHAPES = [(1, 3, 1), (5, 16, 64), (21, 8, 1000), (25, 8, 4096), (25, 8, 4100)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Eight tokens to a chunk, so that small shapes have several, and a last one that is not full."""
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "CPU_CHUNK", 8)
    monkeypatch.setattr(module, "CPU_LOGITS", 0)


def random_head(tokens, width, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def within_twice(ours, plain, exact):
    """Error (root of the sum of squares) at most twice what plain PyTorch makes in the same dtype, against
    fp64.

    Plus one ulp of an fp32 result: with few numbers, plain PyTorch may by luck make no error at all.
    """
    error, budget = ((x.double() - exact).norm() for x in (ours, plain))
    assert error <= 2 * budget + 2.0**-23 * exact.norm(), f"error {error:.2e}, plain PyTorch's {budget:.2e}"


def with_gradients(op, hidden, weight, targets, temperature, coef):
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logprob, entropy = op(*inputs, targets, temperature)
    assert logprob.requires_grad and not entropy.requires_grad
    return logprob.detach(), entropy, *torch.autograd.grad(logprob, inputs, coef.to(logprob.dtype))


@pytest.mark.parametrize("op", [linear_logprob_ref, *LOGPROB, linear_logprob])
def test_logprob_by_hand(op):
    """Logits ln 1, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8; at temperature 1/2 they are 1/30, 4/30,
    25/30.
    """
    hidden = torch.ones(2, 1, device=DEVICE)
    weight = torch.tensor([[1.0], [2.0], [5.0]], device=DEVICE).log()
    targets = torch.tensor([1, 2], device=DEVICE)
    for temperature, p in ((1.0, [1 / 8, 2 / 8, 5 / 8]), (0.5, [1 / 30, 4 / 30, 25 / 30])):
        logprob, entropy = op(hidden, weight, targets, temperature)
        assert logprob.tolist() == pytest.approx([math.log(p[1]), math.log(p[2])])
        assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in p)] * 2)


@pytest.mark.parametrize("op", [linear_score_ref, *SCORE, linear_score])
def test_score_by_hand(op):
    """Two words, e1 and e2, equally likely: the score of word 0 is e1 - (e1 + e2) / 2."""
    logprob, score = op(
        torch.zeros(1, 2, device=DEVICE), torch.eye(2, device=DEVICE), torch.tensor([0], device=DEVICE)
    )
    assert logprob.item() == pytest.approx(math.log(0.5))
    assert score.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("op", [linear_logprob_ref, linear_logprob_torch])
def test_gradients_in_fp64(op):
    hidden, weight, targets = (x.cpu() for x in random_head(11, 3, 5, torch.float64))
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda hidden, weight: op(hidden, weight, targets, 0.7)[0], inputs)


@pytest.mark.parametrize("op", LOGPROB)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width, vocab", SHAPES)
def test_logprob_matches_specification(tokens, width, vocab, dtype, op):
    hidden, weight, targets = random_head(tokens, width, vocab, dtype)
    coef = torch.randn(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = with_gradients(linear_logprob_ref, hidden.double(), weight.double(), targets, 0.7, coef)
    plain = with_gradients(linear_logprob_ref, hidden, weight, targets, 0.7, coef)
    ours = with_gradients(op, hidden, weight, targets, 0.7, coef)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
    for x, same, truth in zip(ours, plain, exact):
        within_twice(x, same, truth)


@pytest.mark.parametrize("op", SCORE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width, vocab", SHAPES)
def test_score_matches_specification(tokens, width, vocab, dtype, op):
    hidden, weight, targets = random_head(tokens, width, vocab, dtype)
    exact = linear_score_ref(hidden.double(), weight.double(), targets)
    for x, same, truth in zip(op(hidden, weight, targets), linear_score_ref(hidden, weight, targets), exact):
        assert x.dtype == torch.float32 and not x.requires_grad
        within_twice(x, same, truth)


def test_no_tokens():
    hidden, weight, targets = random_head(0, 4, 7)
    assert [x.shape for x in linear_logprob(hidden, weight, targets)] == [(0,), (0,)]
    assert [x.shape for x in linear_score(hidden, weight, targets)] == [(0,), (0, 4)]


@pytest.mark.parametrize("op", LOGPROB)
def test_confident_and_impossible_targets(op):
    """A logit gap of 200 is far outside exp's range: log-prob 0 or -200, entropy 0, gradients finite."""
    hidden = torch.tensor([[100.0], [100.0]], device=DEVICE)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    coef = torch.ones(2, device=DEVICE)
    logprob, entropy, *grads = with_gradients(
        op, hidden, weight, torch.tensor([0, 1], device=DEVICE), 1.0, coef
    )
    assert logprob.tolist() == [0.0, -200.0] and entropy.tolist() == [0.0, 0.0]
    assert grads[0].tolist() == [[0.0], [-2.0]] and grads[1].tolist() == [[-100.0], [100.0]]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradients_that_are_asked_for(frozen):
    hidden, weight, targets = random_head(10, 4, 7)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    linear_logprob(hidden, weight, targets)[0].sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_all_logits_never_exist():
    """Forward and backward over 40 chunks, watched: the largest tensor ever saved or made has one chunk's
    logits.
    """
    hidden, weight, targets = random_head(320, 4, 50)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)
            )
            return out

    weight.requires_grad_()
    with Watch():
        linear_logprob_torch(hidden, weight, targets)[0].sum().backward()
    assert max(made) <= max(8 * 50, hidden.numel(), weight.numel())
