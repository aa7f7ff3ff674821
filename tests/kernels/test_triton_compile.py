"""The kernel for few rows compiles to machine code for the GPUs it is for, without spilling, on a machine with none."""

import pytest

pytest.importorskip("triton")

from pallas_kernels.nf4_matmul import Codec, config  # noqa: E402
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape  # noqa: E402
from tests.kernels.triton_compile import Machine, compile_forward  # noqa: E402

GPUS = {
    80: config.Gpu("NVIDIA A100-SXM4-80GB", 80, 108),
    86: config.Gpu("NVIDIA RTX A6000", 86, 84),
    89: config.Gpu("NVIDIA GeForce RTX 4090", 89, 128),
    90: config.Gpu("NVIDIA H200", 90, 132),
}
TABLE = tuple(k / 8 - 1 for k in range(16))


def codec(shape: Shape, block_size: int) -> Codec:
    return Codec(shape, block_size, TABLE, (0.0,) * 256)


def check(machine: Machine, tiles: config.Tiles, gpu: config.Gpu) -> None:
    assert machine.stack == 0, f"{tiles} spills {machine.stack} bytes a thread on {gpu.name}"
    limit = config.shared_limit(gpu.compute_capability)
    assert machine.shared <= limit, f"{tiles} takes {machine.shared} bytes of shared memory, {gpu.name} has {limit}"


@pytest.mark.parametrize(("shape", "most"), [("llama-65b/gate_up", 4.1), ("llama-7b/down", 5.4)])
@pytest.mark.parametrize("capability", GPUS)
def test_untuned_tiles_compile_to_few_instructions_without_spilling(capability, shape, most):
    """In programs of 32 rows of bytes, and of 16 where a weight has few rows."""
    gpu, shape = GPUS[capability], SHAPES[shape]
    tiles = config.heuristic(shape, 64, gpu)
    assert tiles.block_o == (32 if most < 5 else 16)
    machine = compile_forward([codec(shape, 64)], "bfloat16", tiles, capability)
    check(machine, tiles, gpu)
    per_turn = 2 * tiles.split * tiles.block_o * tiles.block_i
    weights = per_turn / (32 * tiles.num_warps)  # of a thread and a turn of the loop
    # two permutes look a weight up, half a one unpacks it, up to one stores: decoded twice it would be over 4
    assert machine.instructions["PRMT"] <= 4 * weights, f"{tiles}: a weight is decoded more than once"
    # by bandwidth an A100 affords 5 a weight, an RTX A6000 13, an RTX 4090 21
    assert machine.loop.total() <= most * weights, machine.loop


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "double_quant"),
    [
        ("llama-70b/gate_up", 128, "bfloat16", False),
        ("llama-7b/attention", 32, "float16", True),
        ("llama-65b/attention", 4096, "float16", True),
    ],
)
def test_other_shapes_blocks_and_types_compile(shape, block_size, dtype, double_quant):
    tiles = config.heuristic(SHAPES[shape], block_size, GPUS[80])
    check(compile_forward([codec(SHAPES[shape], block_size)], dtype, tiles, 80, double_quant), tiles, GPUS[80])


@pytest.mark.parametrize(("capability", "most"), [(80, 6.2), (89, 6.4)])
def test_several_weights_in_one_launch(capability, most):
    """Queries, keys and values of Llama-3-8B; ptxas moves more registers then: an A100 affords 5."""
    codecs = [codec(Shape(out, 4096), 64) for out in (4096, 1024, 1024)]
    tiles = config.heuristic(Shape(4096, 4096), 64, GPUS[capability])
    machine = compile_forward(codecs, "bfloat16", tiles, capability)
    check(machine, tiles, GPUS[capability])
    weights = 2 * tiles.split * tiles.block_o * tiles.block_i / (32 * tiles.num_warps)
    assert machine.loop.total() <= most * weights, machine.loop


@pytest.mark.parametrize("capability", GPUS)
def test_tuned_tiles_compile_without_spilling(capability):
    gpu = GPUS[capability]
    tuned = [path for path in config.TUNED.glob("*.json") if path == config.table_file(gpu.name)]
    for path in tuned:
        for (_, shape, block_size, _), (_, tiles) in config.read_table(path).items():
            if tiles is not None:
                check(compile_forward([codec(shape, block_size)], "bfloat16", tiles, capability), tiles, gpu)


def test_a_tile_that_is_too_large_is_seen():
    tiles = config.Tiles(block_o=128, block_i=64, split=1, num_warps=1, num_stages=8)
    machine = compile_forward([codec(SHAPES["llama-7b/down"], 64)], "bfloat16", tiles, 86)
    with pytest.raises(AssertionError, match="block_o=128.*spills"):
        check(machine, tiles, GPUS[86])
    with pytest.raises(AssertionError, match="num_stages=8.*shared memory"):
        check(machine._replace(stack=0), tiles, GPUS[86])
