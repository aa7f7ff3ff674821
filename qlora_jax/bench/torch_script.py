"""The rival of bench_train: a model of the same sizes trained by bitsandbytes + PEFT + transformers.

Reads a specification as JSON on stdin, prints what it measured as JSON on stdout. Stands alone (Python 3.10 or later,
none of this project's packages), so that it can run in an environment of its own:

    {"sizes": {D, F, L, N, K, H, V, context, norm_eps, rope_theta, tied},  letters as in models/config.py
     "quant": {format, block_size, double_quant}, "lora": {rank, alpha, dropout, use_rslora, targets},
     "batch": {G, B, T}, "optimizer": {learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm},
     "steps", "warmup", "seed", "gpu_bytes": bytes or null}

Choices, each what a user of these libraries gets or better: gradient checkpointing, sdpa attention, bitsandbytes' paged
32-bit AdamW (torch's AdamW on a CPU), bfloat16 under autocast (float32 on a CPU), norms, embeddings and head in that
dtype too. The model is made on torch's meta device; each linear layer is drawn on the device and quantized before the
next, so that a 16-bit model never exists. The peak is torch's allocator's: the paged optimizer's state is unified
memory, which is not in it. Exit status 3: something is missing here, or the memory ran out; stderr then
ends with one line.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Python looks beside a script first, and the bitsandbytes.py there is no library
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class CannotRun(Exception):
    """A reason, in one line."""


def main() -> int:
    spec = json.load(sys.stdin)
    try:
        versions = import_all()
        print(json.dumps({"versions": versions, "python": sys.version.split()[0]} | measure(spec)))
    except CannotRun as reason:
        print(reason, file=sys.stderr)
        return 3
    return 0


def import_all() -> dict[str, str]:
    """Their versions. Raises CannotRun that names the first that cannot be imported."""
    import importlib

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.import_module(name).__version__
        except Exception as error:  # a broken installation raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CannotRun(f"{name} cannot be imported by {sys.executable}: {reason}") from error
    return versions


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Makes the model, takes `warmup` + `steps` optimizer steps and times the latter."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda" and spec["gpu_bytes"]:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(spec["gpu_bytes"] / total, 1.0), device)
    torch.manual_seed(spec["seed"])
    try:
        model = with_adapter(random_model(spec, device, dtype), spec["lora"])
        timed = take_steps(model, spec, device, dtype)
    except torch.OutOfMemoryError as error:
        raise CannotRun(f"out of device memory: {str(error).splitlines()[0]}") from error
    batch = spec["batch"]
    tokens = batch["G"] * batch["B"] * batch["T"]
    on_gpu = device.type == "cuda"
    return timed | {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_second": tokens / statistics.median(timed["step_seconds"]),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linears_4bit": sum(is_4bit(module) for module in model.modules()),
    }


def random_model(spec: dict[str, Any], device: Any, dtype: Any) -> Any:
    """transformers' Llama of these sizes, random; its linear layers in 4 bits unless `quant` is null."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = spec["sizes"]
    config = LlamaConfig(
        hidden_size=s["D"],
        intermediate_size=s["F"],
        num_hidden_layers=s["L"],
        num_attention_heads=s["N"],
        num_key_value_heads=s["K"],
        head_dim=s["H"],
        vocab_size=s["V"],
        max_position_embeddings=max(s["context"], spec["batch"]["T"]),
        rms_norm_eps=s["norm_eps"],
        rope_theta=s["rope_theta"],
        tie_word_embeddings=s["tied"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, layer in [(name, layer) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]:
        if name != "lm_head" and spec["quant"]:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, random_linear(layer, spec["quant"], device, dtype))
    fill_others(model, device, dtype)
    model.is_loaded_in_4bit = bool(spec["quant"])  # what PEFT goes by
    model.config.use_cache = False
    # its older name is deprecated in transformers 5
    recompute = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    recompute({"use_reentrant": False})
    model.train()
    return model


def random_linear(layer: Any, quant: dict[str, Any], device: Any, dtype: Any) -> Any:
    """bitsandbytes' 4-bit layer of the same sizes; the 16-bit weight it is quantized from is gone afterwards."""
    import bitsandbytes
    import torch

    O, I = layer.out_features, layer.in_features
    made = bitsandbytes.nn.Linear4bit(I, O, bias=False, compute_dtype=dtype, device="meta")
    weight = torch.randn(O, I, device=device, dtype=dtype) / I**0.5
    made.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=quant["block_size"],
        compress_statistics=quant["double_quant"],
        quant_type=quant["format"],
        module=made,
    ).to(device)
    return made


def fill_others(model: Any, device: Any, dtype: Any) -> None:
    """Embeddings, head and norms, and the buffers that follow from the config."""
    import torch

    made: dict[int, Any] = {}  # a tied head is the embedding's own parameter
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in made:
                    is_norm = parameter.ndim == 1
                    shape = parameter.shape
                    value = torch.ones(shape) if is_norm else torch.randn(shape, device=device) / shape[-1] ** 0.5
                    made[id(parameter)] = torch.nn.Parameter(value.to(device, dtype), requires_grad=False)
                setattr(module, name, made[id(parameter)])
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CannotRun(f"this version of transformers has arrays that are not filled here: {', '.join(left[:3])}")


def with_adapter(model: Any, lora: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    model.enable_input_require_grads()
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        use_rslora=lora["use_rslora"],
        target_modules=lora["targets"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def take_steps(model: Any, spec: dict[str, Any], device: Any, dtype: Any) -> dict[str, Any]:
    """Optimizer steps over random tokens, all of them targets."""
    import torch

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, spec["optimizer"], device)
    batch, vocabulary = spec["batch"], spec["sizes"]["V"]
    limit = spec["optimizer"]["max_grad_norm"]
    gradient_seconds: list[float] = []
    update_seconds: list[float] = []
    losses: list[float] = []
    for step in range(spec["warmup"] + spec["steps"]):
        tokens = torch.randint(vocabulary, (batch["G"], batch["B"], batch["T"]), device=device)
        synchronize()
        begun, total = time.perf_counter(), 0.0
        for micro in tokens:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(input_ids=micro, labels=micro).loss / batch["G"]
            loss.backward()
            total = total + loss.detach()
        losses.append(float(total))
        synchronize()
        computed = time.perf_counter()
        if limit > 0:
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        if step >= spec["warmup"]:
            gradient_seconds.append(computed - begun)
            update_seconds.append(time.perf_counter() - computed)
    step_seconds = [sum(pair) for pair in zip(gradient_seconds, update_seconds)]  # noqa: B905 (Python 3.10 on)
    return {
        "optimizer": type(optimizer).__name__,
        "step_seconds": step_seconds,
        "gradient_seconds": statistics.median(gradient_seconds),
        "update_seconds": statistics.median(update_seconds),
        "losses": losses,
    }


def make_optimizer(parameters: list[Any], o: dict[str, Any], device: Any) -> Any:
    import bitsandbytes
    import torch

    how = {
        "lr": o["learning_rate"],
        "betas": (o["beta1"], o["beta2"]),
        "eps": o["eps"],
        "weight_decay": o["weight_decay"],
    }
    if device.type == "cuda":
        return bitsandbytes.optim.PagedAdamW32bit(parameters, **how)
    return torch.optim.AdamW(parameters, **how)


def is_4bit(module: Any) -> bool:
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


if __name__ == "__main__":
    sys.exit(main())
