"""Hands out what a run made: a PEFT adapter, or a merged 16-bit checkpoint. The example is for train's.

    python -m experiments.export --workdir=runs/first --out=runs/first-merged --merge

Without --merge: the adapter as a PEFT folder. With it: a whole 16-bit Hugging Face checkpoint, W + scale * B A, where W
is the dequantized weight that the adapter was trained beside, or with --merge_into=original the 16-bit one.
In place of --workdir: --model=DIR --adapter=DIR --quant=nf4+dq (how the base was stored while training).
With --workdir, --model says where the base is now.
"""

from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.support import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run of experiments.train.")
OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
MERGE = flags.DEFINE_bool("merge", False, "Write a whole checkpoint with the adapter added to the weights.")
MERGE_INTO = flags.DEFINE_enum(
    "merge_into",
    "dequantized",
    ["dequantized", "original"],
    "What the adapter is added to: the values of the 4-bit weights (as it was trained), or the 16-bit weights.",
)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the merged checkpoint.")
MODEL = flags.DEFINE_string("model", None, "Base: checkpoint folder or hub name.")
REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub name.")
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT folder.")
QUANT = flags.DEFINE_string("quant", None, "How --model was quantized while --adapter was trained: nf4+dq, ..., none.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "Weights that share a scale, with --quant.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is a checkpoint folder.")


class Source(NamedTuple):
    adapter: Path
    model: str | None
    revision: str
    quant: Any  # QuantSpec, or None where nothing says it


def find_source() -> Source:
    """The run of --workdir, or --model and --adapter. Raises InputError for flags that contradict each other."""
    from qlora_jax.errors import InputError
    from qlora_jax.io.merge import read_run
    from qlora_jax.io.write import quant_spec

    if WORKDIR.value and (ADAPTER.value or QUANT.value):
        other = "--adapter" if ADAPTER.value else "--quant"
        raise InputError(f"--workdir and {other} do not go together: the run says which adapter and format are its own")
    if WORKDIR.value:
        run = read_run(Path(WORKDIR.value).expanduser())
        revision = REVISION.value or ("main" if MODEL.value else run.revision)
        return Source(run.adapter, MODEL.value or run.model, revision, run.quant)
    if not ADAPTER.value:
        raise InputError("missing flag --workdir=RUN, or --adapter=DIR (and --model=DIR with --merge)")
    if MERGE.value and not MODEL.value:
        raise InputError("missing flag --model=DIR: the base that --adapter is merged into")
    quant = quant_spec(QUANT.value, BLOCK_SIZE.value) if QUANT.value else None
    return Source(Path(ADAPTER.value).expanduser(), MODEL.value, REVISION.value or "main", quant)


def main() -> None:
    from qlora_jax.io.merge import copy_adapter

    out, source = Path(OUT.value).expanduser(), find_source()
    if not MERGE.value:
        print(f"export: the adapter {source.adapter} -> {out}")
        names = copy_adapter(source.adapter, out, OVERWRITE.value)
        print(f"written: {out} ({', '.join(names)})")
        return
    merge(source, out)


def merge(source: Source, out: Path) -> None:
    from qlora_jax.errors import InputError
    from qlora_jax.io.folder import resolve
    from qlora_jax.io.load import stored_quant
    from qlora_jax.io.merge import REPORT, merge_folder
    from qlora_jax.io.shards import size_text
    from qlora_jax.progress import Progress

    try:
        base = resolve(source.model or "", source.revision)
    except InputError as error:
        raise InputError(f"{error}; --model=DIR says where the base is now") from error
    if MERGE_INTO.value == "dequantized" and source.quant is None and stored_quant(base) is None:
        raise InputError(
            f"{base} is not quantized: say how it was while the adapter was trained (--quant=nf4+dq, or --quant=none), "
            "or merge into it as it is (--merge_into=original)"
        )
    print(f"export: {base} + {source.adapter} -> {out}: merged, {DTYPE.value}")
    with Progress("merging", unit="tensor") as merging:
        report = merge_folder(
            base, source.adapter, out, source.quant, MERGE_INTO.value, DTYPE.value, OVERWRITE.value, progress=merging.to
        )
    print(_consequence(report, source.quant))
    print(
        f"{report['parameters']:,} parameters, {size_text(report['bytes'])}; relative to the weights' norm the adapter "
        f"adds {report['update']:.2e} and rounding to {report['dtype']} changes {report['rounding']:.2e}"
    )
    print(f"written: {out} ({', '.join(report['files'])}; report in {REPORT})")


def _consequence(report: dict, quant: Any) -> str:
    if report["merged_into"] != "original":
        if report["merged_into"].startswith("int8"):
            return (
                f"merged into the dequantized weights ({report['merged_into']}): the weights that were trained with; "
                "activations are in 16 bits now, which were in 8 then"
            )
        return (
            f"merged into the dequantized weights ({report['merged_into']}): this is the model that was trained; "
            "quantizing it again would add a second error"
        )
    if quant is None:
        return "merged into the original weights: outputs differ from training's if that was beside quantized ones"
    if quant.format == "none":
        return "merged into the unquantized weights: this is the model that was trained"
    return f"merged into the original weights, but trained beside {quant}: outputs differ from training's"


if __name__ == "__main__":
    cli.run(main)
