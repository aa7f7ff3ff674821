"""The attention kernels compile to machine code for the GPUs they are for, without spilling, on a machine with none."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton")

from pallas_kernels.attention import Scoring, config, flash_attention  # noqa: E402
from pallas_kernels.attention.triton import launch  # noqa: E402
from pallas_kernels.attention.triton.backward import keys_kernel, queries_kernel  # noqa: E402
from pallas_kernels.attention.triton.forward import forward_kernel  # noqa: E402
from pallas_kernels.gpu import load_jax_triton, shared_limit  # noqa: E402
from tests.kernels.triton_compile import Machine, compile_kernel  # noqa: E402

KERNELS = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}
FLOAT32 = ("slopes", "sinks", "log_sums", "deltas")
# compute capability, head width, scoring, whether rows are packed or have windows, whether there are sinks
CASES = [
    (80, 128, Scoring(), True, False),
    (86, 96, Scoring(), False, False),
    (89, 64, Scoring(), True, False),
    (90, 128, Scoring(), True, True),
    (100, 256, Scoring(softcap=50.0), True, False),
]


def compiled(which: str, capability: int, H: int, scoring: Scoring, has_starts: bool, has_sinks: bool) -> Machine:
    kernel, tiles = KERNELS[which], getattr(config.tiles(H, shared_limit(capability)), which)
    constants = launch.constants(which, 32, 8, H, tiles, scoring)
    there = {"starts": has_starts, "slopes": bool(scoring.slopes), "sinks": has_sinks}
    types = {}
    for name in kernel.arg_names:
        if name not in constants and there.get(name, True):
            pointer = "*i32" if name == "starts" else "*fp32" if name in FLOAT32 else "*bf16"
            types[name] = "i32" if name == "T" else pointer
    constants |= {name: None for name in kernel.arg_names if name not in types and name not in constants}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages} | launch.options(capability)
    return compile_kernel(kernel, types, constants, options, capability)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("capability", "H", "scoring", "has_starts", "has_sinks"), CASES)
def test_nothing_spills_and_shared_memory_suffices(which, capability, H, scoring, has_starts, has_sinks):
    machine = compiled(which, capability, H, scoring, has_starts, has_sinks)
    assert machine.stack <= (32 if scoring.softcap else 0), f"{machine.stack} bytes a thread spill"
    assert machine.shared <= shared_limit(capability)
    tensor_cores = {name for name in machine.instructions if name.endswith("MMA")}
    assert tensor_cores, "the products do not reach the tensor cores"


def test_a_tile_that_is_too_large_is_seen(monkeypatch):
    monkeypatch.setattr(config, "tiles", lambda H, shared: config.KernelTiles(*[config.Tiles(128, 128, 4, 3)] * 3))
    machine = compiled("keys", 86, 128, Scoring(), False, False)
    assert machine.stack > 0 and machine.shared > shared_limit(86)


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200"])
def test_the_whole_op_is_lowered_for_a_gpu_that_is_not_here(gpu):
    if load_jax_triton("flash").triton_lib.triton_kernel_call_lib is None:
        pytest.skip("lowering needs jax-cuda13-plugin (pip install --no-deps jax-cuda13-plugin)")
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=100, platform="gpu")
    q, k = (jax.ShapeDtypeStruct((3, 2, 50, heads, 64), jnp.bfloat16) for heads in (4, 2))
    starts = jax.ShapeDtypeStruct((2, 50), jnp.int32)

    def gradients(q, k, v, starts):  # of a pack of three
        attend = lambda q, k, v: flash_attention(q, k, v, starts).astype(jnp.float32).sum()  # noqa: E731
        return jax.vmap(jax.grad(attend, (0, 1, 2)))(q, k, v)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(gradients).trace(q, k, k, starts).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 3 and "tensor<6x50x4x64xbf16>" in text
