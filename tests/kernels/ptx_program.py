"""Runs a whole program of PTX on numpy arrays, a cluster of blocks: the text which the GPU gets is what is tested.

Registers are arrays [programs, 32] of one warp's lanes; programs that differ in data alone run side by side. Warps run
one after another from barrier to barrier, and so do a cluster's blocks, the first of them first: a missing barrier
shows as a read of what is not there yet. Asserted: registers and shared memory are written before they are read,
whole-number arithmetic does not overflow, accesses are aligned and inside one array, no block writes to the memory of
one that has ended, and a branch goes one way for a warp. Nested scopes share their names here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from tests.kernels import ptx

SHARED = 1024  # where shared memory begins: not at 0, so that an address without it is seen
BLOCK = 2**24  # as seen from its cluster, the shared memory of block k lies (k + 1) times so far on
ARRAY = 2**36  # arrays lie this far apart
STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>\w+) )?(?P<op>[\w.:]+)(?: (?P<operands>.*))?")
VALUES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


Numbers = Sequence[np.ndarray | int]


def run(
    text: str,
    arrays: Sequence[np.ndarray],
    clusters: np.ndarray | int,
    blocks: Sequence[Numbers],
    warps: int,
    shared_bytes: int,
) -> None:
    """Operands $0.. are shared memory's address, a block's numbers, then those of arrays (read and written in place).

    `clusters`: their numbers, which run side by side. `blocks`: the numbers that each block of a cluster is given.
    """
    pointers = [np.uint64((k + 1) * ARRAY) for k in range(len(arrays))]
    memory = [array.reshape(-1).view(np.uint8) for array in arrays]
    assert all(np.shares_memory(array, view) for array, view in zip(arrays, memory, strict=True))
    statements, labels = _parse(text)
    numbered = np.asarray(clusters, np.uint32).reshape(-1, 1)
    cluster: list[_Block] = []
    for rank, numbers in enumerate(blocks):
        words = [np.asarray(number, np.uint32).reshape(-1, 1) for number in numbers]
        operands = {f"${k}": value for k, value in enumerate([np.uint32(SHARED), *words, *pointers])}
        operands |= {"%clusterid.x": numbered, "%cluster_ctarank": np.uint32(rank)}
        operands["%ctaid.x"] = numbered * np.uint32(len(blocks)) + np.uint32(rank)
        shared = tuple(np.zeros((len(numbered), shared_bytes), np.uint8) for _ in range(2))
        threads = [_Warp(operands, memory, cluster, rank, warp, len(numbered)) for warp in range(warps)]
        cluster.append(_Block(shared, [warp.run(statements, labels) for warp in threads]))
    while any(block.warps for block in cluster):
        reached = {block.reach_others() for block in cluster if block.warps}
        assert len(reached) == 1, f"some blocks wait for others that never come: {reached}"


class _Block:
    """A block's shared memory (bytes, and which were written), and what its warps have still to do."""

    def __init__(self, shared: tuple[np.ndarray, ...], warps: list[Iterator[tuple[str, int]]]):
        self.shared, self.warps = shared, warps

    def reach_others(self) -> tuple[str, int] | None:
        """Runs its warps up to where they wait for the cluster, or to their end: None."""
        while self.warps:
            reached = [next(warp, None) for warp in self.warps]
            assert len(set(reached)) == 1, f"some warps wait at a barrier that others never reach: {reached}"
            if reached[0] is None:
                self.warps = []
            elif reached[0][0] == "cluster":
                return reached[0]
        return None


def _parse(text: str) -> tuple[list[tuple], dict[str, int]]:
    statements: list[tuple] = []
    labels = {}
    for line in text.splitlines():
        line = line.strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(statements)
        elif line not in ("{", "}") and not line.startswith(".reg"):
            match = STATEMENT.fullmatch(line.removesuffix(";"))
            assert match and line.endswith(";"), line
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", match["operands"] or "")
            statements.append((line, match["guard"], match["not"] == "!", match["op"].split("."), operands))
    return statements, labels


class _Warp:
    def __init__(
        self, operands: Mapping, memory: list[np.ndarray], cluster: list["_Block"], block: int, warp: int, programs: int
    ):
        lanes = np.broadcast_to(np.arange(32, dtype=np.uint32) + np.uint32(32 * warp), (programs, 32))
        self.registers = {**operands, "%tid.x": lanes}
        self.memory, self.cluster, self.block, self.shape = memory, cluster, block, (programs, 32)
        self.everyone = np.ones(self.shape, bool)

    def run(self, statements: list[tuple], labels: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        """Yields where it waits, for its block or for the cluster."""
        has_arrived = False
        at = 0
        while at < len(statements):
            line, guard, negated, (op, *kinds), operands = statements[at]
            at += 1
            active = np.broadcast_to(self.registers[guard] ^ negated, self.shape) if guard else self.everyone
            try:
                if op == "bra":
                    assert active.all() or not active.any(), "a branch that divides a warp"
                    at = labels[operands[0]] if active.all() else at
                elif op == "bar":
                    yield "block", at
                elif op == "barrier":
                    step = ".".join(kinds)
                    assert step == ("cluster.wait.acquire" if has_arrived else "cluster.arrive.release") + ".aligned"
                    if has_arrived:
                        yield "cluster", at
                    has_arrived = not has_arrived
                elif op in ("ld", "st"):
                    self._access(op, kinds, operands, active)
                else:
                    assert not guard, "a guard that is not emulated"
                    self._compute(op, kinds, operands)
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"{line} {error!r}") from error

    def _value(self, name: str) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16))
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.uint32(int(name, 0))
        raise KeyError(f"{name} is read before it is written")

    def _float(self, name: str) -> np.ndarray:
        return np.asarray(self._value(name), np.uint32).view(np.float32)

    def _set(self, name: str, value: np.ndarray) -> None:
        """A register may hold less than [programs, 32], where its value is one for all lanes or programs."""
        self.registers[name] = value

    def _compute(self, op: str, kinds: list[str], operands: list[str]) -> None:
        target, *sources = operands
        if op == "mma":
            self._product(kinds, operands)
        elif op == "mov":
            self._set(target, self._value(sources[0]))
        elif op == "cvt":
            assert kinds[0] == "rn"
            self._set(target, self._float(sources[0]).astype(VALUES[kinds[1]]).view(np.uint16))
        elif op == "shfl":
            self._shuffle(operands)
        elif op == "mapa":
            assert kinds == ["shared::cluster", "u32"]
            self._set(target, self._value(sources[0]) + np.uint32((int(sources[1]) + 1) * BLOCK))
        elif kinds[-1] == "f32":
            values = [self._float(source) for source in sources]
            if op == "fma":  # the product of two float32 is exact in float64
                found = (values[0].astype(np.float64) * values[1] + values[2]).astype(np.float32)
            else:
                found = {"add": np.add, "mul": np.multiply}[op](*values)
            self._set(target, found.view(np.uint32))
        elif op == "setp":
            left, right = map(self._value, sources)
            self._set(target, {"lt": left < right, "ge": left >= right, "ne": left != right}[kinds[0]])
        elif op == "selp":
            one, other, condition = map(self._value, sources)
            kind = {"b32": np.uint32, "b64": np.uint64}[kinds[0]]
            self._set(target, np.where(condition, kind(one), kind(other)))
        elif kinds[-1] == "pred":
            assert op == "and"
            self._set(target, self._value(sources[0]) & self._value(sources[1]))
        elif op == "sub":
            left, right = map(self._value, sources)
            assert np.all(left >= right), "overflow"
            self._set(target, np.asarray(left - right, np.uint32))
        elif op in ("add", "mul", "mad", "min"):
            wide = [np.asarray(self._value(source), np.uint64) for source in sources]  # addresses are small
            found = {"add": np.add, "mul": np.multiply, "min": np.minimum}.get(op, lambda a, b, c: a * b + c)(*wide)
            bits = 64 if "wide" in kinds or kinds[-1] == "u64" else 32
            assert bits == 64 or np.all(found < 2**32), "overflow"
            self._set(target, found.astype(np.uint64 if bits == 64 else np.uint32))
        else:
            self._set(target, np.asarray(ptx.OPERATIONS[op](*map(self._value, sources)), np.uint32))

    def _access(self, op: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        """Loads and stores of lanes that are active; registers of others keep what they held."""
        address, names = operands if op == "st" else reversed(operands)
        base, _, offset = address.strip("[]").partition("+")
        width = int(kinds[-1][1:]) // 8
        registers = re.findall(r"\w+", names)
        assert len(registers) == (4 if "v4" in kinds else 1)
        first = np.broadcast_to(self._value(base), self.shape).astype(np.int64)[active] + int(offset or 0)
        if not first.size:
            return
        assert not np.any(first % (width * len(registers))), "not aligned"
        if kinds[0] in ("shared", "shared::cluster"):
            block = self.block
            if kinds[0] == "shared::cluster":
                (block,) = set((first // BLOCK - 1).tolist())
                assert self.cluster[block].warps, "its block has ended"
                first = first % BLOCK
            space, written = self.cluster[block].shared
            program = np.nonzero(active)[0]
            first = first - SHARED
        else:
            (number,) = {int(first[0]) // ARRAY, int(first.min()) // ARRAY, int(first.max()) // ARRAY}
            space, written, program = self.memory[number - 1][None], None, 0
            first = first % ARRAY
        assert first.min() >= 0 and first.max() + width * len(registers) <= space.shape[1], "outside its array"
        end, kind = space.shape[1] // width * width, np.dtype(f"<u{width}")  # accesses are aligned: to cells of a view
        space, index = space[:, :end].view(kind), first // width
        if written is not None:
            written = written[:, :end].view(kind)
        all_bytes = kind.type(0x01010101 & ((1 << 8 * width) - 1))
        for k, register in enumerate(registers):
            if op == "ld":
                if written is not None:
                    assert np.all(written[program, index + k] == all_bytes), (
                        "shared memory is read before it is written"
                    )
                found = space[program, index + k].astype(np.uint32)
                if active is self.everyone:
                    self._set(register, found.reshape(self.shape))
                else:
                    value = np.array(np.broadcast_to(self.registers.get(register, np.uint32(0)), self.shape), np.uint32)
                    value[active] = found
                    self._set(register, value)
            else:
                value = np.broadcast_to(self._value(register), self.shape)[active]
                space[program, index + k] = value.astype("<u4").astype(kind)
                if written is not None:
                    written[program, index + k] = all_bytes

    def _shuffle(self, operands: list[str]) -> None:
        """shfl.sync.idx: a lane's part of the mask stays, the rest comes from the operand."""
        target, source, lane, limits, members = operands
        assert int(members, 0) == 0xFFFFFFFF
        kept, bound = int(limits, 0) >> 8 & 31, int(limits, 0) & 31
        lanes = np.arange(32)
        source_lanes = lanes & kept | int(lane, 0) & ~kept & 31
        assert np.all(source_lanes <= (lanes & kept | bound & ~kept))
        self._set(target, np.broadcast_to(self._value(source), self.shape)[:, source_lanes])

    def _product(self, kinds: list[str], operands: list[str]) -> None:
        """mma.m16n8k16 by the fragments of its documentation: lane 4 g + t; exact products, summed in float32."""
        assert kinds[:4] == ["sync", "aligned", "m16n8k16", "row"] and len(set(kinds[6:8])) == 1
        dtype = VALUES[kinds[6]]
        target, *sources = [re.findall(r"\w+", names) for names in operands]
        a, b, c = [
            np.stack([np.broadcast_to(self._value(name), self.shape) for name in names], -1) for names in sources
        ]
        g, t = np.divmod(np.arange(32), 4)
        left = np.empty((self.shape[0], 16, 16), np.float32)
        right = np.empty((self.shape[0], 16, 8), np.float32)
        sums = np.empty((self.shape[0], 16, 8), np.float32)
        for k in range(8):  # value k of a lane's four registers
            row, column = g + 8 * (k // 2 % 2), 2 * t + k % 2 + 8 * (k // 4)
            left[:, row, column] = np.ascontiguousarray(a).view(dtype)[..., k].astype(np.float32)
        for k in range(4):
            right[:, 2 * t + k % 2 + 8 * (k // 2), g] = np.ascontiguousarray(b).view(dtype)[..., k].astype(np.float32)
            sums[:, g + 8 * (k // 2), 2 * t + k % 2] = np.ascontiguousarray(c).view(np.float32)[..., k]
        sums = left @ right + sums
        for k, name in enumerate(target):
            self._set(name, sums[:, g + 8 * (k // 2), 2 * t + k % 2].view(np.uint32))
