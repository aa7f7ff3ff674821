"""Codes, scales and dequantized values against bitsandbytes' own, bit for bit (tests/golden/make_quant.py)."""

import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.quant.blockwise import _mean
from qlora_jax.quant.codebooks import CODEBOOKS, absmax_map

FORMATS = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")
SCALES = ("plain", "double")
# every case of quant.npz: name -> block sizes
CASES = {
    "square_64x64": (32, 64, 128, 256, 4096),
    "wide_96x172": (64, 4096),
    "odd_33x7": (32, 64, 128, 256, 4096),
    "odd_zero_tail_33x7": (32, 64, 128, 256, 4096),
    "ragged_128x65": (64, 4096),
    "one_1x1": (32, 64, 128, 256, 4096),
    "edges_8x128": (32, 64, 128, 256, 4096),
}
NOT_HERE = "denormals_2x64"  # scales below 2^-126 are flushed to zero by XLA on CPUs and GPUs


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "quant.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def digests(golden) -> dict[str, str]:
    return json.loads((golden / "quant.json").read_text())["sha256"]


def test_every_golden_case_is_here(arrays):
    found = {tuple(key.split("/")[:3]) for key in arrays if key.endswith("/packed")}
    here = {(case, name, str(block)) for case, blocks in CASES.items() for name in FORMATS for block in blocks}
    assert {key for key in found if key[0] != NOT_HERE} == here


def test_tables(arrays):
    for name in FORMATS:
        np.testing.assert_array_equal(np.float32(CODEBOOKS[name].values), arrays[f"table/{name}"])
    np.testing.assert_array_equal(np.float32(absmax_map()), arrays["dynamic_map"])


@partial(jax.jit, static_argnums=1)
def everything(w, block_size):
    """{(format, scales): QuantizedTensor}, {"format/block/scales/dtype": [O, I]}; one program a shape."""
    quantized, values = {}, {}
    for name in FORMATS:
        for scales in SCALES:
            q = qj.quantize(w, name, block_size, double_quant=scales == "double")
            quantized[name, scales] = q
            for dtype in DTYPES if block_size == 64 else DTYPES[:1]:
                values[f"{name}/{block_size}/{scales}/{dtype}"] = qj.dequantize(q, jnp.dtype(dtype))
    return quantized, values


@pytest.mark.parametrize(("case", "block_size"), [(case, block) for case, blocks in CASES.items() for block in blocks])
def test_bit_exact(arrays, digests, case, block_size):
    weight = arrays[f"{case}/weight"]
    quantized, values = jax.device_get(everything(weight, block_size))
    for name in FORMATS:
        key = f"{case}/{name}/{block_size}"
        plain, double = quantized[name, "plain"], quantized[name, "double"]
        for q in (plain, double):
            assert_same_codes(qj.to_bitsandbytes(q)["weight"].reshape(-1), arrays[f"{key}/packed"], weight)
        np.testing.assert_array_equal(plain.absmax, arrays[f"{key}/absmax"])
        np.testing.assert_array_equal(double.offset, arrays[f"{key}/offset"])
        np.testing.assert_array_equal(double.nested_absmax, arrays[f"{key}/nested_absmax"])
        np.testing.assert_array_equal(double.absmax, arrays[f"{key}/codes8"])
    for key, value in values.items():
        bits = value.view(np.uint16) if key.endswith("bfloat16") else value
        if f"{case}/{key}" in arrays:
            np.testing.assert_array_equal(bits.view(np.uint8), arrays[f"{case}/{key}"].view(np.uint8), err_msg=key)
        assert hashlib.sha256(np.ascontiguousarray(bits)).hexdigest()[:16] == digests[f"{case}/{key}"], key


def assert_same_codes(packed: np.ndarray, expected: np.ndarray, weight: np.ndarray) -> None:
    """A subnormal weight, which XLA flushes, may have either of fp4's codes for zero (0 and 8)."""
    subnormal = ((weight != 0) & (np.abs(weight) < np.finfo(np.float32).tiny)).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    wanted = np.stack([expected >> 4, expected & 15], 1).reshape(-1)
    differing = np.flatnonzero(codes != wanted)
    assert len(codes) == len(wanted)
    assert all(subnormal[differing]) and set(codes[differing]) <= {0} and set(wanted[differing]) <= {8}


def test_offset_is_the_mean_rounded_once():
    """However many scales there are; a float32 sum in any order is off by some last bits."""
    mean = jax.jit(_mean)
    for n in (1, 2, 3, 17, 4097, 300_001):
        for scale in (1e-30, 1.0, 1e30):
            absmax = (np.random.default_rng(n).lognormal(size=n) * scale).astype(np.float32)
            assert mean(absmax) == np.float32(absmax.astype(np.float64).mean()), (n, scale)
