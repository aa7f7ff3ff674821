"""Tiles of the kernels by GPU and head width, and the tables of what was measured.

A table is a JSON file for each GPU in tuned/, written by `python -m experiments.bench_attention --write_table`:
{"gpu": "NVIDIA H200", "entries": [{"head_width": 128, "tokens": 1024, "seconds": {"flash": 2e-4, "xla": 9e-4, ...}},
...]}. An entry says what forward and backward pass took together, by each form, in rows of so many tokens; it serves
rows of up to as many and above half of it.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

TUNED = Path(__file__).parent / "tuned"
FORMS = ("flash", "xla", "chunked", "cudnn")  # what is measured; "auto" takes flash or one of the next two
HEAD_WIDTHS = range(16, 257, 8)  # that the kernels take


class Tiles(NamedTuple):
    """Of one kernel: queries and keys of a tile, warps of a program, tiles in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class KernelTiles(NamedTuple):
    """Of the three kernels."""

    forward: Tiles
    queries: Tiles  # d q
    keys: Tiles  # d k and d v


# By block_h. The first are for GPUs whose programs have 99 KiB of shared memory, the second for those with 163 KiB and
# more. None was tuned on a card; all compile without spilling (tests/kernels/test_attention_compile.py), where of a
# soft cap or sinks a few registers may not fit.
SMALL_SHARED = {
    64: KernelTiles(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 2)),
    128: KernelTiles(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: KernelTiles(Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
LARGE_SHARED = {
    64: KernelTiles(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    128: KernelTiles(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: KernelTiles(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1)),
}
Entry = dict[str, float]  # form -> seconds
Table = dict[tuple[int, int], Entry]  # head width, tokens


def block_h(H: int) -> int:
    """The width of a tile that holds a head."""
    return max(64, 1 << (H - 1).bit_length())


def tiles(H: int, shared_bytes: int) -> KernelTiles:
    """For heads of H features and programs that have so many bytes of shared memory."""
    return (SMALL_SHARED if shared_bytes < 160_000 else LARGE_SHARED)[block_h(H)]


def bucket(T: int) -> int:
    """The next power of two: rows of up to so many tokens share an entry."""
    return 1 << (T - 1).bit_length()


def table_file(gpu_name: str) -> Path:
    """tuned/nvidia-h200.json for "NVIDIA H200"."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


@functools.cache
def table(gpu_name: str) -> Table:
    """What was measured on a GPU; empty where nothing was."""
    path = table_file(gpu_name)
    return read_table(path) if path.exists() else {}


def read_table(path: Path) -> Table:
    """Raises ValueError naming the file and what is wrong in it."""
    try:
        entries = json.loads(path.read_text())["entries"]
        found: Table = {}
        for entry in entries:
            H, T, seconds = int(entry["head_width"]), int(entry["tokens"]), dict(entry["seconds"])
            if unknown := set(seconds) - set(FORMS):
                raise ValueError(f"form {min(unknown)!r}, expected some of {', '.join(FORMS)}")
            if not all(isinstance(value, float) and value > 0 for value in seconds.values()):
                raise ValueError(f"seconds are {seconds}, expected numbers above 0")
            if bucket(T) != T:
                raise ValueError(f"tokens is {T}, expected a power of two")
            if (H, T) in found:
                raise ValueError(f"head width {H} and {T} tokens stand there twice")
            found[H, T] = seconds
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {problem}; mend it, or measure again") from None
    return found


def write_table(path: Path, gpu_name: str, measured: Table) -> None:
    """Writes what read_table reads."""
    entries = [{"head_width": H, "tokens": T, "seconds": seconds} for (H, T), seconds in sorted(measured.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu_name, "entries": entries}, indent=1) + "\n")


def flash_is_fastest(seconds: Entry) -> bool:
    """Whether the kernels beat every form that "auto" could take in their place, all of which were measured."""
    others = [seconds[form] for form in ("xla", "chunked") if form in seconds]
    return "flash" in seconds and bool(others) and seconds["flash"] < min(others)
