"""Times a product's forms side by side in one run: interleaved, medians, beside ceilings that the same run measured.

A program computes the product once for each of several copies of the weight, so that a GPU's cache does not keep
them and starting the program does not count.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import api, config
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed, dequantize
from pallas_kernels.nf4_matmul.shapes import Shape

Run = Callable[[], Any]  # starts a computation; what it returns has been computed when jax.block_until_ready says so


class Case(NamedTuple):
    """One product to time."""

    op: config.Op
    shape: Shape
    rows: int
    block_size: int
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.shape.out_features * self.shape.in_features

    @property
    def activation_bytes(self) -> int:
        return self.rows * (self.shape.out_features + self.shape.in_features) * jnp.dtype(self.dtype).itemsize


def random_packed(codec: Codec, seed: int) -> Packed:
    """Random codes and double-quantized scales: speed does not depend on values."""
    rng = np.random.default_rng(seed)
    values = codec.shape[0] * codec.shape[1]
    scales = -(-values // codec.block_size)
    return Packed(
        jnp.asarray(rng.integers(0, 256, -(-values // 2), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 256, scales, dtype=np.uint8)),
        jnp.asarray(rng.uniform(0.01, 0.02, -(-scales // 256)), jnp.float32),
        jnp.float32(0.05),
    )


def forms(case: Case, codec: Codec, copies: int, backends: tuple[str, ...]) -> dict[str, tuple[Run, int]]:
    """The product's forms by name, each with the bytes that it moves: ours by backend, dense, dequantize then dot."""
    packed = [random_packed(codec, seed) for seed in range(copies)]
    dtype = jnp.dtype(case.dtype)
    columns = case.shape.in_features if case.op == "forward" else case.shape.out_features
    x = jax.random.normal(jax.random.key(0), (case.rows, columns), dtype)
    unpack = jax.jit(lambda p: dequantize(p, codec, dtype))
    dense = [unpack(p) for p in packed]
    contract = 1 if case.op == "forward" else 0
    multiply = jax.jit(lambda x, weights: [dense_matmul(x, w, contract) for w in weights])

    def dequantize_then_dot() -> list[jax.Array]:
        return [multiply(x, [unpack(p)])[0] for p in packed]

    packed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(packed[0]))
    found: dict[str, tuple[Run, int]] = {}
    for backend in backends:
        run = partial(products(case.op, codec._replace(backend=backend)), x, packed)
        found[backend] = (run, packed_bytes + case.activation_bytes)
    found["dense"] = (partial(multiply, x, dense), dense[0].nbytes + case.activation_bytes)
    found["dequantize, dot"] = (dequantize_then_dot, packed_bytes + 2 * dense[0].nbytes + case.activation_bytes)
    return found


def products(op: config.Op, codec: Codec) -> Callable[[jax.Array, list[Packed]], list[jax.Array]]:
    """A program that computes the product with each of several weights, by the codec's backend."""
    return jax.jit(lambda x, packed: [_product(op, x, p, codec) for p in packed])


def _product(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    if op == "forward":
        return api.matmul(x, packed, codec)
    zeros = jnp.zeros((x.shape[0], codec.shape[1]), x.dtype)  # the product with them is removed: nothing reads it
    return jax.vjp(lambda primal: api.matmul(primal, packed, codec), zeros)[1](x)[0]


def split_failing[Name](runs: Mapping[Name, Run]) -> tuple[dict[Name, Run], dict[Name, str]]:
    """Calls each once: those that compile and run, and what the others say, in one line."""
    running, failing = {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run())
            running[name] = run
        except Exception as error:  # whatever a compiler says of one form, the others can be timed
            failing[name] = first_line(error)
    return running, failing


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def interleaved[Name](runs: Mapping[Name, Run], repeats: int, copies: int) -> dict[Name, float]:
    """Median seconds of one product of each form: after one call to compile, the forms take turns."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append((time.perf_counter() - begin) / copies)
    return {name: statistics.median(found) for name, found in seconds.items()}


class Ceilings:
    """A large copy and a large matrix product, which take their turns among the forms."""

    def __init__(self, dtype: str, on_gpu: bool) -> None:
        width = 8192 if on_gpu else 1024
        matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype))
        self._buffer = jnp.ones(2**28 if on_gpu else 2**24, jnp.float32)
        self._negate = jax.jit(lambda a: -a, donate_argnums=0)  # in place: new pages would be timed on CPUs
        multiply = jax.jit(lambda a: dense_matmul(a, a, 1))
        self.runs: dict[str, Run] = {"copy": self._copy, "matmul": partial(multiply, matrix)}
        self._bytes, self._flops = 2 * self._buffer.nbytes, 2 * width**3

    def _copy(self) -> jax.Array:
        self._buffer = self._negate(self._buffer)
        return self._buffer

    def rates(self, seconds: Mapping[str, float], copies: int) -> tuple[float, float]:
        """Bytes/s (read and written) and FLOP/s from what `interleaved` said of the two runs."""
        return self._bytes / (seconds["copy"] * copies), self._flops / (seconds["matmul"] * copies)


def copies_that_pass_the_cache(case: Case, on_gpu: bool) -> int:
    """Copies of the weight whose packed bytes are 256 MiB together, at most 32; one on CPUs, where they are slow."""
    packed_bytes = case.shape.out_features * case.shape.in_features // 2
    return max(2, min(32, 2**28 // packed_bytes)) if on_gpu else 1
