"""Tiles of the Triton kernel for few rows: what can be set, what tuning tries, what is used untuned; the tuned tables.

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

from pallas_kernels.gpu import Gpu, shared_limit
from pallas_kernels.nf4_matmul.shapes import Shape

Op = Literal["forward", "backward"]
OPS: tuple[Op, ...] = ("forward", "backward")
TUNED = Path(__file__).parent / "tuned"
FEW_ROWS = 16  # of x: up to here a forward product reads packed bytes and does little else

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one call of the Triton kernel. A tile of bytes holds 2 * block_o * block_i weights.

    A program sums over `split` tiles at a time, each by warps of its own where there are as many.
    """

    block_o: int  # rows of bytes: as many rows of W again from its other half
    block_i: int  # in-features; divides the quantization block
    split: int  # parts of a sum, which its program adds at its end
    num_warps: int
    num_stages: int  # tiles in flight


class Choice(NamedTuple):
    """A way to compute a product: a backend, with tiles where it is "triton"."""

    backend: str
    tiles: Tiles | None = None


MEASURED = ("xla", "triton", "scratch", "mosaic")  # the backends that a table may name
Key = tuple[Op, Shape, int, int]  # op, shape, block size, rows
Table = dict[Key, Choice]


def is_few(op: Op, rows: int) -> bool:
    """Whether a product is one that "triton" has a kernel for: forward, of at most FEW_ROWS rows of x."""
    return op == "forward" and rows <= FEW_ROWS


def row_bucket(rows: int) -> int:
    """The next power of two: row counts up to it share an entry."""
    return 1 << (rows - 1).bit_length()


def choose(rows: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """The tuned tiles, or else the heuristic's; says once for a GPU that a shape is untuned."""
    table = tuned_table(gpu.name)
    choice = table.get(("forward", shape, block_size, row_bucket(rows)))
    if choice is None or choice.tiles is None:  # what another backend won has no tiles
        _say_untuned(gpu.name, bool(table), shape if table else None)
        return heuristic(shape, block_size, gpu)
    return choice.tiles


def heuristic(shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """Tiles from counting instructions and programs: 4.0 instructions a weight at 32 rows of bytes, 5.3 at 16, of which
    there are twice as many programs with twice the warps."""
    tiles = Tiles(block_o=32, block_i=min(64, block_size), split=4, num_warps=4, num_stages=2)
    if 2 * programs(shape, tiles) < 3 * gpu.cores:
        tiles = dataclasses.replace(tiles, block_o=16, split=8, num_warps=8, num_stages=3)
    split = min(tiles.split, 1 << (shape.in_features // tiles.block_i).bit_length() - 1)
    return dataclasses.replace(tiles, split=split, num_warps=min(tiles.num_warps, tiles.block_o * split // 16))


def programs(shape: Shape, tiles: Tiles) -> int:
    """Output tiles of a call."""
    return -(-shape.out_features // 2 // tiles.block_o)


# tuning varies two fields at a time around the best so far: 3 * 4, 2 * 3, 2 * 3, and again 3 * 4, 36 at most
SWEEPS = (("block_o", "split"), ("num_warps", "num_stages"), ("block_i", "num_stages"), ("block_o", "split"))


def variations(shape: Shape, block_size: int, gpu: Gpu, base: Tiles, fields: tuple[str, str]) -> list[Tiles]:
    """base with every pair of values of two fields, as far as they fit the GPU and the shape."""
    values: dict[str, tuple] = {
        "block_o": (16, 32, 64),
        "block_i": tuple(sorted({min(64, block_size), min(128, block_size)})),
        "split": (2, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    first, second = fields
    pairs = itertools.product(values[first], values[second])
    found = [dataclasses.replace(base, **{first: one, second: other}) for one, other in pairs]
    return [tiles for tiles in found if fits(shape, tiles, gpu)]


def fits(shape: Shape, tiles: Tiles, gpu: Gpu) -> bool:
    """Whether tiles are worth a try: resources by estimate (the compiler has the last word), and no idle warps."""
    if tiles.block_o * tiles.split < 16 * tiles.num_warps or tiles.split > shape.in_features // tiles.block_i:
        return False
    return shared_bytes(tiles) <= shared_limit(gpu.compute_capability)


def shared_bytes(tiles: Tiles) -> int:
    """Shared memory by estimate: bytes and activations in every stage, and a decoded tile."""
    weights = tiles.split * tiles.block_o * tiles.block_i
    return tiles.num_stages * (weights + 2 * tiles.split * FEW_ROWS * tiles.block_i) + 2 * weights


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
    """Reads a tuned table, but for entries of Triton kernels that are gone, which are said to be left out.

    Raises ValueError naming the file and the entry that is wrong.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: no JSON object with "entries" ({error}); tune again to write it anew') from None
    table: Table = {}
    left_out = 0
    for number, entry in enumerate(entries):
        try:
            key, choice = _read_entry(entry)
            if choice is None:
                left_out += 1
                continue
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: entry {number}: {problem}; mend it, or tune again") from None
        if key in table:
            raise ValueError(f"{path}: entry {number}: {key} stands there twice; remove one")
        table[key] = choice
    if left_out:
        log.warning("%s: %d entries are left out: they name Triton kernels that are gone; tune again", path, left_out)
    return table


def _read_entry(entry: dict) -> tuple[Key, Choice | None]:
    """None where the entry names a Triton kernel that is gone."""
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
    if not is_few(op, rows) or "block_m" in entry["tiles"]:
        return (op, shape, block_size, rows), None
    tiles = Tiles(**entry["tiles"])
    for field, least in (("block_o", 16), ("block_i", 16), ("split", 1)):
        size = getattr(tiles, field)
        if not isinstance(size, int) or size < least or size & (size - 1):
            raise ValueError(f"{field} is {size!r}, expected a power of two from {least}")
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
def _say_untuned(gpu_name: str, has_table: bool, shape: Shape | None) -> None:
    what = f"shape {list(shape)} has no tiles in the tuned table" if has_table and shape else "there is no tuned table"
    tuning = "python -m experiments.bench_kernels --tune measures better ones"
    log.warning("nf4_matmul: %s of %s; tiles come from a heuristic (%s)", what, gpu_name, tuning)
