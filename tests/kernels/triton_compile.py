"""Compiles the Triton kernels to machine code for a GPU that is not here, and reads what the code takes."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.nf4_matmul import Codec, config
from pallas_kernels.nf4_matmul.triton import few_rows, scratch
from pallas_kernels.nf4_matmul.triton.dequantize import dequantize_kernel
from pallas_kernels.nf4_matmul.triton.forward import forward_kernel
from pallas_kernels.nf4_matmul.triton.launch import backend_options

CUOBJDUMP = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTER = {"bfloat16": "*bf16", "float16": "*fp16"}


class Machine(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread
    stack: int  # bytes a thread spills
    shared: int  # bytes a program
    instructions: Counter  # by name, over the whole code
    loop: Counter  # by name, of one turn of the longest loop
    wide_stores: int  # of 16 bytes a thread, to global memory

    @property
    def total(self) -> int:
        return self.instructions.total() - self.instructions["NOP"]


def compile_forward(
    codecs: Sequence[Codec], dtype: str, tiles: config.Tiles, compute_capability: int, double_quant: bool = True
) -> Machine:
    types = {"x": POINTER[dtype], "table": "*u32"}
    types["scale_map"], *nested = ["*fp32" if double_quant else "constexpr"] * 3
    for k in range(few_rows.MOST):
        kinds = ["*u8", "*u8" if double_quant else "*fp32", *nested] if k < len(codecs) else ["constexpr"] * 4
        names = (f"{name}_{k}" for name in ("codes", "absmax", "nested", "offset"))
        types |= dict(zip(names, kinds, strict=True))
    types |= {"out": POINTER[dtype], "rows": "i32"}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    constants = few_rows.constants(codecs, jnp.dtype(dtype), tiles)
    options |= backend_options(compute_capability)
    return compile_kernel(forward_kernel, types, constants, options, compute_capability)


def compile_dequantize(codec: Codec, dtype: str, compute_capability: int, double_quant: bool = True) -> Machine:
    types = {"codes": "*u8", "table": "*fp32", **_scale_types(double_quant), "out": POINTER[dtype]}
    options = {"num_warps": scratch.WARPS, "num_stages": 1}
    options |= backend_options(compute_capability)
    return compile_kernel(dequantize_kernel, types, scratch.constants(codec), options, compute_capability)


def _scale_types(double_quant: bool) -> dict[str, str]:
    nested = dict.fromkeys(("scale_map", "nested_absmax", "offset"), "*fp32" if double_quant else "constexpr")
    return {"absmax": "*u8" if double_quant else "*fp32", **nested}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict, options: dict, compute_capability: int
) -> Machine:
    """types: Triton's, of each argument that is no constant; "constexpr" is None. options: the compiler's."""
    constants = constants | {name: None for name, kind in types.items() if kind == "constexpr"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [k for k, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(kernel, signature, constants, {(k,): [["tt.divisibility", 16]] for k in pointers})
    compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)([^;]*);", code)
    instructions = [(int(address, 16), name, rest) for address, name, rest in lines]
    loops = [
        Counter(name for at, name, _ in instructions if int(target[1], 16) <= at <= address)
        for address, name, rest in instructions
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < address
    ]
    longest = max(loops, key=Counter.total, default=Counter())
    total = Counter(name for _, name, _ in instructions)
    return Machine(
        int(found[1]), int(found[2]), compiled.metadata.shared, total, longest, len(re.findall(r"STG\S*\.128", code))
    )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout
