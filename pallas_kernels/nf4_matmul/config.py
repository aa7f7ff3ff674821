"""Tile sizes of the GPU kernels: what can be set, what tuning tries, what is used untuned, and the tuned tables.

A tuned table is a JSON file per GPU in tuned/, written by `python -m experiments.bench_kernels --tune`:
{"gpu": "NVIDIA A100-SXM4-80GB", "entries": [{"op": "forward", "out_features": 4096, "in_features": 4096,
"block_size": 64, "rows": 16, "tiles": {...}}, ...]}. An entry serves row counts up to its own and above half of it.
"""

import dataclasses
import functools
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Literal, NamedTuple

from pallas_kernels.nf4_matmul.shapes import Shape

Op = Literal["forward", "backward"]
OPS: tuple[Op, ...] = ("forward", "backward")
TUNED = Path(__file__).parent / "tuned"
FEW_ROWS = 16  # up to here a product reads packed bytes and does little else
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # a program's share, by compute capability
ACCUMULATORS = 128  # float32 registers of a thread that sums may take; it has 255, and decoding wants about 90

log = logging.getLogger(__name__)


class Gpu(NamedTuple):
    """What the choice of tiles depends on."""

    name: str  # JAX's device_kind
    compute_capability: int  # 80, 86, 89, 90, ...
    cores: int  # streaming multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel call. A tile of bytes holds 2 * block_o * block_i weights."""

    block_m: int  # rows of x or dy
    block_o: int  # rows of bytes: as many rows of W again from its other half
    block_i: int  # in-features; divides the quantization block
    split: int  # programs that share one output tile's sum; their parts are added after
    group_m: int  # tiles of rows that run beside each other
    num_warps: int
    num_stages: int  # tiles in flight
    scale_sums: bool = False  # forward: scale a tile's sums instead of its weights
    scales_in_kernel: bool = False  # expand 8-bit scales in the kernel instead of in a pass before it


Table = dict[tuple[Op, Shape, int, int], Tiles]  # op, shape, block size, rows -> tiles


def choose(op: Op, rows: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """The tuned tiles, or else the heuristic's; says once for a GPU and op that a shape is untuned."""
    table = tuned_table(gpu.name)
    tiles = table.get((op, shape, block_size, row_bucket(rows)))
    if tiles is None:
        _say_untuned(op, gpu.name, bool(table), shape if table else None)
        return heuristic(op, rows, shape, block_size, gpu)
    return tiles


def row_bucket(rows: int) -> int:
    """The next power of two: row counts up to it share tuned tiles."""
    return 1 << (rows - 1).bit_length()


def heuristic(op: Op, rows: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """Tiles from counting instructions and bytes; nothing here was measured.

    Few rows: the sums are scaled, which costs less than scaling weights; several small programs a core hide the latency
    of memory. Many rows: 128 of them share one decoding; Hopper's tensor cores take 64 weight rows for four warps.
    """
    block_i = min(64, block_size)
    block_m = min(128, max(16, row_bucket(rows)))
    many = block_m == 128
    if op == "forward":
        block_o = 128 if many and gpu.compute_capability == 90 else 64
    else:  # tiles of dy take much shared memory: two programs a core want half of it each
        block_o = 32 if many and shared_limit(gpu.compute_capability) < 2**17 else 64
    tiles = Tiles(
        block_m=block_m,
        block_o=block_o,
        block_i=block_i,
        split=1,
        group_m=8,
        num_warps=8 if many else 4,
        num_stages=3 if many else 4,
        scale_sums=op == "forward" and block_m <= 32,
        scales_in_kernel=rows <= FEW_ROWS,
    )
    programs_wanted = gpu.cores * (4 if rows <= FEW_ROWS else 1)
    split = max(1, programs_wanted // programs(op, rows, shape, tiles))
    return dataclasses.replace(tiles, split=min(split, max(1, reduction_tiles(op, shape, tiles) // 8)))


def programs(op: Op, rows: int, shape: Shape, tiles: Tiles) -> int:
    """Output tiles of a call."""
    across = -(-shape.out_features // 2 // tiles.block_o) if op == "forward" else shape.in_features // tiles.block_i
    return -(-rows // tiles.block_m) * across


def reduction_tiles(op: Op, shape: Shape, tiles: Tiles) -> int:
    """Tiles that one output tile sums over."""
    return shape.in_features // tiles.block_i if op == "forward" else -(-shape.out_features // 2 // tiles.block_o)


def candidates(op: Op, rows: int, shape: Shape, block_size: int, gpu: Gpu) -> list[Tiles]:
    """What tuning tries: 3 * 3 * 2 * 2 * 3 * 4 * 2 * 2 = 1,728 at most, cut down to what fits the GPU and the call."""
    product = itertools.product(
        sorted({min(largest, max(16, row_bucket(rows))) for largest in (64, 128, 256)}),  # block_m
        (32, 64, 128),  # block_o
        sorted({min(64, block_size), min(128, block_size)}),  # block_i
        (4, 8),  # num_warps
        (2, 3, 4),  # num_stages
        (1, 2, 4, 8),  # split
        (False, True),  # scale_sums
        (False, True),  # scales_in_kernel
    )
    found = []
    for block_m, block_o, block_i, num_warps, num_stages, split, scale_sums, scales_in_kernel in product:
        tiles = Tiles(block_m, block_o, block_i, split, 8, num_warps, num_stages, scale_sums, scales_in_kernel)
        if fits(op, rows, shape, tiles, gpu):
            found.append(tiles)
    return found


def fits(op: Op, rows: int, shape: Shape, tiles: Tiles, gpu: Gpu) -> bool:
    """Whether tiles are worth a try: resources by estimate (the compiler has the last word), and no idle splits."""
    sums = 2 * tiles.block_o * tiles.block_m if op == "forward" else tiles.block_m * tiles.block_i
    in_flight = sums * (1.5 if tiles.scale_sums else 1)
    if in_flight > ACCUMULATORS * 32 * tiles.num_warps:
        return False
    if op == "backward" and tiles.scale_sums or tiles.scale_sums and tiles.block_m > 64:
        return False
    if tiles.block_o < 16 * tiles.num_warps // 2 and op == "forward":
        return False
    if tiles.scales_in_kernel and rows > FEW_ROWS or tiles.split > max(1, reduction_tiles(op, shape, tiles) // 8):
        return False
    if tiles.split > 1 and programs(op, rows, shape, tiles) > 2 * gpu.cores:
        return False
    return shared_bytes(op, tiles) <= shared_limit(gpu.compute_capability)


def shared_limit(compute_capability: int) -> int:
    """Bytes of shared memory that a program may take; for a GPU that is not known, the least of the known."""
    return SHARED_BYTES.get(compute_capability, min(SHARED_BYTES.values()))


def shared_bytes(op: Op, tiles: Tiles) -> int:
    """Shared memory by estimate: bytes and activations in every stage, and the two decoded tiles."""
    width = tiles.block_i if op == "forward" else 2 * tiles.block_o
    stage = tiles.block_o * tiles.block_i + 2 * tiles.block_m * width
    return tiles.num_stages * stage + 4 * tiles.block_o * tiles.block_i


def table_file(gpu_name: str) -> Path:
    """tuned/nvidia-a100-sxm4-80gb.json for "NVIDIA A100-SXM4-80GB"."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


@functools.cache
def tuned_table(gpu_name: str) -> Table:
    """The GPU's tuned tiles; empty where nothing was measured."""
    path = table_file(gpu_name)
    return read_table(path) if path.exists() else {}


def read_table(path: Path) -> Table:
    """Reads a tuned table. Raises ValueError naming the file and the entry that is wrong."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: no JSON object with "entries" ({error}); tune again to write it anew') from None
    table: Table = {}
    for number, entry in enumerate(entries):
        try:
            key, tiles = _read_entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: entry {number}: {problem}; mend it, or tune again") from None
        if key in table:
            raise ValueError(f"{path}: entry {number}: {key} stands there twice; remove one")
        table[key] = tiles
    return table


def _read_entry(entry: dict) -> tuple[tuple[Op, Shape, int, int], Tiles]:
    tiles = Tiles(**entry["tiles"])
    op, rows, block_size = entry["op"], int(entry["rows"]), int(entry["block_size"])
    if op not in OPS:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    if rows != row_bucket(rows):
        raise ValueError(f"rows is {rows}, expected a power of two")
    for field in ("block_m", "block_o", "block_i"):
        size = getattr(tiles, field)
        if not isinstance(size, int) or size < 16 or size & (size - 1):
            raise ValueError(f"{field} is {size!r}, expected a power of two from 16")
    if block_size % tiles.block_i:
        raise ValueError(f"block_i is {tiles.block_i}, expected a divisor of block_size {block_size}")
    return (op, Shape(int(entry["out_features"]), int(entry["in_features"])), block_size, rows), tiles


def write_table(path: Path, gpu_name: str, table: Table) -> None:
    """Writes a tuned table that read_table reads."""
    entries = [
        {
            "op": op,
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "block_size": block_size,
            "rows": rows,
            "tiles": dataclasses.asdict(tiles),
        }
        for (op, shape, block_size, rows), tiles in sorted(table.items(), key=lambda item: item[0])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu_name, "entries": entries}, indent=1) + "\n")


@functools.cache
def _say_untuned(op: Op, gpu_name: str, has_table: bool, shape: Shape | None) -> None:
    what = f"shape {list(shape)} is not in the tuned table" if has_table and shape else "there is no tuned table"
    tuning = "python -m experiments.bench_kernels --tune measures better ones"
    log.warning("nf4_matmul %s: %s of %s; tiles come from a heuristic (%s)", op, what, gpu_name, tuning)
