"""Times the 4-bit matmul against dense and dequantize-then-dot: python -m experiments.bench_kernels [--out=FILE.json]

Every form of one product is timed in turns in one run, and so are the ceilings (a large copy, a large matmul) that its
bytes/s and FLOP/s are held against. On a GPU the Triton kernels join, and bitsandbytes where it can be imported; on a
CPU there are the XLA forms. --tune (GPU) measures tile sizes first and writes the table that later runs read.
"""

import json
import os
import statistics
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments import cli

SHAPES = flags.DEFINE_list("shapes", None, "Names MODEL/LAYER, or MODEL for all of its layers. Without it: a few.")
ROWS = flags.DEFINE_list("rows", None, "Rows of x. Without it: 1, 16, 256, 2048, 8192 on a GPU; 16, 256 on a CPU.")
OPS = flags.DEFINE_list("ops", "forward,backward", "forward, backward, or both.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float16", "float32"], "Of x. Without it: float32 on CPUs.")
FORMAT = flags.DEFINE_enum("format", "nf4", ["nf4", "fp4", "int4"], "The table of 16 values.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "Weights that share a scale.")
REPEATS = flags.DEFINE_integer("repeats", None, "Turns, whose median counts. Without it: 20 on a GPU, 5 on a CPU.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
TUNE = flags.DEFINE_bool("tune", False, "Measure the Triton kernels' tile sizes and write their table (GPU only).")

CPU_SHAPES = ["tinyllama-1b/attention", "tinyllama-1b/down"]
GPU_SHAPES = ["llama-7b", "llama-3-8b", "llama-65b"]


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # bitsandbytes needs room on the same GPU
    import jax

    from experiments import bench_bitsandbytes
    from pallas_kernels.nf4_matmul import Codec, config, measure
    from pallas_kernels.nf4_matmul.shapes import SHAPES as ALL_SHAPES
    from qlora_jax.errors import InputError
    from qlora_jax.quant.codebooks import absmax_map, codebook
    from qlora_jax.quant.tensor import check_block_size

    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    check_block_size(BLOCK_SIZE.value)
    names = _names(SHAPES.value or (GPU_SHAPES if on_gpu else CPU_SHAPES), list(ALL_SHAPES))
    rows = _counts(ROWS.value or ([1, 16, 256, 2048, 8192] if on_gpu else [16, 256]))
    if unknown := set(OPS.value) - set(config.OPS):
        raise InputError(f"--ops={unknown.pop()}: expected {' or '.join(config.OPS)}")
    ops = [op for op in config.OPS if op in OPS.value]
    if TUNE.value and not on_gpu:
        raise InputError(f"--tune measures GPU kernels, this process computes on {device.device_kind}: run it on a GPU")
    dtype = DTYPE.value or ("bfloat16" if on_gpu else "float32")
    repeats = (20 if on_gpu else 5) if REPEATS.value is None else REPEATS.value
    if repeats < 1:
        raise InputError(f"--repeats={repeats}: expected at least 1")
    table, scales = codebook(FORMAT.value).values, absmax_map()
    cases = {
        (name, m, op): measure.Case(op, ALL_SHAPES[name], m, BLOCK_SIZE.value, dtype)
        for name in names
        for m in rows
        for op in ops
    }
    codecs = {name: Codec(ALL_SHAPES[name], BLOCK_SIZE.value, table, scales) for name in names}
    print(f"bench_kernels: {len(cases)} products, {dtype}, {device.device_kind}, median of {repeats} turns", flush=True)
    if TUNE.value:
        _tune(cases, codecs, repeats)

    backends = ("xla", "triton") if on_gpu else ("xla",)
    ceilings = measure.Ceilings(dtype, on_gpu)
    results, peaks = [], []
    for (name, m, op), case in tqdm(cases.items(), desc="timing", leave=False, delay=2):
        copies = measure.copies_that_pass_the_cache(case, on_gpu)
        eight_bit = measure.eight_bit_forms(case) if on_gpu else ()
        forms = measure.forms(case, codecs[name], copies, backends + eight_bit)
        errors = {form: measure.eight_bit_error(case, codecs[name], form) for form in eight_bit}
        for form, error in errors.items():
            tqdm.write(f"{name}, {m} rows: {form} is off by {error:.2%} of the full product (root mean square)")
        if on_gpu and dtype != "float32" and FORMAT.value == "nf4" and bench_bitsandbytes.is_there():
            forms["bitsandbytes"] = (bench_bitsandbytes.product(case, copies), forms["xla"][1])
        runs = ceilings.runs | {form: run for form, (run, _) in forms.items()}
        seconds = measure.interleaved(runs, repeats, copies)
        copy, multiply = ceilings.rates(seconds, copies)
        peaks.append((copy, multiply))
        for form, (_, moved) in forms.items():
            results.append(
                {
                    "shape": name,
                    "out_features": case.shape.out_features,
                    "in_features": case.shape.in_features,
                    "rows": m,
                    "op": op,
                    "form": form,
                    "seconds": seconds[form],
                    "speed_to_dense": seconds["dense"] / seconds[form],
                    "bytes_per_second": moved / seconds[form],
                    "of_copy": moved / seconds[form] / copy,
                    "flops_per_second": case.flops / seconds[form],
                    "of_matmul": case.flops / seconds[form] / multiply,
                }
                | ({"error_to_full": errors[form]} if form in errors else {})
            )
    print(_table(results))
    copy, multiply = (statistics.median(peak) for peak in zip(*peaks, strict=True))
    print(f"ceilings in this run: copy {copy / 1e9:.1f} GB/s, matmul {multiply / 1e12:.3f} TFLOP/s")
    if OUT.value:
        report = {
            "device": device.device_kind,
            "dtype": dtype,
            "format": FORMAT.value,
            "block_size": BLOCK_SIZE.value,
            "repeats": repeats,
            "ceilings": {"copy_bytes_per_second": copy, "matmul_flops_per_second": multiply},
            "results": results,
        }
        path = Path(OUT.value).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {path}")


def _tune(cases: dict, codecs: dict, repeats: int) -> None:
    """Adds the best tiles of every case to the GPU's table."""
    from pallas_kernels.nf4_matmul import config, measure, triton_backend

    gpu = triton_backend.current_gpu()
    path = config.table_file(gpu.name)
    table = dict(config.tuned_table(gpu.name))
    for (name, m, op), case in tqdm(cases.items(), desc="tuning", leave=False, delay=2):
        tiles = measure.tune(case, codecs[name], gpu, repeats, tqdm.write)
        table[op, case.shape, case.block_size, config.row_bucket(m)] = tiles
        config.write_table(path, gpu.name, table)  # after each, so that an interruption loses one
    config.tuned_table.cache_clear()
    print(f"written: {path} ({len(table)} entries)")


def _names(wanted: list[str], known: list[str]) -> list[str]:
    """The shapes that entries name: a layer of a model, or all layers of it."""
    from qlora_jax.errors import InputError

    found: list[str] = []
    for entry in wanted:
        matches = [name for name in known if entry in (name, name.split("/")[0])]
        if not matches:
            models = ", ".join(dict.fromkeys(name.split("/")[0] for name in known))
            raise InputError(f"--shapes={entry}: expected a model ({models}), or one of its layers like {known[0]}")
        found += matches
    return list(dict.fromkeys(found))


def _counts(wanted: list) -> list[int]:
    from qlora_jax.errors import InputError

    if not all(str(count).isdigit() and int(count) > 0 for count in wanted):
        raise InputError(f"--rows={','.join(map(str, wanted))}: expected whole numbers above 0, split by commas")
    return [int(count) for count in wanted]


def _table(results: list[dict]) -> str:
    head = ("shape", "rows", "op", "form", "us", "speed", "GB/s", "TFLOP/s", "of peak")
    lines = ["{:<38}{:>6} {:<9}{:<17}{:>10}{:>8}{:>9}{:>9}{:>9}".format(*head)]
    for r in results:
        shape = f"{r['shape']} {r['out_features']}x{r['in_features']}"
        lines.append(
            f"{shape:<38}{r['rows']:>6} {r['op']:<9}{r['form']:<17}{r['seconds'] * 1e6:>10.0f}"
            f"{r['speed_to_dense']:>7.2f}x{r['bytes_per_second'] / 1e9:>9.1f}{r['flops_per_second'] / 1e12:>9.3f}"
            f"{max(r['of_copy'], r['of_matmul']):>9.0%}"
        )
    return "\n".join([*lines, "speed: against dense. of peak: the nearer of the two ceilings."])


if __name__ == "__main__":
    cli.run(main)
