"""The Mosaic kernels are lowered for a Hopper GPU on a machine that has none; what they refuse and take."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.nf4_matmul import Codec, Packed, config
from pallas_kernels.nf4_matmul.mosaic import hopper as mosaic_hopper
from pallas_kernels.nf4_matmul.shapes import SHAPES


def lower(op: config.Op, shape: tuple[int, int], block_size: int, rows: int, dtype, gpu: str = "NVIDIA H200") -> str:
    codec = Codec(shape, block_size, tuple(k / 8 - 1 for k in range(16)), (0.0,) * 256)
    scales = shape[0] * shape[1] // block_size
    packed = Packed(
        jax.ShapeDtypeStruct((shape[0] * shape[1] // 2,), jnp.uint8),
        jax.ShapeDtypeStruct((scales,), jnp.uint8),
        jax.ShapeDtypeStruct((-(-scales // 256),), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((rows, shape[1] if op == "forward" else shape[0]), dtype)
    kernel = mosaic_hopper.forward if op == "forward" else mosaic_hopper.backward
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x, packed: kernel(x, packed, codec)).trace(x, packed)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize(
    ("name", "block_size", "rows", "dtype"),
    [
        ("llama-7b/down", 64, 2048, jnp.bfloat16),
        ("llama-7b/down", 256, 200, jnp.float16),
        ("llama-70b/gate_up", 128, 512, jnp.bfloat16),
    ],
)
def test_kernels_are_lowered_for_a_gpu_that_is_not_here(name, block_size, rows, dtype, op):
    shape = SHAPES[name]
    text = lower(op, shape, block_size, rows, dtype)
    assert text.count("@mosaic_gpu") == 1
    kind = {jnp.bfloat16: "bf16", jnp.float16: "f16"}[dtype]
    assert f"{shape[0]}x{shape[1]}x{kind}" not in text  # no 16-bit W


def test_too_many_stages_are_seen(monkeypatch):
    monkeypatch.setattr(mosaic_hopper, "STAGES", 5)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower("backward", (1280, 512), 64, 256, jnp.bfloat16)


def test_other_gpus_are_refused():
    with pytest.raises(RuntimeError, match='"mosaic" needs a Hopper GPU .*, this program is for NVIDIA A100'):
        lower("forward", (256, 256), 64, 128, jnp.bfloat16, "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "reason"),
    [
        ((256, 256), 64, jnp.float32, "x is float32"),
        ((256, 256), 32, jnp.bfloat16, "block size is 32"),
        ((256, 512), 96, jnp.bfloat16, "block size is 96"),
        ((256, 768), 512, jnp.bfloat16, "blocks cross rows"),
        ((320, 256), 64, jnp.bfloat16, "320 x 256: expected multiples of 256"),
        ((256, 320), 64, jnp.bfloat16, "256 x 320: expected multiples of 256"),
    ],
)
def test_refusals_say_why(shape, block_size, dtype, reason):
    assert reason in (mosaic_hopper.unsupported(shape, block_size, dtype) or "")


def test_every_named_shape_is_taken():
    assert {mosaic_hopper.unsupported(shape, 64, jnp.bfloat16) for shape in SHAPES.values()} == {None}
