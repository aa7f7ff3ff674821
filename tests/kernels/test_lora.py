"""The op with an adapter: the fused form against the plain one, values, gradients and packs, on the CPU.

The Triton kernels run in Triton's interpreter behind the dispatch, the custom gradient and vmap.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Packed, config, lora, measure
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import backend as triton_backend
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import Linear

GPU = config.Gpu("a GPU", 86, 1)
UNIT_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
SCALE = 0.75


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...], int]]:
    """The kernels in the interpreter; the list has (op, shape of the activations, rank or 0) of every launch."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter

    seen = []

    def compute(op, codec, x, packed, low_rank):
        adapters, rank = (1, 0) if low_rank is None else (low_rank[0].shape[0], low_rank[0].shape[2])
        seen.append((op, x.shape, rank))
        rows = x.reshape(-1, x.shape[-1])
        tiles = triton_backend.tiles_of_pack(
            op, rows.shape[0] // adapters, adapters, Shape(*codec.shape), codec.block_size, GPU
        )
        term = None if low_rank is None else triton_backend.LowRank(*low_rank)
        y = interpreter.matmul(op, rows, Packed(*packed), codec, tiles, term)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def launch(op, x, packed, codec, low_rank=None):
        columns = codec.shape[0] if op == "forward" else codec.shape[1]
        out = jax.ShapeDtypeStruct((*x.shape[:-1], columns), jnp.float32)
        run = functools.partial(compute, op, codec)
        return jax.pure_callback(run, out, x, packed, low_rank).astype(x.dtype)

    for op in config.OPS:
        monkeypatch.setattr(triton_backend, op, functools.partial(launch, op))
        fused = lambda x, u, right, packed, codec, op=op: launch(op, x, packed, codec, (u, right))  # noqa: E731
        monkeypatch.setattr(triton_backend, f"{op}_lora", fused)
    return seen


def weight(shape: tuple[int, int] = (70, 128)) -> qj.QuantizedTensor:
    return qj.quantize(normal(*shape, dtype="float32", seed=0))


def normal(*shape: int, dtype: str = "bfloat16", seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fused(q: qj.QuantizedTensor) -> nf4_matmul.Codec:
    return q.codec._replace(backend="triton", fuse_lora=True)


def check(found: jax.Array, exact: np.ndarray, magnitude: np.ndarray, dtype: str) -> None:
    """found = exact within four roundings of its terms, whose squares sum to magnitude^2, and the result's own."""
    unit = UNIT_ROUNDOFF[dtype]
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= unit * (6 * 2 * magnitude + np.abs(exact)))


def float64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


def size(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Root of the summed squares of the terms of x y."""
    return np.sqrt(x**2 @ y**2)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
@pytest.mark.parametrize("shape", [(128, 128), (70, 192)], ids=str)
def test_value_and_gradients(shape, rank, dtype, with_dropout, launches):
    q, rows = weight(shape), (2, 11)
    a, b = normal(rank, shape[1], dtype="float32", seed=3), normal(shape[0], rank, dtype="float32", seed=4)
    x, dy = normal(*rows, shape[1], dtype=dtype, seed=1), normal(*rows, shape[0], dtype=dtype, seed=2)
    dropped = jnp.where(normal(*x.shape, seed=5) > 0, 2 * x, 0) if with_dropout else None

    def product(x, dropped, a, b):
        return nf4_matmul.matmul_lora(x, q.packed, fused(q), a, b, SCALE, dropped)

    y, pullback = jax.vjp(product, x, dropped, a, b)
    dx, d_dropped, da, db = pullback(dy)

    W, A, B, X, DY = float64(qj.dequantize(q, jnp.float32), a.astype(dtype), b.astype(dtype), x, dy)
    W, A, B, X, DY = W, A, B, X.reshape(-1, shape[1]), DY.reshape(-1, shape[0])
    D = X if dropped is None else float64(dropped)[0].reshape(X.shape)
    U, DU = SCALE * D @ A.T, SCALE * DY @ B
    size_u, size_du = SCALE * size(D, A.T), SCALE * size(DY, B)
    assert y.dtype == dx.dtype == dtype and da.dtype == db.dtype == jnp.float32
    check(y.reshape(-1, shape[0]), X @ W.T + U @ B.T, np.hypot(size(X, W.T), size(size_u, B.T)), dtype)
    check(da, DU.T @ D, size(size_du.T, D), dtype)
    check(db, DY.T @ U, size(DY.T, size_u), dtype)
    if with_dropout:
        check(dx.reshape(X.shape), DY @ W, size(DY, W), dtype)
        check(d_dropped.reshape(X.shape), DU @ A, size(size_du, A), dtype)
    else:
        assert d_dropped is None
        check(dx.reshape(X.shape), DY @ W + DU @ A, np.hypot(size(DY, W), size(size_du, A)), dtype)
    backward = ("backward", (22, shape[0]), 0) if with_dropout else ("backward", (1, 22, shape[0]), rank)
    assert launches == [("forward", (1, 22, shape[1]), rank), backward]


@pytest.mark.parametrize("with_dropout", [False, True])
def test_a_pack_is_one_kernel_call_and_equals_its_adapters_apart(with_dropout, launches):
    q, adapters, rank = weight(), 3, 8
    x = normal(adapters, 2, 5, 128, seed=1)
    a, b = normal(adapters, rank, 128, dtype="float32", seed=3), normal(adapters, 70, rank, dtype="float32", seed=4)
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def loss(a, b, x, scale):
        dropped = jnp.where(x > 0, 2 * x, 0) if with_dropout else None
        return jnp.sum(nf4_matmul.matmul_lora(x, q.packed, fused(q), a, b, scale, dropped).astype(jnp.float32) ** 2)

    gradient = jax.value_and_grad(loss, (0, 1, 2))
    together = jax.block_until_ready(jax.jit(jax.vmap(gradient))(a, b, x, scales))
    backward = ("backward", (30, 70), 0) if with_dropout else ("backward", (3, 10, 70), rank)
    assert launches == [("forward", (3, 10, 128), rank), backward]
    for k in range(adapters):
        apart = gradient(a[k], b[k], x[k], scales[k])
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
            expected = np.asarray(expected, np.float32)
            tolerance = 2e-2 * np.sqrt(np.mean(expected**2))  # bfloat16 sums of another order
            np.testing.assert_allclose(np.asarray(found[k], np.float32), expected, rtol=2e-2, atol=tolerance)


def test_axes_that_some_arguments_lack(launches):
    """The same rows for every adapter, the same adapter for more rows, a pack of such, and weights that differ."""
    q, rank = weight(), 4
    x, a, b = normal(2, 5, 128, seed=1), normal(2, rank, 128, seed=3), normal(2, 70, rank, seed=4)

    def product(x, a, b):
        return nf4_matmul.matmul_lora(x, q.packed, fused(q), a, b, SCALE)

    def expected(k, m):
        return np.asarray(product(x[m], a[k], b[k]), np.float32)

    every = np.asarray([[expected(k, m) for m in range(2)] for k in range(2)])
    launches.clear()
    same_rows = jax.vmap(product, (None, 0, 0))(x[0], a, b)
    same_adapter = jax.vmap(product, (0, None, None))(x, a[0], b[0])
    pack = jax.vmap(jax.vmap(product, (0, None, None)), (None, 0, 0))(x, a, b)
    inside_out = jax.vmap(jax.vmap(product, (None, 0, 0)), (0, None, None))(x, a, b)
    jax.block_until_ready((same_rows, same_adapter, pack, inside_out))
    assert sorted(shape for _, shape, _ in launches) == [(1, 10, 128), (2, 5, 128), (2, 10, 128), (2, 10, 128)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=0.05)
    close(np.asarray(same_rows, np.float32), every[:, 0])
    close(np.asarray(same_adapter, np.float32), every[0])
    close(np.asarray(pack, np.float32), every)
    close(np.asarray(inside_out, np.float32), every.swapaxes(0, 1))

    other = qj.quantize(normal(70, 128, dtype="float32", seed=9))
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), q.packed, other.packed)
    found = jax.vmap(lambda packed: nf4_matmul.matmul_lora(x[0], packed, fused(q), a[0], b[0], SCALE))(packed)
    close(np.asarray(found[0], np.float32), every[0, 0])
    close(
        np.asarray(found[1], np.float32),
        np.asarray(nf4_matmul.matmul_lora(x[0], other.packed, fused(q), a[0], b[0], SCALE), np.float32),
    )


@pytest.mark.parametrize("with_dropout", [False, True])
def test_no_weight_is_kept_for_the_backward_pass(with_dropout, launches, capsys):
    q = weight((128, 192))
    a, b, x = normal(8, 192, dtype="float32", seed=3), normal(128, 8, dtype="float32", seed=4), normal(5, 192, seed=1)

    def product(x, dropped, a, b, packed):
        return nf4_matmul.matmul_lora(x, packed, fused(q), a, b, SCALE, dropped if with_dropout else None)

    print_saved_residuals(product, x, 2 * x, a, b, q.packed)
    kept = [line for line in capsys.readouterr().out.splitlines() if "from the argument packed" not in line]
    shapes = sorted(line.split(" ")[0] for line in kept)
    assert shapes == sorted(["bf16[5,192]", "bf16[5,8]", "f32[8,192]", "f32[128,8]", "f32[]"]), kept


def test_off_is_the_plain_form_and_so_are_weights_that_the_kernels_refuse(launches):
    q = weight()
    a, b, x = normal(8, 128, dtype="float32", seed=3), normal(70, 8, dtype="float32", seed=4), normal(5, 128, seed=1)
    today = nf4_matmul.matmul(x, q.packed, q.codec) + nf4_matmul.low_rank_term(x, a, b, SCALE)
    np.testing.assert_array_equal(nf4_matmul.matmul_lora(x, q.packed, q.codec, a, b, SCALE), today)
    refused = x.astype(jnp.float32)
    np.testing.assert_array_equal(
        nf4_matmul.matmul_lora(refused, q.packed, fused(q), a, b, SCALE),
        lora.plain(refused, q.packed, q.codec, a, b, SCALE),
    )
    assert not launches


@pytest.mark.parametrize("op", config.OPS)
def test_timed_forms_compute_the_same_with_an_adapter_for_every_copy(op, launches):
    case = measure.Case(op, Shape(64, 128), rows=3, block_size=64, dtype="bfloat16")
    codec = nf4_matmul.Codec((64, 128), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)))
    forms = measure.lora_forms(case, codec, copies=2, rank=4)
    (apart, bytes_apart), (together, bytes_together) = forms["triton + XLA LoRA"], forms["triton, LoRA fused"]
    expected = np.asarray(jax.block_until_ready(apart()), np.float32)
    assert [rank for launched, _, rank in launches if launched == op] == [0, 0]
    found = np.asarray(jax.block_until_ready(together()), np.float32)
    assert [rank for launched, _, rank in launches if launched == op] == [0, 0, 4, 4]
    np.testing.assert_allclose(found, expected, atol=0.03 * expected.std(), rtol=2e-2)
    assert bytes_apart == bytes_together == 64 * 128 // 2 + 128 + 4 + 4 + (3 * (64 + 128) + 4 * (64 + 128)) * 2


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_linear_layer_takes_the_fused_form(rate, launches):
    """Once for the layer, dropout drawn as without it; weights and adapters of 16 bits are rounded alike."""
    q, x = weight(), normal(2, 5, 128, seed=1)

    def layer(q: qj.QuantizedTensor) -> jax.Array:
        linear = Linear(q)
        linear.lora_a = nnx.LoRAParam(normal(8, 128, dtype="float32", seed=3))
        linear.lora_b = nnx.LoRAParam(normal(70, 8, dtype="float32", seed=4))
        linear.lora_scale = SCALE
        return jax.block_until_ready(linear(x, Dropout(rate, jax.random.key(0))))

    apart = layer(dataclasses.replace(q, backend="triton"))
    together = layer(dataclasses.replace(q, backend="triton", fuse_lora=True))
    assert launches == [("forward", (10, 128), 0), ("forward", (1, 10, 128), 8)]
    assert not np.array_equal(apart, together)  # other roundings
    difference = np.abs(np.asarray(apart, np.float32) - np.asarray(together, np.float32))
    assert difference.max() < 0.03 * np.asarray(apart, np.float32).std()


def test_no_rows():
    q = weight()
    x, a, b = jnp.zeros((2, 0, 128), jnp.bfloat16), jnp.zeros((8, 128)), jnp.zeros((70, 8))
    assert nf4_matmul.matmul_lora(x, q.packed, fused(q), a, b, SCALE).shape == (2, 0, 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "xla"}, "fuse_lora needs backend \"triton\", found 'xla'"),
        ({"backend": "mosaic"}, "fuse_lora needs backend \"triton\", found 'mosaic'"),
        ({"x": 64}, r"x has 64 features, the weight \[out, in\] = \[70, 128\] takes 128"),
        ({"a": 64}, r"a \[8, 64\] and b \[70, 8\] do not fit the weight .*: expected \[R, 128\] and \[70, R\]"),
        ({"b": 4}, r"a \[8, 128\] and b \[70, 4\] do not fit the weight"),
        ({"dropped": jnp.float32}, r"dropped is float32\[5, 128\], expected bfloat16\[5, 128\] as x, or None"),
    ],
)
def test_mistakes_are_named(change, message):
    q = weight()
    x, a = jnp.zeros((5, change.get("x", 128)), jnp.bfloat16), jnp.zeros((8, change.get("a", 128)))
    b = jnp.zeros((70, change.get("b", 8)))
    dropped = x.astype(change["dropped"]) if "dropped" in change else None
    codec = fused(q)._replace(backend=change.get("backend", "triton"))
    with pytest.raises(ValueError, match=message):
        nf4_matmul.matmul_lora(x, q.packed, codec, a, b, SCALE, dropped)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA H200"])
def test_a_pack_is_lowered_to_one_kernel_each_way_for_a_gpu_that_is_not_here(gpu, rows):
    triton_lib = pytest.importorskip("jax_triton.triton_lib")
    if triton_lib.triton_kernel_call_lib is None:
        pytest.skip("lowering needs jax-cuda13-plugin (pip install --no-deps jax-cuda13-plugin)")
    q = weight((128, 192))
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=100, platform="gpu")

    def pack_gradient(x, a, b, packed):
        def loss(x, a, b):
            return jnp.sum(nf4_matmul.matmul_lora(x, packed, fused(q), a, b, SCALE).astype(jnp.float32) ** 2)

        return jax.vmap(jax.grad(loss, (0, 1, 2)))(x, a, b)

    arrays = (
        jax.ShapeDtypeStruct((3, rows, 192), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 8, 192), jnp.float32),
        jax.ShapeDtypeStruct((3, 128, 8), jnp.float32),
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(pack_gradient).trace(*arrays, q.packed).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("triton_kernel_call") == 2
    assert "tensor<128x192xbf16>" not in text and "tensor<192x128xbf16>" not in text  # no 16-bit W anywhere
