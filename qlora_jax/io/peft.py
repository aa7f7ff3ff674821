"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, out and in.

Keys are `base_model.model.model.layers.{layer}.{name}.lora_A.weight` [R, I] and `....lora_B.weight` [O, R], float32.
Matrices that trained whole (modules_to_save) are `base_model.model.model.embed_tokens.weight` and
`base_model.model.lm_head.weight`, float32 [V, D]. PEFT unties a tied head: then both keys hold the one array, and
ensure_weight_tying keeps it one. Where tokens were added the tokenizer's files stand beside them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax import checksums, lora
from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, save_tensors, write_json
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import read_json
from qlora_jax.models.layers import Frozen
from qlora_jax.models.llama import EMBEDDING, HEAD, LINEARS, Llama
from qlora_jax.models.vocabulary import set_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
_MATRICES = {"embed_tokens": f"base_model.model.{EMBEDDING}", "lm_head": f"base_model.model.{HEAD}"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SCALE = "lora_scale"  # of the weights file's metadata: what the settings beside it must come to
# What peft may ask for that would change the result and is not computed here: key -> values that mean "no".
_UNSUPPORTED = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layers_to_transform": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}


def write_adapter(
    out: Path,
    adapter: Any,
    config: LoRAConfig,
    base: str,
    matrices: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], Any] | None = None,
) -> None:
    """Writes the adapter's state as a PEFT folder, whole or not at all.

    Args:
      out: folder; one that stands there is replaced.
      adapter: of `lora.split`.
      config: rank, alpha, dropout, rslora, modules_to_save.
      base: path or hub name of the base model, for adapter_config.json.
      matrices: embed_tokens and lm_head that do not train but differ from the base's, [V, D] each.
      write_beside: writes more files into the folder (a tokenizer's).
    """
    arrays, trained = lora.adapter_arrays(adapter), lora.whole_matrices(adapter)
    write_arrays(out, arrays, config, base, matrices, trained, write_beside)


def write_arrays(
    out: Path,
    arrays: dict[str, tuple[Any, Any]],
    config: LoRAConfig,
    base: str,
    matrices: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], Any] | None = None,
) -> None:
    """As write_adapter, of {"self_attn.q_proj": (A [L, R, I], B [L, O, R])} and the matrices that trained whole."""
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in arrays.items():
        for letter, stacked in (("A", np.asarray(a)), ("B", np.asarray(b))):
            tensors |= {_KEY.format(index, name, letter): np.ascontiguousarray(x) for index, x in enumerate(stacked)}
    trained = dict(trained or {})
    is_tied = bool(trained) and "lm_head" in config.modules_to_save and "lm_head" not in trained
    if is_tied:
        trained["lm_head"] = trained["embed_tokens"]
    tensors |= {_MATRICES[name]: np.asarray(x) for name, x in (dict(matrices or {}) | trained).items()}
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": is_tied,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": list(trained) or None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted(name.split(".")[-1] for name in arrays),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    with atomic_folder(out) as folder:
        save_tensors(tensors, folder / WEIGHTS, {_SCALE: repr(config.scale)})
        write_json(folder / CONFIG, settings)
        if write_beside is not None:
            write_beside(folder)


def read_config(folder: Path) -> LoRAConfig:
    """The LoRA settings of a PEFT folder; targets are the names the file gives (regular expressions included).

    Raises InputError when there is none, or it asks for what is not supported (DoRA, biases, per-layer ranks, ...).
    """
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be read")
    asked = [f"{key}={raw[key]!r}" for key, no in _UNSUPPORTED.items() if key in raw and raw[key] not in no]
    if asked:
        raise InputError(f"{folder / CONFIG}: {', '.join(asked)} is not supported; plain LoRA adapters can be read")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    modules = {name.rpartition(".")[2] for name in raw.get("modules_to_save") or ()}  # also "model.embed_tokens"
    if other := sorted(modules - {*_MATRICES}):
        raise InputError(f"{folder / CONFIG}: modules_to_save has {other[0]!r}; readable are {' and '.join(_MATRICES)}")
    targets = raw.get("target_modules") or ()
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout") or 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(raw.get("use_rslora")),
        modules_to_save=tuple(name for name in _MATRICES if name in modules),
    )


def read_adapter(model: Llama, folder: Path) -> tuple[LoRAConfig, dict[str, tuple[Any, Any]]]:
    """The LoRA adapter of a PEFT folder, stacked for this model; `read_matrices` has the rest of the folder.

    Returns:
      its config (targets as full names of ours), and {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}, float32.
    Raises:
      InputError: one message that lists every tensor that is missing, unexpected or misshapen.
    """
    config = read_config(folder)
    handle = _open(folder)
    _check_scale(handle, config, folder)
    keys = [key for key in handle.keys() if key not in _MATRICES.values()]  # noqa: SIM118
    tensors: dict[str, Any] = _tensors(handle, keys, folder)
    L, problems = model.config.L, []
    stacked: dict[str, tuple[Any, Any]] = {}
    for name in LINEARS:
        O, I = lora.shape(model, name)
        expected = {_KEY.format(i, name, "A"): (config.rank, I) for i in range(L)}
        expected |= {_KEY.format(i, name, "B"): (O, config.rank) for i in range(L)}
        if not any(key in tensors for key in expected):
            continue
        for key, shape in expected.items():
            if key not in tensors:
                problems.append(f"missing {key} (layers are stacked: a projection takes adapters in all {L} or none)")
            elif tensors[key].shape != shape:
                problems.append(f"{key} is {list(tensors[key].shape)}, expected {list(shape)}")
        found = {key: tensors.pop(key, None) for key in expected}
        if not problems:
            a, b = (np.stack([found[_KEY.format(i, name, letter)] for i in range(L)]) for letter in "AB")
            stacked[name] = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    problems += [f"unexpected {key}" for key in sorted(tensors)]
    if not problems and not stacked:
        problems = ["no LoRA tensor of this model"]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{folder / WEIGHTS} does not fit the base model: {shown}")
    return dataclasses.replace(config, targets=tuple(stacked)), stacked


def read_matrices(model: Llama, folder: Path) -> dict[str, np.ndarray]:
    """The whole matrices of a PEFT folder, [V, D] each; V may be more than the model's. {} where there are none.

    Raises InputError when they do not fit the model, or each other.
    """
    handle, config = _open(folder), read_config(folder)
    shapes = matrix_shapes(folder)
    problems = [f"missing {_MATRICES[name]} (modules_to_save)" for name in config.modules_to_save if name not in shapes]
    V, D = model.config.V, model.config.D
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1] != D or shape[0] < V:
            problems.append(f"{_MATRICES[name]} is {list(shape)}, expected [{V} or more, {D}]")
    if not problems and shapes:
        rows = {shapes[name][0] if name in shapes else V for name in _MATRICES}
        if len(rows) > 1:
            problems.append(f"embed_tokens and lm_head would have {' and '.join(map(str, sorted(rows)))} rows")
    if problems:
        raise InputError(f"{folder / WEIGHTS} does not fit the base model: {'; '.join(problems)}")
    tensors = _tensors(handle, (_MATRICES[name] for name in shapes), folder)
    matrices = {name: tensors[_MATRICES[name]] for name in shapes}
    embedding, head = matrices.get("embed_tokens"), matrices.get("lm_head")
    if model.head is None and matrices and (embedding is None or head is None or not np.array_equal(embedding, head)):
        raise InputError(
            f"{folder / WEIGHTS}: embed_tokens and lm_head differ, or one of them is missing, but the base model ties "
            "them; adapters that untie them are not supported"
        )
    return matrices


def matrix_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole matrices in a PEFT folder: their first number is the model's vocabulary with this adapter."""
    handle = _open(folder)
    keys = set(handle.keys())
    return {name: tuple(handle.get_slice(key).get_shape()) for name, key in _MATRICES.items() if key in keys}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _open(folder: Path) -> Any:
    try:
        return safe_open(folder / WEIGHTS, "numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} is missing or damaged: {error}") from error


def _tensors(handle: Any, keys: Iterable[str], folder: Path) -> dict[str, np.ndarray]:
    """As they were written: raises InputError where the file states another checksum of one."""
    try:
        stated = checksums.from_metadata(handle.metadata())
        tensors = {key: handle.get_tensor(key) for key in keys}
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from error
    for key, tensor in tensors.items():
        checksums.refuse_other(stated.get(key, ""), checksums.of_array(tensor), key, str(folder / WEIGHTS))
    return tensors


def _check_scale(handle: Any, config: LoRAConfig, folder: Path) -> None:
    """Raises InputError where the settings are not those that the weights were written with."""
    stated = (handle.metadata() or {}).get(_SCALE, repr(config.scale))
    if stated != repr(config.scale):
        raise InputError(
            f"{folder / CONFIG}: r {config.rank}, lora_alpha {config.alpha:g} and use_rslora {config.use_rslora} scale "
            f"the adapter by {config.scale:g}, but {WEIGHTS} was written to be scaled by {stated}: put them back; for "
            f"another strength on purpose save the weights without {_SCALE!r} in their metadata"
        )


def check_whole(folder: Path) -> None:
    """Raises InputError where a PEFT folder's weights are not what was written, as far as the folder says what was."""
    handle = _open(folder)
    _check_scale(handle, read_config(folder), folder)
    _tensors(handle, handle.keys(), folder)


def load_adapter(model: Llama, folder: Path) -> LoRAConfig:
    """Puts the adapter of a PEFT folder on the model in place (no dropout until training asks for it).

    Whole matrices take the places of the model's own, in the compute dtype, in which they are used.
    """
    config, arrays = read_adapter(model, folder)
    for name, (a, b) in arrays.items():
        lora.set_adapter(model, name, a, b, config.scale)
    for name, matrix in read_matrices(model, folder).items():
        attribute = "embedding" if model.head is None else lora.MODULES[name]
        setattr(model, attribute, Frozen(jnp.asarray(matrix).astype(model.compute_dtype)))
        set_rows(model, len(matrix))
    return config
