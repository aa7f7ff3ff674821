"""The kernel for few rows compiled to machine code for an H200 that is not here: registers, spills, instructions."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton's assembler and disassembler")

from pallas_kernels.nf4_matmul.mosaic.few_rows_ptx import BYTE_ROWS, GROUP, TILES  # noqa: E402
from tests.kernels.test_mosaic_compile import H200  # noqa: E402

TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
CHILD = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels.nf4_matmul import Codec, Packed, mosaic_hopper

rows, dtype, block_size, nested, target = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
devices = topologies.get_topology_desc(
    platform="cuda", topology_name="", topology="1x1x1", target_config=target
).devices
def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
codec = Codec((4096, 11008), block_size, tuple(k / 8 - 1 for k in range(16)), (0.0,) * 256)
codes, scales = array(4096 * 11008 // 2, dtype=jnp.uint8), 4096 * 11008 // block_size
packed = Packed(codes, array(scales), None, None)
if nested == "nested":
    packed = Packed(codes, array(scales, dtype=jnp.uint8), array(scales // 256), array())
device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
    function, x = jax.jit(lambda x, packed: mosaic_hopper.forward(x, packed, codec)), array(rows, 11008, dtype=dtype)
    function.trace(x, packed).lower(lowering_platforms=("cuda",)).compile()
"""


@pytest.mark.parametrize(
    ("rows", "dtype", "block_size", "scales", "most"),
    [
        (1, "bfloat16", 64, "nested", 2.2),
        (8, "float16", 64, "plain", 2.2),
        (16, "bfloat16", 64, "nested", 2.5),
        (9, "float16", 256, "plain", 2.5),
    ],
)
def test_a_weight_costs_few_instructions(rows, dtype, block_size, scales, most, tmp_path):
    """An H200 at 80% of its bandwidth affords about 4 a weight, at 132 * 128 lanes and 1.75 GHz."""
    dumps = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(rows), dtype, str(block_size), scales, H200],
        env=os.environ | dumps | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    (said,) = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers and int(registers[1]) <= 128, said  # 16 warps on a multiprocessor

    (ptx,) = tmp_path.glob("*.ptx")
    names = main_loop(ptx, tmp_path / "kernel.cubin")
    for quarter in range(4):  # loads are sent for all along the loop, not at its end
        assert "LDG" in names[quarter * len(names) // 4 : (quarter + 1) * len(names) // 4], names
    loop = Counter(names)
    weights = 2 * BYTE_ROWS * GROUP // 32  # of a thread and a group
    words, x_tiles = weights // 8, 1 + (rows > 8)
    assert sum(loop.values()) <= most * weights, loop
    assert loop["HMMA"] == words * x_tiles
    assert loop["LDS"] == 4 * words + (TILES if scales == "nested" else 0)  # a look-up for two weights, and the scales
    assert loop["LDG"] == weights // 32 + 4 * x_tiles + TILES * (2 if scales == "nested" else 1)
    # what shares a pipe of 64 lanes a clock, half of the issue slots: 2 a weight would fill it at 80% of the bandwidth
    assert loop["PRMT"] + loop["LOP3"] + loop["SHF"] + loop["LEA"] + loop["IADD3"] + loop["VIADD"] <= 1.2 * weights


def main_loop(ptx: Path, cubin: Path) -> list[str]:
    """Names of instructions between the target of the only branch far back and the branch."""
    subprocess.run([TOOLS / "ptxas-blackwell", "-arch=sm_90a", "-o", cubin, ptx], check=True)
    code = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*?);"
    instructions = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, code)]
    targets = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in instructions if name == "BRA"]
    (loop,) = [(int(found[1], 16), at) for at, found in targets if found and int(found[1], 16) < at]
    return [name for at, name, _ in instructions if loop[0] <= at <= loop[1]]
