"""What auto keeps on the device, from byte counts alone."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.optim.pages import Pages, RowWise
from qlora_jax.optim.residency import decide

MIB = 2**20
SGD = RowWise(*optax.sgd(1.0, momentum=0.9))
PAGES = Pages(SGD, [jax.ShapeDtypeStruct((10, MIB // 4), jnp.float32)], MIB)  # ten of 1 MiB


@pytest.mark.parametrize(
    ("paging", "limit", "program_mib", "resident_mib", "kept", "words"),
    [
        ("never", 100, 99, math.inf, 10, ["10.0 MiB of state, all on the device (optimizer.paging = never)"]),
        ("always", 100, 0, 0, 0, ["10 of 10 pages (10.0 MiB) in host memory (optimizer.paging = always)"]),
        ("auto", None, 0, math.inf, 10, ["all on the device", "this device states no memory limit"]),
        ("auto", 100, 85, math.inf, 10, ["of 100.0 MiB, training takes 85.0 MiB and 5% is", "leaves 10.0 MiB"]),
        ("auto", 100, 86, 6, 6, ["4 of 10 pages (4.0 MiB) in host", "leaves 9.0 MiB, 3.0 MiB of it for pages"]),
        ("auto", 100, 93, 0, 0, ["10 of 10 pages", "leaves 2.0 MiB, 3.0 MiB of it"]),
        ("auto", 100, 120, 0, 0, ["10 of 10 pages", "leaves -25.0 MiB"]),
    ],
)  # fmt: skip
def test_decision(paging, limit, program_mib, resident_mib, kept, words):
    found = decide(paging, PAGES, limit and limit * MIB, program_mib * MIB)
    assert found.resident_bytes == (resident_mib if math.isinf(resident_mib) else resident_mib * MIB)
    assert sum(PAGES.resident(found.resident_bytes)) == kept
    assert all(word in found.reason for word in words), found.reason
    if limit and not math.isinf(found.resident_bytes) and paging == "auto" and found.resident_bytes:
        moving = PAGES.in_flight_bytes(PAGES.resident(found.resident_bytes))
        assert program_mib * MIB + found.resident_bytes + moving <= 0.95 * limit * MIB
