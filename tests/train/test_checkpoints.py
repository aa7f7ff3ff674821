"""Pages in host memory are written from where they lie, while training goes on; and they are put back there."""

import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import type_handlers

from qlora_jax.errors import InputError
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages
from qlora_jax.train.checkpoints import Checkpoints

SHAPES = {"a": (8, 6, 7), "b": (5, 4, 3)}


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def start(resident: float):
    params = tree(0)
    optimizer = PagedOptimizer(Pages(optax.adam(1e-2), params, 900), params, resident)
    return optimizer, *optimizer.update(params, tree(1), optimizer.init(params))


@pytest.mark.parametrize("resident", [0, 1500, math.inf])
def test_what_is_written_is_the_state_at_save_though_training_goes_on(tmp_path, monkeypatch, resident):
    """The writer is held back until two more updates have donated and replaced everything."""
    go_on, original = threading.Event(), type_handlers.NumpyHandler._background_serialize

    async def held(self, *arguments):
        assert go_on.wait(60)
        return await original(self, *arguments)

    monkeypatch.setattr(type_handlers.NumpyHandler, "_background_serialize", held)
    optimizer, params, states = start(resident)
    expected = jax.tree.map(np.array, (params, states))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, params, states)
    for seed in (2, 3):
        params, states = optimizer.update(params, tree(seed), states)
    jax.block_until_ready((params, states))
    go_on.set()
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    restored = again.restore(params, states)
    again.close()
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == y.tobytes()
    placed = optimizer.place(restored[1])
    for page, kept in zip(placed, optimizer.resident, strict=True):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(page) if x.ndim}
        assert kinds == {"device" if kept else "pinned_host"}


def test_pages_in_host_memory_are_neither_copied_nor_sent_through_the_device(tmp_path, monkeypatch):
    """What reaches orbax's writer is the pages' own memory."""
    written, original = [], type_handlers.NumpyHandler._background_serialize

    async def seen(self, values, *arguments):
        written.extend(values)
        return await original(self, values, *arguments)

    monkeypatch.setattr(type_handlers.NumpyHandler, "_background_serialize", seen)
    _, params, states = start(1500)
    places = {x.unsafe_buffer_pointer(): x for x in jax.tree.leaves((params, states)) if x.ndim}
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(jax, "device_put", lambda *arguments: pytest.fail("a transfer"))
    checkpoints.save(1, params, states, wait=True)
    monkeypatch.undo()
    checkpoints.close()
    shared = [places[pointer] for x in written if (pointer := x.__array_interface__["data"][0]) in places]
    in_host_memory = [x for x in places.values() if x.sharding.memory_kind == "pinned_host"]
    assert len(written) == len(jax.tree.leaves((params, states)))
    assert in_host_memory and {id(x) for x in shared} == {id(x) for x in in_host_memory}


def test_shapes_of_another_run_are_refused(tmp_path):
    """Orbax restores the arrays of a folder whatever shapes it is asked for."""
    _, params, states = start(0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, params, states, wait=True)
    other = {name: jnp.zeros((x.shape[0] + 1, *x.shape[1:])) for name, x in params.items()}
    with pytest.raises(InputError, match=r"cannot be restored \(an array of shape \[8, 6, 7\], expected \[9, 6, 7\]"):
        checkpoints.restore(other, states)
    checkpoints.close()
