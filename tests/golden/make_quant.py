"""Makes quant.npz and quant.json: bitsandbytes' 4-bit codes and scales, and the values they stand for.

Packed codes, absmax, offset and nested absmax come from bitsandbytes 0.50.2's CPU path (torch 2.13.0, numpy 2.4.6,
Python 3.11). The 8-bit codes of double quantization are the nearest values of bitsandbytes' dynamic map (its own CPU
path bins them; quant.json counts how many of its codes differ and by how much). Dequantized values are computed by
definition.py.

    python tests/golden/make_quant.py

quant.npz, with CASE one of the shapes below, FORMAT nf4 or fp4, BLOCK a block size:
    table/nf4, table/fp4               float32 [16]
    dynamic_map                        float32 [256]
    CASE/weight                        float32 [O, I]
    CASE/FORMAT/BLOCK/packed           uint8 [ceil(O * I / 2)]
    CASE/FORMAT/BLOCK/absmax           float32 [c], c = ceil(O * I / BLOCK)
    CASE/FORMAT/BLOCK/offset           float32 [], torch's mean of absmax
    CASE/FORMAT/BLOCK/codes8           uint8 [c], nearest value of the map
    CASE/FORMAT/BLOCK/codes8_bnb       uint8 [c], what bitsandbytes' CPU path picks
    CASE/FORMAT/BLOCK/nested_absmax    float32 [ceil(c / 256)]
    CASE/FORMAT/BLOCK/SCALES/DTYPE     [O, I], SCALES plain or double, DTYPE float32, float16 or bfloat16 (its
                                       bits, uint16); for small cases at block sizes 64 and 256 only
quant.json: first 16 hex digits of sha256 over the bytes (C order) of every dequantized array, also of those left out of
quant.npz, and `notes` on each CASE/FORMAT/BLOCK.
"""

import hashlib
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import definition
import numpy as np
import torch

FORMATS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 4096)
LARGE = 8000  # cases with at least as many values are quantized at LARGE_BLOCK_SIZES only
LARGE_BLOCK_SIZES = (64, 4096)
STORED_BELOW = 1100  # values in a case whose dequantized arrays are stored, at STORED_BLOCK_SIZES
STORED_BLOCK_SIZES = (64, 256)
HERE = Path(__file__).parent


def half_exact(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal float32 values that float16 holds exactly, so that the file stays small."""
    return (rng.standard_normal(shape) * scale).astype(np.float16).astype(np.float32)


def edges(rng: np.random.Generator) -> np.ndarray:
    """float32 [8, 128]: one kind of edge a row."""
    weight = half_exact(rng, (8, 128), 1.0)
    weight[0] *= np.float32(2.0**100)
    weight[1] *= np.float32(2.0**-100)
    weight[2] = 0.0
    weight[3] = np.where(np.arange(128) % 2 == 0, np.float32(-0.0), np.float32(0.0))
    weight[3, 77] = np.float32(-0.5)
    for row, table in ((4, definition.NF4_TABLE), (5, definition.FP4_TABLE)):
        ascending = np.sort(table)
        midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2)
        up, down = np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))
        values = np.concatenate([midpoints, up, down, ascending])  # 61 values; absmax 1 in every block of 64
        weight[row] = np.concatenate([values, [1, -1, 0], values[::-1], [1, -1, 0]])
    weight[6] = np.float32(0.1)  # constant: every scaled value is 1, or just beside it by the reciprocal
    return weight


def denormals(rng: np.random.Generator) -> np.ndarray:
    """float32 [2, 64]: absmax below 1e-38 in the first row, just above it in the second."""
    weight = half_exact(rng, (2, 64), 1.0)
    return (weight / np.abs(weight).max(axis=1, keepdims=True) * np.array([[3e-39], [2e-38]])).astype(np.float32)


def cases() -> dict[str, np.ndarray]:
    """Name -> weight float32 [O, I]."""
    rng = np.random.default_rng(20230523)
    zero_block = half_exact(rng, (64, 64), 0.02)
    zero_block[5] = 0.0
    zero_block[6, ::3] = -0.0
    zero_block[9] *= 64
    ragged_zero = half_exact(rng, (33, 7), 0.02)
    ragged_zero.reshape(-1)[192:] = 0.0  # the ragged last block of 64 (and of 32) is all zero
    rows = rng.lognormal(0.0, 1.0, (96, 1))
    return {
        "square_64x64": zero_block,
        # 258 blocks of 64: two nested blocks
        "wide_96x172": (half_exact(rng, (96, 172), 0.05) * rows).astype(np.float16).astype(np.float32),
        "odd_33x7": half_exact(rng, (33, 7), 0.02),
        "odd_zero_tail_33x7": ragged_zero,
        "ragged_128x65": half_exact(rng, (128, 65), 0.02),
        "one_1x1": np.array([[-0.25]], np.float32),
        "edges_8x128": edges(rng),
        "denormals_2x64": denormals(rng),
    }


def main() -> None:
    torch.set_num_threads(1)
    code_map = definition.dynamic_map()
    arrays: dict[str, np.ndarray] = {"dynamic_map": code_map}
    digests: dict[str, str] = {}
    notes: dict[str, dict] = {}
    for name in FORMATS:
        arrays[f"table/{name}"] = bnb.get_4bit_type(name, "cpu").numpy()
        assert np.array_equal(arrays[f"table/{name}"], definition.TABLES[name])
    for case, weight in cases().items():
        arrays[f"{case}/weight"] = weight
        for name in FORMATS:
            for block_size in BLOCK_SIZES if weight.size < LARGE else LARGE_BLOCK_SIZES:
                key = f"{case}/{name}/{block_size}"
                packed, state = bnb.quantize_4bit(torch.from_numpy(weight), blocksize=block_size, quant_type=name)
                absmax = state.absmax.numpy()
                own_packed, own_absmax = definition.quantize(weight, name, block_size)
                assert np.array_equal(packed.numpy(), own_packed) and np.array_equal(absmax, own_absmax), key
                _, nested = bnb.quantize_4bit(
                    torch.from_numpy(weight), blocksize=block_size, quant_type=name, compress_statistics=True
                )
                offset, codes_bnb = nested.offset.numpy(), nested.absmax.numpy()
                assert np.array_equal(nested.state2.code.numpy(), code_map)
                centred = absmax - offset
                codes, nested_absmax = definition.nearest_codes(centred, code_map)
                assert np.array_equal(nested_absmax, nested.state2.absmax.numpy()), key
                arrays |= {
                    f"{key}/packed": packed.numpy().reshape(-1),
                    f"{key}/absmax": absmax,
                    f"{key}/offset": offset,
                    f"{key}/codes8": codes,
                    f"{key}/codes8_bnb": codes_bnb,
                    f"{key}/nested_absmax": nested_absmax,
                }
                notes[key] = {
                    "codes8": int(codes.size),
                    "codes8_unlike_bnb": int((codes != codes_bnb).sum()),
                    "codes8_largest_difference": int(np.abs(codes.astype(int) - codes_bnb.astype(int)).max()),
                    "offset_is_exact_mean_rounded": bool(offset == np.float32(absmax.astype(np.float64).mean())),
                    "midpoint_search_gives_same_codes8": bool(np.array_equal(codes, by_midpoints(centred, code_map))),
                    "division_gives_same_codes8": bool(np.array_equal(codes, by_division(centred, code_map))),
                }
                scales = {
                    "plain": absmax,
                    "double": definition.nested_absmax_values(codes, nested_absmax, code_map, offset),
                }
                stored = weight.size < STORED_BELOW and block_size in STORED_BLOCK_SIZES
                for kind, scale in scales.items():
                    values = definition.dequantize(own_packed, scale, definition.TABLES[name], block_size, weight.shape)
                    outputs = {
                        "float32": values,
                        "float16": definition.rounded(values, torch.float16),
                        "bfloat16": definition.rounded(values, torch.bfloat16),
                    }
                    for dtype, output in outputs.items():
                        digests[f"{key}/{kind}/{dtype}"] = hashlib.sha256(np.ascontiguousarray(output)).hexdigest()[:16]
                        if stored:
                            arrays[f"{key}/{kind}/{dtype}"] = output
    np.savez_compressed(HERE / "quant.npz", **arrays)  # type: ignore[arg-type]
    (HERE / "quant.json").write_text(json.dumps({"sha256": digests, "notes": notes}, indent=0, sort_keys=True) + "\n")


def by_midpoints(values: np.ndarray, code_map: np.ndarray) -> np.ndarray:
    """The 8-bit codes by counting float32 midpoints strictly below the scaled value."""
    midpoints = (code_map[:-1] + code_map[1:]) * np.float32(0.5)
    codes = np.zeros(values.size, np.uint8)
    for start in range(0, values.size, definition.NESTED_BLOCK):
        block = values[start : start + definition.NESTED_BLOCK]
        scale = np.abs(block).max()
        if scale > 0:
            scaled = block * (np.float32(1) / scale)
            codes[start : start + block.size] = np.searchsorted(midpoints, scaled, side="left")
    return codes


def by_division(values: np.ndarray, code_map: np.ndarray) -> np.ndarray:
    """The nearest 8-bit codes had the values been divided by the nested absmax, to see whether the rule shows."""
    codes = np.zeros(values.size, np.uint8)
    for start in range(0, values.size, definition.NESTED_BLOCK):
        block = values[start : start + definition.NESTED_BLOCK]
        scale = np.abs(block).max()
        if scale > 0:
            scaled = (block / scale).astype(np.float64)
            codes[start : start + block.size] = np.abs(scaled[:, None] - code_map[None].astype(np.float64)).argmin(1)
    return codes


if __name__ == "__main__":
    main()
