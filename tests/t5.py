"""The golden checkpoints of T5, and what of a model is held against them."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from configs import base
from qlora_jax.io.load import expected_shapes, load_config
from qlora_jax.models.t5.rows import split_rows
from tests.conftest import TESTS

TINY = {
    "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2,
    "num_heads": 4, "num_decoder_layers": 1, "vocab_size": 96, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "tie_word_embeddings": False,
    "is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "n_positions": 64,
}  # fmt: skip
FAST = {"xla_backend_optimization_level": 0}
FOLDERS = TESTS / "golden" / "t5"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDERS / name / "golden.npz") as file:
        return dict(file)


def write_tiny_t5(folder: Path) -> Path:
    """A random checkpoint with the golden tokenizer."""
    shutil.copytree(FOLDERS / "tokenizer", folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in expected_shapes(load_config(folder)).items():
        width = shape[-1] if len(shape) == 2 and "shared" not in key else 1
        values = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) / np.sqrt(width)
        tensors[key] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_t5_run(folder: Path) -> Any:
    """Config of 10 steps of 4 examples on a checkpoint of `write_tiny_t5`, both in `folder`."""
    words = ("the cat", "a small dog", "one bird", "the old teacher", "it", "a story", "12 red apples", "the garden")
    rows = [{"input": f"{words[i % 8]} reads {words[(3 * i + 1) % 8]}.", "output": words[i % 8]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = base.get_config()
    c.model.path = str(write_tiny_t5(folder / "model"))
    c.model.compute_dtype = "float32"
    c.lora.rank = 4
    c.lora.targets = ("q", "wo")
    c.data.path, c.data.format = str(folder / "rows.jsonl"), "input-output"
    c.data.max_source_len, c.data.max_target_len, c.data.pad_to_multiple_of = 20, 12, 32
    c.data.eval_examples = 4
    c.optimizer.learning_rate, c.optimizer.max_grad_norm = 3e-2, 2.0
    c.train.steps = 10
    c.train.batch_size = 4
    c.train.grad_accum = 2
    c.train.checkpoint_every = 4
    return c


@partial(jax.jit, static_argnames="graph", compiler_options=FAST)
def _logits(graph, state, tokens, loss_mask):
    model = nnx.merge(graph, state)
    rows = split_rows(tokens, loss_mask, model.config.kind.pair)
    return model.logits(model.decode(rows.inputs, model.encode(rows.source, rows.seen), rows.seen)), rows.counted


def logits_of(model, tokens: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of the answers' tokens, the first in front; zero where there are none."""
    logits, counted = _logits(*nnx.split(model), tokens, loss_mask)
    return np.where(counted[..., None], logits, 0)
