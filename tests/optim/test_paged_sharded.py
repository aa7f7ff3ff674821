"""Over a mesh of four devices: states lie as their parameters do, in the host memory of each device."""

import pytest

from tests import forked

pytestmark = pytest.mark.quick_compile

SCRIPT = """
import math
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise
from tests.optim.transformations import KNOWN

mesh = jax.make_mesh((2, 2), ("data", "model"))
specs = {"a": P(None, "model"), "b": P(), "c": P(None, ("data", "model"))}

def tree(seed, place=True):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal((6, 8, 3)).astype(np.float32) for name in specs}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) if place else jnp.asarray(x)
            for name, x in arrays.items()}

def run(tx, resident, place=True):
    params = tree(0, place)
    optimizer = PagedOptimizer(Pages(tx, params, 500), params, resident)
    states = optimizer.init(params)
    for k in range(3):
        params, states = optimizer.update(params, tree(k + 1, place), states, 0.5)
    return optimizer, params, states

def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

for name in ("adamw", "8-bit momentum", "lamb"):
    tx = KNOWN[name]
    results = {resident: run(tx, resident) for resident in (0, 1000, math.inf)}
    for optimizer, params, states in results.values():
        for key, x in params.items():
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, specs[key], memory_kind="device"), 3), x.sharding
        for page, kept, state in zip(optimizer.pages.pages, optimizer.resident, states, strict=True):
            named = jax.tree_util.tree_flatten_with_path(state)[0]
            for path, x in named:
                keys = [k.key for k in path if getattr(k, "key", None) in specs]
                like_its_parameter = x.ndim == 3 and x.shape[1:] == (8, 3)
                assert keys or not x.ndim
                spec = specs[keys[0]] if like_its_parameter else P()
                kind = "device" if kept or not x.ndim else "pinned_host"
                wanted = NamedSharding(mesh, spec, memory_kind=kind)
                assert x.sharding.memory_kind == kind and x.sharding.is_equivalent_to(wanted, x.ndim), path
    for resident in (0, 1000):
        same(results[resident][1:], results[math.inf][1:])
    _, alone, _ = run(tx, 0, place=False)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(results[0][1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-5)
    optimizer, params, states = results[0]
    stored = jax.tree.map(np.array, states)
    for x, y in zip(jax.tree.leaves(optimizer.place(stored)), jax.tree.leaves(states), strict=True):
        assert x.sharding == y.sharding

adam = RowWise(*optax.adam(1.0))
rows = {"a": jax.device_put(jnp.zeros((6, 4)), NamedSharding(mesh, P("data")))}
try:
    PagedOptimizer(Pages(adam, rows, 108), rows, 0)
except ValueError as error:
    assert "shard another axis than the layers'" in str(error), error
else:
    raise AssertionError("three rows over two devices")
PagedOptimizer(Pages(adam, rows, 72), rows, 0)
print("passed")
"""


def test_states_lie_as_their_parameters_do():
    result = forked.run(SCRIPT, devices=4)
    if result.returncode:
        pytest.fail(result.stderr[-3000:])
    assert result.stdout.splitlines()[-1] == "passed"
