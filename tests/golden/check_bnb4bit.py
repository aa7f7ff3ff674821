"""Loads a folder that qlora_jax wrote, quantized in bitsandbytes' form or merged, in transformers and compares logits.

transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0 (CPU), accelerate 1.15.0, Python 3.11.

    python tests/golden/check_bnb4bit.py FOLDER LOGITS.npz

LOGITS.npz holds tokens (integers [B, T], no padding) and logits (float [B, T, V]) as qlora_jax computes them in
float32 from the same folder. For a quantized folder, transformers and bitsandbytes must take up every tensor of the
file bit for bit; the logits compared are then those of float32 arithmetic with the weights dequantized by
definition.py. How far bitsandbytes' own forward pass is from ours is printed only: with AVX-512 its dequantization is
wrong for some shapes, those of the golden models among them. Exits with 1 when the largest difference is above 1e-4, or
a tensor is left unread or read as another.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from make_bnb4bit import dequantized_layers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

TOLERANCE = 1e-4


def file_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def differing(model: torch.nn.Module, file: dict[str, torch.Tensor]) -> list[str]:
    """Keys of the file that the model lacks or holds with other values, and quantized layers that the file lacks."""
    held = dict(model.state_dict())
    wrong = [key for key, value in file.items() if key not in held or not same(held[key], value)]
    layers = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    return wrong + [key for key in layers if f"{key}.quant_map" not in file]


def same(held: torch.Tensor, stored: torch.Tensor) -> bool:
    if held.dtype == stored.dtype == torch.uint8 and held.numel() > 2 and held[0] == ord("{"):
        return bytes(held.tolist()) == bytes(stored.tolist())  # quant_state, JSON
    return held.dtype == stored.dtype and held.shape == stored.shape and torch.equal(held, stored)


def float32_model(folder: Path, file: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model with its weights dequantized by definition, in float32."""
    with tempfile.TemporaryDirectory() as whole:  # the shards as one file
        save_file(file, Path(whole) / "model.safetensors")
        layers = {key: torch.from_numpy(value) for key, value in dequantized_layers(Path(whole)).items()}
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict({key: layers.get(key, file.get(key, value)) for key, value in model.state_dict().items()})
    return model


def main(name: str, logits_file: str) -> int:
    torch.set_num_threads(1)
    folder = Path(name)
    with np.load(logits_file) as stored:
        tokens, expected = torch.from_numpy(stored["tokens"]).long(), torch.from_numpy(stored["logits"]).float()
    quantized = hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    file = file_tensors(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
    wrong = differing(model, file)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # repacks the weights, and takes multiples of 32 out-features only
        layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    with torch.no_grad():
        own = model(input_ids=tokens).logits.float()
        actual = float32_model(folder, file)(input_ids=tokens).logits if quantized else own
    difference = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    print(f"{len(file)} tensors read, {len(layers)} layers in 4 bits, {len(wrong)} wrong: {wrong[:4]}")
    print(f"largest difference of logits {difference:.3e} (at most {TOLERANCE:.0e})")
    if quantized:
        print(f"bitsandbytes' own float32 forward pass is {float((own - expected).abs().max()):.3e} away")
    return 0 if not wrong and bool(layers) == quantized and difference <= TOLERANCE else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
