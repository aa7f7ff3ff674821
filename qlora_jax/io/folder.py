"""A Hugging Face checkpoint folder: found locally or fetched by hub name, its safetensors read tensor by tensor."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.errors import InputError
from qlora_jax.models.config import read_json

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "chat_template.jinja", "*.safetensors", "tokenizer.model"]  # never pickles, never code
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}


def resolve(path: str, revision: str = "main") -> Path:
    """A local folder as it is; a hub name ("owner/name") downloaded through huggingface_hub into its cache.

    Raises InputError when there is neither, or the download fails.
    """
    if not path:
        raise InputError("no model was named: give a checkpoint folder or a hub name (--config.model.path or --model)")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; expected a checkpoint folder with config.json and safetensors")
    if not _HUB_NAME.fullmatch(path):
        raise InputError(f"{path}: no such folder (a hub name would read owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: no such folder here, and the hub did not give it at revision {revision!r}: {reason}"
        ) from error


class TensorFiles:
    """The tensors of a checkpoint folder: model.safetensors, or shards under model.safetensors.index.json.

    `shapes` and `dtypes` are known from the headers at once; `read` maps one tensor into memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        names: Any = {}
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{index} has no weight_map of tensor names to file names")
            files = sorted(set(names.values()))
            outside = [name for name in files if Path(name).name != name]
            if outside:
                raise InputError(f"{index} names {outside[0]!r}; shards must lie in the folder itself")
            absent = [name for name in files if not (folder / name).is_file()]
            if absent:
                raise InputError(f"{folder} lacks {', '.join(absent)}, named in its index: download the folder again")
        elif single.exists():
            files = [single.name]
        else:
            pickles = [p.name for p in folder.glob("*.bin")]
            hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
            raise InputError(f"{folder} holds no model.safetensors and no model.safetensors.index.json{hint}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files = {}
        for name in files:
            try:
                handle = safe_open(folder / name, "numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{folder / name} is damaged or cut short: {error}") from error
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                view = handle.get_slice(key)
                self.shapes[key] = tuple(view.get_shape())
                self.dtypes[key] = _DTYPES.get(view.get_dtype(), view.get_dtype())
                self._files[key] = handle
        promised = sorted(set(names) - set(self.shapes))
        if promised:
            raise InputError(f"{folder}: the index promises {promised[0]}, which its file does not hold")

    def read(self, key: str) -> np.ndarray:
        return self._files[key].get_tensor(key)
