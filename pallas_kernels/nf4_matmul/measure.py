"""Times a product's forms side by side in one run: interleaved, medians, beside ceilings that the same run measured.

A program goes through rounds, each the product with every one of several copies of the weight, so that a GPU's cache
does not keep them. What a round takes is the slope: many rounds less one, so that what a call costs once (some hundred
us: starting it, waiting for it) is in no figure. Ceilings and competitors are timed in the same way.
"""

import math
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

# run(rounds) starts so many rounds; what it returns has been computed when jax.block_until_ready says so
Run = Callable[[np.integer], Any]
LEAST_SECONDS, MOST_ROUNDS = 0.05, 20  # what the many rounds take together at least, unless they would be too many


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
    """The product's forms by name, each with the bytes that it moves: ours by backend, and dense in 16 or 32 bits."""
    packed = [random_packed(codec, seed) for seed in range(copies)]
    dtype = jnp.dtype(case.dtype)
    columns = case.shape.in_features if case.op == "forward" else case.shape.out_features
    x = jax.random.normal(jax.random.key(0), (case.rows, columns), dtype)
    unpack = jax.jit(lambda p: dequantize(p, codec, dtype))
    dense = [unpack(p) for p in packed]
    contract = 1 if case.op == "forward" else 0
    multiply = in_rounds(lambda x, w: dense_matmul(x, w, contract), codec.shape[1 - contract])

    packed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(packed[0]))
    found: dict[str, tuple[Run, int]] = {}
    for backend in backends:
        run = partial(products(case.op, codec._replace(backend=backend)), x, packed)
        found[backend] = (run, packed_bytes + case.activation_bytes)
    found["dense"] = (partial(multiply, x, dense), dense[0].nbytes + case.activation_bytes)
    return found


def products(op: config.Op, codec: Codec) -> Callable[[jax.Array, list[Packed], Any], list[jax.Array]]:
    """A program of rounds of the product with each of several weights, by the codec's backend."""
    return in_rounds(lambda x, packed: _product(op, x, packed, codec), codec.shape[0 if op == "forward" else 1])


def in_rounds(
    product: Callable[[jax.Array, Any], jax.Array], width: int
) -> Callable[[jax.Array, list[Any], Any], list[jax.Array]]:
    """program(x [M, ...], weights, rounds int32) -> the products [M, width] of the last round, jitted.

    Each round begins when the one before has ended, from its values: none can be left out, or be computed once for all.
    """

    def program(x: jax.Array, weights: list[Any], rounds: Any) -> list[jax.Array]:
        def one(_: Any, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            x, weights_now = jax.lax.optimization_barrier((carry[0], weights))
            found = [product(x, w) for w in weights_now]
            nothing = 0 * jnp.stack([y[0, 0] for y in found]).sum()
            return x.at[0, 0].add(nothing.astype(x.dtype)), found

        zeros = [jnp.zeros((x.shape[0], width), x.dtype) for _ in weights]
        return jax.lax.fori_loop(0, rounds, one, (x, zeros))[1]

    return jax.jit(program)


def _product(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    if op == "forward":
        return api.matmul(x, packed, codec)
    zeros = jnp.zeros((x.shape[0], codec.shape[1]), x.dtype)  # the product with them is removed: nothing reads it
    return jax.vjp(lambda primal: api.matmul(primal, packed, codec), zeros)[1](x)[0]


def split_failing[Name](runs: Mapping[Name, Run]) -> tuple[dict[Name, Run], dict[Name, str]]:
    """One round of each: those that compile and run, and what the others say, in one line."""
    running, failing = {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run(np.int32(1)))
            running[name] = run
        except Exception as error:  # whatever a compiler says of one form, the others can be timed
            failing[name] = first_line(error)
    return running, failing


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def interleaved[Name](runs: Mapping[Name, Run], repeats: int, copies: int) -> dict[Name, float]:
    """Median seconds of one product of each form, by slope; the forms take turns. 0 or less is lost in the noise."""
    many = {}
    for name, run in runs.items():
        _seconds(run, 1)  # compiles
        many[name] = 1 + max(2, min(MOST_ROUNDS, math.ceil(LEAST_SECONDS / _seconds(run, 1))))
    slopes: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            more = _seconds(run, many[name]) - _seconds(run, 1)
            slopes[name].append(more / (many[name] - 1) / copies)
    return {name: statistics.median(found) for name, found in slopes.items()}


def _seconds(run: Run, rounds: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(np.int32(rounds)))
    return max(time.perf_counter() - begin, 1e-9)


class Ceilings:
    """A large copy and a large matrix product, which take their turns among the forms."""

    def __init__(self, dtype: str, on_gpu: bool) -> None:
        width = 8192 if on_gpu else 1024
        matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype)) / math.sqrt(width)
        self._buffer = jnp.ones(2**28 if on_gpu else 2**24, jnp.float32)
        negate = lambda a, rounds: jax.lax.fori_loop(0, rounds, lambda _, a: -a, a)  # noqa: E731
        self._negate = jax.jit(negate, donate_argnums=0)  # in place: new pages would be timed on CPUs
        multiply = jax.jit(
            lambda a, rounds: jax.lax.fori_loop(0, rounds, lambda _, product: dense_matmul(product, a, 1), a)
        )
        self.runs: dict[str, Run] = {"copy": self._copy, "matmul": partial(multiply, matrix)}
        self._bytes, self._flops = 2 * self._buffer.nbytes, 2 * width**3

    def _copy(self, rounds: np.integer) -> jax.Array:
        self._buffer = self._negate(self._buffer, rounds)
        return self._buffer

    def rates(self, seconds: Mapping[str, float], copies: int) -> tuple[float, float]:
        """Bytes/s (read and written) and FLOP/s from what `interleaved` said of the two runs."""
        return self._bytes / (seconds["copy"] * copies), self._flops / (seconds["matmul"] * copies)


def copies_that_pass_the_cache(case: Case, on_gpu: bool) -> int:
    """Copies of the weight whose packed bytes are 256 MiB together, at most 32; one on CPUs, where they are slow."""
    packed_bytes = case.shape.out_features * case.shape.in_features // 2
    return max(2, min(32, 2**28 // packed_bytes)) if on_gpu else 1
