"""Runs a whole program of PTX on numpy arrays, a cluster of blocks: the text which the GPU gets is what is tested.

Registers are arrays [warps, programs, 32], where a warp has 32 lanes; programs that differ in data alone run side by
side, and so do a block's warps until a branch divides them. The blocks of a cluster run one after another from barrier
to barrier of the cluster, the first of them first: a missing one shows as a read of what is not there yet. Asserted:
registers and shared memory are written before they are read, what one warp writes there and another reads or writes has
a barrier between, whole-number arithmetic does not overflow, accesses are aligned and inside one array, no block writes
to the memory of one that has ended, and a branch goes one way for a warp. Nested scopes share their names here.
"""

import functools
import re
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from tests.kernels import ptx

SHARED = 1024  # where shared memory begins: not at 0, so that an address without it is seen
BLOCK = 2**24  # as seen from its cluster, the shared memory of block k lies (k + 1) times so far on
ARRAY = 2**36  # arrays lie this far apart
STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>\w+) )?(?P<op>[\w.:]+)(?: (?P<operands>.*))?")
VALUES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
MOST_WARPS = 16  # of a block
NEVER = 255  # when shared memory was written that was not


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
    assert warps <= MOST_WARPS and MOST_WARPS * len(blocks) < NEVER
    numbered = np.asarray(clusters, np.uint32).reshape(-1, 1)
    cluster: list[_Block] = []
    for rank, numbers in enumerate(blocks):
        words = [np.asarray(number, np.uint32).reshape(-1, 1) for number in numbers]
        operands = {f"${k}": value for k, value in enumerate([np.uint32(SHARED), *words, *pointers])}
        operands |= {"%clusterid.x": numbered, "%cluster_ctarank": np.uint32(rank)}
        operands["%ctaid.x"] = numbered * np.uint32(len(blocks)) + np.uint32(rank)
        block = _Block(len(numbered), shared_bytes)
        cluster.append(block)
        block.groups = [_Warps(statements, labels, operands, memory, cluster, rank, np.arange(warps), len(numbered))]
    while any(block.groups for block in cluster):
        reached = {block.reach_others() for block in cluster if block.groups}
        assert len(reached) == 1, f"some blocks wait for others that never come: {reached}"


class _Block:
    """A block's shared memory, and the groups of its warps that have still to do.

    Of each byte of it for each program: when it was written last and by which warp, and when it was read last; times
    are counted in the barriers that the block waited at, from 1.
    """

    def __init__(self, programs: int, shared_bytes: int):
        self.shared, self.writer, self.read = (np.zeros((programs, shared_bytes), np.uint8) for _ in range(3))
        self.written = np.full_like(self.shared, NEVER)
        self.groups: list[_Warps] = []
        self.time = 0

    def note(self, op: str, kind: np.dtype, cells: tuple[np.ndarray, ...], marks: np.ndarray) -> None:
        """That warps of these marks read ("ld") or write cells of `kind`; asserts that they may."""
        views = [
            table[:, : table.shape[1] // kind.itemsize * kind.itemsize].view(kind)
            for table in (self.written, self.writer, self.read)
        ]
        written, writer, read = (view[cells].view(np.uint8).reshape(len(marks), -1) for view in views)
        may = op == "st" or written.max() < self.time
        may = may or np.all((written < self.time) | (written == self.time) & (writer == marks[:, None]))
        assert may, "shared memory is read before it is written, or has no barrier between"
        every = kind.type(0x01010101 & ((1 << 8 * kind.itemsize) - 1))
        if op == "ld":
            views[2][cells] = every * kind.type(self.time)
            return
        assert not np.any(read == self.time), "shared memory is written beside what reads it"
        assert not np.any((written == self.time) & (writer != marks[:, None])), "two warps write to one place"
        views[0][cells] = every * kind.type(self.time)
        views[1][cells] = marks.astype(kind) * every

    def reach_others(self) -> tuple[str, int] | None:
        """Runs its warps up to where they wait for the cluster, or to their end: None."""
        while self.groups:
            self.time += 1
            assert self.time < NEVER
            reached = {group.reach_others() for group in self.groups}  # which a branch may divide on the way
            assert len(reached) == 1, f"some warps wait at a barrier that others never reach: {reached}"
            (barrier,) = reached
            if barrier is None:
                self.groups = []
            elif barrier[0] == "cluster":
                return barrier
        return None


@functools.cache
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


@functools.cache
def _names(operand: str) -> list[str]:
    return re.findall(r"\w+", operand)


@functools.cache
def _constant(text: str) -> np.uint32 | None:
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16))
    return np.uint32(int(text, 0)) if re.fullmatch(r"0x[0-9a-f]+|\d+", text) else None


class _Warps:
    """Warps of a block that are at the same statement."""

    def __init__(
        self,
        statements: list[tuple],
        labels: Mapping[str, int],
        registers: Mapping[str, np.ndarray],
        memory: list[np.ndarray],
        cluster: list[_Block],
        block: int,
        warps: np.ndarray,
        programs: int,
    ):
        self.statements, self.labels, self.memory, self.cluster, self.block = statements, labels, memory, cluster, block
        self.warps, self.at, self.has_arrived = warps, 0, False
        lanes = np.arange(32, dtype=np.uint32) + 32 * warps.astype(np.uint32)[:, None, None]
        self.registers = {**registers, "%tid.x": lanes}
        self._cover(programs)

    def _cover(self, programs: int) -> None:
        self.marks = (1 + MOST_WARPS * self.block + self.warps).astype(np.uint8)
        self.shape = (len(self.warps), programs, 32)
        self.everyone = np.ones(self.shape, bool)
        self.everywhere = np.nonzero(self.everyone)

    def _only(self, chosen: np.ndarray) -> "_Warps":
        """Those of the warps, at the same statement."""
        part = object.__new__(_Warps)
        vars(part).update(vars(self))
        part.warps = self.warps[chosen]
        part.registers = {
            name: value[chosen] if np.ndim(value) == 3 and len(value) == len(self.warps) else value
            for name, value in self.registers.items()
        }
        part._cover(self.shape[1])
        return part

    def reach_others(self) -> tuple[str, int] | None:
        """Runs up to where it waits, for its block or for the cluster, or to the end: None."""
        while self.at < len(self.statements):
            line, guard, negated, (op, *kinds), operands = self.statements[self.at]
            self.at += 1
            active = np.broadcast_to(self.registers[guard] ^ negated, self.shape) if guard else self.everyone
            try:
                if op == "bra":
                    self._branch(active, self.labels[operands[0]])
                elif op == "bar":
                    return "block", self.at
                elif op == "barrier":
                    step, has_arrived = ".".join(kinds), self.has_arrived
                    assert step == ("cluster.wait.acquire" if has_arrived else "cluster.arrive.release") + ".aligned"
                    self.has_arrived = not has_arrived
                    if has_arrived:
                        return "cluster", self.at
                elif op in ("ld", "st"):
                    self._access(op, kinds, operands, active)
                else:
                    assert not guard, "a guard that is not emulated"
                    self._compute(op, kinds, operands)
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"{line} {error!r}") from error
        return None

    def _branch(self, active: np.ndarray, target: int) -> None:
        takes = active.any(axis=(1, 2))
        assert np.all(takes == active.all(axis=(1, 2))), "a branch that divides a warp"
        if takes.any() and not takes.all():  # the others go on as a group of their own, behind this one
            self.cluster[self.block].groups.append(self._only(~takes))
            vars(self).update(vars(self._only(takes)))
        if takes.any():
            self.at = target

    def _value(self, name: str) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        constant = _constant(name)
        if constant is None:
            raise KeyError(f"{name} is read before it is written")
        return constant

    def _float(self, name: str) -> np.ndarray:
        return np.asarray(self._value(name), np.uint32).view(np.float32)

    def _set(self, name: str, value: np.ndarray) -> None:
        """A register may hold less than all lanes, where its value is one for several."""
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
        registers = _names(names)
        assert len(registers) == (4 if "v4" in kinds else 1)
        first = np.broadcast_to(self._value(base), self.shape).astype(np.int64)[active] + int(offset or 0)
        if not first.size:
            return
        assert not np.any(first % (width * len(registers))), "not aligned"
        owner = None
        if kinds[0] in ("shared", "shared::cluster"):
            number = self.block
            if kinds[0] == "shared::cluster":
                number, last = int(first.min()) // BLOCK - 1, int(first.max()) // BLOCK - 1
                assert number == last and self.cluster[number].groups, "its block has ended"
                first = first % BLOCK
            owner = self.cluster[number]
            space = owner.shared
            warp, program, _ = self.everywhere if active is self.everyone else np.nonzero(active)
            first = first - SHARED
        else:
            (number,) = {int(first[0]) // ARRAY, int(first.min()) // ARRAY, int(first.max()) // ARRAY}
            space, program = self.memory[number - 1][None], 0
            first = first % ARRAY
        assert first.min() >= 0 and first.max() + width * len(registers) <= space.shape[1], "outside its array"
        end, kind = space.shape[1] // width * width, np.dtype(f"<u{width}")  # accesses are aligned: to cells of a view
        space, index = space[:, :end].view(kind), first // width
        for k, register in enumerate(registers):
            if owner is not None:
                owner.note(op, kind, (program, index + k), self.marks[warp])
            if op == "ld":
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

    def _shuffle(self, operands: list[str]) -> None:
        """shfl.sync.idx: a lane's part of the mask stays, the rest comes from the operand."""
        target, source, lane, limits, members = operands
        assert int(members, 0) == 0xFFFFFFFF
        kept, bound = int(limits, 0) >> 8 & 31, int(limits, 0) & 31
        lanes = np.arange(32)
        source_lanes = lanes & kept | int(lane, 0) & ~kept & 31
        assert np.all(source_lanes <= (lanes & kept | bound & ~kept))
        self._set(target, np.broadcast_to(self._value(source), self.shape)[..., source_lanes])

    def _product(self, kinds: list[str], operands: list[str]) -> None:
        """mma.m16n8k16 by the fragments of its documentation: lane 4 g + t; exact products, summed in float32."""
        assert kinds[:4] == ["sync", "aligned", "m16n8k16", "row"] and len(set(kinds[6:8])) == 1
        dtype = VALUES[kinds[6]]
        target, *sources = [_names(names) for names in operands]
        a, b, c = [
            np.stack([np.broadcast_to(self._value(name), self.shape) for name in names], -1) for names in sources
        ]
        g, t = np.divmod(np.arange(32), 4)
        several = self.shape[:2]
        left = np.empty((*several, 16, 16), np.float32)
        right = np.empty((*several, 16, 8), np.float32)
        sums = np.empty((*several, 16, 8), np.float32)
        for k in range(8):  # value k of a lane's four registers
            row, column = g + 8 * (k // 2 % 2), 2 * t + k % 2 + 8 * (k // 4)
            left[:, :, row, column] = a.view(dtype)[..., k].astype(np.float32)
        for k in range(4):
            right[:, :, 2 * t + k % 2 + 8 * (k // 2), g] = b.view(dtype)[..., k].astype(np.float32)
            sums[:, :, g + 8 * (k // 2), 2 * t + k % 2] = c.view(np.float32)[..., k]
        sums = left @ right + sums
        for k, name in enumerate(target):
            self._set(name, sums[:, :, g + 8 * (k // 2), 2 * t + k % 2].view(np.uint32))
