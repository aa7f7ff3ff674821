"""Telling whether a folder of weights is still the one it was, without reading all of it."""

import hashlib
import os
from pathlib import Path

from qlora_jax.errors import InputError

_END = 2**20  # bytes that are read at either end of a file of weights
_SETTINGS = ("config.json", "adapter_config.json", "model.safetensors.index.json")


def fingerprint(folder: Path) -> str:
    """16 hex digits of a checkpoint or adapter folder: its settings, and of each safetensors file name, size, first and
    last MiB. Of a remote folder, which is not here, the settings alone.

    Raises InputError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name in _SETTINGS:
            if (folder / name).is_file():
                digest.update(name.encode() + (folder / name).read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_END))
                file.seek(max(size - _END, 0), os.SEEK_SET)
                digest.update(file.read(_END))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:16]
