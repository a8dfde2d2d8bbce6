"""Addition and norm, gate, rotation and store: by hand, and against plain PyTorch in the same dtype and in
fp64.
"""

from __future__ import annotations

import math

import pytest
import torch

from kernels.gate import silu_mul, silu_mul_ref, silu_mul_triton
from kernels.norm import add_rms_norm, add_rms_norm_ref, add_rms_norm_triton
from kernels.rotary import Places, rotate_and_store, rotate_and_store_ref, rotate_and_store_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rounded_once(ours, plain, exact):
    """fp32: error (root of the sum of squares) at most twice plain PyTorch's. bf16: within one unit of the
    last place of the fp64 result, since the kernel rounds once (the interpreter cuts off instead of
    rounding).
    """
    assert ours.dtype == plain.dtype
    if ours.dtype == torch.float32:
        error, budget = ((x.double() - exact).norm() for x in (ours, plain))
        assert error <= 2 * budget, f"error {error:.2e} is {error / budget:.2f} times plain PyTorch's"
    else:
        assert ((ours.double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("norm", [add_rms_norm_ref, add_rms_norm_triton, add_rms_norm])
def test_add_rms_norm_by_hand(norm):
    """1 + 2 and 5 - 1: [3, 4] has a mean square of 12.5; with eps = 12.5 the root is 5."""
    x, delta = torch.tensor([[1.0, 5.0]], device=DEVICE), torch.tensor([[2.0, -1.0]], device=DEVICE)
    s, y = norm(x, delta, torch.tensor([1.0, 10.0], device=DEVICE), 12.5)
    assert s.tolist() == [[3, 4]]
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.6, 8.0]]))
    s, y = norm(s, None, torch.tensor([1.0, 10.0], device=DEVICE), 12.5)
    assert s.tolist() == [[3, 4]]
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.6, 8.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 129])
def test_add_rms_norm_matches_specification(width, dtype):
    x, delta, weight = (random(3, width, dtype=dtype, seed=i) for i in range(3))
    weight = weight[0].contiguous()
    s, y = add_rms_norm_triton(x, delta, weight, 1e-6)
    rounded_once(s, x + delta, x.double() + delta.double())
    rounded_once(
        y, *(add_rms_norm_ref(s.to(kind), None, weight.to(kind), 1e-6)[1] for kind in (dtype, torch.float64))
    )


@pytest.mark.parametrize("gate", [silu_mul_ref, silu_mul_triton, silu_mul])
def test_silu_mul_by_hand(gate):
    """silu(0) = 0 and silu(ln 3) = ln 3 · 3/4."""
    y = gate(torch.tensor([[0.0, math.log(3), 7.0, 4.0]], device=DEVICE))
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.0, 3 * math.log(3)]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 1030])
def test_silu_mul_matches_specification(width, dtype):
    gate_up = random(3, 2 * width, dtype=dtype)
    ours = silu_mul_triton(gate_up)
    assert ours.shape == (3, width)
    rounded_once(ours, silu_mul_ref(gate_up), silu_mul_ref(gate_up.double()))


@pytest.mark.parametrize("rotate", [rotate_and_store_ref, rotate_and_store_triton, rotate_and_store])
def test_rotation_by_hand(rotate):
    """Position 3 turns the pair (1, 0) by 3 · π/6, a right angle, to (0, 1). Its slot is page 4's second."""
    qkv = torch.tensor([[1.0, 0.0, 0.0, 1.0, 8.0, 9.0]], device=DEVICE)
    k_pages, v_pages = torch.zeros(2, 5, 2, 1, 2, device=DEVICE).unbind()
    table = torch.tensor([[2, 4]], dtype=torch.int32, device=DEVICE)
    frequency, position = torch.tensor([math.pi / 6], device=DEVICE), torch.tensor([3], device=DEVICE)
    q = rotate(qkv, Places(position, table, frequency, 2), k_pages, v_pages)
    torch.testing.assert_close(q.cpu(), torch.tensor([[[0.0, 1.0]]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(k_pages[4, 1, 0].cpu(), torch.tensor([-1.0, 0.0]), rtol=0, atol=1e-6)
    assert v_pages[4, 1, 0].tolist() == [8, 9]
    k_pages[4, 1] = v_pages[4, 1] = 0
    assert not k_pages.any() and not v_pages.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads, kv_heads, width", [(6, 2, 8), (3, 3, 10)])
def test_rotation_matches_specification(heads, kv_heads, width, norms, dtype):
    """A width that is no power of two, positions at both ends of a page and far away, pages in any order."""
    qkv = random(4, (heads + 2 * kv_heads) * width, dtype=dtype)
    positions = torch.tensor([0, 3, 4, 30], device=DEVICE)
    table = torch.randperm(32, generator=torch.Generator().manual_seed(0)).view(4, 8).int().to(DEVICE)
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, device=DEVICE) / width)
    weights = [random(width, dtype=dtype, seed=i) if norms else None for i in (1, 2)]

    def run(rotate, dtype):
        k_pages, v_pages = torch.zeros(2, 32, 4, kv_heads, width, dtype=dtype, device=DEVICE).unbind()
        cast = [weight if weight is None else weight.to(dtype) for weight in weights]
        q = rotate(qkv.to(dtype), Places(positions, table, frequencies, 4), k_pages, v_pages, *cast)
        return q, k_pages, v_pages

    ours, plain = run(rotate_and_store_triton, dtype), run(rotate_and_store_ref, dtype)
    exact = run(rotate_and_store_ref, torch.float64)
    assert torch.equal(ours[2], plain[2])
    for x, same, truth in zip(ours[:2], plain, exact):
        rounded_once(x, same, truth)
