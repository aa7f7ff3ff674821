"""Makes peft/lora_config.json and peft/{pissa,olora,patterns,expressions}/: what else PEFT writes, and how it reads it.

peft 0.21.2, transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0 (CPU, one thread), Python 3.11. Run make_llama.py
first.

    python tests/golden/make_peft_inits.py

lora_config.json: {"peft": version, "keys": {every key of LoraConfig: its default as JSON}, "inits": the names that the
type of init_lora_weights lists, "peft_types": all kinds of adapters}.

Each folder, on llama/llama1: files and logits.npz as make_peft.py's, the logits those of the folder loaded again.

    pissa        query, value and down, r 3, alpha 6, the base less its three largest singular directions
    olora        query, gate and down, r 2, alpha 3: scale 1.5, the base less 1.5 times the first part of its QR
    patterns     layer 1 alone, query with r 3 where r is 2, up with r 1, value with alpha 5 where it is 3, rsLoRA
    expressions  modules by expressions, other ranks and alphas by expressions, bias "lora_only" (there are no biases)

olora/logits.npz also has logits_nf4: the same beside llama1 in NF4, loaded by transformers (float32). PEFT dequantizes,
takes its part out and quantizes again; what it keeps is dequantized by definition.py. Not doubly quantized: there
bitsandbytes' CPU path is one code off now and then.
"""

import dataclasses
import json
import typing
from pathlib import Path

import definition
import numpy as np
import peft
import torch
from make_llama import load, logits_of, tokens_for
from make_peft import BASE, save_adapter
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

HERE = Path(__file__).parent
ADAPTERS: dict[str, dict] = {
    "pissa": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": "pissa",
    },
    "olora": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "init_lora_weights": "olora",
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 3, "model.layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"v_proj": 5},
        "use_rslora": True,
    },
    "expressions": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": r".*\.layers\.\d+\.(self_attn\.[qo]|mlp\.(up|down))_proj",
        "exclude_modules": r"model\.layers\.0\.mlp\.up_proj",
        "rank_pattern": {r"layers\.(1|3)\..*": 3, "o_proj": 1},
        "alpha_pattern": {r".*down.*": 7},
        "bias": "lora_only",
    },
}


def write_keys() -> None:
    keys = {}
    for field in dataclasses.fields(LoraConfig):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        keys[field.name] = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
    kinds = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    content = {
        "peft": peft.__version__,
        "keys": dict(sorted(keys.items())),
        "inits": sorted(name for kind in kinds for name in typing.get_args(kind)),
        "peft_types": sorted(kind.value for kind in PeftType),
    }
    (HERE / "peft" / "lora_config.json").write_text(json.dumps(content, indent=2) + "\n")


def values_by_definition(layer) -> np.ndarray:
    """float32 [O, I] of a bitsandbytes Linear4bit."""
    weight, state = layer.weight, layer.weight.quant_state
    codes, absmax, table = weight.data.numpy().reshape(-1), state.absmax.numpy(), state.code.numpy()
    return definition.dequantize(codes, absmax, table, state.blocksize, tuple(state.shape))


def logits_4bit(adapter: Path, tokens: np.ndarray) -> np.ndarray:
    """PEFT's W_res beside a 4-bit base, in a float32 model, with the adapter."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    stored = LlamaForCausalLM.from_pretrained(
        BASE, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    layers = {name: layer for name, layer in stored.named_modules() if type(layer).__name__ == "Linear4bit"}
    for name, layer in layers.items():  # what PEFT starts from
        mine, theirs = values_by_definition(layer), peft.utils.integrations.dequantize_module_weight(layer).numpy()
        assert np.array_equal(mine, theirs), name
    PeftModel.from_pretrained(stored, adapter)
    model = load(BASE)
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = torch.from_numpy(values_by_definition(layer))
    plain = PeftModel.from_pretrained(model, adapter, config=plain_config(adapter))
    return logits_of(plain, tokens)


def plain_config(adapter: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(adapter)
    config.init_lora_weights = True
    return config


def main() -> None:
    torch.set_num_threads(1)
    write_keys()
    tokens = tokens_for(12, seed=105)
    base_logits = logits_of(load(BASE), tokens)
    for seed, (name, options) in enumerate(ADAPTERS.items(), start=31):
        torch.manual_seed(seed)
        model = get_peft_model(load(BASE), LoraConfig(task_type="CAUSAL_LM", **options))
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.data += 0.15 * torch.randn(parameter.shape)
        folder = HERE / "peft" / name
        save_adapter(model, folder)
        logits = logits_of(PeftModel.from_pretrained(load(BASE), folder), tokens)
        assert np.array_equal(logits, logits_of(model, tokens)), "the saved adapter gives other logits"
        plain = logits_of(PeftModel.from_pretrained(load(BASE), folder, config=plain_config(folder)), tokens)
        more = {"logits_nf4": logits_4bit(folder, tokens)} if name == "olora" else {}
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits, **more)
        print(
            f"{name}: from the base {np.abs(logits - base_logits).mean():.3f}, from the adapter on the whole base "
            f"{np.abs(logits - plain).mean():.3f}"
            + "".join(f", {key} {np.abs(value - logits).mean():.3f} off" for key, value in more.items())
        )


if __name__ == "__main__":
    main()
