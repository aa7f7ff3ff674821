"""The Hopper kernel for few rows of x: its PTX, all of it, emulated; lowered for an H200; how it is reached."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import Codec, Packed, api
from pallas_kernels.nf4_matmul.mosaic import few_rows as mosaic_few_rows
from pallas_kernels.nf4_matmul.mosaic import few_rows_ptx
from pallas_kernels.nf4_matmul.mosaic import hopper as mosaic_hopper
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape
from tests.kernels import ptx_program
from tests.kernels.test_mosaic_lowering import lower
from tests.kernels.weights import dequantized, random_weight, whole_numbers


def emulate(
    x: jax.Array,
    packed: Sequence[Packed],
    codecs: Sequence[Codec],
    split: int | None = None,
    tiles: slice = slice(None),
) -> np.ndarray:
    """y as float32, as mosaic_few_rows.forward_joined launches it; NaN where no program writes."""
    nested = packed[0].nested_absmax is not None
    program = mosaic_few_rows.make_program(x.shape[0], x.dtype, codecs, nested, split)
    out = np.full((program.rows, sum(codec.shape[0] for codec in codecs)), np.nan, np.asarray(x).dtype)
    x, absmax_map, *weights = [np.array(a).reshape(-1) for a in mosaic_few_rows.operands(x, packed, codecs)]
    bounds = program.first_tiles
    for first, end in zip(bounds, bounds[1:], strict=False):  # side by side are programs that read the same arrays
        columns = [program.columns(part) for part in range(program.split)]
        arrays = [x, absmax_map, out, *weights]
        numbers = np.arange(first, end)[tiles]
        ptx_program.run(few_rows_ptx.text(program), arrays, numbers, columns, program.warps, program.shared_bytes)
    return out.astype(np.float32)


# shape, block size, whether scales are nested, rows, dtype, split
CASES = {
    "one row": ((256, 2048), 64, True, 1, jnp.bfloat16, 1),
    "idle warps": ((256, 256), 64, True, 3, jnp.float16, None),
    "eight rows, unequal warps": ((256, 2304), 64, False, 8, jnp.bfloat16, 1),
    "two tiles of x": ((256, 768), 64, True, 9, jnp.bfloat16, 1),
    "sixteen rows, several groups a warp": ((256, 4352), 64, True, 16, jnp.float16, 1),
    "parts of two sizes": ((512, 1792), 64, True, 5, jnp.bfloat16, 4),
    "eight parts": ((256, 1280), 64, True, 16, jnp.float16, 8),
    "split, two tiles of x": ((256, 2304), 64, True, 13, jnp.bfloat16, 4),
    "blocks of 128": ((256, 1024), 128, True, 2, jnp.bfloat16, None),
    "blocks of 256, plain scales": ((256, 1024), 256, False, 7, jnp.bfloat16, 2),
    "blocks wider than a round of warps": ((256, 4096), 2048, True, 4, jnp.bfloat16, 1),
    "several nested blocks in a row of tiles": ((1280, 512), 64, True, 1, jnp.bfloat16, None),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case):
    """No rounding but the result's: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, dtype, split = CASES[case]
    assert mosaic_hopper.unsupported(shape, block_size, dtype) is None
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    w = dequantized(packed, codec)
    x = jnp.asarray(np.random.default_rng(1).integers(-2, 3, (rows, shape[1])), dtype)

    found = emulate(x, [packed], [codec], split)

    expected = np.asarray(jnp.asarray(np.asarray(x, np.float32) @ w.T, dtype), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("nested", [True, False])
def test_several_weights_in_one_launch(nested):
    """Queries of more heads than keys and values have: every tile takes the pointers and places of its own weight."""
    made = [whole_numbers((out, 512), 64, nested, seed) for seed, out in enumerate((512, 256, 256))]
    weights = [(one, made[0][1]._replace(shape=codec.shape)) for one, codec in made]
    packed, codecs = zip(*weights, strict=True)
    assert mosaic_few_rows.may_join(packed, codecs)
    x = jnp.asarray(np.random.default_rng(2).integers(-2, 3, (3, 512)), jnp.bfloat16)

    found = emulate(x, packed, codecs, split=2)

    apart = [emulate(x, [one], [codec], split=2) for one, codec in weights]
    np.testing.assert_array_equal(found, np.concatenate(apart, axis=1))
    expected = np.concatenate([np.asarray(x, np.float32) @ dequantized(one, codec).T for one, codec in weights], axis=1)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32))


def test_weights_that_differ_in_more_than_out_features_stay_apart():
    plain, nested = whole_numbers((256, 512), 64, False, seed=0), whole_numbers((256, 512), 64, True, seed=1)
    others = [plain[1]._replace(block_size=128), plain[1]._replace(table=(0.0,) * 16), nested[1]]
    for packed, codec in [*((plain[0], other) for other in others[:2]), nested]:
        assert not mosaic_few_rows.may_join([plain[0], packed], [plain[1], codec])


@pytest.mark.parametrize(
    ("rows", "block_sizes", "launches"), [(1, (64, 64, 64), 1), (16, (64, 64), 1), (17, (64, 64), 2), (4, (64, 128), 2)]
)
def test_launches_of_a_joined_product(rows, block_sizes, launches):
    weights = [whole_numbers((256, 512), size, True, seed=0) for size in block_sizes]
    packed = tuple(one for one, _ in weights)
    codecs = tuple(codec._replace(backend="mosaic") for _, codec in weights)
    x, packed = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (jnp.zeros((rows, 512), jnp.bfloat16), packed)
    )
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x, packed: api.matmul_joined(x, packed, codecs)).trace(x, packed)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == launches


@pytest.mark.parametrize(
    ("format", "dtype"), [("nf4", jnp.bfloat16), ("fp4", jnp.float16), ("int4", jnp.bfloat16), ("nf4", jnp.float16)]
)
def test_only_the_table_and_the_result_are_rounded(format, dtype):
    packed, codec = random_weight((256, 512), format=format)
    rounded = tuple(float(value) for value in np.asarray(codec.table, np.float32).astype(dtype))
    w = dequantized(packed, codec._replace(table=rounded)).astype(np.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 512)), dtype)
    exact = np.asarray(x, np.float64) @ w.T

    found = emulate(x, [packed], [codec], split=1)

    # a product passes through the sums of 16 in an mma, 4 mma, 8 warps: with the scaling 30 roundings at most
    sum_error = 30 * 2.0**-24 * (np.abs(np.asarray(x, np.float64)) @ np.abs(w.T))
    unit = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}[dtype]
    assert np.all(np.abs(found - exact) <= unit * (np.abs(exact) + sum_error) + sum_error)


def test_the_last_program_of_the_largest_weight():
    """Offsets near their largest: 470 million weights, of which the last tile's rows meet the last columns."""
    (out_features, in_features), rows = SHAPES["llama-70b/gate_up"], 2
    half, last, rng = out_features // 2, slice(-32, None), np.random.default_rng(0)
    codes = np.zeros((half, in_features), np.uint8)
    codes[last] = rng.integers(0, 256, (32, in_features))
    absmax = rng.integers(0, 256, (2, half, in_features // 64), dtype=np.uint8)
    nested_absmax = rng.choice(np.float32([1, 2, 4]), absmax.size // 256)
    codec = Codec((out_features, in_features), 64, tuple(range(-8, 8)), tuple(rng.choice([0.25, 0.5, 0.75], 256)))
    x = np.zeros((rows, in_features), jnp.bfloat16)
    x[:, -in_features // 8 :] = rng.integers(-2, 3, (rows, in_features // 8))

    packed = Packed(codes, absmax, nested_absmax, np.float32(0.5))
    found = emulate(x, [packed], [codec], split=8, tiles=slice(-1, None))

    nested = nested_absmax[np.arange(absmax.size).reshape(absmax.shape)[:, last] // 256]
    scales = np.float32(codec.absmax_map)[absmax[:, last]] * nested + 0.5
    for side, nibbles in enumerate((codes[last] & 15, codes[last] >> 4)):
        w = np.float32(codec.table)[nibbles] * np.repeat(scales[side], 64, axis=1)
        mine = found[:, side * half : (side + 1) * half]
        np.testing.assert_array_equal(mine[:, last], (x.astype(np.float32) @ w.T).astype(x.dtype).astype(np.float32))
        assert np.isnan(mine[:, :-32]).all()


def test_every_named_shape_is_lowered():
    """For 1 row and for 16 in turns: what a number of rows changes does not depend on the shape."""
    for number, shape in enumerate(sorted(set(SHAPES.values()))):
        text = lower("forward", shape, 64, (1, 16)[number % 2], jnp.bfloat16)
        assert text.count("@mosaic_gpu") == 1
        scales = shape.out_features * shape.in_features // 64
        assert f"<{scales}xui8>" in text and f"<{scales}xf32>" not in text  # scales are read in 8 bits


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_programs_cover_every_column_once_and_about_fill_the_gpu(rows):
    for shape in SHAPES.values():
        codec = Codec(shape, 64, (0.0,) * 16, (0.0,) * 256)
        program = mosaic_few_rows.make_program(rows, jnp.bfloat16, [codec], True)
        bounds = [program.columns(part) for part in range(program.split)]
        assert [begin for begin, _ in bounds] + [shape.in_features] == [0] + [end for _, end in bounds]
        waves = program.tiles * program.split * program.warps / mosaic_few_rows.WARPS
        if shape.out_features >= 4096 and shape.in_features >= 4096:
            assert waves / np.ceil(waves) >= 0.6, (shape, program.split)


@pytest.mark.parametrize(("rows", "is_few"), [(1, True), (16, True), (17, False)])
def test_row_counts_choose_the_kernel(rows, is_few, monkeypatch):
    monkeypatch.setattr(mosaic_few_rows, "forward", lambda x, packed, codec: jnp.zeros((rows, 1), x.dtype))
    text = lower("forward", Shape(256, 256), 64, rows, jnp.bfloat16)
    assert ("@mosaic_gpu" not in text) == is_few


def test_more_rows_are_refused():
    packed, codec = whole_numbers((256, 256), 64, False, seed=0)
    with pytest.raises(ValueError, match="x has 17 rows, this kernel takes 1 to 16"):
        mosaic_few_rows.forward(jnp.ones((17, 256), jnp.bfloat16), packed, codec)


@pytest.mark.parametrize(("split", "barrier"), [(1, "bar.sync 0;"), (4, "barrier.cluster.[^;]*;")])
def test_a_missing_barrier_is_seen(split, barrier):
    """The emulator's own check: a program that does not wait for the table or its cluster reads what is not there.

    And nothing is added by atomic operations, in whatever order they come.
    """
    packed, codec = whole_numbers((256, 512), 64, False, seed=0)
    program = mosaic_few_rows.make_program(1, jnp.bfloat16, [codec], False, split)
    text = few_rows_ptx.text(program)
    assert not re.search(r"\n(?:atom|red)\.", text)
    x, absmax_map, *weight = map(np.array, mosaic_few_rows.operands(jnp.ones(512, jnp.bfloat16), [packed], [codec]))
    arrays = [x, absmax_map, np.zeros(256, jnp.bfloat16), *weight]
    columns = [program.columns(part) for part in range(split)]
    ptx_program.run(text, arrays, 0, columns, program.warps, program.shared_bytes)

    text = re.sub(barrier + "\n", "", text, count=1 if split == 1 else 2)
    with pytest.raises(AssertionError, match="ld.shared.* read before it is written"):
        ptx_program.run(text, arrays, 0, columns, program.warps, program.shared_bytes)


def test_other_numbers_of_parts_are_refused():
    codec = Codec((256, 512), 64, (0.0,) * 16, (0.0,) * 256)
    with pytest.raises(ValueError, match="split is 3, expected one of 1, 2, 4, 8"):
        mosaic_few_rows.make_program(1, jnp.bfloat16, [codec], False, 3)
