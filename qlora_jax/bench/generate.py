"""Tokens a second of answers: the decoding that `generate` uses, on random weights, by kernel and number of rows.

A token's time is the slope between few and many new tokens of greedy answers, so that neither reading the prompts nor
what a call costs once is in it; between calls of CHUNK tokens the host looks at them, as it does for users. All rows
answer until the last token.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.bench.synthetic import random_model
from qlora_jax.errors import InputError
from qlora_jax.generate.decode import CHUNK, Decoding, room_for
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.seeds import draws_of_all
from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig, drop_adapter, select_targets
from qlora_jax.models.config import ModelConfig, parse_config
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.known import known_config
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.train.shapes import ModelSpec

SIZES = {
    "7b": "huggyllama/llama-7b",
    "13b": "huggyllama/llama-13b",
    "65b": "huggyllama/llama-65b",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
}
TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
DENSE = "dense"
PROMPT, TOKENS = 16, (CHUNK, 4 * CHUNK)  # of the prompt; new ones, few and many


def sizes(name: str) -> ModelConfig:
    """Of a name in SIZES, or "tiny". Raises InputError for another."""
    if name == "tiny":
        return parse_config(TINY, "tiny")
    found = known_config(SIZES.get(name, ""))
    if found is None:
        raise InputError(f"--size={name}: expected tiny, {', '.join(SIZES)}")
    return found


def made(config: ModelConfig, form: str, rank: int, compute_dtype: str, seed: int = 0) -> Decoder:
    """A random model whose products are computed by `form`: DENSE, or one of nf4_matmul's backends."""
    quant = QuantSpec("none") if form == DENSE else QuantSpec()
    lora = LoRAConfig(rank=rank or 1)
    kernel = "xla" if form == DENSE else form
    spec = ModelSpec(config, quant, lora, compute_dtype, kept_dtype=compute_dtype, kernel=kernel)
    model = random_model(spec, seed).merged()
    if not rank:
        for name in select_targets(lora.targets, config):
            drop_adapter(model, name)
    return model


def with_kernel(model: Decoder, kernel: str) -> Decoder:
    """The same arrays, multiplied by another backend."""
    graph, state = nnx.split(model)

    def changed(leaf: Any) -> Any:
        return dataclasses.replace(leaf, backend=kernel) if isinstance(leaf, QuantizedTensor) else leaf

    return nnx.merge(graph, jax.tree.map(changed, state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)))


def token_bytes(model: Decoder, rows: int) -> int:
    """What a token of all rows must read at least: linear layers, adapters and head, once; keys and values of each row.

    Of the cache what lies in it half way through the answer.
    """
    config = model.config
    blocks = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.split(model.blocks)[1]))
    adapter = jax.tree.leaves(nnx.split(model.blocks, nnx.LoRAParam, ...)[1])
    itemsize = model.compute_dtype.itemsize
    blocks -= sum(leaf.size * (leaf.dtype.itemsize - itemsize) for leaf in adapter)  # rounded before the first token
    cache = 2 * config.L * rows * (PROMPT + TOKENS[1] // 2) * config.K * config.H * itemsize
    return blocks + config.V * config.D * itemsize + cache


def token_seconds(
    model: Decoder, rows: int, repeats: int, seed: int = 0, graphs: bool = False
) -> dict[str, float]:
    """{"token_seconds": of one token of all rows, the median slope; "first_seconds": of the first call, compiling}.

    graphs: see Decoding.
    """
    few, many = TOKENS
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.config.V, (rows, PROMPT)).tolist()
    sampling = Sampling(max_new_tokens=many, temperature=0.0)
    room = room_for(model, PROMPT, many)

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        answer = Decoding(model, prompts, sampling, (), draws_of_all(prompts, seed), room, graphs=graphs)
        for _ in range(count // CHUNK):
            answer.step(CHUNK)
        jax.block_until_ready(answer.tokens)
        taken = time.perf_counter() - begun
        if answer.steps != count:
            raise InputError(
                f"{answer.steps} tokens were drawn, expected {count}: the slope would be of something else"
            )
        return taken

    first = seconds(few)
    slopes = [(seconds(many) - seconds(few)) / (many - few) for _ in range(repeats)]
    return {"token_seconds": statistics.median(slopes), "first_seconds": first}
