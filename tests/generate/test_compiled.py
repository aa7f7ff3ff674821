"""Decoding as it is compiled for a GPU that is not here: what can be a CUDA graph, and no second cache for prompts.

Whether XLA makes a graph is decided where there is a driver: without one its pass leaves loops and calls out.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.bench.generate import made
from qlora_jax.generate.decode import CHUNK, Decoding, _read, _read_whole, room_for
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.seeds import Draws, draws_of_all
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS
from tests.generate.compiled_decode import empty_cache, small_model, thunks

has_compiler = pytest.mark.skipif(
    not topology.is_installed(), reason="needs XLA:GPU's compiler: pip install jax-cuda13-plugin"
)

# what XLA's pass takes: kernels, copies on the device, loops and branches of these, calls that say that they may be
# captured (both Mosaic's and jax-triton's do), and slices that such a call is given
TAKEN = {
    "kCustomKernel", "kKernel", "kCopy", "kWhile", "kConditional", "kCustomCall", "kDynamicSliceFusion", "kAsyncStart",
    "kAsyncDone",
}  # fmt: skip
PRODUCTS = 4  # launches of a layer: q, k and v; o; gate and up; down


@has_compiler
def test_a_token_takes_nothing_that_a_graph_cannot_have(tmp_path):
    lines = thunks(tmp_path, "mosaic")
    loop = next(number for number, line in enumerate(lines) if "kWhile" in line)
    token = [match[1] for line in lines[loop:] if (match := re.match(r"\s*\d+: (k\w+)", line))]
    assert set(token) <= TAKEN, set(token) - TAKEN
    assert token.count("kWhile") == 2 and token.count("kConditional") == 1  # of layers; whether it is sampled
    assert token.count("kCustomCall") == PRODUCTS


@has_compiler
@pytest.mark.parametrize("way", ["at once", "in pieces"])
def test_prompts_take_no_second_cache(way):
    """XLA would lay the whole cache out as attention likes it, and turn it around before and after."""
    config, graph, state = small_model("xla", layers=8)
    array, (B, T, S) = jax.ShapeDtypeStruct, (16, 128, 1536)
    cache, tokens, lengths = empty_cache(config, B, S), array((B, T), jnp.int32), array((B,), jnp.int32)
    read, inputs = _read_whole, (cache, tokens, lengths)
    if way == "in pieces":
        hidden = array((B, config.D), jnp.bfloat16)
        read, inputs = _read, (cache, hidden, tokens, array((), jnp.int32), lengths)
    compiled = topology.compile_for(
        GPUS["h200"],
        lambda *arguments: read.__wrapped__(graph, *arguments),
        *topology.on_gpu(GPUS["h200"], (state, *inputs)),
        donate_argnums=(1,),
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * cache.k.size


@pytest.mark.quick_compile
def test_tokens_are_the_same(tiny_model):
    """On a CPU, which knows the options and has no graphs: whether they change nothing else."""
    sampling, prompt = Sampling(CHUNK, temperature=0.0), [5, 3, 8]
    found = []
    for graphs in (False, True):
        room = room_for(tiny_model, len(prompt), CHUNK)
        decoding = Decoding(tiny_model, [prompt], sampling, (), [Draws(0, 0)], room, graphs=graphs)
        found.append(decoding.step(CHUNK))
    assert found[0] == found[1] and len(found[0][0]) == CHUNK


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: a CPU has no graphs")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kernel", ["xla", "triton", "mosaic"])
def test_tokens_in_graphs_on_a_gpu(kernel, temperature):
    """Over several calls of a program, whose graph is then used again."""
    if kernel == "mosaic" and str(jax.devices()[0].compute_capability) != "9.0":
        pytest.skip("the Mosaic kernels are for Hopper")
    config, _, _ = small_model("xla")
    model, sampling = made(config, kernel, rank=8, compute_dtype="bfloat16"), Sampling(3 * CHUNK, temperature)
    prompts = np.random.default_rng(0).integers(0, config.V, (8, 100)).tolist()
    found = []
    for graphs in (False, True):
        room = room_for(model, 100, 3 * CHUNK)
        decoding = Decoding(model, prompts, sampling, (), draws_of_all(prompts, 0), room, graphs=graphs)
        found.append([decoding.step(CHUNK) for _ in range(3)])
    assert found[0] == found[1]
