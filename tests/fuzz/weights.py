"""Readers of weights, config.json and adapters: see readers.py."""

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save, save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def _copy(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".npz", ".npy"):
            shutil.copyfile(file, folder / file.name)


def tensors(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.io.folder import TensorFiles

    def read(data: bytes) -> None:
        files = TensorFiles(folder)
        for key, dtype in files.dtypes.items():
            if dtype in ("float32", "float16", "bfloat16", "uint8", "int8"):
                files.read(key)

    return read


def some_tensors() -> list[bytes]:
    from qlora_jax import checksums

    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.absmax": np.ones(2, np.uint8),
        "c": np.float16([[1]]),
    }
    sums = checksums.as_metadata({key: checksums.of_array(value) for key, value in arrays.items()})
    return [save(arrays, {"format": "pt"}), save(arrays, sums), save({"x": np.zeros((0, 4), np.int8)})]


def index(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.io.folder import TensorFiles

    for number in (1, 2):
        arrays = {f"a{number}": np.ones(2, np.float32), f"b{number}": np.ones(1, np.uint8)}
        (folder / f"model-{number}.safetensors").write_bytes(save(arrays))
    (folder / "deeper").mkdir(exist_ok=True)
    (folder / "deeper" / "model-1.safetensors").write_bytes(save({"a1": np.ones(2, np.float32)}))

    def read(data: bytes) -> None:
        files = TensorFiles(folder)
        for key in files.shapes:
            files.read(key)

    return read


_NAMES = (
    "../secret.safetensors", "../secret", "/etc/passwd", "/dev/zero", "deeper/model-1.safetensors",
    "./model-1.safetensors", "..", "model-1.safetensors/../model-2.safetensors", "modeling_evil.py",
    "pytorch_model.bin", "~/x", "file:///etc/passwd", "model-1.safetensors\x00", "\\..\\secret", "",
)  # fmt: skip


def hostile_names(rng: Any, data: bytes) -> bytes:
    said = json.loads(data)
    said["weight_map"][rng.choice(("a1", "a2", "zz"))] = rng.choice(_NAMES)
    return json.dumps(said).encode()


def indices() -> list[bytes]:
    places = {f"{letter}{number}": f"model-{number}.safetensors" for letter in "ab" for number in (1, 2)}
    return [json.dumps({"metadata": {"total_size": 18}, "weight_map": places}).encode()]


def native(folder: Path) -> Callable[[bytes], Any]:
    """A folder in our own 4-bit form: config.json is changed, and its tensors are held against it."""
    from qlora_jax.io import load

    source = GOLDEN / "llama" / "llama1"
    model, quant = load.load_config(source), load.QuantSpec()
    shapes = {key: (shape, "float32") for key, shape in load.expected_shapes(model).items()}
    shapes = {key: each for key, each in shapes.items() if key not in load.linear_keys(model)}
    shapes |= load.expected_stacks(model, quant)
    save_file({key: np.zeros(shape, dtype) for key, (shape, dtype) in shapes.items()}, folder / "model.safetensors")

    def read(data: bytes) -> None:
        found, stored = load.load_config(folder), load.stored_quant(folder)
        load.check_tensors(load.open_files(folder, found), found, stored, load.skipped_linears(folder, found))

    return read


def native_configs() -> list[bytes]:
    from qlora_jax.quant.native import settings

    raw = json.loads((GOLDEN / "llama" / "llama1" / "config.json").read_text())
    return [json.dumps(raw | {"quantization_config": settings("nf4", 64, True)}).encode()]


def bitsandbytes(folder: Path) -> Callable[[bytes], Any]:
    """A quant_state, JSON in a tensor, beside good tensors."""
    from qlora_jax.quant.bitsandbytes import from_bitsandbytes, part_of

    held = load_file(GOLDEN / "bnb4bit" / "nf4_dq" / "model.safetensors")
    key = next(owner for each in sorted(held) if (owner := part_of(each)))
    parts = {each: value for each, value in held.items() if each == key or each.startswith(key + ".")}

    def read(data: bytes) -> None:
        state = {f"{key}.quant_state.bitsandbytes__nf4": np.frombuffer(data, np.uint8)}
        from_bitsandbytes(parts | state, key)

    return read


def quant_states() -> list[bytes]:
    held = load_file(GOLDEN / "bnb4bit" / "nf4_dq" / "model.safetensors")
    return [next(value.tobytes() for key, value in sorted(held.items()) if "quant_state" in key)]


def config(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.io.load import expected_shapes, linear_keys, load_config, skipped_linears, stored_quant

    def read(data: bytes) -> None:
        config = load_config(folder)
        stored_quant(folder), skipped_linears(folder, config), expected_shapes(config), linear_keys(config)

    return read


def configs() -> list[bytes]:
    rooms = ("families", "llama", "mixtures", "roberta", "t5", "bnb8bit")
    files = [file for room in rooms for file in sorted((GOLDEN / room).rglob("config.json"))]
    return [file.read_bytes() for file in files]


def adapter_config(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.io.load import load_config
    from qlora_jax.io.peft import _placed
    from qlora_jax.io.peft_config import read_config

    model = load_config(GOLDEN / "llama" / "llama1")

    def read(data: bytes) -> None:
        _placed(read_config(folder), model)

    return read


def adapter_configs() -> list[bytes]:
    return [file.read_bytes() for file in sorted((GOLDEN / "peft").rglob("adapter_config.json"))]


def adapter(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.io.load import load_config
    from qlora_jax.io.peft import check_weights, read_adapter, read_matrices

    _copy(GOLDEN / "peft" / "all_linear_r4", folder)
    model: Any = types.SimpleNamespace(config=load_config(GOLDEN / "llama" / "llama1"), head=None)

    def read(data: bytes) -> None:
        check_weights(folder)
        read_matrices(model, folder)
        read_adapter(model, folder)

    return read


def adapters() -> list[bytes]:
    return [(GOLDEN / "peft" / "all_linear_r4" / "adapter_model.safetensors").read_bytes()]
