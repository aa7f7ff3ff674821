"""Losses and gradients of a step on eight CPU devices, against those of one: every way to divide."""

import pytest

from tests import forked

pytestmark = pytest.mark.quick_compile

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from qlora_jax import lora
from qlora_jax.bench.synthetic import random_model
from qlora_jax.io.load import QuantSpec
from qlora_jax.evaluate.scoring import make_option_logits
from qlora_jax.lora import LoRAConfig
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import Devices, mesh_of
from qlora_jax.mesh.shards import Shards, bytes_of_one
from qlora_jax.models.config import parse_config
from qlora_jax.train.shapes import ModelSpec
from qlora_jax.train.step import make_evaluation, make_gradient

COMMON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
              rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=1e4, hidden_act="silu", head_dim=16)
LLAMA = dict(architectures=["LlamaForCausalLM"], intermediate_size=128, tie_word_embeddings=False, **COMMON)
MIXTURE = dict(architectures=["Qwen3MoeForCausalLM"], intermediate_size=128, moe_intermediate_size=32, num_experts=8,
               num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
               tie_word_embeddings=True, **COMMON)
GPT_OSS = dict(architectures=["GptOssForCausalLM"], intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
               attention_bias=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
               swiglu_alpha=1.7, swiglu_limit=7.0, tie_word_embeddings=False, **COMMON)
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
G, B, T = 2, 8, 13  # T is no multiple of the devices that divide it

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max(), (np.abs(x - y).max(), np.abs(x).max())

def check(sizes, format, remat, packed, meshes, targets=TARGETS, evaluates=True, balance=0.0, matrices=()):
    config = parse_config(sizes, "config.json")
    spec = ModelSpec(config, QuantSpec(format), LoRAConfig(8, 16, 0.1, targets, modules_to_save=matrices),
                     compute_dtype="float32", kept_dtype="float32", remat=remat, attention="xla", kernel="xla",
                     router_aux_loss_coef=balance)
    model = random_model(spec)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.05, x.dtype), model.adapter)
    tokens = rng.integers(0, 96, (G, B, T)).astype(np.int32)
    mask = rng.random((G, B, T)) < 0.6
    mask[:, :3] = False  # devices whose rows have no target go through the head with the others
    segments = np.broadcast_to(np.repeat([0, 1], [5, 8]).astype(np.int32), tokens.shape) if packed else None

    def run(axes):
        whole, devices, a, b = nnx.merge(model.graph, adapter, model.base), None, adapter, model.base
        if axes.devices > 1:
            devices = Devices(mesh_of(axes), Shards.of(axes, a, b))
            whole.shards = devices.shards
            a, b = (jax.device_put(tree, devices.shardings(tree)) for tree in (a, b))
            held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(b))
            assert held == bytes_of_one(devices.shards, b)  # what a plan counts
            parts = axes.fsdp * axes.expert * axes.sequence
            assert held < 1.1 * bytes_of_one(None, b) / parts + 4000, (held, bytes_of_one(None, b))  # norms are whole
        graph = lora.split(whole)[0]
        extra = [] if segments is None else [segments[0]]
        gradient = jax.jit(make_gradient(graph, 16, 0.3, devices=devices))
        grads, metrics = gradient(a, b, tokens, mask, jax.random.key(3), segments)
        if not evaluates:
            return grads, metrics
        evaluation = jax.jit(make_evaluation(graph, 16, devices))
        options = jax.jit(make_option_logits(graph, devices))  # as MMLU asks
        chosen = options(a, b, tokens[0], np.arange(B, dtype=np.int32), np.asarray([95, 0, 24, 50], np.int32))
        return grads, metrics, evaluation(a, b, tokens[0], mask[0], *extra), chosen

    wanted = run(Axes())
    for axes in meshes:
        found = run(Axes(*axes))
        close(wanted, found)
        print(sizes["architectures"][0], format, remat, axes, float(found[1].loss))

def check_that_adapters_travel_rounded_and_their_gradients_do_not():
    from functools import partial
    from jax.sharding import PartitionSpec as P
    from qlora_jax.mesh.gather import from_all, rounded_from_all
    def program(gather):
        def run(a, x):
            return jax.value_and_grad(lambda a: jnp.sum(jnp.sin(x @ gather(a, "fsdp", 0).astype(x.dtype).T)))(a)
        return jax.shard_map(run, mesh=mesh_of(Axes(1, 4)), in_specs=(P("fsdp"), P()), out_specs=(P(), P("fsdp")),
                             check_vma=False)
    rng = np.random.default_rng(1)
    a, x = rng.normal(size=(8, 16)).astype(np.float32), jnp.asarray(rng.normal(size=(5, 16)), jnp.bfloat16)
    plain, rounded = program(from_all), program(partial(rounded_from_all, dtype=jnp.bfloat16))
    for one, other in zip(jax.tree.leaves(jax.jit(plain)(a, x)), jax.tree.leaves(jax.jit(rounded)(a, x)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for function, travels in ((plain, "f32[8,16] = all_gather"), (rounded, "bf16[8,16] = all_gather")):
        text = str(jax.make_jaxpr(function)(a, x))
        assert travels in text and "f32[2,16] = reduce_scatter" in text and "bf16[2,16] = reduce" not in text, text
    print("rounded")

check_that_adapters_travel_rounded_and_their_gradients_do_not()
# a rope that turns by a row's longest example, which devices that divide the row see a part of
GROWING = dict(rope_scaling=dict(rope_type="dynamic", factor=4.0), max_position_embeddings=4)
check(LLAMA | GROWING, "nf4", "block", True, [(2, 2, 1, 1, 2)], matrices=("embed_tokens", "lm_head"))
check(MIXTURE, "nf4", "selective", False, [(1, 2, 2, 1, 2)], balance=0.2, matrices=("embed_tokens",))
check(GPT_OSS, "nf4", "block", True, [(2, 1, 2, 1, 2)], ("q_proj", "gate_up_proj"), evaluates=False)
"""


def test_every_mesh_gives_one_devices_losses_and_gradients():
    done = forked.run(SCRIPT, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 4
