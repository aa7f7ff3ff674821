"""How many kernels a step launches a layer: the counter on a small text, and the 7B's step on an absent H100."""

import importlib

import pytest

from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.kernels import layer_kernels
from qlora_jax.planning.memory import held_bytes
from qlora_jax.planning.program import compile_gradient
from qlora_jax.train.cut import Cut, temporary_bytes
from qlora_jax.train.shapes import abstract_model
from qlora_jax.train.spec import read_spec

TEXT = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%f
  %b = ((f32[4]{0}), f32[4]{0}, u32[]) fusion-start(%a), calls=%g
  %c = f32[4]{0} fusion-done(%b)
  %d = f32[4]{0} custom-call(%c), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %d)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%s), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[4]{0}) while(%s), condition=%c, body=%other, backend_config={"known_trip_count":{"n":"16"}}
}
"""


def test_what_a_loop_of_so_many_turns_launches():
    assert layer_kernels(TEXT, 3) == [{"fusion": 1, "fusion-start": 1, "custom-call": 1}]
    with pytest.raises(ValueError, match="no loop of 4 turns"):
        layer_kernels(TEXT, 4)


@pytest.mark.large_plans
def test_kernels_a_layer_of_a_7b(xla_gpu):
    """Forward and backward at the cut that an H100 takes, where XLA dequantizes: 130 together.

    And the bytes that are said of this cut without compiling are the compiled ones.
    """
    spec = read_spec(importlib.import_module("configs.guanaco_7b").get_config()).with_cut(Cut(16, "selective"))
    compiled = compile_gradient(GPUS["h100"], abstract_model(spec.model), spec.batch, dropout=True)
    forward, backward = (sum(count.values()) for count in layer_kernels(compiled.as_text(), spec.model.sizes.L))
    assert forward <= 54 and backward <= 76
    held, taken = held_bytes(spec), compiled.memory_analysis().temp_size_in_bytes
    assert held + temporary_bytes(spec.to_cut, Cut(16, "selective")) == pytest.approx(held + taken, rel=0.02)
