"""Timing and tuning: the forms compute the same, a wrong candidate is never ranked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import Codec, api, config, measure, triton_backend
from pallas_kernels.nf4_matmul.shapes import Shape

GPU = config.Gpu("a GPU", 80, 10)
CODEC = Codec((64, 128), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)))


def case(op: config.Op) -> measure.Case:
    return measure.Case(op, Shape(64, 128), rows=3, block_size=64, dtype="float32")


@pytest.mark.parametrize("op", config.OPS)
def test_all_forms_compute_the_same(op):
    forms = measure.forms(case(op), CODEC, copies=2, backends=("xla",))
    values = {name: jax.block_until_ready(run()) for name, (run, _) in forms.items()}
    assert list(values) == ["xla", "dense", "dequantize, dot"]
    for name, outputs in values.items():
        assert len(outputs) == 2
        for output, dense in zip(outputs, values["dense"], strict=True):
            np.testing.assert_allclose(output, dense, rtol=1e-5, atol=1e-5, err_msg=name)
    assert not np.array_equal(*values["dense"])  # each copy is another weight


def test_bytes_are_those_of_the_packed_weight_and_the_activations():
    forms = measure.forms(case("forward"), CODEC, copies=1, backends=("xla",))
    activations = 3 * (64 + 128) * 4
    assert forms["dense"][1] == 64 * 128 * 4 + activations
    assert forms["xla"][1] == 64 * 128 // 2 + 128 + 4 + 4 + activations  # codes, scales, nested scale, offset


def test_8_bit_forms_are_timed_only_where_a_kernel_takes_them(monkeypatch):
    gpu = GPU._replace(compute_capability=90)
    monkeypatch.setattr(triton_backend, "current_gpu", lambda: gpu)
    half = measure.Case("forward", Shape(64, 128), rows=3, block_size=64, dtype="bfloat16")
    assert measure.eight_bit_forms(half) == ("triton fp8", "triton fp8_row")
    assert measure.eight_bit_forms(half._replace(op="backward")) == ()
    assert measure.eight_bit_forms(half._replace(dtype="float32")) == ()
    gpu = GPU
    assert measure.eight_bit_forms(half) == ()


@pytest.mark.parametrize(("name", "low", "high"), [("xla fp8", 0.023, 0.0258), ("xla fp8_row", 0.0258, 0.029)])
def test_8_bit_forms_are_off_by_what_the_roundings_leave(name, low, high):
    wide = measure.Case("forward", Shape(256, 512), rows=64, block_size=64, dtype="float32")
    codec = CODEC._replace(shape=tuple(wide.shape))
    assert low < measure.eight_bit_error(wide, codec, name) < high  # of x alone: the table is exact in 8 bits
    assert measure.eight_bit_error(wide, codec, "xla") == 0
    run, _ = measure.forms(wide, codec, copies=1, backends=(name,))[name]
    full, _ = measure.forms(wide, codec, copies=1, backends=("xla",))["xla"]
    assert not np.allclose(run()[0], full()[0], rtol=1e-3)


def test_forms_take_turns():
    turns = []
    seconds = measure.interleaved({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=3, copies=1)
    assert turns == ["a", "b"] * 4  # the first turn compiles
    assert set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


@pytest.mark.parametrize("op", config.OPS)
def test_tuning_leaves_out_what_is_wrong_or_does_not_compile(op, monkeypatch):
    right, wrong, broken = (config.Tiles(16, 32, 64, split, 8, 4, 2) for split in (1, 2, 3))

    def kernel(x, packed, codec, tiles):
        if tiles is broken:
            raise RuntimeError("out of registers\nand more")
        y = api.dense_matmul(x, api.dequantize(packed, codec, x.dtype), 1 if op == "forward" else 0)
        return y.at[0, 0].add(5 * jnp.std(y)) if tiles is wrong else y

    monkeypatch.setattr(triton_backend, op, kernel)
    monkeypatch.setattr(config, "candidates", lambda *_: [broken, wrong, right])
    said: list[str] = []
    assert measure.tune(case(op), CODEC, GPU, repeats=1, say=said.append) == right
    assert "does not compile" in said[0] and "out of registers" in said[0] and "wrong by" in said[1]
    monkeypatch.setattr(config, "candidates", lambda *_: [wrong])
    with pytest.raises(RuntimeError, match="no candidate computes"):
        measure.tune(case(op), CODEC, GPU, repeats=1, say=said.append)
