"""Weights that an adapter's initialisation took something out of, made again from the whole ones.

An adapter that starts as a part of the base trains beside the rest of it:

    PiSSA   W_res = W - U_R S_R V_R^T             the R largest singular directions
    OLoRA   W_res = W - scale * Q_R (Q_R^T W)     Q_R: Q of the first R columns, W = QR

Its folder holds A and B alone; peft makes W_res again whenever it loads one, and so does this. Here sums are in
float64, so the part is that of an exact decomposition; peft's, in float32, differs in its last digits. A 4-bit W is
dequantized for OLoRA and what is left is quantized again, as it was. peft refuses PiSSA there.
Sources: Meng et al., 2024; Büyükakyüz, 2024; peft's LoraLayer.pissa_init and olora_init.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.quant.tensor import QuantizedTensor, dequantize, quantize

PISSA, OLORA = "pissa", "olora"
_float32_values = jax.jit(partial(dequantize, dtype=jnp.float32))


def check_base(init: str, quantized: bool) -> None:
    """Raises InputError where peft makes no residual of such a base. `init`: "", PISSA or OLORA."""
    if init == PISSA and quantized:
        raise InputError(
            'the adapter has init_lora_weights "pissa", which peft takes out of 16- or 32-bit weights alone, but the '
            "base is quantized: keep it unquantized (--quant=none, quant.format=none), or merge the two first "
            "(experiments.export --merge --quant=none)"
        )


def residual(w: Any, init: str, rank: int, scale: float, name: str) -> Any:
    """What is left of W once the initialisation has taken its part.

    Args:
      w: [O, I], a float array (numpy or JAX), or a QuantizedTensor.
      init: PISSA or OLORA.
      rank, scale: R and the factor of B A.
      name: what errors call the weight.
    Returns:
      W_res as w is: a numpy array of its dtype, or a QuantizedTensor of its format.
    Raises:
      InputError: PiSSA of a 4-bit weight, R above the weight's own rank, or a weight with NaN or inf.
    """
    check_base(init, isinstance(w, QuantizedTensor))
    if isinstance(w, QuantizedTensor):
        left = residual(_float32_values(w), init, rank, scale, name)
        again = quantize(jnp.asarray(left), w.format, w.block_size, w.double_quant, name=name)
        return dataclasses.replace(again, backend=w.backend)
    if rank > min(w.shape):
        raise InputError(f"{name} is {list(w.shape)}: {init} cannot take {rank} directions out of it")
    values = np.asarray(w).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or inf; a frozen weight must be finite")
    values -= _singular_part(values, rank) if init == PISSA else scale * _first_columns_part(values, rank)
    return values.astype(w.dtype)


def _singular_part(w: np.ndarray, rank: int) -> np.ndarray:
    """U_R S_R V_R^T of float64 W [O, I]: its projection on the largest eigenvectors of the smaller of W W^T, W^T W."""
    from scipy.linalg import eigh  # 0.3 s of importing, which who has another initialisation does without

    O, I = w.shape
    gram = w @ w.T if O <= I else w.T @ w
    vectors = eigh(gram, subset_by_index=(len(gram) - rank, len(gram) - 1), overwrite_a=True, check_finite=False)[1]
    return vectors @ (vectors.T @ w) if O <= I else (w @ vectors) @ vectors.T


def _first_columns_part(w: np.ndarray, rank: int) -> np.ndarray:
    """Q_R R_R of float64 W [O, I] = QR: the first R reflections of a QR depend on the first R columns alone."""
    q = np.linalg.qr(w[:, :rank])[0]
    return q @ (q.T @ w)
