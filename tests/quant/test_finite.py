"""No weight that is not finite is quantized: any bits, dtype, shape, place and format, in one piece and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.quant.blockwise import CHUNK, quantize_packed
from qlora_jax.quant.codebooks import codebook
from tests.not_finite import DTYPES, every_pattern, finite_by_definition, not_finite

NAME = "model.layers.3.mlp.up_proj.weight"
CHUNKED = (1100, 4096)  # more than CHUNK values, as all large weights are, and the last chunk overlaps the one before
SHAPES = [(1, 1), (5, 7), (64, 64), (33, 97), (1, 4097), CHUNKED]


def normal(shape: tuple[int, ...], name: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(DTYPES[name])


def word(value: np.generic) -> str:
    return "NaN" if np.isnan(np.float32(value)) else "inf"


def assert_refused(w: np.ndarray, value: np.generic, place: int, *form) -> None:
    kept = w.reshape(-1)[place].copy()
    w.reshape(-1)[place] = value
    with pytest.raises(qj.InputError, match=rf"^{NAME} holds {word(value)} \(value {place + 1:,} of {w.size:,}\)"):
        qj.quantize(jax.device_put(w), *form, name=NAME)
    w.reshape(-1)[place] = kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_place(name, shape):
    """Each pattern in turn, at places all over the weight: ends of blocks, of halves, of chunks, and between them."""
    w = normal(shape, name)
    assert np.isfinite(np.float32(qj.dequantize(qj.quantize(jax.device_put(w)), jnp.float32))).all()
    last, many = w.size - 1, 8 if shape == CHUNKED else 30
    places = {0, last, last // 2, last // 2 + 1, CHUNK // 2 - 1, CHUNK // 2, CHUNK - 1, CHUNK, 63, 64, last // 64 * 64}
    places |= set(np.random.default_rng(1).integers(0, w.size, many).tolist())
    patterns = list(not_finite(name).values())
    for number, place in enumerate(sorted(place for place in places if place <= last)):
        assert_refused(w, patterns[number % len(patterns)], place)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_every_format_and_pattern(format, double_quant):
    w = normal((33, 97), "bfloat16")
    for number, value in enumerate(not_finite("bfloat16").values()):
        assert_refused(w, value, 290 * number, format, 32, double_quant)


@pytest.mark.parametrize("blocks", [2**9, 2**16 + 2**9])  # in one piece, and in chunks
@pytest.mark.parametrize("name", DTYPES)
def test_a_block_is_spoiled_by_its_own_values_alone(name, blocks):
    """One block for each bit pattern, that pattern in it: its scale is finite exactly where the pattern is."""
    patterns = np.resize(every_pattern(name)[:: 1 if blocks > 2**16 else 2**7], blocks)
    w = normal((blocks, 64), name)
    w[np.arange(blocks), np.arange(blocks) % 64] = patterns
    packed, check = quantize_packed(jax.device_put(w), codebook("nf4"), 64, double_quant=False)
    is_finite = finite_by_definition(w).all(axis=1)
    np.testing.assert_array_equal(np.isfinite(packed.absmax), is_finite)
    np.testing.assert_array_equal(packed.absmax[is_finite], np.abs(w[is_finite].astype(np.float32)).max(axis=1))
    assert not np.isfinite(check) and not is_finite.all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_inside_a_program_it_shows_in_the_values(double_quant):
    """There is nobody to raise an error there: the block dequantizes to values that are not finite either."""
    there_and_back = jax.jit(lambda w: qj.dequantize(qj.quantize(w, "nf4", 64, double_quant)))
    w = normal((64, 64), "bfloat16")
    assert np.isfinite(np.float32(there_and_back(w))).all()
    for value in not_finite("bfloat16").values():
        w[7, 9] = value
        back = np.float32(there_and_back(w))
        assert not np.isfinite(back[7]).any()
        assert np.isfinite(np.delete(back, 7, axis=0)).all() or double_quant


@pytest.mark.parametrize(("size", "double_quant"), [(3e38, False), (8e37, True)])
def test_values_that_no_scale_can_hold_are_refused(size, double_quant):
    """1 / 3e38 is subnormal, and the mean of many scales of 8e37 overflows."""
    with pytest.raises(qj.InputError, match=f"^{NAME} has values of up to {size:.0e}, too".replace("+", r"\+")):
        qj.quantize(jnp.full((8, 64), size), "nf4", 64, double_quant, NAME)
    for largest in (2.0**120, 2.0**126)[: 1 if double_quant else 2]:
        q = qj.quantize(jnp.full((8, 64), largest), "nf4", 64, double_quant)
        np.testing.assert_allclose(qj.dequantize(q, jnp.float32), largest, rtol=1e-6)
