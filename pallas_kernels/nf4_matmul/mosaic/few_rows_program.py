"""What a program of the Hopper kernel for few rows is: its share of the work, and where things lie in shared memory."""

import dataclasses
import itertools
from collections.abc import Sequence

TILES = 4  # tiles of 8 byte rows that a warp multiplies by the same x
BYTE_ROWS = 8 * TILES  # of a program: as many rows of W from either half
CHUNK = 64  # columns that 16 bytes a lane hold: four mma, one scale
GROUP = 128  # columns in flight in a warp: two chunks, whose scales of both halves are one for each of four lanes
CHUNKS = GROUP // CHUNK
TABLE_BYTES = 256 * 256
MAP_BYTES = 256 * 4
SUMS = TABLE_BYTES + MAP_BYTES  # where every warp's sums lie


@dataclasses.dataclass(frozen=True)
class Program:
    """What is fixed when the text is written."""

    rows: int  # M, 1 to 16
    out_features: tuple[int, ...]  # O of each weight
    in_features: int
    block_size: int
    dtype: str  # of x: "bfloat16" or "float16"
    table: Sequence[float]  # 16 values
    nested: bool  # scales are stored in 8 bits
    split: int  # programs that share one tile's columns, a cluster

    @property
    def x_tiles(self) -> int:
        """Tiles of 8 rows of x."""
        return -(-self.rows // 8)

    @property
    def warps(self) -> int:
        """8, or 16 for more than 8 rows: each adds up and writes one row of the result."""
        return 8 * self.x_tiles

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return 4 * TILES * self.x_tiles

    @property
    def tiles(self) -> int:
        """Tiles of byte rows, of all weights: each is a program's, or a cluster's."""
        return self.first_tiles[-1]

    @property
    def first_tiles(self) -> tuple[int, ...]:
        """The first tile of each weight, and how many there are."""
        return tuple(itertools.accumulate((out // 2 // BYTE_ROWS for out in self.out_features), initial=0))

    @property
    def received_at(self) -> int:
        """Where in shared memory the first program of a cluster finds the others' results: behind every warp's sums."""
        return SUMS + self.warps * self.sums * 32 * 4

    @property
    def sent_bytes(self) -> int:
        """Of a program's results, float32 [rows, 2, 32]: a row of x, a half of W, byte rows."""
        return self.rows * 2 * 32 * 4

    @property
    def shared_bytes(self) -> int:
        """The table, the map of 8-bit scales, every warp's sums, and what the cluster's other programs send."""
        return self.received_at + (self.split - 1) * self.sent_bytes

    def columns(self, split):
        """First column of a split, and the one after its last; of a whole number, Python's or traced."""
        groups = self.in_features // GROUP
        return split * groups // self.split * GROUP, (split + 1) * groups // self.split * GROUP
