"""Makes optim8.npz: 8-bit optimizer state by bitsandbytes 0.50.2 (torch 2.13.0, numpy 2.4.6, Python 3.11), on CPU.

Codes are those of bitsandbytes' `default` backend, the nearest values of its dynamic maps, called on CPU tensors. Its
CPU backend picks codes by 65,536 bins; `CASE/MAP/bins` says how many codes differ there, and by how many places at
most. The updates are bitsandbytes' AdamW8bit and Lion8bit with its CPU backend's arithmetic, requantized by that same
`default` backend.

    python tests/golden/make_optim8.py

optim8.npz, MAP being signed or unsigned, CASE one of `cases`, OPTIMIZER adamw or lion, NAME one of SHAPES:
    map/MAP                     float32 [256]
    CASE/values                 float32 [n]
    CASE/MAP/codes              uint8 [n]
    CASE/MAP/absmax             float32 [ceil(n / 256)]
    CASE/MAP/dequantized        float32 [n]
    CASE/MAP/bins               int64 [2], codes that differ in the CPU backend, largest difference
    NAME/start                  float16 [L, ...], parameters (float32 in training); layer l is a tensor of its own
    NAME/gradients              float16 [STEPS, L, ...]
    OPTIMIZER/NAME/params       float32 [2, L, ...], after the first and the last step
    OPTIMIZER/NAME/STATE        after the last step; STATE is codes1, absmax1 (first moment), codes2, absmax2 (second),
                                uint8 [L, ...] and float32 [L, blocks], or moment1, moment2, float32 [L, ...]
"""

from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops as cpu_ops

SHAPES = {"whole": (2, 64, 72), "ragged": (2, 65, 67), "small": (2, 8, 24)}  # 18 blocks, 17.01 blocks, 32-bit
STEPS = 4
RATE, WEIGHT_DECAY = 1e-2, 0.1
MAPS = {"signed": True, "unsigned": False}
_quantize = torch.ops.bitsandbytes.quantize_blockwise.default


def nearest(values: torch.Tensor, code_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `default` backend's codes and absmax."""
    return _quantize._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, values, code_map, 256)


def requantize(values: torch.Tensor, code_map: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor, _: int) -> None:
    new_codes, new_absmax = nearest(values, code_map)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)


def cases(code_map: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> float32 [n]; negative values only where the map is signed too."""
    rng = np.random.default_rng(2022)
    midpoints = (code_map[:-1] + code_map[1:]) / np.float32(2)
    sign = 1 if code_map[0] == 0 else rng.choice([-1, 1], 1024)
    blocks = np.abs(rng.standard_normal((4, 256)))
    blocks[1] = 0
    return {
        "normal": (blocks.reshape(-1) * sign).astype(np.float32),
        "decades": (10.0 ** rng.uniform(-9, 0, 1024) * sign).astype(np.float32),
        "sizes": (np.repeat([2.0**-100, 1e-30, 1e20, 2.0**100], 256) * blocks.reshape(-1) * sign).astype(np.float32),
        # ties and their neighbours; absmax 1
        "ties": np.concatenate([midpoints, [1], np.nextafter(midpoints, np.float32(-2)), [1],
                                np.nextafter(midpoints, np.float32(2)), [1], code_map]).astype(np.float32),
        "ragged": np.abs(rng.standard_normal(300)).astype(np.float32),
    }  # fmt: skip


def optimizers(params: list[torch.Tensor]) -> dict[str, torch.optim.Optimizer]:
    return {
        "adamw": bnb.optim.AdamW8bit(params, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY),
        "lion": bnb.optim.Lion8bit(params, lr=RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY),
    }


def train(name: str, start: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """Parameters after the first and the last step, float32 [2, L, ...], and the last state of each layer."""
    layers = [torch.nn.Parameter(torch.from_numpy(layer.astype(np.float32))) for layer in start]
    optimizer = optimizers(layers)[name]
    params = []
    for step in gradients:
        for layer, gradient in zip(layers, step, strict=True):
            layer.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
        params.append(np.stack([layer.detach().numpy().copy() for layer in layers]))
    return np.stack([params[0], params[-1]]), [optimizer.state[layer] for layer in layers]


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    for kind, signed in MAPS.items():
        code_map = bnb.functional.create_dynamic_map(signed=signed)
        arrays[f"map/{kind}"] = code_map.numpy()
        for case, values in cases(code_map.numpy()).items():
            codes, absmax = nearest(torch.from_numpy(values), code_map)
            binned, _ = _quantize(torch.from_numpy(values), code_map, 256)
            difference = np.abs(codes.numpy().astype(int) - binned.numpy().astype(int))
            back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code_map, 256, torch.float32)
            arrays |= {
                f"{case}/{kind}/values": values,
                f"{case}/{kind}/codes": codes.numpy(),
                f"{case}/{kind}/absmax": absmax.numpy(),
                f"{case}/{kind}/dequantized": back.numpy(),
                f"{case}/{kind}/bins": np.asarray([(difference > 0).sum(), difference.max()]),
            }
    rng = np.random.default_rng(8)
    cpu_ops._quant_blockwise_fp32_direct = requantize
    for name, shape in SHAPES.items():
        start = rng.standard_normal(shape).astype(np.float16)
        rows = 10.0 ** rng.uniform(-3, 0, (1, shape[0], shape[1], 1))  # rows of unlike sizes, as adapters have
        gradients = (rng.standard_normal((STEPS, *shape)) * rows).astype(np.float16)
        arrays |= {f"{name}/start": start, f"{name}/gradients": gradients}
        for optimizer in ("adamw", "lion"):
            key = f"{optimizer}/{name}"
            arrays[f"{key}/params"], states = train(optimizer, start, gradients)
            for moment in (1, 2) if optimizer == "adamw" else (1,):
                stored = np.stack([state[f"state{moment}"].numpy() for state in states])
                if stored.dtype == np.float32:
                    arrays[f"{key}/moment{moment}"] = stored
                    continue
                arrays[f"{key}/codes{moment}"] = stored
                arrays[f"{key}/absmax{moment}"] = np.stack([state[f"absmax{moment}"].numpy() for state in states])
    np.savez_compressed(Path(__file__).parent / "optim8.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
