"""Runs that start from an adapter whose base was changed train beside that base, and say so in what they write."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.peft import load_adapter, write_adapter
from qlora_jax.packs.pack import train_pack
from qlora_jax.train.setup import prepare

pytestmark = pytest.mark.quick_compile

SECTIONS = {
    "pissa": {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "v_proj", "down_proj")},
    "olora": {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "gate_proj", "down_proj")},
}
logits_of = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))


def quiet(*_):
    pass


@pytest.fixture
def starting(golden, tiny_config):
    """The config of a run that starts from a golden adapter."""

    def make(name, quant):
        tiny_config.lora.update(**SECTIONS[name], dropout=0.0, init_from=str(golden / "peft" / name))
        tiny_config.quant.update(format=quant, double_quant=False)
        return tiny_config

    return make


@pytest.mark.parametrize(("name", "quant", "key"), [("pissa", "none", "logits"), ("olora", "nf4", "logits_nf4")])
def test_trains_beside_what_is_left_of_the_base(golden, starting, tmp_path, name, quant, key):
    config, said = starting(name, quant), []
    prepared = prepare(config, said.append, quiet)
    assert any(f"{name} took its first {config.lora.rank} directions out of the base" in line for line in said)
    with np.load(golden / "peft" / name / "logits.npz") as file:
        tokens, expected = file["tokens"], file[key]
    found = logits_of(nnx.merge(prepared.graph, prepared.adapter, prepared.base), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)

    adapter = jax.tree.map(lambda x: 1.5 * x, prepared.adapter)  # as if it had trained
    trained = logits_of(nnx.merge(prepared.graph, adapter, prepared.base), tokens)
    assert np.abs(trained - expected).max() > 0.01
    write_adapter(tmp_path / "out", adapter, prepared.lora_config, "llama1")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"]) == (name, config.lora.rank)
    model = load_model(golden / "llama" / "llama1", QuantSpec(quant, double_quant=False), "float32")
    load_adapter(model, tmp_path / "out")
    np.testing.assert_allclose(logits_of(model, tokens), trained, atol=1e-5, rtol=0)


def test_what_cannot_start_so_is_one_line(golden, starting, tmp_path):
    with pytest.raises(InputError, match='"pissa", which peft takes out of 16- or 32-bit weights alone'):
        prepare(starting("pissa", "nf4"), quiet, quiet)
    config = starting("pissa", "none")
    with pytest.raises(InputError, match="'pissa': its base lacks what the adapter took out, but a pack's"):
        train_pack([config], None, quiet)
    config.lora.init_from = str(golden / "peft" / "patterns")
    with pytest.raises(InputError, match="carries an adapter in 1 of 2 layers; training needs one rank and scale"):
        prepare(config, quiet, quiet)
