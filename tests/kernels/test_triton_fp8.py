"""The 8-bit Triton kernel: its decoding as text, its values in the interpreter, its machine code for Ada and Hopper."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

from pallas_kernels.nf4_matmul import Codec, config, dequantize  # noqa: E402
from pallas_kernels.nf4_matmul.config import Tiles  # noqa: E402
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape  # noqa: E402
from pallas_kernels.nf4_matmul.triton import fp8_backend as triton_fp8_backend  # noqa: E402
from pallas_kernels.nf4_matmul.triton.fp8 import ASSEMBLY, CONSTRAINTS, table_words  # noqa: E402
from tests.kernels import interpreter, ptx  # noqa: E402
from tests.kernels.triton_compile import Machine, compile_fp8  # noqa: E402
from tests.kernels.weights import whole_numbers  # noqa: E402

EIGHT_BIT = ("fp8", "fp8_row")

PLAIN = Tiles(16, 32, 64, split=1, group_m=2, num_warps=4, num_stages=2, scale_sums=True)

# shape, block size, whether scales are nested, rows, tiles
CASES = {
    "whole tiles": ((64, 64), 64, False, 16, PLAIN),
    "rows and out-features that fill no tile": ((90, 64), 64, True, 37, PLAIN),
    "one row": ((64, 128), 64, True, 1, replace(PLAIN, scales_in_kernel=True)),
    "several nested blocks": ((600, 64), 64, True, 3, replace(PLAIN, block_o=64, scales_in_kernel=True)),
    "split that does not divide the sum": ((320, 352), 32, True, 20, replace(PLAIN, block_i=32, split=3)),
    "blocks of 32": ((64, 96), 32, True, 20, replace(PLAIN, block_i=32)),
    "two runs in a block": ((64, 256), 128, True, 20, PLAIN),
    "four runs in a block": ((64, 512), 256, False, 20, PLAIN),
    "groups of rows": ((130, 128), 64, True, 70, replace(PLAIN, group_m=3)),
}


@pytest.mark.parametrize("seed", range(4))
def test_every_pattern_of_16_bits_is_looked_up_for_any_table(seed):
    rng = np.random.default_rng(seed)
    entries = rng.permutation(256)[:16].astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    patterns = np.arange(2**16, dtype=np.uint32)
    words = patterns | (rng.permutation(patterns) << np.uint32(16))
    registers = [word for word in entries.view(np.uint32) for _ in range(4)]

    outputs = ptx.run(ASSEMBLY.value, [words, *registers], outputs=2)

    assert CONSTRAINTS.value.split(",") == ["=r"] * 2 + ["r"] * (1 + len(registers))
    found = np.stack(outputs, axis=-1).view(np.uint8).reshape(-1, 2, 4)  # [word, low or high nibbles, byte]
    codes = words[:, None].view(np.uint8).reshape(-1, 4)
    expected = entries.view(np.uint8)[np.stack([codes & 0xF, codes >> 4], axis=1)]
    np.testing.assert_array_equal(found, expected)


def test_one_permute_a_weight():
    assert ASSEMBLY.value.count("prmt") == 8  # a word has eight codes


def test_the_table_is_stored_in_the_order_of_its_codes():
    table = tuple(float(value) for value in range(-8, 8))
    values = table_words(table).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(values / values[-1] * 7, table)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_whole_numbers_come_out_exactly(compute, case):
    """Nothing is rounded but scales of x, in the last bit: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, tiles = CASES[case]
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    codec = codec._replace(compute=compute)
    w = np.asarray(dequantize(packed, codec, jnp.float32))
    rng = np.random.default_rng(1)
    x = rng.integers(-7, 8, (rows, shape[1] // tiles.block_i, tiles.block_i)).astype(np.float32)
    x[..., 0] = 7  # 7 / 448 is a power of two: whole numbers up to 7 are 8-bit values times it
    x *= 2.0 ** rng.integers(-2, 3, (*x.shape[:2], 1))  # another scale for each run, and each row
    x *= 2.0 ** rng.integers(-2, 3, (rows, 1, 1))
    x = x.reshape(rows, shape[1])

    found = interpreter.matmul_fp8(jnp.asarray(x, jnp.bfloat16), packed, codec, tiles)

    np.testing.assert_allclose(found, x @ w.T, rtol=0, atol=2e-7 * float((np.abs(x) @ np.abs(w).T).max()))


GPUS = {89: config.Gpu("NVIDIA GeForce RTX 4090", 89, 128), 90: config.Gpu("NVIDIA H200", 90, 132)}
TENSOR = {89: "QMMA", 90: "QGMMA"}  # the instruction of 8-bit tensor cores
# multiply-adds a clock of a multiprocessor with float32 sums: 165.2 and 330.3 TFLOP/s dense of an RTX 4090 (128
# multiprocessors, 2.52 GHz), 989 and 1,979 of an H200 (132, 1.83 GHz)
DENSE_16, DENSE_8 = {89: 256, 90: 2048}, {89: 512, 90: 4096}
SHAPE = SHAPES["llama-7b/down"]


def codec(shape: Shape, block_size: int, compute: str) -> Codec:
    return Codec(shape, block_size, tuple(k / 8 - 1 for k in range(16)), (0.0,) * 256, compute=compute)


def check(machine: Machine, tiles: Tiles, gpu: config.Gpu) -> None:
    """No spills, shared memory within the limit, 8-bit tensor cores, and one permute a weight in the loop."""
    assert machine.stack == 0, f"{tiles} spills {machine.stack} bytes a thread on {gpu.name}"
    assert machine.shared <= config.shared_limit(gpu.compute_capability)
    assert machine.loop[TENSOR[gpu.compute_capability]] > 0, machine.instructions
    assert not any("MMA" in name for name in machine.instructions if name != TENSOR[gpu.compute_capability])
    weights = 2 * tiles.block_o * tiles.block_i / (32 * tiles.num_warps)
    unpacking = 4 if tiles.scales_in_kernel else 0  # of 8-bit scales
    assert weights <= machine.loop["PRMT"] <= weights + unpacking, f"{machine.loop['PRMT']} permutes, {weights} weights"


@pytest.mark.parametrize("rows", [1, 32, 64, 256, 4096])
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_heuristic_tiles_compile_to_8_bit_tensor_cores(compute, capability, rows):
    gpu = GPUS[capability]
    tiles = triton_fp8_backend.heuristic(rows, SHAPE, 64, gpu)
    check(compile_fp8(codec(SHAPE, 64, compute), "bfloat16", tiles, capability), tiles, gpu)


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("compute", EIGHT_BIT)
@pytest.mark.parametrize(
    ("block_size", "dtype", "double_quant"), [(32, "float16", True), (128, "bfloat16", False), (256, "float16", True)]
)
def test_other_blocks_and_types_compile(block_size, dtype, double_quant, compute, capability, rows):
    gpu, shape = GPUS[capability], Shape(4096, 8192)
    tiles = triton_fp8_backend.heuristic(rows, shape, block_size, gpu)
    check(compile_fp8(codec(shape, block_size, compute), dtype, tiles, capability, double_quant), tiles, gpu)


def at_training_rows(capability: int, compute: str) -> tuple[Machine, Tiles]:
    tiles = triton_fp8_backend.heuristic(4096, SHAPE, 64, GPUS[capability])
    return compile_fp8(codec(SHAPE, 64, compute), "bfloat16", tiles, capability), tiles


def clocks(capability: int, compute: str) -> tuple[float, float, float]:
    """Of one tile at training rows: to issue its instructions (four a clock), of 8-bit and of 16-bit tensor cores."""
    machine, tiles = at_training_rows(capability, compute)
    products = 2 * tiles.block_o * tiles.block_m * tiles.block_i
    issue = machine.loop.total() * tiles.num_warps / 4
    return issue, products / DENSE_8[capability], products / DENSE_16[capability]


@pytest.mark.parametrize("compute", EIGHT_BIT)
@pytest.mark.parametrize(("capability", "registers"), [(89, 192), (90, 200)])
def test_registers_at_training_rows(capability, registers, compute):
    machine, _ = at_training_rows(capability, compute)
    assert 128 < machine.registers <= registers  # of 255, at 8 warps


@pytest.mark.parametrize(("compute", "multiplications"), [("fp8", 1), ("fp8_row", 0)])
@pytest.mark.parametrize("capability", GPUS)
def test_a_sum_takes_one_multiply_add_in_the_loop_and_a_multiplication_where_runs_are_scaled(
    capability, compute, multiplications
):
    machine, tiles = at_training_rows(capability, compute)
    sums = 2 * tiles.block_o * tiles.block_m // (32 * tiles.num_warps)
    assert machine.loop["FFMA"] == sums
    assert machine.loop["FMUL"] == multiplications * sums


@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_ada_spends_fewer_clocks_on_instructions_than_on_tensor_cores(compute):
    issue, eight_bit, _ = clocks(89, compute)
    assert issue < eight_bit / 2


def test_hopper_spends_more():
    """Decoding and scaling sums take longer than 8-bit tensor cores, and than dense 16-bit ones at their peak.

    So a kernel with a scale for each run cannot be expected to beat a dense product near its peak there. If this fails
    from below, say so.
    """
    issue, eight_bit, dense = clocks(90, "fp8")
    assert 2 * eight_bit == dense < issue < 1.35 * dense


def test_hopper_spends_less_than_dense_where_rows_are_scaled():
    """Still longer than 8-bit tensor cores.

    Not counted are what instructions wait for and the pass that rounds x before, which reads it twice for whole rows:
    only a GPU can tell the speed.
    """
    issue, eight_bit, dense = clocks(90, "fp8_row")
    assert 1.5 * eight_bit < issue < 0.9 * dense


def test_a_tile_that_is_too_large_is_seen():
    tiles = Tiles(128, 64, 64, split=1, group_m=8, num_warps=4, num_stages=3, scale_sums=True)
    with pytest.raises(AssertionError, match="block_o=64.*spills"):
        check(compile_fp8(codec(SHAPE, 64, "fp8"), "bfloat16", tiles, 90), tiles, GPUS[90])
