"""Compiles a step of decoding for an H200 that is not here, and reads what XLA would launch: its sequence of thunks."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.generate import decode
from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.block import Cache
from qlora_jax.models.config import ModelConfig, parse_config
from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.topology import compile_for, on_gpu
from qlora_jax.train.shapes import ModelSpec, abstract_model


def thunks(folder: Path, kernel: str) -> list[str]:
    """The sequence's lines, before XLA looks for what can be a CUDA graph; loops' and branches' are indented."""
    compile_step(kernel, decode.GRAPHS | {"xla_dump_to": str(folder)})
    (file,) = folder.glob("*.thunk_sequence.txt")
    return file.read_text().splitlines()


def small_model(kernel: str, layers: int = 3) -> tuple[ModelConfig, Any, Any]:
    """Sizes, graph and state (shapes alone) of a model whose products every kernel takes."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"vocab_size": 512, "max_position_embeddings": 2048}
    config = parse_config({"architectures": ["LlamaForCausalLM"]} | sizes, "small")
    spec = ModelSpec(config, QuantSpec(), LoRAConfig(rank=8), "bfloat16", kept_dtype="bfloat16", kernel=kernel)
    return config, *nnx.split(abstract_model(spec).merged())


def empty_cache(config: ModelConfig, B: int, S: int) -> Cache:
    """As shapes."""
    array = jax.ShapeDtypeStruct((config.L, B, S, config.K, config.H), jnp.bfloat16)
    return Cache(array, array)


def compile_step(kernel: str, options: dict[str, Any]) -> None:
    config, graph, state = small_model(kernel)
    array, B = jax.ShapeDtypeStruct, 8
    whole, real, flags = array((B,), jnp.int32), array((), jnp.float32), array((B,), jnp.bool_)
    rows = decode.Rows(empty_cache(config, B, 128), array((B, config.D), jnp.bfloat16), whole, whole, flags)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    number = array((), jnp.int32)
    settings = decode.Settings(whole, keys, array((decode.ENDS,), jnp.int32), real, real, number, real)
    compile_for(
        GPUS["h200"],
        lambda *arguments: decode.draw_tokens(graph, *arguments, decode.WIDTH),
        *on_gpu(GPUS["h200"], (state, rows, settings, number)),
        compiler_options=options,
        donate_argnums=(1,),
    )
