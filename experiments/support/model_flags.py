"""The flags with which commands name a model, and its loading: --model, --adapter, --quant and so on."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_jax.io.load import QuantSpec
    from qlora_jax.models.decoder import Decoder
    from qlora_jax.text.tokenizer import Tokenizer

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()

KERNELS = ("auto", "xla", "triton", "scratch", "mosaic")  # pallas_kernels.nf4_matmul.BACKENDS
QUANTS = (  # qlora_jax.api.opening.QUANTS
    "none", "nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+dq", "fp4-e3m0", "fp4-e3m0+dq", "int8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its adapter. `quant`: one of QUANTS, what the linear layers are in."""

    folder: "Path"
    model: "Decoder"
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
        from qlora_jax.api.opening import find_tokenizer

        return find_tokenizer(self.folder(), self.adapter_folder())

    def adapter_folder(self) -> "Path | None":
        """The adapter's folder, downloaded if it is a hub name; None without one."""
        from qlora_jax.io.folder import resolve

        return resolve(self.adapter.value) if self.adapter.value else None

    def vocabulary(self) -> int:
        """Rows of the embedding, with those that the adapter adds."""
        from qlora_jax.api.opening import vocabulary

        return vocabulary(self.folder(), self.adapter_folder())

    def load(self, encoder: bool = False) -> Loaded:
        """Loads the model; says on stderr what it is, with a progress bar if it takes long.

        `encoder`: an encoder is asked for, which classifies rows, and no decoder.

        Raises InputError for a folder, an adapter or a quantization that does not fit, or a model of the other kind.
        """
        from qlora_jax.api.opening import check_adapter, quant_name
        from qlora_jax.io.load import load_config, load_model
        from qlora_jax.io.peft import load_adapter
        from qlora_jax.io.remote import name_of
        from qlora_jax.models.roberta.encoder import check_kind
        from qlora_jax.progress import Progress

        self._check_kernel()
        folder = self.folder()
        check_kind(load_config(folder), encoder)
        spec = self._spec(folder)
        adapter = self.adapter_folder()
        check_adapter(adapter, spec)  # before minutes of loading
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
        from qlora_jax.api.opening import quant_name
        from qlora_jax.io.fingerprint import fingerprint

        folder, adapter = self.folder(), self.adapter_folder()
        spec = self._spec(folder)
        return {
            "model_files": fingerprint(folder),
            "adapter_files": fingerprint(adapter) if adapter is not None else None,
            "quant": quant_name(spec),
            "block_size": None if spec.format == "none" else spec.block_size,
            "compute_dtype": self._dtype(),
        }

    def _dtype(self) -> str:
        from qlora_jax.api.opening import default_dtype

        return self.compute_dtype.value or default_dtype()

    def _check_kernel(self) -> None:
        import jax

        from qlora_jax.errors import InputError

        if self.kernel.value not in ("auto", "xla") and jax.default_backend() != "gpu":
            raise InputError(
                f"--kernel={self.kernel.value} needs an NVIDIA GPU; this process computes on {jax.default_backend()}: "
                "leave it out"
            )

    def _spec(self, folder: "Path") -> "QuantSpec":
        from qlora_jax.api.opening import choose_quant, refuse_block_size

        if self.quant.value is None:
            refuse_block_size(folder, self.block_size.value)
        return choose_quant(folder, self.quant.value, self.block_size.value)


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
