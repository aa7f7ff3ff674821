"""Makes t5/NAME/: tiny random T5 and mT5 checkpoints as transformers writes them, and what it computes with them.

transformers 5.23.0, torch 2.13.0 (CPU, one thread), peft 0.21.2, safetensors 0.8.0, Python 3.11.

    python tests/golden/make_t5.py

Each folder: config.json, model.safetensors in bfloat16, and golden.npz, of float32 arithmetic from the stored weights:

    tokens int32 [3, T], loss_mask bool [3, T]     prompts and answers of three lengths, padded at the right with 0
    logits float32 [3, T, V]                       of the answers' tokens, the first in front; zero where there are none
    loss float32 []                                summed over the answers' tokens
    generated int32 [3, 12]                        greedy, after the start token; 0 behind an end token

The adapter/ of the first two was saved by PEFT with target_modules "all-linear", and in golden.npz, the last of v11:

    adapted float32 [3, T, V]                      logits with it
    gradient/KEY float32                           of the loss with it, by the keys of adapter_model.safetensors,
                                                   computed in float64: in float32 torch is off by 2e-4 of the largest

buckets.npz: distances int32 [n], and the buckets of T5Attention for both kinds of stacks and two settings.

    v10     T5 1.0: relu, tied head with its scale           longer than max_distance
    v11     T5 1.1: gated gelu, a head of its own            other head width than D / N, decoder of other depth
    mt5     mT5: as v11                                      tied by its config, a head of its own in the file
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_families import fill
from make_peft import save_adapter
from peft import LoraConfig, get_peft_model
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).parent
FOLDER = HERE / "t5"
SOURCES, ANSWERS = (30, 7, 18), (9, 14, 5)  # tokens
NEW = 12
SHARED = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip
OTHER = SHARED | {
    "vocab_size": 41, "d_model": 24, "d_kv": 12, "num_layers": 3, "num_heads": 4, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 12,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v10": ("T5", SHARED),
    "v11": ("T5", OTHER),
    "mt5": ("MT5", SHARED | {"feed_forward_proj": "gated-gelu"}),
}
ADAPTED = ("v10", "v11")


def batch(V: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    T = max(source + answer for source, answer in zip(SOURCES, ANSWERS, strict=True)) + 2
    tokens, mask = np.zeros((3, T), np.int32), np.zeros((3, T), bool)
    for row, (source, answer) in enumerate(zip(SOURCES, ANSWERS, strict=True)):
        tokens[row, : source + answer] = rng.integers(2, V, source + answer)
        tokens[row, [source - 1, source + answer - 1]] = 1
        mask[row, source : source + answer] = True
    return tokens, mask


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [3, T, V] of all answers in one padded batch, and the summed loss."""
    S, T = max(SOURCES), max(ANSWERS)
    source, labels = np.zeros((3, S), np.int64), np.full((3, T), -100, np.int64)
    for row, (length, answer) in enumerate(zip(SOURCES, ANSWERS, strict=True)):
        source[row, :length], labels[row, :answer] = tokens[row, :length], tokens[row, length : length + answer]
    seen = torch.from_numpy((np.arange(S) < np.array(SOURCES)[:, None]).astype(np.int64))
    given = {"input_ids": torch.from_numpy(source), "attention_mask": seen, "labels": torch.from_numpy(labels)}
    out = model(**given)
    return out.logits, out.loss * (labels != -100).sum()


def padded(logits: torch.Tensor, T: int) -> np.ndarray:
    found = np.zeros((3, T, logits.shape[-1]), np.float32)
    for row, answer in enumerate(ANSWERS):
        found[row, :answer] = logits[row, :answer].detach().numpy()
    return found


def generated(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Greedy, row by row."""
    found = np.zeros((3, NEW), np.int32)
    for row, length in enumerate(SOURCES):
        source = torch.from_numpy(tokens[row : row + 1, :length]).long()
        ids = model.generate(source, max_new_tokens=NEW, do_sample=False, num_beams=1)[0, 1:]
        found[row, : len(ids)] = ids.numpy()
    return found


def load(family: type, folder: Path) -> torch.nn.Module:
    return family.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(name: str, prefix: str, settings: dict[str, Any], seed: int) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    family = getattr(transformers, f"{prefix}ForConditionalGeneration")
    model = family(config)
    if name != "v10":
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
    fill(model, seed)
    with torch.no_grad():
        model.shared.weight.normal_(generator=torch.Generator().manual_seed(seed))
    if name == "v10":
        model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens, mask = batch(config.vocab_size, seed)
    T = tokens.shape[1]
    model = load(family, folder)
    logits, loss = logits_of(model, tokens)
    arrays: dict[str, Any] = {"tokens": tokens, "loss_mask": mask, "logits": padded(logits, T)}
    arrays |= {"loss": np.float32(loss.item()), "generated": generated(model, tokens)}
    if name in ADAPTED:
        options = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, options)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        arrays["adapted"] = padded(logits_of(model.eval(), tokens)[0], T)
        save_adapter(model, folder / "adapter", name)
        logits_of(model.double(), tokens)[1].backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and name == "v11":
                arrays[f"gradient/{key.replace('.default', '')}"] = parameter.grad.numpy().astype(np.float32)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
    np.savez_compressed(folder / "golden.npz", **arrays)
    print(f"{name}: std {arrays['logits'].std():.2f}, loss {arrays['loss']:.3f}\n{arrays['generated']}")


def buckets() -> None:
    distances = torch.arange(-700, 701)
    arrays: dict[str, Any] = {"distances": distances.numpy().astype(np.int32)}
    for count, most in ((32, 128), (12, 20)):
        for stack, both in (("encoder", True), ("decoder", False)):
            found = T5Attention._relative_position_bucket(distances, both, count, most)
            arrays[f"{stack}_{count}_{most}"] = found.numpy().astype(np.int32)
    np.savez_compressed(FOLDER / "buckets.npz", **arrays)


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (prefix, settings)) in enumerate(CASES.items(), start=1):
        make(name, prefix, settings, seed)
    buckets()


if __name__ == "__main__":
    main()
