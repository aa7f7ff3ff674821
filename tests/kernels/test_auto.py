"""Backend "auto": each product goes the way that the GPU's tuned table names for its op, shape and rows."""

import logging
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.support.model_flags import KERNELS
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import api, config, dense_matmul, dequantize
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import few_rows, scratch
from tests.kernels.weights import random_weight

SHAPE = Shape(128, 64)
is_installed = api._is_installed


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Kernels that XLA computes, and a table of this device; the list has (backend, op, rows) of every launch."""
    seen: list[tuple[str, str, int]] = []

    def launch(backend, op, x, packed, codec):
        seen.append((backend, op, x.shape[0]))
        w = dequantize(packed, codec, x.dtype)
        return dense_matmul(x, w, 1 if op == "forward" else 0)

    monkeypatch.setattr(few_rows, "forward", partial(launch, "triton", "forward"))
    for op in config.OPS:
        monkeypatch.setattr(scratch, op, partial(launch, "scratch", op))
    monkeypatch.setattr(config, "TUNED", tmp_path)
    monkeypatch.setattr(api, "_is_installed", lambda backend: True)
    table: config.Table = {
        ("forward", SHAPE, 64, 1): config.Choice("scratch"),
        ("forward", SHAPE, 64, 8): config.Choice("triton", config.Tiles(64, 64, 1, 4, 4)),
        ("backward", SHAPE, 64, 8): config.Choice("scratch"),
        ("backward", SHAPE, 64, 1): config.Choice("xla"),
    }
    kind = jax.devices()[0].device_kind
    config.write_table(config.table_file(kind), kind, table)
    config.forget_tables()
    yield seen
    config.forget_tables()


def weight(shape=SHAPE, block_size: int = 64) -> tuple[nf4_matmul.Packed, nf4_matmul.Codec]:
    packed, codec = random_weight(shape, block_size)
    return packed, codec._replace(backend="auto")


def gradient(packed, codec, x):
    def loss(x):
        return jnp.sum(nf4_matmul.matmul(x, packed, codec).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss))(x)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [("scratch", "forward", 1)]),
        (5, [("triton", "forward", 5), ("scratch", "backward", 5)]),
        (8, [("triton", "forward", 8), ("scratch", "backward", 8)]),
        (9, []),
        (0, []),
    ],
)
def test_the_table_decides_by_op_and_rows(rows, expected, launches):
    packed, codec = weight()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, SHAPE.in_features)), jnp.bfloat16)
    found = gradient(packed, codec, x)
    assert launches == expected
    if rows in (0, 8):
        np.testing.assert_array_equal(found, gradient(packed, codec._replace(backend="xla"), x))


def test_rows_of_a_pack_count_together(launches):
    """8 adapters of 1 row each are a product of 8 rows."""
    packed, codec = weight()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 1, SHAPE.in_features)), jnp.bfloat16)
    jax.block_until_ready(jax.jit(jax.vmap(lambda x: gradient(packed, codec, x)))(x))
    assert ("triton", "forward", 8) in launches and ("scratch", "backward", 8) in launches


def test_other_shapes_blocks_and_float32_take_xla(launches):
    for shape, block_size, dtype in ((Shape(64, 64), 64, "bfloat16"), (SHAPE, 32, "bfloat16"), (SHAPE, 64, "float32")):
        packed, codec = weight(shape, block_size)
        assert nf4_matmul.path(codec, jnp.dtype(dtype), "forward", 8) == "xla"
        gradient(packed, codec, jnp.ones((8, codec.shape[1]), dtype))
    assert launches == []


def test_a_missing_package_is_said(launches, monkeypatch, caplog):
    monkeypatch.setattr(api, "_is_installed", is_installed)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    api._say_refused.cache_clear()
    _, codec = weight()
    with caplog.at_level(logging.WARNING):
        assert nf4_matmul.path(codec, jnp.bfloat16, "forward", 8) == "xla"
    assert "takes backend xla instead of triton: the tuned table's fastest needs jax-triton: pip in" in caplog.text


def test_commands_know_every_backend():
    assert sorted(KERNELS) == sorted(nf4_matmul.BACKENDS)
    assert sorted(config.MEASURED) == sorted(set(nf4_matmul.BACKENDS) - {"auto"})
