"""LoRA adapters on the frozen linear layers: config, targets, initialisation, split of the parameter tree.

A linear layer with an adapter computes y = x W^T + scale * dropout(x) A^T B^T with A [R, I], B [O, R] in float32 and
scale = alpha / R. B starts at zero, so a fresh adapter changes nothing; A is drawn as PEFT draws it (Kaiming-uniform
with a = sqrt(5), that is uniform within 1 / sqrt(I)). Source: Hu et al., 2021; peft's LoraLayer.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layers import Linear, Trained, part_of
from qlora_jax.models.roberta.encoder import Encoder
from qlora_jax.models.roberta.head import fresh_head

MODULES = {"embed_tokens": "embedding", "lm_head": "head"}  # what may train whole: its name here -> Decoder's attribute


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1  # probability, on the adapter's input
    targets: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False  # scale by alpha / sqrt(rank)
    modules_to_save: tuple[str, ...] = ()  # of MODULES, in that order; these matrices train whole
    labels: int = 0  # classes of an encoder's head, which trains whole; 1: it gives a number; 0: of decoders
    residual: str = ""  # "pissa" or "olora": the base lacks what this start took out of it (qlora_jax.residual)

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; expected a probability from 0 to below 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise InputError(f"lora.alpha is {self.alpha}; expected a positive number")
        if unknown := [name for name in self.modules_to_save if name not in MODULES]:
            raise InputError(f"lora.modules_to_save has {unknown[0]!r}; expected {' or '.join(MODULES)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def select_targets(targets: Sequence[str], model: ModelConfig) -> list[str]:
    """Names of the linear layers that carry an adapter, in the order of config.linears.

    Args:
      targets: "all-linear", a layer's name ("q_proj", "mlp.up_proj"), or a regular expression that matches a full name
        ("model.layers.0.self_attn.q_proj").
      model: sizes and names. Layers are stacked, so a projection carries an adapter in every layer or in none.
    Raises:
      InputError: a target matches nothing, is no regular expression, or picks only some of the layers.
    """
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            chosen |= set(model.linears)
            continue
        named = {name for name in model.linears if name == target or name.endswith("." + target)}
        chosen |= named or _matched(target, model)
    if not chosen:
        raise InputError('lora.targets is empty; expected "all-linear", names or regular expressions')
    return [name for name in model.linears if name in chosen]


def select_modules(names: Sequence[str], adds_tokens: bool, tied: bool) -> tuple[str, ...]:
    """The matrices that train whole, for `lora.modules_to_save` of a config.

    Args:
      names: of MODULES; or "auto": all of them where rows for new tokens must be learned, else none.
      adds_tokens: whether there are such rows.
      tied: embedding and head are one array, so that both names stand for both.
    """
    wanted = {*names} - {"auto"} | ({*MODULES} if "auto" in names and adds_tokens else set())
    if unknown := sorted(wanted - {*MODULES}):
        raise InputError(f"lora.modules_to_save has {unknown[0]!r}; expected auto, or {', '.join(MODULES)}")
    return tuple(name for name in MODULES if name in wanted or (tied and wanted))


def _matched(pattern: str, model: ModelConfig) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora.targets: {pattern!r} is no regular expression: {error}") from error
    modules = {name: [key.removesuffix(".weight") for key in model.slots(name)] for name in model.linears}
    counts = {name: sum(bool(expression.fullmatch(module)) for module in modules[name]) for name in model.linears}
    partly = [
        f"{name} in {count} of {len(modules[name])}{' experts of all' * model.is_expert(name)}"
        for name, count in counts.items()
        if 0 < count < len(modules[name])
    ]
    if partly:
        raise InputError(
            f"lora.targets: {pattern!r} picks {', '.join(partly)} layers; a projection takes adapters in all or none"
        )
    matched = {name for name, count in counts.items() if count}
    if not matched:
        known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in model.linears))
        raise InputError(
            f"lora.targets: {pattern!r} matches no linear layer; known: {known}, or an expression over full names"
        )
    return matched


def rank_one_parameters(model: ModelConfig, name: str) -> int:
    """Parameters of an adapter of rank 1 on a linear layer, in all layers and experts."""
    return math.prod((model.depth(name), *model.copies(name))) * sum(model.linears[name])


def linear(model: Decoder, name: str) -> Linear:
    """The stacked layer called `name`, such as "self_attn.q_proj"."""
    return part_of(model.blocks, name)


def attach(model: Decoder, config: LoRAConfig, key: jax.Array) -> list[str]:
    """Puts a fresh adapter on the model in place and returns the names of the layers that carry one."""
    arrays = fresh_adapter(model, config, key)
    for name, (a, b) in arrays.items():
        set_adapter(model, name, a, b, config.scale)
    for name in config.modules_to_save:
        train_whole(model, name)
    if config.labels:
        train_head(model, start_of_head(model, config.labels, key))
    model.dropout_rate = config.dropout
    return list(arrays)


def fresh_adapter(model: Decoder, config: LoRAConfig, key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{"self_attn.q_proj": (A [L, R, I] drawn, B [L, O, R] zero)} of the targeted layers; the model is only read.

    Experts have an adapter each: A [L, E, R, I], B [L, E, O, R].
    """
    names = select_targets(config.targets, model.config)
    arrays = {}
    for place, name in enumerate(model.config.linears):
        if name in names:
            O, I = shape(model, name)
            bound = 1 / math.sqrt(I)
            room = (model.config.depth(name), *model.config.copies(name))
            a_shape, b_shape = (*room, config.rank, I), (*room, O, config.rank)
            # drawn flat: the same numbers, but XLA:CPU unrolls their hash over short axes, and compiles for seconds
            a = jax.random.uniform(jax.random.fold_in(key, place), (math.prod(a_shape),), jnp.float32, -bound, bound)
            arrays[name] = a.reshape(a_shape), jnp.zeros(b_shape, jnp.float32)
    return arrays


def set_adapter(model: Decoder, name: str, a: jax.Array, b: jax.Array, scale: float) -> None:
    """a [L, R, I], b [L, O, R], float32."""
    layer = linear(model, name)
    layer.lora_a, layer.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
    layer.lora_scale = scale


def drop_adapter(model: Decoder, name: str) -> None:
    """Takes an adapter off a layer, if it carries one."""
    layer = linear(model, name)
    layer.lora_a, layer.lora_b = nnx.data(None), nnx.data(None)


def train_whole(model: Decoder, name: str, value: jax.Array | None = None) -> None:
    """Makes one of MODULES train, in float32, from its own values or from `value` [V, D]."""
    if model.config.kind.head_bias:
        raise InputError("lora.modules_to_save: a head with a bias does not train whole here; leave it empty")
    attribute = MODULES[name] if model.head is not None else "embedding"
    value = getattr(model, attribute).get_value() if value is None else value
    setattr(model, attribute, Trained(value.astype(jnp.float32)))


def start_of_head(model: Decoder, labels: int, key: jax.Array) -> dict[str, jax.Array]:
    """Arrays of an encoder's head to train from: the model's own, or where that has other classes, or there is none, a
    fresh one, drawn from the key of the adapter."""
    assert isinstance(model, Encoder)
    if model.classifier is not None and model.classifier.labels == labels:
        return model.classifier.arrays()
    return fresh_head(model.bidirectional, model.config.D, labels, jax.random.fold_in(key, len(model.config.linears)))


def train_head(model: Decoder, arrays: Mapping[str, jax.Array]) -> None:
    """Makes an encoder's head one that trains, with these arrays (Head)."""
    assert isinstance(model, Encoder)
    model.set_head({name: value.astype(jnp.float32) for name, value in arrays.items()}, trains=True)


def shape(model: Decoder, name: str) -> tuple[int, int]:
    """(O, I) of a linear layer."""
    w = linear(model, name).weight.get_value()
    return w.shape[-2], w.shape[-1]


def split(model: Decoder) -> tuple[Any, Any, Any]:
    """(graph, adapter, base): `nnx.merge(graph, adapter, base)` is the model again. Only the adapter trains."""
    graph, adapter, *rest = nnx.split(model, nnx.LoRAParam, ...)
    return graph, adapter, rest[0]


def adapter_arrays(adapter: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The adapter's state -> {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}."""
    found: dict[str, tuple[jax.Array, jax.Array]] = {}

    def collect(parts: dict[Any, Any], name: str) -> None:
        if "lora_a" in parts:
            found[name] = parts["lora_a"], parts["lora_b"]
            return
        for step, inner in parts.items():
            collect(inner, f"{name}.{step}" if name else step)

    collect(nnx.to_pure_dict(adapter)["blocks"] if jax.tree.leaves(adapter) else {}, "")
    return found


def whole_matrices(adapter: Any) -> dict[str, jax.Array]:
    """The adapter's state -> {"embed_tokens": [V, D], "lm_head": [V, D]}, those that train; not a tied head."""
    pure = nnx.to_pure_dict(adapter)
    return {name: pure[attribute] for name, attribute in MODULES.items() if attribute in pure}


def head_arrays(adapter: Any) -> dict[str, jax.Array]:
    """The adapter's state -> {"dense.weight": [D, D], ...} of an encoder's head; {} of a decoder."""
    parts = nnx.to_pure_dict(adapter).get("classifier", {})
    return {f"{part}.{which}": value for part, values in parts.items() for which, value in values.items()}
