"""Rows whose tokens several devices divide: gradients and a run as of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.quick_compile
REPOSITORY = Path(__file__).resolve().parents[2]

# T = 21 is no multiple of the devices; examples, and targets, go on from one device to the next
GRADIENTS = """
import dataclasses
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
              rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=1e4, head_dim=16, intermediate_size=128)
LLAMA = dict(architectures=["LlamaForCausalLM"], hidden_act="silu", tie_word_embeddings=False, **COMMON)
GROWING = LLAMA | dict(rope_scaling=dict(rope_type="dynamic", factor=4.0), max_position_embeddings=16)
GPT_OSS = dict(architectures=["GptOssForCausalLM"], num_local_experts=4, num_experts_per_tok=2, hidden_act="silu",
               attention_bias=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
               swiglu_alpha=1.7, swiglu_limit=7.0, tie_word_embeddings=False, **COMMON)
GEMMA = dict(architectures=["Gemma3ForCausalLM"], hidden_activation="gelu_pytorch_tanh", sliding_window=5,
             layer_types=["sliding_attention", "full_attention"], rope_local_base_freq=1e3, query_pre_attn_scalar=16,
             tie_word_embeddings=True, **COMMON)
BLOOM = dict(architectures=["BloomForCausalLM"], hidden_size=64, n_layer=2, n_head=4, vocab_size=96,
             layer_norm_epsilon=1e-5, tie_word_embeddings=True)
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
G, B, T = 2, 2, 21

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x).max() > 0 and np.abs(x - y).max() <= 1e-5 * np.abs(x).max(), (x.shape, np.abs(x - y).max())

def check(sizes, meshes, targets=TARGETS, attention="xla", packed=False, balance=0.0, evaluates=False, chunk=0):
    config = parse_config(sizes, "config.json")
    spec = ModelSpec(config, QuantSpec("nf4"), LoRAConfig(8, 16, 0.1, targets), compute_dtype="float32",
                     kept_dtype="float32", remat="selective", attention=attention, kernel="xla", sequence_chunk=chunk,
                     router_aux_loss_coef=balance)
    model = random_model(spec)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.05, x.dtype), model.adapter)
    tokens = rng.integers(0, 96, (G, B, T)).astype(np.int32)
    mask = rng.random((G, B, T)) < 0.6
    mask[:, :, 15:] = False  # devices without a target go through the head with the others
    segments = np.broadcast_to(np.repeat([0, 1, 2], [4, 9, 8]).astype(np.int32), tokens.shape) if packed else None

    def run(axes):
        whole, devices, a, b = nnx.merge(model.graph, adapter, model.base), None, adapter, model.base
        if axes.devices > 1:
            devices = Devices(mesh_of(axes), Shards.of(axes, a, b))
            whole.shards = devices.shards
            a, b = (jax.device_put(tree, devices.shardings(tree)) for tree in (a, b))
            held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(b))
            parts = axes.fsdp * axes.sequence  # which divide the model's arrays as well
            assert held == bytes_of_one(devices.shards, b) < 1.2 * bytes_of_one(None, b) / parts + 8000, held
        graph = lora.split(whole)[0]
        gradient = jax.jit(make_gradient(graph, 16, 0.3, devices=devices))
        found = gradient(a, b, tokens, mask, jax.random.key(3), segments)
        if not evaluates:
            return found
        extra = [] if segments is None else [segments[0]]
        return found, jax.jit(make_evaluation(graph, 16, devices))(a, b, tokens[0], mask[0], *extra)

    wanted = run(Axes())
    for axes in meshes:
        close(wanted, run(axes))
        print(sizes["architectures"][0], attention, axes, flush=True)

if "CASES" in globals():
    exec(CASES)
"""

RUNS = """
import json, sys
from pathlib import Path
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, finetune
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_run import tiny_config

folder, golden = Path(sys.argv[1]), Path(sys.argv[2])
c = tiny_config(golden, folder)
c.model.path = str(write_tiny_checkpoint(folder / "model"))
rows = [{"instruction": f"say {n}", "input": "", "output": "word " * (n % 5 + 1) + str(n)} for n in range(24)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
c.data.batches, c.data.path, c.data.packing, c.data.eval_examples = "", str(folder / "rows.jsonl"), True, 4
c.data.max_source_len, c.data.max_target_len, c.data.pack_length, c.data.pad_to_multiple_of = 40, 15, 55, 1
c.lora.dropout, c.train.steps, c.train.grad_accum = 0.1, 4, 4  # micro-batches of one row, which two devices share
c.lora.targets, c.eval.every = ("q_proj",), 2

def train(name):
    finetune(c, resolved(c), folder / name, print)

train("one")
step = Run._step
def interrupted(self, index):
    if index == 3:
        raise InterruptedError
    return step(self, index)
Run._step = interrupted
c.mesh.sequence = 2
try:
    train("many")
except InterruptedError:
    pass
Run._step = step
c.mesh.sequence = 1
train("many")
"""


def on_devices(script: str, *arguments: str) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_is_that_of_one_device_and_goes_on_with_another_mesh(golden, tmp_path):
    said = on_devices(RUNS, str(tmp_path), str(golden))
    assert "attention = xla for the longest sequences, of 55 tokens" in said
    one, many = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    assert [row["step"] for row in many if "loss" in row] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "target_tokens", "eval_loss"):
        found = [[row[key] for row in rows if key in row] for rows in (one, many)]
        assert found[0]
        np.testing.assert_allclose(*found, rtol=2e-5)
