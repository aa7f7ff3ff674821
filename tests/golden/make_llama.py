"""Makes llama/NAME/: tiny random Llama checkpoints as transformers writes them, with the logits transformers gives.

transformers 5.23.0, torch 2.13.0 (CPU, one thread), safetensors 0.8.0, Python 3.11.

    python tests/golden/make_llama.py

Each folder: config.json, *.safetensors (llama2: several with model.safetensors.index.json), generation_config.json, and
logits.npz {tokens int32 [2, T], logits float32 [2, T, V]}: full causal attention, no padding, float32 arithmetic from
the stored weights, whatever their dtype.

    llama1         multi-head, untied, float32; config.json as Llama 1's: no num_key_value_heads, no rope keys
    llama2         grouped-query, untied, bfloat16, sharded; F = 170 makes blocks cross rows and the last one ragged
    llama3         grouped-query, rope scaling "llama3" over an original context of 16, tied, bfloat16; config.json as
                   transformers 5 writes it (rope_parameters, dtype), config_old_style.json the same with rope_scaling
    linear_rope    linear rope scaling under its oldest key ("type"), grouped-query, untied, one layer, bfloat16
    head_dim       head width 12 where D / N is 8, grouped-query, untied, float16, transformers 5's config.json
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
ROPE_KEYS = ("rope_parameters",)
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SPECS: dict[str, dict] = {
    "llama1": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-6,
        },
        "dtype": torch.float32,
        "length": 24,
        "drop": ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "mlp_bias", *ROPE_KEYS),
    },
    "llama2": {
        "config": {
            "hidden_size": 48,
            "intermediate_size": 170,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        "dtype": torch.bfloat16,
        "length": 24,
        "shard": "48KB",
        "drop": ("head_dim", *ROPE_KEYS),
        "add": {"rope_theta": 5000.0, "rope_scaling": None},
    },
    "llama3": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
        },
        "dtype": torch.bfloat16,
        "length": 40,
    },
    "linear_rope": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        "dtype": torch.bfloat16,
        "length": 24,
        "drop": ("head_dim", *ROPE_KEYS),
        "add": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    },
    "head_dim": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "dtype": torch.float16,
        "length": 24,
    },
}


def fill(model: LlamaForCausalLM, seed: int) -> None:
    """Random weights large enough that every layer moves the logits, which stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name else (0.6 if "embed" in name else 0.2) * noise


def old_style(folder: Path, drop: tuple[str, ...], add: dict) -> str:
    """config.json rewritten as transformers 4 wrote it: torch_dtype, and rope keys at the top level."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config = {key: value for key, value in config.items() if key not in drop} | add
    config["transformers_version"] = "4.31.0"
    return json.dumps(dict(sorted(config.items())), indent=2) + "\n"


def tokens_for(length: int, seed: int) -> np.ndarray:
    """int32 [2, T], each row begun with BOS."""
    tokens = np.random.default_rng(seed).integers(3, COMMON["vocab_size"], (2, length)).astype(np.int32)
    tokens[:, 0] = 1
    return tokens


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    return model.eval()(input_ids=torch.from_numpy(tokens).long()).logits.numpy().astype(np.float32)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, spec) in enumerate(SPECS.items(), start=1):
        folder = HERE / "llama" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = LlamaForCausalLM(LlamaConfig(**COMMON, **spec["config"]))
        fill(model, seed)
        model.to(spec["dtype"]).save_pretrained(folder, max_shard_size=spec.get("shard", "5GB"))
        tokens = tokens_for(spec["length"], seed)
        logits = logits_of(load(folder), tokens)
        if "drop" in spec:
            (folder / "config.json").write_text(old_style(folder, spec["drop"], spec.get("add", {})))
        if name == "llama3":
            scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
            old = old_style(folder, ROPE_KEYS, {"rope_theta": 500.0, "rope_scaling": scaling})
            kept = (folder / "config.json").read_text()
            (folder / "config.json").write_text(old)
            assert np.array_equal(logits, logits_of(load(folder), tokens)), "llama3's old config reads otherwise"
            (folder / "config.json").write_text(kept)
            (folder / "config_old_style.json").write_text(old)
        assert np.array_equal(logits, logits_of(load(folder), tokens)), f"{name}: the rewritten config reads otherwise"
        model = load(folder)
        model.model.rotary_emb.inv_freq = 1e4 ** -(torch.arange(0, 1, 2 / model.model.layers[0].self_attn.head_dim))
        plain_rope = float(np.abs(logits_of(model, tokens) - logits).max())
        assert plain_rope > 0.05 or name == "llama1", f"{name}: its rope makes no difference"
        for file in folder.iterdir():
            file.chmod(0o644)
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
        exact = logits_of(load(folder, torch.float64), tokens)
        float64 = float(np.abs(exact - logits).max())
        print(f"{name}: std {logits.std():.2f}, float64 differs by {float64:.1e}, plain rope by {plain_rope:.2f}")


if __name__ == "__main__":
    main()
