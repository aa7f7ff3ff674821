"""QuantizedTensor: a frozen 4- or 8-bit weight as a pytree, and the functions that make, read and multiply it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import int8_matmul, nf4_matmul
from qlora_jax.errors import InputError
from qlora_jax.finite import check_finite
from qlora_jax.quant import blockwise, int8
from qlora_jax.quant.codebooks import CODEBOOKS, KNOWN, codebook, scale_map

FORMATS = (*CODEBOOKS, int8.FORMAT)  # what weights are quantized to
_LARGEST = 2.0**126  # 1 / x of anything larger is subnormal, which XLA takes for zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [O, I] in packed form. Layers stacked for a scan have a leading L on every array, not in `shape`.

    codes: uint8 [ceil(O * I / 2)], halves side by side (layout: pallas_kernels/nf4_matmul/reference.py).
    absmax: float32 [C'], or uint8 [C'] with double quantization; C' = ceil(O * I / block_size).
    nested_absmax: float32 [ceil(C' / 256)], offset: float32 []; both None without double quantization.

    In format "int8" codes: int8 [O, I], absmax: float32 [O], block_size 0: a row is the block (quant/int8.py).
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    offset: jax.Array | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(default="xla", metadata={"static": True})  # of matmul: nf4_matmul.BACKENDS
    threshold: float = dataclasses.field(default=int8.THRESHOLD, metadata={"static": True})  # of int8's activations

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def in_8_bits(self) -> bool:
        return self.format == int8.FORMAT

    @property
    def packed(self) -> nf4_matmul.Packed:
        """Of a 4-bit weight, as is codec."""
        return nf4_matmul.Packed(self.codes, self.absmax, self.nested_absmax, self.offset)

    @property
    def codec(self) -> nf4_matmul.Codec:
        table = codebook(self.format).values
        return nf4_matmul.Codec(self.shape, self.block_size, table, scale_map(self.format), self.backend)

    @property
    def packed_8bit(self) -> int8_matmul.Packed:
        return int8_matmul.Packed(self.codes, self.absmax)

    @property
    def nbytes(self) -> int:
        """Bytes really stored, scales included (all stacked layers together)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Bits a weight, scales included: 4.5 at block size 64, 4.127 with double quantization, int8 8 and 32 / I."""
        layers = math.prod(self.codes.shape[: -2 if self.in_8_bits else -1])
        return 8 * self.nbytes / (layers * math.prod(self.shape))


def check_block_size(block_size: int) -> None:
    """Raises InputError unless block_size is a power of two from 32 to 4096."""
    if block_size not in [2**k for k in range(5, 13)]:
        raise InputError(f"block_size is {block_size}; expected a power of two from 32 to 4096")


def check_format(format: str) -> None:
    """Raises InputError for a format that no QuantizedTensor has."""
    if format != int8.FORMAT and format not in KNOWN:
        raise InputError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")


def check_kernel(format: str, kernel: str) -> None:
    """Raises InputError for a way to multiply that weights of a format do not have."""
    if format == int8.FORMAT and kernel not in ("auto", "xla"):
        raise InputError(f"kernel {kernel!r} is for 4-bit weights; int8 ones have XLA's product alone: xla, or auto")


def quantize(
    w: jax.Array, format: str = "nf4", block_size: int = 64, double_quant: bool = True, name: str = "the weight"
) -> QuantizedTensor:
    """Quantizes w blockwise to 4 bits (QLoRA, section 3) or by rows to 8, bit-exact with bitsandbytes' CPU path.

    Args:
      w: [O, I], any float dtype. Blocks run over the flattened values and may cross rows; the last may be short.
      format: one of FORMATS.
      block_size: values that share one scale; a power of two from 32 to 4096. int8 has a scale a row: it reads neither
        this nor double_quant.
      double_quant: store the scales in 8 bits.
      name: what errors call the tensor.
    Returns:
      QuantizedTensor of shape [O, I].
    Raises:
      InputError: w is not two-dimensional or empty; it holds NaN or inf, or values beyond 2^126 or whose scales'
        mean overflows (int8: beyond float16's); the format or block size is unknown. (While tracing there are no values
        to check: there a block with NaN or inf dequantizes to values that are not finite, and with double quantization
        every block does.)
    """
    if w.ndim != 2 or w.size == 0:
        raise InputError(f"{name} has shape {list(w.shape)}; quantization takes a non-empty [out, in] matrix")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"{name} has dtype {w.dtype}; quantization takes a floating-point weight")
    if format == int8.FORMAT:
        rows, check = int8.quantize_packed(w)
        _check_largest(w, check, int8.largest(), name, "for float16, in which int8 takes weights")
        return in_8_bits(rows)
    check_format(format)
    check_block_size(block_size)
    if format not in CODEBOOKS:
        raise InputError(f"{name}: nothing is quantized to {format}, which is read from files that have it")
    packed, check = blockwise.quantize_packed(w, codebook(format), block_size, double_quant)
    _check_largest(w, check, _LARGEST, name, "to be scaled in float32: no weight is")
    return QuantizedTensor(
        packed.codes,
        packed.absmax,
        packed.nested_absmax,
        packed.offset,
        shape=(w.shape[0], w.shape[1]),
        format=format,
        block_size=block_size,
    )


def in_8_bits(packed: int8_matmul.Packed, threshold: float = int8.THRESHOLD) -> QuantizedTensor:
    """A weight of its codes int8 [O, I] and scales float32 [O]."""
    O, I = packed.codes.shape
    return QuantizedTensor(
        packed.codes,
        packed.absmax,
        None,
        None,
        shape=(O, I),
        format=int8.FORMAT,
        block_size=0,
        threshold=threshold,
    )


def _check_largest(w: jax.Array, check: jax.Array, largest: float, name: str, what_for: str) -> None:
    """Raises InputError where `check`, which is not traced, is above what a format holds, or is NaN."""
    if isinstance(check, jax.core.Tracer) or float(check) <= largest:
        return
    check_finite(np.asarray(w), name, "a frozen weight must be finite")
    raise InputError(f"{name} has values of up to {float(jnp.max(jnp.abs(w))):.3g}, too large {what_for}")


def temporary_bytes(n: int, format: str, block_size: int) -> int:
    """Device memory that `quantize` takes at most beside the n values and its result."""
    return int8.temporary_bytes(n) if format == int8.FORMAT else blockwise.temporary_bytes(n, block_size)


def dequantize(q: QuantizedTensor, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """W [O, I]: value of each code times its scale in float32, rounded once to dtype."""
    if q.in_8_bits:
        return int8_matmul.dequantize(*q.packed_8bit, jnp.dtype(dtype))
    return nf4_matmul.dequantize(q.packed, q.codec, jnp.dtype(dtype))


def matmul(x: jax.Array, q: QuantizedTensor) -> jax.Array:
    """y = x W^T: x [..., I] -> [..., O] in x's dtype, accumulated in float32. Differentiable in x; q gets no gradient.

    What the backward pass keeps is q itself, never a 16-bit W. An int8 weight's product takes x in 8 bits, but for
    columns with outliers (pallas_kernels/int8_matmul). Raises ValueError when x's last dimension is not I.
    """
    return matmul_joined(x, [q])


def matmul_joined(x: jax.Array, weights: Sequence[QuantizedTensor]) -> jax.Array:
    """What several weights [O_k, I], all of 4 bits or of 8, make of one x: [..., sum of O_k]; otherwise as matmul."""
    if weights[0].in_8_bits:
        return int8_matmul.matmul_joined(x, tuple(q.packed_8bit for q in weights), weights[0].threshold)
    return nf4_matmul.matmul_joined(x, tuple(q.packed for q in weights), tuple(q.codec for q in weights))


def matmul_adapted(x: jax.Array, dropped: jax.Array, weights: Sequence[QuantizedTensor], a, b, scale) -> jax.Array:
    """matmul_joined with adapters beside the weights: see pallas_kernels.nf4_matmul.matmul_adapted.

    Beside weights in 8 bits there is no room for adapters in 16: they are products of their own.
    """
    if weights[0].in_8_bits:
        return matmul_joined(x, weights) + nf4_matmul.low_rank_terms(dropped, tuple(a), tuple(b), tuple(scale))
    packed, codecs = tuple(q.packed for q in weights), tuple(q.codec for q in weights)
    return nf4_matmul.matmul_adapted(x, dropped, packed, codecs, tuple(a), tuple(b), tuple(scale))
