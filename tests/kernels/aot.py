"""Compile a Triton kernel for a GPU that is not there, and read what came out."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one program may have


@dataclass
class Compiled:
    """What the assembler made of one kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers, or local arrays
    shared: int  # bytes per program
    ptx: str = field(repr=False)

    @property
    def tensor_cores(self) -> str:
        """ "wgmma" (sm_90: operands straight from shared memory), "mma" or ""."""
        found = re.search(r"\b(wgmma|mma)\.", self.ptx)
        return found[1] if found else ""


def compile_for(
    kernel,
    signature: dict[str, str],
    constexprs: dict[str, object],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compiles `kernel` for sm_`arch`; needs neither driver nor GPU, but a process without TRITON_INTERPRET.

    signature   name -> "*bf16", "*fp32", "*i32", "i32", "fp32", … of every argument that is no constexpr
    constexprs  name -> value

    Pointers and, as at a launch with friendly sizes, i32 arguments are declared multiples of 16 unless the
    kernel says do_not_specialize: without that, loads are not vectorised and asynchronous copies not used.
    """
    assert os.environ.get("TRITON_INTERPRET") != "1", (
        "this process interprets kernels: start it with THINKRL_AOT=1"
    )
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    assert not missing, f"{kernel.__name__}: no type and no value for {sorted(missing)}"
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(index[name],): value for name, value in constexprs.items()},
        attrs={
            (index[name],): [["tt.divisibility", 16]]
            for name, t in signature.items()
            if t[0] == "*" or (t == "i32" and not kernel.params[index[name]].do_not_specialize)
        },
    )
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(registers, stack, made.metadata.shared, made.asm["ptx"])


def check(made: Compiled, arch: int, local: int = 0) -> None:
    """Assert that nothing spills, and that the chip has the shared memory. local: bytes of local arrays per
    thread.
    """
    assert made.stack <= local, f"{made.stack} bytes of stack per thread at {made.registers} registers"
    limit = SHARED_LIMIT[arch]
    assert made.shared <= limit, f"{made.shared} bytes of shared memory, where sm_{arch} has {limit}"
