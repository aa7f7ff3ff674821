"""Makes mixtures/: adapters of experts as PEFT has them, and a mixture's gradients and auxiliary loss in torch.

transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU, one thread), Python 3.11. Run make_families.py first.

    python tests/golden/make_mixtures.py [NAME ...]

    NAME/adapter/      of families/NAME, saved by PEFT: rank 2 and alpha 4 on the attention and, by target_parameters,
                       on mlp.experts.gate_up_proj and mlp.experts.down_proj
    NAME/logits.npz    tokens int32 [1, T], logits float32 [1, T, V] with it
    mxfp4/             a gpt-oss whose experts lie in MXFP4, as OpenAI's files do: random bytes, scales 2^-6 to 2^-3;
                       logits.npz as above, of transformers with Mxfp4Config(dequantize=True)
    gradients.npz      of families/qwen3_moe_a: tokens int32 [2, T], loss_mask bool [2, T] (the second row ends before
                       its padding), adapters "NAME.A" [L, E, 2, I], "NAME.B" [L, E, O, 2] (no E in attention), scale 2;
                       loss and auxiliary loss float32 []; "plain/NAME.A", ... the gradient of the loss (the mean
                       over counted tokens), "balanced/NAME.A", ... of loss + 0.1 auxiliary loss, as transformers adds
                       it with output_router_logits and an attention mask without the padding
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_families import fill
from make_llama import logits_of
from make_peft import save_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
T, SCALE, COEFFICIENT = 20, 2.0, 0.1


def load(name: str) -> torch.nn.Module:
    folder = HERE / "families" / name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def make_adapter(name: str, seed: int) -> None:
    folder = HERE / "mixtures" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = LoraConfig(r=2, lora_alpha=4, target_modules=[*ATTENTION], target_parameters=parameters)
    options.task_type = "CAUSAL_LM"
    model = get_peft_model(load(name), options)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    tokens = np.random.default_rng(seed).integers(3, model.config.vocab_size, (1, T)).astype(np.int32)
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits_of(model, tokens))
    save_adapter(model, folder / "adapter", name)


def make_mxfp4() -> None:
    folder = HERE / "mixtures" / "mxfp4"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = {
        "vocab_size": 40, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    fill(model, 9)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(9)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, I, O = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.from_numpy(rng.integers(0, 256, (E, O, I // 32, 16), np.uint8))
        tensors[f"{key}_scales"] = torch.from_numpy(rng.integers(121, 125, (E, O, I // 32), np.uint8))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.Mxfp4Config(dequantize=True), **options
    )
    tokens = rng.integers(3, 40, (1, T)).astype(np.int32)
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=(logits := logits_of(model, tokens)))
    for file in folder.iterdir():
        file.chmod(0o644)
    print(f"mxfp4: std {logits.std():.2f}, {next(model.parameters()).dtype}")


def make_gradients() -> None:
    model = load("qwen3_moe_a")
    c, generator = model.config, torch.Generator().manual_seed(5)
    L, E, D, F = c.num_hidden_layers, c.num_experts, c.hidden_size, c.moe_intermediate_size
    NH, KH = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"q_proj": (NH, D), "k_proj": (KH, D), "v_proj": (KH, D), "o_proj": (D, NH)}
    shapes |= {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    adapters: dict[str, torch.Tensor] = {}
    for name, (O, I) in shapes.items():
        room = (L,) if name in ATTENTION else (L, E)
        adapters[f"{name}.A"] = 0.3 * torch.randn((*room, 2, I), generator=generator)
        adapters[f"{name}.B"] = 0.3 * torch.randn((*room, O, 2), generator=generator)
    rng = np.random.default_rng(5)
    tokens = rng.integers(3, c.vocab_size, (2, T)).astype(np.int32)
    mask = rng.random((2, T)) < 0.7
    mask[0, -1], mask[1, 13], mask[1, 14:] = True, True, False
    attention_mask = torch.ones(2, T, dtype=torch.long)
    attention_mask[1, 14:] = 0

    def losses(arrays: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        delta = {name: SCALE * arrays[f"{name}.B"] @ arrays[f"{name}.A"] for name in shapes}
        weights = dict(model.named_parameters())
        for index in range(L):
            layer = f"model.layers.{index}"
            for name in ATTENTION:
                key = f"{layer}.self_attn.{name}.weight"
                weights[key] = weights[key] + delta[name][index]
            both = torch.cat([delta["gate_proj"][index], delta["up_proj"][index]], dim=1)
            for name, more in (("gate_up_proj", both), ("down_proj", delta["down_proj"][index])):
                key = f"{layer}.mlp.experts.{name}"
                weights[key] = weights[key] + more
        options = {"attention_mask": attention_mask, "output_router_logits": True}
        out = torch.func.functional_call(model, weights, (torch.from_numpy(tokens).long(),), options)
        log_probabilities = out.logits[:, :-1].log_softmax(-1)
        labels, counted = torch.from_numpy(tokens).long()[:, 1:, None], torch.from_numpy(mask)[:, 1:]
        nll = -log_probabilities.gather(-1, labels)[..., 0]
        return (nll * counted).sum() / counted.sum(), out.aux_loss

    found = {"tokens": tokens, "loss_mask": mask} | {name: array.numpy().copy() for name, array in adapters.items()}
    for kind, coefficient in (("plain", 0.0), ("balanced", COEFFICIENT)):
        arrays = {name: array.clone().requires_grad_() for name, array in adapters.items()}
        loss, uneven = losses(arrays)
        (loss + coefficient * uneven).backward()
        found |= {f"{kind}/{name}": array.grad.numpy() for name, array in arrays.items()}
    found |= {"loss": loss.detach().numpy(), "auxiliary": uneven.detach().numpy()}
    np.savez_compressed(HERE / "mixtures" / "gradients.npz", **found)
    print(f"loss {float(loss):.4f}, auxiliary {float(uneven):.4f}")


def main() -> None:
    torch.set_num_threads(1)
    for seed, name in enumerate(("qwen3_moe_a", "mixtral_a"), start=1):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make_adapter(name, seed)
    if not sys.argv[1:] or "mxfp4" in sys.argv[1:]:
        make_mxfp4()
    if not sys.argv[1:] or "gradients" in sys.argv[1:]:
        make_gradients()


if __name__ == "__main__":
    main()
