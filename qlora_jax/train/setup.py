"""From a config to everything a run needs: data first (its mistakes show in seconds), then model, adapter and
optimizer."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from qlora_jax import checksums, lora
from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import FileBatches
from qlora_jax.feed.load import LoadedData, load_data
from qlora_jax.io import peft
from qlora_jax.io.adapters.head import read_head
from qlora_jax.io.folder import has_tokenizer, resolve
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.peft_config import read_config
from qlora_jax.io.place import anywhere, as_read
from qlora_jax.io.remote import name_of
from qlora_jax.lora import LoRAConfig
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.place import Devices, by_rules, mesh_of
from qlora_jax.mesh.processes import are_several, everywhere
from qlora_jax.mesh.shards import Shards, bytes_of_one
from qlora_jax.mesh.tensor import arranged
from qlora_jax.models import attention
from qlora_jax.models.config import ModelConfig, read_json
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.divided.splits import local_sizes, splits_of
from qlora_jax.models.kind import Kind
from qlora_jax.models.layers import Frozen
from qlora_jax.models.mixtures.router import check_router_loss
from qlora_jax.models.roberta.encoder import Encoder
from qlora_jax.models.vocabulary import grow
from qlora_jax.optim.pages import state_bytes
from qlora_jax.optim.schedules import make_optimizer, make_schedule
from qlora_jax.residual import check_base
from qlora_jax.text.added_tokens import AddedTokens, extended_tokenizer, find_added
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import mmlu
from qlora_jax.train.checks import check_config
from qlora_jax.train.cut import ToCut
from qlora_jax.train.kinds.labels import with_labels
from qlora_jax.train.kinds.pair import check_data, check_kind, limit_rows, row_limits
from qlora_jax.train.mmlu import Asked
from qlora_jax.train.shapes import ModelSpec, model_settings

_NOT_SETTINGS = ("transformers_version", "_name_or_path")  # of config.json: who wrote it


class Base(NamedTuple):
    """A frozen model in memory, and what it was made of: its tensors, hashed as they were read, and config.json."""

    model: Decoder
    made_of: Input

    def fresh(self, section: Any) -> "Base":
        """The same arrays in a model of its own, which computes as the config's `model` section says.

        What is put on the one (an adapter, rows for tokens) is not on the other.
        """
        model = nnx.merge(*nnx.split(self.model))
        model.remat, model.attention = section.remat, section.attention
        model.sequence_chunk = section.sequence_chunk
        model.router_aux_loss_coef = section.router_aux_loss_coef
        return Base(model, self.made_of)


@dataclasses.dataclass
class Prepared:
    """What the loop works on. `graph`, `adapter`, `base`: of lora.split."""

    folder: Path
    tokenizer: Tokenizer | None
    data: LoadedData
    graph: Any
    adapter: Any
    base: Any
    lora_config: LoRAConfig
    tx: Any  # optax, without clipping
    schedule: Callable[[int], Any]
    steps: int  # optimizer steps of the run
    to_cut: ToCut  # a step's rows on one device, and how the config wants them cut
    devices: Devices | None  # None: one
    base_bytes: int  # the frozen model on a device
    base_bits_per_param: float  # of the linear layers, scales included
    trainable_params: int
    total_params: int
    mmlu: Asked | None  # questions of MMLU that are asked on the way
    added: AddedTokens | None  # to the tokenizer; None where the config adds none
    kind: Kind  # of the model

    def graph_with(self, remat: str) -> Any:
        """`graph` of the model that keeps for its gradient what `remat` says."""
        model = nnx.merge(self.graph, self.adapter, self.base)
        model.remat = remat
        return lora.split(model)[0]

    @property
    def row_parts(self) -> int:
        """Devices that divide the rows of a batch."""
        return 1 if self.devices is None else self.devices.shards.row_parts

    def on_devices(self, adapter: Any) -> Any:
        """An adapter where the run has it."""
        return adapter if self.devices is None else everywhere(adapter, self.devices.shardings(adapter))

    def given(self, x: Any) -> Any:
        """A program's input, which every process has whole, where the devices of several take it."""
        return everywhere(x, self.devices.rows(x)) if self.devices is not None and are_several() else x

    def grown_matrices(self) -> dict[str, Any]:
        """Embedding and head that do not train, where they have rows for new tokens: the adapter needs them too.

        Of a tied model that one array twice, as write_adapter has it.
        """
        if self.added is None or not self.added.new:
            return {}
        model = nnx.merge(self.graph, self.adapter, self.base)
        matrices = {"embed_tokens": model.embedding, "lm_head": model.embedding if model.head is None else model.head}
        return {name: matrix.get_value() for name, matrix in matrices.items() if isinstance(matrix, Frozen)}


def prepare(
    config: Any,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    check: Callable[[dict[str, Input]], None] = lambda inputs: None,
    base: Base | None = None,
) -> Prepared:
    """Reads, checks and builds everything.

    Args:
      config: as configs/base.py.
      say: takes lines for the user.
      progress: of loading the model, (tensors done, tensors in all).
      check: takes what the config's names of files stand for, as soon as it is read; data before the model.
      base: the model, where it is in memory already; as `load_base` reads it for this config.
    Raises:
      InputError: any mistake in config, data or model, in one line; or what `check` raises.
    """
    check_config(config)
    axes = Axes.of(config.mesh)
    mesh = mesh_of(axes) if axes.devices > 1 or are_several() else None
    quant = quantization(config)
    folder = resolve(config.model.path, config.model.revision)
    model_config = load_config(folder)
    is_encoder = model_config.kind.bidirectional is not None
    added = added_tokens(config.data, folder)
    lora_config = read_lora_config(config.lora, bool(added and added.new), model_config.tied)
    lora_config = with_labels(lora_config, config, model_config)
    lora.select_targets(lora_config.targets, model_config)
    check_router_loss(config.model, model_config)
    check_kind(config, model_config)
    splits = splits_of(model_config, axes, quant)
    if splits and base is not None:
        raise InputError(
            f"mesh.tensor is {axes.tensor}, and a model in memory is laid out for one device: train it by "
            "experiments.train, or divide it along mesh.fsdp"
        )
    if config.lora.init_from:
        residual = read_config(Path(config.lora.init_from)).residual
        check_base(residual, quant.format != "none")
        if residual and splits:
            raise InputError(
                f"lora.init_from starts from {residual}, which changes the base's weights, and mesh.tensor = "
                f"{axes.tensor} divides each: set mesh.tensor=1 and mesh.fsdp={axes.fsdp * axes.tensor}"
            )
    tokenizer, V = None, model_config.V
    if added is not None:
        tokenizer, V = extended_tokenizer(added), added.rows(V)
        _say_tokens(added, model_config.V, lora_config, say)
    elif not config.data.batches:
        tokenizer = Tokenizer.from_folder(folder)
    data = load_data(config.data, tokenizer, config.train.batch_size, V, model_config.context)
    check_data(data, model_config)
    for line in data.report:
        say(line)
    asked = mmlu.read(config, tokenizer or folder, model_config.context, V, say) if config.eval.mmlu_data else None
    check(data.inputs | ({} if asked is None else {"eval.mmlu_data": asked.input}))
    longest = data.batches.longest_example if data.is_packed else data.batches.max_length
    longest = 0 if is_encoder else longest  # whose rows are cut to its positions
    if longest > model_config.context and model_config.kind.positions:
        raise InputError(
            f"sequences of up to {longest} tokens, but the model has {model_config.context} learned positions: set "
            "data.max_source_len and data.max_target_len (or data.pack_length) so that they fit"
        )
    if longest > model_config.context:
        say(f"warning: sequences of up to {longest} tokens, but the model was made for {model_config.context}")
    steps = step_count(config, data)
    if steps != config.train.steps:
        say(f"data: one pass over data.batches: {steps} steps, fewer than train.steps = {config.train.steps}")
    tx = make_optimizer(config.optimizer, steps)
    if not is_encoder:
        of_one = local_sizes(model_config, axes.tensor)
        _say_attention(config.model, of_one, data.batches.max_length, say, axes.sequence)
    place = anywhere if mesh is None else partial(by_rules, mesh, splits=splits)
    arrange = (lambda name, weight: arranged(weight, splits[name], axes.tensor)) if splits else as_read
    model, base_input = (
        load_base(config, folder, progress, place, arrange) if base is None else base.fresh(config.model)
    )
    check({"model.path": base_input})
    begun = ""
    if isinstance(model, Encoder) and not config.lora.init_from:
        kept = model.classifier is not None and model.classifier.labels == lora_config.labels
        begun = f"; it starts {'from the one of the base' if kept else 'afresh, drawn by train.seed'}"
    limit_rows(model, row_limits(model_config, [config.data]))
    lora.attach(model, lora_config, jax.random.key(config.train.seed))
    if added is not None:
        grow(model, V, added.rows_to_fill(model_config.V), added.real_rows(model_config.V))
    if config.lora.init_from:
        start = read_start(model, Path(config.lora.init_from), lora_config, added)
        check({"lora.init_from": start_input(config.lora.init_from)})
        lora_config = dataclasses.replace(lora_config, residual=start.residual)
        if start.residual:
            say(f"model: {start.residual} took its first {lora_config.rank} directions out of the base, as peft does")
        peft.take_out(model, dataclasses.replace(lora_config, targets=tuple(start.arrays)), progress)
        for name, (a, b) in start.arrays.items():
            lora.set_adapter(model, name, a, b, lora_config.scale)
        for name, matrix in start.matrices.items():
            lora.train_whole(model, name, jax.device_put(matrix))
        if start.head:
            lora.train_head(model, jax.device_put(dict(start.head)))
    graph, adapter, frozen = lora.split(model)
    devices = None
    if mesh is not None:
        devices = Devices(mesh, Shards.of(axes, adapter, frozen, splits=splits))
        model.shards = devices.shards
        graph, adapter, frozen = lora.split(model)
        adapter, frozen = (everywhere(tree, devices.shardings(tree)) for tree in (adapter, frozen))
    to_cut = rows_to_cut(config, dataclasses.replace(model_config, V=V), lora_config, data)
    base_bytes = bytes_of_one(None if devices is None else devices.shards, frozen)
    bits, base_params = base_size(model)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    say(
        f"model: {name_of(folder)}: {base_params:,} parameters, {quant}: {base_bytes / 2**20:,.1f} MiB, linear layers "
        f"{bits:.3f} bits a weight; adapter: rank {lora_config.rank}, {trainable:,} parameters "
        f"({100 * trainable / base_params:.2f}%)"
    )
    if whole := lora.whole_matrices(adapter):
        size, state = _bytes(whole), state_bytes(tx, whole)
        say(
            f"model: {' and '.join(lora_config.modules_to_save)} train whole (lora.modules_to_save), "
            f"{size // 4:,} of these parameters: {size / 2**20:,.1f} MiB in float32, as much for gradients, and "
            f"{state / 2**20:,.1f} MiB of optimizer state"
        )
    if head := lora.head_arrays(adapter):
        what = "a number" if lora_config.labels == 1 else f"{lora_config.labels} classes"
        trained = sum(leaf.size for leaf in head.values())
        say(f"model: its head, which gives {what}, trains whole in float32, {trained:,} of these parameters{begun}")
    o = config.optimizer
    schedule = make_schedule(o.schedule, o.learning_rate, steps, o.warmup_steps)
    return Prepared(
        folder, tokenizer, data, graph, adapter, frozen, lora_config, tx, schedule, steps, to_cut, devices,
        base_bytes, bits, trainable, base_params + trainable, asked, added, model_config.kind,
    )  # fmt: skip


def added_tokens(data: Any, folder: Path) -> AddedTokens | None:
    """What the config's `data` section adds to the tokenizer of a checkpoint folder; None where it names nothing."""
    if not data.added_tokens and not data.added_special_tokens:
        return None
    return find_added(folder, data.added_tokens, data.added_special_tokens)


def read_lora_config(section: Any, adds_tokens: bool, tied: bool) -> LoRAConfig:
    """The config's `lora` section."""
    modules = lora.select_modules(section.modules_to_save, adds_tokens, tied)
    return LoRAConfig(section.rank, section.alpha, section.dropout, tuple(section.targets), section.use_rslora, modules)


def _say_tokens(added: AddedTokens, V: int, config: LoRAConfig, say: Callable[[str], None]) -> None:
    for line in added.report(V):
        say(line)
    frozen = [name for name in lora.MODULES if name not in config.modules_to_save]
    if added.new and frozen:
        names = " and ".join(frozen)
        say(f"tokens: warning: lora.modules_to_save leaves out {names}: new rows there do not train and stay the mean")


def step_count(config: Any, data: LoadedData) -> int:
    """Optimizer steps of the run, at most a file of ready batches once."""
    steps = config.train.steps
    return min(steps, len(data.batches)) if isinstance(data.batches, FileBatches) else steps


def rows_to_cut(config: Any, sizes: ModelConfig, lora_config: LoRAConfig, data: LoadedData) -> ToCut:
    """The rows of a step of `data`; `sizes` with added tokens in V."""
    settings = model_settings(config.model) | row_limits(sizes, [config.data])
    spec = ModelSpec(sizes, quantization(config), lora_config, **settings)
    axes = Axes.of(config.mesh)
    return ToCut.of(config, spec.of_one(axes), axes.rows(data.batches.batch_size), data.batches.max_length)


def load_base(
    config: Any,
    folder: Path,
    progress: Callable[[int, int], None],
    place: Callable[[str, Any], Any] = anywhere,
    arrange: Callable[[str, Any], Any] = as_read,
) -> Base:
    """The frozen model that the config's `model` and `quant` sections describe, from its folder.

    `place`, `arrange`: see load_model.
    """
    m = config.model
    sums: list[str] = []
    check_router_loss(m, load_config(folder))
    model = load_model(
        folder, quantization(config), m.compute_dtype, m.remat, m.attention, m.kernel, progress, m.sequence_chunk,
        sums.append, place, arrange,
    )  # fmt: skip
    model.router_aux_loss_coef = m.router_aux_loss_coef
    settings = {key: value for key, value in read_json(folder / "config.json").items() if key not in _NOT_SETTINGS}
    settings_sum = checksums.of(json.dumps(settings, sort_keys=True))
    parts = [("the weights of the base", sums[0]), ("config.json of the base", settings_sum)]
    return Base(model, Input(checksums.of(*sums, settings_sum), parts))


def start_input(folder: str) -> Input:
    """What lora.init_from stands for."""
    content = checksums.of_file(Path(folder) / peft.WEIGHTS)
    return Input(content, [(f"{folder}/{peft.WEIGHTS}", content)])


def quantization(config: Any) -> QuantSpec:
    """The `quant` section."""
    return QuantSpec(config.quant.format, config.quant.block_size, config.quant.double_quant)


def _say_attention(model: Any, sizes: ModelConfig, longest: int, say: Callable[[str], None], ways: int = 1) -> None:
    """What attention does is said where the config leaves it open, or where a chunk decides it."""
    if sizes.kind.pair is not None:
        return
    if 0 < model.sequence_chunk < -(-longest // ways):
        say(f"model: sequences over {model.sequence_chunk} tokens in chunks of at most that, attention = chunked")
    elif model.attention == "auto":
        of_heads = (sizes.N, sizes.H, model.compute_dtype) if ways == 1 else ()
        chosen = attention.chosen("auto", longest, *of_heads)
        say(
            f"model: attention = {chosen} for the longest sequences, of {longest} tokens (auto: flash where it was "
            f"measured to be faster, else xla up to {attention.LONGEST_WHOLE}, chunked above)"
        )


class Start(NamedTuple):
    """What a run starts from."""

    arrays: dict[str, tuple[jax.Array, jax.Array]]  # {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}
    matrices: dict[str, np.ndarray]  # embed_tokens, lm_head [V, D], those that train whole
    residual: str  # as LoRAConfig's
    head: dict[str, np.ndarray]  # of an encoder


def read_start(model: Decoder, folder: Path, wanted: LoRAConfig, added: AddedTokens | None = None) -> Start:
    """A PEFT folder's adapter and whole matrices, to start from. Its rank, scale, layers and tokens must be the
    config's; a matrix that trains whole and that the folder does not have starts from the base's."""
    found, arrays = peft.read_adapter(model, folder, to_train=True)
    matrices = peft.read_matrices(model, folder)
    names = lora.select_targets(wanted.targets, model.config)
    differing = [
        f"{key} {there!r} there, {here!r} in the config"
        for key, there, here in (
            ("rank", found.rank, wanted.rank),
            ("alpha", found.alpha, float(wanted.alpha)),
            ("use_rslora", found.use_rslora, wanted.use_rslora),
            ("targets", sorted(found.targets), sorted(names)),
        )
        if there != here
    ]
    differing += [
        f"{name} trains whole there and not in the config (lora.modules_to_save)"
        for name in matrices
        if name not in wanted.modules_to_save
    ]
    differing += [
        f"{name} has {len(matrix)} rows there, {model.config.V} here (data.added_tokens, data.added_special_tokens)"
        for name, matrix in matrices.items()
        if len(matrix) != model.config.V
    ]
    head = read_head(model.config, folder)
    if (labels := len(head["out_proj.bias"]) if head else 0) != wanted.labels:
        differing.append(f"its head has {labels} labels, the data have {wanted.labels}")
    if added is not None and matrices:
        differing += _other_ids(added, folder)
    if differing:
        raise InputError(f"lora.init_from: {folder} does not match the lora section: {'; '.join(differing)}")
    return Start(arrays, matrices, found.residual, head)


def _other_ids(added: AddedTokens, folder: Path) -> list[str]:
    """New tokens whose ids are others in the tokenizer beside an adapter, if there is one."""
    if not has_tokenizer(folder):
        return []
    theirs = Tokenizer.from_folder(folder, added.folder)
    return [
        f"token {text!r} has id {theirs.id_of(text)} there, {number} here"
        for text, number in added.new.items()
        if theirs.id_of(text) != number
    ]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def base_size(model: Decoder) -> tuple[float, int]:
    """Bits a weight of the linear layers, and the parameters of the frozen model."""
    bits, weights = 0, 0
    for name in model.config.linears:
        w = lora.linear(model, name).weight.get_value()
        bits += 8 * w.nbytes
        weights += model.config.weights(name)
    trained = [slot for slot in ("embedding", "head") if not isinstance(getattr(model, slot), Frozen)]
    if model.config.kind.bidirectional:  # whose head trains, or is another
        trained += [slot for slot in model.config.outer if slot.startswith(model.config.kind.bidirectional.head)]
    shapes = [shape for slot, (_, shape) in model.config.outer.items() if slot not in trained]
    vectors = (model.config.depth(name) * math.prod(shape) for name, shape in model.config.vectors.items())
    others = sum(map(math.prod, shapes)) + sum(vectors)
    return bits / weights, weights + others
