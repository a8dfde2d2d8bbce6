"""Packed and paged attention against their specifications, and these against a case computed by hand and
fp64.
"""

from __future__ import annotations

import math

import pytest
import torch

from kernels.attention import (
    packed_attention,
    packed_attention_ref,
    packed_attention_torch,
    packed_attention_triton,
    paged_attention,
    paged_attention_ref,
    paged_attention_torch,
    paged_attention_triton,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = [packed_attention_torch, packed_attention_triton]
PAGED = [paged_attention_torch, paged_attention_triton]
FP32, BF16 = torch.float32, torch.bfloat16
# 1, 2, 6, 7 query heads to a key head
CASES = [(FP32, 2, 2), (FP32, 4, 2), (FP32, 6, 1), (FP32, 7, 1), (BF16, 6, 2)]


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def random_row(lengths, heads, kv_heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, h, width, generator=generator) for h in (heads, kv_heads, kv_heads))
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), cumulative(lengths)


def within_twice(ours, plain, exact):
    """Error (root of the sum of squares) at most twice what plain PyTorch makes in the same dtype, against
    fp64.
    """
    error, budget = ((x.double() - exact).norm() for x in (ours, plain))
    assert error <= 2 * budget, f"error {error:.2e} is {error / budget:.2f} times plain PyTorch's"


def with_gradients(attention, q, k, v, cu_seqlens, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    output = attention(*inputs, cu_seqlens)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("attention", [packed_attention_ref, *PACKED, packed_attention])
def test_packed_by_hand(attention):
    """Width 1. First token: its own value. Second: score 3 ln 3 · k over sqrt(1), weights 1 : 3 after
    softmax.
    """
    ln3 = math.log(3.0)
    q = torch.tensor([5.0, ln3, 7.0], device=DEVICE).view(3, 1, 1)
    k = torch.tensor([0.0, 1.0, 2.0], device=DEVICE).view(3, 1, 1)
    v = torch.tensor([10.0, 20.0, -4.0], device=DEVICE).view(3, 1, 1)
    output = attention(q, k, v, cumulative([2, 1])).flatten()
    torch.testing.assert_close(output.cpu(), torch.tensor([10.0, 0.25 * 10 + 0.75 * 20, -4.0]))


def test_gradients_of_the_specification():
    q, k, v, cu_seqlens = (x.cpu() for x in random_row([3, 1, 4], 4, 2, 2))
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: packed_attention_ref(*x, cu_seqlens), inputs)
    assert torch.autograd.gradcheck(lambda *x: packed_attention_torch(*x, cu_seqlens), inputs)


@pytest.mark.parametrize("attention", PACKED)
@pytest.mark.parametrize("dtype, heads, kv_heads", CASES)
def test_packed_matches_specification(dtype, heads, kv_heads, attention):
    """Lengths below, at and above a tile, two of them 1; a width that is no power of two."""
    q, k, v, cu_seqlens = random_row([1, 16, 33, 1, 5], heads, kv_heads, 24, dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    exact = with_gradients(packed_attention_ref, *(x.double() for x in (q, k, v)), cu_seqlens, grad.double())
    plain = with_gradients(packed_attention_ref, q, k, v, cu_seqlens, grad)
    for ours, same, truth in zip(with_gradients(attention, q, k, v, cu_seqlens, grad), plain, exact):
        assert ours.dtype == dtype
        within_twice(ours, same, truth)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("attention", PACKED)
def test_packed_strangers_do_not_meet(attention):
    """NaN in one sequence stays there, in both directions."""
    q, k, v, cu_seqlens = random_row([5, 9, 4], 2, 1, 16)
    clean = with_gradients(attention, q, k, v, cu_seqlens, torch.ones_like(q))
    for x in (q, k, v):
        x[5:14] = float("nan")
    dirty = with_gradients(attention, q, k, v, cu_seqlens, torch.ones_like(q))
    for before, after in zip(clean, dirty):
        assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
        assert after[5:14].isnan().all()


@pytest.mark.parametrize("attention", PACKED)
def test_packed_repeats_to_the_bit(attention):
    q, k, v, cu_seqlens = random_row([18, 3], 2, 1, 16)
    grad = torch.randn_like(q)
    first, second = (with_gradients(attention, q, k, v, cu_seqlens, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def paged_case(lengths, counts, heads, kv_heads, width, dtype=torch.float32, page_size=4, seed=0):
    """Random pages in random order. What no query may see is NaN: slots past the end, and pages nobody owns.

    Unused entries of the table point at page 0, one of the poisoned ones.
    """
    generator = torch.Generator().manual_seed(seed)
    owned = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(owned), generator=generator) + 1
    shape = (sum(owned) + 2, page_size, kv_heads, width)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    table = torch.zeros(len(lengths), max(owned) + 1, dtype=torch.int32)
    for x in (k, v):
        x[0] = x[-1] = float("nan")
    for s, (length, pages) in enumerate(zip(lengths, order.split(owned))):
        table[s, : len(pages)] = pages
        for x in (k, v):
            x[pages[-1], length - (len(pages) - 1) * page_size :] = float("nan")
    q = torch.randn(sum(counts), heads, width, generator=generator)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    return (
        q,
        k,
        v,
        table.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        cumulative(counts),
    )


@pytest.mark.parametrize("attention", [paged_attention_ref, *PAGED, paged_attention])
def test_paged_by_hand(attention):
    """Three tokens in pages 1 and 0 of size 2, one query that likes all keys equally: the mean of the
    values.
    """
    v = torch.tensor([[9.0, float("nan")], [1.0, 2.0]], device=DEVICE).view(2, 2, 1, 1)
    k = torch.where(v.isnan(), v, 0.0)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE)
    length = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    q = torch.ones(1, 1, 1, device=DEVICE)
    assert attention(q, k, v, table, length).item() == pytest.approx((1 + 2 + 9) / 3)
    # the last two tokens as queries: the earlier sees the first two tokens only
    both = attention(q.expand(2, 1, 1).contiguous(), k, v, table, length, cumulative([2]))
    assert both.flatten().tolist() == pytest.approx([(1 + 2) / 2, (1 + 2 + 9) / 3])


@pytest.mark.parametrize("attention", PAGED)
@pytest.mark.parametrize("dtype, heads, kv_heads", CASES)
@pytest.mark.parametrize("counts", [None, [1, 5, 4, 1, 19]], ids=["decode", "extend"])
def test_paged_matches_specification(counts, dtype, heads, kv_heads, attention):
    """A context of one token, a full last page, a context that is all queries; everything unseen is NaN."""
    *arrays, cu_seqlens = paged_case([1, 17, 4, 30, 23], counts or [1] * 5, heads, kv_heads, 24, dtype)
    cu_seqlens = None if counts is None else cu_seqlens
    exact = paged_attention_ref(*(x.double() if x.is_floating_point() else x for x in arrays), cu_seqlens)
    ours = attention(*arrays, cu_seqlens)
    assert ours.dtype == dtype and not exact.isnan().any()
    within_twice(ours, paged_attention_ref(*arrays, cu_seqlens), exact)


@pytest.mark.parametrize("split", [16, 32, 1024])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_paged_splits_agree(split, kind, monkeypatch):
    """Contexts of 64, 9, 16 and 33 tokens in parts of 16 or 32: a row has as many parts as it fills."""
    q, k, v, table, lengths, _ = paged_case([64, 9, 16, 33], [1] * 4, 6, 1, 16)
    monkeypatch.setattr("kernels.attention.SPLIT", split)
    ours = paged_attention_triton(q, k, v, table, lengths.to(kind))
    torch.testing.assert_close(ours, paged_attention_ref(q, k, v, table, lengths), rtol=0, atol=2e-6)


def test_paged_sums_do_not_depend_on_the_width_of_the_table(monkeypatch):
    """A row decodes to the same bits beside a longer one, and in a table made wider than any row needs."""
    q, k, v, table, lengths, _ = paged_case([40, 9], [1] * 2, 2, 1, 16)
    monkeypatch.setattr("kernels.attention.SPLIT", 16)
    wide = torch.cat([table, torch.zeros_like(table)], 1)
    together = paged_attention_triton(q, k, v, wide, lengths)
    alone = paged_attention_triton(q[1:], k, v, table[1:], lengths[1:])
    assert torch.equal(together, paged_attention_triton(q, k, v, table, lengths))
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("attention", PAGED)
def test_decode_is_the_last_row_of_packed(attention):
    """The two operations are one: pages filled with a packed row, its last token asked again."""
    lengths, page_size = [6, 11], 4
    q, k, v, cu_seqlens = random_row(lengths, 4, 2, 16)
    table = torch.tensor([[4, 1, 0], [2, 0, 3]], dtype=torch.int32, device=DEVICE)
    pages = [torch.zeros(5, page_size, 2, 16, device=DEVICE) for _ in range(2)]
    for s, length in enumerate(lengths):
        for j in range(length):
            for pool, x in zip(pages, (k, v)):
                pool[table[s, j // page_size], j % page_size] = x[cu_seqlens[s] + j]
    last = cu_seqlens[1:].long() - 1
    ours = attention(q[last], *pages, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(ours, packed_attention_ref(q, k, v, cu_seqlens)[last], rtol=0, atol=2e-6)


def test_shapes_must_fit():
    q, k, v, cu_seqlens = random_row([3], 5, 2, 8)
    with pytest.raises(ValueError, match="multiple of their heads"):
        packed_attention(q, k, v, cu_seqlens)
    with pytest.raises(ValueError, match="share head width and dtype"):
        packed_attention(q[:, :4], k, v.double(), cu_seqlens)
