"""Adapters and quantized folders of our own making are refused where they are damaged; others are read as before."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import checksums, lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import copy_adapter
from qlora_jax.io.peft import read_adapter, write_arrays
from qlora_jax.io.write import quant_spec, quantize_folder
from qlora_jax.lora import LoRAConfig

pytestmark = pytest.mark.quick_compile

@pytest.fixture(scope="module")
def base(golden) -> Path:
    return golden / "llama" / "llama1"


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, compute_dtype=jnp.float32)


@pytest.fixture
def adapter(model, base, tmp_path) -> Path:
    rng, L = np.random.default_rng(0), load_config(base).L
    shapes = {name: lora.shape(model, name) for name in ("self_attn.q_proj", "mlp.down_proj")}
    arrays = {
        name: tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((L, 3, I), (L, O, 3)))
        for name, (O, I) in shapes.items()
    }
    write_arrays(tmp_path / "adapter", arrays, LoRAConfig(3, 6.0, 0.0, ("q_proj", "down_proj")), str(base))
    return tmp_path / "adapter"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_an_adapter_with_a_flipped_bit_is_refused(model, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    for place in range(8 + int.from_bytes(content[:8], "little"), len(content), len(content) // 12):
        flip(weights, place)
        for use in (lambda: read_adapter(model, adapter), lambda: copy_adapter(adapter, tmp_path / "out")):
            with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
                use()
        flip(weights, place)
    copy_adapter(adapter, tmp_path / "out")
    assert read_adapter(model, tmp_path / "out")[0].scale == 2


def test_an_adapter_that_another_program_wrote_anew_is_read(model, adapter):
    """It loses the checksums with the metadata, so that its own values are not held against them."""
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = load_file(weights)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: tensors[key] * 2}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 12}))
    assert read_adapter(model, adapter)[0].scale == 4
    save_file(tensors | {key: tensors[key] * 2}, weights, checksums.as_metadata({key: checksums.UNKNOWN}))
    with pytest.raises(InputError, match=f"must drop '{checksums.KEY}' from its metadata"):
        read_adapter(model, adapter)


@pytest.mark.parametrize("form", ["native", "bnb"])
def test_a_quantized_folder_with_a_flipped_bit_is_refused(base, tmp_path, form):
    """By loading it, and by every command that makes another folder from it, tensor by tensor."""
    quantize_folder(base, tmp_path / "good", form, quant_spec("nf4+dq"))
    file = tmp_path / "good" / "model.safetensors"
    size = file.stat().st_size
    other = "bnb" if form == "native" else "native"
    for number, place in enumerate(range(size - 1, 9, -size // 6)):
        flip(file, place)
        with pytest.raises(InputError, match=r"damaged|does not hold the model|stored as|no bitsandbytes|expected"):
            load_model(tmp_path / "good", QuantSpec(), "float32")
        if number < 3:
            with pytest.raises(InputError, match="damaged"):
                quantize_folder(tmp_path / "good", tmp_path / "other", other)
            assert not (tmp_path / "other").exists()
        flip(file, place)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    quantize_folder(tmp_path / "good", tmp_path / "other", other)
