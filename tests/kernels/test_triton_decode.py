"""The decoding assembly, run as text on numpy arrays."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

from pallas_kernels.nf4_matmul.triton.decode import ASSEMBLY, CONSTRAINTS, table_words  # noqa: E402
from tests.kernels import ptx  # noqa: E402

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_every_pattern_of_16_bits_is_looked_up_for_any_table(dtype, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=16).astype(np.float32) * 10.0 ** rng.integers(-3, 3, 16)
    patterns = np.arange(2**16, dtype=np.uint32)
    words = patterns | (rng.permutation(patterns) << np.uint32(16))
    table_registers = [word for word in table_words(table, dtype) for _ in range(4)]

    outputs = ptx.run(ASSEMBLY.value, [words, *table_registers], outputs=4)

    assert CONSTRAINTS.value.split(",") == ["=r"] * 4 + ["r"] * (1 + len(table_registers))
    found = np.stack(outputs, axis=-1).view(np.uint16).reshape(-1, 2, 4)  # [word, low or high nibbles, byte]
    codes = words[:, None].view(np.uint8).reshape(-1, 4)
    expected = table.astype(DTYPES[dtype]).view(np.uint16)[np.stack([codes & 0xF, codes >> 4], axis=1)]
    np.testing.assert_array_equal(found, expected)


def test_table_of_a_wrong_length_is_refused():
    with pytest.raises(ValueError, match="16 values, found 15"):
        table_words([0.0] * 15, "bfloat16")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0x3210, 0x44332211),
        (0x7654, 0x88F76655),
        (0x0F8E, 0x11FF00FF),  # from the right: signs of bytes 6 (0xf7), 0 (0x11) and 7 (0x88), then byte 0
    ],
)
def test_the_emulated_permute_follows_the_manual(selector, expected):
    inputs = [np.uint32(0x44332211), np.uint32(0x88F76655), np.uint32(selector)]
    assert int(ptx.run("prmt.b32 $0, $1, $2, $3;", inputs, outputs=1)[0]) == expected
