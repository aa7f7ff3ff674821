"""Every kernel compiles to machine code for the GPUs it is for, without spilling, on a machine that has none."""

import dataclasses

import pytest

pytest.importorskip("triton")

from pallas_kernels.nf4_matmul import Codec, config  # noqa: E402
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape  # noqa: E402
from tests.kernels.triton_compile import Machine, compile_kernel  # noqa: E402

GPUS = {
    80: config.Gpu("NVIDIA A100-SXM4-80GB", 80, 108),
    86: config.Gpu("NVIDIA RTX A6000", 86, 84),
    89: config.Gpu("NVIDIA GeForce RTX 4090", 89, 128),
    90: config.Gpu("NVIDIA H200", 90, 132),
}
ROWS = (1, 32, 64, 4096)
SHAPE = SHAPES["llama-7b/down"]
TABLE = tuple(k / 8 - 1 for k in range(16))


def codec(shape: Shape, block_size: int) -> Codec:
    return Codec(shape, block_size, TABLE, (0.0,) * 256)


def check(machine: Machine, tiles: config.Tiles, gpu: config.Gpu) -> None:
    assert machine.stack == 0, f"{tiles} spills {machine.stack} bytes a thread on {gpu.name}"
    limit = config.shared_limit(gpu.compute_capability)
    assert machine.shared <= limit, f"{tiles} takes {machine.shared} bytes of shared memory, {gpu.name} has {limit}"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("capability", GPUS)
def test_heuristic_tiles_compile_without_spilling(capability, op, rows):
    gpu = GPUS[capability]
    tiles = config.heuristic(op, rows, SHAPE, 64, gpu)
    machine = compile_kernel(op, codec(SHAPE, 64), "bfloat16", tiles, capability)
    check(machine, tiles, gpu)
    # two permutes look a weight up, half a one unpacks it, up to one stores: decoded twice it would be over 4
    weights = 2 * tiles.block_o * tiles.block_i / (32 * tiles.num_warps)
    assert machine.instructions["PRMT"] <= 4 * weights, f"{tiles}: a weight is decoded more than once"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("capability", GPUS)
def test_adapters_in_the_epilogue_spill_nothing_and_cost_few_instructions(capability, op, rows):
    gpu = GPUS[capability]
    tiles = config.heuristic(op, rows, SHAPE, 64, gpu)
    plain = compile_kernel(op, codec(SHAPE, 64), "bfloat16", tiles, capability)
    for rank, adapters in ((16, 1), (64, 3), *([(256, 1)] if capability == 80 else [])):
        machine = compile_kernel(op, codec(SHAPE, 64), "bfloat16", tiles, capability, adapters=adapters, rank=rank)
        check(machine, tiles, gpu)
        assert machine.instructions["PRMT"] == plain.instructions["PRMT"]  # weights are decoded as without adapters
        # the low-rank loop must not be unrolled over the rank
        assert machine.instructions.total() <= plain.instructions.total() + 320


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize(
    ("block_size", "dtype", "double_quant"), [(32, "float16", True), (128, "bfloat16", False), (4096, "float16", True)]
)
def test_other_blocks_and_types_compile(block_size, dtype, double_quant, op, rows):
    gpu, shape = GPUS[80], Shape(4096, 8192)
    tiles = config.heuristic(op, rows, shape, block_size, gpu)
    check(compile_kernel(op, codec(shape, block_size), dtype, tiles, 80, double_quant), tiles, gpu)


@pytest.mark.parametrize("capability", GPUS)
def test_tuned_tiles_compile_without_spilling(capability):
    gpu = GPUS[capability]
    tuned = [path for path in config.TUNED.glob("*.json") if path == config.table_file(gpu.name)]
    for path in tuned:
        for (op, shape, block_size, _), (_, tiles) in config.read_table(path).items():
            if tiles is None:
                continue
            check(compile_kernel(op, codec(shape, block_size), "bfloat16", tiles, capability), tiles, gpu)


def test_a_tile_that_is_too_large_is_seen():
    tiles = config.Tiles(128, 128, 64, split=1, group_m=8, num_warps=4, num_stages=2)
    machine = compile_kernel("forward", codec(SHAPE, 64), "bfloat16", tiles, 86)
    with pytest.raises(AssertionError, match="block_o=128.*spills"):
        check(machine, tiles, GPUS[86])
    many = dataclasses.replace(tiles, block_o=64, num_stages=8, num_warps=8)
    with pytest.raises(AssertionError, match="num_stages=8.*shared memory"):
        check(compile_kernel("forward", codec(SHAPE, 64), "bfloat16", many, 86), many, GPUS[86])
