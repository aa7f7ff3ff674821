"""Lets peft and transformers read what qlora_jax wrote of a T5: an adapter, and the folder that it was merged into.

    python tests/golden/check_t5.py BASE ADAPTER MERGED LOGITS.npz

BASE: one of t5/NAME. LOGITS.npz: float32 [3, T, V] "logits" that qlora_jax gives with the adapter for the rows of
BASE/golden.npz. MERGED: written in float32, or "none".
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_t5 import logits_of, padded
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

TOLERANCE = 1e-4


def load(folder: str) -> torch.nn.Module:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def main(base: str, adapter: str, merged: str, logits_file: str) -> int:
    torch.set_num_threads(1)
    tokens, expected = np.load(Path(base) / "golden.npz")["tokens"], np.load(logits_file)["logits"]
    found = {"base": load(base)}
    found["adapter"] = PeftModel.from_pretrained(load(base), adapter).eval()
    file = load_file(Path(adapter) / "adapter_model.safetensors")
    read = get_peft_model_state_dict(found["adapter"])
    same = file.keys() == read.keys() and all(torch.equal(file[key], read[key]) for key in file)
    if merged != "none":
        found["merged"] = load(merged)
    T = tokens.shape[1]
    away = {name: np.abs(padded(logits_of(model, tokens)[0], T) - expected).max() for name, model in found.items()}
    print(", ".join(f"{name}: largest difference {value:.3e}" for name, value in away.items()), f"tensors: {same}")
    fits = all(value <= TOLERANCE for name, value in away.items() if name != "base")
    return 0 if same and fits and away["base"] > TOLERANCE else 1


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
