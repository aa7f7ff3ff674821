"""QuantizedTensor: a frozen 4-bit weight as a pytree, and the functions that make, read and multiply it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nf4_matmul
from qlora_jax.errors import InputError
from qlora_jax.finite import check_finite
from qlora_jax.quant.blockwise import quantize_packed
from qlora_jax.quant.codebooks import CODEBOOKS, codebook, scale_map

_LARGEST = 2.0**126  # 1 / x of anything larger is subnormal, which XLA takes for zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [O, I] in packed 4-bit form. Layers stacked for a scan have a leading L on every array, not in `shape`.

    codes: uint8 [ceil(O * I / 2)], halves side by side (layout: pallas_kernels/nf4_matmul/reference.py).
    absmax: float32 [C'], or uint8 [C'] with double quantization; C' = ceil(O * I / block_size).
    nested_absmax: float32 [ceil(C' / 256)], offset: float32 []; both None without double quantization.
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    offset: jax.Array | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(default="xla", metadata={"static": True})  # of matmul: nf4_matmul.BACKENDS

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def packed(self) -> nf4_matmul.Packed:
        return nf4_matmul.Packed(self.codes, self.absmax, self.nested_absmax, self.offset)

    @property
    def codec(self) -> nf4_matmul.Codec:
        table = codebook(self.format).values
        return nf4_matmul.Codec(self.shape, self.block_size, table, scale_map(self.format), self.backend)

    @property
    def nbytes(self) -> int:
        """Bytes really stored, scales included (all stacked layers together)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Bits a weight, scales included: 4.5 at block size 64, 4.127 with double quantization."""
        layers = math.prod(self.codes.shape[:-1])
        return 8 * self.nbytes / (layers * math.prod(self.shape))


def check_block_size(block_size: int) -> None:
    """Raises InputError unless block_size is a power of two from 32 to 4096."""
    if block_size not in [2**k for k in range(5, 13)]:
        raise InputError(f"block_size is {block_size}; expected a power of two from 32 to 4096")


def quantize(
    w: jax.Array, format: str = "nf4", block_size: int = 64, double_quant: bool = True, name: str = "the weight"
) -> QuantizedTensor:
    """Quantizes w blockwise to 4 bits (QLoRA, section 3), bit-exact with bitsandbytes' CPU path.

    Args:
      w: [O, I], any float dtype. Blocks run over the flattened values and may cross rows; the last may be short.
      format: "nf4", "fp4" or "int4".
      block_size: values that share one scale; a power of two from 32 to 4096.
      double_quant: store the scales in 8 bits.
      name: what errors call the tensor.
    Returns:
      QuantizedTensor of shape [O, I].
    Raises:
      InputError: w is not two-dimensional or empty; it holds NaN or inf, or values beyond 2^126 or whose scales'
        mean overflows; the format or block size is unknown. (While tracing there are no values to check: there a block
        with NaN or inf dequantizes to values that are not finite, and with double quantization every block does.)
    """
    check_block_size(block_size)
    book = codebook(format)
    if format not in CODEBOOKS:
        raise InputError(f"{name}: nothing is quantized to {format}, which is read from files that have it")
    if w.ndim != 2 or w.size == 0:
        raise InputError(f"{name} has shape {list(w.shape)}; 4-bit quantization takes a non-empty [out, in] matrix")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"{name} has dtype {w.dtype}; 4-bit quantization takes a floating-point weight")
    packed, check = quantize_packed(w, book, block_size, double_quant)
    if not isinstance(check, jax.core.Tracer) and not float(check) <= _LARGEST:
        check_finite(np.asarray(w), name, "a frozen weight must be finite")
        largest = float(jnp.max(jnp.abs(w)))
        raise InputError(f"{name} has values of up to {largest:.3g}, too large to be scaled in float32: no weight is")
    return QuantizedTensor(
        packed.codes,
        packed.absmax,
        packed.nested_absmax,
        packed.offset,
        shape=(w.shape[0], w.shape[1]),
        format=format,
        block_size=block_size,
    )


def dequantize(q: QuantizedTensor, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """W [O, I]: value of each code times its scale in float32, rounded once to dtype."""
    return nf4_matmul.dequantize(q.packed, q.codec, jnp.dtype(dtype))


def matmul(x: jax.Array, q: QuantizedTensor) -> jax.Array:
    """y = x W^T: x [..., I] -> [..., O] in x's dtype, accumulated in float32. Differentiable in x; q gets no gradient.

    What the backward pass keeps is q itself, never a 16-bit W. Raises ValueError when x's last dimension is not I.
    """
    return nf4_matmul.matmul(x, q.packed, q.codec)


def matmul_joined(x: jax.Array, weights: Sequence[QuantizedTensor]) -> jax.Array:
    """What several weights [O_k, I] make of one x [..., I], side by side: [..., sum of O_k]; otherwise as matmul."""
    return nf4_matmul.matmul_joined(x, tuple(q.packed for q in weights), tuple(q.codec for q in weights))


def matmul_adapted(x: jax.Array, dropped: jax.Array, weights: Sequence[QuantizedTensor], a, b, scale) -> jax.Array:
    """matmul_joined with adapters beside the weights: see pallas_kernels.nf4_matmul.matmul_adapted."""
    packed, codecs = tuple(q.packed for q in weights), tuple(q.codec for q in weights)
    return nf4_matmul.matmul_adapted(x, dropped, packed, codecs, tuple(a), tuple(b), tuple(scale))
