"""Makes peft/{all_linear_r4,qv_rslora_r2}/: adapters saved by PEFT on llama/llama1, with the logits PEFT gives.

peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU, one thread), Python 3.11. Run make_llama.py first.

    python tests/golden/make_peft.py

Each folder: adapter_config.json and adapter_model.safetensors as `save_pretrained` writes them, random nonzero A and B,
and logits.npz {tokens int32 [2, T], logits float32 [2, T, V]} in evaluation mode, float32 throughout.

    all_linear_r4   target_modules "all-linear", r 4, alpha 8: scale 2
    qv_rslora_r2    query and value only, r 2, alpha 3, rank-stabilised: scale 3 / sqrt(2)
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from make_llama import load, logits_of, tokens_for
from peft import LoraConfig, PeftModel, get_peft_model

HERE = Path(__file__).parent
BASE = HERE / "llama" / "llama1"
ADAPTERS: dict[str, dict] = {
    "all_linear_r4": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1},
    "qv_rslora_r2": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}


def save_adapter(model: PeftModel, folder: Path, base: str = BASE.name) -> None:
    """PEFT's own files without the README, and with no path of this machine in adapter_config.json."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT looks the base up on the hub
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])  # PEFT writes a set, in no fixed order
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    torch.set_num_threads(1)
    tokens = tokens_for(24, seed=101)
    base_logits = logits_of(load(BASE), tokens)
    for seed, (name, options) in enumerate(ADAPTERS.items(), start=11):
        torch.manual_seed(seed)
        model = get_peft_model(load(BASE), LoraConfig(task_type="CAUSAL_LM", **options))
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.data = 0.15 * torch.randn(parameter.shape)
        logits = logits_of(model, tokens)
        folder = HERE / "peft" / name
        save_adapter(model, folder)
        again = logits_of(PeftModel.from_pretrained(load(BASE), folder), tokens)
        assert np.array_equal(logits, again), "the saved adapter gives other logits"
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
        print(f"{name}: from the base {np.abs(logits - base_logits).mean():.3f}")


if __name__ == "__main__":
    main()
