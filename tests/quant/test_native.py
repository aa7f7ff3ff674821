"""Our own form on disk: names, shapes and settings of the arrays."""

import itertools

import jax
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.quant import native

pytestmark = pytest.mark.quick_compile


@pytest.mark.parametrize(
    ("format", "double_quant"), [*itertools.product(("nf4", "int4"), (True, False)), ("int8", False)]
)
@pytest.mark.parametrize("shape", [(7, 33), (8, 64), (96, 100)])  # the last has 300 scales, of two nested blocks
def test_what_is_promised_is_what_quantizing_gives(shape, format, double_quant):
    w = jax.numpy.asarray(np.random.default_rng(0).standard_normal(shape), "float32")
    q = qj.quantize(w, format, 32, double_quant)
    promised = native.abstract(shape, format, 32, double_quant)
    assert jax.tree.structure(promised) == jax.tree.structure(q)
    for expected, found in zip(jax.tree.leaves(promised), jax.tree.leaves(q), strict=True):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
    again = native.filled(promised, native.parts(q))
    assert again == q and set(native.parts(q)) == set(native.PARTS[: 4 if double_quant else 2])


def test_names():
    assert native.stack_key("mlp.up_proj", "codes") == "model.layers.mlp.up_proj.weight.codes"
    assert all(native.is_stack(native.stack_key("mlp.up_proj", part)) for part in native.PARTS)
    for other in ("model.layers.0.mlp.up_proj.weight.absmax", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert not native.is_stack(other)


def test_settings_are_read_back_and_other_layouts_are_named():
    raw = native.settings("fp4", 128, False)
    assert native.read_settings(raw, "here") == ("fp4", 128, False)
    with pytest.raises(qj.InputError, match="^here: quantization_config lacks format"):
        native.read_settings({key: value for key, value in raw.items() if key != "format"}, "here")
    del raw["layout"]  # as folders of earlier versions have it
    with pytest.raises(qj.InputError, match="^here: .* of layout 1, this version reads 2: quantize the original again"):
        native.read_settings(raw, "here")
