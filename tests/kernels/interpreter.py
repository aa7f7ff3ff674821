"""Runs a Triton kernel in Triton's own interpreter on numpy arrays: no GPU, no torch.

Added to it are inline assembly (ptx.py) and bfloat16: it has no dot products of it, and cuts where a GPU rounds.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from pallas_kernels.nf4_matmul import Codec, Packed, config
from pallas_kernels.nf4_matmul.triton import few_rows, scratch
from pallas_kernels.nf4_matmul.triton.dequantize import dequantize_kernel
from pallas_kernels.nf4_matmul.triton.forward import forward_kernel
from tests.kernels import ptx

LOCK = threading.Lock()  # what is patched is the process's
POINTERS = {
    "uint8": tl.uint8,
    "int32": tl.int32,
    "uint32": tl.uint32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "float32": tl.float32,
}


def matmul(x: jax.Array, packed: Sequence[Packed], codecs: Sequence[Codec], tiles: config.Tiles) -> np.ndarray:
    """y [M, sum of O] as float32, computed as triton/few_rows.py launches it."""
    rows = x.shape[0]
    out = np.full((rows, sum(codec.shape[0] for codec in codecs)), np.nan, np.asarray(x).dtype)
    table, scale_map, *weights = few_rows.operands(packed, codecs, x.dtype)
    weight_names = [f"{name}_{k}" for k in range(few_rows.MOST) for name in ("codes", "absmax", "nested", "offset")]
    arguments = _named(("table", "scale_map", *weight_names), (table, scale_map, *weights))
    arguments |= {"x": np.array(x), "out": out, "rows": rows} | few_rows.constants(codecs, x.dtype, tiles)
    arguments["DTYPE"] = tl.constexpr(arguments["DTYPE"])
    run(forward_kernel, (few_rows.programs(codecs, tiles),), arguments)
    return out.astype(np.float32)


def dequantize(packed: Packed, codec: Codec, dtype: str) -> np.ndarray:
    """W [O, I] in dtype, computed as triton/scratch.py launches it."""
    out = np.full(codec.shape, np.nan, jnp.dtype(dtype))
    names = ("codes", "table", "absmax", "scale_map", "nested_absmax", "offset")
    arguments = _named(names, scratch.operands(packed, codec)) | {"out": out} | scratch.constants(codec)
    run(dequantize_kernel, (scratch.programs(codec),), arguments)
    return out


def _named(names: Sequence[str], arrays: Sequence[jax.Array | None]) -> dict[str, Any]:
    return {name: None if a is None else np.array(a) for name, a in zip(names, arrays, strict=True)}


def run(kernel: JITFunction, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Runs every program of the grid, one after another; arrays are read and written in place."""
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    values = {name: value if name in constants else _argument(value) for name, value in arguments.items()}
    builder = interpreter.interpreter_builder
    with LOCK, _patched(kernel):
        function = interpreter.InterpretedFunction(kernel.fn).rewrite()
        builder.set_grid_dim(*grid, *[1] * (3 - len(grid)))
        for x in range(grid[0]):
            for y in range(grid[1] if len(grid) > 1 else 1):
                builder.set_grid_idx(x, y, 0)
                function(**values)


@contextlib.contextmanager
def _patched(kernel: JITFunction) -> Iterator[None]:
    """Puts the interpreter in the compiler's place, for this kernel, and takes it out again."""
    builder, patch_language = interpreter.interpreter_builder, interpreter._patch_lang
    added = {"create_inline_asm": _inline_assembly, "create_dot": _dot, "create_fp_trunc": _round, "create_fadd": _add}
    modules = [(module, dict(vars(module))) for module in _modules(kernel)]
    scopes = []

    patched: set[int] = set()

    def patch(function):
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if scopes and languages <= patched:  # each call of a helper asks for it, and pays more than for its own work
            return scopes[-1]
        patched.update(languages)
        scopes.append(patch_language(function))  # the interpreter itself forgets those of helper functions
        # Triton 3.6 to 3.8 make whole numbers of arrays of one value, which numpy 2.4 refuses
        scopes[-1].set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
        return scopes[-1]

    try:
        interpreter._patch_lang = patch
        vars(builder).update(added)
        for module, names in modules:
            for name, value in names.items():
                if isinstance(value, JITFunction):
                    setattr(module, name, interpreter.InterpretedFunction(value.fn))
        patch(kernel.fn)
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()
        for module, names in modules:
            vars(module).update(names)
        for name in added:
            vars(builder).pop(name)
        interpreter._patch_lang = patch_language
        interpreter.InterpretedFunction.rewritten_fn.clear()


def _modules(kernel: JITFunction) -> list[ModuleType]:
    """Where functions that the kernel calls are looked up: its module, those of its helpers, and Triton's own."""
    names = {value.fn.__module__ for value in kernel.fn.__globals__.values() if isinstance(value, JITFunction)}
    names |= {kernel.fn.__module__, tl.__name__, f"{tl.__name__}.standard"}
    return [sys.modules[name] for name in sorted(names)]


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        pointer = tl.pointer_type(POINTERS[value.dtype.name])
        return tl.tensor(interpreter.TensorHandle(np.array([value.ctypes.data], np.uint64), pointer), pointer)
    if isinstance(value, int):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.int32), tl.int32), tl.int32)
    return value


def _inline_assembly(assembly, constraints, values, types, is_pure, pack):
    """One instance of the assembly takes `pack` neighbours of every operand, packed into 32-bit registers."""
    outputs = constraints.split(",").count("=r")
    assert constraints.split(",").count("r") == len(constraints.split(",")) - outputs
    inputs = []
    for value in values:
        flat = np.ascontiguousarray(value.data).reshape(-1)
        words = flat.view(np.uint32).reshape(-1, pack * flat.itemsize // 4)
        inputs += list(words.T)
    results = ptx.run(assembly, inputs, outputs)
    shape, found = values[0].data.shape, []
    for k in range(len(types)):
        mine = results[k * outputs // len(types) : (k + 1) * outputs // len(types)]
        found.append(np.ascontiguousarray(np.stack(mine, axis=-1)).reshape(-1))
    handles = [
        interpreter.TensorHandle(data.view(interpreter._get_np_dtype(kind)).reshape(shape), kind)
        for data, kind in zip(found, [block.scalar for block in types], strict=True)
    ]
    return SimpleNamespace(get_result=handles.__getitem__)


def _dot(a, b, sums, input_precision, max_num_imprecise_acc):
    """Exact products of 16-bit values, summed in float32."""
    left, right = (
        operand.data.view(ml_dtypes.bfloat16) if operand.get_element_ty() == tl.bfloat16 else operand.data
        for operand in (a, b)
    )
    return interpreter.TensorHandle(left.astype(np.float32) @ right.astype(np.float32) + sums.data, tl.float32)


def _add(a, b):
    """The interpreter would add the bits of bfloat16 values."""
    if a.dtype.scalar != tl.bfloat16:
        return interpreter.TensorHandle(a.data + b.data, a.dtype.scalar)
    total = a.data.view(ml_dtypes.bfloat16) + b.data.view(ml_dtypes.bfloat16)
    return interpreter.TensorHandle(total.view(np.uint16), tl.bfloat16)


def _round(source, target):
    """float32 to a narrower type, to the nearest."""
    data, kind = source.data.astype(np.float32), target.scalar
    if kind == tl.bfloat16:
        return interpreter.TensorHandle(data.astype(ml_dtypes.bfloat16).view(np.uint16), kind)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(kind)), kind)
