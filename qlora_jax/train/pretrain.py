"""Pretraining of a small Llama from scratch, all weights trained in float32: how the embedded model of the quickstart
was made."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.io.export import write_checkpoint
from qlora_jax.models.config import ModelConfig, parse_config
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.kind import LLAMA
from qlora_jax.models.layers import Frozen
from qlora_jax.train.loss import summed_loss


def random_weights(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Weights of a Llama: Gaussian with deviation 0.02, divided by sqrt(2 L) where a layer writes into the residual
    stream."""
    if config.kind != LLAMA:
        raise InputError("pretraining makes Llamas without biases: set architectures to LlamaForCausalLM")
    keys = iter(jax.random.split(key, len(config.linears) + 2))

    def normal(shape: tuple[int, ...], std: float) -> jax.Array:
        flat = jax.random.normal(next(keys), (math.prod(shape),), jnp.float32)  # which XLA:CPU compiles sooner
        return std * flat.reshape(shape)

    layers = {}
    for name, shape in config.linears.items():
        residual = name.endswith(("o_proj", "down_proj"))
        std = 0.02 / math.sqrt(2 * config.L) if residual else 0.02
        layers[name] = normal((config.L, *shape), std)
    layers |= {name: jnp.ones((config.L, *shape), jnp.float32) for name, shape in config.vectors.items()}
    weights = {
        "embedding": normal((config.V, config.D), 0.02),
        "norm": jnp.ones(config.D, jnp.float32),
        "layers": layers,
    }
    return weights if config.tied else weights | {"head": normal((config.V, config.D), 0.02)}


def pretrain(
    hf_config: dict, rows: np.ndarray, heldout: np.ndarray, config: Any, out: Path, report: Callable[[dict], None]
) -> dict:
    """Trains on token rows and writes a Hugging Face folder with bfloat16 weights.

    Args:
      hf_config: config.json of the model to make.
      rows, heldout: int32 [n, T]; trained on in seeded random order, and for the measured loss.
      config: steps, batch_size (rows), learning_rate, warmup_steps, weight_decay, seed, save_every.
      out: folder to write; also pretraining.json with what was measured.
      report: called with the metrics of each tenth step.
    Returns:
      The measurements, as in pretraining.json.
    Raises:
      InputError: steps, warm-up or sizes that no run can have; a loss, or weights to be saved, that are not finite.
    """
    if not 0 <= config.warmup_steps < config.steps:
        raise InputError(f"warmup_steps is {config.warmup_steps}; expected 0 to below steps ({config.steps})")
    if config.batch_size < 1 or config.save_every < 1:
        raise InputError(f"batch_size is {config.batch_size}, save_every {config.save_every}; expected at least 1")
    model_config = parse_config(hf_config, "the pretraining config")
    model = Decoder(model_config, random_weights(model_config, jax.random.key(config.seed)), jnp.float32, remat="block")
    graph, params = nnx.split(model, Frozen)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.05 * config.learning_rate
    )
    decay = lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 3, tree)  # noqa: E731 (stacked matrices only)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, 0.95, weight_decay=config.weight_decay, mask=decay),
    )
    state = tx.init(params)

    def loss(params, tokens):
        model = nnx.merge(graph, params)
        hidden, _ = model(tokens)
        total, count = summed_loss(hidden, model.head_weight(), tokens, jnp.ones(tokens.shape, bool), 4096)
        return total / count

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(loss)
    rng = np.random.default_rng(config.seed)
    order = np.concatenate(
        [rng.permutation(len(rows)) for _ in range(-(-config.steps * config.batch_size // len(rows)))]
    )
    begun = time.perf_counter()
    for index in range(config.steps):
        tokens = rows[order[index * config.batch_size : (index + 1) * config.batch_size]]
        params, state, value = step(params, state, tokens)
        if (index % 10 == 9 or index + 1 == config.steps) and not math.isfinite(float(value)):
            raise InputError(f"step {index + 1}: the loss is {float(value)}; try a lower learning_rate")
        if index % 10 == 9:
            seconds = time.perf_counter() - begun
            report(
                {
                    "step": index + 1,
                    "loss": float(value),
                    "seconds": seconds,
                    "tokens_per_second": (index + 1) * tokens.size / seconds,
                }
            )
        if (index + 1) % config.save_every == 0 or index + 1 == config.steps:
            write_checkpoint(out, hf_config, nnx.merge(graph, params), dtype="bfloat16")
    batches = np.array_split(heldout, max(1, len(heldout) // config.batch_size))
    heldout_loss = float(np.average([float(evaluate(params, b)) for b in batches], weights=[len(b) for b in batches]))
    measured = {
        "heldout_loss_nats_per_token": heldout_loss,
        "final_train_loss": float(value),
        "steps": config.steps,
        "tokens": int(config.steps * config.batch_size * rows.shape[1]),
        "distinct_tokens": int(rows.size),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds": round(time.perf_counter() - begun),
        "recipe": config.to_dict(),
    }
    (out / "pretraining.json").write_text(json.dumps(measured, indent=2) + "\n")
    return measured
