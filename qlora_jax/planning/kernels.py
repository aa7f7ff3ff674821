"""How many kernels a compiled step launches for each layer, read from XLA's text of the program.

The step's scans over layers are while loops of L turns, one forward and one backward for each micro-batch. What such a
loop's body does is a layer's share. At small micro-batches launching takes longer than what is launched.

XLA tunes no products for a GPU that is not here: a real card may split other sums, and launch a few more or fewer.
"""

import re
from collections import Counter

from qlora_jax.mesh.wire import computations

_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_LOOP = re.compile(r' while\(.*body=%?([\w.\-]+).*"known_trip_count":\{"n":"(\d+)"\}')
# what launches nothing: names for values, and the ends of what was started
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "partition-id")
)


def layer_kernels(text: str, L: int) -> list[Counter[str]]:
    """Of each loop of L turns, in the order of the text: launches of one turn, by XLA's operation.

    Args:
      text: `as_text()` of a compiled program.
      L: layers.
    Raises:
      ValueError: the program has no such loop.
    """
    bodies = computations(text)
    loops = [match[1] for line in text.splitlines() if (match := _LOOP.search(line)) and int(match[2]) == L]
    if not loops:
        raise ValueError(f"the program has no loop of {L} turns")
    return [_launches(bodies[name]) for name in loops]


def _launches(body: list[str]) -> Counter[str]:
    operations = [match[1] for line in body if (match := _OPERATION.match(line))]
    return Counter(name for name in operations if name not in _FREE and not name.endswith("-done"))
