"""Makes bnb4bit/{nf4_dq,nf4,fp4,nf4_skip}/: llama/llama2 quantized by bitsandbytes, saved by transformers, and logits.

transformers 5.23.0, bitsandbytes 0.50.2 (CPU), torch 2.13.0, accelerate 1.15.0, Python 3.11. Run make_llama.py first.

    python tests/golden/make_bnb4bit.py

Each folder is what `save_pretrained` of a model loaded with BitsAndBytesConfig(load_in_4bit=True) writes: config.json
with quantization_config, model.safetensors (every linear layer but lm_head in 4 bits, blocks of 64; embedding, norms
and head bfloat16), generation_config.json. bitsandbytes' CPU path picks the 8-bit codes of nf4_dq by its table of bins.
nf4_skip has llm_int8_skip_modules: o_proj and the last layer's feed-forward stay bfloat16, and since the list leaves
lm_head out, the head is in 4 bits.

logits.npz, float32 arithmetic with the stored tensors dequantized by definition.py, through transformers:
    tokens                  int32 [2, T]
    logits                  float32 [2, T, V], weights dequantized to float32
    logits_bfloat16_weights float32 [2, T, V], the dequantized weights rounded once to bfloat16, quant_state's own dtype
                            (nf4_dq only)
"""

import json
import shutil
from pathlib import Path

import definition
import numpy as np
import torch
from make_llama import load, logits_of
from safetensors.torch import load_file as load_torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

HERE = Path(__file__).parent
BASE = HERE / "llama" / "llama2"
SKIPPED = ["self_attn.o_proj", "model.layers.1.mlp"]
VARIANTS = {
    "nf4_dq": ("nf4", True, None),
    "nf4": ("nf4", False, None),
    "fp4": ("fp4", False, None),
    "nf4_skip": ("nf4", True, SKIPPED),
}


def dequantized_layers(folder: Path) -> dict[str, np.ndarray]:
    """Weight name -> float32 [O, I] for every 4-bit tensor of the folder's model.safetensors, by definition."""
    torch_tensors = load_torch(folder / "model.safetensors")
    names = [name.removesuffix(".quant_map") for name in torch_tensors if name.endswith(".quant_map")]
    stored = {key: value for key, value in torch_tensors.items() if value.dtype != torch.bfloat16}
    tensors = {key: value.numpy() for key, value in stored.items()}
    layers = {}
    for name in names:
        (state_key,) = (key for key in tensors if key.startswith(f"{name}.quant_state.bitsandbytes__"))
        state = json.loads(tensors[state_key].tobytes())
        absmax = tensors[f"{name}.absmax"]
        if f"{name}.nested_absmax" in tensors:
            assert state["nested_blocksize"] == definition.NESTED_BLOCK
            absmax = definition.nested_absmax_values(
                absmax,
                tensors[f"{name}.nested_absmax"],
                tensors[f"{name}.nested_quant_map"],
                np.float32(state["nested_offset"]),
            )
        layers[name] = definition.dequantize(
            tensors[name], absmax, tensors[f"{name}.quant_map"], state["blocksize"], tuple(state["shape"])
        )
    return layers


def main() -> None:
    torch.set_num_threads(1)
    tokens = np.load(BASE / "logits.npz")["tokens"]
    base_logits = np.load(BASE / "logits.npz")["logits"]
    for name, (quant_format, double, skipped) in VARIANTS.items():
        folder = HERE / "bnb4bit" / name
        shutil.rmtree(folder, ignore_errors=True)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_format,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skipped,
        )
        LlamaForCausalLM.from_pretrained(
            BASE, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
        ).save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)

        model = load(BASE)
        parameters = dict(model.named_parameters())
        layers = dequantized_layers(folder)
        assert len(layers) == 7 * model.config.num_hidden_layers - (2 + 3 - 1 if skipped else 0)
        stored = load_torch(folder / "model.safetensors")
        for key, value in parameters.items():
            if key in layers:
                packed, _ = definition.quantize(value.detach().numpy(), quant_format, 64)
                assert np.array_equal(packed, stored[key].numpy()), key
                value.data = torch.from_numpy(layers[key])
            else:
                assert torch.equal(value, stored[key].float()), key
        logits = logits_of(model, tokens)
        arrays = {"tokens": tokens, "logits": logits}
        if name == "nf4_dq":
            for value in parameters.values():
                value.data = value.data.to(torch.bfloat16).float()
            arrays["logits_bfloat16_weights"] = logits_of(model, tokens)
        np.savez_compressed(folder / "logits.npz", **arrays)
        print(f"{name}: mean difference from the base {np.abs(logits - base_logits).mean():.3f}")


if __name__ == "__main__":
    main()
