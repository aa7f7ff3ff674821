"""An int8 base on a GPU that is not here: what is multiplied as bytes, and how much it takes."""

import re

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.known import known_config
from qlora_jax.models.sizes import linear_weights
from qlora_jax.planning import topology
from qlora_jax.planning.buffers import compile_with_values, most_bytes_at_once
from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.memory import base_bytes
from qlora_jax.quant import native
from qlora_jax.quant.tensor import matmul_joined
from qlora_jax.train.cut import Cut, ToCut, temporary_bytes
from qlora_jax.train.shapes import ModelSpec, abstract_model


def test_a_base_takes_a_byte_a_weight():
    sizes = known_config("huggyllama/llama-7b")
    found = base_bytes(abstract_model(ModelSpec(sizes, QuantSpec("int8"), LoRAConfig())))
    rows = sum(sizes.L * shape[0] for shape in sizes.linears.values())
    assert found["codes"] == linear_weights(sizes) and found["scales"] == 4 * rows
    assert found["scales"] < 0.001 * found["codes"] and found["linear_16bit"] == 0


def test_a_cut_knows_the_sums_of_int8():
    """Compiled for an H100, all of 16 rows' temporaries took 7.092 GB (block) and 30.735 (selective)."""
    model = ModelSpec(known_config("huggyllama/llama-7b"), QuantSpec("int8"), LoRAConfig())
    rows = ToCut(model, 16, 576, 1024, "auto", "auto")
    for remat, compiled in (("block", 7.092e9), ("selective", 30.735e9)):
        assert compiled <= temporary_bytes(rows, Cut(16, remat)) < 1.08 * compiled


@pytest.mark.skipif(not topology.is_installed(), reason="needs XLA:GPU's compiler: pip install jax-cuda13-plugin")
def test_bytes_are_multiplied_as_bytes():
    """Two joined weights, forward and backward: int8 by int8 into int32, and no weight in 32 bits."""
    O, I = 768, 640
    gpu, w = GPUS["h100"], native.abstract((O, I), "int8", 0, False)

    def gradient(x, first, second, dy):
        y, pull = jax.vjp(lambda x: matmul_joined(x, [first, second]), x)
        return y, pull(dy)

    arguments = (jax.ShapeDtypeStruct((256, size), jnp.bfloat16) for size in (I, 2 * O))
    x, dy = topology.on_gpu(gpu, tuple(arguments))
    placed = (x, *topology.on_gpu(gpu, (w, w)), dy)
    compiled, values = compile_with_values(
        lambda options: topology.compile_for(gpu, gradient, *placed, compiler_options=options)
    )
    text = compiled.as_text()
    lines = text.splitlines()
    shapes = dict(re.findall(r"(%[\w.-]+) = (\w+\[[\d,]*\])", text))
    products = [line for line in lines if re.search(r" = s32\[[\d,]+\]\S* dot\(", line)]
    assert products, "no product is of integers"
    for line in products:
        operands = re.search(r" dot\((%[\w.-]+), (%[\w.-]+)\)", line)
        assert {shapes[name][:3] for name in operands.groups()} == {"s8["}, line
    weights = (O * I, 2 * O * I)
    assert most_bytes_at_once(values, "bf16", weights) > 0 == most_bytes_at_once(values, "f32", weights)
