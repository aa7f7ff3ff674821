"""What loading takes, from the sizes in config.json alone: bytes of host and device while `load_model` runs.

Upper bounds that follow how load.py, place.py and folder.py work. Not in them: the interpreter, the programs, and what
the device's allocator loses to rounding.
"""

import math

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.folder import PIECE_BYTES, PIECES_ALIVE, cut
from qlora_jax.io.load import QuantSpec, abstract_weight, expected_stacks
from qlora_jax.models.config import ModelConfig
from qlora_jax.quant import native
from qlora_jax.quant.tensor import temporary_bytes

FORMS = ("unquantized", "native", "bnb")
_STAGED = 1  # pieces that the runtime copies into pinned memory on their way to a GPU
_UNPACKING = 2.5  # bytes a weight at most while bitsandbytes' order becomes ours, on the host


def load_host_peak_bytes(
    config: ModelConfig, form: str = "unquantized", itemsize: int = 2, remote: bool = False
) -> int:
    """Host memory that loading takes at most: a few pieces of a tensor.

    Args:
      config: sizes.
      form: of the folder, one of FORMS; for "bnb" a whole weight is unpacked on the host.
      itemsize: bytes a value of its unquantized tensors.
      remote: whether it lies in an object store.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} of a folder; expected one of {', '.join(FORMS)}")
    unpacking = math.ceil(_UNPACKING * max(map(math.prod, _linears(config)))) if form == "bnb" else 0
    return max((PIECES_ALIVE + _STAGED + remote) * _piece(config, form, itemsize), unpacking)  # answers of a store: one


def model_bytes(config: ModelConfig, quant: QuantSpec, itemsize: int = 2) -> int:
    """The loaded model. itemsize: bytes a value that is not quantized is kept in, but for norms: they are float32."""
    total = 0
    for slot, (_, shape) in config.outer.items():
        total += math.prod(shape) * (4 if config.is_float32(slot) else itemsize)
    for name, shape in config.vectors.items():
        total += config.depth(name) * math.prod(shape) * (itemsize if name in config.sixteen_bit else 4)
    total += sum(
        itemsize * config.weights(name) for name in config.linears if abstract_weight(config, name, quant) is None
    )
    stacks = expected_stacks(config, quant).values()
    return total + sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stacks)


def load_device_peak_bytes(
    config: ModelConfig, quant: QuantSpec, form: str = "unquantized", itemsize: int = 2, kept_itemsize: int = 2
) -> int:
    """Device memory at the peak of loading: the model, one tensor, and what quantizing it takes.

    Args:
      config: sizes.
      quant: how linear layers are kept.
      form: of the folder, one of FORMS.
      itemsize: bytes a value of the folder's unquantized tensors.
      kept_itemsize: bytes a value that is not quantized is kept in.
    """
    arriving = 2 * _piece(config, form, itemsize)  # one that is written to its place, one on its way
    shape = max(_linears(config), key=math.prod)
    n = math.prod(shape)
    if quant.format == "none":
        transient = n * kept_itemsize + arriving
    elif form == "native":
        transient = arriving
    else:
        packed = native.abstract(shape, quant.format, quant.block_size, quant.double_quant).nbytes
        working = packed + temporary_bytes(n, quant.format, quant.block_size)
        transient = packed if form == "bnb" else n * itemsize + max(arriving, working)
    return model_bytes(config, quant, kept_itemsize) + transient


def _linears(config: ModelConfig) -> list[tuple[int, ...]]:
    return list(config.linears.values())


def _piece(config: ModelConfig, form: str, itemsize: int) -> int:
    """Bytes of the largest piece that is read at once."""
    arrays: list[tuple[tuple[int, ...], int]] = [((config.V, config.D), itemsize)]
    if form == "unquantized":
        arrays += [(shape, itemsize) for shape in _linears(config)]
    if form == "native":
        largest = max(map(math.prod, _linears(config)))
        arrays += [((config.L, largest), 1)]  # at most: 4 bits take half; of experts too, for a piece has an end
    return max(math.prod(cut(shape, size, PIECE_BYTES)[0][1]) * size for shape, size in arrays)
