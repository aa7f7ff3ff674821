"""Makes roberta/{masked,regression}/: tiny random RoBERTa checkpoints, PEFT adapters on them, logits and gradients.

transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU, one thread), Python 3.11.

    python tests/golden/make_roberta.py

    masked       RobertaForMaskedLM in bfloat16, whose head and pooler nothing reads; the adapter is on all linear
                 layers, for three classes
    regression   RobertaForSequenceClassification of one label in float32, with two token types and another pad token;
                 the adapter is on query and value, and its head is another than the checkpoint's

Each folder: config.json, model.safetensors, adapter/ (SEQ_CLS, classifier in modules_to_save), and rows.npz: tokens
int32 [4, 12] (pairs `<s> A </s></s> B </s>` and single texts, padded at the right, a pad token inside one of them),
lengths int32 [4], labels [4], logits [4, labels] with the adapter, loss [] and its gradients under PEFT's keys; of
regression also `base`, the checkpoint's own logits. All in float32 arithmetic, without dropout.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_peft import save_adapter
from peft import LoraConfig, get_peft_model
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

HERE = Path(__file__).parent / "roberta"
COMMON: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "masked": {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 26, "type_vocab_size": 1, "pad_token_id": 1,
    },
    "regression": {
        "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
        "max_position_embeddings": 36, "type_vocab_size": 2, "pad_token_id": 3, "num_labels": 1,
    },
}  # fmt: skip
TARGETS = {"masked": "all-linear", "regression": ["query", "value"]}
LABELS = {"masked": [2, 0, 1, 2], "regression": [0.5, -1.25, 3.8, 2.0]}
WORDS = ((4, 0), (3, 3), (6, 0), (2, 4))  # of A and B in each row; 0: no pair


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Random values large enough that every part moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.15 if "query" in name or "key" in name else 1.0 if "word" in name else 0.4
        parameter.copy_(0.8 + 0.3 * noise if name.endswith("LayerNorm.weight") else scale * noise)


def rows(settings: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [4, 12] and lengths [4]."""
    generator, pad = np.random.default_rng(seed), settings["pad_token_id"]
    tokens, lengths = np.full((4, 12), pad, np.int32), []
    for row, (a, b) in zip(tokens, WORDS, strict=True):
        words = generator.integers(4, settings["vocab_size"], a + b).tolist()
        found = [0, *words[:a], 2, *([2, *words[a:], 2] if b else [])]
        row[: len(found)] = found
        lengths.append(len(found))
    tokens[2, 3] = pad  # the text of the pad token, which transformers gives no position
    return tokens, np.asarray(lengths, np.int32)


def make(name: str, seed: int) -> None:
    folder, settings = HERE / name, SHAPES[name]
    shutil.rmtree(folder, ignore_errors=True)
    family = RobertaForMaskedLM if name == "masked" else RobertaForSequenceClassification
    model = family(RobertaConfig(**COMMON, **settings))
    fill(model, seed)
    model.tie_weights()
    model.to(torch.bfloat16 if name == "masked" else torch.float32).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens, lengths = rows(settings, seed)
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.arange(12)[None] < torch.tensor(lengths)[:, None],
    }
    labels = 1 if name == "regression" else 3
    arrays = {"tokens": tokens, "lengths": lengths, "labels": np.asarray(LABELS[name])}

    def load() -> torch.nn.Module:
        return RobertaForSequenceClassification.from_pretrained(
            folder, num_labels=labels, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    if name == "regression":
        with torch.no_grad():
            arrays["base"] = load()(**inputs).logits.numpy()
    options = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name], task_type="SEQ_CLS")
    model = get_peft_model(load(), options).eval()
    generator = torch.Generator().manual_seed(seed)
    for part, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            scale = 0.1 if "classifier.dense" in part else 0.3
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    out = model(**inputs, labels=torch.tensor(LABELS[name]))
    out.loss.backward()
    arrays |= {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
    for part, parameter in model.named_parameters():
        if parameter.grad is not None:
            key = part.replace(".default", "").replace(".modules_to_save", "")
            arrays[f"grad {key}"] = parameter.grad.numpy()
    save_adapter(model, folder / "adapter", name)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    np.savez_compressed(folder / "rows.npz", **arrays)
    print(f"{name}: std over rows {arrays['logits'].std(0).round(2).tolist()}, loss {arrays['loss']:.3f}")


def main() -> None:
    torch.set_num_threads(1)
    for seed, name in enumerate(SHAPES, start=1):
        make(name, seed)


if __name__ == "__main__":
    main()
