"""Rows whose tokens several devices divide: gradients and a run as of one device."""

import json

import numpy as np
import pytest

from tests import forked

pytestmark = pytest.mark.quick_compile

# of small functions, since a step's program takes seconds to compile; whole steps: tests/mesh/test_gradient.py
PARTS = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.attention import Scoring
from qlora_jax.mesh import sequence
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import mesh_of
from qlora_jax.models.attention import causal_attention, segment_starts, window_starts
from qlora_jax.models.chunks import layer_in_chunks, not_shared
from qlora_jax.models.divided.tokens import attention_to_all

B, T, N, K, H, S = 2, 20, 4, 2, 8, 4
MESH, ALONG = mesh_of(Axes(sequence=S)), P(None, "sequence")
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
mapped = partial(jax.shard_map, mesh=MESH, check_vma=False)

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

def check_attention():
    q, k, v, d_out = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H), normal(B, T, N, H)
    sinks, starts = normal(N), segment_starts(jnp.asarray(np.repeat([0, 1, 2], [3, 11, 6])[None].repeat(B, 0)))
    windowed = window_starts(starts, jnp.arange(T)[None], 4)
    for how, starts, scoring, sinks in (
        ("xla", windowed, Scoring(None, 2.0, ()), sinks),
        ("chunked", starts, Scoring(0.3, 0.0, (0.5, 0.25, 0.1, 0.01)), sinks),
    ):
        def whole(q, k, v):
            out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, "xla", starts, scoring, sinks), q, k, v)
            return out, pull(d_out)
        def part(q, k, v, d_out):
            first, mine = sequence.first_of(T), None if starts is None else sequence.own(starts)
            out, pull = jax.vjp(lambda *qkv: attention_to_all(*qkv, first, how, mine, scoring, sinks), q, k, v)
            return out, pull(d_out)
        divided = mapped(part, in_specs=(ALONG,) * 4, out_specs=(ALONG, (ALONG,) * 3))
        close(jax.jit(whole)(q, k, v), jax.jit(divided)(q, k, v, d_out))
        print("attention", how)

def keys_values(frozen, adapter, x, first):
    return jnp.sin(x @ adapter).reshape(*x.shape[:2], 1, -1), x.reshape(*x.shape[:2], 1, -1)

def rest(frozen, adapter, kv, x, first):
    places = frozen + first + jnp.arange(x.shape[1])
    seen = jnp.arange(kv[0].shape[1]) <= places[:, None]
    weights = jnp.where(seen, jnp.einsum("btd,bsd->bts", x, kv[0][:, :, 0]), 0.0)
    return x + weights @ kv[1][:, :, 0] * 0.1

def check_layers_in_chunks():
    a, x, dy = normal(H, H), normal(B, 24, H), normal(B, 24, H)
    def layer(share, first, a, x, dy):
        y, pull = jax.vjp(partial(layer_in_chunks, keys_values, share, rest, 3, first), a, x)
        return y, pull(dy)
    def part(a, x, dy):
        y, (da, dx) = layer(sequence.of_all, sequence.first_of(24), a, x, dy)
        return y, (jax.lax.psum(da, "sequence"), dx)
    divided = mapped(part, in_specs=(P(), ALONG, ALONG), out_specs=(ALONG, (P(), ALONG)))
    close(jax.jit(partial(layer, not_shared, jnp.int32(0)))(a, x, dy), jax.jit(divided)(a, x, dy))
    print("chunks")

def check_tokens_that_follow_and_places():
    x = jnp.arange(1, B * T + 1).reshape(B, T)
    found = jax.jit(mapped(lambda x: sequence.own_and_next(x)[None], in_specs=P(), out_specs=P("sequence")))(x)
    for part, mine in enumerate(found):
        np.testing.assert_array_equal(mine, np.pad(np.asarray(x), ((0, 0), (0, 1)))[:, part * 5 : part * 5 + 6])
    hidden, places = normal(B, T, H), jnp.asarray([14, 15])
    at = mapped(lambda x: sequence.at_places(x, places), in_specs=ALONG, out_specs=P())
    np.testing.assert_array_equal(jax.jit(at)(hidden), hidden[jnp.arange(B), places])
    print("tokens")

check_attention()
check_layers_in_chunks()
check_tokens_that_follow_and_places()
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
c.data.batches, c.data.path, c.data.packing, c.data.eval_examples = "", str(folder / "rows.jsonl"), True, 0
c.data.max_source_len, c.data.max_target_len, c.data.pack_length, c.data.pad_to_multiple_of = 40, 15, 55, 1
c.lora.dropout, c.train.steps, c.train.grad_accum = 0.1, 4, 4  # micro-batches of one row, which two devices share
c.lora.targets, c.optimizer.name = ("q_proj",), "sgd"  # which makes no large step of a small difference

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


def test_parts_and_a_run_are_those_of_one_device(golden, tmp_path):
    done = forked.run(PARTS + RUNS, tmp_path, golden, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert all(part in said for part in ("attention xla", "attention chunked", "chunks", "tokens"))
    assert "attention = xla for the longest sequences, of 55 tokens" in said
    one, many = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    assert [row["step"] for row in many if "loss" in row] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "target_tokens"):
        found = [[row[key] for row in rows if key in row] for rows in (one, many)]
        assert found[0]
        np.testing.assert_allclose(*found, rtol=2e-5)
