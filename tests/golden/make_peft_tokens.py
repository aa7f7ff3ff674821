"""Makes peft/{modules_to_save,modules_to_save_tied}/: adapters with whole embedding and head, grown by two tokens.

peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU, one thread), Python 3.11. Run make_llama.py first.

    python tests/golden/make_peft_tokens.py

The base (llama/llama1, and the tied llama/llama3) grows by two rows, as for two added tokens; query and value carry
LoRA of r 2, alpha 3; every trained array is random. Files and logits.npz as make_peft.py's; tokens use the new ids.
"""

from pathlib import Path

import numpy as np
import torch
from make_llama import load, logits_of, tokens_for
from make_peft import save_adapter
from peft import LoraConfig, PeftModel, get_peft_model

HERE = Path(__file__).parent
ADAPTERS = {"modules_to_save": "llama1", "modules_to_save_tied": "llama3"}


def grown(base: Path):
    """The base with two more rows in embedding and head."""
    model = load(base)
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    return model


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, base) in enumerate(ADAPTERS.items(), start=21):
        torch.manual_seed(seed)
        folder = HERE / "llama" / base
        options = LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"],
            modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=name.endswith("_tied"),
        )  # fmt: skip
        model = get_peft_model(grown(folder), options)
        V = model.config.vocab_size
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        tokens = tokens_for(24, seed=103)
        tokens[:, ::5] = np.asarray([[V - 2], [V - 1]])
        logits = logits_of(model, tokens)
        out = HERE / "peft" / name
        save_adapter(model, out, base)
        again = logits_of(PeftModel.from_pretrained(grown(folder), out), tokens)
        assert np.array_equal(logits, again), "the saved adapter gives other logits"
        np.savez_compressed(out / "logits.npz", tokens=tokens, logits=logits)
        print(f"{name}: {V} rows, logits of {np.abs(logits).mean():.3f}")


if __name__ == "__main__":
    main()
