"""Follows the stores of sums in a compiled kernel's PTX: from accumulators to shared memory, for all computing threads.

A register's value is looked up where it is defined, so nothing before the stores is run. Values of sums are numbers
that tell them apart: rounding two of them to 16 bits is taken as putting them side by side.
"""

import re

import numpy as np

THREADS = 256
TYPES = r"(?:\.[\w:]+)*"


def shared_after_stores(ptx: str, sums: np.ndarray, size: int) -> np.ndarray:
    """uint16 [size / 2]: what the kernel leaves in the first bytes of shared memory; 0xffff where nothing is stored.

    sums: [threads, accumulators of a thread], whole numbers below 2^16 in the order in which wgmma names its registers.
    """
    names = re.findall(r"%r\d+", ptx[ptx.rindex("wgmma.mma_async") :].split("{")[1].split("}")[0])
    registers = dict(zip(names, sums.T.astype(np.int64), strict=True))
    shared = np.full(size // 2, 0xFFFF, np.uint16)
    stores = ptx[ptx.rindex("wgmma.wait_group.sync.aligned 0") :].split("fence.proxy.async")[0]
    for op, address, offset, sources in re.findall(r"(stmatrix|st\.shared)\S* \s*\[(%rd\d+)\+?(\d*)\], (.*);", stores):
        at = (_value(ptx, registers, address) + int(offset or 0)) // 2
        values = [_value(ptx, registers, name) for name in re.findall(r"%r\d+", sources)]
        if op == "st.shared":
            for k in range(2):
                shared[at + k] = values[0] >> 16 * k & 0xFFFF
            continue
        rows, (g, t) = at.reshape(-1, 4, 8), np.divmod(np.arange(32), 4)  # [warp, matrix, row]
        for matrix, value in enumerate(values):
            for k in range(2):  # transposed: a lane's pair is of rows 2 t and 2 t + 1, in column g
                shared[rows[:, matrix, 2 * t + k] + g] = value.reshape(-1, 32) >> 16 * k & 0xFFFF
    return shared


def _value(ptx: str, registers: dict[str, np.ndarray], name: str) -> np.ndarray:
    if re.fullmatch(r"-?\d+", name):
        return np.int64(name)
    if name == "%tid.x":
        return np.arange(THREADS)
    if name == "__dynamic_shmem__0":
        return np.zeros(THREADS, np.int64)
    if name not in registers:
        op, operands = re.search(rf"^\s*(\w+){TYPES}\s+{name}, (.*);$", ptx, re.MULTILINE).groups()
        values = [_value(ptx, registers, source) for source in operands.split(", ")]
        registers[name] = OPERATIONS[op](*values)
    return registers[name]


def _one_for_a_warp(value: np.ndarray) -> np.ndarray:
    assert np.all(value.reshape(-1, 32) == value[::32, None])
    return value


OPERATIONS = {
    "mov": lambda a: a,
    "shl": lambda a, b: a << b & 0xFFFFFFFF,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "bfe": lambda a, first, count: a >> first & (1 << count) - 1,
    "cvt": lambda high, low: low | high << 16,
    "shfl": lambda a, *_: _one_for_a_warp(a),
}
