"""Makes train/: six steps of QLoRA training on llama/llama1 in torch, transformers and PEFT.

peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU, one thread), Python 3.11. Run make_llama.py first.

    python tests/golden/make_train.py

The rule: each step has B = 8 rows, taken as two micro-batches of four (rows 0-3, then 4-7) whose gradients add up;
token t counts when loss_mask[t] is true and is predicted from tokens before it (position 0 never counts, nothing is
padding); the step's loss is the summed cross-entropy over the number of counted tokens of all eight rows. Gradients are
scaled by max_norm / norm when their global norm is above max_norm (no epsilon); AdamW with learning rate 1e-2, betas
0.9 and 0.999, epsilon 1e-8, no weight decay, no schedule. LoRA r 4, alpha 8, all linear layers but the head, dropout 0.
All in float32.

    batches.npz        tokens int32 [6, 8, 16], loss_mask bool [6, 8, 16]
    init/              the starting adapter in PEFT's form (A uniform, B zero)
    VARIANT/           adapter_config.json, adapter_model.safetensors after the last step, and
                       steps.npz {loss float32 [6], grad_norm float32 [6] (before clipping), max_norm float32 [],
                       adapter_difference_float64 float32 []}

    base32                   llama1 as stored, max_norm 0.3: every step is clipped
    base32_seldom_clipped    the same with max_norm 1.2: two steps of six are clipped
    nf4_dq                   llama1's 14 linear layers replaced by their NF4 + double-quantized values, blocks of 64,
                             in float32, by definition.py; max_norm 0.3

adapter_difference_float64: the largest difference of any adapter value when the same steps run in float64, the floor
below which no comparison can go.
"""

from pathlib import Path

import definition
import numpy as np
import torch
from make_llama import load
from make_peft import BASE, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model

HERE = Path(__file__).parent
STEPS, BATCH, LENGTH, MICRO_BATCHES = 6, 8, 16, 2
LEARNING_RATE = 1e-2
VARIANTS = {"base32": (False, 0.3), "nf4_dq": (True, 0.3), "base32_seldom_clipped": (False, 1.2)}


def make_batches() -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 [steps, B, T] and loss_mask bool [steps, B, T]; the first micro-batch counts far fewer tokens."""
    rng = np.random.default_rng(7)
    start, stride = rng.integers(3, 96, (STEPS, BATCH, 1)), rng.integers(1, 5, (STEPS, BATCH, 1))
    tokens = (3 + (start + stride * np.arange(LENGTH)) % 93).astype(np.int32)  # something that can be learnt
    tokens[:, :, 0] = 1
    mask = np.zeros(tokens.shape, bool)
    half = BATCH // MICRO_BATCHES
    for step in range(STEPS):
        mask[step, step % half, LENGTH - 1 - step % 3 :] = True  # one to three tokens in one row of four
        for row in range(half, BATCH):
            mask[step, row, int(rng.integers(1, 8)) :] = True
    mask[:, half, 0] = True  # position 0 has nothing before it: must not count
    return tokens, mask


def quantize_base(model: torch.nn.Module) -> None:
    """Replaces every linear weight but the head's by its NF4 + double-quantized values."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = torch.from_numpy(definition.nf4_double_quantized(parameter.detach().numpy()))


def train(model: PeftModel, tokens: np.ndarray, mask: np.ndarray, max_norm: float) -> tuple[list[float], list[float]]:
    """Trains in place; losses and gradient norms before clipping, one a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    model.train()
    for step_tokens, step_mask in zip(torch.from_numpy(tokens).long(), torch.from_numpy(mask), strict=True):
        targets = int(step_mask[:, 1:].sum())
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for rows, counted in zip(step_tokens.chunk(MICRO_BATCHES), step_mask.chunk(MICRO_BATCHES), strict=True):
            log_probabilities = model(input_ids=rows).logits[:, :-1].log_softmax(dim=-1)
            picked = log_probabilities.gather(-1, rows[:, 1:, None])[..., 0]
            part = -(picked * counted[:, 1:]).sum() / targets
            part.backward()
            loss += part.item()
        norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in parameters))
        if norm > max_norm:
            for parameter in parameters:
                parameter.grad *= max_norm / norm
        optimizer.step()
        losses.append(loss)
        norms.append(float(norm))
    return losses, norms


def adapter_values(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for name, p in model.named_parameters() if "lora_" in name])


def main() -> None:
    torch.set_num_threads(1)
    folder = HERE / "train"
    folder.mkdir(exist_ok=True)
    tokens, mask = make_batches()
    np.savez_compressed(folder / "batches.npz", tokens=tokens, loss_mask=mask)
    torch.manual_seed(3)
    options = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    save_adapter(get_peft_model(load(BASE), options), folder / "init")
    for variant, (quantized, max_norm) in VARIANTS.items():
        runs = {}
        for dtype in (torch.float64, torch.float32):
            base = load(BASE)
            if quantized:
                quantize_base(base)
            model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True).to(dtype)
            losses, norms = train(model, tokens, mask, max_norm)
            runs[dtype] = adapter_values(model)
        difference = float((runs[torch.float32] - runs[torch.float64]).abs().max())
        save_adapter(model, folder / variant)
        np.savez_compressed(
            folder / variant / "steps.npz",
            loss=np.array(losses, np.float32),
            grad_norm=np.array(norms, np.float32),
            max_norm=np.float32(max_norm),
            adapter_difference_float64=np.float32(difference),
        )
        print(f"{variant}: loss {np.round(losses, 4)}, norm {np.round(norms, 4)}, float64 differs by {difference:.1e}")
    counts = mask[:, :, 1:].reshape(STEPS, MICRO_BATCHES, -1).sum(-1)
    print("counted tokens a micro-batch:", counts.tolist())


if __name__ == "__main__":
    main()
