"""Where the bytes of a checkpoint come from: files of a folder here, or of a remote one (io/remote), by byte ranges.

Files are read, not mapped: pages of a mapped file count as this process's memory once touched, and a mapped file that
is cut short while it is read ends the process.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """`name` is what users call the folder. `read` gives bytes [start, stop) of a file as a fresh uint8 array."""

    name: str

    def exists(self, file: str) -> bool: ...

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        """Raises ValueError where the file is shorter, OSError where it cannot be read."""
        ...


class LocalSource:
    def __init__(self, folder: Path):
        self.name, self._folder = str(folder), folder
        self._handles: dict[str, Any] = {}

    def exists(self, file: str) -> bool:
        return (self._folder / file).is_file()

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        if file not in self._handles:
            self._handles[file] = open(self._folder / file, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        handle, size = self._handles[file], os.stat(self._folder / file).st_size
        if stop > size:
            raise ValueError(f"it ends after {size:,} bytes, before byte {stop:,}")
        out = np.empty(stop - start, np.uint8)
        done = 0
        while done < out.size:
            count = os.preadv(handle.fileno(), [out[done:].data], start + done)
            if count == 0:
                raise ValueError(f"it ends after {start + done:,} bytes, before byte {stop:,}")
            done += count
        return out
