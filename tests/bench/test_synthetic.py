"""Random models: of the shapes that a run loads, filled on the device, and tame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.bench import synthetic
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import parse_config
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS
from qlora_jax.quant.tensor import dequantize
from qlora_jax.train.shapes import ModelSpec, abstract_model

pytestmark = pytest.mark.quick_compile

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def spec(quant: QuantSpec, layers: int = 3, compute_dtype: str = "bfloat16", **raw) -> ModelSpec:
    sizes = parse_config(RAW | {"num_hidden_layers": layers} | raw, "RAW")
    return ModelSpec(sizes, quant, LoRAConfig(rank=4), compute_dtype)


@pytest.mark.parametrize("quant", [QuantSpec(), QuantSpec("int4", 32, double_quant=False), QuantSpec("none")], ids=str)
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_has_the_shapes_that_a_run_loads(quant, compute_dtype, tied):
    wanted = spec(quant, compute_dtype=compute_dtype, tie_word_embeddings=tied)
    abstract, made = abstract_model(wanted), synthetic.random_model(wanted)
    for shapes, arrays in ((abstract.base, made.base), (abstract.adapter, made.adapter)):
        assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(arrays)
        ]
    for path, leaf in jax.tree_util.tree_flatten_with_path(made.base)[0]:
        is_norm = "norm" in jax.tree_util.keystr(path)
        assert bool(jnp.all(leaf == 1)) == is_norm, path


@pytest.mark.parametrize("folder", ["families/olmoe_a", "mixtures/mxfp4"])
def test_experts(golden, folder):
    """Stacks of layers and experts, and MXFP4's scales, which are bytes that no uniform draw would give."""
    wanted = ModelSpec(load_config(golden / folder), QuantSpec("nf4", 32, True), LoRAConfig(rank=2))
    made = synthetic.random_model(wanted)
    assert [x.shape for x in jax.tree.leaves(abstract_model(wanted).base)] == [
        x.shape for x in jax.tree.leaves(made.base)
    ]
    weight = made.merged().blocks.mlp.experts.down_proj.weight.get_value()
    w = dequantize(jax.tree.map(lambda x: x[1, 2], weight), jnp.float32)
    assert 0.5 < np.mean(np.linalg.norm(np.asarray(w), axis=1)) < 2


def test_weights_have_rows_of_unit_length_and_layers_differ():
    model = synthetic.random_model(spec(QuantSpec())).merged()
    weight = model.blocks.mlp.up_proj.weight.get_value()
    layers = [dequantize(jax.tree.map(lambda x, i=i: x[i], weight), jnp.float32) for i in range(3)]
    for w in layers:
        assert np.mean(np.linalg.norm(np.asarray(w), axis=1)) == pytest.approx(1, rel=0.05)
        assert len(np.unique(np.asarray(w))) > 1000
    assert not np.array_equal(layers[0], layers[1])
    assert not np.asarray(model.blocks.mlp.up_proj.lora_b.get_value()).any()
    assert np.asarray(model.blocks.mlp.up_proj.lora_a.get_value()).any()


def test_activations_stay_near_one_through_80_layers_in_bfloat16():
    model = synthetic.random_model(spec(QuantSpec(), layers=80)).merged()
    tokens = jnp.arange(32, dtype=jnp.int32)[None]
    block, state = model.layers(...)
    context = model.context(tokens)

    @jax.jit
    def before_the_final_norm(x):  # which would hide their size
        def layer(x, inputs):
            mine, number = inputs
            return model.apply_layer(block, context, None, (mine,), x, number)[0], None

        return jax.lax.scan(layer, x, (state, jnp.arange(80)))[0]

    x = before_the_final_norm(model.embed(tokens))
    assert x.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(x)))
    assert 0.1 < float(jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2))) < 100


def test_the_same_seed_gives_the_same_model():
    one, same, other = (synthetic.random_model(spec(QuantSpec()), seed) for seed in (1, 1, 2))
    pairs = list(zip(jax.tree.leaves(one.base), jax.tree.leaves(same.base), strict=True))
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one.base), jax.tree.leaves(other.base), strict=True)
    )


def test_a_model_larger_than_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(synthetic, "host_memory_bytes", lambda: 10_000)
    with pytest.raises(InputError, match="the frozen model takes 0.00 GiB, cpu gives 0.00 GiB"):
        synthetic.random_model(spec(QuantSpec()))


@pytest.mark.skipif(not topology.is_installed(), reason="needs XLA:GPU's compiler: pip install jax-cuda13-plugin")
def test_filling_takes_little_more_than_what_it_fills():
    """The codes of a 65B model's up projection, 7.2 GB, compiled for a GPU that is not here."""
    gpu, n = GPUS["a6000"], 22016 * 8192 // 2
    key = topology.on_gpu(gpu, jax.eval_shape(lambda: jax.random.key(0)))
    compiled = topology.compile_for(gpu, lambda key: synthetic._bytes.__wrapped__(key, (80, n)), key)
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == pytest.approx(80 * n, rel=1e-3)
    assert memory.temp_size_in_bytes <= 2 * n
