"""Times the 4-bit matmul against a dense one.

    python -m experiments.bench_kernels --rows=64

Every form of one product is timed in turns in one run, and so are the ceilings (a large copy, a large matmul) that its
bytes/s and FLOP/s are held against. All of them by slope: what many rounds take more than one, so that no figure holds
what starting and awaiting a program costs. On a GPU the kernels join (scratch; triton forward, up to 16 rows; mosaic on
Hopper), and bitsandbytes where it can be imported; on a CPU there are the XLA forms. A form that refuses a weight or
fails stands in the table with what it said. --tune (GPU) measures every backend and Triton's tile sizes first, and
writes the table that kernel=auto reads, product by product: run again, it goes on with those that are missing. Several
may tune beside each other, each its own products: only compiling Triton's kernels overlaps.
"""

import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.support import cli

SHAPES = flags.DEFINE_list("shapes", None, "Names MODEL/LAYER, or MODEL for all of its layers. Without it: a few.")
ROWS = flags.DEFINE_list("rows", None, "Rows of x. Without it: 1, 16, 256, 2048, 8192 on a GPU; 16, 256 on a CPU.")
OPS = flags.DEFINE_list("ops", "forward,backward", "forward, backward, or both.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float16", "float32"], "Of x. Without it: float32 on CPUs.")
FORMAT = flags.DEFINE_enum("format", "nf4", ["nf4", "fp4", "int4"], "The table of 16 values.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "Weights that share a scale.")
REPEATS = flags.DEFINE_integer("repeats", None, "Turns, whose median counts. Without it: 20 on a GPU, 5 on a CPU.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
MINUTES = flags.DEFINE_float("minutes", None, "Stop timing after so long; what is left out is said.", lower_bound=0)
TUNE = flags.DEFINE_bool("tune", False, "Measure backends and tile sizes, and write the GPU's table (GPU only).")
TUNE_MINUTES = flags.DEFINE_float("tune_minutes", None, "Stop tuning after so long.", lower_bound=0)

METHOD = "slope: (many rounds - one round) / (many - 1) / copies of the weight; median over the turns"
LOST = "lost in the noise of this machine: take more --repeats"
CPU_SHAPES = ["tinyllama-1b/attention", "tinyllama-1b/down"]
GPU_SHAPES = ["llama-7b", "llama-3-8b", "llama-65b"]


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # bitsandbytes needs room on the same GPU
    import jax
    import jax.numpy as jnp

    from experiments.support import versions
    from pallas_kernels.nf4_matmul import Codec, api, config, measure
    from pallas_kernels.nf4_matmul.shapes import SHAPES as ALL_SHAPES
    from qlora_jax.bench import bitsandbytes as bench_bitsandbytes
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

    backends = _backends(on_gpu)
    ceilings = measure.Ceilings(dtype, on_gpu)
    deadline = _deadline(MINUTES.value)
    peaks: list[tuple[float, float]] = []
    results: list[dict] = []
    failures: list[dict] = []
    left_out: list[dict] = []
    report = {
        "command": shlex.join(["python", "-m", "experiments.bench_kernels", *sys.argv[1:]]),
        "versions": versions.installed(),
        "device": device.device_kind,
        "dtype": dtype,
        "format": FORMAT.value,
        "block_size": BLOCK_SIZE.value,
        "repeats": repeats,
        "method": METHOD,
        "ceilings": {},
        "results": results,
        "failures": failures,
        "left_out": left_out,
    }
    for (name, m, op), case in tqdm(cases.items(), desc="timing", leave=False, delay=2):
        if time.monotonic() > deadline:
            left_out.append({"shape": name, "rows": m, "op": op})
            continue
        copies = measure.copies_that_pass_the_cache(case, on_gpu)
        here = [b for b in backends if b != "triton" or config.is_few(op, m)]
        refused = {b: api.refusal(codecs[name]._replace(backend=b), jnp.dtype(dtype)) for b in here}
        taken = tuple(b for b in here if refused[b] is None)
        forms = measure.forms(case, codecs[name], copies, taken)
        if on_gpu and dtype != "float32" and FORMAT.value == "nf4" and bench_bitsandbytes.is_there():
            forms["bitsandbytes"] = (bench_bitsandbytes.product(case, copies), forms["xla"][1])
        running, failing = measure.split_failing({form: run for form, (run, _) in forms.items()})
        failing |= {form: reason for form, reason in refused.items() if reason is not None}
        seconds = measure.interleaved(ceilings.runs | running, repeats, copies)
        has_ceilings = min(seconds[ceiling] for ceiling in ceilings.runs) > 0
        timed = [form for form in running if has_ceilings and seconds[form] > 0]
        failing |= {form: LOST if has_ceilings else f"the ceilings are {LOST}" for form in running if form not in timed}
        failures += [{"shape": name, "rows": m, "op": op, "form": f, "error": error} for f, error in failing.items()]
        if not timed:
            _write(report)
            continue
        copy, multiply = ceilings.rates(seconds, copies)
        peaks.append((copy, multiply))
        for form in timed:
            moved = forms[form][1]
            results.append(
                {
                    "shape": name,
                    "out_features": case.shape.out_features,
                    "in_features": case.shape.in_features,
                    "rows": m,
                    "op": op,
                    "form": form,
                    "seconds": seconds[form],
                    "speed_to_dense": seconds["dense"] / seconds[form] if "dense" in timed else None,
                    "bytes_per_second": moved / seconds[form],
                    "of_copy": moved / seconds[form] / copy,
                    "flops_per_second": case.flops / seconds[form],
                    "of_matmul": case.flops / seconds[form] / multiply,
                }
            )
        copy, multiply = (statistics.median(peak) for peak in zip(*peaks, strict=True))
        report["ceilings"] = {"copy_bytes_per_second": copy, "matmul_flops_per_second": multiply}
        _write(report)  # after each, so that an interruption loses one
    if not peaks and not failures:
        raise InputError(f"--minutes={MINUTES.value}: over before anything was timed; give more")
    if not peaks:
        raise InputError(f"nothing could be timed; the first form, {failures[0]['form']}: {failures[0]['error']}")
    print(_table(results, failures))
    if left_out:
        print(f"--minutes={MINUTES.value} was over: {len(left_out)} of {len(cases)} products were not timed")
    print(f"ceilings in this run: copy {copy / 1e9:.1f} GB/s, matmul {multiply / 1e12:.3f} TFLOP/s")
    if path := _write(report):
        print(f"written: {path}")


def _write(report: dict) -> Path | None:
    """Writes --out, if it was given."""
    if not OUT.value:
        return None
    path = Path(OUT.value).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _backends(on_gpu: bool) -> tuple[str, ...]:
    from pallas_kernels.gpu import current_gpu
    from pallas_kernels.nf4_matmul import config

    if not on_gpu:
        return ("xla",)
    is_hopper = current_gpu().compute_capability == 90
    return tuple(backend for backend in config.MEASURED if backend != "mosaic" or is_hopper)


def _deadline(minutes: float | None) -> float:
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


def _tune(cases: dict, codecs: dict, repeats: int) -> None:
    """Adds the fastest choice of every case that the GPU's table has not, until --tune_minutes are over."""
    from pallas_kernels.gpu import current_gpu
    from pallas_kernels.nf4_matmul import config, tune

    gpu = current_gpu()
    path = config.table_file(gpu.name)
    table = config.tuned_table(gpu.name)
    wanted = {(case.op, case.shape, case.block_size, config.row_bucket(case.rows)): key for key, case in cases.items()}
    missing = {entry: key for entry, key in wanted.items() if entry not in table}
    if len(missing) < len(wanted):
        print(f"tuning: {len(wanted) - len(missing)} products are in {path} (take them out to tune them anew)")
    deadline = _deadline(TUNE_MINUTES.value)
    for number, (entry, key) in enumerate(missing.items()):
        name, m, op = key
        print(f"tuning {number + 1} of {len(missing)}: {name}, {m} rows, {op}", flush=True)
        try:
            found = tune.tune(cases[key], codecs[name], gpu, repeats, print, lambda: time.monotonic() > deadline)
        except TimeoutError:
            print(f"--tune_minutes={TUNE_MINUTES.value} are over: {len(missing) - number} products are left")
            break
        except RuntimeError as error:
            print(f"left out: {error}")
            continue
        times = ", ".join(f"{backend} {seconds * 1e6:.1f} us" for backend, seconds in found.seconds.items())
        print(f"fastest: {found.choice.backend} ({times})", flush=True)
        with tune.alone(gpu.name):  # after each, so that an interruption loses one; another process may have added some
            config.forget_tables()
            config.write_table(path, gpu.name, config.tuned_table(gpu.name) | {entry: found.choice})
    config.forget_tables()
    print(f"{path}: {len(config.tuned_table(gpu.name))} entries")


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


def _table(results: list[dict], failures: list[dict]) -> str:
    head = ("shape", "rows", "op", "form", "us", "speed", "GB/s", "TFLOP/s", "of peak")
    lines = ["{:<38}{:>6} {:<9}{:<19}{:>10}{:>8}{:>9}{:>9}{:>9}".format(*head)]
    for r in results:
        shape = f"{r['shape']} {r['out_features']}x{r['in_features']}"
        speed = "" if r["speed_to_dense"] is None else f"{r['speed_to_dense']:.2f}x"
        lines.append(
            f"{shape:<38}{r['rows']:>6} {r['op']:<9}{r['form']:<19}{r['seconds'] * 1e6:>10.0f}"
            f"{speed:>8}{r['bytes_per_second'] / 1e9:>9.1f}{r['flops_per_second'] / 1e12:>9.3f}"
            f"{max(r['of_copy'], r['of_matmul']):>9.0%}"
        )
    lines += [f"{f['shape']:<38}{f['rows']:>6} {f['op']:<9}{f['form']:<19} not timed: {f['error']}" for f in failures]
    return "\n".join([*lines, "speed: against dense. of peak: the nearer of the two ceilings."])


if __name__ == "__main__":
    cli.run(main)
