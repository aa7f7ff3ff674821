"""Flash attention on a real GPU against plain XLA there in float32: values and gradients, with every mask."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Scoring, flash_attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: the kernels run in the interpreter only"),
]

# N, K, H, T, dtype, lengths of packed examples, window, scoring, whether there are sinks
CASES = {
    "llama-7b": (32, 32, 128, 576, "bfloat16", None, 0, Scoring(), False),
    "packed, grouped": (8, 2, 128, 1000, "bfloat16", (1, 300, 64, 500, 135), 0, Scoring(), False),
    "64 wide": (8, 4, 64, 333, "float16", (200, 133), 0, Scoring(), False),
    "80 wide": (4, 4, 80, 300, "bfloat16", None, 0, Scoring(), False),
    "96 wide": (4, 2, 96, 257, "float16", None, 0, Scoring(0.2), False),
    "gemma2": (8, 4, 256, 700, "bfloat16", (350, 350), 128, Scoring(0.0625, 50.0), False),
    "gpt-oss": (16, 2, 64, 500, "bfloat16", None, 128, Scoring(), True),
    "alibi": (4, 4, 64, 200, "bfloat16", None, 0, Scoring(slopes=(0.5, 0.25, 0.125, 0.0625)), False),
}
ROUNDINGS = {"bfloat16": 30 * 2.0**-9, "float16": 30 * 2.0**-12}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    if importlib.util.find_spec("jax_triton") is None:
        pytest.fail("jax-triton is missing: pip install jax-triton==0.4.1")
    N, K, H, T, dtype, lengths, window, scoring, has_sinks = CASES[name]
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, T, heads, H)), dtype) for heads in (N, K, K, N))
    starts = np.zeros(T) if lengths is None else np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    if window:
        starts = np.maximum(starts, np.arange(T) - window + 1)
    starts = None if lengths is None and not window else jnp.asarray(np.stack([starts, starts]), jnp.int32)
    sinks = jnp.linspace(-1.0, 3.0, N) if has_sinks else None

    def both(attend, primals, d_out):
        def attended(q, k, v, sinks):
            return attend(q, k, v, starts, sinks, scoring)

        out, pull = jax.jit(lambda *primals: jax.vjp(attended, *primals))(*primals)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves((out, jax.jit(pull)(d_out)))]

    found = both(flash_attention, (q, k, v, sinks), d_out)
    wide = tuple(None if x is None else x.astype(jnp.float32) for x in (q, k, v, sinks))
    with jax.default_matmul_precision("highest"):
        expected = both(reference.attention, wide, d_out.astype(jnp.float32))
    again = both(flash_attention, (q, k, v, sinks), d_out)
    for mine, theirs, repeated in zip(found, expected, again, strict=True):
        assert np.array_equal(mine, repeated)  # no sum depends on what ends first
        size = np.sqrt(np.mean(theirs**2)) + np.abs(theirs)
        assert np.all(np.abs(mine - theirs) <= ROUNDINGS[dtype] * size)
