"""The header of a safetensors file: where each tensor lies. Checked before any tensor is read.

A file is 8 bytes (uint64, little-endian: length of the header), the header, JSON {name: {dtype, shape, data_offsets}},
and the data, to which the offsets are relative. Source: huggingface/safetensors, README, "Format". `__metadata__` among
the names is a map of texts; ours has the tensors' checksums (qlora_jax/checksums.py).
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax import checksums

# those that models are stored in
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I8": "int8"}
_NAMES = {name: code for code, name in DTYPES.items()}
_OTHER_BITS = {"F64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "BOOL": 8}
_LARGEST = 100_000_000  # bytes; the format's own limit
_LARGEST_FILE = 2**62  # bytes, which any system can count
_MOST_AXES = 32  # of a tensor; models have 5


class Place(NamedTuple):
    """A tensor in its file."""

    dtype: str  # numpy's name; the format's own for a dtype that no model is stored in
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int
    checksum: str = ""  # that the file states of it (qlora_jax/checksums.py); "" is none


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_header(read: Callable[[int, np.ndarray], None]) -> dict[str, Place]:
    """The places of a file's tensors.

    Args:
      read: puts the file's bytes from a place on into a uint8 array; raises ValueError where the file is shorter.
    Raises:
      ValueError: no safetensors file, or one that ends before its tensors do. Says what is wrong, not where.
    """

    def content(start: int, stop: int) -> bytes:
        out = np.empty(stop - start, np.uint8)
        read(start, out)
        return out.tobytes()

    length = int.from_bytes(content(0, 8), "little")
    if not 2 <= length <= _LARGEST:
        raise ValueError(f"its header would have {length:,} bytes")
    text = content(8, 8 + length)
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        sums = checksums.from_metadata(entries.pop("__metadata__", None))
        places = {name: _place(entry, 8 + length, sums.get(name, "")) for name, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its header is not the JSON of a safetensors file") from error
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end or place.stop < place.start:
            raise ValueError(f"the bytes of {name} do not begin where those before it end")
        end = place.stop
        bits = _OTHER_BITS.get(place.dtype) or (place.dtype in _NAMES and 8 * numpy_dtype(place.dtype).itemsize)
        if bits and 8 * (place.stop - place.start) != bits * math.prod(place.shape):
            raise ValueError(f"{name} has {place.stop - place.start} bytes, not those of {place.dtype} {place.shape}")
    if end > _LARGEST_FILE:
        raise ValueError(f"it would have {end:,} bytes")
    if end > 8 + length:
        content(end - 1, end)
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(name for name in found if names.count(name) > 1)} twice")
    return found


def _place(entry: Mapping, begin: int, checksum: str) -> Place:
    start, stop = entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*entry["shape"], start, stop)):
        raise TypeError("sizes are natural numbers")
    if len(entry["shape"]) > _MOST_AXES or math.prod(max(1, size) for size in entry["shape"]) > _LARGEST_FILE:
        raise TypeError("no array has such a shape")
    dtype = DTYPES.get(entry["dtype"], entry["dtype"])
    return Place(dtype, tuple(entry["shape"]), begin + start, begin + stop, checksum)


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], sums: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Place]]:
    """The first bytes of a file of these tensors, name -> (dtype, shape), and their places: one after the other.

    `sums`: checksums by name; the header is as long whatever they are.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | (checksums.as_metadata(sums) if sums else {})}
    places, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * numpy_dtype(dtype).itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = (dtype, shape, start, end)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: Place(d, shape, begin + a, begin + b) for n, (d, shape, a, b) in places.items()}
