"""A gradient through a scan of layers compiles for an H200 that is not here, kernels included, by XLA and its ptxas."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.nf4_matmul import Codec, Packed, matmul
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS

pytest.importorskip("triton")
if importlib.util.find_spec("jax_triton") is None or not topology.is_installed():
    pytest.skip("needs jax-triton, and XLA:GPU's compiler (jax-cuda13-plugin)", allow_module_level=True)

WEIGHT = 2 * 4096 * 4096  # bytes in 16 bits


@pytest.mark.parametrize(
    ("backend", "rows", "forward"), [("scratch", 256, "nf4_dequantize"), ("triton", 16, "nf4_matmul_forward")]
)
def test_one_layer_s_weight_is_all_that_the_scratch_takes(backend, rows, forward):
    L, I = 4, 4096
    array = jax.ShapeDtypeStruct
    codec = Codec((I, I), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)), backend)
    packed = Packed(
        array((L, I * I // 2), jnp.uint8),
        array((L, I * I // 64), jnp.uint8),
        array((L, I * I // 2**14), jnp.float32),
        array((L,), jnp.float32),
    )

    def loss(x, packed):
        layer = jax.checkpoint(lambda x, p: (jnp.sin(matmul(x, p, codec)), None))
        return jnp.sum(jax.lax.scan(layer, x, packed)[0].astype(jnp.float32) ** 2)

    arguments = topology.on_gpu(GPUS["h200"], (array((rows, I), jnp.bfloat16), packed))
    compiled = topology.compile_for(GPUS["h200"], jax.grad(loss), *arguments, assembled=True)
    text = compiled.as_text()
    assert text.count("triton_kernel_call_ffi") == 3  # forward, again for the backward pass, and backward
    kept = L * rows * I * 2  # every layer's x
    # one weight, a copy of its codes, activations: no second weight
    assert WEIGHT < compiled.memory_analysis().temp_size_in_bytes - kept < 1.7 * WEIGHT
