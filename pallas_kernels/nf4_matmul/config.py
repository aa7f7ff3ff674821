"""Tile sizes of the GPU kernels: what can be set, what tuning tries, what is used untuned, and the tuned tables.

A tuned table is a JSON file per GPU in tuned/, written by `python -m experiments.bench_kernels --tune`:
{"gpu": "NVIDIA A100-SXM4-80GB", "entries": [{"op": "forward", "out_features": 4096, "in_features": 4096,
"block_size": 64, "rows": 16, "backend": "triton", "tiles": {...}}, ...]}. An entry names the fastest backend that was
measured, "triton" with its tiles, and serves row counts up to its own and above half of it.
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


class Choice(NamedTuple):
    """A way to compute a product: a backend, with tiles where it is "triton"."""

    backend: str
    tiles: Tiles | None = None


MEASURED = ("xla", "triton", "scratch", "mosaic")  # the backends that a table may name
Key = tuple[Op, Shape, int, int]  # op, shape, block size, rows
Table = dict[Key, Choice]


def choose(op: Op, rows: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """The tuned tiles, or else the heuristic's; says once for a GPU and op that a shape is untuned."""
    table = tuned_table(gpu.name)
    choice = table.get((op, shape, block_size, row_bucket(rows)))
    if choice is None or choice.tiles is None:  # what another backend won has no tiles
        _say_untuned(op, gpu.name, bool(table), shape if table else None)
        return heuristic(op, rows, shape, block_size, gpu)
    return choice.tiles


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


# tuning varies two fields at a time around the best so far: 3 * 3, 2 * 3, 4 * 2, 2 * 2, and again 3 * 3, 36 at most
SWEEPS = (
    ("block_m", "block_o"),
    ("num_warps", "num_stages"),
    ("split", "scales_in_kernel"),
    ("block_i", "scale_sums"),
    ("block_m", "block_o"),
)


def variations(
    op: Op, rows: int, shape: Shape, block_size: int, gpu: Gpu, base: Tiles, fields: tuple[str, str]
) -> list[Tiles]:
    """base with every pair of values of two fields, as far as they fit the GPU and the call."""
    values: dict[str, tuple] = {
        "block_m": tuple(sorted({min(largest, max(16, row_bucket(rows))) for largest in (64, 128, 256)})),
        "block_o": (32, 64, 128),
        "block_i": tuple(sorted({min(64, block_size), min(128, block_size)})),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "split": (1, 2, 4, 8),
        "scale_sums": (False, True),
        "scales_in_kernel": (False, True),
    }
    first, second = fields
    pairs = itertools.product(values[first], values[second])
    found = [dataclasses.replace(base, **{first: one, second: other}) for one, other in pairs]
    return [tiles for tiles in found if fits(op, rows, shape, tiles, gpu)]


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
    """The GPU's tuned choices; empty where nothing was measured."""
    path = table_file(gpu_name)
    return read_table(path) if path.exists() else {}


@functools.cache
def is_tuned(gpu_name: str, op: Op, shape: Shape, block_size: int) -> bool:
    """Whether the GPU's table has the product for any number of rows."""
    return any(key[:3] == (op, shape, block_size) for key in tuned_table(gpu_name))


def forget_tables() -> None:
    """Reads tables anew when they are next asked for."""
    tuned_table.cache_clear()
    is_tuned.cache_clear()


def read_table(path: Path) -> Table:
    """Reads a tuned table. Raises ValueError naming the file and the entry that is wrong."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: no JSON object with "entries" ({error}); tune again to write it anew') from None
    table: Table = {}
    for number, entry in enumerate(entries):
        try:
            key, choice = _read_entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: entry {number}: {problem}; mend it, or tune again") from None
        if key in table:
            raise ValueError(f"{path}: entry {number}: {key} stands there twice; remove one")
        table[key] = choice
    return table


def _read_entry(entry: dict) -> tuple[Key, Choice]:
    op, rows, block_size, backend = entry["op"], int(entry["rows"]), int(entry["block_size"]), entry["backend"]
    shape = Shape(int(entry["out_features"]), int(entry["in_features"]))
    if op not in OPS:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    if rows < 1 or rows != row_bucket(rows):
        raise ValueError(f"rows is {rows}, expected a power of two")
    if backend not in MEASURED:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(MEASURED)}")
    if backend != "triton":
        if "tiles" in entry:
            raise ValueError(f'there are tiles beside backend {backend!r}, expected them with "triton" alone')
        return (op, shape, block_size, rows), Choice(backend)
    tiles = Tiles(**entry["tiles"])
    for field in ("block_m", "block_o", "block_i"):
        size = getattr(tiles, field)
        if not isinstance(size, int) or size < 16 or size & (size - 1):
            raise ValueError(f"{field} is {size!r}, expected a power of two from 16")
    if block_size % tiles.block_i:
        raise ValueError(f"block_i is {tiles.block_i}, expected a divisor of block_size {block_size}")
    return (op, shape, block_size, rows), Choice(backend, tiles)


def write_table(path: Path, gpu_name: str, table: Table) -> None:
    """Writes a tuned table that read_table reads; at every moment the file is the old table or the new one."""
    entries = [
        {
            "op": op,
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "block_size": block_size,
            "rows": rows,
            "backend": choice.backend,
        }
        | ({"tiles": dataclasses.asdict(choice.tiles)} if choice.tiles else {})
        for (op, shape, block_size, rows), choice in sorted(table.items(), key=lambda item: item[0])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps({"gpu": gpu_name, "entries": entries}, indent=1) + "\n")
    unfinished.replace(path)


@functools.cache
def _say_untuned(op: Op, gpu_name: str, has_table: bool, shape: Shape | None) -> None:
    what = f"shape {list(shape)} has no tiles in the tuned table" if has_table and shape else "there is no tuned table"
    tuning = "python -m experiments.bench_kernels --tune measures better ones"
    log.warning("nf4_matmul %s: %s of %s; tiles come from a heuristic (%s)", op, what, gpu_name, tuning)
