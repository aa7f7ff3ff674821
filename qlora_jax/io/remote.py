"""Checkpoint folders in object stores: gs://, s3://, http(s):// and file:// through tensorstore's key-value stores.

`open_remote` copies what is small (config.json, the index, tokenizer files) into a folder of this process, which is
what every command then works with; tensors are read by byte ranges when they are wanted. Credentials are those that
the environment gives to tensorstore.
"""

import atexit
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.source import LocalSource, Source

SCHEMES = ("gs", "s3", "http", "https", "file")
_RANGE = 4 * 2**20  # bytes of a request; the requests of one read run side by side
_PATIENCE = {"max_retries": 5, "max_delay": "4s"}  # a store that does not answer is an error within half a minute
_SETTINGS = {f"{store}_request_retries": _PATIENCE for store in ("gcs", "s3", "http")}
_opened: dict[Path, "RemoteSource"] = {}  # folder that `open_remote` made -> where its tensors are


def is_remote(path: str) -> bool:
    return path.partition("://")[0] in SCHEMES and "://" in path


def open_remote(url: str, small_files: Sequence[str]) -> Path:
    """A local folder that stands for the remote one: those of `small_files` that are there. It lives as long as we do.

    Raises InputError when there is no config.json there, or the store does not answer.
    """
    source = RemoteSource(url)
    folder = Path(tempfile.mkdtemp(prefix="qlora_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file, content in zip(small_files, source.whole(small_files), strict=True):
        if content is not None:
            (folder / file).write_bytes(content)
    if not (folder / "config.json").is_file():
        raise InputError(f"{source.name} holds no config.json; expected a checkpoint folder (is the address right?)")
    _opened[folder] = source
    return folder


def source_of(folder: Path) -> Source:
    """The bytes of a folder's tensors: its own files, or those of the remote folder that it stands for."""
    return _opened.get(folder) or LocalSource(folder)


def name_of(folder: Path) -> str:
    """What users call a folder: its path, or the address that it stands for."""
    return source_of(folder).name


class RemoteSource:
    def __init__(self, url: str):
        import tensorstore

        self.name = url.rstrip("/")
        if re.search(r"[@?#]", url):
            raise InputError(
                f"{url.partition('://')[0]}://...: an address with a user, a query or a fragment is not read; "
                "credentials are taken from the environment"
            )
        try:
            context = tensorstore.Context(_SETTINGS)
            self._store: Any = tensorstore.KvStore.open(self.name + "/", context=context).result()
        except ValueError as error:
            raise InputError(f"{self.name} cannot be opened: {_reason(error)}") from error

    def exists(self, file: str) -> bool:
        try:
            return self._get([(file, slice(0, 1))])[0] is not None
        except ValueError:  # it is there and empty
            return True

    def whole(self, files: Sequence[str]) -> list[bytes | None]:
        """Contents of small files, None for those that are not there."""
        return self._get([(file, slice(None)) for file in files])

    def read(self, file: str, start: int, out: np.ndarray) -> None:
        stop = start + out.size
        starts = range(start, stop, _RANGE)
        parts = self._get([(file, slice(at, min(at + _RANGE, stop))) for at in starts])
        for at, part in zip(starts, parts, strict=True):
            if part is None:
                raise InputError(f"{self.name}/{file} is missing")
            out[at - start : at - start + len(part)] = np.frombuffer(part, np.uint8)

    def _get(self, requests: list[tuple[str, slice]]) -> list[bytes | None]:
        """Raises ValueError for a range beyond a file's end, InputError for whatever else goes wrong."""
        try:
            futures = [self._store.read(file, byte_range=part) for file, part in requests]
            results = [future.result() for future in futures]
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                raise ValueError(re.sub(r".*(value of size \d+).*", r"it ends early (\1)", _reason(error))) from error
            raise InputError(f"{self.name} cannot be read: {_reason(error)}") from error
        return [result.value if result.state == "value" else None for result in results]


def _reason(error: ValueError) -> str:
    return str(error).strip().splitlines()[0]
