"""The kernel that writes W in 16 bits: bit-exact with the reference, and its machine code."""

import jax.numpy as jnp
import numpy as np
import pytest

triton = pytest.importorskip("triton")

from pallas_kernels.nf4_matmul import Codec, Packed  # noqa: E402
from pallas_kernels.nf4_matmul.triton import scratch  # noqa: E402
from tests.kernels import interpreter, triton_compile  # noqa: E402
from tests.kernels.weights import dequantized, random_weight  # noqa: E402

SHAPES = {
    "whole programs": ((64, 128), 64),
    "a part of a program": ((6, 64), 64),
    "blocks of 32": ((64, 96), 32),
    "blocks of 128": ((32, 256), 128),
    "blocks larger than a program": ((4, 4096), 4096),
    "several nested scales": ((256, 96), 32),
    "an odd number of rows": ((33, 64), 64),
    "blocks that cross rows": ((32, 96), 64),
    "a block that crosses the middle": ((6, 96), 64),
    "an odd number of weights": ((7, 33), 64),
    "an odd number of weights in many programs": ((65, 67), 32),
    "an odd number of weights, whole blocks in a half": ((1, 127), 64),
    "one weight": ((1, 1), 64),
}


FORMS = [(True, "bfloat16"), (False, "float16"), (True, "float16"), (False, "bfloat16")]  # double_quant, dtype


def bits(w) -> np.ndarray:
    return np.asarray(w).view(np.uint16)


@pytest.mark.parametrize("name", SHAPES)
def test_bits_are_those_of_the_reference(name):
    """How values are rounded and scales expanded does not depend on the shape: the forms take turns over the shapes."""
    double_quant, dtype = FORMS[list(SHAPES).index(name) % len(FORMS)]
    packed, codec = random_weight(*SHAPES[name], double_quant=double_quant)
    found = interpreter.dequantize(packed, codec, dtype)
    np.testing.assert_array_equal(bits(found), bits(dequantized(packed, codec, dtype)))


@pytest.mark.parametrize(("double_quant", "dtype"), FORMS)
def test_every_form(double_quant, dtype):
    packed, codec = random_weight((32, 128), format="fp4" if double_quant else "int4", double_quant=double_quant)
    found = interpreter.dequantize(packed, codec, dtype)
    np.testing.assert_array_equal(bits(found), bits(dequantized(packed, codec, dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_negative_zero(dtype):
    """Neither from a table's -0 nor from a negative value that is rounded to zero."""
    codec = Codec((2, 64), 64, (-0.0, *([-1.0] * 15)), (0.0,) * 256)
    codes = jnp.asarray([0x00, 0x11] * 32, jnp.uint8)
    packed = Packed(codes, jnp.asarray([1.0, 1e-44 if dtype == "bfloat16" else 1e-9], jnp.float32), None, None)
    found = interpreter.dequantize(packed, codec, dtype)
    assert set(bits(found)[0].tolist()) == {0, {"bfloat16": 0xBF80, "float16": 0xBC00}[dtype]}
    assert not bits(found)[1].any()


@pytest.mark.parametrize(("capability", "double_quant"), [(80, True), (86, True), (89, True), (90, True), (90, False)])
def test_compiles_without_spilling(capability, double_quant):
    codec = Codec((4096, 11008), 64, (0.0,) * 16, (0.0,) * 256)
    machine = triton_compile.compile_dequantize(codec, "bfloat16", capability, double_quant)
    assert machine.stack == 0, machine
    # a thread's weights; an H200 issues about 18 instructions in the time that the 2.5 bytes of a weight take
    weights = 2 * scratch.BYTES // (32 * scratch.WARPS)
    # Triton 3.6 exchanges the values of one half between threads before it stores them, later ones nothing
    exchanges = triton.__version__.startswith("3.6.")
    assert machine.shared <= (2 * scratch.BYTES if exchanges else 0), machine
    assert machine.total <= (16 if exchanges else 12) * weights, f"{machine.total / weights} instructions a weight"
    # W leaves in pieces of 16 bytes
    assert machine.wide_stores == weights * 2 // 16


def test_blocks_that_cross_the_middle_compile():
    codec = Codec((65, 67), 64, (0.0,) * 16, (0.0,) * 256)
    assert triton_compile.compile_dequantize(codec, "float16", 80, True).stack == 0


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "reason"),
    [
        ((64, 64), 64, "float32", "x is float32"),
        ((64, 64), 48, "bfloat16", "the block size is 48"),
        ((65536, 32768), 64, "bfloat16", "more than 2^31"),
    ],
)
def test_refusals_say_why(shape, block_size, dtype, reason):
    assert reason in (scratch.unsupported(shape, block_size, dtype) or "")
