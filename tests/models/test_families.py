"""Every family: transformers' logits, from the whole sequence and from a cache, at two shapes each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import parse_config, read_json
from qlora_jax.models.kept import NAMES, keeping
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.shapes import ModelSpec, abstract_model
from tests.families import FAST, FOLDERS, logits_of

pytestmark = pytest.mark.quick_compile


@partial(jax.jit, static_argnames="graph", compiler_options=FAST)
def with_cache(graph, state, cache, tokens, first):
    """Logits [1, t, V] of tokens that stand at `first` onwards, and the cache with them."""
    model = nnx.merge(graph, state)
    positions = None if first is None else first + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, cache = model(tokens, positions, cache)
    return model.logits(hidden), cache


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDERS.iterdir()))
def test_logits(name):
    """Of the first shape a third of the sequence at a time goes through a cache, of the second all goes at once."""
    model = load_model(FOLDERS / name, compute_dtype=jnp.float32)
    with np.load(FOLDERS / name / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    if name.endswith("_b"):
        found = logits_of(model, tokens)
    else:
        graph, state = nnx.split(model)
        cache, found, step = model.new_cache(1, 128 if name == "llama_longrope_a" else 64), [], tokens.shape[1] // 3
        for first in range(0, tokens.shape[1], step):
            logits, cache = with_cache(graph, state, cache, tokens[:, first : first + step], first)
            found.append(logits)
        found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bloom_a", "gemma3_a", "gpt_oss_a", "llama_longrope_a"])
def test_a_prompt_that_is_read_at_once(name):
    """Two thirds as training reads them, the rest one by one: ALiBi, windows, sinks, a rope that turns by the room."""
    with np.load(FOLDERS / name / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    graph, state = nnx.split(load_model(FOLDERS / name, compute_dtype=jnp.float32))
    cache = nnx.merge(graph, state).new_cache(1, 128 if name == "llama_longrope_a" else 64)
    prompt = 2 * tokens.shape[1] // 3
    logits, cache = with_cache(graph, state, cache, tokens[:, :prompt], None)
    found = [logits]
    for first in range(prompt, tokens.shape[1]):
        logits, cache = with_cache(graph, state, cache, tokens[:, first : first + 1], first)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bloom_a", "falcon_b", "gemma3_b", "gpt_oss_b"])
def test_in_chunks(name):
    """ALiBi; a projection of groups of heads beside the feed-forward; layers of two kinds; sinks and experts."""
    with np.load(FOLDERS / name / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    model = load_model(FOLDERS / name, compute_dtype=jnp.float32, sequence_chunk=9)
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)


def test_a_cache_made_for_longer_answers_turns_otherwise():
    """longrope: keys of a short conversation do not stand in a cache with room beyond the original context."""
    model = load_model(FOLDERS / "llama_longrope_a", compute_dtype=jnp.float32)  # 16 tokens originally
    assert model.turns_alike(64, 64) and model.turns_alike(128, 192) and not model.turns_alike(64, 128)
    assert load_model(FOLDERS / "llama_a", compute_dtype=jnp.float32).turns_alike(64, 128)
    assert load_model(FOLDERS / "gpt2_a", compute_dtype=jnp.float32).turns_alike(64, 128)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDERS.glob("*_a")))
def test_what_selective_remat_keeps_is_there(name):
    """Every kind of layer names its values: without the names they would be computed again, and nothing said so.

    And cuts and plans count their bytes.
    """
    config = parse_config(read_json(FOLDERS / name / "config.json"), name)
    spec = ModelSpec(config, QuantSpec("none"), LoRAConfig(2), "float32", "float32")
    parts = abstract_model(spec)

    def kept(adapter, base, tokens):
        model = nnx.merge(parts.graph, adapter, base)
        context = model.context(tokens, lengths=model.lengths(tokens))
        block, *stacked = model.layers(nnx.LoRAParam, ...)
        first = tuple(jax.tree.map(lambda leaf: leaf[0], part) for part in stacked)
        layer = lambda x: model.apply_layer(block, context, None, first, x, jnp.int32(0))[0]  # noqa: E731
        return keeping(layer, NAMES)(model.embed(tokens, context.positions))[1]

    found = jax.eval_shape(kept, parts.adapter, parts.base, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    roles = config.kind.linear
    expected = {"queries", "keys", "values", "attention", "up", "low_rank"}
    expected |= {"gate"} if roles.keys() & {"gate", "gate_up"} else set()
    expected |= set() if config.kind.parallel else {"attended"}
    expected -= {"gate", "up"} if config.sparse else set()  # experts are computed again from what they took
    assert {key.split()[0] for key in found} == expected
    counted = kept_bytes(config, "selective", 1, 8, 4, spec.low_rank) - kept_bytes(config, "block", 1, 8, 4)
    assert config.L * sum(value.size * value.dtype.itemsize for value in found.values()) == counted


def test_depth_adds_no_program():
    """As many equations for twelve layers of Gemma 3 as for seven, though layers differ."""
    raw = read_json(FOLDERS / "gemma3_a" / "config.json")

    def equations(layers: int) -> int:
        config = parse_config({k: v for k, v in raw.items() if k != "layer_types"} | {"num_hidden_layers": layers}, "x")
        model = abstract_model(ModelSpec(config, QuantSpec("none"), LoRAConfig(2), "float32", "float32")).merged()
        assert len({*config.kind.windows}) == len({*config.kind.layer_ropes}) == 2
        graph, state = nnx.split(model)
        run = lambda state, tokens: nnx.merge(graph, state)(tokens)[0]  # noqa: E731
        text = str(jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((1, 24), jnp.int32)))
        return text.count(" = ")

    assert equations(7) == equations(12) > 50
