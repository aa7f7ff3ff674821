"""Dropout's masks: by the definition, at the rate, and unrelated wherever they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.dropout import Dropout, DropoutKey, DropoutRate, random_bits

pytestmark = pytest.mark.quick_compile

SHAPE = (4, 128, 1024)
SIGMAS = 5  # of a binomial count, or of a correlation of independent values


def words(seed: int) -> jax.Array:
    return jax.random.bits(jax.random.key(seed), (2,), jnp.uint32)


bits = jax.jit(random_bits, static_argnums=(1, 2))


def dropped(seed: int = 0, place: int = 1, rate: float = 0.1) -> np.ndarray:
    return (np.asarray(bits(words(seed), place, SHAPE)) >> 16) < DropoutRate.of(rate).threshold


def mix(x: np.ndarray) -> np.ndarray:
    """In 64 bits, cut back to 32 after each product."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def by_definition(seed: int, place: int, b: int, t: int, i: int) -> int:
    def one(x: int) -> int:
        return int(mix(np.uint64(x & 0xFFFFFFFF)))

    k0, k1 = (int(word) for word in words(seed))
    token = one(one(one(k0 ^ place) + b) + t)
    return one(one(token + i) ^ one(token ^ k1))


@pytest.mark.parametrize("where", [(0, 0, 0), (3, 127, 1023), (1, 5, 77)])
def test_bits_are_the_definitions(where):
    assert int(bits(words(2), 3, SHAPE)[where]) == by_definition(2, 3, *where)


def test_a_place_has_its_bits_in_every_shape():
    whole = np.asarray(bits(words(0), 1, SHAPE))
    np.testing.assert_array_equal(np.asarray(bits(words(0), 1, (2, 7, 33))), whole[:2, :7, :33])


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_as_many_are_dropped_as_the_rate_says_everywhere(rate):
    mask = dropped(rate=rate)
    for axes in ((0, 1, 2), (1, 2), (2,), (0, 1)):  # all, a row's, a token's, a feature's
        share = mask.mean(axes)
        count = mask.size / share.size
        assert np.abs(share - rate).max() < (SIGMAS + 1) * np.sqrt(rate * (1 - rate) / count)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_masks_of_other_places_layers_rows_and_tokens_are_unrelated():
    mask = dropped()
    shifted = [(mask[..., s:], mask[..., :-s]) for s in (1, 2, 64)]
    shifted += [(mask[:, s:], mask[:, :-s]) for s in (1, 2, 64)]
    shifted += [(mask[:, s:, s:], mask[:, :-s, :-s]) for s in (1, 3)]
    others = [(mask, dropped(place=2)), (mask, dropped(seed=1)), (mask[1:], mask[:-1])]
    for a, b in shifted + others:
        assert abs(correlation(a, b)) < SIGMAS / np.sqrt(a.size)


def test_every_bit_is_as_often_set_as_not():
    values = np.asarray(bits(words(4), 1, SHAPE)).ravel()
    shares = [((values >> bit) & 1).mean() for bit in range(32)]
    assert np.abs(np.asarray(shares) - 0.5).max() < SIGMAS / 2 / np.sqrt(values.size)


def test_what_is_kept_is_scaled_and_a_linear_layer_without_adapter_takes_its_place():
    x = jnp.ones((2, 3, 400), jnp.bfloat16)
    first, second = Dropout(0.25, jax.random.key(0)), Dropout(0.25, jax.random.key(0))
    masks = [np.asarray(first(x), np.float32) for _ in range(2)]
    second.skip()
    assert set(np.unique(masks)) == {0.0, np.float32(jnp.bfloat16(4 / 3))}
    assert (masks[0] != masks[1]).any()
    np.testing.assert_array_equal(np.asarray(second(x), np.float32), masks[1])
    assert Dropout(0.0, jax.random.key(0))(x) is x and Dropout(0.25, None)(x) is x


def test_a_row_has_its_mask_wherever_the_batch_is_cut():
    whole = np.asarray(bits(words(0), 1, SHAPE))
    for first, rows in ((0, 1), (1, 2), (3, 1)):
        part = bits(words(0), 1, (rows, *SHAPE[1:]), jnp.int32(first))
        np.testing.assert_array_equal(np.asarray(part), whole[first : first + rows])
    x = jnp.ones((4, 3, 400))
    mask = Dropout(0.5, jax.random.key(0))(x)
    lower = Dropout(0.5, DropoutKey(jax.random.key(0), 2))(x[2:])
    np.testing.assert_array_equal(np.asarray(lower), np.asarray(mask)[2:])
