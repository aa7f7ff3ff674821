"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, out and in.

Keys are `base_model.model.model.layers.{layer}.{name}.lora_A.weight` [R, I] and `....lora_B.weight` [O, R], float32; a
family's own names stand in a Kind. Matrices that trained whole (modules_to_save) are
`base_model.model.model.embed_tokens.weight` and `base_model.model.lm_head.weight`, float32 [V, D]. PEFT unties a tied
head: then both keys hold the one array, and ensure_weight_tying keeps it one. Where tokens were added the tokenizer's
files stand beside them.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, save_tensors, write_json
from qlora_jax.io.adapters import experts as peft_experts
from qlora_jax.io.adapters.head import read_head
from qlora_jax.io.adapters.tensors import PREFIX, WEIGHTS, Tensors, head_keys, matrix_keys
from qlora_jax.io.peft_config import CLASSES, CONFIG, AdapterConfig, read_config
from qlora_jax.io.place import put
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.kind import LLAMA, Kind
from qlora_jax.models.layers import Frozen
from qlora_jax.models.roberta.encoder import Encoder
from qlora_jax.models.vocabulary import set_rows
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.residual import check_base, residual

PROMPTS = "qlora_jax_prompts.json"  # how the adapter is asked (generate/trained); PEFT passes over it


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
    write_arrays(out, arrays, config, base, matrices, trained, write_beside, kind, lora.head_arrays(adapter))


def write_arrays(
    out: Path,
    arrays: dict[str, tuple[Any, Any]],
    config: LoRAConfig,
    base: str,
    matrices: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], Any] | None = None,
    kind: Kind = LLAMA,
    head: Mapping[str, Any] | None = None,
) -> None:
    """As write_adapter, of {"self_attn.q_proj": (A [L, R, I], B [L, O, R])} and the matrices that trained whole.

    `head`: an encoder's (lora.head_arrays).
    """
    if strangers := arrays.keys() - {*kind.linear.values()}:
        raise ValueError(f"{sorted(strangers)} are no linear layers of this kind of model")
    keys = matrix_keys(kind)
    tensors: dict[str, np.ndarray] = {}
    held = {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in arrays.items()}
    fused = peft_experts.needs_this_form(kind, held)
    for name, pair in held.items():
        if not (fused and kind.is_expert(name)):
            for letter, stacked in zip("AB", pair, strict=True):
                for index, x in enumerate(stacked):
                    parts = dict(zip(kind.units(name), x if kind.is_expert(name) else [x], strict=True))
                    tensors |= {
                        _key(kind.module(index, unit), letter): np.ascontiguousarray(part)
                        for unit, part in parts.items()
                    }
    experts = {name: pair for name, pair in held.items() if kind.is_expert(name)}
    said = _plain_scale(config) if experts else config
    target_names = held.keys() - experts.keys() if fused else held.keys()
    written = peft_experts.written(kind, experts, said) if fused else peft_experts.Written()
    tensors |= {PREFIX + key: value for key, value in written.tensors.items()}
    trained = dict(trained or {})
    is_tied = bool(trained) and "lm_head" in config.modules_to_save and "lm_head" not in trained
    if is_tied:
        trained["lm_head"] = trained["embed_tokens"]
    tensors |= {keys[name]: np.asarray(x) for name, x in (dict(matrices or {}) | trained).items()}
    heads = head_keys(kind)
    tensors |= {heads[name]: np.asarray(x) for name, x in (head or {}).items()}
    modules = [_last(keys[name]) for name in trained]
    modules += [kind.bidirectional.head] if kind.bidirectional and head else []
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": is_tied,
        "fan_in_fan_out": kind.transposed,
        "inference_mode": True,
        "init_lora_weights": config.residual or True,
        "lora_alpha": said.alpha,
        "lora_dropout": said.dropout,
        "modules_to_save": modules or None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": _targets(target_names, arrays, kind),
        "task_type": CLASSES if kind.bidirectional else kind.task,
        "use_dora": False,
        "use_rslora": said.use_rslora,
        **written.settings,
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
    settings, tensors, sizes = read_config(folder), Tensors(folder, model.config.kind), model.config
    experts = sizes.kind.experts
    if experts and any(f".{name}.lora_" in key for name in (experts.router, "mlp.gate") for key in tensors.keys()):  # noqa: SIM118
        raise InputError(
            f"{tensors.path} adapts the router, which stays as it is here: train without it, or merge it in peft"
        )
    if settings.has_head and sizes.kind.bidirectional is None:
        raise InputError(
            f"{settings.where}: this adapter has a head over classes (task_type {CLASSES}), and the model is a "
            "decoder: heads are read for encoders such as RoBERTa"
        )
    placed = _placed(settings, sizes) | _placed_experts(settings, sizes, tensors)
    if not placed:
        raise InputError(f"{settings.where}: target_modules picks no linear layer of this model")
    check_residual(settings.residual, False, sizes.kind)
    unlike = _unlike(placed, sizes)
    if settings.residual and (unlike or any(sizes.is_expert(name) for name, _ in placed)):
        unlike = unlike or "experts carry adapters"
        raise InputError(
            f"{settings.where}: {unlike}, but init_lora_weights {settings.residual!r} is read where all are alike"
        )
    if unlike and to_train:
        raise InputError(f"{settings.where}: {unlike}; training needs one rank and scale, and all layers or none")
    wanted: dict[str, tuple[int, ...]] = {}
    for (name, place), (rank, _) in placed.items():
        O, I = sizes.linears[name]
        module = _module(sizes, name, place)
        wanted |= {_key(module, "A"): (rank, I), _key(module, "B"): (O, rank)}
    tensors.check(wanted)
    config = _common_config(settings, placed, sizes)
    return config, {name: _stack(sizes, name, tensors, placed, config) for name in config.targets}


Place = tuple[str, tuple[int, ...]]  # a projection, and (layer,) or (layer, expert)
Placed = dict[Place, tuple[int, float]]  # -> rank, alpha


def _module(config: ModelConfig, name: str, place: tuple[int, ...]) -> str:
    """A module's full name."""
    return config.module(place[0], config.units(name)[place[1]] if len(place) > 1 else name)


def _key(module: str, letter: str) -> str:
    """The tensor of an adapter: letter "A" or "B" of a module."""
    return f"{PREFIX}{module}.lora_{letter}.weight"


def _plain_scale(config: LoRAConfig) -> LoRAConfig:
    """The same scale as peft has it for experts: without rslora, which it forgets where it fuses them, and without
    dropout, with which it refuses to load them."""
    return dataclasses.replace(config, alpha=config.scale * config.rank, use_rslora=False, dropout=0.0)


def _last(key: str) -> str:
    """The name of a key's module: embed_tokens."""
    return key.removesuffix(".weight").rpartition(".")[2]


def _targets(names: Iterable[str], carrying: Container[str], kind: Kind) -> list[str] | str:
    """target_modules: names, or an expression where projections of the same names stand elsewhere too: in an encoder
    beside a decoder, or in an encoder's head."""
    if kind.bidirectional:  # whose head has a layer "dense" too
        return rf".*encoder\.layer\.\d+\.({'|'.join(name.replace('.', r'\.') for name in sorted(names))})"
    if kind.pair:
        return kind.pair.target_modules([*names], [*kind.linear.values()])
    if kind.beside:
        return rf".*language_model\..*\.({'|'.join(name.replace('.', r'\.') for name in sorted(names))})"
    return sorted({_target(name, carrying, kind) for name in names})


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


def _placed(settings: AdapterConfig, config: ModelConfig) -> Placed:
    """Modules that carry an adapter."""
    experts = config.kind.experts
    alone = [name for name in config.linears if not (experts and experts.fused_alone and config.is_expert(name))]
    slots = [(key, (name, place)) for name in alone for key, place in config.slots(name).items()]
    places: dict[str, Place] = {key.removesuffix(".weight"): place for key, place in slots}
    others: dict[str, int | None] = {config.kind.embedding: None, config.kind.head: None}
    found = settings.placed(others | {module: place[0] for module, (_, place) in places.items()})
    if outside := [module for module in found if module in others]:
        raise InputError(
            f"{settings.where}: target_modules picks {outside[0]}; adapters can be read on the linear layers of the "
            "blocks, and embed_tokens and lm_head whole (modules_to_save)"
        )
    return {places[module]: size for module, size in found.items()}


def _placed_experts(settings: AdapterConfig, config: ModelConfig, tensors: "Tensors") -> Placed:
    """Experts that target_parameters gives an adapter, which `tensors` then has for each of them."""
    fused = peft_experts.parameters(config.kind)
    names = {
        f"{config.kind.layer.format(index)}.{one.name}": (index, one) for index in range(config.L) for one in fused
    }
    picked = settings.placed_parameters(list(names))
    found: Placed = {}
    for full, (rank, alpha) in picked.items():
        index, one = names[full]
        layer = config.kind.layer.format(index)
        later = [f"{layer}.{other.name}" for other in fused[fused.index(one) + 1 :]]
        keys = peft_experts.tensor_keys(one, any(name in picked for name in later), layer)
        E = config.copies(one.members[0])[0]
        widths = {name: config.linears[name][0] for name in one.members}
        shapes = (E * rank, config.linears[one.members[0]][1]), (sum(widths.values()), rank * E)
        a, b = tensors.take({PREFIX + key: shape for key, shape in zip(keys.values(), shapes, strict=True)})
        for name, (own_a, own_b) in peft_experts.cut(a, b, E, one, widths).items():
            for expert in range(E):
                place, own = (index, expert), own_a.shape[1]
                module = _module(config, name, place)
                tensors.give({_key(module, "A"): own_a[expert], _key(module, "B"): own_b[expert]})
                share = own / rank
                found[name, place] = own, alpha * (math.sqrt(share) if settings.use_rslora else share)
    return found


def _unlike(placed: Placed, config: ModelConfig) -> str:
    """How an adapter is not the same in all layers and projections; "" where it is."""
    for name in config.linears:
        count, whole = sum(other == name for other, _ in placed), math.prod((config.depth(name), *config.copies(name)))
        if 0 < count < whole:
            places = "experts of all layers" if config.is_expert(name) else "layers"
            return f"{name} carries an adapter in {count} of {whole} {places}"
    sizes = [f"{rank} and {alpha:g}" for rank, alpha in dict.fromkeys(placed.values())]
    return f"r and lora_alpha are {sizes[0]} here, {sizes[1]} there" if len(sizes) > 1 else ""


def _common_config(settings: AdapterConfig, placed: Placed, model: ModelConfig) -> LoRAConfig:
    """The largest rank, and an alpha that gives it the first module's scale."""
    rank, alpha = next(iter(placed.values()))
    largest, names = max(other for other, _ in placed.values()), {name for name, _ in placed}
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
    sizes: ModelConfig, name: str, tensors: "Tensors", placed: Placed, config: LoRAConfig
) -> tuple[jax.Array, jax.Array]:
    """A [L, R, I] and B [L, O, R] of a projection, with E after L for experts; R and the scale those of `config`."""
    (O, I), R, room = sizes.linears[name], config.rank, (sizes.depth(name), *sizes.copies(name))
    a, b = np.zeros((*room, R, I), np.float32), np.zeros((*room, O, R), np.float32)
    for place in np.ndindex(*room):
        if (name, place) in placed:
            rank, alpha = placed[name, place]
            own_scale = dataclasses.replace(config, rank=rank, alpha=alpha).scale
            module = _module(sizes, name, place)
            a[place][:rank] = tensors.read(_key(module, "A"))
            b[place][:, :rank] = tensors.read(_key(module, "B"))
            with np.errstate(over="ignore", invalid="ignore"):  # seen below
                b[place] *= np.float32(own_scale / config.scale)
    if not np.isfinite(b).all():
        raise InputError(f"{tensors.path}: lora_B of {name} overflows float32 with the alphas of {CONFIG}")
    return jax.device_put((a, b))


def read_matrices(model: Decoder, folder: Path) -> dict[str, np.ndarray]:
    """The whole matrices of a PEFT folder, [V, D] each; V may be more than the model's. {} where there are none.

    Raises InputError when they do not fit the model, or each other.
    """
    tensors, config = Tensors(folder, model.config.kind), read_config(folder)
    shapes, keys = tensors.matrix_shapes(), matrix_keys(model.config.kind)
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
    return Tensors(folder, kind).matrix_shapes()


def check_weights(folder: Path) -> None:
    """Raises InputError where the folder's weights are damaged, or a value of them is not finite."""
    tensors = Tensors(folder, LLAMA)
    for key in tensors.keys():  # noqa: SIM118 (no mapping)
        tensors.read(key)


def load_adapter(
    model: Decoder, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> LoRAConfig:
    """Puts the adapter of a PEFT folder on the model in place (no dropout until training asks for it).

    Whole matrices take the places of the model's own, in the compute dtype, in which they are used. Where the adapter
    started as a part of the base (PiSSA, OLoRA) the model's weights become what was left of them; `progress` takes
    (weights done, weights in all) of that.
    """
    config, arrays = read_adapter(model, folder)
    matrices, head = read_matrices(model, folder), read_head(model.config, folder)
    take_out(model, config, progress)
    for name in model.config.linears:
        if name in arrays:
            lora.set_adapter(model, name, *arrays[name], config.scale)
        else:
            lora.drop_adapter(model, name)
    for name, matrix in matrices.items():
        attribute = "embedding" if model.head is None else lora.MODULES[name]
        setattr(model, attribute, Frozen(jax.device_put(matrix).astype(model.compute_dtype)))
        set_rows(model, len(matrix))
    if isinstance(model, Encoder):
        model.set_head(jax.device_put(head), trains=False)
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
    total, done = sum(map(model.config.depth, config.targets)), 0
    for name in config.targets:
        stack, L = _weight(model, name), model.config.depth(name)
        for index in range(L):
            progress(done, total)
            done += 1
            w = jax.tree.map(lambda x: x[index], stack)  # noqa: B023 (called at once)
            left = residual(w, config.residual, config.rank, config.scale, model.config.module(index, name))
            stack = put(stack, left, (index,), (L,))  # no experts: read_adapter refuses them
        lora.linear(model, name).weight = Frozen(stack)
    progress(total, total)


def _weight(model: Decoder, name: str) -> Any:
    return lora.linear(model, name).weight.get_value()
