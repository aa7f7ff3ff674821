"""The bench decides as the loop does, and says what it does not measure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.bench import train as benchmark
from qlora_jax.errors import InputError
from qlora_jax.optim.pages import Pages, RowWise
from qlora_jax.train import loop
from qlora_jax.train.setup import prepare
from qlora_jax.train.spec import read_spec

pytestmark = pytest.mark.quick_compile

MIB = 2**20
SGD = RowWise(*optax.sgd(1.0, momentum=0.9))
PAGES = Pages(SGD, [jax.ShapeDtypeStruct((10, MIB // 4), jnp.float32)], MIB)  # ten of 1 MiB


@pytest.mark.parametrize(
    ("stats", "fits"),
    [
        ({}, True),
        ({"bytes_limit": 100 * MIB, "bytes_in_use": 84 * MIB}, True),
        ({"bytes_limit": 100 * MIB, "bytes_in_use": 85 * MIB}, False),  # 95 less 85 leave ten, and one is being updated
    ],
)
def test_what_an_update_without_paging_needs(stats, fits):
    assert benchmark.fits_resident(PAGES, stats) is fits


def test_it_keeps_on_the_device_what_the_loop_keeps(tiny_config, tmp_path, monkeypatch):
    """With a limit between all of the state and none of it."""
    tiny_config.optimizer.paging, tiny_config.optimizer.page_bytes = "auto", 1000
    free = benchmark.Bench(tiny_config, read_spec(tiny_config))  # a CPU states no limit
    assert all(free.optimizer.resident)
    state, moving = sum(free.pages.bytes), free.pages.in_flight_bytes([False] * len(free.pages))
    limit = int((free.gradient.peak_bytes + (state + moving) / 2) / 0.95)
    for module in (benchmark, loop):
        monkeypatch.setattr(module, "memory_limit", lambda: limit)
    bench = benchmark.Bench(tiny_config, read_spec(tiny_config))
    prepared = prepare(tiny_config, lambda line: None, lambda done, total: None)
    workdir = loop.Workdir(tmp_path / "run", {})
    run = loop.Run(tiny_config, {}, prepared, workdir, loop.Checkpoints(workdir.checkpoints, 1), lambda line: None)
    assert bench.optimizer.resident == run.optimizer.resident
    assert 0 < sum(bench.optimizer.resident) < len(bench.pages)
    measured = bench.run(steps=1, warmup=1, tick=lambda: None)
    assert measured.pages_resident == sum(run.optimizer.resident)
    assert 0 < measured.page_traffic_bytes < measured.optimizer_bytes
    assert np.isfinite(measured.losses).all()


def test_a_loss_that_is_not_finite_is_said(tiny_config):
    tiny_config.optimizer.learning_rate = 3e38
    with pytest.raises(InputError, match="loss nan|loss inf"):
        benchmark.measure(tiny_config, read_spec(tiny_config), steps=4, warmup=1)


def test_out_of_memory_is_one_line():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"
    said = "^out of device memory: RESOURCE_EXHAUSTED: .* 9 bytes. .experiments.plan"
    with pytest.raises(InputError, match=said), benchmark.out_of_memory_said():
        raise jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), benchmark.out_of_memory_said():
        raise jax.errors.JaxRuntimeError("INTERNAL: another")
