"""Runs a text of mosaic/fragments_ptx.py on numpy arrays, for all computing threads of a program side by side.

Beside it what PTX documents of tiles and registers: the swizzle of bulk copies, the fragments of wgmma.

A register is uint32 [threads]. Shared memory is bytes, of which nothing is written. Asserted: a register is written
before it is read, inputs are not read once an output is written, loads are aligned and within shared memory, and no
bank has to be asked twice.
"""

import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from tests.kernels import ptx

THREADS = 256
THREAD = np.arange(THREADS)
WARPGROUP, WARP, G, T = THREAD // 128, THREAD // 32 % 4, THREAD % 32 // 4, THREAD % 4
VALUES = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


def run(text: str, inputs: Sequence[int], outputs: int, shared: np.ndarray) -> np.ndarray:
    """uint32 [outputs, threads]. Operands $0.. are the outputs, then the inputs, each one for all threads."""
    registers = {f"${outputs + k}": np.full(THREADS, value, np.uint32) for k, value in enumerate(inputs)}
    registers["%tid.x"] = np.arange(THREADS, dtype=np.uint32)
    for line in text.splitlines():
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        op, *kinds, operands = re.fullmatch(r"(\w+)((?:\.[\w:]+)*) (.*);", line).groups()
        kinds = kinds[0].split(".")[1:]
        targets, *sources = [re.findall(r"[$%\w.]+", part) for part in re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", operands)]
        assert "$0" not in registers or not any(re.fullmatch(r"\$\d+", name) for part in sources for name in part), line
        values = [_value(registers, part[0]) for part in sources]
        if op in ("ld", "ldmatrix"):
            address = values[0].astype(np.int64) + int(sources[0][1] if len(sources[0]) > 1 else 0)
            found = _matrices(shared, address) if op == "ldmatrix" else _load(shared, address, kinds, len(targets))
        elif kinds[-1] in VALUES:
            found = [_arithmetic(op, VALUES[kinds[-1]], values)]
        elif op in ("add", "mul"):
            found = [values[0] + values[1] if op == "add" else values[0] * values[1]]
        else:
            found = [{**ptx.OPERATIONS, "xor": np.bitwise_xor}[op](*values)]
        registers |= {name: np.broadcast_to(one, THREADS) for name, one in zip(targets, found, strict=True)}
    return np.stack([registers[f"${k}"] for k in range(outputs)])


def _value(registers: dict, name: str) -> np.ndarray:
    return registers[name] if not name[0].isdigit() else np.uint32(int(name, 0))


def _load(shared: np.ndarray, address: np.ndarray, kinds: list[str], count: int) -> list[np.ndarray]:
    assert kinds[0] == "shared" and count == (2 if "v2" in kinds else 1)
    width = int(kinds[-1][1:]) // 8
    assert not np.any(address % (width * count)) and address.min() >= 0, "not aligned"
    phases = address.reshape(-1, 32 // count)  # lanes that are served at once
    _check_banks(phases[:, :, None] + np.arange(0, width * count, 4))
    cells = shared.view(f"<u{width}")
    return [cells[address // width + k].astype(np.uint32) for k in range(count)]


def _matrices(shared: np.ndarray, address: np.ndarray) -> list[np.ndarray]:
    """ldmatrix.x4.trans: lane 8 k + r of a warp has the address of row r of the k-th matrix of 8 x 8 16-bit values."""
    assert not np.any(address % 16)
    _check_banks(address.reshape(-1, 8, 1) + np.arange(0, 16, 4))
    rows = shared.view("<u2")[address[:, None] // 2 + np.arange(8)].reshape(-1, 4, 8, 8)  # [warp, matrix, row, column]
    g, t = np.divmod(np.arange(32), 4)
    first, second = (rows[:, :, 2 * t + k, g].astype(np.uint32) for k in range(2))
    return list(np.moveaxis(first | second << 16, 1, 0).reshape(4, -1))


def _check_banks(addresses: np.ndarray) -> None:
    """addresses [phases, lanes, words]: of each of the 32 banks of 4 bytes, at most one word is asked for at once."""
    for phase in addresses.reshape(len(addresses), -1) // 4:
        words = np.unique(phase)
        assert len(np.unique(words % 32)) == len(words), "lanes wait for a bank"


def _arithmetic(op: str, dtype: type, values: list[np.ndarray]) -> np.ndarray:
    """Both halves of a register: exact in float64, rounded once."""
    parts = [np.ascontiguousarray(value).view(dtype).astype(np.float64) for value in values]
    exact = parts[0] * parts[1] + (parts[2] if op == "fma" else 0)
    if dtype is not np.float16:  # ml_dtypes rounds to float32 first
        bits = exact.view(np.uint64)
        bits = bits + (np.uint64(2**44 - 1) + (bits >> np.uint64(45) & np.uint64(1)))
        exact = (bits >> np.uint64(45) << np.uint64(45)).view(np.float64)
    return exact.astype(dtype).view(np.uint32)


def in_shared_memory(tile: np.ndarray) -> np.ndarray:
    """A tile of bytes, 64 or 128 a row, as a bulk copy leaves it: pieces of 16 are moved by the number of their 128."""
    rows, width = tile.shape
    at = np.arange(rows * width).reshape(rows, width)
    moved = np.zeros(tile.size, np.uint8)
    moved[at ^ (at // 128 % (width // 16) * 16)] = tile
    return moved


def operand(registers: np.ndarray, dtype) -> np.ndarray:
    """[2 warpgroups, 64, .] of registers uint32 [., threads]: wgmma's left operand, four registers for 16 columns."""
    values = np.ascontiguousarray(registers.T).view(dtype).reshape(THREADS, -1, 2)
    found = np.zeros((2, 64, 4 * values.shape[1]), dtype)
    for register in range(values.shape[1]):
        row, column = 16 * WARP + G + 8 * (register % 2), 16 * (register // 4) + 8 * (register // 2 % 2) + 2 * T
        for k in range(2):
            found[WARPGROUP, row, column + k] = values[:, register, k]
    return found


def sums_in_registers(sums: np.ndarray) -> np.ndarray:
    """[threads, accumulators] of wgmma's sums [2 warpgroups, 64, rows]."""
    found = np.zeros((THREADS, sums.shape[2] // 8, 2, 2), sums.dtype)
    for n, h, k in np.ndindex(found.shape[1:]):
        found[:, n, h, k] = sums[WARPGROUP, 16 * WARP + G + 8 * h, 8 * n + 2 * T + k]
    return found.reshape(THREADS, -1)
