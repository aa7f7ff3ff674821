"""Quantizes a checkpoint to 4 or 8 bits on disk.

    python -m experiments.quantize --model=assets/tiny_llama --out=runs/tiny_llama-nf4

Streamed tensor by tensor; what a killed run left is cleared by the next. Every command takes DIR2 as --model and
computes from it what it computes from DIR quantized while loading. --format=bnb is what transformers and bitsandbytes
read. A folder that is quantized already changes its form only, bit for bit. The report stands in DIR2 as
qlora_jax_quantize.json.
"""

from pathlib import Path

from absl import flags

from experiments.support import cli

MODEL = flags.DEFINE_string("model", None, "Checkpoint folder, gs:// or s3:// address, or a hub name.", required=True)
REVISION = flags.DEFINE_string("revision", "main", "Branch, tag or commit of a hub name.")
OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
FORMAT = flags.DEFINE_enum("format", "native", ["native", "bnb"], "Form on disk: ours, or bitsandbytes'.")
QUANT = flags.DEFINE_string("quant", None, "nf4, fp4, int4, fp4-e3m0; +dq: scales in 8 bits. Or int8. Default: nf4+dq.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Weights that share a scale: 32, 64, ... 4096. Without it: 64.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is a checkpoint folder.")


def main() -> None:
    from qlora_jax.io.folder import resolve
    from qlora_jax.io.load import stored_quant
    from qlora_jax.io.remote import name_of
    from qlora_jax.io.write import REPORT, choose_quant, quantize_folder
    from qlora_jax.progress import Progress

    source, out = resolve(MODEL.value, REVISION.value), Path(OUT.value).expanduser()
    stored = stored_quant(source)
    quant = choose_quant(stored, QUANT.value, BLOCK_SIZE.value, source)
    print(f"quantize: {name_of(source)} ({stored or 'not quantized'}) -> {out}: {quant}, {FORMAT.value} form")
    with Progress("quantizing", unit="tensor") as quantizing:
        report = quantize_folder(source, out, FORMAT.value, quant, OVERWRITE.value, progress=quantizing.to)
    print(table(report))
    print(f"written: {out} ({', '.join(report['files'])}; this table as JSON in {REPORT})")


def table(report: dict) -> str:
    """Bytes before and after, and bits a weight."""
    from qlora_jax.io.shards import size_text

    weights = report["linear_weights"]
    rows = [("", "before", "after")]
    parts = {"linear layers": "linear_bytes", "embedding, norms, head": "other_bytes", "all": "bytes"}
    for label, key in parts.items():
        before, after = (report.get(f"{key}_{when}", report["other_bytes"]) for when in ("before", "after"))
        rows.append((label, size_text(before), size_text(after)))
    bits = f"{8 * report['linear_bytes_before'] / weights:.3f}"
    rows.append(("bits a weight, linear layers", bits, f"{report['bits_per_weight']:.3f}"))
    return "\n".join(f"{label:<30}{before:>14}{after:>14}" for label, before, after in rows)


if __name__ == "__main__":
    cli.run(main)
