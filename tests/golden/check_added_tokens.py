"""Loads a run with added tokens in PEFT and transformers: adapter, tokenizer, and the merged checkpoint.

peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.

    python tests/golden/check_added_tokens.py BASE_FOLDER ADAPTER_FOLDER MERGED_FOLDER EXPECTED.npz

EXPECTED.npz holds what qlora_jax computes in float32 with the adapter on the base as it is: tokens (integers [B, T], no
padding), logits (float [B, T, V]), a text that has the new tokens in it, and the text's ids. The base grows to the
tokenizer's length, as PEFT's AutoPeftModelForCausalLM makes it. Prints what differs and exits with 1 when logits of
adapter or merged checkpoint are more than 1e-4 off, ids differ, or the pad token is the end token.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def difference(model: torch.nn.Module, tokens: torch.Tensor, expected: torch.Tensor) -> float:
    actual = model.eval()(input_ids=tokens).logits
    return float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")


def main(base: str, adapter: str, merged: str, expected_file: str) -> int:
    torch.set_num_threads(1)
    with np.load(expected_file) as stored:
        tokens, expected = torch.from_numpy(stored["tokens"]).long(), torch.from_numpy(stored["logits"]).float()
        text, ids = str(stored["text"]), stored["ids"].tolist()
    problems = []
    for folder in (adapter, merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != ids:
            problems.append(f"{folder}: {text!r} has ids {found}, expected {ids}")
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            problems.append(
                f"{folder}: the pad token is {tokenizer.pad_token!r}, the end token {tokenizer.eos_token!r}"
            )
    model = load(base)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, adapter)
    resized = not model.peft_config["default"].modules_to_save  # matrices that did not train are the grown base's
    read = get_peft_model_state_dict(model, save_embedding_layers=resized)
    file = load_file(Path(adapter) / "adapter_model.safetensors")
    if file.keys() != read.keys() or any(not torch.equal(file[key], read[key]) for key in file):
        problems.append(f"tensors of the file and of PEFT's model differ: {sorted(file.keys() ^ read.keys())}")
    for name, one in (("adapter", model), ("merged", load(merged))):
        gap = difference(one, tokens, expected)
        print(f"{name}: largest difference {gap:.3e} (at most {TOLERANCE:.0e})")
        if gap > TOLERANCE:
            problems.append(f"{name}: logits differ")
    print("\n".join(problems) or f"ids, pad token {tokenizer.pad_token!r} and logits agree")
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
