"""How many 16-bit copies of a layer's weights live at once in a 7B's train step, compiled for an H200 that is not here:
those of one product where XLA dequantizes."""

import math

import pytest

from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.planning import topology
from qlora_jax.planning.buffers import Value, compile_with_values, largest_scores, most_bytes_at_once
from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.program import compile_gradient
from qlora_jax.train.shapes import BatchShape, ModelSpec, abstract_model

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

LLAMA_7B = ModelConfig(
    D=4096, F=11008, L=32, N=32, K=32, H=128, V=32000, context=2048, norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=(), tied=False, eos_ids=(2,), bos_id=1,
)  # fmt: skip
D, F, R, T = 4096, 11008, 64, 512
WEIGHTS = (D * D, D * F)  # elements of each linear layer's W
# of what XLA multiplies by at once: q, k, v together, o, gate and up together, down; and with B beside W
JOINED = (*WEIGHTS, 3 * D * D, 2 * D * F, 3 * D * (D + 3 * R), D * (D + R), 2 * F * (D + 2 * R), D * (F + R))


# scratch: the recomputed forward pass and the gradient share the layer's seven weights, which live until both are done
@pytest.mark.parametrize(
    ("kernel", "most"), [("xla", 2 * JOINED[6]), ("scratch", 2 * (4 * WEIGHTS[0] + 3 * WEIGHTS[1]))]
)
def test_no_more_of_a_layers_weights_are_in_16_bits_than_the_way_declares(kernel, most):
    if kernel == "scratch":
        pytest.importorskip("jax_triton")
    model = abstract_model(ModelSpec(LLAMA_7B, QuantSpec(), LoRAConfig(dropout=0.1), kernel=kernel, attention="xla"))

    def compile(options):
        return compile_gradient(GPUS["h200"], model, BatchShape(16, 1, T), dropout=True, extra_options=options)

    _, values = compile_with_values(compile)
    assert len(values) > 100
    found = most_bytes_at_once(values, "bf16", JOINED)
    assert 2 * WEIGHTS[1] <= found <= most
    assert most_bytes_at_once(values, "f32", JOINED) == 0, "a weight in 32 bits"
    assert most_bytes_at_once(values, "bf16", [LLAMA_7B.L * elements for elements in WEIGHTS]) == 0, (
        "all layers' weights"
    )
    # attention in plain XLA has them: what test_attention_buffers.py looks for is found
    assert largest_scores(values, T) >= 4 * LLAMA_7B.N * T * T
    codes = {math.prod(value.shape) for value in values if value.is_parameter and value.dtype == "u8"}
    assert {LLAMA_7B.L * elements // 2 for elements in WEIGHTS} <= codes, "the codes are not what the program takes"


def test_overlapping_places_are_never_used_at_once():
    def value(allocation, offset, bytes, elements=4, dtype="bf16", is_parameter=False):
        return Value("v", allocation, is_parameter, offset, bytes, dtype, (elements,))

    assert most_bytes_at_once([value(0, 0, 8), value(0, 0, 8)], "bf16", [4]) == 8
    assert most_bytes_at_once([value(0, 0, 8), value(0, 4, 8)], "bf16", [4]) == 8
    assert most_bytes_at_once([value(0, 0, 8), value(0, 4, 8), value(0, 8, 8)], "bf16", [4]) == 16
    assert most_bytes_at_once([value(0, 0, 8), value(1, 0, 8)], "bf16", [4]) == 16
    assert most_bytes_at_once([value(0, 0, 8, dtype="f32"), value(0, 8, 8, is_parameter=True)], "bf16", [4]) == 0
    assert most_bytes_at_once([value(0, 0, 8, elements=5), value(0, 8, 8)], "bf16", [4, 5]) == 16
