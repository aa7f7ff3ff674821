"""Losses and gradients of a step on eight CPU devices, against those of one: every way to divide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick_compile

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from qlora_jax import lora
from qlora_jax.bench.synthetic import random_model
from qlora_jax.io.load import QuantSpec
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
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
G, B, T = 2, 8, 12

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max(), (np.abs(x - y).max(), np.abs(x).max())

def check(sizes, format, remat, packed, meshes):
    config = parse_config(sizes, "config.json")
    spec = ModelSpec(config, QuantSpec(format), LoRAConfig(8, 16, 0.1, TARGETS), compute_dtype="float32",
                     kept_dtype="float32", remat=remat, attention="xla", kernel="xla")
    model = random_model(spec)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.05, x.dtype), model.adapter)
    tokens = rng.integers(0, 96, (G, B, T)).astype(np.int32)
    mask = rng.random((G, B, T)) < 0.6
    mask[:, :3] = False  # devices whose rows have no target go through the head with the others
    segments = np.broadcast_to(np.repeat([0, 1], [5, 7]).astype(np.int32), tokens.shape) if packed else None

    def run(axes):
        whole, devices, a, b = nnx.merge(model.graph, adapter, model.base), None, adapter, model.base
        if axes.devices > 1:
            devices = Devices(mesh_of(axes), Shards.of(axes, a, b))
            whole.shards = devices.shards
            a, b = (jax.device_put(tree, devices.shardings(tree)) for tree in (a, b))
            held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(b))
            assert held == bytes_of_one(devices.shards, b)  # what a plan counts
            assert axes.fsdp == 1 or held < 1.1 * bytes_of_one(None, b) / axes.fsdp, (held, bytes_of_one(None, b))
        graph = lora.split(whole)[0]
        extra = [] if segments is None else [segments[0]]
        gradient = jax.jit(make_gradient(graph, 16, 0.3, devices=devices))
        evaluation = jax.jit(make_evaluation(graph, 16, devices))
        grads, metrics = gradient(a, b, tokens, mask, jax.random.key(3), segments)
        return grads, metrics, evaluation(a, b, tokens[0], mask[0], *extra)

    wanted = run(Axes())
    for axes in meshes:
        found = run(Axes(*axes))
        close(wanted, found)
        print(sizes["architectures"][0], format, remat, axes, float(found[1].loss))

check(LLAMA, "nf4", "block", True, [(2, 4)])
check(MIXTURE, "nf4", "selective", False, [(1, 2)])
"""


def test_every_mesh_gives_one_devices_losses_and_gradients():
    repository = Path(__file__).resolve().parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 2
