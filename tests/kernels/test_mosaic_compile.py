"""The Mosaic kernel for few rows compiles for an H200 that is not here: registers, spills, instructions."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pallas_kernels.nf4_matmul.mosaic.few_rows_program import BYTE_ROWS, GROUP, TILES
from qlora_jax.planning import topology
from tests.kernels.mosaic_compile import Compiled, Product, compile_all

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

DOWN = (4096, 11008)
FEW_ROWS = {  # product -> instructions a weight, at most
    Product("forward", 1, DOWN, 64, "bfloat16", True): 2.2,
    Product("forward", 8, DOWN, 64, "float16", False): 2.2,
    Product("forward", 16, DOWN, 64, "bfloat16", True): 2.5,
    Product("forward", 9, DOWN, 256, "float16", False): 2.5,
    Product("forward", 1, (4096, 4096), 64, "bfloat16", True, joined=3): 2.2,
    Product("forward", 16, (4096, 4096), 64, "bfloat16", True, joined=3): 2.5,
}


def name(product: Product) -> str:
    return f"{product.op}-{product.rows}-{product.dtype}-{product.block_size}-{product.joined}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Product, Compiled]:
    return compile_all([*FEW_ROWS], tmp_path_factory.mktemp("mosaic"))


@pytest.mark.parametrize("product", FEW_ROWS, ids=name)
def test_a_weight_costs_few_instructions_at_few_rows(product, compiled, tmp_path):
    """An H200 at 80% of its bandwidth affords about 4 a weight, at 132 * 128 lanes and 1.75 GHz."""
    triton = pytest.importorskip("triton", reason="needs triton's assembler and disassembler")
    said = compiled[product].said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers and int(registers[1]) <= 128, said  # 16 warps on a multiprocessor

    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    names = main_loop(tools, compiled[product].ptx, tmp_path / "kernel.cubin")
    for quarter in range(4):  # loads are sent for all along the loop, not at its end
        assert "LDG" in names[quarter * len(names) // 4 : (quarter + 1) * len(names) // 4], names
    loop = Counter(names)
    weights = 2 * BYTE_ROWS * GROUP // 32  # of a thread and a group
    words, x_tiles = weights // 8, 1 + (product.rows > 8)
    assert sum(loop.values()) <= FEW_ROWS[product] * weights, loop
    assert loop["HMMA"] == words * x_tiles
    assert loop["LDS"] == 4 * words + (TILES if product.nested else 0)  # a look-up for two weights, and the scales
    assert loop["LDG"] == weights // 32 + 4 * x_tiles + TILES * (2 if product.nested else 1)
    # what shares a pipe of 64 lanes a clock, half of the issue slots: 2 a weight would fill it at 80% of the bandwidth
    assert loop["PRMT"] + loop["LOP3"] + loop["SHF"] + loop["LEA"] + loop["IADD3"] + loop["VIADD"] <= 1.2 * weights


def main_loop(tools: Path, ptx: Path, cubin: Path) -> list[str]:
    """Names of instructions between the target of the only branch far back and the branch."""
    subprocess.run([tools / "ptxas-blackwell", "-arch=sm_90a", "-o", cubin, ptx], check=True)
    code = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*?);"
    instructions = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, code)]
    targets = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in instructions if name == "BRA"]
    (loop,) = [(int(found[1], 16), at) for at, found in targets if found and int(found[1], 16) < at]
    return [name for at, name, _ in instructions if loop[0] <= at <= loop[1]]
