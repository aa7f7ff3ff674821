"""What a config asks for, in sizes: no weights are read, and data only where it alone says how long its rows are."""

import dataclasses
from pathlib import Path
from typing import Any

from qlora_jax.data.examples import Lengths
from qlora_jax.data.known import KNOWN_SETS
from qlora_jax.data.read import data_sets
from qlora_jax.embedded import DATA, located
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import FileBatches, padded_length
from qlora_jax.feed.load import longest_example
from qlora_jax.feed.packing import pack_length
from qlora_jax.io.folder import fetch_config, has_tokenizer
from qlora_jax.io.load import QuantSpec, load_config, skipped_linears
from qlora_jax.mesh.axes import ONE, Axes
from qlora_jax.models.config import ModelConfig, read_json
from qlora_jax.models.divided.splits import splits_of
from qlora_jax.models.known import KNOWN, known_config
from qlora_jax.quant import native
from qlora_jax.quant.tensor import check_kernel
from qlora_jax.text.added_tokens import extended_tokenizer
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.cut import Cut, ToCut, default_cut
from qlora_jax.train.kinds.labels import longest_labelled_row, with_labels
from qlora_jax.train.kinds.pair import check_kind, row_limits
from qlora_jax.train.setup import added_tokens, read_lora_config
from qlora_jax.train.shapes import BatchShape, ModelSpec, model_settings


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """The sizes of a run. Rows are those of one device."""

    model: ModelSpec
    batch: BatchShape  # of a train step, at the longest row
    evaluation: BatchShape | None  # one batch of held-out examples; None where there are none
    form: str  # of the weights on disk: one of io/peaks.FORMS
    to_cut: ToCut  # the rows of the train step, and how the config wants them cut
    axes: Axes = ONE  # of the run's devices

    def with_cut(self, cut: Cut) -> "RunSpec":
        """The same run, cut otherwise."""
        batch = dataclasses.replace(self.batch, G=self.to_cut.rows // cut.rows, B=cut.rows)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, remat=cut.remat), batch=batch)

    def of_one(self) -> "RunSpec":
        """With the sizes of what one device computes."""
        return dataclasses.replace(self, model=self.model.of_one(self.axes))


def read_spec(config: Any, length: int | None = None) -> RunSpec:
    """Sizes of the run that `config` (as configs/base.py) describes, at its longest sequences, or at those of `length`.

    Where the config leaves its cut into micro-batches open (`to_cut.is_open`) it is that of train/cut.default_cut.
    Where the config does not say how long examples may be, the longest of the data set is found as a run finds it, and
    what was tokenized for that is kept for the run.

    Raises:
      InputError: a model whose sizes are neither in its folder, nor known here, nor to be had from the hub; or rows
        whose lengths neither the config says nor a local file and tokenizer.
    """
    sizes, form, dtype = _model_sizes(config.model.path, config.model.revision)
    rows, adds_tokens = _rows(config, sizes.V)
    sizes = dataclasses.replace(sizes, V=rows)
    lora = with_labels(read_lora_config(config.lora, adds_tokens, sizes.tied), config, sizes)
    quant = QuantSpec(config.quant.format, config.quant.block_size, config.quant.double_quant)
    check_kernel(quant.format, config.model.kernel)
    kept = _kept(dtype, config.model.compute_dtype)
    check_kind(config, sizes)
    settings = model_settings(config.model) | row_limits(sizes, [config.data])
    model = ModelSpec(sizes, quant, lora, kept_dtype=kept, **settings)
    rows, batches = config.train.batch_size, FileBatches(config.data.batches) if config.data.batches else None
    if batches is not None:
        rows, length = batches.batch_size, batches.max_length
    length = length or longest_row(config, sizes)
    axes = Axes.of(config.get("mesh"))  # a forecast of a grid has none
    rows = axes.rows(rows)
    splits_of(sizes, axes, quant)  # refuses what cannot be divided
    to_cut = ToCut.of(config, model.of_one(axes), rows, length)
    has_evaluation = bool(config.data.eval_examples or config.data.eval_path) and not config.data.batches
    packed = config.data.packing
    evaluation = BatchShape(1, -(-config.eval.batch_size // axes.row_parts), length, packed) if has_evaluation else None
    spec = RunSpec(model, BatchShape(1, rows, length, packed), evaluation, form, to_cut, axes)
    return spec.with_cut(default_cut(to_cut))


def _rows(config: Any, V: int) -> tuple[int, bool]:
    """Rows of embedding and head once tokens are added, and whether any are.

    Without the model's folder its tokenizer is not known: then as many as if it filled the embedding, had none of the
    tokens, and needed a pad token besides.
    """
    asked = len(config.data.added_tokens) + len(config.data.added_special_tokens)
    folder = located(config.model.path)
    if not asked:
        return V, False
    if not folder.is_dir():
        return V + asked + 1, True
    added = added_tokens(config.data, folder)
    assert added is not None
    return added.rows(V), bool(added.new)


def longest_row(config: Any, sizes: ModelConfig) -> int:
    """Tokens of the longest row of a batch, padding included; `sizes`: of the model, added tokens counted in V."""
    data = config.data
    if sizes.kind.bidirectional:
        return padded_length(longest_labelled_row(data, sizes), data.pad_to_multiple_of)
    lengths = Lengths.of(data)
    longest = lengths.room if lengths.are_given else 0
    if not longest and not (data.packing and data.pack_length):
        longest = _longest_example(config, sizes)
    return pack_length(data, longest) if data.packing else padded_length(longest, data.pad_to_multiple_of)


def _longest_example(config: Any, sizes: ModelConfig) -> int:
    """Of a local data set, by a local tokenizer; nothing is fetched."""
    data, folder = config.data, located(config.model.path)
    if missing := _missing(data, folder):
        known = KNOWN_SETS.get(str(data.path))
        common = "" if known is None else f" ({known.max_source_len} and {known.max_target_len} are common for it)"
        raise InputError(
            f"how long rows are is not known: data.max_source_len = {data.max_source_len} and data.max_target_len = "
            f"{data.max_target_len} take them from the data set, and {missing}; give both lengths{common}"
        )
    added = added_tokens(data, folder)
    tokenizer = Tokenizer.from_folder(folder) if added is None else extended_tokenizer(added)
    return longest_example(data, tokenizer, sizes.V, sizes.context)


def _missing(data: Any, folder: Path) -> str:
    """What is not here of that which tells how long rows are; "" where all is."""
    if not data.path:
        return "data.path is empty"
    for path in (*data_sets(data.path), *data_sets(data.eval_path)):
        if not located(path, DATA).is_file():
            return f"{path} is no file on this machine"
    if not has_tokenizer(folder):
        return f"{folder} is no folder with a tokenizer on this machine"
    return ""


def _kept(stored: str, compute_dtype: str) -> str:
    """As load.py keeps it: 16-bit values stay what they are, 32-bit ones only for a float32 computation."""
    return compute_dtype if stored == "float32" else stored


def read_sizes(config: Any) -> ModelConfig:
    """The sizes of a config's model. Raises InputError where they are neither here nor known."""
    return _model_sizes(config.model.path, config.model.revision)[0]


def _model_sizes(path: str, revision: str) -> tuple[ModelConfig, str, str]:
    """The model's sizes, the form of its folder, and the dtype that its config.json states."""
    if not path:
        raise InputError("model.path is empty; give a checkpoint folder or a hub name: --config.model.path=...")
    folder = located(path)
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
    config = load_config(folder)
    if skipped_linears(folder, config):
        raise InputError(
            f"{folder}: llm_int8_skip_modules keeps some linear layers in 16 bits, and plans know all of them in one "
            "form: plan for the model that it was made from"
        )
    return config, form, raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
