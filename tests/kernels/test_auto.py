"""Backend "auto": each product goes the way that the GPU's tuned table names for its op, shape and rows."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from experiments.support.model_flags import KERNELS
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import api, config, dense_matmul, dequantize
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import backend as triton_backend
from pallas_kernels.nf4_matmul.triton import scratch

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

    for name, module in (("triton", triton_backend), ("scratch", scratch)):
        for op in config.OPS:
            kernel = lambda x, packed, codec, name=name, op=op: launch(name, op, x, packed, codec)  # noqa: E731
            monkeypatch.setattr(module, op, kernel)
    monkeypatch.setattr(config, "TUNED", tmp_path)
    monkeypatch.setattr(api, "_is_installed", lambda backend: True)
    tiles = config.Tiles(16, 64, 64, 1, 8, 4, 4)
    table: config.Table = {
        ("forward", SHAPE, 64, 1): config.Choice("triton", tiles),
        ("forward", SHAPE, 64, 8): config.Choice("scratch"),
        ("backward", SHAPE, 64, 8): config.Choice("triton", tiles),
        ("backward", SHAPE, 64, 1): config.Choice("xla"),
    }
    kind = jax.devices()[0].device_kind
    config.write_table(config.table_file(kind), kind, table)
    config.forget_tables()
    yield seen
    config.forget_tables()


def weight(shape=SHAPE) -> tuple[qj.QuantizedTensor, nf4_matmul.Codec]:
    q = qj.quantize(jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))
    return q, q.codec._replace(backend="auto")


def gradient(q, codec, x):
    return jax.grad(lambda x: jnp.sum(nf4_matmul.matmul(x, q.packed, codec).astype(jnp.float32) ** 2))(x)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [("triton", "forward", 1)]),
        (5, [("scratch", "forward", 5), ("triton", "backward", 5)]),
        (8, [("scratch", "forward", 8), ("triton", "backward", 8)]),
        (9, []),
        (0, []),
    ],
)
def test_the_table_decides_by_op_and_rows(rows, expected, launches):
    q, codec = weight()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, SHAPE.in_features)), jnp.bfloat16)
    found = gradient(q, codec, x)
    assert launches == expected
    np.testing.assert_array_equal(found, gradient(q, q.codec._replace(backend="xla"), x))


def test_rows_of_a_pack_count_together(launches):
    """8 adapters of 1 row each are a product of 8 rows."""
    q, codec = weight()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 1, SHAPE.in_features)), jnp.bfloat16)
    jax.block_until_ready(jax.jit(jax.vmap(lambda x: gradient(q, codec, x)))(x))
    assert ("scratch", "forward", 8) in launches and ("triton", "backward", 8) in launches


def test_other_shapes_and_blocks_take_xla(launches):
    for q, codec in (weight(Shape(64, 64)), weight(Shape(64, 128))):
        assert nf4_matmul.path(codec, jnp.bfloat16, "forward", 1) == "xla"
        gradient(q, codec, jnp.ones((1, codec.shape[1]), jnp.bfloat16))
    q = qj.quantize(jnp.ones(SHAPE), block_size=32)
    assert nf4_matmul.path(q.codec._replace(backend="auto"), jnp.bfloat16, "forward", 1) == "xla"
    assert launches == []


def test_float32_takes_xla(launches):
    q, codec = weight()
    assert nf4_matmul.path(codec, jnp.float32, "forward", 1) == "xla"
    gradient(q, codec, jnp.ones((1, SHAPE.in_features)))
    assert launches == []


def test_a_missing_package_is_said(launches, monkeypatch, caplog):
    monkeypatch.setattr(api, "_is_installed", is_installed)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    api._say_refused.cache_clear()
    _, codec = weight()
    with caplog.at_level(logging.WARNING):
        assert nf4_matmul.path(codec, jnp.bfloat16, "forward", 8) == "xla"
    assert "takes backend xla instead of scratch: the tuned table's fastest needs jax-triton: pip in" in caplog.text


def test_auto_needs_the_rows():
    _, codec = weight()
    with pytest.raises(ValueError, match='"auto" depends on op and rows'):
        nf4_matmul.path(codec, jnp.bfloat16)


def test_commands_know_every_backend():
    assert sorted(KERNELS) == sorted(nf4_matmul.BACKENDS)
    assert sorted(config.MEASURED) == sorted(set(nf4_matmul.BACKENDS) - {"auto"})
