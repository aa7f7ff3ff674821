"""What a config asks for, in sizes: no weights and no data are read."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.feed.batches import FileBatches, round_up
from qlora_jax.feed.packing import pack_length
from qlora_jax.io.folder import fetch_config
from qlora_jax.io.load import QuantSpec, load_config
from qlora_jax.models.config import ModelConfig, read_json
from qlora_jax.models.known import KNOWN, known_config
from qlora_jax.quant import native
from qlora_jax.train.setup import added_tokens, read_lora_config
from qlora_jax.train.shapes import BatchShape, ModelSpec


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """The sizes of a run."""

    model: ModelSpec
    batch: BatchShape  # of a train step, at the longest row
    evaluation: BatchShape | None  # one batch of held-out examples; None where there are none
    form: str  # of the weights on disk: one of io/peaks.FORMS


def read_spec(config: Any, length: int | None = None) -> RunSpec:
    """Sizes of the run that `config` (as configs/base.py) describes, at its longest sequences, or at those of `length`.

    Raises InputError for a model whose sizes are neither in its folder, nor known here, nor to be had from the hub.
    """
    sizes, form, dtype = _model_sizes(config.model.path, config.model.revision)
    rows, adds_tokens = _rows(config, sizes.V)
    sizes = dataclasses.replace(sizes, V=rows)
    lora = read_lora_config(config.lora, adds_tokens, sizes.tied)
    quant = QuantSpec(config.quant.format, config.quant.block_size, config.quant.double_quant)
    m = config.model
    model = ModelSpec(
        sizes,
        quant,
        lora,
        m.compute_dtype,
        _kept(dtype, m.compute_dtype),
        m.remat,
        m.attention,
        m.kernel,
        m.sequence_chunk,
    )
    rows, length = config.train.batch_size, length or _longest(config.data)
    if config.data.batches:
        batches = FileBatches(config.data.batches)
        rows, length = batches.batch_size, batches.max_length
    G = math.gcd(config.train.grad_accum, rows)
    has_evaluation = bool(config.data.eval_examples or config.data.eval_path) and not config.data.batches
    packed = config.data.packing
    evaluation = BatchShape(1, config.eval.batch_size, length, packed) if has_evaluation else None
    return RunSpec(model, BatchShape(G, rows // G, length, packed), evaluation, form)


def _rows(config: Any, V: int) -> tuple[int, bool]:
    """Rows of embedding and head once tokens are added, and whether any are.

    Without the model's folder its tokenizer is not known: then as many as if it filled the embedding, had none of the
    tokens, and needed a pad token besides.
    """
    asked = len(config.data.added_tokens) + len(config.data.added_special_tokens)
    folder = Path(config.model.path).expanduser()
    if not asked:
        return V, False
    if not folder.is_dir():
        return V + asked + 1, True
    added = added_tokens(config.data, folder)
    assert added is not None
    return added.rows(V), bool(added.new)


def _longest(data: Any) -> int:
    if data.packing:
        return pack_length(data)
    return round_up(data.max_source_len + data.max_target_len, data.pad_to_multiple_of)


def _kept(stored: str, compute_dtype: str) -> str:
    """As load.py keeps it: 16-bit values stay what they are, 32-bit ones only for a float32 computation."""
    return compute_dtype if stored == "float32" else stored


def _model_sizes(path: str, revision: str) -> tuple[ModelConfig, str, str]:
    """The model's sizes, the form of its folder, and the dtype that its config.json states."""
    if not path:
        raise InputError("model.path is empty; give a checkpoint folder or a hub name: --config.model.path=...")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    if (known := known_config(path)) is not None:
        return known, "unquantized", "bfloat16"
    try:
        folder = fetch_config(path, revision)
    except InputError as error:
        raise InputError(f"{error}; the sizes that are known here are those of {', '.join(KNOWN)}") from error
    return _of_folder(folder)


def _of_folder(folder: Path) -> tuple[ModelConfig, str, str]:
    raw = read_json(folder / "config.json")
    settings = raw.get("quantization_config")
    form = "unquantized" if settings is None else "native" if settings.get("quant_method") == native.METHOD else "bnb"
    return load_config(folder), form, raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
