"""Makes int8.npz and bnb8bit/{llama,skip}/: LLM.int8() weights and products of bitsandbytes' CPU path.

transformers 5.23.0, bitsandbytes 0.50.2 (CPU), torch 2.13.0, accelerate 1.15.0, Python 3.11. Run make_llama.py first.

    python tests/golden/make_int8.py

int8.npz, bfloat16 arrays as their bits (uint16). Weights as `Int8Params` quantizes them, NAME one of weights() below:
    NAME/weight                [O, I], float32, float16 or bfloat16
    NAME/codes, NAME/absmax    int8 [O, I], float32 [O]
    NAME/values                float32 [O, I], `int8_vectorwise_dequant` (of odd ones)
Products with NAME/weight = square_float16 or wide_float32, CASE one of activations() below, by `MatMul8bitLt`:
    CASE/x, CASE/dy            [M, I], [M, O]
    CASE/y, CASE/dx            y of x, and the gradient of sum(y * dy)
    CASE/threshold             float32 []
bnb8bit/llama is what `save_pretrained` of llama/llama2, loaded with load_in_8bit, writes; skip has
llm_int8_skip_modules and a threshold of its own. logits.npz beside each: tokens int32 [2, T], logits float32
[2, T, V] of that model in float32, in eval mode (in training mode the CPU path multiplies by dequantized weights), and
dense, the same of a model whose weights are the dequantized ones.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from bitsandbytes import MatmulLtState
from bitsandbytes.autograd._functions import MatMul8bitLt
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params
from make_llama import logits_of
from transformers import BitsAndBytesConfig, LlamaForCausalLM

HERE = Path(__file__).parent
BASE = HERE / "llama" / "llama2"
FOLDERS = {"llama": (None, 6.0), "skip": (["self_attn.o_proj", "model.layers.1.mlp"], 1.5)}


def weights() -> dict[str, torch.Tensor]:
    """Name -> [O, I]."""
    rng = np.random.default_rng(20220815)
    square = rng.standard_normal((64, 64)) * 0.02
    square[5], square[6, ::3], square[9] = 0.0, -0.0, square[9] * 64  # zeros have scale 0 and codes 0
    odd = rng.standard_normal((33, 7))
    odd[3] *= 1e-5  # subnormal numbers of float16
    odd[4] *= 3e-7
    odd[5] = (np.arange(7) - 3) * 0.5 + 127  # half codes
    odd[6] = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    wide = rng.standard_normal((24, 160)) * rng.lognormal(0, 1, (24, 1))
    found = {}
    for name, weight in (("square", square), ("odd", odd), ("wide", wide), ("one", np.array([[-0.25]]))):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found[f"{name}_{str(dtype).removeprefix('torch.')}"] = torch.from_numpy(weight).to(dtype)
    return found


def activations() -> dict[str, tuple[str, torch.Tensor, float]]:
    """Name -> (weight, x [M, I], threshold)."""
    rng = np.random.default_rng(20220816)
    plain = rng.standard_normal((12, 64))
    plain[3] = 0.0
    some = rng.standard_normal((12, 64))
    some[2, 11], some[5, 11], some[7, 40], some[8, 50] = 20.0, -9.0, 6.0, 5.99
    many = rng.standard_normal((9, 160)) * 5  # most columns have one
    few = rng.standard_normal((9, 160))
    few[:, [3, 100]] += 30.0
    single = rng.standard_normal((1, 160))
    single[0, 9] = 7.0
    large = rng.standard_normal((5, 160))
    large[1, 4] = 70_000.0  # beyond float16
    cases = {
        "plain": ("square_float16", plain, 6.0),
        "some": ("square_float16", some, 6.0),
        "lower": ("square_float16", some, 2.0),
        "off": ("square_float16", some, 0.0),
        "many": ("wide_float32", many, 6.0),
        "few": ("wide_float32", few, 6.0),
        "single": ("wide_float32", single, 6.0),
    }
    found = {}
    for name, (weight, x, threshold) in cases.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if name in ("some", "few") else (torch.float32,):
            key = f"{name}_{str(dtype).removeprefix('torch.')}"
            found[key] = weight, torch.from_numpy(x).to(dtype), threshold
    return found | {"large_float32": ("wide_float32", torch.from_numpy(large).float(), 6.0)}


def stored(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def product(x: torch.Tensor, dy: torch.Tensor, quantized: Int8Params, threshold: float) -> tuple:
    state = MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = quantized.CB, quantized.SCB, threshold, False
    x = x.clone().requires_grad_()
    y = MatMul8bitLt.apply(x, quantized, None, None, state)
    y.backward(dy)
    return y, x.grad


def make_arrays() -> None:
    arrays: dict[str, np.ndarray] = {}
    quantized = {}
    for name, weight in weights().items():
        quantized[name] = q = Int8Params(weight, requires_grad=False).to("cpu")
        assert q.CB is not None and q.SCB is not None
        arrays |= {
            f"{name}/weight": stored(weight),
            f"{name}/codes": q.CB.numpy(),
            f"{name}/absmax": q.SCB.numpy(),
        }
        if name.startswith("odd"):
            arrays[f"{name}/values"] = int8_vectorwise_dequant(q.CB, q.SCB).numpy()
    rng = np.random.default_rng(1)
    for name, (weight, x, threshold) in activations().items():
        dy = torch.from_numpy(rng.standard_normal((len(x), len(quantized[weight])))).to(x.dtype)
        y, dx = product(x, dy, quantized[weight], threshold)
        assert y.dtype == dx.dtype == x.dtype
        parts = {"x": x, "dy": dy, "y": y, "dx": dx}
        arrays |= {f"{name}/{part}": stored(value) for part, value in parts.items()}
        arrays[f"{name}/threshold"] = np.float32(threshold)
        arrays[f"{name}/of"] = np.asarray(weight)
    np.savez_compressed(HERE / "int8.npz", **arrays)  # type: ignore[arg-type]


def make_folder(name: str, skipped: list[str] | None, threshold: float) -> None:
    folder = HERE / "bnb8bit" / name
    shutil.rmtree(folder, ignore_errors=True)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped, llm_int8_threshold=threshold)
    LlamaForCausalLM.from_pretrained(
        BASE, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    tokens = np.load(BASE / "logits.npz")["tokens"]
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    arrays = {"tokens": tokens, "logits": logits_of(model, tokens)}
    arrays["dense"] = logits_of(model.dequantize(torch.float32).eval(), tokens)
    np.savez_compressed(folder / "logits.npz", **arrays)  # type: ignore[arg-type]
    print(name, "difference by activations in 8 bits", np.abs(arrays["logits"] - arrays["dense"]).mean())


def main() -> None:
    torch.set_num_threads(1)
    make_arrays()
    for name, (skipped, threshold) in FOLDERS.items():
        make_folder(name, skipped, threshold)


if __name__ == "__main__":
    main()
