"""Every kernel, as it is launched, compiled for A100 (sm_80) and H100/H200 (sm_90).

Nothing spilled, shared memory that the chip has, tensor cores where there is a product. Runs without a GPU,
in a process of its own (see conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from aot import check, compile_for

from kernels import attention, fisher, gate, logprob, norm, rotary, sample

ARCHS = (80, 90)
HEADS = dict(H=28, HKV=4, UPCAST=False)  # Qwen2.5-7B: seven query heads to a key head
POINTER = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def tiles(kernel: str, width: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """The shipped table's tile sizes and launch options."""
    config = attention.tiles(kernel, width, dtype)
    return config, {name: config.pop(name) for name in ("num_warps", "num_stages")}


def expected_cores(dtype: torch.dtype, arch: int, rows: int) -> str:
    """fp32 products stay on the ordinary cores, for precision; wgmma wants 64 rows."""
    return "" if dtype == torch.float32 else "wgmma" if arch == 90 and rows >= 64 else "mma"


SHAPES = [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width, dtype", SHAPES)
@pytest.mark.parametrize("name", ["forward", "backward_kv", "backward_q"])
def test_packed_attention(name, width, dtype, arch):
    x, scalars = POINTER[dtype], dict(S="i32", T="i32", scale="fp32")
    signature = dict(q_ptr=x, k_ptr=x, v_ptr=x, lse_ptr="*fp32", cu_ptr="*i32", **scalars)
    signature |= dict(o_ptr=x) if name == "forward" else dict(do_ptr=x, delta_ptr="*fp32")
    signature |= {"forward": {}, "backward_kv": dict(dk_ptr=x, dv_ptr=x), "backward_q": dict(dq_ptr=x)}[name]
    config, options = tiles(name, width, dtype)
    kernel = getattr(attention, f"_packed_{name}_kernel")
    made = compile_for(kernel, signature, dict(D=width, **HEADS, **config), arch, **options)
    check(made, arch)
    rows = config["BLOCK_N" if name == "backward_kv" else "BLOCK_M"]
    assert made.tensor_cores == expected_cores(dtype, arch, rows)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width, dtype", SHAPES)
@pytest.mark.parametrize("name, split", [("decode", 0), ("decode", attention.SPLIT), ("extend", 0)])
def test_paged_attention(name, split, width, dtype, arch):
    x = POINTER[dtype]
    signature = dict(q_ptr=x, k_ptr=x, v_ptr=x, table_ptr="*i32", lengths_ptr="*i32", cu_ptr="*i32")
    signature |= dict(o_ptr="*fp32" if split else x, lse_ptr="*fp32")
    signature |= dict(S="i32", T="i32", table_stride="i32", scale="fp32")
    config, options = tiles(name, width, dtype)
    shape = dict(D=width, PAGE=16, SPLIT=split, DECODE=name == "decode", **HEADS, **config)
    made = compile_for(attention._paged_kernel, signature, shape, arch, **options)
    check(made, arch)
    assert made.tensor_cores == expected_cores(dtype, arch, config["BLOCK_M"])


LOGPROB = dict(logits_ptr="*fp32", targets_ptr="*i64", lse_ptr="*fp32", V="i32", scale="fp32")
SAMPLE = dict(logits_ptr="*fp32", keys_ptr="*i64", positions_ptr="*i64", token_ptr="*i64")
SAMPLE |= dict(logprob_ptr="*fp32", lse_ptr="*fp32", V="i32", scale="fp32")
ROTATE = dict(
    qkv_ptr="*bf16", positions_ptr="*i64", table_ptr="*i32", frequency_ptr="*fp32", q_weight_ptr="*bf16"
)
ROTATE |= dict(
    k_weight_ptr="*bf16", k_ptr="*bf16", v_ptr="*bf16", q_ptr="*bf16", table_stride="i32", eps="fp32"
)
ROTATE_SHAPE = dict(H=28, HKV=4, D=128, PAGE=16, BLOCK=64)
POINTWISE = {
    "delta": (
        attention._delta_kernel,
        dict(o_ptr="*bf16", do_ptr="*bf16", delta_ptr="*fp32", T="i32"),
        dict(H=28, D=128, BLOCK_D=128, BLOCK_M=64),
    ),
    "combine": (
        attention._combine_kernel,
        dict(partial_ptr="*fp32", lse_ptr="*fp32", lengths_ptr="*i64", o_ptr="*bf16", rows="i32"),
        dict(H=28, D=128, SPLIT=attention.SPLIT, BLOCK_D=128),
    ),
    "rows": (
        logprob._rows_kernel,
        LOGPROB | dict(logprob_ptr="*fp32", entropy_ptr="*fp32"),
        dict(BLOCK=4096),
    ),
    "residual": (
        logprob._residual_kernel,
        LOGPROB | dict(coef_ptr="*fp32", out_ptr="*bf16"),
        dict(BLOCK=4096),
    ),
    "draw": (sample._sample_kernel, SAMPLE, dict(GREEDY=False, BLOCKS=64, BLOCK=4096)),
    "greedy": (sample._sample_kernel, SAMPLE, dict(GREEDY=True, BLOCKS=64, BLOCK=4096)),
    "norm": (
        norm._add_rms_norm_kernel,
        dict(
            x_ptr="*bf16", delta_ptr="*bf16", weight_ptr="*bf16", sum_ptr="*bf16", y_ptr="*bf16", eps="fp32"
        ),
        dict(D=3584, ADD=True, BLOCK=4096),
    ),
    "gate": (
        gate._silu_mul_kernel,
        dict(gate_up_ptr="*bf16", y_ptr="*bf16"),
        dict(WIDTH=18_944, BLOCK=gate.BLOCK),
    ),
    "rotate": (rotary._rotate_and_store_kernel, ROTATE, dict(NORM=False, **ROTATE_SHAPE)),
    "rotate_and_norm": (rotary._rotate_and_store_kernel, ROTATE, dict(NORM=True, **ROTATE_SHAPE)),
}
# num_warps as each is launched; 8 where none is given
WARPS = {"combine": 1, "norm": 4, "gate": 4, "rotate": 1, "rotate_and_norm": 1}
# CUDA's cos and sin reduce a large angle by a product of 7 words, a local array, in some versions of Triton.
LOCAL = {"rotate": 32, "rotate_and_norm": 32}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, arch):
    made = compile_for(*POINTWISE[name], arch, num_warps=WARPS.get(name, 8))
    check(made, arch, LOCAL.get(name, 0))
    assert made.tensor_cores == ""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", POINTER)
@pytest.mark.parametrize("power, weighted", [(1, True), (2, True), (2, False)])
def test_episode_quadratic(power, weighted, dtype, arch):
    x, ints = POINTER[dtype], dict(K="i32", D1="i32", D2="i32", episodes_per_program="i32")
    signature = dict(x_ptr=x, g_ptr=x, cu_ptr="*i64", weight_ptr="*fp32", partial_ptr="*fp32", **ints)
    config = dict(fisher.QUADRATIC_TILES[dtype.itemsize])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    shape = dict(POWER=power, WEIGHTED=weighted, UPCAST=False, **config)
    made = compile_for(fisher._quadratic_kernel, signature, shape, arch, **options)
    check(made, arch)
    assert made.tensor_cores == expected_cores(dtype, arch, config["BLOCK_D2"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", POINTER)
def test_ghost_norm(dtype, arch):
    x = POINTER[dtype]
    signature = dict(x_ptr=x, g_ptr=x, cu_ptr="*i64", partial_ptr="*fp32", D1="i32", D2="i32")
    config = dict(fisher.GHOST_TILES[dtype.itemsize])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    made = compile_for(fisher._ghost_kernel, signature, dict(UPCAST=False, **config), arch, **options)
    check(made, arch)
    assert made.tensor_cores == expected_cores(dtype, arch, config["BLOCK_T"])


def test_sizes_that_vary_compile_nothing_anew():
    """Triton compiles a kernel again for an integer that is 1, and for one that is a multiple of 16."""
    found = set()
    for module in (attention, fisher, gate, logprob, norm, rotary, sample):
        for name, kernel in vars(module).items():
            for parameter in getattr(kernel, "params", []) if name.endswith("_kernel") else []:
                if parameter.name in ("S", "T", "K", "rows", "table_stride", "episodes_per_program"):
                    assert parameter.do_not_specialize, f"{name}: {parameter.name}"
                    found.add(parameter.name)
    assert found == {"S", "T", "K", "rows", "table_stride", "episodes_per_program"}


def test_check_sees_a_spill():
    """128 by 128 tiles in four warps need more registers than there are: the check must notice."""
    x = "*bf16"
    signature = dict(
        q_ptr=x, k_ptr=x, v_ptr=x, o_ptr=x, lse_ptr="*fp32", cu_ptr="*i32", S="i32", T="i32", scale="fp32"
    )
    shape = dict(D=128, BLOCK_D=128, BLOCK_M=128, BLOCK_N=128, **HEADS)
    made = compile_for(attention._packed_forward_kernel, signature, shape, 80, num_warps=4, num_stages=1)
    with pytest.raises(AssertionError, match="of stack per thread"):
        check(made, 80)
