"""The rival of bench_generate: transformers' generate() on a model of the same sizes, 4-bit (bitsandbytes) or dense.

Reads a specification as JSON on stdin, prints what it measured as JSON on stdout; stands alone as torch_script.py does,
whose random model it takes:

    {"sizes", "quant": as there, or null for 16-bit weights, "lora": as there, or null, "batch": {T: room of the cache},
     "rows": [1, 8], "prompt": tokens, "tokens": [few, many] new ones, "repeats", "seed"}

Choices, each what a user of these libraries gets: greedy, a dynamic cache, sdpa attention, bfloat16 (float32 on a CPU),
nothing compiled. A token's time is the slope between few and many new tokens: neither reading the prompt nor the call
is in it.
"""

import importlib
import json
import statistics
import sys
import time
from typing import Any


def main() -> int:
    script: Any = importlib.import_module("torch_script")  # beside this file, where nothing is looked for from then on
    spec = json.load(sys.stdin)
    if not spec["quant"]:
        script.PACKAGES = tuple(name for name in script.PACKAGES if name != "bitsandbytes")
    try:
        versions = script.import_all()
        print(json.dumps({"versions": versions, "python": sys.version.split()[0]} | measure(spec, script)))
    except script.CannotRun as reason:
        print(reason, file=sys.stderr)
        return 3
    return 0


def measure(spec: dict[str, Any], script: Any) -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(spec["seed"])
    try:
        model = script.random_model(spec, device, dtype)
        if spec["lora"]:
            model = script.with_adapter(model, spec["lora"])
        model.gradient_checkpointing_disable()
        model.config.use_cache = True
        model.eval()
        seconds = {str(rows): token_seconds(model, spec, rows, device) for rows in spec["rows"]}
    except torch.OutOfMemoryError as error:
        raise script.CannotRun(f"out of device memory: {str(error).splitlines()[0]}") from error
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "token_seconds": seconds,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def token_seconds(model: Any, spec: dict[str, Any], rows: int, device: Any) -> float:
    """Of one token of all rows: the median slope."""
    import torch

    prompt = torch.randint(spec["sizes"]["V"], (rows, spec["prompt"]), device=device)
    few, many = spec["tokens"]

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    seconds(few)
    slopes = [(seconds(many) - seconds(few)) / (many - few) for _ in range(spec["repeats"])]
    return statistics.median(slopes)


if __name__ == "__main__":
    sys.exit(main())
