"""Training of an encoder-decoder: packs, dropout, and what it has no form for. experiments/test_t5 has whole runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.packs.step import make_pack_evaluation
from qlora_jax.train.setup import prepare
from qlora_jax.train.step import loss_of
from tests.t5 import FAST, FOLDERS, golden, tiny_t5_run

pytestmark = pytest.mark.quick_compile


@pytest.fixture
def config(tmp_path):
    return tiny_t5_run(tmp_path)


def adapted(seeds: tuple[int, ...]):
    """The model with a random adapter for each seed on all q, stacked in front: graph, adapters, base."""
    model = load_model(FOLDERS / "v11", compute_dtype=jnp.float32)
    lora.attach(model, LoRAConfig(2, 4, 0.3, ("q",)), jax.random.key(0))
    model.dropout_rate = 0.3
    graph, adapter, base = lora.split(model)
    draws = [np.random.default_rng(seed) for seed in seeds]
    stacked = jax.tree.map(
        lambda x: jnp.stack([jnp.asarray(0.3 * draw.normal(size=x.shape), jnp.float32) for draw in draws]), adapter
    )
    return graph, stacked, base


def test_members_of_a_pack_are_evaluated_as_alone():
    """The first of two members changes nothing, the second something."""
    found, (graph, adapters, base) = golden("v11"), adapted((0, 1))
    adapters = jax.tree.map(lambda x: x.at[0].set(0), adapters)
    tokens, mask = found["tokens"], found["loss_mask"]
    program = jax.jit(make_pack_evaluation(graph, 16, "map"), compiler_options=FAST)
    nats, hits, counts = program(adapters, base, jnp.full(2, 2.0), jnp.ones(2, bool), tokens, mask)
    np.testing.assert_allclose(nats[0], found["loss"], rtol=1e-5)  # transformers', of the base
    assert abs(float(nats[0] - nats[1])) > 0.1
    assert counts.tolist() == [mask.sum()] * 2 and np.all((hits >= 0) & (hits < counts))


def test_dropout_does_not_depend_on_the_cut():
    """Of a step's rows at once or one by one, in whatever width: the same masks, so the same loss."""
    found, (graph, adapters, base) = golden("v11"), adapted((0,))
    own = jax.tree.map(lambda x: x[0], adapters)

    @partial(jax.jit, static_argnames="lengths", compiler_options=FAST)
    def loss(adapter, tokens, mask, seed, first_row, lengths):
        model = nnx.merge(graph, adapter, base)
        model.source_len, model.target_len = lengths
        return loss_of(model, tokens, mask, DropoutKey(jax.random.key(seed), first_row), None, 1024)[0]

    tokens, mask = found["tokens"], found["loss_mask"]
    whole = loss(own, tokens, mask, 7, 0, (0, 0))
    assert abs(float(whole - loss(own, tokens, mask, 8, 0, (0, 0)))) > 0.1
    tokens, mask = (np.pad(x, ((0, 0), (0, 7))) for x in (tokens, mask))
    parts = [loss(own, tokens[i : i + 1], mask[i : i + 1], 7, i, (31, 14)) for i in range(3)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


REFUSED = {
    "model.remat": "selective", "model.attention": "chunked", "model.sequence_chunk": 512, "data.packing": True,
    "data.train_on_source": True, "data.template": "chat", "lora.modules_to_save": ("lm_head",),
    "data.added_tokens": ("<think>",), "model.router_aux_loss_coef": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_it_has_no_form_for_is_refused(config, key):
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = REFUSED[key]
    with pytest.raises(InputError, match=rf"{section}\.{name.partition('_')[0]}"):
        prepare(config, lambda line: None, lambda done, total: None)


def test_batches_without_prompts_are_refused(config, tmp_path):
    np.save(tmp_path / "batches.npy", np.ones((2, 4, 8), np.int32))
    config.data.batches = str(tmp_path / "batches.npy")
    with pytest.raises(InputError, match="must know where a prompt ends"):
        prepare(config, lambda line: None, lambda done, total: None)
