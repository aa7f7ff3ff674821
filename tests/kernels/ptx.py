"""Runs the integer PTX of an inline assembly on numpy arrays, so that the text which the GPU gets is what is tested."""

import re
from collections.abc import Sequence

import numpy as np

LINE = re.compile(r"(?P<op>[a-z0-9]+)(?:\.[a-z0-9]+)* (?P<operands>.*)")


def run(assembly: str, inputs: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Operands $0.. are the outputs, then the inputs (uint32 arrays, or scalars); returns the outputs."""
    registers = {f"${outputs + k}": np.asarray(value, np.uint32) for k, value in enumerate(inputs)}
    has_written = False
    for statement in re.split(r"[;\n{}]+", assembly):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        match = LINE.fullmatch(statement.strip())
        assert match, statement
        target, *sources = [operand.strip() for operand in match["operands"].split(",")]
        # an output may be given an input's register: once one is written, inputs must not be read any more
        assert not (has_written and any(source.startswith("$") for source in sources)), statement
        has_written = has_written or target.startswith("$")
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[target] = np.asarray(OPERATIONS[match["op"]](*values), np.uint32)
    return [registers[f"${k}"] for k in range(outputs)]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt in its default mode: a nibble of the selector picks one of eight bytes, its top bit asks for the sign."""
    if np.ndim(selector) == 0:  # the same for all: faster by shifts
        result = np.uint32(0)
        for k in range(4):
            nibble = int(selector) >> 4 * k & 15
            byte = (a if nibble & 7 < 4 else b) >> np.uint32(8 * (nibble & 3)) & np.uint32(255)
            byte = (byte >> np.uint32(7)) * np.uint32(255) if nibble & 8 else byte
            result = result | byte << np.uint32(8 * k)
        return result
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = np.stack([a, b], axis=-1).astype("<u4").view(np.uint8)
    nibbles = selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & 0xF
    values = np.take_along_axis(both, (nibbles & 7).astype(np.int64), axis=-1)
    return np.where(nibbles >> 3 == 0, values, np.where(values >> 7 == 0, 0, 255)).astype(np.uint8).view("<u4")[..., 0]


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit (4 a + 2 b + c) of the table, for each bit position."""
    result = np.uint32(0)
    for index in range(8):
        if int(table) >> index & 1:
            term = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result = result | term
    return result


OPERATIONS = {
    "and": lambda a, b: a & b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "mov": lambda a: a,
    "lop3": _lop3,
    "prmt": _prmt,
}
