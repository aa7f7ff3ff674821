"""bitsandbytes' 4-bit product on an NVIDIA GPU as a form that measure.interleaved times."""

import importlib.util

import numpy as np

from pallas_kernels.nf4_matmul.measure import Case, Run


def is_there() -> bool:
    """Whether torch and bitsandbytes can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "bitsandbytes"))


def product(case: Case, copies: int) -> Run:
    """Rounds of y = x W^T, or dx of it, with each of several nf4 weights with double quantization."""
    import bitsandbytes
    import torch

    dtype = getattr(torch, case.dtype)
    forward = case.op == "forward"
    x = torch.randn(case.rows, case.shape.in_features, device="cuda", dtype=dtype, requires_grad=not forward)
    weights = []
    for _ in range(copies):
        w = torch.randn(*case.shape, device="cuda", dtype=dtype)
        weights.append(
            bitsandbytes.functional.quantize_4bit(
                w, blocksize=case.block_size, compress_statistics=True, quant_type="nf4"
            )
        )

    def multiply() -> list:
        return [bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state) for codes, state in weights]

    outputs = [] if forward else multiply()
    dy = torch.randn(case.rows, case.shape.out_features, device="cuda", dtype=dtype)

    def run(rounds: np.integer) -> None:
        for _ in range(int(rounds)):
            if forward:
                with torch.no_grad():
                    multiply()
            for y in outputs:
                torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.cuda.synchronize()

    return run
