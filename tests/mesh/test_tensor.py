"""Products that devices compute together: parts of weights bit for bit, a run and its gradients as of one device."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import operands
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.tensor import Split, arranged
from qlora_jax.models.divided.splits import splits_of
from qlora_jax.quant import native
from qlora_jax.quant.tensor import QuantizedTensor, dequantize
from tests import forked

pytestmark = pytest.mark.quick_compile


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
        ((128, 512), Split("out"), 2, True, 4),  # a nested scale is of 256 scales in each part too
        ((96, 896), Split("in"), 2, True, 1344),  # rows of 7 blocks each: every scale has its own
        ((384, 96), Split("out", (256, 64, 64)), 4, False, None),  # blocks cross rows
    ],
)
def test_a_part_dequantizes_to_what_the_whole_has_there(shape, split, ways, double_quant, nested):
    rng, q = np.random.default_rng(0), native.abstract(shape, "nf4", 64, double_quant)
    q = jax.tree.map(lambda x: jnp.asarray(rng.integers(1, 200, x.shape).astype(x.dtype)), q)
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


RUNS = """
import json, sys
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import mesh_of
from qlora_jax.mesh.rules import Cut
from qlora_jax.mesh.shards import Shards, bytes_of_one
from qlora_jax.mesh.tensor import own
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, finetune
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_run import tiny_config

# of what stands whole on each device, as a fused layer's bias and B: its part of queries, keys and values
bias, sections = np.arange(16), (8, 4, 4)
parts = jax.shard_map(partial(own, axis=0, sections=sections), mesh=mesh_of(Axes(tensor=4)), in_specs=P(),
                      out_specs=P("tensor"), check_vma=False)(jnp.asarray(bias))
assert parts.tolist() == [0, 1, 8, 12, 2, 3, 9, 13, 4, 5, 10, 14, 6, 7, 11, 15]

# where an embedding trains: each device's rows have their gradient once
shards, tokens = Shards(Axes(tensor=4), (("embedding", Cut(kept=-2, along="tensor")),)), jnp.asarray([[1, 5, 5, 7]])
table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
of = lambda lookup: jax.grad(lambda table: jnp.sum(lookup(table) ** 2))
found = jax.shard_map(of(lambda part: shards.lookup(part, tokens)), mesh=mesh_of(Axes(tensor=4)), in_specs=P("tensor"),
                      out_specs=P("tensor"), check_vma=False)(table)
np.testing.assert_allclose(found, of(lambda table: table[tokens])(table), rtol=1e-6)

folder, golden = Path(sys.argv[1]), Path(sys.argv[2])
sizes = dict(hidden_size=128, intermediate_size=128, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"])
rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i * 7}"} for i in range(24)]
(folder / "rows.json").write_text(json.dumps(rows))
c = tiny_config(golden, folder)
c.model.path, c.model.remat = str(write_tiny_checkpoint(folder / "model", **sizes)), "selective"
c.data.batches, c.data.path, c.data.template, c.data.eval_examples = "", str(folder / "rows.json"), "paper", 0
c.data.packing, c.data.max_source_len, c.data.max_target_len, c.data.pad_to_multiple_of = True, 24, 8, 32
c.lora.targets, c.lora.dropout, c.train.steps = ("q_proj", "o_proj", "down_proj"), 0.1, 4

def train(name, **mesh):
    c.mesh.update(mesh)
    finetune(c, resolved(c), folder / name, lambda line: None)

gradients, update, step = [], PagedOptimizer.update, Run._step

def seen(self, params, sums, *more):
    gradients.append(jax.tree.map(np.asarray, sums))
    return update(self, params, sums, *more)

def interrupted(self, index):
    if index == 3:
        base = self.prepared.base
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(base))
        assert held == self.prepared.base_bytes < 1.2 * bytes_of_one(None, base) / 4, held
        raise InterruptedError
    return step(self, index)

PagedOptimizer.update = seen
train("one")
Run._step = interrupted
try:
    train("many", fsdp=2, tensor=2)
except InterruptedError:
    pass
Run._step = step
train("many", fsdp=1, tensor=1)
one, many = gradients[:4], gradients[4:]
assert len(many) == 5  # the third step again, from the checkpoint after the second
for x, y in zip(jax.tree.leaves(one[:3]), jax.tree.leaves(many[:3]), strict=True):  # before Adam's signs differ
    assert np.abs(x - y).max() <= 1e-4 * np.abs(x).max(), (x.shape, np.abs(x - y).max(), np.abs(x).max())
assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(one[1]))
"""


def test_a_run_has_the_gradients_of_one_device_and_goes_on_with_others(golden, tmp_path):
    done = forked.run(RUNS, tmp_path, golden, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    one, many = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    assert [row["step"] for row in many] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in one], [row[key] for row in many], rtol=2e-5)
    inputs = [json.loads((tmp_path / name / "inputs.json").read_text()) for name in ("one", "many")]
    assert inputs[0] == inputs[1]  # the base's checksum among them
