"""The way to bitsandbytes' tensors and back loses no bit; what is damaged is named."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_jax as qj
from qlora_jax.quant.bitsandbytes import part_of
from qlora_jax.quant.tensor import QuantizedTensor


@st.composite
def quantized(draw) -> QuantizedTensor:
    """Any packed arrays: no weight need stand behind them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    block_size = draw(st.sampled_from([32, 64, 512, 4096]))
    n = shape[0] * shape[1]
    blocks = -(-n // block_size)
    codes = rng.integers(0, 256, -(-n // 2), np.uint8)
    format = draw(st.sampled_from(["nf4", "fp4"]))
    if draw(st.booleans()):
        absmax = rng.integers(0, 256, blocks, np.uint8)
        nested, offset = rng.random(-(-blocks // 256), np.float32), np.float32(rng.random())
        return QuantizedTensor(codes, absmax, nested, offset, shape=shape, format=format, block_size=block_size)
    absmax = rng.random(blocks, np.float32)
    return QuantizedTensor(codes, absmax, None, None, shape=shape, format=format, block_size=block_size)


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@given(quantized())
def test_ours_and_back(q):
    assert_same(qj.from_bitsandbytes(qj.to_bitsandbytes(q)), q)


@given(quantized())
def test_theirs_and_back(q):
    """Byte for byte, the padding nibble of an odd count included."""
    theirs = qj.to_bitsandbytes(q, "a.weight", dtype="float16")
    again = qj.to_bitsandbytes(qj.from_bitsandbytes(theirs, "a.weight"), "a.weight", dtype="float16")
    assert theirs.keys() == again.keys()
    for key, value in theirs.items():
        assert value.dtype == again[key].dtype and value.shape == again[key].shape
        np.testing.assert_array_equal(value, again[key])


@given(quantized())
def test_codes_are_in_their_order(q):
    """bitsandbytes: value 2j in the high nibble of byte j; ours: halves side by side."""
    n = q.shape[0] * q.shape[1]
    theirs = qj.to_bitsandbytes(q)["weight"].reshape(-1)
    half = -(-n // 2)
    for index in {0, 1, n // 2, max(n - 2, 0), n - 1}:
        if index >= n:
            continue
        byte = q.codes[index % half]
        ours = byte & 15 if index < half else byte >> 4
        assert ours == (theirs[index // 2] >> 4 if index % 2 == 0 else theirs[index // 2] & 15)


def tensors(**changes) -> dict[str, np.ndarray]:
    q = qj.quantize(jnp.ones((4, 33)), "nf4", 64)
    return qj.to_bitsandbytes(q, "w") | changes


def test_keys_and_shapes():
    found = {key: (value.dtype.name, value.shape) for key, value in tensors().items()}
    state = found.pop("w.quant_state.bitsandbytes__nf4")
    assert state[0] == "uint8"
    assert found == {
        "w": ("uint8", (66, 1)),
        "w.absmax": ("uint8", (3,)),
        "w.quant_map": ("float32", (16,)),
        "w.nested_absmax": ("float32", (1,)),
        "w.nested_quant_map": ("float32", (256,)),
    }
    assert json.loads(tensors()["w.quant_state.bitsandbytes__nf4"].tobytes()) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [4, 33],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 1.0,
    }


def state(**changes) -> np.ndarray:
    fields = json.loads(tensors()["w.quant_state.bitsandbytes__nf4"].tobytes()) | changes
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": np.zeros((65, 1), np.uint8)}, "w is uint8 with 65 values; expected uint8 with 66"),
        ({"w.absmax": np.zeros(3, np.float32)}, "w.absmax is float32 with 3 values; expected uint8"),
        ({"w.nested_absmax": np.zeros(2, np.float32)}, "w.nested_absmax is float32 with 2"),
        ({"w.quant_map": np.zeros(16, np.float32)}, "w.quant_map is missing or is not bitsandbytes' table"),
        ({"w.nested_quant_map": np.zeros(256, np.float32)}, "w.nested_quant_map is missing or is not"),
        ({"w.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}, "quant_state is not the JSON"),
        ({"w.quant_state.bitsandbytes__nf4": state(shape=None)}, "quant_state is not the JSON"),
        ({"w.quant_state.bitsandbytes__nf4": state(blocksize=63)}, "block_size is 63"),
        ({"w.quant_state.bitsandbytes__nf4": state(nested_blocksize=64)}, "nested blocksize 64"),
        ({"w.nested_absmax": np.full(1, np.nan, np.float32)}, "w.nested_absmax holds NaN"),
        ({"w.nested_absmax": np.full(1, -1, np.float32)}, r"w.nested_absmax holds -1\.0; a scale is not negative"),
        ({"w.quant_state.bitsandbytes__nf4": state(nested_offset=math.nan)}, "nested_offset of w holds NaN"),
        ({"w.quant_state.bitsandbytes__nf4": state(nested_offset=math.inf)}, "nested_offset of w holds inf"),
        ({"w.quant_state.bitsandbytes__nf4": state(nested_offset=-0.5)}, r"nested_offset of w holds -0\.5"),
    ],
)
def test_damage_is_named(changes, message):
    with pytest.raises(qj.InputError, match=message):
        qj.from_bitsandbytes(tensors(**changes), "w")


@pytest.mark.parametrize("part", ["w", "w.absmax", "w.nested_absmax", "w.quant_map", "w.nested_quant_map"])
def test_missing_part_is_named(part):
    kept = {key: value for key, value in tensors().items() if key != part}
    with pytest.raises(qj.InputError, match=f"{part} is missing"):
        qj.from_bitsandbytes(kept, "w")


def test_not_bitsandbytes_at_all():
    with pytest.raises(qj.InputError, match="not a bitsandbytes 4-bit weight"):
        qj.from_bitsandbytes({"w": np.zeros((2, 2), np.float32)}, "w")


def test_int4_has_no_such_form():
    with pytest.raises(qj.InputError, match="w is int4; bitsandbytes' files hold nf4, fp4, int8"):
        qj.to_bitsandbytes(qj.quantize(jnp.ones((2, 2)), "int4"), "w")


def test_part_of():
    assert part_of("a.weight.quant_state.bitsandbytes__fp4") == part_of("a.weight.nested_absmax") == "a.weight"
    assert part_of("a.weight") is None
