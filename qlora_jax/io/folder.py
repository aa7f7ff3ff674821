"""A Hugging Face checkpoint folder: here, in an object store or fetched by hub name; tensors read piece by piece."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax import checksums
from qlora_jax.embedded import MODELS, located
from qlora_jax.errors import InputError
from qlora_jax.finite import check_finite
from qlora_jax.io import remote
from qlora_jax.io.header import DTYPES, Place, numpy_dtype, read_header
from qlora_jax.io.remote import name_of
from qlora_jax.models.config import read_json

PIECE_BYTES = 32 * 2**20  # of a tensor that is read at a time
PIECES_ALIVE = 2  # one in use, one read ahead
# the first that a folder has is its tokenizer; spiece.model is what T5 calls the second, merges.txt stands beside
# vocab.json
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "merges.txt")
# what goes along with the weights: settings and vocabularies, never code
COMPANIONS = (
    "generation_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
)
_ALIGNMENT = 64
_SCALES = (".absmax", ".nested_absmax", ".offset")  # of quantized weights, as bitsandbytes and quant/native name them
_MEND = "no model is computed from it; download or write the file again, or ask who made it"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

_SHARD = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}\.safetensors")  # a file of the folder itself
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# never pickles, never code
_HUB_FILES = ["*.json", "chat_template.jinja", "*.safetensors", "tokenizer.model", "spiece.model", "merges.txt"]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has one: one of its files, or a class that needs none (ByT5's)."""
    return any((folder / name).is_file() for name in TOKENIZERS) or is_of_bytes(folder)


def is_of_bytes(folder: Path) -> bool:
    """Whether the folder's tokenizer is ByT5's, whose tokens are bytes and which has no file."""
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file() and (said := read_json(folder / name).get("tokenizer_class")):
            return said == "ByT5Tokenizer"
    return False


def resolve(path: str, revision: str = "main") -> Path:
    """A local folder as it is; gs:// or s3:// addresses opened (io/remote); a name of the package's own (embedded); a
    hub name ("owner/name") downloaded.

    Raises InputError when there is none of them, or the store or hub does not give it.
    """
    if not path:
        raise InputError("no model was named: give a checkpoint folder or a hub name (--config.model.path or --model)")
    if remote.is_remote(path):
        return remote.open_remote(path, ("config.json", _INDEX, *COMPANIONS))
    folder = located(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; expected a checkpoint folder with config.json and safetensors")
    set_aside = folder.with_name(f".{folder.name}.old")
    if set_aside.is_dir():
        raise InputError(
            f"{path}: a run that was replacing this folder was killed; what was there is {set_aside}: rename it, or "
            "run the same command again"
        )
    if not _HUB_NAME.fullmatch(path):
        raise InputError(
            f"{path}: no such folder (a hub name would read owner/name, a bucket gs:// or s3://; the model "
            f"{', '.join(MODELS)} comes with the package)"
        )
    return _download(path, revision, _HUB_FILES)


def fetch_config(name: str, revision: str = "main") -> Path:
    """A folder with the config.json of a hub model and nothing else. Raises InputError when it cannot be had."""
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"{name}: no such folder (a hub name would read owner/name)")
    return _download(name, revision, ["config.json"])


def _download(name: str, revision: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: no such folder here, and the hub did not give it at revision {revision!r}: {reason}"
        ) from error


class TensorFiles:
    """The tensors of a checkpoint folder: model.safetensors, or shards under model.safetensors.index.json.

    `files` names those to read, in place of the folder's choice. `rename` gives keys other names than the files do, and
    `names` has the files' own; `split` tensors that are read in parts: their keys -> key and place of each part.
    `shapes` and `dtypes` are known from the headers at once. `folder` is what errors call it. No value that is not
    finite, and no negative scale of a quantized weight, gets out of here: each piece is looked at as it is read, which
    costs less than reading it from memory. A tensor that is read in order is hashed on the way, and refused at its end
    where its file states another checksum; `checksums` has those of the tensors that were read.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str] | None = None,
        rename: Callable[[Sequence[str]], dict[str, str]] = lambda keys: {},
        split: Callable[[Mapping[str, Place]], dict[str, dict[str, Place]]] = lambda places: {},
    ):
        self._source = remote.source_of(folder)
        self.folder = self._source.name
        files, promised = _choose(folder) if files is None else (files, [])
        self._places: dict[str, tuple[str, Place]] = {}
        for name in files:
            try:
                places = read_header(partial(self._source.read, name))
            except (ValueError, OSError) as error:
                raise InputError(f"{self.folder}/{name} is damaged or cut short: {error}") from error
            self._places |= {key: (name, place) for key, place in places.items()}
        new = rename(list(self._places))
        self.names = {new.get(key, key): key for key in self._places}
        self._places = {new.get(key, key): place for key, place in self._places.items()}
        promised = [new.get(key, key) for key in promised]
        if absent := sorted(set(promised) - self._places.keys()):
            raise InputError(f"{self.folder}: the index promises {absent[0]}, which its file does not hold")
        for key, parts in split({key: place for key, (_, place) in self._places.items()}).items():
            file, _ = self._places.pop(key)
            self._places |= {part: (file, place) for part, place in parts.items()}
        self.checksums: dict[str, str] = {}
        self._hashing: dict[str, tuple[checksums.Running, int]] = {}  # with the number of values that are hashed
        self.shapes = {key: place.shape for key, (_, place) in self._places.items()}
        self.dtypes = {key: place.dtype for key, (_, place) in self._places.items()}
        self._reader = ThreadPoolExecutor(1, "read-ahead")

    def read(self, key: str, place: tuple[int, ...] = ()) -> np.ndarray:
        """A whole tensor, or its entry at `place` along the first axes."""
        whole = self.shapes[key]
        shape = whole[len(place) :]
        first = sum(index * math.prod(whole[axis + 1 :]) for axis, index in enumerate(place))
        return self._read(key, first, np.empty(shape, numpy_dtype(self.dtypes[key])))

    def pieces(self, key: str, piece_bytes: int | None = None) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """A tensor in order, cut into boxes of about PIECE_BYTES: where a box begins, and its values.

        The next piece is read while one is in use; what a piece held is overwritten once the next is asked for.
        """
        dtype = numpy_dtype(self.dtypes[key])
        boxes = cut(self.shapes[key], dtype.itemsize, piece_bytes or PIECE_BYTES)
        sizes = [math.prod(shape) for _, shape in boxes]
        starts = [0, *itertools.accumulate(sizes)]
        buffers = [_aligned(sizes[0], dtype) for _ in boxes[:PIECES_ALIVE]]

        def read(number: int) -> np.ndarray:
            out = buffers[number % PIECES_ALIVE][: sizes[number]]
            self._read(key, starts[number], out)
            return out

        ahead = self._reader.submit(read, 0)
        for number, (corner, shape) in enumerate(boxes):
            piece = ahead.result()
            if number + 1 < len(boxes):
                ahead = self._reader.submit(read, number + 1)
            yield corner, piece.reshape(shape)

    def _read(self, key: str, first: int, out: np.ndarray) -> np.ndarray:
        """Fills `out` with a tensor's values from its value number `first` on."""
        file, place = self._places[key]
        try:
            self._source.read(file, place.start + first * out.itemsize, out.reshape(-1).view(np.uint8))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.folder}/{file}: {key} cannot be read: {error}") from error
        self._hash(key, first, out)
        name = f"{self.folder}/{file}: {key}"
        check_finite(out, name, _MEND, first, math.prod(self.shapes[key]))
        if key.endswith(_SCALES) and out.dtype == np.float32 and (out < 0).any():
            raise InputError(f"{name} holds {out.min()}, a negative scale: {_MEND}")
        return out

    def _hash(self, key: str, first: int, values: np.ndarray) -> None:
        """Of a tensor that is read from its first value on without a gap, as all of them are that are loaded."""
        start = checksums.Running(self.dtypes[key], self.shapes[key]), 0
        running, done = self._hashing.pop(key, start) if first else start
        if done != first:
            return
        running.update(values)
        if (done := done + values.size) < math.prod(self.shapes[key]):
            self._hashing[key] = running, done
            return
        file, place = self._places[key]
        self.checksums[key] = running.result()
        checksums.refuse_other(place.checksum, self.checksums[key], key, f"{self.folder}/{file}")


def has_weights(folder: Path) -> bool:
    """Whether all the files are there that TensorFiles would open."""
    try:
        return bool(_choose(folder))
    except InputError:
        return False


def _choose(folder: Path) -> tuple[list[str], list[str]]:
    """The files of weights to read, and the tensors that their index promises.

    Where there are both, model.safetensors counts, as it does for transformers. Raises InputError where it and the
    index's shards hold different models, and where there is nothing.
    """
    source = remote.source_of(folder)
    named: Any = {}
    if (folder / _INDEX).exists():
        named = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise InputError(f"{source.name}/{_INDEX} has no weight_map of tensor names to file names")
    shards = sorted(set(named.values()))
    if outside := [name for name in shards if not _SHARD.fullmatch(name)]:
        raise InputError(
            f"{source.name}/{_INDEX} names {outside[0]!r}; shards must lie in the folder itself and end in .safetensors"
        )
    absent = [name for name in shards if not source.exists(name)]
    if source.exists(_SINGLE):
        if not absent and shards not in ([], [_SINGLE]):
            _refuse_two_models(folder, shards)
        return [_SINGLE], []
    if absent:
        raise InputError(f"{source.name} lacks {', '.join(absent)}, named in its index: download the folder again")
    if not shards:
        pickles = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
        raise InputError(f"{source.name} holds no {_SINGLE} and no {_INDEX}{hint}")
    return shards, list(named)


def _refuse_two_models(folder: Path, shards: list[str]) -> None:
    key = _first_difference(folder, tuple(shards), signature(folder, (_SINGLE, *shards)))
    if key is not None:
        raise InputError(
            f"{name_of(folder)} holds two models, {_SINGLE} and the shards of {_INDEX}, which differ in {key}: delete "
            "the one that is not meant (transformers takes the first)"
        )


@cache
def _first_difference(folder: Path, shards: tuple[str, ...], _: Any) -> str | None:
    """A tensor that only one of the two models has, or in which they differ; None where they are the same."""
    single, sharded = TensorFiles(folder, [_SINGLE]), TensorFiles(folder, shards)
    if other := sorted(single.shapes.keys() ^ sharded.shapes.keys()):
        return other[0]
    return next((key for key in single.shapes if not are_equal(single, key, sharded, key)), None)


def signature(folder: Path, files: Sequence[str] | None = None) -> tuple:
    """What tells that files of a folder (all safetensors by default) are the same as before, without reading them.

    Those of a remote folder are taken to stay what they are while this process lives.
    """
    paths = [folder / name for name in files] if files else sorted(folder.glob("*.safetensors"))
    stats = [(path.name, path.stat()) for path in paths if path.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def are_equal(a: TensorFiles, key: str, b: TensorFiles, other: str) -> bool:
    """Whether two tensors have one shape and the same values. Reads them up to the first piece that differs.

    Tensors of a dtype that no model is stored in are never read: they are equal where shape and dtype are.
    """
    dtypes = [a.dtypes[key], b.dtypes[other]]
    if a.shapes[key] != b.shapes[other] or dtypes[0] not in DTYPES.values() or dtypes[1] not in DTYPES.values():
        return (a.shapes[key], dtypes[0]) == (b.shapes[other], dtypes[1])
    sizes = [PIECE_BYTES // 4 * numpy_dtype(dtype).itemsize for dtype in dtypes]
    pieces = zip(a.pieces(key, sizes[0]), b.pieces(other, sizes[1]), strict=True)
    if dtypes[0] == dtypes[1]:
        return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for (_, x), (_, y) in pieces)
    return all(np.array_equal(x.astype(np.float32), y.astype(np.float32)) for (_, x), (_, y) in pieces)


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Room for `count` values that begins where XLA's arrays do: a CPU then takes it as it is, without a copy."""
    room = np.empty(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + count * dtype.itemsize].view(dtype)


def cut(shape: tuple[int, ...], itemsize: int, most: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts an array, in order, into boxes of `most` bytes at most that lie in one piece: (corner, shape) of each.

    (80, 90_000_000) bytes at most 32 MiB -> ((0, 0), (1, 33_554_432)), ((0, 33_554_432), (1, 33_554_432)), ...
    """
    if not shape:
        return [((), ())]
    axis = next((a for a in range(len(shape)) if math.prod(shape[a + 1 :]) * itemsize <= most), len(shape) - 1)
    inner = shape[axis + 1 :]
    step = max(1, most // max(1, math.prod(inner) * itemsize))
    boxes = []
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            corner = (*outer, start, *(0,) * len(inner))
            boxes.append((corner, (*(1,) * axis, min(step, shape[axis] - start), *inner)))
    return boxes
