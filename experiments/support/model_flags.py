"""The flags with which commands name a model, and its loading: --model, --adapter, --quant and so on."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_jax.io.load import QuantSpec
    from qlora_jax.models.llama import Llama
    from qlora_jax.text.tokenizer import Tokenizer

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()

KERNELS = ("auto", "xla", "triton", "scratch", "mosaic")  # pallas_kernels.nf4_matmul.BACKENDS
QUANTS = ("none", "nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+dq")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its adapter. `quant`: one of QUANTS, what the linear layers are in."""

    folder: "Path"
    model: "Llama"
    quant: str


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    model: flags.FlagHolder
    revision: flags.FlagHolder
    adapter: flags.FlagHolder
    quant: flags.FlagHolder
    block_size: flags.FlagHolder
    compute_dtype: flags.FlagHolder
    kernel: flags.FlagHolder

    def folder(self) -> "Path":
        """The checkpoint's folder, downloaded if it is a hub name."""
        from qlora_jax.io.folder import resolve

        return resolve(self.model.value, self.revision.value)

    def tokenizer(self) -> "Tokenizer":
        """The adapter's tokenizer where it has one, as one with added tokens has; else the checkpoint's."""
        from qlora_jax.io.folder import resolve
        from qlora_jax.io.peft import has_tokenizer
        from qlora_jax.text.tokenizer import Tokenizer

        folder = self.folder()
        adapter = resolve(self.adapter.value) if self.adapter.value else None
        if adapter is not None and has_tokenizer(adapter):
            return Tokenizer.from_folder(adapter, folder)
        return Tokenizer.from_folder(folder)

    def vocabulary(self) -> int:
        """Rows of the embedding, with those that the adapter adds."""
        from qlora_jax.io.folder import resolve
        from qlora_jax.io.load import load_config
        from qlora_jax.io.peft import matrix_shapes

        shapes = matrix_shapes(resolve(self.adapter.value)) if self.adapter.value else {}
        return next((shape[0] for shape in shapes.values()), load_config(self.folder()).V)

    def load(self) -> Loaded:
        """Loads the model; says on stderr what it is, with a progress bar if it takes long.

        Raises InputError for a folder, an adapter or a quantization that does not fit.
        """
        from qlora_jax.io.folder import resolve
        from qlora_jax.io.load import load_model
        from qlora_jax.io.peft import load_adapter
        from qlora_jax.io.peft_config import read_config
        from qlora_jax.io.remote import name_of
        from qlora_jax.progress import Progress
        from qlora_jax.residual import check_base

        self._check_kernel()
        folder = self.folder()
        spec = self._spec(folder)
        adapter = resolve(self.adapter.value) if self.adapter.value else None
        if adapter is not None:
            check_base(read_config(adapter).residual, spec.format != "none")  # before minutes of loading
        dtype = self._dtype()
        with Progress("loading", unit="tensor") as loading:
            model = load_model(folder, spec, dtype, kernel=self.kernel.value, progress=loading.to)
        tuned = ""
        if adapter is not None:
            with Progress("adapter", unit="weight") as taking_out:
                config = load_adapter(model, adapter, taking_out.to)
            tuned = f", adapter {adapter} of rank {config.rank}"
            tuned += f" on what {config.residual} left of the base" if config.residual else ""
        stored_as = "not quantized" if spec.format == "none" else str(spec)
        print(f"model: {name_of(folder)}, {stored_as}, computing in {dtype}{tuned}", file=sys.stderr)
        return Loaded(folder, model, quant_name(spec))

    def identity(self) -> dict[str, str | int | None]:
        """What the flags stand for, as far as results depend on it, without loading it.

        Raises InputError for a folder, an adapter or a quantization that is not there.
        """
        from qlora_jax.io.fingerprint import fingerprint
        from qlora_jax.io.folder import resolve

        folder = self.folder()
        spec = self._spec(folder)
        return {
            "model_files": fingerprint(folder),
            "adapter_files": fingerprint(resolve(self.adapter.value)) if self.adapter.value else None,
            "quant": quant_name(spec),
            "block_size": None if spec.format == "none" else spec.block_size,
            "compute_dtype": self._dtype(),
        }

    def _dtype(self) -> str:
        import jax

        return self.compute_dtype.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def _check_kernel(self) -> None:
        import jax

        from qlora_jax.errors import InputError

        if self.kernel.value not in ("auto", "xla") and jax.default_backend() != "gpu":
            raise InputError(
                f"--kernel={self.kernel.value} needs an NVIDIA GPU; this process computes on {jax.default_backend()}: "
                "leave it out"
            )

    def _spec(self, folder: "Path") -> "QuantSpec":
        from qlora_jax.errors import InputError
        from qlora_jax.io.load import stored_quant
        from qlora_jax.io.write import quant_spec

        stored, name, block_size = stored_quant(folder), self.quant.value, self.block_size.value
        if name is None and stored is None and block_size is not None:
            raise InputError(
                f"--block_size={block_size} without --quant, and {folder} is not quantized; say --quant=nf4 or another"
            )
        if name is None:
            name = "none" if stored is None else quant_name(stored)
        default = 64 if stored is None else stored.block_size
        return quant_spec(name, default if block_size is None else block_size)


def quant_name(spec: "QuantSpec") -> str:
    """One of QUANTS."""
    return spec.format + ("+dq" if spec.double_quant and spec.format != "none" else "")


def model_flags() -> ModelFlags:
    """Defines the flags for the calling command."""
    return ModelFlags(
        flags.DEFINE_string(
            "model", None, "checkpoint folder, gs:// or s3:// address, or hub name (owner/name)", required=True
        ),
        flags.DEFINE_string("revision", "main", "branch, tag or commit of a hub name"),
        flags.DEFINE_string("adapter", None, "PEFT adapter folder, such as a run's WORKDIR/adapter"),
        flags.DEFINE_enum("quant", None, QUANTS, "how linear layers are kept; as the folder has them by default"),
        flags.DEFINE_integer("block_size", None, "values that share a scale; 64, or the folder's own, by default"),
        flags.DEFINE_enum(
            "compute_dtype", None, ["float32", "bfloat16"], "of activations; float32 on CPUs, else bfloat16, by default"
        ),
        flags.DEFINE_enum("kernel", "auto", KERNELS, "of the 4-bit matmul, as model.kernel in configs/base.py"),
    )
