"""The Mosaic kernels compile to machine code for an H200 that is not here, without spilling registers.

XLA compiles for a described GPU, and Mosaic writes what ptxas said of each kernel into the folder that its environment
names; both are read once in a process, hence the child.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin")
if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    pytest.skip("needs jax-cuda13-pjrt (pip install --no-deps jax-cuda13-pjrt)", allow_module_level=True)

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
CHILD = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels.nf4_matmul import Codec, Packed, mosaic_hopper

op, dtype, block_size, target = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
devices = topologies.get_topology_desc(
    platform="cuda", topology_name="", topology="1x1x1", target_config=target
).devices
def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
codec = Codec((1024, 1024), block_size, tuple(k / 8 - 1 for k in range(16)), (0.0,) * 256)
packed = Packed(array(2**19, dtype=jnp.uint8), array(2**20 // block_size), None, None)
kernel = getattr(mosaic_hopper, op)
device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
    traced = jax.jit(lambda x, packed: kernel(x, packed, codec)).trace(array(256, 1024, dtype=dtype), packed)
    traced.lower(lowering_platforms=("cuda",)).compile()
"""


@pytest.mark.parametrize(
    ("op", "dtype", "block_size"),
    [
        ("forward", "bfloat16", 64),
        ("backward", "bfloat16", 64),
        ("forward", "float16", 256),
        ("backward", "float16", 512),
    ],
)
def test_kernels_compile_without_spilling(op, dtype, block_size, tmp_path):
    dumps = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, op, dtype, str(block_size), H200],
        env=os.environ | dumps | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    (said,) = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert "for 'sm_90a'" in said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    assert "serialized" not in said, said  # else ptxas waits for each wgmma by itself
    (ptx,) = [path.read_text() for path in tmp_path.glob("*.ptx")]
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    products = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.{kind}\.{kind}", ptx)
    assert len(products) == 8  # [128, 64] times [64, 128] in one step
    words = ptx.count("prmt.b32 code, code, code, 0x2020;")
    assert words == 128 * 64 // 4 // 128, "a weight is decoded more than once"  # four weights a word, 128 threads
