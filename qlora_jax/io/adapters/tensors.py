"""The tensors of a PEFT folder, by the keys that io/peft gives them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.finite import check_finite
from qlora_jax.io import header
from qlora_jax.io.peft_config import CONFIG
from qlora_jax.io.source import LocalSource
from qlora_jax.models.kind import Kind
from qlora_jax.models.roberta.names import head_shapes

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"  # what peft before 0.6 wrote
_FLOATS = ("float32", "float16", "bfloat16")
_MOST_SHOWN = 8  # problems in one message


def matrix_keys(kind: Kind) -> dict[str, str]:
    """{"embed_tokens": key, "lm_head": key} of what may train whole."""
    return {"embed_tokens": f"{PREFIX}{kind.embedding}.weight", "lm_head": f"{PREFIX}{kind.head}.weight"}


def head_keys(kind: Kind) -> dict[str, str]:
    """{"dense.weight": key, ...} of an encoder's head; {} of a decoder."""
    if kind.bidirectional is None:
        return {}
    begin = f"{kind.bidirectional.head}."
    return {key.removeprefix(begin): PREFIX + key for key in head_shapes(kind.bidirectional, 0, 0)}


class Tensors:
    """The tensors of a PEFT folder, by the keys that `write_arrays` gives them.

    Raises InputError when the file is missing, a pickle or damaged, or holds a tensor twice.
    """

    def __init__(self, folder: Path, kind: Kind):
        self._matrices, self._head = matrix_keys(kind), head_keys(kind)
        self.path, self._source = folder / WEIGHTS, LocalSource(folder)
        if not self._source.exists(WEIGHTS):
            pickle = (
                f"; {_PICKLE} is a pickle, which is never opened: load it in peft and save it again "
                "(save_pretrained writes safetensors)"
            )
            hint = pickle if self._source.exists(_PICKLE) else ""
            raise InputError(f"{folder} holds no {WEIGHTS}{hint}")
        try:
            places = header.read_header(partial(self._source.read, WEIGHTS))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path} is damaged or cut short: {error}") from error
        self._given: dict[str, np.ndarray] = {}
        self._places: dict[str, header.Place] = {}
        for name, place in places.items():
            key = name.replace(".default.weight", ".weight")  # with the adapter's name, as a state_dict has it
            if key in self._places:
                raise InputError(f"{self.path} holds {key} twice, with and without the adapter's name (default)")
            self._places[key] = place

    def keys(self) -> list[str]:
        return list(self._places)

    def matrix_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._places[key].shape for name, key in self._matrices.items() if key in self._places}

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """As matrix_shapes, of an encoder's head."""
        return {name: self._places[key].shape for name, key in self._head.items() if key in self._places}

    def take(self, wanted: Mapping[str, tuple[int, ...]]) -> list[np.ndarray]:
        """These tensors, which are then no longer there. Raises InputError where one is missing or misshapen."""
        taken = {}
        for key, shape in wanted.items():
            if key not in self._places or self._places[key].shape != shape:
                found = f"is {list(self._places[key].shape)}" if key in self._places else "is missing"
                raise InputError(
                    f"{self.path} does not fit the base model and {CONFIG}: {key} {found}, expected {list(shape)}"
                )
            taken[key] = self.read(key).astype(np.float32)
        for key in wanted:
            del self._places[key]
        return list(taken.values())

    def give(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Makes arrays tensors of this folder."""
        self._given |= arrays

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless the LoRA tensors are exactly these shapes."""
        problems = []
        for key, shape in wanted.items():
            if key in self._given:
                continue
            if key not in self._places:
                problems.append(f"missing {key}")
            elif self._places[key].shape != shape:
                problems.append(f"{key} is {list(self._places[key].shape)}, expected {list(shape)}")
        others = sorted(self._places.keys() - wanted.keys() - {*self._matrices.values(), *self._head.values()})
        problems += [f"unexpected {key}" for key in others]
        if problems:
            shown, more = "; ".join(problems[:_MOST_SHOWN]), len(problems) - _MOST_SHOWN
            shown += f"; and {more} more" if more > 0 else ""
            raise InputError(f"{self.path} does not fit the base model and {CONFIG}: {shown}")

    def read(self, key: str) -> np.ndarray:
        """A tensor in its own dtype. Raises InputError unless it holds finite floating-point numbers."""
        if key in self._given:
            return self._given[key]
        place = self._places[key]
        if place.dtype not in _FLOATS:
            raise InputError(f"{self.path}: {key} is {place.dtype}; expected one of {', '.join(_FLOATS)}")
        array = np.empty(place.shape, header.numpy_dtype(place.dtype))
        try:
            self._source.read(WEIGHTS, place.start, array.reshape(-1).view(np.uint8))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path}: {key} cannot be read: {error}") from error
        checksums.refuse_other(place.checksum, checksums.of_array(array), key, str(self.path))
        check_finite(array, f"{self.path}: {key}", "nothing is computed from it; train it again, or ask who did")
        return array
