"""A run's model and batches as shapes: what a plan compiles, and what random weights fill."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, abstract_weight
from qlora_jax.mesh.axes import ONE, Axes
from qlora_jax.mesh.shards import Shards
from qlora_jax.mesh.tensor import arranged
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.divided.splits import local_sizes, splits_of
from qlora_jax.models.families.module import assembled
from qlora_jax.settings import AUTO


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What of a config decides the model's arrays and programs."""

    sizes: ModelConfig
    quant: QuantSpec
    lora: lora.LoRAConfig
    compute_dtype: str = "bfloat16"
    kept_dtype: str = "bfloat16"  # of what is not quantized: embedding, head, and linear layers of an unquantized base
    remat: str = "block"
    attention: str = "auto"
    kernel: str = "auto"
    sequence_chunk: int = 0
    router_aux_loss_coef: float = 0.0
    source_len: int = 0  # of an encoder-decoder: tokens of a row's prompt and answer at most; 0: of the row
    target_len: int = 0
    sequence: int = 1  # devices that divide the tokens of each row

    @property
    def is_16bit(self) -> bool:
        return self.compute_dtype != "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of an activation's value."""
        return 2 if self.is_16bit else 4

    @property
    def low_rank(self) -> int:
        """Ranks of a layer's adapters together, but for those of experts."""
        names = lora.select_targets(self.lora.targets, self.sizes)
        return self.lora.rank * sum(not self.sizes.is_expert(name) for name in names)

    def of_one(self, axes: Axes) -> "ModelSpec":
        """Of what one device computes of a layer and of the head; its arrays are those of `AbstractModel.of_one`."""
        sizes = local_sizes(self.sizes, axes.tensor)
        V = sizes.V if sizes.V % axes.tensor else sizes.V // axes.tensor
        return dataclasses.replace(self, sizes=dataclasses.replace(sizes, V=V), sequence=axes.sequence)

    def part(self, T: int) -> int:
        """Of a row's T tokens those of one device."""
        return -(-T // self.sequence)

    def kept_share(self, T: int) -> float:
        """Of the tokens that all layers would take of a row of T, those that they do: an encoder-decoder's layers see
        the prompt or the answer."""
        if (pair := self.sizes.kind.pair) is None:
            return 1.0
        source, target = (min(limit or T, T) for limit in (self.source_len, self.target_len))
        return (pair.encoder_layers * source + pair.decoder_layers * target) / (self.sizes.L * T)

    def is_chunked(self, T: int) -> bool:
        """Whether rows of T tokens go through a layer in chunks."""
        return 0 < self.sequence_chunk < self.part(T)


def model_settings(section: Any) -> dict[str, Any]:
    """Of the config's `model` section, as ModelSpec has them."""
    remat = "block" if section.remat == AUTO else section.remat
    return {
        "compute_dtype": section.compute_dtype, "remat": remat, "attention": section.attention,
        "kernel": section.kernel, "sequence_chunk": section.sequence_chunk,
        "router_aux_loss_coef": section.router_aux_loss_coef,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """`lora.split` of a model that has shapes only; of one on a mesh, whole shapes."""

    graph: Any
    adapter: Any
    base: Any
    shards: Shards | None = None

    def of_one(self) -> "AbstractModel":
        """The shapes that one device of the mesh holds."""
        if self.shards is None:
            return self
        return dataclasses.replace(
            self, adapter=self.shards.of_one(self.adapter), base=self.shards.of_one(self.base)
        )

    def merged(self) -> Decoder:
        """The model itself, of ShapeDtypeStructs."""
        return nnx.merge(self.graph, self.adapter, self.base)


def abstract_model(spec: ModelSpec, axes: Axes = ONE) -> AbstractModel:
    """The model that `train/setup.prepare` would load on a mesh of these axes, as shapes and dtypes."""
    config = spec.sizes
    stored = jnp.dtype(spec.kept_dtype)
    splits = splits_of(config, axes, spec.quant)

    def made() -> Decoder:
        weights: dict[str, Any] = {
            slot: jnp.zeros(shape, jnp.float32 if config.is_float32(slot) else stored)
            for slot, (_, shape) in config.outer.items()
        }
        weights["layers"] = {
            name: jnp.zeros((config.depth(name), *shape), stored if name in config.sixteen_bit else jnp.float32)
            for name, shape in config.vectors.items()
        }
        for name, shape in config.linears.items():
            one: Any = abstract_weight(config, name, spec.quant)
            one = jax.ShapeDtypeStruct(shape, stored) if one is None else dataclasses.replace(one, backend=spec.kernel)
            if name in splits:
                one = jax.eval_shape(partial(arranged, split=splits[name], ways=axes.tensor), one)
            room = (config.depth(name), *config.copies(name))
            weights["layers"][name] = jax.tree.map(lambda x: jnp.zeros((*room, *x.shape), x.dtype), one)  # noqa: B023
        model = assembled(config, weights, spec.compute_dtype, spec.remat, spec.attention, spec.sequence_chunk)
        model.router_aux_loss_coef = spec.router_aux_loss_coef
        if config.kind.pair:
            model.source_len, model.target_len = spec.source_len, spec.target_len
        lora.attach(model, spec.lora, jax.random.key(0))
        return model

    model = nnx.eval_shape(made)
    graph, adapter, base = lora.split(model)
    if axes.devices == 1:
        return AbstractModel(graph, adapter, base)
    model.shards = Shards.of(axes, adapter, base, splits=splits)
    return AbstractModel(*lora.split(model), model.shards)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Tokens of an optimizer step: G micro-batches of B sequences of T tokens."""

    G: int
    B: int
    T: int
    packed: bool = False  # several examples in a row: the programs take segments

    @property
    def tokens(self) -> int:
        return self.G * self.B * self.T
