"""Pretraining a minute model: it learns, and what it writes is a checkpoint that loads."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.io.load import load_model
from qlora_jax.train.pretrain import pretrain

pytestmark = pytest.mark.quick_compile

HF = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "tie_word_embeddings": True,
}  # fmt: skip


def config(**changes) -> ConfigDict:
    c = ConfigDict({"steps": 40, "batch_size": 8, "learning_rate": 0.02, "warmup_steps": 4, "weight_decay": 0.0})
    c.update({"seed": 0, "save_every": 100, **changes})
    return c


def test_it_learns_to_count(tmp_path):
    rows = (np.arange(20)[:, None] + np.arange(12)).astype(np.int32) % 11
    reported = []
    measured = pretrain(HF, rows[:16], rows[16:], config(), tmp_path / "out", reported.append)
    assert measured["heldout_loss_nats_per_token"] < 0.8 < reported[0]["loss"]
    model = load_model(tmp_path / "out", compute_dtype=jnp.float32)
    logits = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, jnp.asarray([[3, 4, 5, 6]]))
    assert int(jnp.argmax(logits[0, -1])) == 7


@pytest.mark.parametrize("changes", [{"steps": 4}, {"warmup_steps": -1}, {"batch_size": 0}, {"save_every": 0}])
def test_steps_that_cannot_be(tmp_path, changes):
    with pytest.raises(InputError, match="expected"):
        pretrain(HF, np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32), config(**changes), tmp_path, print)


def test_a_loss_that_is_not_finite_ends_it_and_nothing_is_written(tmp_path):
    rows, wild = np.ones((16, 12), np.int32), config(steps=3, warmup_steps=0, learning_rate=3e38)
    with pytest.raises(InputError, match="step 3: the loss is (nan|inf); try a lower learning_rate"):
        pretrain(HF, rows, rows, wild, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()
