"""Tokens a second of answers: packed 4-bit weights by kernel, dense weights, and transformers with bitsandbytes.

    python -m experiments.bench_generate --size=tiny --rows=1,2

A random model of the named size decodes greedily with 1, 8 and 32 rows. On a GPU the packed forms are xla and the
kernels; on a CPU xla alone. FORM+graphs decodes with the kernels of a token as one CUDA graph. With --torch_python
transformers' generate() runs first, in a process of its own, 4-bit (bitsandbytes) and dense. Every figure is a slope
between few and many new tokens. A form that fails stands in the table with what it said.
"""

import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments.support import cli

SIZE = flags.DEFINE_string("size", None, "tiny, 7b, 13b, 65b or llama-3-8b. Without it: 7b on a GPU, tiny on a CPU.")
ROWS = flags.DEFINE_list("rows", "1,8,32", "Answers that are decoded together.")
FORMS = flags.DEFINE_list(
    "forms", None, "auto, xla, scratch, triton, mosaic, dense, each also with +graphs. Without it: those that are here."
)
RANK = flags.DEFINE_integer("rank", 0, "Of an adapter on all linear layers; 0 is none.", lower_bound=0)
REPEATS = flags.DEFINE_integer("repeats", 3, "Turns, whose median counts.", lower_bound=1)
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has torch, transformers (and bitsandbytes).")
MINUTES = flags.DEFINE_float("minutes", None, "Begin nothing more after so long; it is said.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "JSON file to write.")

KNOWN_FORMS = ("auto", "xla", "scratch", "triton", "mosaic", "dense")
GRAPHS = "+graphs"


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    from experiments.support import versions
    from qlora_jax.errors import InputError
    from qlora_jax.files import write_json

    rows = _counts(ROWS.value)
    if unknown := {form for form in FORMS.value or () if form.removesuffix(GRAPHS) not in KNOWN_FORMS}:
        raise InputError(f"--forms={min(unknown)}: expected some of {', '.join(KNOWN_FORMS)}, each also with {GRAPHS}")
    deadline = math.inf if MINUTES.value is None else time.monotonic() + 60 * MINUTES.value
    import jax

    from qlora_jax.bench import generate

    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    name = SIZE.value or ("7b" if on_gpu else "tiny")
    config = generate.sizes(name)
    forms = FORMS.value or _forms(on_gpu)
    if not on_gpu and (kernel := next((form for form in forms if form not in ("auto", "xla", "dense")), None)):
        raise InputError(f"--forms={kernel} needs an NVIDIA GPU, this process computes on {device.device_kind}")
    dtype = "bfloat16" if on_gpu else "float32"
    print(f"bench_generate: {name}, {dtype}, {device.device_kind}, rows {', '.join(map(str, rows))}", flush=True)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "experiments.bench_generate", *sys.argv[1:]]),
        "versions": versions.installed(),
        "device": device.device_kind,
        "size": name,
        "rank": RANK.value,
        "dtype": dtype,
        "method": "slope between {} and {} new tokens, greedy; median over the turns".format(*generate.TOKENS),
        "copy_bytes_per_second": _copy_rate(on_gpu, dtype),
        "results": [],
        "failures": [],
        "left_out": [],
        "torch": {},
    }

    def write() -> None:
        if OUT.value:
            write_json(Path(OUT.value).expanduser(), report)

    if TORCH_PYTHON.value:
        report["torch"] = _torch(TORCH_PYTHON.value, config, rows, deadline)
        write()
    packed = None
    for form in forms:
        if time.monotonic() > deadline:
            report["left_out"].append(form)
            continue
        kernel = form.removesuffix(GRAPHS)
        if kernel == generate.DENSE:
            packed = None  # not both in memory
        elif packed is None:
            packed = generate.made(config, "xla", RANK.value, dtype)
        model = generate.with_kernel(packed, kernel) if packed else generate.made(config, kernel, RANK.value, dtype)
        for count in rows:
            _time(report, model, form, count, on_gpu)
            write()
        del model
    if not report["results"] and not report["torch"]:
        reason = report["failures"][0]["error"] if report["failures"] else f"--minutes={MINUTES.value} were over"
        raise InputError(f"nothing could be timed: {reason}")
    print(_table(report))
    if OUT.value:
        print(f"written: {OUT.value}")


def _time(report: dict[str, Any], model: Any, form: str, rows: int, on_gpu: bool) -> None:
    from pallas_kernels.nf4_matmul.measure import first_line
    from qlora_jax.bench import generate

    try:
        found = generate.token_seconds(model, rows, REPEATS.value, graphs=form.endswith(GRAPHS))
        if found["token_seconds"] <= 0:
            raise ValueError("lost in the noise of this machine: take more --repeats")
    except Exception as error:  # whatever a compiler says of one form, the others can be timed
        report["failures"].append({"form": form, "rows": rows, "error": first_line(error)})
        return
    seconds, moved = found["token_seconds"], generate.token_bytes(model, rows)
    copy = report["copy_bytes_per_second"]
    report["results"].append(
        {
            "form": form,
            "rows": rows,
            "tokens_per_second": rows / seconds,
            "token_seconds": seconds,
            "first_seconds": found["first_seconds"],
            "bytes_a_token": moved,
            "of_copy": moved / seconds / copy if on_gpu and copy else None,  # a CPU's cache makes it meaningless
        }
    )


def _copy_rate(on_gpu: bool, dtype: str) -> float | None:
    """Bytes/s of a large copy, by slope; None where noise hides it."""
    from pallas_kernels.nf4_matmul import measure

    ceilings = measure.Ceilings(dtype, on_gpu)
    seconds = measure.interleaved({"copy": ceilings.runs["copy"]}, 3, 1)["copy"]
    return ceilings.rates({"copy": seconds, "matmul": 1.0}, 1)[0] if seconds > 0 else None


def _forms(on_gpu: bool) -> list[str]:
    from pallas_kernels.gpu import current_gpu, has_jax_triton

    if not on_gpu:
        return ["xla", "dense"]
    mosaic = ["mosaic"] if current_gpu().compute_capability == 90 else []
    return ["auto", "xla", *(["scratch", "triton"] if has_jax_triton() else []), *mosaic, "dense"]


def _torch(python: str, config: Any, rows: list[int], deadline: float) -> dict[str, Any]:
    """{"bitsandbytes": what torch_generate.py measured or {"error"}, "torch dense": ...}."""
    from qlora_jax.bench import torch_side

    found = {}
    for name, quant in (("bitsandbytes", True), ("torch dense", False)):
        if time.monotonic() > deadline:
            found[name] = {"error": "left out: the minutes were over"}
            continue
        print(f"{name} first, in a process of its own", flush=True)
        wanted = torch_side.generation(config, rows, RANK.value, quant, REPEATS.value)
        found[name] = torch_side.run(python, wanted, torch_side.GENERATE)
    return found


def _counts(wanted: list) -> list[int]:
    from qlora_jax.errors import InputError

    if not wanted or not all(str(count).isdigit() and int(count) > 0 for count in wanted):
        raise InputError(f"--rows={','.join(map(str, wanted))}: expected whole numbers above 0, split by commas")
    return [int(count) for count in wanted]


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'form':<14}{'rows':>5}{'tokens/s':>12}{'ms a token':>12}{'of copy':>9}"]
    for found in report["results"]:
        share = "" if found["of_copy"] is None else f"{found['of_copy']:.0%}"
        lines.append(
            f"{found['form']:<14}{found['rows']:>5}{found['tokens_per_second']:>12,.1f}"
            f"{1e3 * found['token_seconds']:>12.3f}{share:>9}"
        )
    for name, found in report["torch"].items():
        for rows, seconds in found.get("token_seconds", {}).items():
            lines.append(f"{name:<14}{rows:>5}{int(rows) / seconds:>12,.1f}{1e3 * seconds:>12.3f}")
        if "error" in found:
            lines.append(f"{name:<14}not timed: {found['error']}")
    lines += [f"{found['form']:<14}{found['rows']:>5} not timed: {found['error']}" for found in report["failures"]]
    lines += [f"{form:<14}left out: --minutes={MINUTES.value} were over" for form in report["left_out"]]
    return "\n".join([*lines, "of copy: bytes that a token must read, a second, against a large copy in this run."])


if __name__ == "__main__":
    cli.run(main)
