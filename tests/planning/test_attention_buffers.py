"""Flash attention in a whole train step, compiled for an H200 that is not here: no scores in memory, nothing again."""

import math

import pytest

from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.planning import topology
from qlora_jax.planning.buffers import compile_with_values, largest_scores
from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.program import compile_gradient
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.cut import log_sums
from qlora_jax.train.shapes import BatchShape, ModelSpec, abstract_model

pytest.importorskip("jax_triton")
if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

SMALL = ModelConfig(
    D=256, F=512, L=3, N=4, K=2, H=64, V=1000, context=2048, norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=(), tied=False, eos_ids=(2,), bos_id=1,
)  # fmt: skip
B, T = 4, 576


def compiled():
    spec = ModelSpec(SMALL, QuantSpec(), LoRAConfig(rank=8), attention="flash", remat="selective")
    shape = BatchShape(1, B, T, packed=True)

    def compile(options):
        return compile_gradient(GPUS["h200"], abstract_model(spec), shape, dropout=False, extra_options=options)

    return spec, *compile_with_values(compile)


def test_no_scores_are_in_memory_and_kept_sums_spare_the_second_forward_pass():
    spec, program, values = compiled()
    # a mask of bits at most, never a score; test_weight_buffers.py has a step with scores, which are found there
    assert largest_scores(values, T) <= B * T * T
    # forward in the one scan's body; d q, then d k and d v in the other's
    assert program.as_text().count('custom_call_target="triton_kernel_call') == 3
    kept = kept_bytes(SMALL, "selective", B, T, 2, spec.low_rank, log_sums(spec, T))
    stacked = {
        (value.allocation, value.offset): value.bytes
        for value in values
        if value.shape[:1] == (SMALL.L,) and not value.is_parameter and math.prod(value.shape) >= SMALL.L * B * T
    }
    # what the adapters' A give lies there twice: XLA turns it over, all layers at once, 2.4% at these sizes
    assert sum(stacked.values()) == pytest.approx(kept, rel=0.03)
