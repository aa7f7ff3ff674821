"""Where the bytes of a checkpoint come from: files of a folder here, or of a remote one (io/remote), by byte ranges.

Files are read, not mapped: pages of a mapped file count as this process's memory once touched, and a mapped file that
is cut short while it is read ends the process.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """`name` is what users call the folder."""

    name: str

    def exists(self, file: str) -> bool: ...

    def read(self, file: str, start: int, out: np.ndarray) -> None:
        """Bytes of a file from `start` on into `out`, uint8 [n].

        Raises ValueError where the file is shorter, OSError where it cannot be read.
        """
        ...


class LocalSource:
    def __init__(self, folder: Path):
        self.name, self._folder = str(folder), folder
        self._handles: dict[str, Any] = {}

    def exists(self, file: str) -> bool:
        return (self._folder / file).is_file()

    def read(self, file: str, start: int, out: np.ndarray) -> None:
        if file not in self._handles:
            self._handles[file] = open(self._folder / file, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        handle, done = self._handles[file], 0
        while done < out.size:
            count = os.preadv(handle.fileno(), [out[done:].data], start + done)
            if count == 0:
                size = os.fstat(handle.fileno()).st_size
                raise ValueError(f"it ends after {size:,} bytes, {start + out.size:,} or more were expected")
            done += count
