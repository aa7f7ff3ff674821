"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, out and in.

Keys are `base_model.model.model.layers.{layer}.{name}.lora_A.weight` [R, I] and `....lora_B.weight` [O, R], float32; a
family's own names stand in a Kind. Matrices that trained whole (modules_to_save) are
`base_model.model.model.embed_tokens.weight` and `base_model.model.lm_head.weight`, float32 [V, D]. PEFT unties a tied
head: then both keys hold the one array, and ensure_weight_tying keeps it one. Where tokens were added the tokenizer's
files stand beside them.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import checksums, lora
from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, save_tensors, write_json
from qlora_jax.finite import check_finite
from qlora_jax.io.header import Place, numpy_dtype, read_header
from qlora_jax.io.peft_config import CONFIG, AdapterConfig, read_config
from qlora_jax.io.place import put
from qlora_jax.io.source import LocalSource
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.kind import LLAMA, Kind
from qlora_jax.models.layers import Frozen
from qlora_jax.models.vocabulary import set_rows
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.residual import check_base, residual

WEIGHTS = "adapter_model.safetensors"
PROMPTS = "qlora_jax_prompts.json"  # how the adapter is asked (generate/trained); PEFT passes over it
_PICKLE = "adapter_model.bin"  # what peft before 0.6 wrote
_PREFIX = "base_model.model."
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_FLOATS = ("float32", "float16", "bfloat16")
_MOST_SHOWN = 8  # problems in one message


def write_adapter(
    out: Path,
    adapter: Any,
    config: LoRAConfig,
    base: str,
    matrices: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], Any] | None = None,
    kind: Kind = LLAMA,
) -> None:
    """Writes the adapter's state as a PEFT folder, whole or not at all.

    Args:
      out: folder; one that stands there is replaced.
      adapter: of `lora.split`.
      config: rank, alpha, dropout, rslora, modules_to_save.
      base: path or hub name of the base model, for adapter_config.json.
      matrices: embed_tokens and lm_head that do not train but differ from the base's, [V, D] each.
      write_beside: writes more files into the folder (a tokenizer's).
      kind: of the base, for its names.
    """
    arrays, trained = lora.adapter_arrays(adapter), lora.whole_matrices(adapter)
    write_arrays(out, arrays, config, base, matrices, trained, write_beside, kind)


def write_arrays(
    out: Path,
    arrays: dict[str, tuple[Any, Any]],
    config: LoRAConfig,
    base: str,
    matrices: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], Any] | None = None,
    kind: Kind = LLAMA,
) -> None:
    """As write_adapter, of {"self_attn.q_proj": (A [L, R, I], B [L, O, R])} and the matrices that trained whole."""
    if strangers := arrays.keys() - {*kind.linear.values()}:
        raise ValueError(f"{sorted(strangers)} are no linear layers of this kind of model")
    keys = _matrix_keys(kind)
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in arrays.items():
        for letter, stacked in (("A", np.asarray(a)), ("B", np.asarray(b))):
            tensors |= {_key(kind, index, name, letter): np.ascontiguousarray(x) for index, x in enumerate(stacked)}
    trained = dict(trained or {})
    is_tied = bool(trained) and "lm_head" in config.modules_to_save and "lm_head" not in trained
    if is_tied:
        trained["lm_head"] = trained["embed_tokens"]
    tensors |= {keys[name]: np.asarray(x) for name, x in (dict(matrices or {}) | trained).items()}
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": is_tied,
        "fan_in_fan_out": kind.transposed,
        "inference_mode": True,
        "init_lora_weights": config.residual or True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": [_last(keys[name]) for name in trained] or None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted({_target(name, arrays, kind) for name in arrays}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    with atomic_folder(out) as folder:
        save_tensors(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, settings)
        if write_beside is not None:
            write_beside(folder)


def read_adapter(model: Decoder, folder: Path, to_train: bool = False) -> tuple[LoRAConfig, dict[str, tuple[Any, Any]]]:
    """The LoRA adapter of a PEFT folder, stacked for this model; `read_matrices` has the rest of the folder.

    Layers are stacked, so ranks and scales that differ are made equal: a smaller rank gets zeros, a layer without an
    adapter nothing but zeros, another scale goes into B. What the adapter computes stays the same.

    Args:
      model: only read.
      to_train: refuse what stacking had to change: zeros would train too.
    Returns:
      its config (targets as full names of ours), and {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}, float32.
    Raises:
      InputError: one message that lists every tensor that is missing, unexpected or misshapen; or one is not finite.
    """
    settings, tensors = read_config(folder), _Tensors(folder, model.config.kind)
    placed = _placed(settings, model.config)
    check_residual(settings.residual, False, model.config.kind)
    if unlike := _unlike(placed, model.config):
        if settings.residual:
            raise InputError(
                f"{settings.where}: {unlike}, but init_lora_weights {settings.residual!r} is read where all are alike"
            )
        if to_train:
            raise InputError(f"{settings.where}: {unlike}; training needs one rank and scale, and all layers or none")
    wanted: dict[str, tuple[int, ...]] = {}
    for (index, name), (rank, _) in placed.items():
        O, I = lora.shape(model, name)
        kind = model.config.kind
        wanted |= {_key(kind, index, name, "A"): (rank, I), _key(kind, index, name, "B"): (O, rank)}
    tensors.check(wanted)
    config = _common_config(settings, placed, model.config)
    return config, {name: _stack(model, name, tensors, placed, config) for name in config.targets}


def _key(kind: Kind, index: int, name: str, letter: str) -> str:
    """The tensor of an adapter: letter "A" or "B" of a layer's projection."""
    return f"{_PREFIX}{kind.layer.format(index)}.{name}.lora_{letter}.weight"


def _matrix_keys(kind: Kind) -> dict[str, str]:
    """{"embed_tokens": key, "lm_head": key} of what may train whole."""
    return {"embed_tokens": f"{_PREFIX}{kind.embedding}.weight", "lm_head": f"{_PREFIX}{kind.head}.weight"}


def _last(key: str) -> str:
    """The name of a key's module: embed_tokens."""
    return key.removesuffix(".weight").rpartition(".")[2]


def _target(name: str, carrying: Container[str], kind: Kind) -> str:
    """How target_modules names a projection: by its end, unless that is also the end of one without an adapter."""
    end = name.rpartition(".")[2]
    alike = [other for other in kind.linear.values() if other.rpartition(".")[2] == end]
    return end if all(other in carrying for other in alike) else name


def check_residual(init: str, quantized: bool, kind: Kind) -> None:
    """Raises InputError where no residual can be made of such a base. `init`: "", or what the adapter started as."""
    check_base(init, quantized)
    if init and kind.transposed:
        raise InputError(f"init_lora_weights {init!r} is not read for models whose weights lie [I, O], such as GPT-2")


def _placed(settings: AdapterConfig, config: ModelConfig) -> dict[tuple[int, str], tuple[int, float]]:
    """(layer, projection) -> (rank, alpha) of those that carry an adapter."""
    places = {config.module(index, name): (index, name) for name in config.linears for index in range(config.L)}
    others: dict[str, int | None] = {config.kind.embedding: None, config.kind.head: None}
    found = settings.placed(others | {module: index for module, (index, _) in places.items()})
    if outside := [module for module in found if module in others]:
        raise InputError(
            f"{settings.where}: target_modules picks {outside[0]}; adapters can be read on the linear layers of the "
            "blocks, and embed_tokens and lm_head whole (modules_to_save)"
        )
    if not found:
        raise InputError(f"{settings.where}: target_modules picks no linear layer of this model")
    return {places[module]: size for module, size in found.items()}


def _unlike(placed: dict[tuple[int, str], tuple[int, float]], config: ModelConfig) -> str:
    """How an adapter is not the same in all layers and projections; "" where it is."""
    for name in config.linears:
        count = sum(other == name for _, other in placed)
        if 0 < count < config.L:
            return f"{name} carries an adapter in {count} of {config.L} layers"
    sizes = [f"{rank} and {alpha:g}" for rank, alpha in dict.fromkeys(placed.values())]
    return f"r and lora_alpha are {sizes[0]} here, {sizes[1]} there" if len(sizes) > 1 else ""


def _common_config(
    settings: AdapterConfig, placed: dict[tuple[int, str], tuple[int, float]], model: ModelConfig
) -> LoRAConfig:
    """The largest rank, and an alpha that gives it the first module's scale."""
    rank, alpha = next(iter(placed.values()))
    largest, names = max(other for other, _ in placed.values()), {name for _, name in placed}
    more = largest / rank
    return LoRAConfig(
        rank=largest,
        alpha=alpha * (math.sqrt(more) if settings.use_rslora else more),
        dropout=settings.dropout,
        targets=tuple(name for name in model.linears if name in names),
        use_rslora=settings.use_rslora,
        modules_to_save=settings.modules_to_save,
        residual=settings.residual,
    )


def _stack(
    model: Decoder, name: str, tensors: "_Tensors", placed: dict[tuple[int, str], tuple[int, float]], config: LoRAConfig
) -> tuple[jax.Array, jax.Array]:
    """A [L, R, I] and B [L, O, R] of a projection, R and the scale those of `config`."""
    (O, I), L, R = lora.shape(model, name), model.config.L, config.rank
    a, b = np.zeros((L, R, I), np.float32), np.zeros((L, O, R), np.float32)
    for index in range(L):
        if (index, name) in placed:
            rank, alpha = placed[index, name]
            own_scale = dataclasses.replace(config, rank=rank, alpha=alpha).scale
            a[index, :rank] = tensors.read(_key(model.config.kind, index, name, "A"))
            b[index, :, :rank] = tensors.read(_key(model.config.kind, index, name, "B"))
            with np.errstate(over="ignore", invalid="ignore"):  # seen below
                b[index] *= np.float32(own_scale / config.scale)
    if not np.isfinite(b).all():
        raise InputError(f"{tensors.path}: lora_B of {name} overflows float32 with the alphas of {CONFIG}")
    return jnp.asarray(a), jnp.asarray(b)


def read_matrices(model: Decoder, folder: Path) -> dict[str, np.ndarray]:
    """The whole matrices of a PEFT folder, [V, D] each; V may be more than the model's. {} where there are none.

    Raises InputError when they do not fit the model, or each other.
    """
    tensors, config = _Tensors(folder, model.config.kind), read_config(folder)
    shapes, keys = tensors.matrix_shapes(), _matrix_keys(model.config.kind)
    if shapes and model.config.kind.head_bias:
        raise InputError(f"{folder / WEIGHTS}: whole matrices are not read for a model whose head has a bias")
    problems = [f"missing {keys[name]} (modules_to_save)" for name in config.modules_to_save if name not in shapes]
    V, D = model.config.V, model.config.head_width
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1] != D or shape[0] < V:
            problems.append(f"{keys[name]} is {list(shape)}, expected [{V} or more, {D}]")
    if not problems and shapes:
        rows = {shapes[name][0] if name in shapes else V for name in keys}
        if len(rows) > 1:
            problems.append(f"embed_tokens and lm_head would have {' and '.join(map(str, sorted(rows)))} rows")
    if problems:
        raise InputError(f"{folder / WEIGHTS} does not fit the base model: {'; '.join(problems)}")
    matrices = {name: tensors.read(keys[name]) for name in shapes}
    embedding, head = matrices.get("embed_tokens"), matrices.get("lm_head")
    if model.head is None and matrices and (embedding is None or head is None or not np.array_equal(embedding, head)):
        raise InputError(
            f"{folder / WEIGHTS}: embed_tokens and lm_head differ, or one of them is missing, but the base model ties "
            "them; adapters that untie them are not supported"
        )
    return matrices


def matrix_shapes(folder: Path, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole matrices in a PEFT folder: their first number is the model's vocabulary with this adapter."""
    return _Tensors(folder, kind).matrix_shapes()


def check_weights(folder: Path) -> None:
    """Raises InputError where the folder's weights are damaged, or a value of them is not finite."""
    tensors = _Tensors(folder, LLAMA)
    for key in tensors.keys():  # noqa: SIM118 (no mapping)
        tensors.read(key)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


class _Tensors:
    """The tensors of a PEFT folder, by the keys that `write_arrays` gives them.

    Raises InputError when the file is missing, a pickle or damaged, or holds a tensor twice.
    """

    def __init__(self, folder: Path, kind: Kind):
        self._matrices = _matrix_keys(kind)
        self.path, self._source = folder / WEIGHTS, LocalSource(folder)
        if not self._source.exists(WEIGHTS):
            pickle = (
                f"; {_PICKLE} is a pickle, which is never opened: load it in peft and save it again "
                "(save_pretrained writes safetensors)"
            )
            hint = pickle if self._source.exists(_PICKLE) else ""
            raise InputError(f"{folder} holds no {WEIGHTS}{hint}")
        try:
            places = read_header(partial(self._source.read, WEIGHTS))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path} is damaged or cut short: {error}") from error
        self._places: dict[str, Place] = {}
        for name, place in places.items():
            key = name.replace(".default.weight", ".weight")  # with the adapter's name, as a state_dict has it
            if key in self._places:
                raise InputError(f"{self.path} holds {key} twice, with and without the adapter's name (default)")
            self._places[key] = place

    def keys(self) -> list[str]:
        return list(self._places)

    def matrix_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._places[key].shape for name, key in self._matrices.items() if key in self._places}

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless the LoRA tensors are exactly these shapes."""
        problems = []
        for key, shape in wanted.items():
            if key not in self._places:
                problems.append(f"missing {key}")
            elif self._places[key].shape != shape:
                problems.append(f"{key} is {list(self._places[key].shape)}, expected {list(shape)}")
        others = sorted(self._places.keys() - wanted.keys() - {*self._matrices.values()})
        problems += [f"unexpected {key}" for key in others]
        if problems:
            shown, more = "; ".join(problems[:_MOST_SHOWN]), len(problems) - _MOST_SHOWN
            shown += f"; and {more} more" if more > 0 else ""
            raise InputError(f"{self.path} does not fit the base model and {CONFIG}: {shown}")

    def read(self, key: str) -> np.ndarray:
        """A tensor in its own dtype. Raises InputError unless it holds finite floating-point numbers."""
        place = self._places[key]
        if place.dtype not in _FLOATS:
            raise InputError(f"{self.path}: {key} is {place.dtype}; expected one of {', '.join(_FLOATS)}")
        array = np.empty(place.shape, numpy_dtype(place.dtype))
        try:
            self._source.read(WEIGHTS, place.start, array.reshape(-1).view(np.uint8))
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path}: {key} cannot be read: {error}") from error
        checksums.refuse_other(place.checksum, checksums.of_array(array), key, str(self.path))
        check_finite(array, f"{self.path}: {key}", "nothing is computed from it; train it again, or ask who did")
        return array


def load_adapter(
    model: Decoder, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> LoRAConfig:
    """Puts the adapter of a PEFT folder on the model in place (no dropout until training asks for it).

    Whole matrices take the places of the model's own, in the compute dtype, in which they are used. Where the adapter
    started as a part of the base (PiSSA, OLoRA) the model's weights become what was left of them; `progress` takes
    (weights done, weights in all) of that.
    """
    config, arrays = read_adapter(model, folder)
    matrices = read_matrices(model, folder)
    take_out(model, config, progress)
    for name in model.config.linears:
        if name in arrays:
            lora.set_adapter(model, name, *arrays[name], config.scale)
        else:
            lora.drop_adapter(model, name)
    for name, matrix in matrices.items():
        attribute = "embedding" if model.head is None else lora.MODULES[name]
        setattr(model, attribute, Frozen(jnp.asarray(matrix).astype(model.compute_dtype)))
        set_rows(model, len(matrix))
    return config


def take_out(model: Decoder, config: LoRAConfig, progress: Callable[[int, int], None]) -> None:
    """Replaces the weights that carry the adapter by their residuals, in place, where config.residual names one.

    Raises InputError where that was done before, or cannot be done with this base.
    """
    if model.residual:
        raise InputError(f"the model's weights lack what {model.residual} took out for an adapter: load it again")
    if not config.residual:
        return
    quantized = any(isinstance(_weight(model, name), QuantizedTensor) for name in config.targets)
    check_residual(config.residual, quantized, model.config.kind)
    model.residual = config.residual  # from here on it is no whole base, whatever ends this
    L, total = model.config.L, model.config.L * len(config.targets)
    for place, name in enumerate(config.targets):
        stack = _weight(model, name)
        for index in range(L):
            progress(place * L + index, total)
            w = jax.tree.map(lambda x: x[index], stack)  # noqa: B023 (called at once)
            left = residual(w, config.residual, config.rank, config.scale, model.config.module(index, name))
            stack = put(stack, left, (index,), (L,))
        lora.linear(model, name).weight = Frozen(stack)
    progress(total, total)


def _weight(model: Decoder, name: str) -> Any:
    return lora.linear(model, name).weight.get_value()
