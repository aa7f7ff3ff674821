"""How much optimizer state stays on the device: what the compiled programs of the run leave free there."""

import math
from typing import NamedTuple

from qlora_jax.optim.pages import Pages

RESERVED = 0.05  # of the device's limit: gaps between allocations, and arrays that belong to no program


class Residency(NamedTuple):
    """`resident_bytes` of PagedOptimizer, and a line that says why."""

    resident_bytes: float
    reason: str


def decide(paging: str, pages: Pages, limit: int | None, program_bytes: int, share: float = 1.0) -> Residency:
    """Which part of the optimizer's state stays on the device.

    Args:
      paging: never | always | auto, which keeps what fits beside the largest program.
      limit: bytes that the device's allocator may give out; None where it states none (CPUs): auto pages nothing.
      program_bytes: of the largest program of the run besides the update: arguments (the base among them), results and
        temporaries, aliases once. Parameters and gradients, which the update needs, are arguments and results of it.
      share: of the state, that one of several devices holds; what it has free is then room for 1 / share as much.
    """
    state = sum(pages.bytes)
    if paging == "never":
        return Residency(math.inf, _line(pages, math.inf, "optimizer.paging = never"))
    if paging == "always":
        return Residency(0, _line(pages, 0, "optimizer.paging = always"))
    if limit is None:
        return Residency(
            math.inf, _line(pages, math.inf, "optimizer.paging = auto: this device states no memory limit")
        )
    free = math.floor((limit - reserved(limit) - program_bytes) / share)
    why = (
        f"optimizer.paging = auto: of {_mib(limit)}, training takes {_mib(program_bytes)} and {RESERVED:.0%} is "
        f"reserved, which leaves {_mib(free)}{'' if share == 1 else ' on all devices together'}"
    )
    if state <= free:
        return Residency(math.inf, _line(pages, math.inf, why))
    moving = pages.in_flight_bytes([False] * len(pages))
    resident = max(free - moving, 0)
    return Residency(resident, _line(pages, resident, f"{why}, {_mib(moving)} of it for pages under way"))


def reserved(limit: int) -> int:
    """Bytes of the device's limit that are left free."""
    return math.ceil(RESERVED * limit)


def _line(pages: Pages, resident_bytes: float, why: str) -> str:
    kept = pages.resident(resident_bytes)
    here = sum(size for size, stays in zip(pages.bytes, kept, strict=True) if stays)
    state = sum(pages.bytes)
    where = (
        "all on the device"
        if all(kept)
        else f"{len(pages) - sum(kept)} of {len(pages)} pages ({_mib(state - here)}) in host memory"
    )
    return f"optimizer: {_mib(state)} of state, {where} ({why})"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
