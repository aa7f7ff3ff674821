"""The Hopper kernels for training, compiled for an H200 that is not here: where W is, what a weight costs, hazards.

A step of 256 rows keeps the tensor cores busy for 1,024 clocks, in which a multiprocessor decodes 8,192 weights: 64
clocks of its instructions for each that a weight costs, 128 for each on the pipe of whole numbers.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pallas_kernels.nf4_matmul.mosaic.hopper import COMPUTING_REGISTERS, STAGES
from qlora_jax.planning import topology
from tests.kernels.mosaic_compile import Compiled, Product, compile_all
from tests.kernels.ptx_fragments import in_shared_memory, sums_in_registers
from tests.kernels.ptx_stores import shared_after_stores

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

PRODUCTS = {  # product -> instructions a weight, at most
    Product("forward", 256, (1024, 1024), 64, "bfloat16", False): 5.2,
    Product("backward", 256, (1024, 1024), 64, "bfloat16", False): 5.1,
    Product("forward", 576, (1024, 1024), 256, "float16", False): 5.2,
    Product("backward", 576, (1024, 1024), 512, "float16", False): 5.1,
}
WEIGHTS = 64 * 64 * STAGES // 128  # of a thread in one round of the loop
# what shares a pipe of 64 lanes a clock, half of the issue slots
WHOLE_NUMBERS = ("PRMT", "LOP3", "SHF", "LEA", "IADD3", "VIADD", "SEL", "SGXT", "ISETP")


class Instruction(NamedTuple):
    address: int
    name: str  # with what follows its dots
    operands: str


def name(product: Product) -> str:
    return f"{product.op}-{product.rows}-{product.dtype}-{product.block_size}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Product, Compiled]:
    return compile_all([*PRODUCTS], tmp_path_factory.mktemp("mosaic"))


@pytest.fixture(scope="module")
def loops(compiled, tmp_path_factory) -> dict[Product, list[Instruction]]:
    triton = pytest.importorskip("triton", reason="needs triton's assembler and disassembler")
    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    cubin = tmp_path_factory.mktemp("cubin") / "kernel.cubin"
    return {product: loop_of_products(tools, found.ptx, cubin) for product, found in compiled.items()}


@pytest.mark.parametrize("product", PRODUCTS, ids=name)
def test_every_product_takes_weights_from_registers_and_nothing_spills(product, compiled):
    ptx, said = compiled[product].ptx.read_text(), compiled[product].said
    assert "for 'sm_90a'" in said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    assert "serialized" not in said, said  # else ptxas waits for each wgmma by itself
    kind = {"bfloat16": "bf16", "float16": "f16"}[product.dtype]
    shape = rf"m64n{rows_of_a_program(product)}k16\.f32\.{kind}\.{kind}"
    products = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.{shape} \{{[^}}]*\}}, (.)", ptx)
    assert products == ["{"] * 4 * STAGES and ptx.count("wgmma.mma_async") == len(products)


@pytest.mark.parametrize("product", PRODUCTS, ids=name)
def test_a_weight_costs_few_instructions(product, loops):
    loop = Counter(instruction.name.split(".")[0] for instruction in loops[product])
    assert sum(loop.values()) <= PRODUCTS[product] * WEIGHTS, loop
    assert sum(loop[each] for each in WHOLE_NUMBERS) <= 3.2 * WEIGHTS, loop
    assert loop["HGMMA"] == 4 * STAGES and loop["HMUL2"] == loop["HFMA2"] == WEIGHTS // 2
    loads = {"LDS": 12, "LDSM": 0} if product.op == "forward" else {"LDS": 8, "LDSM": 1}
    assert {each: loop[each] for each in loads} == {each: count * STAGES for each, count in loads.items()}


@pytest.mark.parametrize("product", PRODUCTS, ids=name)
def test_no_register_is_written_while_wgmma_may_read_it(product, loops):
    """wgmma reads its operand for as long as it runs; ptxas does not look after that."""
    loop = loops[product]
    assert list(written_in_flight(loop)) == []
    registers = {int(number) for each in loop for number in re.findall(r"\bR(\d+)\b", each.operands)}
    assert max(registers) < COMPUTING_REGISTERS
    # the check itself: were every step's operand in the registers of the first, it would be seen
    firsts = sorted({operand(each) for each in loop if each.name.startswith("HGMMA")})
    moved = {f"R{first + k}": f"R{firsts[0] + k}" for first in firsts for k in range(4)}
    renamed = [re.sub(r"\bR\d+\b", lambda found: moved.get(found[0], found[0]), each.operands) for each in loop]
    one_set = [each._replace(operands=operands) for each, operands in zip(loop, renamed, strict=True)]
    assert list(written_in_flight(one_set))


@pytest.mark.parametrize("product", PRODUCTS, ids=name)
def test_sums_are_stored_where_they_belong(product, compiled):
    """The machine's own instructions, on sums that are all different."""
    rows = rows_of_a_program(product)
    sums = np.arange(2 * 64 * rows).reshape(2, 64, rows)  # of either warpgroup, as wgmma numbers them
    found = shared_after_stores(compiled[product].ptx.read_text(), sums_in_registers(sums), 2 * sums.size)
    named = sums.reshape(2, 4, 2, 8, rows)  # [warpgroup, warp, first or second row, g, row of x]
    if product.op == "forward":  # y [rows, 32] of either half of W
        tiles = named.transpose(0, 2, 4, 1, 3).reshape(4, rows, 32)
    else:  # dx [rows, 64]
        tiles = named.transpose(0, 4, 1, 3, 2).reshape(2, rows, 64)
    expected = [in_shared_memory(tile.astype(np.uint16).view(np.uint8)) for tile in tiles]
    np.testing.assert_array_equal(found, np.concatenate(expected).view(np.uint16))


def rows_of_a_program(product: Product) -> int:
    return {256: 256, 576: 192}[product.rows]  # three tiles, none of them padded


def written_in_flight(loop: list[Instruction]):
    """What writes a register of an operand or of sums between a wgmma and the wait that ends it, in two rounds."""
    groups: list[set[int]] = []
    open_group: set[int] = set()
    for each in loop * 2:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", each.operands)]
        if each.name.startswith("HGMMA"):
            rows = int(re.search(r"\.64x(\d+)x16", each.name)[1])
            open_group |= {*range(operand(each), operand(each) + 4), *range(registers[0], registers[0] + rows // 2)}
            if "gsb0" in each.operands:
                groups, open_group = [*groups, open_group], set()
        elif each.name == "WARPGROUP.DEPBAR.LE":
            left = int(re.search(r"gsb0, 0x(\d+)", each.operands)[1])
            groups = groups[len(groups) - min(left, len(groups)) :]
        elif registers and each.operands.startswith("R"):
            width = {"LDSM": 4, "LDS.64": 2}.get(each.name if each.name == "LDS.64" else each.name.split(".")[0], 1)
            if open_group.union(*groups) & {*range(registers[0], registers[0] + width)}:
                yield each


def operand(product: Instruction) -> int:
    """The first of the four registers of a wgmma's left operand."""
    return int(re.match(r"R\d+, R(\d+), gdesc", product.operands)[1])


def loop_of_products(tools: Path, ptx: Path, cubin: Path) -> list[Instruction]:
    """The shortest loop that has all wgmma; colder code that ptxas puts behind it also branches back."""
    subprocess.run([tools / "ptxas-blackwell", "-arch=sm_90a", "-o", cubin, ptx], check=True)
    code = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9.x_a-z]+)\s*(.*?)\s*;", code)
    instructions = [Instruction(int(at, 16), each, operands) for at, each, operands in found]
    total = sum(each.name.startswith("HGMMA") for each in instructions)
    loops = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)", branch.operands)
        if branch.name == "BRA" and target and int(target[1], 16) < branch.address:
            loop = [each for each in instructions if int(target[1], 16) <= each.address <= branch.address]
            loops += [loop] * (sum(each.name.startswith("HGMMA") for each in loop) == total)
    return min(loops, key=len)
