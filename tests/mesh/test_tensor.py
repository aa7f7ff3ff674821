"""Products that devices compute together: parts of weights bit for bit, gradients and runs as of one device."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import operands
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.tensor import Split, arranged
from qlora_jax.models.divided.splits import splits_of
from qlora_jax.quant.tensor import QuantizedTensor, dequantize, quantize

pytestmark = pytest.mark.quick_compile
REPOSITORY = Path(__file__).resolve().parents[2]


def columns_or_rows(w: np.ndarray, split: Split, ways: int, part: int) -> np.ndarray:
    """What of W [O, I] a device has, by the definition."""
    if split.by == "in":
        return np.split(w, ways, axis=1)[part]
    sections = np.split(w, np.cumsum(split.sections)[:-1]) if split.sections else [w]
    return np.concatenate([np.split(section, ways)[part] for section in sections])


def part_of(q: QuantizedTensor, split: Split, ways: int, part: int) -> QuantizedTensor:
    cut = lambda x: None if x is None else jnp.split(x, ways)[part]  # noqa: E731
    shape = split.shape(q.shape, ways)
    nested = cut(q.nested_absmax)
    return dataclasses.replace(q, codes=cut(q.codes), absmax=cut(q.absmax), nested_absmax=nested, shape=shape)


@pytest.mark.parametrize(
    "shape, split, ways, double_quant, nested",
    [
        ((256, 512), Split("out"), 2, True, 8),  # a nested scale is of 256 scales in each part too
        ((320, 896), Split("in"), 2, True, 4480),  # rows of 7 blocks each: every scale has its own
        ((384, 96), Split("out", (256, 64, 64)), 4, True, 72),  # blocks cross rows
        ((64, 256), Split("in"), 4, False, None),
    ],
)
def test_a_part_dequantizes_to_what_the_whole_has_there(shape, split, ways, double_quant, nested):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    q = quantize(w, "nf4", 64, double_quant)
    whole, laid_out = np.asarray(dequantize(q, jnp.float32)), arranged(q, split, ways)
    assert laid_out.codes.shape == q.codes.shape and laid_out.absmax.shape == q.absmax.shape
    assert nested is None or laid_out.nested_absmax.shape == (nested,)
    for part in range(ways):
        mine = part_of(laid_out, split, ways, part)
        wanted = columns_or_rows(whole, split, ways, part)
        np.testing.assert_array_equal(np.asarray(dequantize(mine, jnp.float32)), wanted)
        given = operands.for_kernels(mine.packed, mine.codec)  # which know nested scales of 256 alone
        assert (given.nested_absmax is None) == (not double_quant or mine.absmax.size < 256 * mine.nested_absmax.size)
        if given.nested_absmax is None and double_quant:
            np.testing.assert_array_equal(given.absmax, operands.scales(mine.packed, mine.codec))
    assert operands.for_kernels(q.packed, q.codec) == q.packed


def test_a_16_bit_weight_is_laid_out_by_rows_and_left_as_it_is_by_columns():
    w = np.arange(32 * 6, dtype=np.float32).reshape(32, 6)
    by_rows = Split("out", (16, 8, 8))
    wanted = np.concatenate([columns_or_rows(w, by_rows, 4, part) for part in range(4)])
    np.testing.assert_array_equal(arranged(jnp.asarray(w), by_rows, 4), wanted)
    np.testing.assert_array_equal(arranged(jnp.asarray(w), Split("in"), 2), w)


@pytest.mark.parametrize(
    "folder, quant, said",
    [  # each says another way to have the same devices
        ("families/bloom_a", QuantSpec("none"), "slopes of their own (ALiBi)"),
        ("families/qwen2_a", QuantSpec("none"), "does not divide this model's 1 (key/value heads)"),
        ("families/llama_b", QuantSpec("int8"), "set quant.format=nf4, or set mesh.tensor=1"),
        ("families/llama_b", QuantSpec("nf4", 64), "would cut blocks of 64: set a smaller quant.block_size"),
        ("t5/v11", QuantSpec("none"), "mesh.data=4, which divides rows alone"),
    ],
)
def test_what_is_not_divided_is_refused_in_one_line_that_says_what_to_set(golden, folder, quant, said):
    with pytest.raises(InputError) as refused:
        splits_of(load_config(golden / folder), Axes(1, 2, tensor=2), quant)
    text = str(refused.value)
    assert said in text and ("mesh.fsdp=4" in text or "mesh.data=4" in text) and "\n" not in text


# what a run's config does not have: packed rows beside dropout; biases, a tied head, as many devices as key heads
GRADIENT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from qlora_jax import lora
from qlora_jax.bench.synthetic import random_model
from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import Devices, mesh_of
from qlora_jax.mesh.shards import Shards, bytes_of_one
from qlora_jax.mesh.tensor import arranged
from qlora_jax.models.config import parse_config
from qlora_jax.models.divided.splits import splits_of
from qlora_jax.train.shapes import ModelSpec
from qlora_jax.train.step import make_gradient

config = parse_config(dict(
    architectures=["Qwen2ForCausalLM"], hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=64,
    rope_theta=1e4, hidden_act="silu", tie_word_embeddings=True), "config.json")
spec = ModelSpec(config, QuantSpec("nf4", 32), LoRAConfig(8, 16, 0.1, ("q_proj", "o_proj", "down_proj")),
                 compute_dtype="float32", kept_dtype="float32", remat="selective", attention="xla", kernel="xla")
model = random_model(spec)
rng = np.random.default_rng(0)
adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.05, x.dtype), model.adapter)
tokens, mask = rng.integers(0, 96, (2, 2, 12)).astype(np.int32), rng.random((2, 2, 12)) < 0.6
segments = np.broadcast_to(np.repeat([0, 1], [5, 7]).astype(np.int32), tokens.shape)

def run(axes):
    whole, devices, a, b = nnx.merge(model.graph, adapter, model.base), None, adapter, model.base
    if axes.devices > 1:
        splits = splits_of(config, axes, spec.quant)
        for name, split in splits.items():
            layer = lora.linear(whole, name)
            lay_out = jax.vmap(lambda w: arranged(w, split, axes.tensor))
            layer.weight = type(layer.weight)(lay_out(layer.weight.get_value()))
        _, a, b = lora.split(whole)
        devices = Devices(mesh_of(axes), Shards.of(axes, a, b, splits=splits))
        whole.shards = devices.shards
        a, b = (jax.device_put(tree, devices.shardings(tree)) for tree in (a, b))
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(b))
        assert held == bytes_of_one(devices.shards, b) < 1.3 * bytes_of_one(None, b) / axes.tensor, held
    return jax.jit(make_gradient(lora.split(whole)[0], 16, 0.3, devices=devices))(
        a, b, tokens, mask, jax.random.key(3), segments)

wanted, found = run(Axes()), run(Axes(tensor=4))
for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert np.abs(x).max() > 0 and np.abs(x - y).max() <= 1e-5 * np.abs(x).max(), (x.shape, np.abs(x - y).max())
"""

RUNS = """
import sys
from pathlib import Path
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, finetune
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_run import tiny_config

folder, golden = Path(sys.argv[1]), Path(sys.argv[2])
c = tiny_config(golden, folder)
c.model.path = str(write_tiny_checkpoint(folder / "model", V=96, hidden_size=64, intermediate_size=128, head_dim=32))
c.lora.targets, c.lora.dropout, c.train.steps = ("q_proj", "o_proj"), 0.1, 4

def train(name):
    print(finetune(c, resolved(c), folder / name, lambda line: None)["final_train_loss"])

train("one")
step = Run._step
def interrupted(self, index):
    if index == 3:
        raise InterruptedError
    return step(self, index)
Run._step = interrupted
c.mesh.fsdp, c.mesh.tensor = 2, 2
try:
    train("many")
except InterruptedError:
    pass
Run._step = step
c.mesh.fsdp, c.mesh.data = 1, 2
train("many")
"""


def on_devices(script: str, *arguments: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_gradients_are_those_of_one_device():
    on_devices(GRADIENT)


def test_a_run_is_that_of_one_device_and_goes_on_with_others(golden, tmp_path):
    on_devices(RUNS, str(tmp_path), str(golden))
    one, many = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    assert [row["step"] for row in many] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in one], [row[key] for row in many], rtol=2e-5)
    inputs = [json.loads((tmp_path / name / "inputs.json").read_text()) for name in ("one", "many")]
    assert inputs[0] == inputs[1]  # the base's checksum among them
