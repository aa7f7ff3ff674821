"""What processes read in turns ends where one process puts it, on eight CPU devices; and whose turn it is."""

import pytest

from qlora_jax.mesh.turns import Turns
from tests import forked

pytestmark = pytest.mark.quick_compile

SCRIPT = """
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qlora_jax.mesh import turns
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import mesh_of

rng = np.random.default_rng(0)

def stack(axes, specs, rooms):
    mesh = mesh_of(axes)
    places = [place for place in np.ndindex(*rooms)]
    whole = {".codes": rng.integers(0, 256, (*rooms, 64)).astype(np.uint8), ".w": rng.normal(size=(*rooms, 8, 4)),
             ".offset": rng.normal(size=rooms)}
    whole = {key: value if value.dtype == np.uint8 else value.astype(np.float32) for key, value in whole.items()}
    like = {key: jax.ShapeDtypeStruct(x.shape[len(rooms):], x.dtype) for key, x in whole.items()}
    made = []
    def make(number):
        made.append(number)
        return {key: jnp.asarray(x[places[number]]) for key, x in whole.items()}
    at = {f"['{key}']": NamedSharding(mesh, specs[key]) for key in whole}
    found = turns.stacked(make, places, rooms, like, lambda name, leaf: at[name], turns.Turns())
    assert sorted(made) == list(range(len(places)))  # each once
    for key, x in whole.items():
        assert found[key].sharding == at[f"['{key}']"], key
        assert np.array_equal(found[key], x), (axes, key)

ROWS = {".codes": P(None, "fsdp"), ".w": P(None, "fsdp"), ".offset": P()}
stack(Axes(1, 8), ROWS, (11,))                                    # a round, and three of another
stack(Axes(2, 4), ROWS, (3,))                                     # fewer than devices
stack(Axes(2, 2, 1, 2), {".codes": P(None, ("tensor", "fsdp")), ".w": P(None, "fsdp", "tensor"), ".offset": P()}, (3,))
stack(Axes(1, 4, 2), {key: P(None, ("expert", "fsdp")) for key in ROWS}, (2, 8))  # a mixture's, by experts

# what a device receives of a round is its own parts of the others' entries, packed
mesh = mesh_of(Axes(1, 8))
held = (NamedSharding(mesh, P(None, "fsdp")),)
given = [jax.ShapeDtypeStruct((16, 4096), np.uint8, sharding=held[0])]
rows = [jax.ShapeDtypeStruct((8, 4096), np.uint8, sharding=NamedSharding(mesh, P(mesh.axis_names)))]
numbers = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, 8), (8, 1), ())]
text = turns._write.lower(given, rows, *numbers, held).compile().as_text()
assert text.count(" all-to-all(") == 1 and "u8[1,1,512]" in text
assert not any(f" {other}" in text for other in ("all-gather", "all-reduce", "collective-permute"))

table = rng.normal(size=(10, 6)).astype(ml_dtypes.bfloat16)
for stored, kept in ((table, jnp.bfloat16), (table, jnp.float32), ((table * 9).astype(np.int8), jnp.int8)):
    boxes = [((0, 0), (4, 6)), ((4, 0), (4, 6)), ((8, 0), (2, 6))]
    pieces = lambda: ((corner, stored[corner[0] : corner[0] + shape[0]]) for corner, shape in boxes)
    for axes, spec in ((Axes(4, 2), P("fsdp")), (Axes(8, 1), P())):
        at = NamedSharding(mesh_of(axes), spec)
        like = jax.ShapeDtypeStruct(table.shape, kept)
        found = turns.in_pieces(pieces, boxes, like, stored.dtype, at, turns.Turns())
        assert found.sharding == at and np.array_equal(np.asarray(found), stored.astype(kept))
"""


def test_what_is_read_in_turns_is_where_it_belongs():
    ended = forked.run(SCRIPT, devices=8)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_whose_turn_it_is_follows_the_bytes():
    turns = Turns()
    assert [turns.take(size, (0, 1, 2)) for size in (5, 1, 1, 3, 1)] == [0, 1, 2, 1, 2]
    assert turns.take(9, (0,)) == 0 and turns.take(1, (0, 1)) == 1
