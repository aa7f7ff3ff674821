"""Loads an adapter folder that qlora_jax wrote in PEFT and compares PEFT's logits with those in an .npz file.

peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.

    python tests/golden/check_peft.py BASE_FOLDER ADAPTER_FOLDER LOGITS.npz

LOGITS.npz holds tokens (integers [B, T], no padding) and logits (float [B, T, V]) as qlora_jax computes them in float32
from the same base and adapter. Prints the largest difference; exits with 1 when it is above 1e-4, when the adapter does
not change the base's logits, or when PEFT had to leave a tensor of the file unread. Adapters under the names of single
experts are fused by PEFT as it reads them: there the logits alone are compared.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


def main(base: str, adapter: str, logits_file: str) -> int:
    torch.set_num_threads(1)
    with np.load(logits_file) as stored:
        tokens, expected = torch.from_numpy(stored["tokens"]).long(), torch.from_numpy(stored["logits"]).float()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        model = PeftModel.from_pretrained(model, adapter).eval()
        actual = model(input_ids=tokens).logits
    file, read = load_file(Path(adapter) / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    is_fused = any(re.search(r"experts\.\d+\.", key) for key in file)
    same = (
        is_fused
        or file.keys() == read.keys()
        and all(torch.equal(file[key].float(), read[key].float()) for key in file)
    )
    difference = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    moved = float((actual - plain).abs().max())
    print(f"largest difference {difference:.3e} (at most {TOLERANCE:.0e}); the adapter alone moves {moved:.3e}")
    if not same:
        print(f"tensors of the file and of the model differ: {sorted(file.keys() ^ read.keys()) or 'in value'}")
    return 0 if same and moved > 0 and difference <= TOLERANCE else 1


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
