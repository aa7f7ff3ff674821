"""Compiles the Mosaic kernels for an H200 that is not here: the PTX of each, and what ptxas said of it.

XLA compiles for a described GPU, and Mosaic writes both into the folder that its environment names, one after another.
It reads the environment once in a process, hence a child, one for all products.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Product(NamedTuple):
    """What is compiled: hopper.forward or hopper.backward on shapes."""

    op: str
    rows: int
    shape: tuple[int, int]
    block_size: int
    dtype: str
    nested: bool  # scales are stored in 8 bits
    joined: int = 1  # weights of the shape that share a launch


class Compiled(NamedTuple):
    ptx: Path
    said: str  # by ptxas


def compile_all(products: Sequence[Product], folder: Path) -> dict[Product, Compiled]:
    """Every product's kernel; what Mosaic writes goes into the folder."""
    dumps = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(products)],
        env=os.environ | dumps | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    files = sorted(folder.glob("*.ptx"), key=lambda file: int(file.stem.rpartition("_")[2]))  # NAME_0, NAME_1, ...
    return {
        product: Compiled(file, file.with_suffix(".ptxas").read_text())
        for product, file in zip(products, files, strict=True)
    }


def _compile(product: Product) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.nf4_matmul import Codec, Packed
    from pallas_kernels.nf4_matmul.mosaic import few_rows, hopper
    from qlora_jax.planning.gpus import GPUS
    from qlora_jax.planning.topology import compile_for, on_gpu

    array = jax.ShapeDtypeStruct
    O, I = product.shape
    codec = Codec((O, I), product.block_size, tuple(k / 8 - 1 for k in range(16)), (0.0,) * 256)
    codes, scales = array((O * I // 2,), jnp.uint8), O * I // product.block_size
    packed = Packed(codes, array((scales,), jnp.float32), None, None)
    if product.nested:
        nested = array((scales // 256,), jnp.float32), array((), jnp.float32)
        packed = Packed(codes, array((scales,), jnp.uint8), *nested)
    x = array((product.rows, I if product.op == "forward" else O), product.dtype)
    if product.joined > 1:
        weights, codecs = product.joined * (packed,), product.joined * (codec,)
        function, operand = (lambda x, weights: few_rows.forward_joined(x, weights, codecs)), weights
    else:
        kernel = getattr(hopper, product.op)
        function, operand = (lambda x, packed: kernel(x, packed, codec)), packed
    compile_for(GPUS["h200"], function, *on_gpu(GPUS["h200"], (x, operand)), assembled=True)


if __name__ == "__main__":
    for op, rows, shape, *others in json.loads(sys.argv[1]):
        _compile(Product(op, rows, tuple(shape), *others))
