"""Nothing that is not finite is overlooked, whatever its bits, dtype and place: on the host, and in programs of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.finite import all_finite, largest_magnitude
from qlora_jax.errors import InputError
from qlora_jax.files import save_tensors
from qlora_jax.finite import check_finite, first_not_finite
from tests.not_finite import DTYPES, every_pattern, finite_by_definition, not_finite


@pytest.mark.parametrize("name", DTYPES)
def test_the_host_knows_bit_patterns(name):
    values = every_pattern(name)[::3]  # every exponent and sign, with thousands of mantissas
    found = np.asarray([first_not_finite(values[i : i + 1]) is None for i in range(len(values))])
    np.testing.assert_array_equal(found, finite_by_definition(values))


@given(
    name=st.sampled_from([*DTYPES]),
    kind=st.sampled_from([*not_finite("float32")]),
    size=st.sampled_from([1, 2, 35, 2**18 - 1, 2**18, 2**18 + 1, 700_001]),  # around what is looked at at a time
    place=st.floats(0, 1, exclude_max=True),
    also=st.floats(0, 1, exclude_max=True),
)
def test_the_first_place_is_found_wherever_it_is(name, kind, size, place, also):
    values = np.full(size, np.finfo(np.float16).max, DTYPES[name])
    assert first_not_finite(values) is None
    places = [int(share * size) for share in (place, also)]
    values[places] = not_finite(name)[kind]
    assert first_not_finite(values) == min(places)
    assert first_not_finite(values[: min(places)]) is None
    assert first_not_finite(values[::-1].reshape(1, -1)) == size - 1 - max(places)


def test_what_is_no_float_is_finite():
    for values in (np.full(9, 255, np.uint8), np.full(9, -1, np.int64), np.zeros(0, np.float32), np.asarray([True])):
        assert first_not_finite(values) is None


def test_the_error_says_what_where_and_how_to_mend_it():
    values = np.ones((3, 4), np.float32)
    values[1, 2] = -np.inf
    with pytest.raises(InputError, match=r"^a\.weight holds inf \(value 1,007 of 5,000\): write it again$"):
        check_finite(values, "a.weight", "write it again", first=1000, total=5000)


@pytest.mark.parametrize("name", DTYPES)
def test_no_file_is_written_of_what_is_not_finite(name, tmp_path):
    values = np.ones((3, 5), DTYPES[name])
    save_tensors({"b": values}, tmp_path / "good.safetensors")
    values[2, 1] = not_finite(name)["signalling"]
    with pytest.raises(InputError, match=r"b holds NaN \(value 12 of 15\): such a tensor is not written"):
        save_tensors({"a": np.ones(2), "b": values}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]


# as blocks of weights and of 8-bit moments are reduced, and rows of no even length
@pytest.mark.parametrize("width", [64, 256, 77])
@pytest.mark.parametrize("name", DTYPES)
def test_the_largest_magnitude_is_numpys_or_infinite(name, width):
    """A row for every bit pattern, at a place of its own among finite numbers, as a program and op by op."""
    patterns = every_pattern(name)[:: 1 if width == 64 else 8]
    rows = np.random.default_rng(1).normal(size=(len(patterns), width)).astype(DTYPES[name])
    rows[np.arange(len(rows)), np.arange(len(rows)) % width] = patterns
    is_finite = finite_by_definition(rows).all(axis=1)
    with np.errstate(invalid="ignore"):
        exact = np.where(is_finite, np.abs(rows.astype(np.float32)).max(axis=1), np.inf)
    programs = [jax.jit(largest_magnitude, static_argnames="axis"), largest_magnitude]
    for reduce in programs[: 2 if width == 64 else 1]:
        np.testing.assert_array_equal(reduce(jnp.asarray(rows), axis=1), exact)
    assert float(programs[0](jnp.asarray(rows[is_finite]))) == exact[is_finite].max()
    assert float(programs[0](jnp.asarray(rows))) == np.inf


@pytest.mark.parametrize("kind", not_finite("float32"))
def test_one_value_spoils_a_tree(kind):
    tree = {"a": jnp.ones((3, 1000)), "b": [jnp.arange(3), jnp.zeros((2, 3, 70), jnp.bfloat16)], "c": jnp.float32(2)}
    assert all_finite(tree) and all_finite({})
    spoiled = np.asarray(tree["b"][1]).copy()
    spoiled[1, 2, 69] = not_finite("bfloat16")[kind]
    assert not all_finite(tree | {"b": [tree["b"][0], jnp.asarray(spoiled)]})
    assert not all_finite(tree | {"c": jnp.asarray(not_finite("float32")[kind])})
