"""A gradient through a scan of layers compiles for an H200 that is not here, kernels included, by XLA and its ptxas."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_mosaic_compile import H200  # skips where XLA:GPU is missing

pytest.importorskip("triton")
if importlib.util.find_spec("jax_triton") is None:
    pytest.skip("needs jax-triton", allow_module_level=True)

CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels.nf4_matmul import Codec, Packed, matmul

backend, target = sys.argv[1:]
devices = topologies.get_topology_desc(
    platform="cuda", topology_name="", topology="1x1x1", target_config=target
).devices
def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
L, I, M = 4, 4096, 256
codec = Codec((I, I), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)), backend)
packed = Packed(array(L, I * I // 2, dtype=jnp.uint8), array(L, I * I // 64, dtype=jnp.uint8),
                array(L, I * I // 2**14), array(L))
def loss(x, packed):
    layer = jax.checkpoint(lambda x, p: (jnp.sin(matmul(x, p, codec)), None))
    return jnp.sum(jax.lax.scan(layer, x, packed)[0].astype(jnp.float32) ** 2)
device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
    traced = jax.jit(jax.grad(loss)).trace(array(M, I, dtype=jnp.bfloat16), packed)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
calls = compiled.as_text().count("triton_kernel_call_ffi")
print(json.dumps([calls, compiled.memory_analysis().temp_size_in_bytes]))
"""


def compile_for_h200(backend: str) -> tuple[int, int]:
    """Calls of Triton kernels in the program, and the bytes of its temporary buffers."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, backend, H200],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_one_layer_s_weight_is_all_that_the_scratch_takes():
    weight = 2 * 4096 * 4096  # bytes in 16 bits
    fused_calls, fused = compile_for_h200("triton")
    scratch_calls, scratch = compile_for_h200("scratch")
    assert fused_calls == scratch_calls == 3  # forward, again for the backward pass, and backward
    assert scratch - fused <= 1.1 * weight
    assert scratch > weight  # the measure sees the scratch
